"""Far too much is asked for: who is refused, how, and who notices nothing.

Beside each experiment stands one with the rule taken out that it shows.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.chaos.crowds import Asker, ask
from tests.chaos.overloads import (
    READS_PER_S,
    SMALL,
    TIMES_TOO_MUCH,
    WHOLE,
    Size,
    a_hundred_times_as_much,
    keys_of,
    overloaded,
    success,
    ten_times_too_much,
    waited_s,
)

MIB = 1024 * 1024


@pytest.fixture
def size(whole: bool) -> Size:
    return WHOLE if whole else SMALL


def tell(what: str, **figures: float) -> None:
    text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    print(f"{what}: {text} (load {os.getloadavg()[0]:.1f})")  # noqa: T201 - figures


def test_ten_times_too_much_is_refused_early_and_the_slots_stay_in_use(
    tmp_path: Path, whole: bool, size: Size
) -> None:
    found = ten_times_too_much(tmp_path, size)

    tell(
        "10 x overload",
        goodput=found.goodput,
        refused_p50_ms=found.refused_ms(0.5),
        refused_p99_ms=found.refused_ms(0.99),
        waited_p99_s=waited_s(found.askers, 0.99),
        grown_mib=found.grown_bytes / MIB,
    )
    statuses = sum((asker.statuses for asker in found.askers), start=Counter[int]())
    assert set(statuses) == {200, 429}, statuses
    assert sum(found.shed.values()) == statuses[429]
    assert found.goodput >= (0.9 if whole else 0.5)
    waits = {s.retry_after_s for a in found.askers for s in a.seen if s.status == 429}
    assert all(wait is not None and 1 <= wait <= 30 for wait in waits)
    served = [asker.statuses[200] for asker in found.askers]
    assert max(served) <= 1.5 * min(served), served
    # Reads are never shed.
    assert found.reader.statuses == {200: round(READS_PER_S * size.for_s)}
    if whole:
        assert found.grown_bytes <= 16 * MIB


def test_a_tenant_that_asks_for_a_hundred_times_as_much_costs_the_others_nothing(
    tmp_path: Path, size: Size
) -> None:
    loud, quiet = a_hundred_times_as_much(tmp_path, size)

    tell(
        "100 x as much",
        others=success(quiet),
        others_p95_s=waited_s(quiet, 0.95),
        loud=success([loud]),
    )
    assert success(quiet) >= 0.999
    assert set(loud.statuses) == {200, 429}


def test_without_fairness_the_others_are_turned_away(
    tmp_path: Path, size: Size
) -> None:
    loud, quiet = a_hundred_times_as_much(tmp_path, size, "unfair")

    tell("100 x as much, unfair", others=success(quiet), loud=success([loud]))
    assert success(quiet) < 0.9


def test_without_bounds_more_and_more_wait(tmp_path: Path) -> None:
    with overloaded(tmp_path, SMALL, "unbounded") as gateway:
        (key,) = keys_of(gateway, "greedy")
        asker = Asker(key, TIMES_TOO_MUCH * SMALL.capacity_per_s)

        async def some() -> float:
            asking = asyncio.create_task(ask(gateway.url, [asker], 3))
            await asyncio.sleep(3)
            async with httpx.AsyncClient() as client:
                text = (await client.get(f"{gateway.url}/metrics")).text
            asking.cancel()
            await asyncio.wait({asking})
            found = [
                line.rpartition(" ")[2]
                for line in text.splitlines()
                if line.startswith('imageway_waiting{model="gpt-image-2"}')
            ]
            return float(found[0])

        waiting = asyncio.run(some())

    tell("10 x overload, unbounded", waiting=waiting)
    assert waiting > 2 * SMALL.room
