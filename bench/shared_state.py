"""What sharing costs, and what the loss of Redis costs: two gateways, 20 requests/s.

The same stream is asked without Redis first: what is added is the difference.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from bench.figures import Table
from tests.chaos.outages import Phase, outages, stream
from tests.servers import RedisServer

ADDED_MAX_MS = 60.0
IDLE_S = 10.0
COMMANDS_MAX_PER_S = 20.0
"""Of one idle process, those inside of scripts included."""


def measure(each_s: float) -> None:
    table = Table(f"shared state, {each_s:.0f} s each")
    with tempfile.TemporaryDirectory() as name, RedisServer(Path(name) / "r") as server:
        folder = Path(name)
        alone = Phase("without Redis", each_s)
        stream(folder / "alone", server, [alone], shared=False)
        table.line("without Redis: p50 / p99", _times(alone))
        phases = outages(server, each_s, each_s)
        commands: list[int] = []
        idle = Phase("idle", 0, lambda: _idle(server, commands))
        stream(folder / "shared", server, [idle, *phases])
        for phase in phases:
            table.line(f"{phase.name}: p50 / p99", _times(phase))
            table.none_of(f"{phase.name}: failed", phase.failed)
            added_ms = phase.within_ms(0.99) - alone.within_ms(0.99)
            table.at_most(f"{phase.name}: added p99", added_ms, ADDED_MAX_MS, "ms")
        per_s = commands[0] / 2 / IDLE_S
        what = "Redis commands of an idle process"
        table.at_most(what, per_s, COMMANDS_MAX_PER_S, "/s")
    table.end()


def _idle(server: RedisServer, commands: list[int]) -> None:
    before = server.commands()
    time.sleep(IDLE_S)
    commands.append(server.commands() - before)


def _times(phase: Phase) -> str:
    return f"{phase.within_ms(0.5):.1f} / {phase.within_ms(0.99):.1f} ms"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=20.0)
    measure(options.parse_args().seconds)


if __name__ == "__main__":
    main()
