"""The ``imageway`` command: starts with nothing but this, for Ctrl-C may come early."""

import signal
import sys

THREADED = "obstore"
"""A library whose own threads may still reach for an interpreter that goes away.

That aborts the process (PyO3/pyo3-async-runtimes, issue 40), whatever it did so far.
"""


def main() -> None:
    """Load the commands, and run the one that is asked for."""
    try:
        from gateway.commands import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as shells count it
    try:
        run(prog_name="imageway")
    except SystemExit as end:
        if THREADED in sys.modules and isinstance(end.code, int | None):
            from gateway.terminal import leave_at_once

            leave_at_once(end.code or 0)
        raise
