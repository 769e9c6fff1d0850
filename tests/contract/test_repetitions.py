"""One key, one task: what the store promises about requests that are repeated."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.core.errors import InsufficientCreditsError
from gateway.core.idempotency import KEY_KEPT_MS, IdempotencyConflictError
from gateway.ports import Earlier, NewTask
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_task,
    a_void,
    an_end,
    open_stores,
)


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        await opened.fund(1_000_000)
        yield opened


def keyed(task_id: str = "task-1", **changes: Any) -> NewTask:
    fields = {"fingerprint": "print-1", "idempotency_key": "key-of-client"} | changes
    return a_task(task_id, **fields)


def wanted(**changes: Any) -> Earlier:
    fields: dict[str, Any] = {
        "tenant_id": TENANT,
        "key_id": "key-1",
        "fingerprint": "print-1",
        "idempotency_key": "key-of-client",
        "since_ms": NOW_MS - 1000,
    }
    return Earlier(**(fields | changes))


async def test_two_hundred_at_once_open_one_task_and_one_hold(stores: Stores) -> None:
    opened = await asyncio.gather(
        *(stores.tasks.open(keyed(f"task-{i}")) for i in range(200))
    )

    counts = Counter(opened)
    assert counts[None] == 1
    ((first, times),) = [(k, n) for k, n in counts.items() if k is not None]
    assert times == 199
    assert await stores.rows("SELECT id FROM tasks") == [(first,)]
    balance = await stores.ledger.balance(TENANT)
    assert balance is not None
    assert balance.held == 100


async def test_the_same_key_for_another_request_is_a_conflict(stores: Stores) -> None:
    await stores.tasks.open(keyed())

    with pytest.raises(IdempotencyConflictError):
        await stores.tasks.open(keyed("task-2", fingerprint="print-2"))
    with pytest.raises(IdempotencyConflictError):
        await stores.tasks.earlier(wanted(fingerprint="print-2"))


async def test_a_key_is_one_tenants_own(stores: Stores) -> None:
    await stores.tasks.open(keyed())

    assert await stores.tasks.earlier(wanted(tenant_id="another")) is None


async def test_a_request_that_was_refused_leaves_no_key(stores: Stores) -> None:
    with pytest.raises(InsufficientCreditsError):
        await stores.tasks.open(keyed(hold_nanocredits=10**15))

    assert await stores.tasks.open(keyed("task-2")) is None


async def test_a_key_stands_for_its_task_for_a_day(stores: Stores) -> None:
    await stores.tasks.open(keyed())
    await stores.tasks.finish(an_end("task-1"))
    at_the_edge = NOW_MS + KEY_KEPT_MS

    assert await stores.tasks.open(keyed("task-2", created_ms=at_the_edge)) == "task-1"
    later = keyed("task-3", created_ms=at_the_edge + 1)
    assert await stores.tasks.open(later) is None
    assert await stores.tasks.open(keyed("task-4", created_ms=later.created_ms)) == (
        "task-3"
    )


async def test_a_failure_that_bought_nothing_frees_its_key(stores: Stores) -> None:
    await stores.tasks.open(keyed())
    await stores.tasks.finish(a_void("task-1", forget_key=True))

    assert await stores.tasks.earlier(wanted()) is None
    assert await stores.tasks.earlier(wanted(idempotency_key=None)) is None
    assert await stores.tasks.open(keyed("task-2")) is None


async def test_a_failure_that_stands_keeps_its_key(stores: Stores) -> None:
    await stores.tasks.open(keyed())
    await stores.tasks.finish(a_void("task-1"))

    assert await stores.tasks.open(keyed("task-2")) == "task-1"


async def test_a_librarys_retry_finds_the_last_equal_request_of_its_key(
    stores: Stores,
) -> None:
    await stores.tasks.open(keyed("task-1", idempotency_key=None))
    await stores.tasks.open(
        keyed("task-2", idempotency_key=None, created_ms=NOW_MS + 10)
    )

    def look(**changes: Any) -> Earlier:
        return wanted(idempotency_key=None, **changes)

    assert await stores.tasks.earlier(look()) == "task-2"
    assert await stores.tasks.earlier(look(fingerprint="print-2")) is None
    assert await stores.tasks.earlier(look(key_id="key-2")) is None
    ended_ms = an_end("task-2").finished_ms
    assert await stores.tasks.earlier(look(since_ms=ended_ms + 1)) == "task-2"
    await stores.tasks.finish(an_end("task-1"))
    await stores.tasks.finish(an_end("task-2"))
    assert await stores.tasks.earlier(look(since_ms=ended_ms)) == "task-2"
    assert await stores.tasks.earlier(look(since_ms=ended_ms + 1)) is None


async def test_old_keys_are_forgotten(stores: Stores) -> None:
    await stores.tasks.open(keyed())

    assert await stores.tasks.forget_keys(NOW_MS) == 0
    assert await stores.tasks.forget_keys(NOW_MS + 1) == 1
    assert await stores.rows("SELECT * FROM idempotency") == []
