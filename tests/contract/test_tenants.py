"""What every engine must keep of tenants: settings, traces, and low balances."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.core.catalogue import TokenPrice
from gateway.core.errors import ConflictError
from gateway.core.ledger import Balance
from gateway.core.statements import NEWEST, Cursor
from gateway.core.terms import Terms
from gateway.core.webhooks import Places
from gateway.ports import LowBalance, NewGrant, Tenant, TenantRecord
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_mark,
    a_task,
    an_end,
    open_stores,
)

LOW = LowBalance(100, "https://example.com/low", "key-1")
TERMS = Terms(850_000, {"gpt-image-2": TokenPrice(1, 2, 3, 4, 5)})


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def set_low(stores: Stores, low: LowBalance | None = LOW, name: str = "") -> None:
    await stores.tenants.change(
        TENANT,
        "tenant.change",
        lambda record: replace(record, low=low),
        a_mark(f"chg-low-{name}"),
    )


async def spend(stores: Stores, task_id: str, nanocredits: int) -> None:
    await stores.tasks.open(a_task(task_id, hold_nanocredits=nanocredits))
    await stores.tasks.finish(an_end(task_id, due_nanocredits=nanocredits))


async def give(stores: Stores, nanocredits: int, reference: str) -> None:
    grant = NewGrant(TENANT, nanocredits, reference)
    await stores.ledger.give(grant, a_mark(f"chg-{reference}"))


async def test_a_tenant_is_found_by_id_and_by_name(stores: Stores) -> None:
    await stores.tenants.add(Tenant("ten_1", "acme"), a_mark("chg-1"))
    await stores.tenants.add(Tenant("ten_2", "ten_1"), a_mark("chg-2"))

    found = await stores.tenants.record("acme")

    assert found == TenantRecord("ten_1", "acme", NOW_MS, Balance())
    assert await stores.tenants.record("ten_1") == found  # an id goes before a name
    assert await stores.tenants.record("nobody") is None
    total, page = await stores.tenants.page(offset=1, limit=5)
    assert (total, [record.name for record in page]) == (2, ["ten_1"])
    with pytest.raises(ConflictError):
        await stores.tenants.add(Tenant("ten_3", "acme"), a_mark("chg-3"))


async def test_a_change_is_kept_with_who_and_what_it_was_before(
    stores: Stores,
) -> None:
    await stores.tenants.add(Tenant(TENANT, "acme"), a_mark("chg-1"))

    changed = await stores.tenants.change(
        TENANT,
        "tenant.change",
        lambda record: replace(record, suspended_ms=NOW_MS, terms=TERMS, low=LOW),
        a_mark("chg-2", NOW_MS + 1),
    )

    assert changed == await stores.tenants.record(TENANT)
    assert changed is not None
    assert (changed.suspended_ms, changed.terms, changed.low) == (NOW_MS, TERMS, LOW)
    newest, made = await stores.tenants.trail(TENANT, after=NEWEST, limit=5)
    assert (newest.who, newest.what, newest.subject) == (
        "a test",
        "tenant.change",
        "acme",
    )
    before, after = (
        json.loads(t or "") for t in (newest.before_json, newest.after_json)
    )
    assert (before["price_multiplier"], after["price_multiplier"]) == ("1", "0.85")
    assert (before["suspended_at"], before["low_balance"]) == (None, None)
    assert after["low_balance"]["credits"] == "0.0000001"
    assert made.what == "tenant.create"


async def test_a_change_of_nothing_leaves_no_trace(stores: Stores) -> None:
    await stores.fund(0)

    assert await stores.tenants.change(
        TENANT, "x", lambda record: record, a_mark("chg-1")
    )

    assert await stores.tenants.trail(None, after=NEWEST, limit=5) == []
    nobody = await stores.tenants.change("x", "x", lambda r: r, a_mark("chg-2"))
    assert nobody is None


async def test_a_trail_is_read_page_by_page_and_by_tenant(stores: Stores) -> None:
    for number in range(5):
        tenant = Tenant(f"ten_{number}", f"name {number}")
        await stores.tenants.add(tenant, a_mark(f"chg-{number}"))

    first = await stores.tenants.trail(None, after=NEWEST, limit=3)
    after = Cursor(first[-1].at_ms, first[-1].id)
    rest = await stores.tenants.trail(None, after=after, limit=3)

    assert [each.id for each in (*first, *rest)] == [
        f"chg-{n}" for n in range(4, -1, -1)
    ]
    (mine,) = await stores.tenants.trail("ten_3", after=NEWEST, limit=3)
    assert mine.subject == "name 3"


async def test_terms_and_suspension_come_with_the_key(stores: Stores) -> None:
    await stores.fund(0)
    await stores.change(
        """INSERT INTO keys (id, tenant_id, digest, display, delivery, created_ms)
        VALUES ('key-1', 't-1', 'x', 'x', 'auto', 0)"""
        if type(stores.backend).__name__ == "Sqlite"
        else """INSERT INTO keys (id, tenant_id, digest, display, delivery, created_ms)
        VALUES ('key-1', 't-1', '\\x78', 'x', 'auto', 0)"""
    )
    await stores.tenants.change(
        TENANT,
        "x",
        lambda record: replace(record, suspended_ms=1, terms=TERMS),
        a_mark("chg-1"),
    )

    key = await stores.accounts.key("key-1")

    assert key is not None
    assert (key.terms, key.suspended) == (TERMS, True)


# --- low balances ---


async def test_a_low_balance_is_told_once_for_each_fall(stores: Stores) -> None:
    await stores.fund(150)
    await set_low(stores)

    assert await stores.tenants.tell_low(NOW_MS) == 0
    await spend(stores, "task-1", 51)
    assert await stores.tenants.tell_low(NOW_MS + 1) == 1
    await spend(stores, "task-2", 10)
    assert await stores.tenants.tell_low(NOW_MS + 2) == 0
    await give(stores, 11, "back to 100")
    assert await stores.tenants.tell_low(NOW_MS + 3) == 0
    await spend(stores, "task-3", 1)
    assert await stores.tenants.tell_low(NOW_MS + 4) == 1

    rows = await stores.rows(
        "SELECT id, event, url, host, key_id FROM deliveries ORDER BY created_ms"
    )
    event = ("credits.low", "https://example.com/low", "example.com", "key-1")
    assert rows == [
        (f"evt_t-1_low_{NOW_MS + 1}", *event),
        (f"evt_t-1_low_{NOW_MS + 4}", *event),
    ]


async def test_what_is_held_counts_as_there(stores: Stores) -> None:
    await stores.fund(150)
    await set_low(stores)
    await stores.tasks.open(a_task("task-1"))

    assert await stores.tenants.tell_low(NOW_MS) == 0


async def test_several_that_look_at_once_tell_once(stores: Stores) -> None:
    await stores.fund(50)
    await set_low(stores)

    told = await asyncio.gather(*(stores.tenants.tell_low(NOW_MS) for _ in range(8)))

    assert sum(told) == 1


async def test_another_threshold_is_looked_at_anew(stores: Stores) -> None:
    await stores.fund(50)
    await set_low(stores)
    await stores.tenants.tell_low(NOW_MS)

    await set_low(stores, replace(LOW, nanocredits=60), "2")

    assert await stores.tenants.tell_low(NOW_MS + 1) == 1
    await set_low(stores, None, "3")
    await spend(stores, "task-1", 50)
    assert await stores.tenants.tell_low(NOW_MS + 2) == 0


async def test_the_webhook_says_how_much_is_left(stores: Stores) -> None:
    await stores.fund(50)
    await set_low(stores)
    await stores.tenants.tell_low(NOW_MS)

    (due,) = await stores.outbox.claim(
        now_ms=NOW_MS, lease_ms=1_000, limit=5, places=Places(4, 4)
    )

    assert due.task_id == ""
    assert json.loads(due.body or "", parse_float=str) == {
        "id": f"evt_t-1_low_{NOW_MS}",
        "object": "event",
        "type": "credits.low",
        "created": NOW_MS // 1000,
        "data": {
            "remaining_credits": "0.00000005",
            "threshold_credits": "0.0000001",
        },
    }
    assert await stores.broken() == set()
    await stores.queue.forget_tasks(NOW_MS + 1, 10)
    assert await stores.outbox.get(due.id) is None
