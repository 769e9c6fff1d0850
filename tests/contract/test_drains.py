"""What every memory of drained upstreams must do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.ports import Drains
from tests.contract.stores import BACKENDS, NOW_MS, open_stores
from tests.fakes import MemoryDrains


@dataclass
class Kept:
    """The drains under test, and a restart that they must survive."""

    drains: Drains
    restarted: Callable[[], Awaitable[Drains]]


@asynccontextmanager
async def kept_by(backend: str, folder: Path) -> AsyncIterator[Kept]:
    if backend == "memory":
        fake = MemoryDrains()

        async def same() -> Drains:
            return fake

        yield Kept(fake, same)
        return
    async with open_stores(backend, folder) as stores:

        async def reopened() -> Drains:
            await stores.reopen()
            return stores.drains

        yield Kept(stores.drains, reopened)


@pytest.fixture(params=["memory", *BACKENDS])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kept]:
    async with kept_by(request.param, tmp_path) as opened:
        yield opened


async def test_at_first_nothing_is_drained(kept: Kept) -> None:
    assert await kept.drains.drained() == {}


async def test_what_is_drained_stays_so_over_a_restart(kept: Kept) -> None:
    await kept.drains.drain("a", now_ms=NOW_MS)
    await kept.drains.drain("b", now_ms=NOW_MS + 1)

    drains = await kept.restarted()

    assert await drains.drained() == {"a": NOW_MS, "b": NOW_MS + 1}


async def test_drained_twice_keeps_the_first_time(kept: Kept) -> None:
    await kept.drains.drain("a", now_ms=NOW_MS)
    await kept.drains.drain("a", now_ms=NOW_MS + 5)

    assert await kept.drains.drained() == {"a": NOW_MS}


async def test_enabled_is_drained_no_more_and_twice_does_no_harm(kept: Kept) -> None:
    await kept.drains.drain("a", now_ms=NOW_MS)
    await kept.drains.drain("b", now_ms=NOW_MS)

    await kept.drains.enable("a")
    await kept.drains.enable("a")

    assert await kept.drains.drained() == {"b": NOW_MS}
