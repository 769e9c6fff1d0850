"""What every command has in common, before it does anything."""

from __future__ import annotations

import subprocess
import sys

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
