"""What every command has in common, before it does anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.gateways import environment

HEAVY = {"PIL", "httpx", "litestar", "msgspec", "sqlite3", "uvicorn", "tomllib"}


def test_who_asks_for_help_does_not_wait_for_heavy_parts_to_be_loaded() -> None:
    asked = "import sys, gateway.commands; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )

    loaded = set(done.stdout.split())
    assert "gateway.steering" in loaded
    assert loaded & HEAVY == set()
    ours = {name for name in loaded if name.startswith(("gateway.", "providers"))}
    heavier = {"gateway.app", "gateway.books", "gateway.remote", "gateway.settings"}
    assert ours & heavier == set()


@pytest.mark.parametrize("loaded", [True, False])
def test_no_thread_of_a_library_meets_an_interpreter_that_goes_away(
    *, loaded: bool
) -> None:
    script = (
        "import atexit, sys\n"
        f"{'import obstore' if loaded else ''}\n"
        "from gateway.cli import main\n"
        "atexit.register(print, 'the interpreter goes away')\n"
        "sys.argv = ['imageway', 'no-such-command']\n"
        "main()\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "no-such-command" in done.stderr
    assert ("goes away" in done.stdout) == (not loaded)
