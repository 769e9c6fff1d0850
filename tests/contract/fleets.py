"""Boards of several processes over one Redis, on one clock that a test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.adapters.hot_memory import MemoryBoard
from gateway.adapters.hot_redis.connection import Guard, opener
from gateway.adapters.hot_redis.fleet import RedisFleet
from gateway.core.breaker import BreakerState, Health, Outcome
from gateway.ports import Permit
from providers.kit.contract import FailureKind, Operation
from tests.fakes import FakeChance, FakeEvents, StillClock

OFFER, MAKE = "up/gpt-image-2", Operation.GENERATE


@dataclass
class Process:
    """One process: its board, its way to Redis."""

    name: str
    url: str
    clock: StillClock
    slots: int = 8
    events: FakeEvents = field(default_factory=FakeEvents)

    def __post_init__(self) -> None:
        self.fleet = RedisFleet(
            Guard(opener(self.url), self.events), self.clock, self.name, crashed
        )
        self.board = MemoryBoard(
            self.clock, FakeChance(), self.events, {"up": self.slots}, fleet=self.fleet
        )
        self.fleet.board = self.board

    async def calls(self, count: int, kind: FailureKind | None = None) -> None:
        for _ in range(count):
            await self.ends(await self.begins(), kind)

    async def begins(self) -> Permit:
        permit = await self.board.admit(OFFER, MAKE)
        assert permit is not None
        return permit

    async def ends(self, permit: Permit, kind: FailureKind | None = None) -> None:
        await self.board.report(permit, Outcome(kind=kind))

    async def health(self) -> Health:
        return (await self.board.read([OFFER], MAKE))[OFFER]

    async def state(self) -> BreakerState:
        return (await self.health()).state

    async def slots_now(self) -> int:
        return (await self.board.look("up", [])).slots_max


@dataclass
class Fleet:
    """Processes that exchange when the test says so."""

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
        """Let a second of exchanges happen: twice, so that all hear of all."""
        for _ in range(2):
            for process in self.processes:
                await process.fleet.exchange()

    async def states(self) -> list[BreakerState]:
        return [await process.state() for process in self.processes]

    async def close(self) -> None:
        for process in self.processes:
            await process.fleet.leave()


def crashed(error: BaseException, where: str) -> None:
    raise AssertionError(where) from error
