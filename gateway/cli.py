"""The ``imageway`` command: starts with nothing but this, for Ctrl-C may come early."""

import signal
import sys


def main() -> None:
    """Load the commands, and run the one that is asked for."""
    try:
        from gateway.commands import main as run
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # as shells count it
    run(prog_name="imageway")
