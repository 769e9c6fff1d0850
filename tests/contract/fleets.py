"""Boards of several processes over one Redis, on one clock that a test moves.

They exchange when the test says so, so that nothing depends on how fast it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from gateway.adapters.hot_memory import MemoryBoard
from gateway.adapters.hot_redis.connection import Guard, opener
from gateway.adapters.hot_redis.fleet import RedisFleet
from gateway.core.breaker import BreakerState, Health, Outcome
from gateway.core.events import SharedStateChanged
from gateway.ports import Clock, Permit
from providers.kit.contract import FailureKind, Operation
from tests.fakes import FakeChance, FakeEvents, StillClock

PATIENCE_S = 1.0
"""A machine under load may take longer to answer than a gateway waits."""
OFFER, MAKE = "up/gpt-image-2", Operation.GENERATE


@dataclass
class Process:
    """One process: its board, and its way to Redis."""

    name: str
    url: str
    clock: Clock
    slots: int = 8
    events: FakeEvents = field(default_factory=FakeEvents)
    call_max_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        guard = Guard(opener(self.url), self.events, self.call_max_s)
        self.fleet = RedisFleet(guard, self.clock, self.name, crashed)
        slots = {"up": self.slots}
        self.board = MemoryBoard(
            self.clock, FakeChance(), self.events, slots, self.fleet
        )
        self.fleet.board = self.board

    async def calls(self, count: int, kind: FailureKind | None = None) -> None:
        for _ in range(count):
            await self.ends(await self.begins(), kind)

    async def begins(self) -> Permit:
        permit = await self.tries()
        assert permit is not None
        return permit

    async def tries(self, *, forced: bool = False) -> Permit | None:
        return await self.board.admit(OFFER, MAKE, forced=forced)

    async def ends(
        self,
        permit: Permit,
        kind: FailureKind | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        await self.board.report(permit, Outcome(kind=kind, retry_after_s=retry_after_s))

    async def health(self) -> Health:
        return (await self.board.read([OFFER], MAKE))[OFFER]

    async def state(self) -> BreakerState:
        return (await self.health()).state

    async def slots_now(self) -> int:
        return (await self.board.look("up", [])).slots_max

    @property
    def degraded(self) -> list[bool]:
        """What was told of Redis, in order."""
        seen = self.events.seen
        return [e.degraded for e in seen if isinstance(e, SharedStateChanged)]


@dataclass
class Fleet:
    """Processes over one Redis."""

    url: str
    count: int
    slots: int = 8
    clock: StillClock = field(default_factory=StillClock)

    def __post_init__(self) -> None:
        self.processes = [
            Process(f"p{n}", self.url, self.clock, self.slots)
            for n in range(self.count)
        ]

    async def exchange(self) -> None:
        """Let all hear of all: what the last one tells, the first one hears then."""
        for _ in range(2):
            for process in self.processes:
                await process.fleet.exchange()

    async def states(self) -> set[BreakerState]:
        return {await process.state() for process in self.processes}

    async def slots_of_all(self) -> list[int]:
        return [await process.slots_now() for process in self.processes]

    async def close(self) -> None:
        for process in self.processes:
            await process.fleet.leave()


@asynccontextmanager
async def a_fleet(url: str, count: int, slots: int = 8) -> AsyncIterator[Fleet]:
    """Make a fleet whose processes know each other."""
    fleet = Fleet(url, count, slots)
    await fleet.exchange()
    try:
        yield fleet
    finally:
        await fleet.close()


@asynccontextmanager
async def running(process: Process) -> AsyncIterator[Process]:
    """Let a process exchange and listen by itself, as a gateway does."""
    work = asyncio.ensure_future(process.fleet.run())
    try:
        yield process
    finally:
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work


def crashed(error: BaseException, where: str) -> None:
    raise AssertionError(where) from error
