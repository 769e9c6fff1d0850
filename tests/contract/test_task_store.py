"""What every task store must do, alone, in a crowd, and through crashes.

The last part is about SQLite itself: its writer, its groups, its other processes.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.sql import migrations
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import (
    Database,
    StoreBusyError,
    StoreFailedError,
    Transaction,
)
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import SchemaTooNewError, migrate
from gateway.adapters.sql.queue import SqlQueue
from gateway.adapters.sql.sqlite import GROUP_MAX, SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.errors import (
    ConflictError,
    GatewayError,
    InsufficientCreditsError,
    NotFoundError,
)
from gateway.core.ledger import Balance, Settled
from gateway.core.limits import REBUY_WINDOW_MS, REBUYS_ALWAYS
from gateway.core.money import parse_nano
from gateway.core.tasks import AttemptState, DeliveryMode, TaskState
from gateway.core.webhooks import SigningKey
from gateway.ports import AttemptRecord, NewTask, Rebuy, TaskRecord, Tenant
from providers.kit.contract import Billed, Usage
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Recorded,
    Sqlite,
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

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


# --- one task's life ---


async def test_an_opened_task_can_be_read_with_its_hold(stores: Stores) -> None:
    await stores.fund(150)

    await stores.tasks.open(a_task(mode=DeliveryMode.ASYNC))

    assert await stores.balance() == Balance(posted=150, held=100)
    assert await stores.tasks.get("task-1") == TaskRecord(
        id="task-1",
        tenant_id=TENANT,
        key_id="key-1",
        variant="gpt-image-2",
        operation="generate",
        mode=DeliveryMode.ASYNC,
        state=TaskState.PENDING,
        request_json='{"n":1}',
        route_json=None,
        answer_json=None,
        error_json=None,
        usage=None,
        usage_source=None,
        hold_nanocredits=100,
        charged_nanocredits=None,
        absorbed_nanocredits=None,
        created_ms=NOW_MS,
        deadline_ms=NOW_MS + 300_000,
        finished_ms=None,
        attempts=(),
        results=(),
    )


async def test_whatever_an_upstream_says_it_can_be_booked(stores: Stores) -> None:
    await stores.fund(150)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.begin_attempt(an_attempt(seq=2))

    await stores.tasks.end_attempt(a_lost_attempt(detail="no\0", upstream_code="\0"))
    result = a_result(revised_prompt="a fox\0")
    await stores.tasks.finish(
        an_end(attempts=(a_won_attempt(seq=2),), results=(result,))
    )

    assert await stores.balance() == Balance(posted=90, held=0, spent=60)
    task = await stores.tasks.get("task-1")
    assert task is not None
    assert (task.attempts[0].detail or "").startswith("no")
    assert (task.results[0].revised_prompt or "").startswith("a fox")


async def test_a_task_tells_its_whole_story(stores: Stores) -> None:
    await stores.fund(150)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt(), route_json='{"first":"openai"}')
    await stores.tasks.end_attempt(
        a_lost_attempt(upstream_status=504, upstream_code="slow", detail="no answer")
    )
    await stores.tasks.begin_attempt(
        an_attempt(seq=2, offer_id="fal/gpt-image-2", upstream="fal")
    )
    await stores.tasks.accept_attempt("task-1", 2, "job-9")
    running = await stores.tasks.get("task-1")
    await stores.tasks.finish(
        an_end(
            answer_json='{"created":1}',
            attempts=(a_won_attempt(seq=2),),
            results=(a_result(), a_result(index=1, inline=False, revised_prompt=None)),
        )
    )
    done = await stores.tasks.get("task-1")

    assert running is not None
    assert running.state is TaskState.PROCESSING
    assert running.route_json == '{"first":"openai"}'
    assert [a.state for a in running.attempts] == [
        AttemptState.FAILED,
        AttemptState.ACCEPTED,
    ]
    assert running.attempts[1].job_id == "job-9"
    assert done is not None
    assert done.state is TaskState.COMPLETED
    assert done.finished_ms == NOW_MS + 3_000
    assert done.answer_json == '{"created":1}'
    assert done.usage == Usage(text_input=5, image_output=196)
    assert done.usage_source == "reported"
    assert (done.charged_nanocredits, done.absorbed_nanocredits) == (60, 0)
    assert done.results == (
        a_result(),
        a_result(index=1, inline=False, revised_prompt=None),
    )
    assert done.attempts[0] == AttemptRecord(
        seq=1,
        offer_id="openai/gpt-image-2",
        upstream="openai",
        state=AttemptState.FAILED,
        estimate_nanousd=7_000_000,
        started_ms=NOW_MS + 10,
        finished_ms=NOW_MS + 2_000,
        job_id=None,
        kind="timeout",
        upstream_status=504,
        upstream_code="slow",
        detail="no answer",
        billed="maybe",
        cost_nanousd=7_000_000,
    )
    assert done.attempts[1].state is AttemptState.DONE


async def test_a_task_without_the_credits_leaves_no_trace(stores: Stores) -> None:
    await stores.fund(parse_nano("0.5"))
    task = a_task(hold_nanocredits=parse_nano("0.50000001"))

    with pytest.raises(InsufficientCreditsError) as refused:
        await stores.tasks.open(task)

    assert refused.value.code == "insufficient_quota"
    assert refused.value.extra == {
        "estimated_credits": "0.50000001",
        "account_balance_credits": "0.5",
    }
    assert "0.50000001 credits, and 0.5 are available" in str(refused.value)
    assert await stores.tasks.get("task-1") is None
    assert await stores.rows("SELECT COUNT(*) FROM holds") == [(0,)]
    assert await stores.balance() == Balance(posted=parse_nano("0.5"))


async def test_held_credits_are_not_available(stores: Stores) -> None:
    await stores.fund(150)
    await stores.tasks.open(a_task("task-1"))

    with pytest.raises(InsufficientCreditsError):
        await stores.tasks.open(a_task("task-2", hold_nanocredits=51))

    await stores.tasks.open(a_task("task-2", hold_nanocredits=50))
    assert await stores.balance() == Balance(posted=150, held=150)


async def test_a_task_needs_its_tenant(stores: Stores) -> None:
    with pytest.raises(NotFoundError):
        await stores.tasks.open(a_task(tenant_id="nobody"))


async def test_a_task_is_opened_once(stores: Stores) -> None:
    await stores.fund(300)
    await stores.tasks.open(a_task())

    with pytest.raises(ConflictError):
        await stores.tasks.open(a_task(hold_nanocredits=7))

    assert await stores.balance() == Balance(posted=300, held=100)


async def test_there_is_no_task_of_an_unknown_id(stores: Stores) -> None:
    assert await stores.tasks.get("nothing") is None
    with pytest.raises(NotFoundError):
        await stores.tasks.finish(an_end("nothing"))
    with pytest.raises(ConflictError):
        await stores.tasks.begin_attempt(an_attempt("nothing"))
    with pytest.raises(NotFoundError):
        await stores.tasks.accept_attempt("nothing", 1, "job-9")


async def test_unfinished_tasks_come_oldest_first(stores: Stores) -> None:
    await stores.fund(1_000)
    for age, task_id in enumerate(["young", "done", "old", "oldest"]):
        await stores.tasks.open(a_task(task_id, created_ms=NOW_MS - age))
    await stores.tasks.begin_attempt(an_attempt("old"))
    await stores.tasks.finish(an_end("done"))

    found = await stores.tasks.unfinished(10)
    first = await stores.tasks.unfinished(1)

    assert [task.id for task in found] == ["oldest", "old", "young"]
    assert [len(task.attempts) for task in found] == [0, 1, 0]
    assert [task.id for task in first] == ["oldest"]


# --- attempts ---


async def test_nothing_is_sent_for_a_task_that_is_over(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.finish(a_void(state=TaskState.CANCELLED))

    with pytest.raises(ConflictError):
        await stores.tasks.begin_attempt(an_attempt())

    task = await stores.tasks.get("task-1")
    assert task is not None
    assert task.state is TaskState.CANCELLED
    assert task.attempts == ()


async def test_an_attempt_is_begun_once(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())

    with pytest.raises(ConflictError):
        await stores.tasks.begin_attempt(an_attempt(upstream="fal"))


async def test_a_later_attempt_keeps_the_route(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt(), route_json="[]")
    await stores.tasks.begin_attempt(an_attempt(seq=2))

    begun = await stores.tasks.get("task-1")
    await stores.tasks.finish(an_end(route_json='["openai"]'))
    ended = await stores.tasks.get("task-1")

    assert begun is not None
    assert begun.route_json == "[]"
    assert ended is not None
    assert ended.route_json == '["openai"]'


async def test_an_end_without_a_route_keeps_the_one_that_was_taken(
    stores: Stores,
) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt(), route_json="[]")
    await stores.tasks.finish(an_end())

    task = await stores.tasks.get("task-1")

    assert task is not None
    assert task.route_json == "[]"


async def test_an_attempt_ends_once(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.end_attempt(a_lost_attempt())

    await stores.tasks.end_attempt(a_lost_attempt(cost_nanousd=9, kind="network"))
    await stores.tasks.finish(a_void(attempts=(a_won_attempt(),)))

    task = await stores.tasks.get("task-1")
    assert task is not None
    assert (task.attempts[0].kind, task.attempts[0].cost_nanousd) == (
        "timeout",
        7_000_000,
    )
    assert await stores.rows("SELECT nanousd, unknown_outcome FROM cost_book") == [
        (7_000_000, 1)
    ]


async def test_a_late_job_id_is_kept_though_the_attempt_was_given_up(
    stores: Stores,
) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.end_attempt(a_lost_attempt())

    await stores.tasks.accept_attempt("task-1", 1, "job-9")

    task = await stores.tasks.get("task-1")
    assert task is not None
    assert task.attempts[0].job_id == "job-9"
    assert task.attempts[0].state is AttemptState.FAILED


async def test_waste_of_unknown_outcomes_is_told_from_other_spend(
    stores: Stores,
) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    ends = [
        a_lost_attempt(seq=1, cost_nanousd=1),
        a_lost_attempt(seq=2, cost_nanousd=20, billed=Billed.YES),
        a_lost_attempt(seq=3, cost_nanousd=0, billed=Billed.NO),
        a_lost_attempt(seq=4, cost_nanousd=400, finished_ms=NOW_MS - 1),
        a_lost_attempt(seq=6, cost_nanousd=0),
        a_lost_attempt(seq=7, cost_nanousd=7, kind="bad_gateway"),
    ]
    for end in ends:
        await stores.tasks.begin_attempt(an_attempt(seq=end.seq))
        await stores.tasks.end_attempt(end)
    await stores.tasks.begin_attempt(an_attempt(seq=5))
    await stores.tasks.finish(
        an_end(attempts=(a_won_attempt(seq=5, cost_nanousd=5_000),))
    )

    assert await stores.rows(
        """SELECT seq, upstream, variant, kind, source, nanousd, unknown_outcome
        FROM cost_book ORDER BY 1"""
    ) == [
        (1, "openai", "gpt-image-2", "waste", "estimate", 1, 1),
        (2, "openai", "gpt-image-2", "waste", "estimate", 20, 0),
        (4, "openai", "gpt-image-2", "waste", "estimate", 400, 1),
        (5, "openai", "gpt-image-2", "cost", "usage", 5_000, 0),
        (6, "openai", "gpt-image-2", "waste", "estimate", 0, 1),
        (7, "openai", "gpt-image-2", "waste", "estimate", 7, 0),
    ]


async def test_a_purchase_is_repeated_as_long_as_the_spend_of_the_day_bears_it(
    stores: Stores,
) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    await stores.tasks.end_attempt(a_lost_attempt(cost_nanousd=100_000))

    async def asked(task_id: str, *, now_ms: int = NOW_MS, risk: int = 100) -> bool:
        return await stores.tasks.rebuy(
            Rebuy(task_id, 1, risk, now_ms), now_ms - REBUY_WINDOW_MS
        )

    # Ten, whatever they cost. Then one percent of 100,000: 1,000 are at risk by then.
    first = [await asked(f"task-{n}") for n in range(REBUYS_ALWAYS)]
    more = [await asked(f"late-{n}", risk=risk) for n, risk in enumerate([1, 1])]
    again = await asked("task-3")
    next_day = await asked("task-99", now_ms=NOW_MS + REBUY_WINDOW_MS + 1)

    assert first == [True] * REBUYS_ALWAYS
    assert more == [False, False]
    assert again  # it was noted before: by a worker that is lost
    assert next_day
    noted = await stores.rows("SELECT COUNT(*), SUM(risked_nanousd) FROM rebuys")
    assert noted == [(REBUYS_ALWAYS + 1, 1_100)]


async def test_many_who_fail_together_stay_within_the_share(stores: Stores) -> None:
    await stores.fund(100)
    rebuys = [Rebuy(f"task-{n}", 1, 100, NOW_MS) for n in range(50)]

    allowed = await asyncio.gather(
        *(stores.tasks.rebuy(rebuy, NOW_MS - REBUY_WINDOW_MS) for rebuy in rebuys)
    )

    assert sum(allowed) == REBUYS_ALWAYS


# --- money ---


@dataclass(frozen=True, slots=True)
class Case:
    posted: int
    due: int
    settled: Settled
    after: Balance


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case(150, 60, Settled(60), Balance(90, 0, 60)), id="less than held"
        ),
        pytest.param(
            Case(150, 120, Settled(120), Balance(30, 0, 120)), id="more than held"
        ),
        pytest.param(
            Case(150, 170, Settled(150, 20), Balance(0, 0, 150)), id="over all there is"
        ),
        pytest.param(Case(150, 0, Settled(0), Balance(150, 0, 0)), id="nothing"),
    ],
)
async def test_a_settlement_takes_what_is_due_but_never_more_than_is_there(
    stores: Stores, case: Case
) -> None:
    await stores.fund(case.posted)
    await stores.tasks.open(a_task())

    settled = await stores.tasks.finish(an_end(due_nanocredits=case.due))

    assert settled == case.settled
    assert await stores.balance() == case.after
    entries = await stores.rows(
        "SELECT account, nanocredits FROM entries WHERE kind = 'charge'"
    )
    assert dict(entries) == {
        account: nano
        for account, nano in (
            (f"tenant:{TENANT}", -settled.charged),
            ("absorbed", -settled.absorbed),
            ("revenue", case.due),
        )
        if nano
    }
    assert await stores.broken() == set()


async def test_an_over_run_never_takes_what_another_task_holds(stores: Stores) -> None:
    await stores.fund(200)
    await stores.tasks.open(a_task("task-1"))
    await stores.tasks.open(a_task("task-2", hold_nanocredits=90))

    settled = await stores.tasks.finish(an_end("task-1", due_nanocredits=500))

    assert settled == Settled(charged=110, absorbed=390)
    assert await stores.balance() == Balance(posted=90, held=90, spent=110)


async def test_a_failed_task_costs_nothing(stores: Stores) -> None:
    await stores.fund(100)
    await stores.tasks.open(a_task())

    assert await stores.tasks.finish(a_void()) == Settled(0)

    task = await stores.tasks.get("task-1")
    assert task is not None
    assert task.state is TaskState.FAILED
    assert task.error_json == '{"code":"upstream_error"}'
    assert task.usage is None
    assert await stores.balance() == Balance(posted=100)
    assert await stores.rows("SELECT COUNT(*) FROM entries WHERE kind='charge'") == [
        (0,)
    ]


async def test_the_first_end_of_a_task_stands(stores: Stores) -> None:
    await stores.fund(300)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())
    first = await stores.tasks.finish(
        an_end(attempts=(a_won_attempt(),), results=(a_result(),))
    )
    before = await stores.tasks.get("task-1")

    again = await stores.tasks.finish(a_void())
    dearer = await stores.tasks.finish(
        an_end(due_nanocredits=90, results=(a_result(index=1),))
    )

    assert again == dearer == Settled(charged=60)
    assert [each.again for each in (first, again, dearer)] == [False, True, True]
    assert await stores.tasks.get("task-1") == before
    assert await stores.balance() == Balance(posted=240, spent=60)


async def test_a_thousand_ends_of_one_task_settle_it_once(stores: Stores) -> None:
    await stores.fund(1_000)
    await stores.tasks.open(a_task())
    await stores.tasks.begin_attempt(an_attempt())

    settled = await asyncio.gather(
        *(
            stores.tasks.finish(
                an_end(
                    due_nanocredits=1 + number,
                    attempts=(a_won_attempt(),),
                    results=(a_result(),),
                )
            )
            for number in range(1_000)
        )
    )

    assert len(set(settled)) == 1
    charged = settled[0].charged
    assert await stores.balance() == Balance(posted=1_000 - charged, spent=charged)
    assert await stores.rows("SELECT COUNT(*) FROM settlements") == [(1,)]
    assert await stores.rows("SELECT COUNT(*) FROM entries WHERE kind='charge'") == [
        (2,)
    ]
    assert await stores.rows("SELECT COUNT(*) FROM cost_book") == [(1,)]
    assert await stores.broken() == set()


RACERS = 200
FAIR = Counter({"opened": 100, "InsufficientCreditsError": 100})


async def race(tasks: SqlTaskStore) -> Counter[str]:
    """Let 200 tasks want credits for 100 at once; count how it went for them."""

    async def run(number: int) -> str:
        try:
            await tasks.open(a_task(f"task-{number}"))
        except GatewayError as refused:
            return type(refused).__name__
        return "opened"

    return Counter(await asyncio.gather(*map(run, range(RACERS))))


async def test_concurrent_tasks_never_spend_the_same_credit(stores: Stores) -> None:
    await stores.fund(100 * 100)

    assert await race(stores.tasks) == FAIR
    assert await stores.balance() == Balance(posted=10_000, held=10_000)

    opened = await stores.tasks.unfinished(RACERS)
    await asyncio.gather(
        *(stores.tasks.finish(an_end(t.id, due_nanocredits=100)) for t in opened)
    )

    assert await stores.balance() == Balance(posted=0, held=0, spent=10_000)
    assert await stores.broken() == set()


@dataclass(frozen=True, slots=True)
class CheckThenUpdate(SqlTaskStore):
    """The mistake: the balance is read first, and changed later whatever it is."""

    everyone_has_looked: asyncio.Barrier = field(
        default_factory=lambda: asyncio.Barrier(RACERS)
    )

    async def open(self, task: NewTask) -> None:
        balance = await SqlLedger(self.database).balance(task.tenant_id)
        assert balance is not None
        await self.everyone_has_looked.wait()
        if balance.available < task.hold_nanocredits:
            raise InsufficientCreditsError("not enough")

        async def hold(tx: Transaction) -> None:
            await tx.run(
                "UPDATE accounts SET held = held + $2 WHERE tenant_id = $1",
                task.tenant_id,
                task.hold_nanocredits,
            )
            await tx.run(
                """INSERT INTO holds
                    (task_id, tenant_id, nanocredits, created_ms, expires_ms)
                VALUES ($1, $2, $3, 0, 0)""",
                task.id,
                task.tenant_id,
                task.hold_nanocredits,
            )

        await self.database.write(hold)


async def test_control_check_then_update_overdraws(stores: Stores) -> None:
    await stores.fund(100 * 100)
    await stores.corrupt("DELETE FROM keys")  # only to take the guards away

    outcomes = await race(CheckThenUpdate(stores.database))

    assert outcomes != FAIR
    assert outcomes == {"opened": RACERS}
    assert ("a balance is never negative", TENANT) in await stores.broken()


async def test_control_the_schema_is_a_second_line_of_defence(stores: Stores) -> None:
    await stores.fund(100 * 100)

    outcomes = await race(CheckThenUpdate(stores.database))

    assert outcomes == {"opened": 100, "StoreFailedError": 100} != FAIR
    assert await stores.balance() == Balance(posted=10_000, held=10_000)


# --- what lasts ---


async def test_a_reopened_database_keeps_everything(stores: Stores) -> None:
    await stores.fund(1_000)
    await stores.tasks.open(a_task("task-1"))
    await stores.tasks.begin_attempt(an_attempt("task-1"), route_json="[]")
    await stores.tasks.finish(
        an_end("task-1", attempts=(a_won_attempt(),), results=(a_result(),))
    )
    await stores.tasks.open(a_task("task-2"))
    before = [await stores.tasks.get("task-1"), await stores.tasks.get("task-2")]

    await stores.reopen()

    after = [await stores.tasks.get("task-1"), await stores.tasks.get("task-2")]
    assert after == before
    assert None not in after
    assert await stores.balance() == Balance(posted=940, held=100, spent=60)


async def test_no_statement_of_a_request_reads_a_whole_table(tmp_path: Path) -> None:
    async with open_stores("sqlite", tmp_path) as stores:
        statements = await _statements_of_a_request(stores)
        plans = {
            sql: await stores.rows("EXPLAIN QUERY PLAN " + _with_nulls(sql))
            for sql in statements
        }

    # The index of unfinished tasks holds nothing else, and is read up to the limit.
    allowed = "SCAN tasks USING INDEX tasks_unfinished"
    scans = {
        (sql, detail)
        for sql, plan in plans.items()
        for *_, detail in plan
        if detail.startswith("SCAN") and detail != allowed
    }
    assert scans == set()


async def test_postgresql_has_an_index_for_every_statement_of_a_request(
    tmp_path: Path,
) -> None:
    # It plans by how many rows there are, here none: so it is told to read a whole
    # table only where there is no other way.
    async with open_stores("postgres", tmp_path) as stores:
        statements = await _statements_of_a_request(stores)
        scans = {sql for sql in statements if "Seq Scan" in await _plan(stores, sql)}
        control = await _plan(stores, "SELECT id FROM tasks WHERE origin = $1")

    assert scans == set()
    assert "Seq Scan" in control


async def _plan(stores: Stores, sql: str) -> str:
    async def explain(tx: Transaction) -> str:
        params = max((int(n) for n in re.findall(r"\$(\d+)", sql)), default=0)
        given = f"({', '.join(['NULL'] * params)})" if params else ""
        await tx.run("SET LOCAL enable_seqscan = off")
        await tx.run("SET LOCAL plan_cache_mode = force_generic_plan")
        await tx.run(f"PREPARE hot AS {sql}")
        rows = await tx.all(f"EXPLAIN EXECUTE hot{given}")
        await tx.run("DEALLOCATE hot")
        return "\n".join(row[0] for row in rows)

    return await stores.database.write(explain)


async def _statements_of_a_request(stores: Stores) -> set[str]:
    await stores.fund(1_000)
    recorded = Recorded(stores.database)
    tasks, ledger = SqlTaskStore(recorded), SqlLedger(recorded)
    queue = SqlQueue(recorded)
    await tasks.open(a_task())
    with pytest.raises(InsufficientCreditsError):
        await tasks.open(a_task("task-2", hold_nanocredits=5_000))
    await tasks.begin_attempt(an_attempt())
    await tasks.accept_attempt("task-1", 1, "job-9")
    await tasks.end_attempt(a_lost_attempt())
    await tasks.finish(an_end(results=(a_result(),)))
    await tasks.finish(an_end())
    await tasks.get("task-1")
    await tasks.unfinished(10)
    await tasks.rebuy(Rebuy("task-1", 1, 1, NOW_MS), NOW_MS - REBUY_WINDOW_MS)
    await ledger.grant(TENANT, 1, reference="more", now_ms=NOW_MS)
    await ledger.balance(TENANT)
    later = a_task("task-3", mode=DeliveryMode.ASYNC, order_json="{}")
    await tasks.open(later)
    claimed = await queue.claim(now_ms=NOW_MS, lease_ms=1)
    assert claimed is not None
    await queue.renew("task-3", claimed.fence, now_ms=NOW_MS, lease_ms=1)
    await tasks.take_up_overdue(NOW_MS)
    assert len(recorded.statements) > 25
    return recorded.statements


def _with_nulls(sql: str) -> str:
    for number in range(40, 0, -1):
        sql = sql.replace(f"${number}", "NULL")
    return sql


# --- SQLite ---


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteDatabase]:
    database = await Sqlite(tmp_path).connect()
    yield database
    await database.close()


@asynccontextmanager
async def busy_writer(database: SqliteDatabase) -> AsyncIterator[None]:
    """Keep the writer thread in one transaction for as long as the block lasts."""
    loop = asyncio.get_running_loop()
    begun, release = asyncio.Event(), threading.Event()

    async def dawdle(tx: Transaction) -> None:
        loop.call_soon_threadsafe(begun.set)
        release.wait(timeout=10)

    dawdling = asyncio.create_task(database.write(dawdle))
    await begun.wait()
    try:
        yield
    finally:
        release.set()
        await dawdling


async def add(database: Database, tenant_id: str) -> None:
    await database.write(
        lambda tx: tx.run(
            "INSERT INTO tenants (id, name, created_ms) VALUES ($1, $2, 0)",
            tenant_id,
            f"name of {tenant_id}",
        )
    )


async def tenant_ids(database: Database) -> list[str]:
    rows = await database.read(lambda tx: tx.all("SELECT id FROM tenants ORDER BY id"))
    return [row[0] for row in rows]


def queue(*work: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(each) for each in work]


async def test_whatever_waits_is_committed_together(sqlite: SqliteDatabase) -> None:
    before = sqlite.commits
    async with busy_writer(sqlite):
        added = queue(*(add(sqlite, f"t-{n:03}") for n in range(3 * GROUP_MAX)))
        await asyncio.sleep(0)
    await asyncio.gather(*added)

    assert sqlite.commits - before == 1 + 3
    assert len(await tenant_ids(sqlite)) == 3 * GROUP_MAX


async def test_a_crowd_shares_commits(sqlite: SqliteDatabase) -> None:
    before = sqlite.commits

    await asyncio.gather(*(add(sqlite, f"t-{n}") for n in range(500)))

    assert len(await tenant_ids(sqlite)) == 500
    assert sqlite.commits - before < 100


async def test_one_that_fails_takes_nobody_along(sqlite: SqliteDatabase) -> None:
    async def half(tx: Transaction) -> None:
        await tx.run(
            "INSERT INTO tenants (id, name, created_ms) VALUES ('half', 'half', 0)"
        )
        raise NotFoundError("and then this")

    async with busy_writer(sqlite):
        waiting = queue(
            add(sqlite, "before"),
            sqlite.write(half),
            add(sqlite, "before"),
            add(sqlite, "after"),
        )
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(outcome).__name__ for outcome in outcomes] == [
        "NoneType",
        "NotFoundError",
        "StoreFailedError",
        "NoneType",
    ]
    assert await tenant_ids(sqlite) == ["after", "before"]


async def test_one_that_fails_alone_leaves_nothing(sqlite: SqliteDatabase) -> None:
    async def half(tx: Transaction) -> None:
        await tx.run(
            "INSERT INTO tenants (id, name, created_ms) VALUES ('half', 'half', 0)"
        )
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await sqlite.write(half)

    await add(sqlite, "after")
    assert await tenant_ids(sqlite) == ["after"]


async def test_a_commit_that_fails_fails_for_all_of_its_group(
    sqlite: SqliteDatabase,
) -> None:
    async def broken_at_commit(tx: Transaction) -> None:
        await tx.run("PRAGMA defer_foreign_keys = ON")
        await tx.run(
            """INSERT INTO accounts (tenant_id, posted, held, spent)
            VALUES ('x', 0, 0, 0)"""
        )

    async with busy_writer(sqlite):
        waiting = queue(
            add(sqlite, "a"), sqlite.write(broken_at_commit), add(sqlite, "b")
        )
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [StoreFailedError] * 3
    assert isinstance(outcomes[0], StoreFailedError)
    assert isinstance(outcomes[0].__cause__, sqlite3.IntegrityError)
    assert (outcomes[0].status, outcomes[0].code) == (503, "storage_unavailable")
    assert outcomes[0].retry_after_s
    assert await tenant_ids(sqlite) == []
    await add(sqlite, "c")
    assert await tenant_ids(sqlite) == ["c"]


async def test_a_group_that_sqlite_gives_up_fails_as_one(
    sqlite: SqliteDatabase,
) -> None:
    giving_up = """INSERT OR ROLLBACK INTO tenants (id, name, created_ms)
        VALUES ('a', 'again', 0)"""

    async with busy_writer(sqlite):
        waiting = queue(
            add(sqlite, "a"),
            sqlite.write(lambda tx: tx.run(giving_up)),
            add(sqlite, "b"),
        )
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    for outcome in outcomes:
        assert isinstance(outcome, StoreFailedError)
        assert isinstance(outcome.__cause__, sqlite3.IntegrityError)
    assert await tenant_ids(sqlite) == []


async def test_a_full_disk_is_survived(sqlite: SqliteDatabase) -> None:
    pages = await sqlite.read(lambda tx: tx.one("PRAGMA page_count"))
    assert pages is not None
    await sqlite.write(lambda tx: tx.all(f"PRAGMA max_page_count = {pages[0]}"))

    async with busy_writer(sqlite):
        waiting = queue(
            add(sqlite, "small"), add(sqlite, "x" * 100_000), add(sqlite, "s")
        )
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert isinstance(outcomes[1], StoreFailedError)
    kept = [
        tenant_id
        for tenant_id, outcome in zip(["small", "", "s"], outcomes, strict=True)
        if outcome is None
    ]
    assert await tenant_ids(sqlite) == sorted(kept)
    await sqlite.write(lambda tx: tx.all("PRAGMA max_page_count = 1000000"))
    await add(sqlite, "x" * 100_000)


async def test_a_read_sees_every_write_that_returned(sqlite: SqliteDatabase) -> None:
    for number in range(100):
        await add(sqlite, f"t-{number}")
        assert len(await tenant_ids(sqlite)) == number + 1


async def test_a_read_sees_one_moment(sqlite: SqliteDatabase) -> None:
    loop = asyncio.get_running_loop()
    looked, go_on = asyncio.Event(), threading.Event()

    async def look_twice(tx: Transaction) -> tuple[object, object]:
        first = await tx.one("SELECT COUNT(*) FROM tenants")
        loop.call_soon_threadsafe(looked.set)
        go_on.wait(timeout=10)
        return first, await tx.one("SELECT COUNT(*) FROM tenants")

    (looking,) = queue(sqlite.read(look_twice))
    await looked.wait()
    await add(sqlite, "meanwhile")
    go_on.set()

    assert await looking == ((0,), (0,))
    assert await tenant_ids(sqlite) == ["meanwhile"]


async def test_a_read_cannot_write(sqlite: SqliteDatabase) -> None:
    with pytest.raises(StoreFailedError):
        await sqlite.read(
            lambda tx: tx.run(
                "INSERT INTO tenants (id, name, created_ms) VALUES ('a','a',0)"
            )
        )

    assert await tenant_ids(sqlite) == []


async def test_a_transaction_awaits_nothing_but_statements(
    sqlite: SqliteDatabase,
) -> None:
    async def wait(tx: Transaction) -> None:
        await tx.run("INSERT INTO tenants (id, name, created_ms) VALUES ('a', 'a', 0)")
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="nothing but its statements"):
        await sqlite.write(wait)

    assert await tenant_ids(sqlite) == []


async def test_a_full_queue_turns_writers_away(tmp_path: Path) -> None:
    database = await SqliteDatabase.open(tmp_path / "small.db", write_queue_max=2)
    await migrate(database, now_ms=NOW_MS)
    async with busy_writer(database):
        waiting = queue(add(database, "a"), add(database, "b"))
        await asyncio.sleep(0)
        with pytest.raises(StoreBusyError) as refused:
            await add(database, "c")
    await asyncio.gather(*waiting)

    assert (refused.value.status, refused.value.code) == (503, "storage_unavailable")
    assert refused.value.retry_after_s == 1
    assert await tenant_ids(database) == ["a", "b"]
    await database.close()


async def test_a_writer_that_is_cancelled_may_still_have_written(
    sqlite: SqliteDatabase,
) -> None:
    async with busy_writer(sqlite):
        (cancelled, other) = queue(add(sqlite, "cancelled"), add(sqlite, "other"))
        await asyncio.sleep(0)
        cancelled.cancel()
    await other

    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await tenant_ids(sqlite) == ["cancelled", "other"]


async def test_closing_finishes_what_waits_and_refuses_what_comes(
    tmp_path: Path,
) -> None:
    database = await Sqlite(tmp_path).connect()
    waiting = queue(*(add(database, f"t-{n:03}") for n in range(GROUP_MAX + 9)))
    await asyncio.sleep(0)

    await database.close()
    await database.close()

    await asyncio.gather(*waiting)
    for use in (database.read, database.write):
        with pytest.raises(StoreFailedError, match="closed"):
            await use(lambda tx: tx.all("SELECT 1"))
    reopened = await Sqlite(tmp_path).connect()
    assert len(await tenant_ids(reopened)) == GROUP_MAX + 9
    await reopened.close()


async def test_a_lock_kept_by_another_process_is_answered_with_busy(
    sqlite: SqliteDatabase, tmp_path: Path
) -> None:
    await sqlite.write(lambda tx: tx.all("PRAGMA busy_timeout = 1"))
    other = sqlite3.connect(Sqlite(tmp_path).path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreBusyError):
        await add(sqlite, "a")

    other.execute("ROLLBACK")
    other.close()
    await add(sqlite, "b")
    assert await tenant_ids(sqlite) == ["b"]


async def test_what_is_no_database_is_not_opened(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and long enough to be looked at" * 100)

    with pytest.raises(StoreFailedError, match=r"notes\.txt"):
        await SqliteDatabase.open(text)
    with pytest.raises(StoreFailedError):
        await SqliteDatabase.open(tmp_path / "no" / "such" / "directory.db")


async def test_a_crash_of_the_power_kind_is_prepared_for(
    sqlite: SqliteDatabase,
) -> None:
    async def pragmas(tx: Transaction) -> list[object]:
        rows = [
            await tx.one(f"PRAGMA {name}")
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
        return [row[0] for row in rows if row is not None]

    full = 2
    assert await sqlite.write(pragmas) == ["wal", full, 1, 5_000]


async def test_migrations_are_applied_once(sqlite: SqliteDatabase) -> None:
    assert await migrate(sqlite, now_ms=NOW_MS + 5) == 0

    rows = await sqlite.read(lambda tx: tx.all("SELECT * FROM schema_migrations"))
    assert [tuple(row) for row in rows] == [
        (number, NOW_MS) for number in range(1, len(migrations.MIGRATIONS) + 1)
    ]


async def test_rotations_of_before_still_count_after_an_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that keeps every rotation takes over the one that was known."""
    step = next(
        number
        for number, each in enumerate(migrations.MIGRATIONS)
        if "webhook_rotations" in each.statements[0]
    )
    with monkeypatch.context() as before:
        before.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:step])
        database = await SqliteDatabase.open(tmp_path / "old.sqlite")
        await migrate(database, now_ms=NOW_MS)
    accounts = SqlAccounts(database)
    await accounts.add_tenant(Tenant("t-1", "one"), now_ms=NOW_MS)
    for name in ("key-1", "key-2"):
        as_it_was = f"""INSERT INTO keys
            (id, tenant_id, digest, display, delivery, created_ms)
        VALUES ('{name}', 't-1', CAST('{name}' AS BLOB), 'iwk', 'auto', 0)"""
        await database.write(partial(_run, as_it_was))
    await database.write(
        lambda tx: tx.run(
            """UPDATE keys SET webhook_version = 3, webhook_rotated_ms = $1
            WHERE id = 'key-1'""",
            NOW_MS,
        )
    )
    await migrate(database, now_ms=NOW_MS)
    try:
        rotated = await accounts.signing_key("key-1")
        assert rotated == SigningKey("key-1", "t-1", 3, (NOW_MS,))
        assert await accounts.signing_key("key-2") == SigningKey("key-2", "t-1", 1)
    finally:
        await database.close()


async def _run(sql: str, tx: Transaction) -> int:
    return await tx.run(sql)


async def test_a_database_of_a_newer_imageway_is_left_alone(
    sqlite: SqliteDatabase,
) -> None:
    newer = len(migrations.MIGRATIONS) + 1
    await sqlite.write(
        lambda tx: tx.run("INSERT INTO schema_migrations VALUES ($1, 0)", newer)
    )

    with pytest.raises(SchemaTooNewError, match="upgrade imageway"):
        await migrate(sqlite, now_ms=NOW_MS)


async def child(path: Path, *args: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.contract.stores",
        str(path),
        *args,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize("finished", [1, 50, 200])
async def test_a_killed_process_leaves_a_whole_ledger(
    tmp_path: Path, finished: int
) -> None:
    async with open_stores("sqlite", tmp_path) as stores:
        await stores.fund(10**9)
    process = await child(Sqlite(tmp_path).path, "child")
    assert process.stdout is not None
    said: set[str] = set()
    async for line in process.stdout:
        said.add(line.decode().strip())
        if sum(each.startswith("finished") for each in said) == finished:
            process.kill()
            break
    said |= {line.decode().strip() async for line in process.stdout}
    await process.wait()

    async with open_stores("sqlite", tmp_path) as stores:
        assert await stores.broken() == set()
        for each in said:
            if not each.endswith("."):
                continue  # the line that it was killed in
            verb, _, task_id = each.removesuffix(".").partition(" ")
            task = await stores.tasks.get(task_id)
            assert task is not None
            assert verb != "finished" or task.state is TaskState.COMPLETED
        left = await stores.tasks.unfinished(1_000)
        assert len(left) <= 8 + 1
        for task in left:
            await stores.tasks.finish(a_void(task.id))
        completed = await stores.rows(
            "SELECT COUNT(*) FROM tasks WHERE state='completed'"
        )
        assert (await stores.balance()).spent == 60 * completed[0][0]
        assert (await stores.balance()).held == 0
        assert await stores.broken() == set()


async def test_two_processes_write_to_one_ledger(tmp_path: Path) -> None:
    async with open_stores("sqlite", tmp_path) as stores:
        await stores.fund(10**6)
        process = await child(Sqlite(tmp_path).path, "child", "300")
        assert process.stdout is not None
        await process.stdout.readline()  # it is at work

        mine = 0
        said = asyncio.create_task(process.stdout.read())
        while not said.done():
            await stores.tasks.open(a_task(f"mine-{mine}"))
            await stores.tasks.finish(an_end(f"mine-{mine}"))
            mine += 1
        lines = (await said).decode().splitlines()
        await process.wait()

        assert sum(line.startswith("finished") for line in lines) == 300
        spent = (300 + mine) * 60
        assert await stores.balance() == Balance(10**6 - spent, held=0, spent=spent)
        order = [
            row[0] for row in await stores.rows("SELECT id FROM tasks ORDER BY rowid")
        ]
        first, last = order.index("child-0"), order.index("child-299")
        assert any(name.startswith("mine") for name in order[first:last])
        assert await stores.broken() == set()
