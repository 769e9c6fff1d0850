"""What every engine must tell of credits: statements, open holds, usage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.adapters.sql import migrations
from gateway.adapters.sql.database import StoreFailedError
from gateway.core.statements import ALWAYS, DAY_MS, NEWEST, Cursor, Span
from gateway.flows.statements import ReadCredits
from gateway.ports import Entry, OpenHold, UsageRow
from providers.kit.contract import Usage
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_result,
    a_task,
    a_void,
    an_end,
    open_stores,
)
from tests.virtual_time import LoopClock

DAY = NOW_MS // DAY_MS


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def sold(
    stores: Stores, task_id: str, *, at_ms: int, due: int = 60, **task: str
) -> None:
    await stores.tasks.open(a_task(task_id, created_ms=at_ms, **task))
    await stores.tasks.finish(
        an_end(
            task_id,
            finished_ms=at_ms,
            due_nanocredits=due,
            results=(a_result(blob=f"{task_id}/0"),),
        )
    )


async def test_a_statement_tells_what_came_and_went_newest_first(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    await sold(stores, "task-1", at_ms=NOW_MS + 5)
    await stores.tasks.open(a_task("task-2"))
    await stores.tasks.finish(a_void("task-2"))

    entries = await stores.reports.entries(TENANT, ALWAYS, after=NEWEST, limit=10)

    assert entries == [
        Entry(
            "charge:task-1",
            "charge",
            -60,
            NOW_MS + 5,
            "task-1",
            "task-1",
            None,
            "key-1",
            "gpt-image-2",
            1,
        ),
        Entry("grant:t-1:first", "grant", 1_000, NOW_MS, "first"),
    ]


async def test_pages_miss_and_repeat_nothing_though_times_are_equal(
    stores: Stores,
) -> None:
    await stores.fund(100_000)
    for number in range(25):
        await sold(stores, f"task-{number}", at_ms=NOW_MS + number // 10)

    read, after = list[str](), NEWEST
    while page := await stores.reports.entries(TENANT, ALWAYS, after=after, limit=4):
        read += [entry.txn_id for entry in page]
        after = Cursor(page[-1].created_ms, page[-1].txn_id)

    everything = await stores.reports.entries(TENANT, ALWAYS, after=NEWEST, limit=100)
    assert read == [entry.txn_id for entry in everything]
    assert len(set(read)) == 26


async def test_the_last_page_says_that_it_is_the_last(stores: Stores) -> None:
    await stores.fund(1_000)
    await sold(stores, "task-1", at_ms=NOW_MS + 5)
    read = ReadCredits(stores.reports, LoopClock())

    first = await read.page(TENANT, ALWAYS, after=NEWEST, limit=1)
    whole = await read.page(TENANT, ALWAYS, after=NEWEST, limit=2)

    assert first.next is not None
    assert whole.next is None
    streamed = [each async for each in read.all_entries(TENANT, ALWAYS, NEWEST)]
    assert streamed == whole.entries


async def test_a_statement_is_that_of_one_tenant_and_of_its_days(
    stores: Stores,
) -> None:
    await stores.fund(1_000)
    await stores.fund(1_000, "t-2")
    await stores.fund(1_000, "t-1:first")  # its grant could be taken for another's
    await sold(stores, "other", at_ms=NOW_MS + 1, tenant_id="t-2")
    await sold(stores, "early", at_ms=NOW_MS + 2)
    await sold(stores, "late", at_ms=NOW_MS + 3)

    early = await stores.reports.entries(
        TENANT, Span(NOW_MS + 2, NOW_MS + 3), after=NEWEST, limit=10
    )
    everything = await stores.reports.entries(TENANT, ALWAYS, after=NEWEST, limit=10)

    assert [entry.reference for entry in early] == ["early"]
    assert [entry.reference for entry in everything] == ["late", "early", "first"]


async def test_open_holds_are_those_of_tasks_that_are_not_over(stores: Stores) -> None:
    await stores.fund(1_000)
    await stores.fund(1_000, "t-2")
    await sold(stores, "over", at_ms=NOW_MS)
    await stores.tasks.open(a_task("open"))
    await stores.tasks.open(a_task("foreign", tenant_id="t-2"))

    (hold,) = await stores.reports.open_holds(TENANT, offset=0, limit=10)

    assert hold == OpenHold(
        "open", "key-1", "gpt-image-2", 100, NOW_MS, hold.expires_ms
    )
    assert await stores.reports.open_holds(TENANT, offset=1, limit=10) == []


async def test_usage_adds_up_by_day_key_and_model(stores: Stores) -> None:
    await stores.fund(100_000)
    await sold(stores, "a", at_ms=NOW_MS)
    await sold(stores, "b", at_ms=NOW_MS, due=40)
    await sold(stores, "c", at_ms=NOW_MS, key_id="key-2")
    await sold(stores, "d", at_ms=NOW_MS + DAY_MS, variant="gpt-image-1.5")
    await stores.tasks.open(a_task("void"))
    await stores.tasks.finish(a_void("void"))
    span = Span(NOW_MS, NOW_MS + 2 * DAY_MS)

    async def usage(*by: str) -> list[UsageRow]:
        return list(await stores.reports.usage(TENANT, span, by, limit=100))

    once, twice = Usage(text_input=5, image_output=196), Usage(10, 0, 0, 0, 392)
    assert await usage("day", "key", "model") == [
        UsageRow(DAY, "key-1", "gpt-image-2", 2, 2, 100, twice),
        UsageRow(DAY, "key-2", "gpt-image-2", 1, 1, 60, once),
        UsageRow(DAY + 1, "key-1", "gpt-image-1.5", 1, 1, 60, once),
    ]
    assert [(r.key_id, r.charged_nanocredits) for r in await usage("key")] == [
        ("key-1", 160),
        ("key-2", 60),
    ]
    (total,) = await usage()
    assert (total.requests, total.images, total.charged_nanocredits) == (4, 4, 220)
    assert (await stores.balance()).spent == 220


async def test_nothing_used_is_no_row(stores: Stores) -> None:
    await stores.fund(0)

    assert await stores.reports.usage(TENANT, ALWAYS, (), limit=5) == []


async def test_usage_outlives_the_tasks(stores: Stores) -> None:
    await stores.fund(1_000)
    await sold(stores, "task-1", at_ms=NOW_MS)
    before = await stores.reports.usage(TENANT, ALWAYS, ("key", "model"), limit=5)

    await stores.queue.forget_tasks(NOW_MS + 10, 10)

    assert await stores.tasks.get("task-1") is None
    after = await stores.reports.usage(TENANT, ALWAYS, ("key", "model"), limit=5)
    assert after == before != []


# --- a database from before ---

OLD_ROWS = (
    "INSERT INTO tenants (id, name, created_ms) VALUES ('t-1', 'one', 0)",
    "INSERT INTO accounts (tenant_id, posted, held, spent) VALUES ('t-1', 40, 0, 60)",
    "INSERT INTO grants VALUES ('t-1', 'first', 100, 1)",
    """INSERT INTO tasks (id, tenant_id, key_id, variant, operation, mode, state,
        request_json, text_input, text_cached, image_input, image_cached, image_output,
        created_ms, deadline_ms, finished_ms)
    VALUES ('task-1', 't-1', 'key-1', 'gpt-image-2', 'generate', 'sync', 'completed',
        '{}', 5, 0, 0, 0, 196, 1, 2, 3)""",
    """INSERT INTO holds (task_id, tenant_id, nanocredits, created_ms, expires_ms)
    VALUES ('task-1', 't-1', 100, 1, 9)""",
    """INSERT INTO settlements (task_id, due, charged, absorbed, usage_source,
        created_ms) VALUES ('task-1', 60, 60, 0, 'reported', 3)""",
    """INSERT INTO entries (txn_id, account, nanocredits, kind, reference, created_ms)
    VALUES ('grant:t-1:first', 'tenant:t-1', 100, 'grant', 't-1:first', 1),
        ('grant:t-1:first', 'grants', -100, 'grant', 't-1:first', 1),
        ('charge:task-1', 'tenant:t-1', -60, 'charge', 'task-1', 3),
        ('charge:task-1', 'revenue', 60, 'charge', 'task-1', 3)""",
)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_what_was_sold_before_an_upgrade_is_in_statement_and_usage(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = next(
        number
        for number, each in enumerate(migrations.MIGRATIONS)
        if "entries_anew" in each.statements[0]
    )
    with monkeypatch.context() as before:
        before.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:step])
        async with open_stores(backend, tmp_path) as stores:
            await stores.change(*OLD_ROWS)
            before.undo()
            await migrations.migrate(stores.database, now_ms=NOW_MS)

            entries = await stores.reports.entries("t-1", ALWAYS, after=NEWEST, limit=5)
            usage = await stores.reports.usage("t-1", ALWAYS, ("key",), limit=5)
            assert [(e.kind, e.nanocredits, e.variant) for e in entries] == [
                ("charge", -60, "gpt-image-2"),
                ("grant", 100, None),
            ]
            tokens = Usage(text_input=5, image_output=196)
            assert usage == [UsageRow(None, "key-1", None, 1, 0, 60, tokens)]
            assert await stores.broken() == set()
            for table in ("entries", "settlements"):
                with pytest.raises(StoreFailedError):
                    await stores.change(f"DELETE FROM {table}")
