"""Grants that end, refunds, and suspended tenants, on every engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.adapters.sql.ledger import LOTS_MAX
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.errors import ConflictError, ForbiddenError, NotFoundError
from gateway.core.ledger import Balance, Settled
from gateway.core.statements import ALWAYS, NEWEST
from gateway.ports import Expired, NewGrant, NewRefund
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Recorded,
    Stores,
    a_mark,
    a_task,
    a_void,
    an_end,
    open_stores,
)

END_MS = NOW_MS + 10_000


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def give(
    stores: Stores, reference: str, nanocredits: int, expires_ms: int | None = END_MS
) -> Balance:
    grant = NewGrant(TENANT, nanocredits, reference, expires_ms, "a note")
    return await stores.ledger.give(grant, a_mark(f"chg-{reference}"))


async def spend(stores: Stores, task_id: str, nanocredits: int) -> Settled:
    await stores.tasks.open(a_task(task_id, hold_nanocredits=nanocredits))
    return await stores.tasks.finish(an_end(task_id, due_nanocredits=nanocredits))


async def left(stores: Stores) -> dict[str, int | None]:
    grants = await stores.ledger.grants(TENANT, offset=0, limit=100)
    return {grant.reference: grant.left_nanocredits for grant in grants}


async def test_what_is_left_of_a_grant_at_its_end_is_taken_back(
    stores: Stores,
) -> None:
    await stores.fund(50)
    await give(stores, "promo", 100)
    await spend(stores, "task-1", 30)

    assert await stores.ledger.expire(END_MS - 1, 10) == []
    assert await stores.ledger.expire(END_MS, 10) == [Expired(TENANT, "promo", 70)]
    assert await stores.ledger.expire(END_MS, 10) == []

    assert await stores.balance() == Balance(posted=50, spent=30)
    newest, *_ = await stores.reports.entries(TENANT, ALWAYS, after=NEWEST, limit=9)
    assert (newest.kind, newest.nanocredits, newest.reference) == (
        "expiry",
        -70,
        "promo#1",
    )
    assert await stores.broken() == set()


async def test_what_ends_soonest_is_spent_first(stores: Stores) -> None:
    await stores.fund(100)
    await give(stores, "later", 100, END_MS + 5)
    await give(stores, "sooner", 100)

    await spend(stores, "task-1", 40)
    assert await left(stores) == {"first": None, "later": 100, "sooner": 60}
    await spend(stores, "task-2", 100)
    assert await left(stores) == {"first": None, "later": 60, "sooner": 0}
    await spend(stores, "task-3", 90)

    assert await left(stores) == {"first": None, "later": 0, "sooner": 0}
    assert await stores.ledger.expire(END_MS + 5, 10) == []
    assert await stores.balance() == Balance(posted=70, spent=230)
    assert await stores.broken() == set()


async def test_what_a_hold_has_set_aside_stays_until_it_is_closed(
    stores: Stores,
) -> None:
    await stores.fund(0)
    await give(stores, "promo", 100)
    await stores.tasks.open(a_task("task-1", hold_nanocredits=80))

    assert await stores.ledger.expire(END_MS, 10) == [Expired(TENANT, "promo", 20)]
    assert await stores.balance() == Balance(posted=80, held=80)
    assert await stores.ledger.expire(END_MS, 10) == []
    settled = await stores.tasks.finish(an_end("task-1", due_nanocredits=50))
    assert await stores.ledger.expire(END_MS, 10) == [Expired(TENANT, "promo", 30)]

    assert settled == Settled(charged=50)
    assert await stores.balance() == Balance(spent=50)
    assert await stores.broken() == set()


async def test_one_tenant_with_everything_held_keeps_no_other_waiting(
    stores: Stores,
) -> None:
    await stores.fund(0)
    await stores.fund(0, "t-2")
    await give(stores, "held", 100)
    await stores.ledger.give(NewGrant("t-2", 10, "x", END_MS + 1), a_mark("x"))
    await stores.tasks.open(a_task("task-1", hold_nanocredits=100))

    assert await stores.ledger.expire(END_MS + 1, 1) == [Expired("t-2", "x", 10)]


async def test_several_that_take_back_at_once_take_once(stores: Stores) -> None:
    await stores.fund(0)
    await give(stores, "promo", 100)

    found = await asyncio.gather(*(stores.ledger.expire(END_MS, 10) for _ in range(8)))

    assert sum(each.nanocredits for taken in found for each in taken) == 100
    assert await stores.balance() == Balance()
    assert await stores.broken() == set()


async def test_a_grant_given_again_is_one_grant_with_one_trace(stores: Stores) -> None:
    await stores.fund(0)

    await asyncio.gather(*(give(stores, "promo", 100) for _ in range(10)))

    assert await stores.balance() == Balance(posted=100)
    assert await left(stores) == {"promo": 100}
    traces = await stores.tenants.trail(TENANT, after=NEWEST, limit=10)
    assert [(t.what, t.subject, t.who) for t in traces] == [
        ("grant", "promo", "a test")
    ]
    with pytest.raises(ConflictError):
        await give(stores, "promo", 100, END_MS + 1)


async def test_a_tenant_has_only_so_many_grants_that_end(stores: Stores) -> None:
    await stores.fund(0)
    await stores.change(f"UPDATE accounts SET lots = {LOTS_MAX}")

    with pytest.raises(ConflictError) as refused:
        await give(stores, "one more", 1)

    assert refused.value.code == "too_many_grants"
    assert await stores.balance() == Balance()


# --- refunds ---


async def back(
    stores: Stores, reference: str, nanocredits: int | None = None, task: str = "task-1"
) -> Balance:
    asked = NewRefund(TENANT, task, reference, nanocredits)
    return await stores.ledger.refund(asked, a_mark(f"chg-{reference}"))


async def test_a_refund_gives_back_at_most_what_was_charged(stores: Stores) -> None:
    await stores.fund(100)
    await spend(stores, "task-1", 60)

    assert await back(stores, "r-1", 20) == Balance(posted=60, spent=40)
    with pytest.raises(ConflictError) as refused:
        await back(stores, "r-2", 41)
    assert await back(stores, "r-2") == Balance(posted=100)
    with pytest.raises(ConflictError):
        await back(stores, "r-3")

    assert refused.value.code == "refund_exceeds_charge"
    assert await stores.balance() == Balance(posted=100)
    assert await stores.broken() == set()


async def test_a_refund_is_given_once(stores: Stores) -> None:
    await stores.fund(100)
    await spend(stores, "task-1", 60)
    await spend(stores, "task-2", 40)

    await asyncio.gather(*(back(stores, "r-1", 25) for _ in range(10)))

    assert await stores.balance() == Balance(posted=25, spent=75)
    for other in (back(stores, "r-1", 24), back(stores, "r-1", 25, "task-2")):
        with pytest.raises(ConflictError):
            await other


async def test_nothing_is_refunded_that_is_not_the_tenants_charge(
    stores: Stores,
) -> None:
    await stores.fund(100)
    await stores.fund(100, "t-2")
    await stores.tasks.open(a_task("open"))
    await stores.tasks.open(a_task("foreign", tenant_id="t-2"))
    await stores.tasks.finish(an_end("foreign"))

    for task in ("open", "foreign", "nowhere"):
        with pytest.raises(NotFoundError):
            await back(stores, "r-1", 1, task)


async def test_a_failed_task_has_nothing_to_refund(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task("task-1"))
    await stores.tasks.finish(a_void("task-1"))

    with pytest.raises(ConflictError):
        await back(stores, "r-1")


async def test_a_refund_outlives_the_task(stores: Stores) -> None:
    await stores.fund(100)
    await spend(stores, "task-1", 60)
    await stores.queue.forget_tasks(NOW_MS + 10_000, 10)

    assert await back(stores, "r-1") == Balance(posted=100)


# --- many at once ---


async def test_a_thousand_settlements_of_one_hold_are_one(stores: Stores) -> None:
    await stores.fund(1_000)
    await give(stores, "promo", 30)
    await stores.tasks.open(a_task("task-1"))

    settled = await asyncio.gather(
        *(
            stores.tasks.finish(an_end("task-1", tenant_id=lane))
            for lane in (TENANT, "") * 500
        )
    )

    assert set(settled) == {Settled(charged=60)}
    assert await stores.rows("SELECT COUNT(*) FROM settlements") == [(1,)]
    assert await stores.rows(
        "SELECT COUNT(*), SUM(nanocredits) FROM entries WHERE kind = 'charge'"
    ) == [(2, 0)]
    assert await stores.balance() == Balance(posted=970, spent=60)
    assert await left(stores) == {"first": None, "promo": 0}
    assert await stores.broken() == set()


# --- suspended tenants ---


async def test_a_suspended_tenant_holds_nothing_new_and_ends_what_runs(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    await stores.tasks.open(a_task("task-1"))
    await stores.change("UPDATE accounts SET suspended_ms = 1")

    with pytest.raises(ForbiddenError) as refused:
        await stores.tasks.open(a_task("task-2"))
    settled = await stores.tasks.finish(an_end("task-1"))

    assert refused.value.code == "tenant_suspended"
    assert settled == Settled(charged=60)
    assert await stores.balance() == Balance(posted=940, spent=60)


# --- who has no grant that ends pays nothing for it ---


async def test_a_settlement_looks_at_grants_only_where_some_end(stores: Stores) -> None:
    await stores.fund(1_000)
    recorded = Recorded(stores.database)
    tasks = SqlTaskStore(recorded)

    async def pair(task_id: str) -> set[str]:
        recorded.statements.clear()
        await tasks.open(a_task(task_id))
        await tasks.finish(an_end(task_id))
        return {
            sql for sql in recorded.statements if "lots WHERE" in sql or "draws" in sql
        }

    plain = await pair("task-1")
    hot = len(recorded.statements)
    await give(stores, "promo", 100)
    with_lots = await pair("task-2")

    assert plain == set()
    assert hot == 10
    assert with_lots
