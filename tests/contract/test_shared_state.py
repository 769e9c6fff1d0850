"""The way to Redis, and what goes over it from process to process by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from gateway.adapters.clock import SystemClock
from gateway.adapters.hot_redis.connection import (
    CHANNEL,
    Guard,
    opener,
    publish_once,
)
from gateway.adapters.hot_redis.fleet import notices_text
from gateway.adapters.rates import MemoryRates
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.core.breaker import BreakerState
from gateway.core.errors import UnauthorizedError
from gateway.core.fleet import Notice, Topic
from gateway.flows.keys import Authenticate, ManageKeys
from gateway.ports import Tenant
from providers.kit.contract import FailureKind
from tests.contract.fleets import Process, running
from tests.contract.stores import Sqlite
from tests.fakes import FakeChance, FakeEvents, StillClock
from tests.servers import RedisServer, free_port

SECRET = "s3cret-of-redis"
INFO = "CLUSTER INFO"


COMES_MAX_S = 30.0


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come."""
    async with asyncio.timeout(COMES_MAX_S):
        while not holds():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.01)


# --- where it is ---


async def roundtrip(url: str) -> None:
    """See that boards meet there, and hear of each other without waiting."""
    clock = SystemClock()
    one, other = Process("one", url, clock), Process("two", url, clock)
    async with running(one), running(other):
        await until(lambda: one.board.processes == other.board.processes == 2)
        await one.calls(4, FailureKind.OVERLOADED)
        await one.calls(1, FailureKind.OVERLOADED)
        while await other.state() is not BreakerState.OPEN:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not one.degraded
    assert not other.degraded


async def test_a_server_with_a_password(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password=SECRET) as server:
        await roundtrip(server.url)


async def test_a_socket_in_the_file_system(tmp_path: Path) -> None:
    socket = f"/tmp/imageway-test-{free_port()}.sock"
    with RedisServer(tmp_path, ("--unixsocket", socket)):
        await roundtrip(f"unix://{socket}")


@asynccontextmanager
async def a_cluster(folder: Path) -> AsyncIterator[RedisServer]:
    """Run a cluster of one node, which has all slots."""
    options = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with RedisServer(folder, options) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await until(lambda: "'ok'" in str(client.execute_command(INFO)))
        yield server


async def test_a_cluster(tmp_path: Path) -> None:
    async with a_cluster(tmp_path) as server:
        await roundtrip(f"redis+cluster://127.0.0.1:{server.port}")


async def test_sentinels_that_know_the_server(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        config = tmp_path / "sentinel.conf"
        config.write_text(f"sentinel monitor fleet 127.0.0.1 {server.port} 1\n")
        watcher = RedisServer(
            tmp_path / "sentinel", program_args=(str(config), "--sentinel")
        )
        with watcher:
            await roundtrip(f"redis+sentinel://127.0.0.1:{watcher.port}/fleet")


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://h:1/2", Redis),
        ("rediss://u:p@h:1", Redis),
        ("unix:///run/redis.sock?db=1", Redis),
        ("redis+cluster://h:1", RedisCluster),
        ("rediss+cluster://h:1", RedisCluster),
        ("redis+sentinel://:p%40ss@h:1,h2/name/3", Redis),
    ],
)
def test_every_form_of_url_makes_a_client(url: str, kind: type) -> None:
    assert isinstance(opener(url)(), kind)


def test_a_sentinel_url_says_who_where_and_which_database() -> None:
    client = opener("rediss+sentinel://me:p%40ss@h:1,[::1]:2,h3/name/3")()

    pool: Any = client.connection_pool  # type: ignore[union-attr]
    given = pool.connection_kwargs
    assert (given["username"], given["password"], given["db"]) == ("me", "p@ss", 3)
    asked = [
        s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels
    ]
    places = [(each["host"], each["port"]) for each in asked]
    assert places == [("h", 1), ("::1", 2), ("h3", 26379)]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@h?db=x",
        f"redis+sentinel://:{SECRET}@h:1",
        f"redis://:{SECRET}/#@h:1",
        f"redis+cluster://:{SECRET}/#@h:1",
        f"redis+sentinel://h:{SECRET}/name",
        f"redis+sentinel://h/name/{SECRET}",
        f"redis+cluster://h:{SECRET}",
        "redis+cluster://",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as refused:
        opener(url)

    assert SECRET not in str(refused.value)


# --- when it does not answer ---


async def test_one_bad_answer_is_not_the_end_but_three_in_a_row_are(
    own_redis: RedisServer,
) -> None:
    events = FakeEvents()
    guard = Guard(opener(own_redis.url), events)
    assert await guard.ask(("GET", "x")) is None  # nobody has connected it yet
    assert await guard.try_again(("GET", "x")) == [None]
    own_redis.freeze()
    for _ in range(2):
        assert await guard.ask(("GET", "x")) is None
    own_redis.thaw()
    while await guard.ask(("SET", "x", "1")) is None:
        await guard.try_again(("PING",))
    assert not guard.degraded
    assert events.seen == []  # nor was it ever so

    own_redis.freeze()
    for _ in range(3):
        assert await guard.ask(("GET", "x")) is None
    assert guard.degraded
    own_redis.thaw()
    assert await guard.ask(("GET", "x")) is None  # a request never waits to find out
    while await guard.try_again(("GET", "x")) is None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await guard.ask(("GET", "x")) == ["1"]
    await guard.close()


async def test_answers_never_get_mixed_up_after_one_was_given_up(
    own_redis: RedisServer,
) -> None:
    guard = Guard(opener(own_redis.url), FakeEvents())
    await guard.try_again(("SET", "x", "of x"), ("SET", "y", "of y"))
    own_redis.freeze()
    assert await guard.ask(("GET", "x")) is None
    own_redis.thaw()

    answer = None
    while answer is None:
        answer = await guard.try_again(("GET", "y"))

    assert answer == ["of y"]
    await guard.close()


async def test_a_redis_that_takes_no_writes_counts_as_gone(redis: RedisServer) -> None:
    process = Process("one", redis.url, StillClock())
    with redis.client() as client:
        client.config_set("min-replicas-to-write", 1)
        try:
            for _ in range(4):
                assert not await process.fleet.exchange()
        finally:
            client.config_set("min-replicas-to-write", 0)
    assert process.degraded == [True]
    assert await process.fleet.exchange()
    assert process.degraded == [True, False]
    await process.fleet.leave()


async def test_a_cluster_that_is_gone_fails_nothing_and_is_back_when_it_is(
    tmp_path: Path,
) -> None:
    async with a_cluster(tmp_path) as server:
        url = f"redis+cluster://127.0.0.1:{server.port}"
        process = Process("one", url, SystemClock())
        async with running(process):
            await until(lambda: not process.fleet.guard.degraded)
            server.kill()
            assert await process.fleet.may_probe("up/v|generate")
            await until(lambda: process.degraded == [True])
            assert await process.fleet.may_probe("up/v|generate")
            assert not await publish_once(opener(url), "nobody hears it")
            server.start()
            await until(lambda: process.degraded == [True, False])


@pytest.mark.parametrize(
    "answer",
    [b":no number\r\n", b"$2\r\n\xff\xfe\r\n", b"*1\r\n" * 5_000, b"HTTP/1.1 "],
)
@pytest.mark.parametrize("kind", ["redis", "redis+cluster"])
async def test_what_answers_and_is_no_redis_counts_as_gone(
    kind: str, answer: bytes
) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1_000):
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        url = f"{kind}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        process = Process("one", url, StillClock())

        assert not await process.fleet.exchange()
        assert await process.fleet.may_probe("up/v|generate")
        assert not await publish_once(opener(url), "nobody hears it")

    assert process.degraded == [True]
    await process.fleet.leave()


async def test_what_somebody_else_wrote_there_stops_nothing(
    redis: RedisServer,
) -> None:
    with redis.client() as client:
        stances = {"up": "x", "a|b": "1 2 3", "up/v|generate": '9999999999999 v {"a":'}
        client.hset("{imageway}:1:stances", mapping=stances)
    process = Process("one", redis.url, StillClock())

    assert await process.fleet.exchange()
    assert await process.fleet.exchange()
    await process.fleet.leave()


# --- notices ---


async def test_a_notice_reaches_the_others_and_not_its_sender(
    redis: RedisServer,
) -> None:
    clock = SystemClock()
    one, other = Process("one", redis.url, clock), Process("two", redis.url, clock)
    seen: dict[str, list[str]] = {"one": [], "two": []}
    for process in (one, other):
        process.fleet.heed[Topic.TASKS] = seen[process.name].append
    async with running(one), running(other):
        await until(lambda: seen == {"one": [""], "two": [""]})
        await until(lambda: one.board.processes == 2)

        for _ in range(20):
            one.fleet.send(Notice(Topic.TASKS, "t"))
        await until(lambda: len(seen["two"]) > 1)
        other.fleet.send(Notice(Topic.TASKS, "back"))
        await until(lambda: len(seen["one"]) > 1)

    # Those of a moment are one.
    assert seen == {"one": ["", "back"], "two": ["", "t"]}


async def test_who_was_cut_off_looks_at_everything_again(
    own_redis: RedisServer,
) -> None:
    process = Process("one", own_redis.url, SystemClock())
    seen: list[str] = []
    process.fleet.heed[Topic.KEYS] = seen.append
    async with running(process):
        await until(lambda: seen == [""])
        own_redis.kill()
        own_redis.start()
        # Once or more: a server that is starting may cut it off again.
        await until(lambda: len(seen) > 1)

    assert set(seen) == {""}


async def test_a_revoked_key_is_refused_by_every_process_at_once(
    redis: RedisServer, tmp_path: Path
) -> None:
    # The clock stands still: by itself no process would ask the store again.
    database = await Sqlite(tmp_path).connect()
    accounts, clock, pepper = SqlAccounts(database), StillClock(), b"pepper"
    await accounts.add_tenant(Tenant("t-1", "app"), now_ms=0)

    async def announce(notice: Notice) -> None:
        assert await publish_once(opener(redis.url), notices_text("cli", [notice]))

    keys = ManageKeys(accounts, clock, FakeChance(), pepper, announce)
    made = await keys.create(Tenant("t-1", "app"))
    kept = await keys.create(Tenant("t-1", "app"))
    header = f"Bearer {made.secret}"
    fleet = [Process(name, redis.url, SystemClock()) for name in ("one", "two")]
    rates = MemoryRates(clock)
    doors = [Authenticate(accounts, clock, pepper, rates, rates) for _ in fleet]
    for process, door in zip(fleet, doors, strict=True):
        process.fleet.heed[Topic.KEYS] = door.forget
    async with running(fleet[0]), running(fleet[1]):
        await until(lambda: redis_listeners(redis) == 2)
        await asyncio.sleep(0.1)  # what they do when they begin to listen is over
        for door in doors:
            await door(header)
            await door(f"Bearer {kept.secret}")

        await keys.revoke(made.key.id)

        for door in doors:
            await until(lambda door=door: len(door._known) == 1)  # type: ignore[misc]
            with pytest.raises(UnauthorizedError, match="revoked"):
                await door(header)
    await database.close()


def redis_listeners(server: RedisServer) -> int:
    with server.client() as client:
        ((_, listeners),) = client.pubsub_numsub(CHANNEL)
    return int(listeners)
