"""All six simulated providers at once, and a gateway's config to go with them.

``python -m tests.simulators`` (or ``make simulators``) serves them on loopback, on the
ports after ``--port``, until Ctrl-C; then it prints the bills. See docs/rehearsal.md.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from tests.simulators.cast import BASE_PORT, CAST, write_gateway
from tests.simulators.server import Simulator, served, told_to_stop

HELP = """
Run a gateway before them, in another terminal (it prints its first key):
  .venv/bin/imageway serve --config {config} --data-dir {folder}/data
Fail the next two calls of one; fail all of them from now on; let it be well again:
  curl -s {origin}/_script -d '[{{"status": 503}}, {{"hang": true}}]'
  curl -s {origin}/_mode -d '{{"status": 503}}'
  curl -s {origin}/_mode -d null
Read what was bought there, and what it comes to:
  curl -s {origin}/_purchases
  curl -s {origin}/_bill
docs/rehearsal.md rehearses an outage with these. Ctrl-C ends them all.
"""


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulators",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--port", type=int, default=BASE_PORT, help=f"the base port ({BASE_PORT})"
    )
    parser.add_argument(
        "--latency-s", type=float, help="of them all; else each has its own"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("data/rehearsal"),
        help="where the config goes (data/rehearsal)",
    )
    given = parser.parse_args()
    try:
        asyncio.run(serve(given.port, given.latency_s, given.folder))
    except OSError as error:
        sys.exit(f"{error.strerror}: choose other ports with --port")


async def serve(base_port: int, latency_s: float | None, folder: Path) -> None:
    """Serve all six, and tell how to use them."""
    playing: dict[str, Simulator] = {}
    async with AsyncExitStack() as stack:
        for part in CAST:
            late_s = part.latency_s if latency_s is None else latency_s
            made = part.kind(part.key, latency_s=late_s, percent=part.percent)
            port = base_port + part.place
            playing[part.name] = await stack.enter_async_context(served(made, port))
        urls = {name: simulator.base_url for name, simulator in playing.items()}
        config = write_gateway(folder, urls)
        say("The cheapest first; each key is in the config's folder:")
        for name, simulator in playing.items():
            say(f"  {name:<10} {simulator.base_url:<32} {simulator.latency_s:g} s")
        origin = playing[CAST[0].name].origin
        say(HELP.format(config=config, folder=folder, origin=origin))
        await told_to_stop()
    say(f"\n{'':<10} {'jobs':>6} {'bill, USD':>12}")
    for name, simulator in playing.items():
        say(f"{name:<10} {len(simulator.log):>6} {simulator.owed_usd:>12.6f}")


def say(line: str) -> None:
    """Print to whoever rehearses."""
    print(line, flush=True)  # noqa: T201 - that is what it is for


if __name__ == "__main__":
    main()
