"""What the boards of a fleet must do together, over a real Redis or without it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.adapters.hot_redis.connection import CALL_MAX_S
from gateway.core import fleet as rules
from gateway.core.breaker import AUTH_OPEN_MS, BreakerState
from gateway.core.events import BreakerChanged
from providers.kit.contract import FailureKind
from tests.contract.fleets import MAKE, OFFER, PATIENCE_S, Fleet, Process, a_fleet
from tests.fakes import StillClock
from tests.servers import RedisServer

CLOSED, OPEN, HALF_OPEN, PAUSED = (
    BreakerState.CLOSED,
    BreakerState.OPEN,
    BreakerState.HALF_OPEN,
    BreakerState.PAUSED,
)
BAD = FailureKind.OVERLOADED
MANY = 4


@pytest.fixture
async def fleet(redis: RedisServer) -> AsyncIterator[Fleet]:
    async with a_fleet(redis.url, MANY) as made:
        yield made


# --- where a breaker stands ---


async def test_what_one_opens_all_honour_and_tell_of(fleet: Fleet) -> None:
    first, *others = fleet.processes
    await first.calls(5, BAD)
    assert [await p.state() for p in others] == [CLOSED] * 3

    await fleet.exchange()

    assert await fleet.states() == {OPEN}
    for process in others:
        health = await process.health()
        assert health.reason == "5 failures in a row"
        assert health.retry_at_ms is not None
        left_ms = health.retry_at_ms - fleet.clock.at_ms
        assert 10_000 < left_ms <= 15_000  # a test takes less than 5 s
        told = [e for e in process.events.seen if isinstance(e, BreakerChanged)]
        assert [e.state for e in told] == ["open"]


async def test_monotonic_clocks_of_machines_may_differ(redis: RedisServer) -> None:
    here, there = StillClock(at_ms=5_000), StillClock(at_ms=77_000_000)
    one, other = Process("one", redis.url, here), Process("two", redis.url, there)
    await one.fleet.exchange()
    await one.calls(5, BAD)
    await one.fleet.exchange()

    await other.fleet.exchange()
    retry_at_ms = (await other.health()).retry_at_ms
    there.at_ms += 15_000
    after = await other.state()
    for process in (one, other):
        await process.fleet.leave()

    # Redis' own time passes meanwhile: a test takes less than five seconds of it.
    assert retry_at_ms is not None
    assert 77_010_000 < retry_at_ms <= 77_015_000
    assert after is HALF_OPEN


async def test_a_refused_credential_shuts_the_whole_upstream_for_all(
    fleet: Fleet,
) -> None:
    await fleet.processes[0].calls(1, FailureKind.AUTH)
    await fleet.exchange()

    assert await fleet.states() == {OPEN}
    account = await fleet.processes[3].board.look("up", [])
    assert (account.reason, account.state) == ("auth", OPEN)
    assert account.probe_in_ms is not None
    assert AUTH_OPEN_MS - 5_000 < account.probe_in_ms <= AUTH_OPEN_MS


async def test_a_pause_holds_for_all_and_a_short_one_ends_no_long_one(
    fleet: Fleet,
) -> None:
    long, short = fleet.processes[0], fleet.processes[1]
    calls = [await long.begins(), await short.begins()]
    await long.ends(calls[0], FailureKind.RATE_LIMITED, retry_after_s=60)
    await fleet.exchange()
    await short.ends(calls[1], FailureKind.RATE_LIMITED, retry_after_s=1)
    await fleet.exchange()

    assert await fleet.states() == {PAUSED}
    fleet.clock.at_ms += 50_000
    assert await fleet.states() == {PAUSED}
    fleet.clock.at_ms += 10_001
    assert await fleet.states() == {CLOSED}


@pytest.mark.parametrize("kind", [BAD, FailureKind.AUTH, FailureKind.RATE_LIMITED])
async def test_a_reset_at_one_is_a_reset_at_all(
    fleet: Fleet, kind: FailureKind
) -> None:
    await fleet.processes[0].calls(5 if kind is BAD else 1, kind)
    await fleet.exchange()
    assert CLOSED not in await fleet.states()

    await fleet.processes[2].board.reset("up")
    await fleet.exchange()

    assert await fleet.states() == {CLOSED}


async def test_a_refusal_of_a_call_from_before_a_reset_counts_nowhere(
    fleet: Fleet,
) -> None:
    one, operator = fleet.processes[:2]
    calls = [await one.begins() for _ in range(2)]
    await one.ends(calls[0], FailureKind.AUTH)
    await fleet.exchange()
    assert await fleet.states() == {OPEN}
    fleet.clock.at_ms += 1_000
    await operator.board.reset("up")
    await fleet.exchange()

    await one.ends(calls[1], FailureKind.AUTH)
    await fleet.exchange()
    assert await fleet.states() == {CLOSED}

    await one.calls(1, FailureKind.AUTH)
    await fleet.exchange()
    assert await fleet.states() == {OPEN}


async def test_an_opening_told_late_does_not_undo_a_reset(fleet: Fleet) -> None:
    one, late, operator = fleet.processes[:3]
    await one.calls(5, BAD)
    await one.fleet.exchange()
    await late.calls(5, BAD)  # opens by itself, and does not get to tell of it
    await late.state()
    await operator.fleet.exchange()
    await operator.board.reset("up")
    await operator.fleet.exchange()

    await fleet.exchange()

    assert await fleet.states() == {CLOSED}


async def test_who_comes_later_knows_what_is_open(fleet: Fleet) -> None:
    await fleet.processes[0].calls(5, BAD)
    await fleet.exchange()

    late = Process("late", fleet.url, fleet.clock)
    await late.fleet.exchange()
    state = await late.state()
    await late.fleet.leave()

    assert state is OPEN


async def test_an_opening_that_could_not_be_told_is_told_later(
    own_redis: RedisServer,
) -> None:
    async with a_fleet(own_redis.url, 2) as fleet:
        first, other = fleet.processes
        own_redis.kill()
        await first.calls(5, BAD)
        assert not await first.fleet.exchange()
        assert not await other.fleet.exchange()
        assert [await first.state(), await other.state()] == [OPEN, CLOSED]

        own_redis.start()
        for _ in range(3):
            await fleet.exchange()

        assert await fleet.states() == {OPEN}


async def test_what_only_others_have_in_their_config_is_passed_over(
    fleet: Fleet,
) -> None:
    first, other = fleet.processes[:2]
    first.board.slots = {"up": 8, "new": 8}
    for _ in range(5):
        permit = await first.board.admit("new/gpt-image-2", MAKE)
        assert permit is not None
        await first.ends(permit, BAD)
    await fleet.exchange()

    assert set(other.board._routes) <= {(OFFER, MAKE)}


# --- what the others saw ---


async def test_a_fleet_sees_failures_in_a_row_as_early_as_one_process_would(
    fleet: Fleet,
) -> None:
    for process in fleet.processes:
        await process.calls(1, BAD)
    await fleet.exchange()
    assert await fleet.states() == {CLOSED}

    await fleet.processes[0].calls(1, BAD)
    await fleet.exchange()

    assert await fleet.states() == {OPEN}


async def test_a_good_call_anywhere_ends_the_streak_of_all(fleet: Fleet) -> None:
    for process in fleet.processes[:3]:
        await process.calls(1, BAD)
    await fleet.exchange()
    fleet.clock.at_ms += 1_000
    await fleet.processes[3].calls(1)
    await fleet.exchange()

    await fleet.processes[0].calls(2, BAD)
    await fleet.exchange()

    assert await fleet.states() == {CLOSED}


async def test_the_streak_of_a_process_that_died_does_not_stay_for_ever(
    fleet: Fleet, redis: RedisServer
) -> None:
    with redis.client() as client:
        client.hset("{imageway}:1:streaks", "up/v|generate|long gone", "3 1 1")

        await fleet.exchange()

        assert client.hgetall("{imageway}:1:streaks") == {}


async def test_failures_of_a_process_with_more_calls_out_are_no_streak(
    fleet: Fleet,
) -> None:
    # They come home before successes do: what is out may all be well.
    busy = fleet.processes[0]
    failed, *out = [await busy.begins() for _ in range(2)]
    await busy.ends(failed, BAD)
    out.append(await busy.begins())
    for process in fleet.processes[1:]:
        await process.calls(1, BAD)
    await fleet.processes[1].calls(1, BAD)  # the fifth one
    await fleet.exchange()
    assert await fleet.states() == {CLOSED}

    await busy.ends(out.pop(), FailureKind.INVALID_REQUEST)
    await fleet.exchange()

    assert await fleet.states() == {OPEN}
    await busy.ends(out.pop())


async def test_half_of_ten_calls_bad_opens_though_no_process_had_ten(
    fleet: Fleet,
) -> None:
    for process in fleet.processes:
        await process.calls(1, BAD)
        await process.calls(1)
    await fleet.exchange()
    assert await fleet.states() == {CLOSED}

    await fleet.processes[1].calls(1)
    await fleet.processes[2].calls(1, BAD)
    await fleet.exchange()

    assert await fleet.states() == {OPEN}
    reasons = {(await p.health()).reason for p in fleet.processes}
    assert reasons == {"5 of 10 calls bad in 120 s"}


async def test_what_others_saw_before_a_reset_opens_nothing_after_it(
    fleet: Fleet,
) -> None:
    for process in fleet.processes:
        await process.calls(3, BAD)
        await process.calls(1)
    await fleet.exchange()
    assert await fleet.states() == {OPEN}

    await fleet.processes[0].board.reset("up")
    await fleet.exchange()
    fleet.clock.at_ms += 61_000  # all traffic is back
    for process in fleet.processes:
        await process.calls(1)
    await fleet.processes[1].calls(1, BAD)
    await fleet.exchange()

    assert await fleet.states() == {CLOSED}


# --- one probe ---


async def test_a_dead_upstream_is_probed_by_one_of_four_at_a_time_for_minutes(
    fleet: Fleet,
) -> None:
    await fleet.processes[0].calls(5, BAD)
    await fleet.exchange()
    out: list[tuple[Process, object, int]] = []
    most = probes = 0

    for second in range(300):
        fleet.clock.at_ms += 1_000
        for process, permit, until in list(out):
            if second >= until:
                await process.ends(permit, BAD)  # type: ignore[arg-type]
                out.remove((process, permit, until))
                await process.fleet.exchange()
        for process in fleet.processes:
            for _ in range(2):
                permit = await process.tries()
                if permit is not None:
                    out.append((process, permit, second + 4))
                    probes += 1
        most = max(most, len(out))
        await fleet.exchange()

    assert most == 1
    assert 3 <= probes <= 10


async def test_two_good_probes_of_different_processes_close_it_for_all(
    fleet: Fleet,
) -> None:
    await fleet.processes[0].calls(5, BAD)
    await fleet.exchange()
    fleet.clock.at_ms += 16_000

    for process in fleet.processes[1:3]:
        await process.calls(1)
        await fleet.exchange()
        fleet.clock.at_ms += 1_001

    assert await fleet.states() == {CLOSED}
    # Each lets in its part of the two calls that a returning upstream gets: one.
    rooms = [(await p.health()).slots_free for p in fleet.processes]
    assert rooms == [1] * 4


async def test_who_does_not_know_yet_how_a_probe_ended_may_not_probe(
    fleet: Fleet,
) -> None:
    one, other = fleet.processes[:2]
    await one.calls(5, BAD)
    await fleet.exchange()
    fleet.clock.at_ms += 16_000
    probe = await one.begins()
    await one.ends(probe, BAD)
    await one.fleet.exchange()  # the other has not heard of it yet

    assert await other.state() is HALF_OPEN
    assert await other.tries() is None


async def test_a_probe_that_another_has_is_asked_for_once_a_second(
    fleet: Fleet, redis: RedisServer
) -> None:
    one, other = fleet.processes[:2]
    await one.calls(5, BAD)
    await fleet.exchange()
    fleet.clock.at_ms += 16_000
    await one.begins()

    assert await other.tries() is None
    before = redis.commands()
    assert [await other.tries() for _ in range(50)] == [None] * 50
    asked = redis.commands() - before
    assert await other.state() is OPEN

    assert asked < 10


async def test_the_probe_of_a_process_that_died_is_free_again_after_half_a_minute(
    fleet: Fleet, redis: RedisServer
) -> None:
    one, other = fleet.processes[:2]
    await one.calls(5, BAD)
    await fleet.exchange()
    fleet.clock.at_ms += 16_000
    await one.begins()
    with redis.client() as client:
        (lease,) = client.keys("*probe:*")
        left_ms = client.pttl(lease)
        assert 0 < left_ms <= 30_000
        client.delete(lease)  # as its time does

    assert await other.tries() is not None


async def test_a_shut_upstream_gets_one_forced_try_of_the_fleet_in_five_seconds(
    fleet: Fleet,
) -> None:
    await fleet.processes[0].calls(5, BAD)
    await fleet.exchange()

    tries = [await p.tries(forced=True) for p in fleet.processes]

    assert sum(permit is not None for permit in tries) == 1


# --- slots ---


async def test_the_slots_of_an_upstream_are_split_and_none_is_lost(
    redis: RedisServer,
) -> None:
    async with a_fleet(redis.url, 3, slots=10) as fleet:
        assert sorted(await fleet.slots_of_all()) == [3, 3, 4]


async def test_of_more_processes_than_slots_each_has_one(redis: RedisServer) -> None:
    async with a_fleet(redis.url, 3, slots=2) as fleet:
        assert await fleet.slots_of_all() == [1, 1, 1]


async def test_who_stays_has_the_slots_of_who_went_after_five_seconds(
    redis: RedisServer,
) -> None:
    async with a_fleet(redis.url, 2) as fleet:
        stays, goes = fleet.processes
        await goes.fleet.leave()
        await stays.fleet.exchange()
        at_once = await stays.slots_now()
        fleet.clock.at_ms += rules.GROWS_AFTER_MS
        await stays.fleet.exchange()

        assert (at_once, await stays.slots_now()) == (4, 8)


async def test_an_emptied_redis_changes_no_share_and_opens_and_closes_nothing(
    fleet: Fleet, redis: RedisServer
) -> None:
    await fleet.processes[0].calls(5, BAD)
    await fleet.exchange()
    redis.empty()

    for process in fleet.processes:
        assert await process.fleet.exchange()
        assert await fleet.slots_of_all() == [2] * 4
    await fleet.exchange()

    assert await fleet.states() == {OPEN}
    assert all(process.degraded == [] for process in fleet.processes)


# --- without Redis ---


async def test_without_redis_each_decides_alone_and_has_all_slots_after_a_while(
    own_redis: RedisServer,
) -> None:
    async with a_fleet(own_redis.url, 2) as fleet:
        one, other = fleet.processes
        await one.calls(3, BAD)
        await fleet.exchange()
        own_redis.kill()
        for _ in range(3):
            await fleet.exchange()
        assert await fleet.slots_of_all() == [4, 4]
        fleet.clock.at_ms += rules.ALONE_AFTER_MS
        await fleet.exchange()
        assert await fleet.slots_of_all() == [8, 8]

        await other.calls(2, BAD)  # what the other saw does not count any more
        assert await other.state() is CLOSED
        await one.calls(2, BAD)
        await other.calls(3, BAD)
        assert await fleet.states() == {OPEN}
        fleet.clock.at_ms += 16_000
        probes = [await p.tries() for p in fleet.processes]

        assert None not in probes
        assert [p.degraded for p in fleet.processes] == [[True], [True]]


async def test_a_frozen_redis_is_given_up_and_is_back_when_it_answers(
    own_redis: RedisServer,
) -> None:
    async with a_fleet(own_redis.url, 2) as fleet:
        one, other = fleet.processes
        own_redis.freeze()
        one.fleet.guard.call_max_s = CALL_MAX_S
        for _ in range(3):
            assert not await one.fleet.exchange()
        await one.calls(5, BAD)
        assert (one.fleet.guard.degraded, one.degraded) == (True, [True])

        own_redis.thaw()
        one.fleet.guard.call_max_s = PATIENCE_S
        await fleet.exchange()

        assert one.degraded == [True, False]
        assert await other.state() is OPEN
