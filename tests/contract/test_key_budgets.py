"""What every store must do for keys with limits: budgets that hold under any crowd."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.core.errors import (
    GatewayError,
    InsufficientCreditsError,
    RateLimitedError,
)
from gateway.core.key_limits import NO_LIMITS, KeyLimits, KeyUse, parse_limits
from gateway.core.ledger import Balance
from gateway.core.tasks import DeliveryMode, TaskState
from gateway.ports import Key, Succession
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Recorded,
    Stores,
    a_task,
    a_void,
    an_attempt,
    an_end,
    open_stores,
)

YESTERDAY, LAST_MONTH = "2020-02-29", "2020-01-31"


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def a_key(stores: Stores, key_id: str = "key-1", **limits: Any) -> Key:
    key = Key(
        key_id,
        TENANT,
        key_id.encode(),
        "iwk",
        "auto",
        NOW_MS,
        limits=KeyLimits(**limits),
    )
    await stores.accounts.add_key(key)
    return await read(stores, key_id)


async def read(stores: Stores, key_id: str = "key-1") -> Key:
    key = await stores.accounts.key(key_id)
    assert key is not None
    return key


async def open_task(stores: Stores, key: Key, task_id: str, **changes: Any) -> None:
    version = None if key.counted else key.keys_version
    task = a_task(task_id, key_id=key.id, keys_version=version, **changes)
    await stores.tasks.open(task)


async def limit(stores: Stores, key_id: str = "key-1", **limits: Any) -> Key:
    changed = KeyLimits(**limits)
    key = await stores.accounts.change_key(
        key_id, lambda key: replace(key, limits=changed)
    )
    assert key is not None
    return await read(stores, key_id)


async def use(stores: Stores, key_id: str = "key-1") -> KeyUse:
    found = await stores.accounts.key_use(key_id)
    assert found is not None
    return found


async def counted(stores: Stores) -> dict[str, tuple[int, int]]:
    rows = await stores.rows("SELECT period, nanocredits, open_tasks FROM key_use")
    return {period: (nano, tasks) for period, nano, tasks in rows}


# --- crowds ---


async def test_a_budget_for_50_sells_exactly_50_of_500_at_once(stores: Stores) -> None:
    await stores.fund(1_000_000)
    key = await a_key(stores, total_nanocredits=50 * 100 + 99)

    async def ask(number: int) -> str:
        try:
            # With a key of the client's each has a connection of its own.
            once = f"once-{number}" if number % 2 else None
            await open_task(stores, key, f"task-{number}", idempotency_key=once)
        except InsufficientCreditsError as error:
            return error.code
        return "held"

    outcomes = Counter(await asyncio.gather(*map(ask, range(500))))

    assert outcomes == {"held": 50, "insufficient_token_quota": 450}
    assert await stores.balance() == Balance(posted=1_000_000, held=5_000)
    assert await stores.broken() == set()


async def test_so_many_tasks_in_flight_as_may_and_never_more(stores: Stores) -> None:
    await stores.fund(1_000_000)
    key = await a_key(stores, concurrent_tasks=7)
    flying, most = 0, 0

    async def ask(number: int) -> str:
        nonlocal flying, most
        try:
            mode = DeliveryMode.ASYNC if number % 2 else DeliveryMode.SYNC
            order = "{}" if number % 2 else None
            name = f"task-{number}"
            await open_task(stores, key, name, mode=mode, order_json=order)
        except RateLimitedError as error:
            return error.code
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1
        await stores.tasks.finish(an_end(f"task-{number}"))
        return "held"

    outcomes = Counter(await asyncio.gather(*map(ask, range(100))))

    assert outcomes.keys() == {"held", "rate_limit_exceeded"}
    assert outcomes["held"] >= most == 7
    assert (await use(stores)).open_tasks == 0
    assert await stores.broken() == set()


# --- what counts ---


async def test_what_a_settlement_gives_back_can_be_held_again(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, total_nanocredits=150)
    await open_task(stores, key, "task-1")
    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, key, "task-2")

    await stores.tasks.finish(an_end("task-1", due_nanocredits=50))
    await open_task(stores, key, "task-2")
    await stores.tasks.finish(a_void("task-2"))
    await open_task(stores, key, "task-3")

    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, key, "task-4")
    found = await use(stores)
    assert (found.open_tasks, found.total_nanocredits) == (1, 150)
    assert (await counted(stores))["total"] == (150, 1)
    assert await stores.broken() == set()


async def test_a_charge_over_its_hold_counts_whole(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, daily_nanocredits=200)
    await open_task(stores, key, "task-1")

    await stores.tasks.finish(an_end("task-1", due_nanocredits=230))

    with pytest.raises(InsufficientCreditsError) as refused:
        await open_task(stores, key, "task-2", hold_nanocredits=1)
    assert refused.value.extra["remaining_credits"] == "0"
    assert (await use(stores)).daily_nanocredits == 230
    assert await stores.broken() == set()


async def test_a_settlement_that_comes_twice_gives_back_once(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, total_nanocredits=500)
    await open_task(stores, key, "task-1")

    ends = (stores.tasks.finish(an_end("task-1")) for _ in range(20))
    await asyncio.gather(*ends)

    assert (await counted(stores))["total"] == (60, 0)
    assert await stores.broken() == set()


async def test_a_cancelled_task_gives_all_back(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, total_nanocredits=100, concurrent_tasks=1)
    await open_task(stores, key, "task-1", mode=DeliveryMode.ASYNC, order_json="{}")

    found = await stores.queue.cancel("task-1", TENANT, now_ms=NOW_MS)

    assert found is not None
    assert found.state is TaskState.CANCELLED
    await open_task(stores, key, "task-2")
    assert await stores.broken() == set()


async def test_a_refusal_holds_nothing_and_says_what_is_left_and_until_when(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, monthly_nanocredits=130, daily_nanocredits=1_000)
    await open_task(stores, key, "task-1")

    with pytest.raises(InsufficientCreditsError) as refused:
        await open_task(stores, key, "task-2")

    error = refused.value
    assert (error.status, error.code) == (402, "token_monthly_quota_exceeded")
    assert error.extra["limit_scope"] == "monthly"
    assert error.extra["monthly_limit_credits"] == "0.00000013"
    assert error.extra["monthly_used_credits"] == "0.0000001"
    assert error.extra["remaining_credits"] == "0.00000003"
    assert str(error.extra["resets_at"]).endswith("-01T00:00:00Z")
    assert await stores.balance() == Balance(posted=1_000, held=100)
    assert await stores.tasks.get("task-2") is None


async def test_yesterday_and_last_month_do_not_count(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, daily_nanocredits=100, monthly_nanocredits=150)
    await open_task(stores, key, "task-1")
    today = (await use(stores)).day
    for day in (YESTERDAY, LAST_MONTH):
        await stores.change(f"DELETE FROM key_use WHERE period = '{day}'")
        await stores.corrupt(f"UPDATE holds SET day = '{day}' WHERE day = '{today}'")
        await stores.change(
            f"UPDATE key_use SET period = '{day}' WHERE period = '{today}'",
            f"""UPDATE key_use SET period = '{day[:7]}'
            WHERE period = '{today[:7]}'""",
        )
        await open_task(stores, key, f"task-of-{day}")

    await stores.tasks.finish(an_end("task-1"))

    found = await use(stores)
    assert (found.daily_nanocredits, found.monthly_nanocredits) == (100, 100)
    assert found.total_nanocredits == 260
    assert (await counted(stores))[YESTERDAY] == (60, 0)
    assert await stores.broken() == set()


@pytest.mark.parametrize("at_ms", [0, NOW_MS, 4_000_000_000_000])
async def test_the_day_is_the_databases_whatever_the_gateways_clock_says(
    stores: Stores, at_ms: int
) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, daily_nanocredits=150)
    await open_task(stores, key, "task-1")

    with pytest.raises(InsufficientCreditsError, match="daily budget"):
        await open_task(stores, key, "task-2", created_ms=at_ms)

    days = await stores.rows("SELECT day FROM holds")
    assert days == [((await use(stores)).day,)]


# --- limits that come, change and go ---


async def test_a_budget_counts_what_was_used_before_it_was_given(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    free = await a_key(stores)
    await open_task(stores, free, "task-1")
    await stores.tasks.finish(an_end("task-1"))
    await open_task(stores, free, "task-2")
    assert await counted(stores) == {}

    await limit(stores, total_nanocredits=200, concurrent_tasks=1)

    # By a key as it was read before: a process may know it for two seconds more.
    with pytest.raises(GatewayError) as refused:
        await open_task(stores, free, "task-3", hold_nanocredits=40)
    assert refused.value.extra["limit_scope"] == "concurrent_tasks"
    await stores.tasks.finish(an_end("task-2", due_nanocredits=100))
    await open_task(stores, free, "task-3", hold_nanocredits=40)
    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, free, "task-4", hold_nanocredits=1)
    assert await stores.broken() == set()


async def test_a_key_without_limits_is_counted_no_more(stores: Stores) -> None:
    await stores.fund(1_000)
    limited = await a_key(stores, total_nanocredits=100)
    await open_task(stores, limited, "task-1")

    free = await limit(stores)

    assert not free.counted
    assert await counted(stores) == {}
    await open_task(stores, limited, "task-2")
    await stores.tasks.finish(an_end("task-1"))
    again = await limit(stores, total_nanocredits=160)
    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, again, "task-3", hold_nanocredits=1)
    assert await stores.broken() == set()


async def test_budgets_come_and_go_among_a_crowd_and_every_hold_is_counted(
    stores: Stores,
) -> None:
    await stores.fund(1_000_000)
    key = await a_key(stores)

    async def work(number: int) -> None:
        for turn in range(10):
            name = f"task-{number}-{turn}"
            await open_task(stores, key, name)
            await stores.tasks.begin_attempt(an_attempt(name))
            if turn % 3:
                await stores.tasks.finish(a_void(name))

    async def change() -> None:
        for turn in range(10):
            await limit(stores, daily_nanocredits=None if turn % 2 else 10**9)
            await asyncio.sleep(0.01)
        await limit(stores, daily_nanocredits=10**9)

    await asyncio.gather(change(), *map(work, range(8)))

    found = await use(stores)
    assert (found.open_tasks, found.daily_nanocredits) == (32, 3_200)
    assert (await counted(stores))["total"] == (3_200, 32)
    assert await stores.broken() == set()


async def test_a_smaller_budget_counts_at_once(stores: Stores) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, total_nanocredits=1_000)
    await open_task(stores, key, "task-1")

    await limit(stores, total_nanocredits=50)

    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, key, "task-2", hold_nanocredits=1)


async def test_a_key_and_its_successor_share_their_budget(stores: Stores) -> None:
    await stores.fund(1_000)
    first = await a_key(stores, total_nanocredits=250, concurrent_tasks=9)

    def rotate(key: Key, all_of_it: Any) -> Succession:
        assert [each.id for each in all_of_it] == ["key-1"]
        after = replace(key, id="key-2", digest=b"2", meter_id=key.meter)
        return Succession(replace(key, rotated_to="key-2"), after)

    await stores.accounts.rotate_key("key-1", rotate)
    second = await read(stores, "key-2")
    await open_task(stores, first, "task-1")
    await open_task(stores, second, "task-2")

    for key in (first, second):
        with pytest.raises(InsufficientCreditsError):
            await open_task(stores, key, f"task-of-{key.id}")
    assert (await use(stores, "key-1")) == (await use(stores, "key-2"))
    assert (await read(stores)).rotated_to == "key-2"
    await limit(stores, "key-2")
    with pytest.raises(InsufficientCreditsError):
        await open_task(stores, first, "task-3")
    await open_task(stores, second, "task-3")
    assert await stores.broken() == set()


async def test_a_key_that_is_not_there_has_no_use_and_no_limits(stores: Stores) -> None:
    assert await stores.accounts.key_use("nobody's") is None
    assert await stores.accounts.change_key("nobody's", lambda key: key) is None
    rotated = await stores.accounts.rotate_key(
        "nobody's", lambda k, _: Succession(k, k)
    )
    assert rotated is None


async def test_limits_are_kept_as_they_were_given(stores: Stores) -> None:
    await stores.fund(0)
    given = {
        "scopes": ["images", "admin"],
        "models": ["gpt-image-2"],
        "addresses": ["203.0.113.0/24", "2001:db8::/32"],
        "expires_at": "2027-01-31T12:00:00Z",
        "requests_per_minute": 60,
        "concurrent_tasks": 4,
        "total_credits": "9223372036.854775807",
        "daily_credits": 0,
        "monthly_credits": "0.000000001",
    }
    limits = parse_limits(given, NO_LIMITS, lambda name: name)
    await a_key(stores, "key-1")

    key = await stores.accounts.change_key("key-1", lambda k: replace(k, limits=limits))
    await stores.reopen()

    assert await read(stores) == key
    assert (await read(stores)).limits == limits


# --- what it costs ---


async def test_a_key_without_limits_asks_the_database_for_nothing_more(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    await a_key(stores, "limited", total_nanocredits=1_000)
    key = await a_key(stores)
    noted = Recorded(stores.database)
    quiet = Stores(stores.backend, noted)

    await open_task(quiet, key, "task-1")
    await quiet.tasks.finish(an_end("task-1"))

    assert not [sql for sql in noted.statements if "key_use" in sql]


# --- the audit ---


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE key_use SET nanocredits = nanocredits + 1 WHERE period = 'total'",
        "UPDATE key_use SET open_tasks = 0 WHERE period = 'total'",
        "DELETE FROM key_use WHERE period = 'total'",
        """INSERT INTO key_use (meter_id, period, nanocredits, open_tasks)
        VALUES ('key-1', '2001-01-01', 5, 0)""",
        "UPDATE holds SET key_id = 'key-9'",
    ],
)
async def test_the_audit_finds_a_count_that_is_wrong(stores: Stores, harm: str) -> None:
    await stores.fund(1_000)
    key = await a_key(stores, total_nanocredits=500)
    await open_task(stores, key, "task-1")
    assert await stores.broken() == set()

    await stores.corrupt(harm)

    found = {invariant for invariant, _ in await stores.broken()}
    assert found == {"what a key has used is the sum of its holds and charges"}
