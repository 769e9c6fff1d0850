"""What every count of a minute must do: in memory, in Redis, with Redis away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest

from gateway.adapters.hot_redis.connection import PREFIX, Command, Guard, opener
from gateway.adapters.hot_redis.rates import TOGETHER_MAX, RedisRates
from gateway.adapters.rates import NAMES_MAX, MemoryRates
from gateway.core.limits import MINUTE_S, Rate, share_of
from gateway.ports import Rates
from tests.contract.fleets import PATIENCE_S
from tests.fakes import FakeEvents, StillClock
from tests.servers import RedisServer

BACKENDS = ("memory", "redis")


class Counter(Protocol):
    """A count, and a clock to move."""

    @property
    def rates(self) -> Rates: ...

    async def pass_s(self, seconds: int) -> None:
        """Let time pass."""


@dataclass
class InMemory:
    clock: StillClock = field(default_factory=StillClock)

    def __post_init__(self) -> None:
        self.rates = MemoryRates(self.clock)

    async def pass_s(self, seconds: int) -> None:
        self.clock.at_ms += seconds * 1000


@dataclass
class InRedis:
    """Time goes by the clock of Redis: what was counted is made older instead."""

    server: RedisServer

    def __post_init__(self) -> None:
        self.guard = Guard(opener(self.server.url), FakeEvents(), PATIENCE_S)
        self.rates = RedisRates(self.guard, MemoryRates(StillClock()))

    async def pass_s(self, seconds: int) -> None:
        with self.server.client() as client:
            for key in client.keys(f"{PREFIX}rate:*"):
                counts = client.hgetall(key)
                client.delete(key)
                older = {int(at) - seconds: n for at, n in counts.items()}
                client.hset(key, mapping=older)


@pytest.fixture(params=BACKENDS)
async def counter(request: pytest.FixtureRequest) -> AsyncIterator[Counter]:
    if request.param == "memory":
        yield InMemory()
        return
    found = InRedis(request.getfixturevalue("redis"))
    assert await found.guard.try_again(("PING",))
    yield found
    await found.guard.close()


async def test_as_many_as_the_limit_are_let_through_and_then_none(
    counter: Counter,
) -> None:
    rates = [await counter.rates.take("key-1", 3) for _ in range(5)]

    assert [rate.allowed for rate in rates] == [True, True, True, False, False]
    assert [rate.left for rate in rates] == [2, 1, 0, 0, 0]
    assert {rate.limit for rate in rates} == {3}
    assert all(MINUTE_S - 5 <= rate.frees_in_s <= MINUTE_S for rate in rates)


async def test_a_place_comes_free_a_minute_after_it_was_taken(counter: Counter) -> None:
    assert (await counter.rates.take("key-1", 2)).allowed
    await counter.pass_s(30)
    assert (await counter.rates.take("key-1", 2)).allowed
    refused = await counter.rates.take("key-1", 2)
    assert not refused.allowed
    assert 25 <= refused.frees_in_s <= 30

    await counter.pass_s(refused.frees_in_s)

    assert (await counter.rates.take("key-1", 2)).allowed
    assert not (await counter.rates.take("key-1", 2)).allowed


async def test_who_asks_all_the_time_is_let_through_all_the_same(
    counter: Counter,
) -> None:
    passed = 0
    for _ in range(13):
        for _ in range(4):
            passed += (await counter.rates.take("key-1", 5)).allowed
        await counter.pass_s(10)

    assert 10 <= passed <= 15


async def test_keys_are_counted_apart(counter: Counter) -> None:
    assert (await counter.rates.take("key-1", 1)).allowed
    assert (await counter.rates.take("key-2", 1)).allowed
    assert not (await counter.rates.take("key-1", 1)).allowed


async def test_another_limit_counts_at_once(counter: Counter) -> None:
    for _ in range(3):
        await counter.rates.take("key-1", 3)

    assert not (await counter.rates.take("key-1", 2)).allowed
    assert (await counter.rates.take("key-1", 4)).allowed


async def test_a_crowd_gets_no_more_than_the_limit(counter: Counter) -> None:
    asked = (counter.rates.take("key-1", 40) for _ in range(300))

    rates = await asyncio.gather(*asked)

    assert sum(rate.allowed for rate in rates) == 40


# --- a fleet ---


async def test_processes_that_share_a_redis_share_the_limit(redis: RedisServer) -> None:
    fleet = [InRedis(redis) for _ in range(3)]
    for process in fleet:
        await process.guard.try_again(("PING",))

    asked = (process.rates.take("key-1", 10) for process in fleet for _ in range(10))
    rates = await asyncio.gather(*asked)

    assert sum(rate.allowed for rate in rates) == 10
    for process in fleet:
        await process.guard.close()


async def test_a_request_costs_one_command_that_leaves_nothing_for_ever(
    redis: RedisServer,
) -> None:
    process = InRedis(redis)
    await process.guard.try_again(("PING",))
    with redis.client() as client:
        client.config_resetstat()
        await process.rates.take("key-1", 5)
        called = {
            name: stat["calls"] for name, stat in client.info("commandstats").items()
        }
        assert called.get("cmdstat_eval") == 1
        (key,) = client.keys("*")
        assert 0 < client.pttl(key) <= MINUTE_S * 1000
    await process.guard.close()


class CountingGuard(Guard):
    """Counts the round trips."""

    round_trips = 0

    async def ask(self, *commands: Command) -> list[Any] | None:
        self.round_trips += 1
        return await super().ask(*commands)


async def test_a_crowd_does_not_stand_in_line_for_the_connection(
    redis: RedisServer,
) -> None:
    guard = CountingGuard(opener(redis.url), FakeEvents(), PATIENCE_S)
    rates = RedisRates(guard, MemoryRates(StillClock()))
    await guard.try_again(("PING",))

    taken = await asyncio.gather(*(rates.take("key-1", 99) for _ in range(320)))

    assert sum(rate.allowed for rate in taken) == 99
    assert guard.round_trips <= 320 / TOGETHER_MAX + 1
    await guard.close()


async def test_without_redis_each_process_lets_its_share_through(
    own_redis: RedisServer,
) -> None:
    clock = StillClock()
    guard = Guard(opener(own_redis.url), FakeEvents(), PATIENCE_S)
    rates = RedisRates(guard, MemoryRates(clock, lambda limit: share_of(limit, 3, 1)))
    await guard.try_again(("PING",))
    before = [await rates.take("key-1", 9) for _ in range(2)]
    own_redis.kill()

    after = [await rates.take("key-1", 9) for _ in range(5)]

    # Of its share of 3 it has let two through already, while Redis was there.
    assert [rate.allowed for rate in before] == [True, True]
    assert [rate.allowed for rate in after] == [True] + [False] * 4
    assert {rate.limit for rate in after} == {3}
    await guard.close()


async def test_the_table_of_names_is_bounded() -> None:
    rates = MemoryRates(StillClock())
    assert (await rates.take("first", 1)).allowed

    for number in range(NAMES_MAX):
        await rates.take(f"name-{number}", 1)

    assert len(rates._minutes) == NAMES_MAX
    assert await rates.take("first", 1) == Rate(
        allowed=True, limit=1, left=0, frees_in_s=MINUTE_S
    )
