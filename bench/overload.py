"""Ten times what can be made is asked for; then one tenant asks for 100 times as much.

The upstream has 20 slots and takes 2 s for a picture: 10 pictures a second. The
clients do not heed Retry-After. Each figure is also taken without the rule behind it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bench.figures import MIB, Table
from tests.chaos.overloads import (
    QUIET,
    WHOLE,
    Size,
    a_hundred_times_as_much,
    success,
    ten_times_too_much,
    waited_s,
)

GOODPUT_MIN = 0.9
SUCCESS_MIN = 0.999
REFUSED_MAX_MS = 50.0
GROWN_MAX_MIB = 16.0
UNBOUNDED_S = 30.0
"""Without bounds every request stays; longer is too much for a small machine."""


def measure(size: Size) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = Table(f"overload, {size.for_s:.0f} s each")
        too_much(table, Path(folder), size)
        table.line("-- without bounds", "")
        short = replace(size, for_s=min(size.for_s, UNBOUNDED_S))
        too_much(table, Path(folder) / "unbounded", short, "unbounded")
        too_loud(table, Path(folder) / "loud", size)
        table.line("-- without fairness", "")
        too_loud(table, Path(folder) / "unfair", size, "unfair")
        table.end()


def too_much(table: Table, folder: Path, size: Size, *switches: str) -> None:
    found = ten_times_too_much(folder, size, *switches)
    table.at_least(
        f"10 x overload for {size.for_s:.0f} s: goodput, share of capacity",
        found.goodput,
        GOODPUT_MIN,
    )
    if found.shed:
        worst = found.refused_ms(0.99)
        table.at_most("refusals, p99", worst, REFUSED_MAX_MS, "ms")
        table.line("refusals, p50", f"{found.refused_ms(0.5):.1f} ms")
    waits = " / ".join(f"{waited_s(found.askers, q):.1f}" for q in (0.5, 0.99))
    table.line("accepted: from asking to the picture, p50 / p99", f"{waits} s")
    grown = found.grown_bytes / MIB
    table.at_most("memory grown since the room is full", grown, GROWN_MAX_MIB, "MiB")
    resident = " ".join(f"{each / MIB:.0f}" for each in found.resident_bytes[::2])
    table.line("resident, MiB, from start to end", resident)
    for labels, count in found.shed.items():
        table.line(f"shed {labels}", f"{count:.0f}")
    served = sorted(asker.statuses[200] for asker in found.askers)
    table.line("pictures for each of the tenants", " ".join(map(str, served)))
    table.all_of("reads answered", found.reader.statuses[200], len(found.reader.seen))
    statuses = sum((asker.statuses for asker in found.askers), start=Counter[int]())
    table.line("answers by status (0: none within 75 s)", _text(statuses))


def too_loud(table: Table, folder: Path, size: Size, *switches: str) -> None:
    loud, quiet = a_hundred_times_as_much(folder, size, *switches)
    asked = sum(len(asker.seen) for asker in quiet)
    table.at_least(
        f"100 x: success of the {QUIET} others ({asked} requests)",
        success(quiet),
        SUCCESS_MIN,
    )
    waits = " / ".join(f"{waited_s(quiet, q):.2f}" for q in (0.5, 0.95))
    table.line("… from asking to the picture, p50 / p95", f"{waits} s")
    table.line("… of the loud one", f"{success([loud]):.3f}")


def _text(statuses: Counter[int]) -> str:
    return ", ".join(f"{status}: {n}" for status, n in sorted(statuses.items()))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60.0)
    measure(replace(WHOLE, for_s=options.parse_args().seconds))


if __name__ == "__main__":
    main()
