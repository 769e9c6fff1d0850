"""The tasks table as a queue: who gets which task, and who has lost it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.sql.queue import SqlQueue
from gateway.api.render import Renderer
from gateway.core.tasks import (
    QUEUE_MAX_TASKS_PER_TENANT,
    DeliveryMode,
    FencedError,
    QueueFullError,
    TaskState,
)
from gateway.flows.tasks import Listed, ManageTasks, ReadTask
from gateway.ports import Cancelling, Claimed, Lease, NewTask, TaskFilter, Tenant
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_lost_attempt,
    a_result,
    a_task,
    a_void,
    a_won_attempt,
    an_attempt,
    an_end,
    open_stores,
)
from tests.fakes import MemoryBlobs, StillClock

LEASE_MS = 30_000


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        await opened.fund(10**9)
        yield opened


def queued(task_id: str = "task-1", **changes: Any) -> NewTask:
    fields = {"mode": DeliveryMode.ASYNC, "order_json": '{"prompt": "a fox"}'} | changes
    return a_task(task_id, **fields)


async def claim(stores: Stores, now_ms: int = NOW_MS) -> Claimed | None:
    return await stores.queue.claim(now_ms=now_ms, lease_ms=LEASE_MS)


async def test_a_task_is_claimed_once_with_all_that_it_takes(stores: Stores) -> None:
    await stores.tasks.open(
        queued(callback_url="https://a.test/hook", origin="http://x")
    )

    claims = await asyncio.gather(*(claim(stores) for _ in range(20)))

    (claimed,) = [each for each in claims if each is not None]
    assert claimed.order_json == '{"prompt": "a fox"}'
    assert (claimed.fence, claimed.takeovers) == (1, 0)
    assert claimed.record.state is TaskState.PROCESSING
    assert claimed.record.callback_url == "https://a.test/hook"
    assert claimed.record.origin == "http://x"


async def test_sync_tasks_are_not_in_the_queue(stores: Stores) -> None:
    await stores.tasks.open(a_task())

    assert await claim(stores) is None


async def test_a_sync_task_with_a_job_is_taken_up_after_the_end_of_its_process(
    stores: Stores,
) -> None:
    await stores.tasks.open(a_task())
    await stores.tasks.open(a_task("task-2"))
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.begin_attempt(an_attempt("task-2"))
    await stores.tasks.accept_attempt("task-1", 1, "job-9", '{"prompt": "a fox"}')
    assert await claim(stores, NOW_MS + 10 * LEASE_MS) is None

    assert await stores.queue.reclaim() == 1

    claimed = await claim(stores)
    assert claimed is not None
    assert claimed.order_json == '{"prompt": "a fox"}'
    assert claimed.record.mode is DeliveryMode.SYNC
    assert claimed.record.attempts[0].job_id == "job-9"
    assert await claim(stores) is None
    assert [task.id for task in await stores.tasks.unfinished(10)] == ["task-2"]
    await stores.tasks.finish(an_end(fence=claimed.fence))
    assert await stores.rows("SELECT order_json FROM tasks") == [(None,), (None,)]
    assert await stores.broken() == set()


async def test_a_sync_task_with_a_job_is_taken_up_when_its_own_process_cannot(
    stores: Stores,
) -> None:
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.accept_attempt("task-1", 1, "job-9", '{"prompt": "a fox"}')

    assert await stores.tasks.take_up_overdue(a_task().deadline_ms) == 0
    assert await stores.tasks.take_up_overdue(a_task().deadline_ms + 1) == 1

    claimed = await claim(stores)
    assert claimed is not None
    assert claimed.record.mode is DeliveryMode.SYNC


async def test_whoever_takes_a_task_over_hears_that_it_was_cancelled(
    stores: Stores,
) -> None:
    await stores.tasks.open(queued())
    first = await claim(stores)
    assert first is not None
    await stores.queue.cancel("task-1", TENANT, now_ms=NOW_MS)

    second = await claim(stores, NOW_MS + LEASE_MS + 1)

    assert second is not None
    assert (first.cancelled, second.cancelled) == (False, True)


async def test_the_order_of_an_async_task_stays_as_it_was(stores: Stores) -> None:
    await stores.tasks.open(queued())
    claimed = await claim(stores)
    assert claimed is not None
    await stores.tasks.begin_attempt(an_attempt(fence=claimed.fence))

    await stores.tasks.accept_attempt(
        "task-1", 1, "job-9", '{"prompt": "a cat"}', fence=claimed.fence
    )

    assert await stores.rows("SELECT order_json FROM tasks") == [
        ('{"prompt": "a fox"}',)
    ]


async def test_the_order_is_forgotten_when_the_task_is_over(stores: Stores) -> None:
    await stores.tasks.open(queued())
    claimed = await claim(stores)
    assert claimed is not None

    await stores.tasks.finish(an_end(fence=claimed.fence))

    assert await stores.rows("SELECT order_json FROM tasks") == [(None,)]
    assert await stores.broken() == set()


async def test_a_lease_that_ends_lets_another_take_over(stores: Stores) -> None:
    await stores.tasks.open(queued())
    first = await claim(stores)
    assert first is not None
    assert await claim(stores, NOW_MS + LEASE_MS) is None

    second = await claim(stores, NOW_MS + LEASE_MS + 1)

    assert second is not None
    assert (second.fence, second.takeovers) == (2, 1)


async def test_nobody_takes_a_task_over_from_oneself(stores: Stores) -> None:
    # A clock that jumps, or a process that was stopped, ends leases that are held.
    await stores.tasks.open(queued())
    await stores.tasks.open(queued("task-2"))
    mine = await claim(stores)
    other = await claim(stores)
    assert mine is not None
    assert other is not None

    again = await stores.queue.claim(
        now_ms=NOW_MS + 10 * LEASE_MS, lease_ms=LEASE_MS, held={mine.record.id}
    )
    none = await stores.queue.claim(
        now_ms=NOW_MS + 10 * LEASE_MS, lease_ms=LEASE_MS, held={mine.record.id}
    )

    assert again is not None
    assert again.record.id == other.record.id
    assert none is None


async def test_a_variant_without_a_place_keeps_no_other_waiting(
    stores: Stores,
) -> None:
    await stores.fund(10**9, "ten-2")
    for number in range(3):
        await stores.tasks.open(queued(f"slow-{number}", variant="slow"))
    await stores.tasks.open(queued("quick", variant="quick", tenant_id="ten-2"))
    await stores.tasks.open(queued("late", variant="quick"))

    async def claimed() -> str | None:
        found = await stores.queue.claim(
            now_ms=NOW_MS, lease_ms=LEASE_MS, full=["slow", "other"]
        )
        return found.record.id if found else None

    assert [await claimed() for _ in range(3)] == ["late", "quick", None]
    rest = await claim(stores)
    assert rest is not None
    assert rest.record.id == "slow-0"


async def test_a_lease_that_is_renewed_does_not_end(stores: Stores) -> None:
    await stores.tasks.open(queued())
    claimed = await claim(stores)
    assert claimed is not None

    lease = await stores.queue.renew(
        "task-1", claimed.fence, now_ms=NOW_MS + 20_000, lease_ms=LEASE_MS
    )

    assert lease == Lease(held=True)
    assert await claim(stores, NOW_MS + 45_000) is None


async def test_who_has_lost_a_task_can_write_nothing(stores: Stores) -> None:
    await stores.tasks.open(queued())
    zombie = await claim(stores)
    owner = await claim(stores, NOW_MS + LEASE_MS + 1)
    assert zombie is not None
    assert owner is not None
    await stores.tasks.begin_attempt(an_attempt(fence=owner.fence))

    with pytest.raises(FencedError):
        await stores.tasks.begin_attempt(an_attempt(seq=2, fence=zombie.fence))
    held = await stores.balance()
    with pytest.raises(FencedError):
        await stores.tasks.finish(an_end(fence=zombie.fence))
    with pytest.raises(FencedError):
        await stores.tasks.end_attempt(a_lost_attempt(fence=zombie.fence))
    with pytest.raises(FencedError):
        await stores.tasks.accept_attempt("task-1", 1, "job-9", fence=zombie.fence)
    assert await stores.balance() == held
    lost = await stores.queue.renew(
        "task-1", zombie.fence, now_ms=NOW_MS, lease_ms=LEASE_MS
    )
    settled = await stores.tasks.finish(
        an_end(fence=owner.fence, attempts=(a_won_attempt(fence=owner.fence),))
    )

    assert lost == Lease(held=False)
    assert settled.charged == 60
    assert await stores.rows("SELECT kind, nanousd FROM cost_book") == [
        ("cost", 6_000_000)
    ]
    assert await stores.broken() == set()


async def test_a_task_that_is_given_back_is_claimed_again_at_once(
    stores: Stores,
) -> None:
    await stores.tasks.open(queued())
    claimed = await claim(stores)
    assert claimed is not None

    await stores.queue.release("task-1", claimed.fence)

    again = await claim(stores)
    assert again is not None
    assert again.takeovers == 0


async def test_tenants_take_turns_however_many_tasks_each_has(stores: Stores) -> None:
    await stores.accounts.add_tenant(Tenant("ten-2", "small"), now_ms=NOW_MS)
    await stores.ledger.grant("ten-2", 10**9, reference="g", now_ms=NOW_MS)
    for i in range(20):
        await stores.tasks.open(queued(f"many-{i:02}", created_ms=NOW_MS + i))
    for i in range(3):
        task = queued(f"few-{i}", tenant_id="ten-2", created_ms=NOW_MS + 100 + i)
        await stores.tasks.open(task)

    order = [await claim(stores, NOW_MS + i) for i in range(8)]

    names = [each.record.id for each in order if each is not None]
    assert names == [
        "many-00",
        "few-0",
        "many-01",
        "few-1",
        "many-02",
        "few-2",
        "many-03",
        "many-04",
    ]


async def test_a_tenant_may_have_a_thousand_waiting(stores: Stores) -> None:
    opened = await asyncio.gather(
        *(
            stores.tasks.open(queued(f"task-{i}"))
            for i in range(QUEUE_MAX_TASKS_PER_TENANT + 20)
        ),
        return_exceptions=True,
    )

    refused = [each for each in opened if isinstance(each, QueueFullError)]
    assert len(refused) == 20
    assert refused[0].status == 429
    assert refused[0].retry_after_s
    assert (await stores.rows("SELECT queued, running FROM accounts")) == [(1000, 0)]
    await claim(stores)
    assert await stores.tasks.open(queued("one-more")) is None


async def test_a_waiting_task_is_cancelled_at_once_and_for_free(stores: Stores) -> None:
    await stores.tasks.open(queued())

    first = await stores.queue.cancel("task-1", TENANT, now_ms=NOW_MS)
    again = await stores.queue.cancel("task-1", TENANT, now_ms=NOW_MS)

    balance = await stores.ledger.balance(TENANT)
    assert first == Cancelling(TaskState.CANCELLED, ended=True)
    assert again == Cancelling(TaskState.CANCELLED)
    assert await claim(stores) is None
    assert balance is not None
    assert (balance.held, balance.spent) == (0, 0)
    assert await stores.broken() == set()


async def test_the_worker_of_a_running_task_hears_that_it_is_cancelled(
    stores: Stores,
) -> None:
    await stores.tasks.open(queued())
    claimed = await claim(stores)
    assert claimed is not None

    found = await stores.queue.cancel("task-1", TENANT, now_ms=NOW_MS)
    lease = await stores.queue.renew("task-1", 1, now_ms=NOW_MS, lease_ms=LEASE_MS)

    assert found == Cancelling(TaskState.PROCESSING)
    assert lease == Lease(held=True, cancelled=True)


async def test_another_tenants_task_cannot_be_cancelled(stores: Stores) -> None:
    await stores.tasks.open(queued())

    assert await stores.queue.cancel("task-1", "ten-2", now_ms=NOW_MS) is None
    assert await claim(stores) is not None


async def test_the_counters_come_back_to_zero(stores: Stores) -> None:
    for i in range(30):
        await stores.tasks.open(queued(f"task-{i}"))
    for i in range(30):
        claimed = await claim(stores)
        assert claimed is not None
        end = an_end if i % 2 else a_void
        await stores.tasks.finish(end(claimed.record.id, fence=claimed.fence))

    assert await stores.rows("SELECT queued, running FROM accounts") == [(0, 0)]
    assert await stores.broken() == set()


async def test_tasks_are_listed_by_state_and_variant_newest_first(
    stores: Stores,
) -> None:
    for i in range(5):
        await stores.tasks.open(queued(f"task-{i}", created_ms=NOW_MS + i))
    await stores.tasks.open(queued("other", variant="gpt-image-1.5"))
    claimed = await claim(stores)
    assert claimed is not None
    await stores.tasks.finish(
        an_end(claimed.record.id, fence=claimed.fence, results=(a_result(),))
    )

    async def listed(wanted: TaskFilter, **page: int) -> tuple[int, list[str]]:
        where = {"offset": 0, "limit": 10} | page
        total, lines = await stores.queue.tasks(TENANT, wanted, **where)
        return total, [line.id for line in lines]

    assert await listed(TaskFilter(), limit=2) == (6, ["task-4", "task-3"])
    assert await listed(TaskFilter((TaskState.COMPLETED,))) == (1, [claimed.record.id])
    assert await listed(TaskFilter(variant="gpt-image-1.5")) == (1, ["other"])
    assert (await stores.queue.tasks("ten-2", TaskFilter(), offset=0, limit=9))[0] == 0


async def test_what_is_usual_is_learned_from_tasks_of_the_same_class(
    stores: Stores,
) -> None:
    assert await stores.queue.usual_ms("a/low/1024x1024/1") is None
    for i, took_ms in enumerate((4_000, 8_000)):
        await stores.tasks.open(queued(f"task-{i}", task_class="a/low/1024x1024/1"))
        claimed = await claim(stores)
        assert claimed is not None
        await stores.tasks.finish(
            an_end(f"task-{i}", fence=1, finished_ms=NOW_MS + took_ms)
        )

    assert await stores.queue.usual_ms("a/low/1024x1024/1") == 6_000
    assert await stores.queue.usual_ms("a/high/1024x1024/1") is None


async def test_a_clock_that_was_set_back_makes_no_time_less_than_none(
    stores: Stores,
) -> None:
    await stores.tasks.open(queued("task-1", task_class="a/low/1024x1024/1"))
    assert await claim(stores) is not None
    await stores.tasks.finish(an_end("task-1", fence=1, finished_ms=NOW_MS - 9_000))

    assert await stores.queue.usual_ms("a/low/1024x1024/1") == 0
    _, (line,) = await stores.queue.tasks(TENANT, TaskFilter(), offset=0, limit=9)
    assert Renderer(68 * 10**9).line(Listed(line, 100))["duration"] == 0


async def test_a_page_tells_progress_and_asks_once_for_each_class(
    stores: Stores,
) -> None:
    asked: list[str] = []

    class Counting(SqlQueue):
        async def usual_ms(self, task_class: str) -> int | None:
            asked.append(task_class)
            return 100_000

    queue, clock = Counting(stores.database), StillClock(NOW_MS)
    for i in range(9):
        await stores.tasks.open(queued(f"task-{i}", task_class=f"class-{i % 2}"))
    for _ in range(7):
        assert await claim(stores) is not None
    clock.at_ms += 40_000
    read = ReadTask(stores.tasks, queue, MemoryBlobs(), clock)
    manage = ManageTasks(queue, read, clock)
    total, listed = await manage.page(TENANT, TaskFilter(), page=1, page_size=9)

    shown = {each.line.id: each.progress for each in listed}
    assert total == 9
    assert sorted(shown.values()) == [0, 0, *[40] * 7]
    assert sorted(asked) == ["class-0", "class-1"]


async def test_tasks_are_forgotten_by_age_and_the_ledger_is_not(stores: Stores) -> None:
    for i in range(3):
        await stores.tasks.open(a_task(f"task-{i}"))
    await stores.tasks.finish(an_end("task-0", finished_ms=NOW_MS + 1))
    await stores.tasks.finish(an_end("task-1", finished_ms=NOW_MS + 5))

    assert await stores.queue.forget_tasks(NOW_MS + 5, 10) == ["task-0"]
    assert await stores.tasks.get("task-0") is None
    assert await stores.tasks.get("task-1") is not None
    assert await stores.tasks.get("task-2") is not None
    assert await stores.broken() == set()
    counts = Counter(row[0] for row in await stores.rows("SELECT kind FROM entries"))
    assert counts["charge"] == 4
