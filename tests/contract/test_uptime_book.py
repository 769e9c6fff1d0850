"""What every book of uptimes, and every backlog, must do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.adapters.sql.backlog import SqlBacklog
from gateway.adapters.sql.uptime import SqlUptime
from gateway.core.tasks import DeliveryMode
from gateway.core.uptime import DAY_MS, SLOT_MS, Count, Kind, Slot
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    Stores,
    a_task,
    an_attempt,
    an_end,
    open_stores,
)

FIRST_MS = NOW_MS - NOW_MS % DAY_MS
MODEL = (Kind.MODEL, "gpt-image-2")
UPSTREAM = (Kind.UPSTREAM, "openai")


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def test_counts_of_a_slot_add_up_and_so_do_the_slots_of_a_day(
    stores: Stores,
) -> None:
    book = SqlUptime(stores.database)
    later_ms = FIRST_MS + 3 * SLOT_MS

    await book.add(
        [Slot(MODEL, FIRST_MS, Count(5, 1)), Slot(UPSTREAM, FIRST_MS, Count(0, 2))]
    )
    await book.add(
        [Slot(MODEL, FIRST_MS, Count(1, 1)), Slot(MODEL, later_ms, Count(7, 0))]
    )

    assert sorted(await book.slots(FIRST_MS), key=str) == sorted(
        [
            Slot(MODEL, FIRST_MS, Count(6, 2)),
            Slot(UPSTREAM, FIRST_MS, Count(0, 2)),
            Slot(MODEL, later_ms, Count(7, 0)),
        ],
        key=str,
    )
    assert await book.slots(FIRST_MS + 1) == [Slot(MODEL, later_ms, Count(7, 0))]
    days = {slot.subject: slot for slot in await book.days(FIRST_MS)}
    assert days[MODEL] == Slot(MODEL, FIRST_MS, Count(13, 2))
    assert days[UPSTREAM].count == Count(0, 2)


async def test_processes_that_add_at_once_lose_nothing(stores: Stores) -> None:
    book = SqlUptime(stores.database)
    one = [Slot(MODEL, FIRST_MS, Count(1, 0)), Slot(UPSTREAM, FIRST_MS, Count(1, 0))]

    await asyncio.gather(*(book.add(one if n % 2 else one[::-1]) for n in range(40)))

    assert {slot.count for slot in await book.slots(0)} == {Count(40, 0)}
    assert {slot.count for slot in await book.days(0)} == {Count(40, 0)}


async def test_slots_with_trouble_are_found_the_latest_first(stores: Stores) -> None:
    book = SqlUptime(stores.database)
    counts = [Count(0, 3), Count(100, 3), Count(0, 2), Count(57, 3)]
    slots = [
        Slot(MODEL, FIRST_MS + place * SLOT_MS, count)
        for place, count in enumerate(counts)
    ]
    await book.add(slots)

    assert await book.troubled(0, 10) == [slots[3], slots[0]]
    assert await book.troubled(0, 1) == [slots[3]]
    assert await book.troubled(FIRST_MS + 1, 10) == [slots[3]]
    assert [slot.count.troubled for slot in slots] == [True, False, False, True]


async def test_what_is_old_is_forgotten(stores: Stores) -> None:
    book = SqlUptime(stores.database)
    await book.add([Slot(MODEL, FIRST_MS - DAY_MS, Count(1, 0))])
    await book.add([Slot(MODEL, FIRST_MS, Count(2, 0))])

    assert await book.forget(FIRST_MS) == 2

    assert {slot.count for slot in await book.slots(0)} == {Count(2, 0)}
    assert {slot.count for slot in await book.days(0)} == {Count(2, 0)}


async def test_the_backlog_is_what_is_open_and_held(stores: Stores) -> None:
    await stores.fund(1_000)
    backlog = SqlBacklog(stores.database)
    await stores.tasks.open(a_task("task-1"))
    await stores.tasks.begin_attempt(an_attempt("task-1"))
    for place in (2, 3):
        await stores.tasks.open(
            a_task(
                f"task-{place}",
                mode=DeliveryMode.ASYNC,
                order_json="{}",
                created_ms=NOW_MS + place,
            )
        )
    await stores.tasks.open(a_task("task-4"))
    await stores.tasks.finish(an_end("task-4"))

    found = await backlog.read()

    assert (found.pending, found.processing) == (2, 1)
    assert found.oldest_queued_ms == NOW_MS + 2
    assert found.held_nanocredits == 300


async def test_with_nothing_open_the_backlog_is_empty(stores: Stores) -> None:
    found = await SqlBacklog(stores.database).read()

    assert (found.pending, found.processing, found.held_nanocredits) == (0, 0, 0)
    assert found.oldest_queued_ms is None
