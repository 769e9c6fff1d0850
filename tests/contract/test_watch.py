"""What an operator must be able to see of every health board, and do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.adapters.hot_memory import MemoryBoard
from gateway.core.breaker import BreakerState, Outcome
from gateway.core.events import BreakerChanged
from gateway.ports import AccountView, LastFailure, RouteView
from providers.kit.contract import FailureKind, Operation
from tests.contract.fleets import Process
from tests.fakes import FakeChance, FakeEvents, StillClock

OFFER, EDIT, MAKE = "up/gpt-image-2", Operation.EDIT, Operation.GENERATE


class Stage:
    """One upstream of four slots on a board, and a clock to move."""

    def __init__(self, redis_url: str | None) -> None:
        self.clock, self.events = StillClock(), FakeEvents()
        if redis_url is None:
            self.board = MemoryBoard(self.clock, FakeChance(), self.events, {"up": 4})
            self.process = None
        else:
            self.process = Process("one", redis_url, self.clock, 4, self.events)
            self.board = self.process.board

    async def shared(self) -> None:
        """Tell and hear, if there is a fleet."""
        if self.process is not None:
            assert await self.process.fleet.exchange()

    async def calls(self, count: int, kind: FailureKind | None = None) -> None:
        for _ in range(count):
            permit = await self.board.admit(OFFER, MAKE)
            assert permit is not None
            await self.board.report(permit, Outcome(kind=kind))
            await self.shared()

    async def look(self) -> tuple[AccountView, RouteView]:
        await self.shared()
        account = await self.board.look("up", [(OFFER, MAKE), (OFFER, EDIT)])
        assert [view.operation for view in account.routes] == [MAKE, EDIT]
        return account, account.routes[0]

    async def state(self) -> BreakerState:
        await self.shared()
        return (await self.board.read([OFFER], MAKE))[OFFER].state


@pytest.fixture(params=["memory", "redis"])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    of_redis = request.param == "redis"
    url = request.getfixturevalue("redis").url if of_redis else None
    made = Stage(url)
    yield made
    if made.process is not None:
        await made.process.fleet.leave()


async def test_an_upstream_that_nobody_called_is_well(stage: Stage) -> None:
    account, route = await stage.look()

    assert (account.state, account.in_flight) == (BreakerState.CLOSED, 0)
    assert (account.slots, account.slots_max) == (4, 4)
    assert (route.window.good, route.window.bad, route.in_flight) == (0, 0, 0)
    assert (route.oldest_ms, route.probe_in_ms, route.last_failure) == (None,) * 3


async def test_calls_under_way_are_seen_with_the_age_of_the_oldest(
    stage: Stage,
) -> None:
    await stage.board.admit(OFFER, MAKE)
    stage.clock.at_ms += 2_000
    await stage.board.admit(OFFER, MAKE)
    await stage.board.admit(OFFER, EDIT)
    stage.clock.at_ms += 500

    account, route = await stage.look()

    assert (account.in_flight, route.in_flight, route.oldest_ms) == (3, 2, 2_500)


async def test_an_open_breaker_says_when_it_may_be_probed(stage: Stage) -> None:
    await stage.calls(1)
    await stage.calls(5, FailureKind.OVERLOADED)
    stage.clock.at_ms += 4_000

    _, route = await stage.look()

    assert route.health.state is BreakerState.OPEN
    assert (route.window.good, route.window.bad, route.bad_streak) == (1, 5, 5)
    assert route.probe_in_ms == 11_000
    failed_ms = stage.clock.at_ms - 4_000
    assert route.last_failure == LastFailure(FailureKind.OVERLOADED, failed_ms)


async def test_a_pause_says_when_it_ends(stage: Stage) -> None:
    permit = await stage.board.admit(OFFER, MAKE)
    assert permit is not None
    limited = Outcome(kind=FailureKind.RATE_LIMITED, retry_after_s=30)
    await stage.board.report(permit, limited)
    stage.clock.at_ms += 10_000

    account, route = await stage.look()

    assert route.health.state is BreakerState.PAUSED
    assert (route.pause_ends_in_ms, route.probe_in_ms) == (20_000, None)
    assert (account.slots, account.slots_max) == (2, 4)


async def test_a_refused_credential_is_seen_at_the_upstream_and_its_offers(
    stage: Stage,
) -> None:
    await stage.calls(1, FailureKind.AUTH)

    account, route = await stage.look()

    assert (account.state, account.reason) == (BreakerState.OPEN, "auth")
    assert account.probe_in_ms == route.probe_in_ms == 900_000


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        (5, FailureKind.OVERLOADED),
        (1, FailureKind.AUTH),
        (1, FailureKind.RATE_LIMITED),
    ],
)
async def test_a_reset_closes_whatever_was_shut_and_tells_of_it(
    stage: Stage, calls: int, kind: FailureKind
) -> None:
    await stage.calls(calls, kind)
    assert await stage.state() is not BreakerState.CLOSED

    await stage.board.reset("up")

    assert await stage.state() is BreakerState.CLOSED
    told = [e.state for e in stage.events.seen if isinstance(e, BreakerChanged)]
    assert told[-1] == "closed"


async def test_after_a_reset_traffic_returns_in_steps_and_old_calls_do_not_count(
    stage: Stage,
) -> None:
    hung = [await stage.board.admit(OFFER, MAKE) for _ in range(2)]
    await stage.calls(5, FailureKind.OVERLOADED)
    stage.clock.at_ms += 5_000

    await stage.board.reset("up")
    for permit in hung:
        assert permit is not None
        await stage.board.report(permit, Outcome(kind=FailureKind.BAD_GATEWAY))
    _, route = await stage.look()

    assert route.health.state is BreakerState.CLOSED
    assert (route.window.bad, route.bad_streak) == (0, 0)
    assert [await stage.board.admit(OFFER, MAKE) is not None for _ in range(3)] == [
        True,
        True,
        False,
    ]


async def test_a_reset_of_a_well_upstream_changes_nothing(stage: Stage) -> None:
    await stage.calls(2)
    before = await stage.look()

    await stage.board.reset("up")

    assert await stage.look() == before
