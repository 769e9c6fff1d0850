"""What every memory of askings for a reload must do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.adapters.sql.processes import SqlProcesses
from gateway.adapters.sql.reloads import SqlReloads
from gateway.ports import ReloadNote
from tests.contract.stores import BACKENDS, NOW_MS, Stores, open_stores


@dataclass
class Kept:
    """The askings under test, over the processes that heed them."""

    stores: Stores

    @property
    def reloads(self) -> SqlReloads:
        return SqlReloads(self.stores.database)

    @property
    def processes(self) -> SqlProcesses:
        return SqlProcesses(self.stores.database)


@pytest.fixture(params=BACKENDS)
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kept]:
    async with open_stores(request.param, tmp_path) as stores:
        yield Kept(stores)


async def test_askings_are_counted_and_outlive_a_restart(kept: Kept) -> None:
    assert await kept.reloads.asked() == 0

    assert await kept.reloads.ask() == 1
    await kept.stores.reopen()

    assert await kept.reloads.asked() == 1


async def test_who_asks_at_once_gets_a_number_of_his_own(kept: Kept) -> None:
    numbers = await asyncio.gather(*(kept.reloads.ask() for _ in range(20)))

    assert sorted(numbers) == list(range(1, 21))


async def test_each_live_process_says_how_far_it_is(kept: Kept) -> None:
    for name, seen_ms in [("a", NOW_MS), ("b", NOW_MS), ("gone", NOW_MS - 60_000)]:
        await kept.processes.beat(name, now_ms=seen_ms)
    await kept.reloads.note("a", 3, None)
    await kept.reloads.note("a", 4, "server.prot: unknown key")

    notes = await kept.reloads.notes(alive_since_ms=NOW_MS - 30_000)

    assert list(notes) == [
        ReloadNote("a", 4, "server.prot: unknown key"),
        ReloadNote("b", None, None),
    ]
    await kept.processes.beat("a", now_ms=NOW_MS + 1)
    (still, _) = await kept.reloads.notes(alive_since_ms=NOW_MS - 30_000)
    assert still.heeded == 4, "a sign of life must not undo it"
