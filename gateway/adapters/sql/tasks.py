"""Tasks, holds, attempts and settlements in SQL: each call is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from gateway.adapters.sql.database import Change, Database, Row, Transaction
from gateway.adapters.sql.deliveries import add_delivery
from gateway.adapters.sql.key_use import check_counted, counting, settling
from gateway.adapters.sql.ledger import CHARGE, draw_lots, entry_lines
from gateway.core import limits
from gateway.core.catalogue import TenantPrice
from gateway.core.errors import (
    ConflictError,
    GatewayError,
    NotFoundError,
    insufficient_credits,
    tenant_suspended,
)
from gateway.core.idempotency import KEY_KEPT_MS, conflict
from gateway.core.ledger import Balance, Settled, settle, settlement_entries
from gateway.core.limits import RiskBook
from gateway.core.tasks import (
    HOLD_KEPT_MS,
    QUEUE_MAX_TASKS,
    QUEUE_MAX_TASKS_PER_TENANT,
    STOPPED,
    AttemptState,
    DeliveryMode,
    FencedError,
    TaskState,
    queue_full,
)
from gateway.ports import (
    AttemptEnd,
    AttemptRecord,
    Earlier,
    NewAttempt,
    NewTask,
    Rebuy,
    StoredResult,
    TaskEnd,
    TaskRecord,
)
from providers.kit.contract import Billed, FailureKind, Usage


@dataclass(frozen=True, slots=True)
class SqlTaskStore:
    """The ``TaskStore`` port over any SQL database."""

    database: Database

    async def open(self, task: NewTask) -> str | None:
        """See ``TaskStore``.

        Raises:
            InsufficientCreditsError: the tenant has less available than the hold, or
                a budget of the key has less left.
            RateLimitedError: as many tasks of the key are in flight as may.
            NotFoundError: there is no such tenant.
            ConflictError: there is a task of that id.
        """
        # Who waits for a key must not keep a lane waiting.
        lane = task.tenant_id if task.idempotency_key is None else None
        today = self.database.dialect.today
        return await self.database.write(lambda tx: _open(tx, task, today), lane)

    async def earlier(self, wanted: Earlier) -> str | None:
        """See ``TaskStore``."""
        return await self.database.read(lambda tx: _earlier(tx, wanted))

    async def forget_keys(self, before_ms: int) -> int:
        """See ``TaskStore``."""
        return await self.database.write(
            lambda tx: tx.run(
                "DELETE FROM idempotency WHERE created_ms < $1", before_ms
            )
        )

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        """See ``TaskStore``.

        Raises:
            ConflictError: the task is over, or the attempt was begun before: then
                nothing may be sent.
        """
        await self.database.write(lambda tx: _begin_attempt(tx, attempt, route_json))

    async def accept_attempt(
        self,
        task_id: str,
        seq: int,
        job_id: str,
        order_json: str | None = None,
        *,
        fence: int = 0,
    ) -> None:
        """See ``TaskStore``; kept even if the attempt has been given up meanwhile.

        Raises:
            NotFoundError: there is no such attempt.
            FencedError: somebody else has claimed the task.
        """

        async def accept(tx: Transaction) -> None:
            await check_fence(tx, task_id, fence)
            await _accept_attempt(tx, task_id, seq, job_id)
            if order_json is not None:
                await _keep_order(tx, task_id, order_json)

        await self.database.write(accept)

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See ``TaskStore``; an attempt that has ended stays as it ended."""
        await self.database.write(lambda tx: _end_attempt(tx, end))

    async def finish(self, end: TaskEnd) -> Settled:
        """See ``TaskStore``. A failed task costs its tenant nothing.

        Raises:
            NotFoundError: there is no such task.
        """
        assert end.state.final, end
        assert end.due_nanocredits == 0 or end.state is not TaskState.FAILED, end
        return await self.database.write(
            lambda tx: finish_task(tx, end), end.tenant_id or None
        )

    async def get(self, task_id: str) -> TaskRecord | None:
        """See ``TaskStore``."""
        return await self.database.read(lambda tx: read_task(tx, task_id))

    async def unfinished(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``."""
        return await self.database.read(lambda tx: _read_unfinished(tx, limit))

    async def take_up_overdue(self, before_ms: int) -> int:
        """See ``TaskStore``."""
        return await self.database.write(
            lambda tx: tx.run(
                """UPDATE tasks SET lease_until_ms = 0
                WHERE finished_ms IS NULL AND mode = 'sync' AND state = 'processing'
                    AND order_json IS NOT NULL AND lease_until_ms IS NULL
                    AND deadline_ms < $1""",
                before_ms,
            )
        )

    async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``."""
        return await self.database.read(lambda tx: _read_orphaned(tx, limit))

    async def rebuy(self, rebuy: Rebuy, since_ms: int) -> bool:
        """See ``TaskStore``."""
        return await self.database.write(lambda tx: _rebuy(tx, rebuy, since_ms))


async def _open(tx: Transaction, task: NewTask, today: str) -> str | None:
    if task.idempotency_key is not None:
        earlier = await _claimed_key(tx, task, task.idempotency_key)
        if earlier is not None:
            return earlier
    # Condition and change are one statement, so no two can see the same credits.
    waits = int(task.order_json is not None)
    held = await tx.one(
        """UPDATE accounts SET held = held + $2, queued = queued + $3
        WHERE tenant_id = $1 AND posted - held >= $2 AND queued + $3 <= $4
            AND suspended_ms IS NULL
        RETURNING keys_version""",
        task.tenant_id,
        task.hold_nanocredits,
        waits,
        QUEUE_MAX_TASKS_PER_TENANT,
    )
    if held is None:
        raise await _refusal(tx, task)
    if waits:
        await _check_queue(tx)
    counted = None
    if task.keys_version != held[0]:
        # It is counted, or another key of the tenant began to be since it was read.
        counted = await check_counted(tx, today, task.key_id, task.hold_nanocredits)
    opened, *_ = await tx.changes(
        (
            """INSERT INTO tasks (id, tenant_id, key_id, variant, operation, mode,
                state, request_json, created_ms, deadline_ms, fingerprint,
                callback_url, origin, order_json, class, owner)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15,
                $16)
            ON CONFLICT DO NOTHING""",
            task.id,
            task.tenant_id,
            task.key_id,
            task.variant,
            task.operation,
            task.mode.value,
            TaskState.PENDING.value,
            task.request_json,
            task.created_ms,
            task.deadline_ms,
            task.fingerprint or None,
            task.callback_url,
            task.origin or None,
            task.order_json,
            task.task_class or None,
            task.owner,
        ),
        (
            _holding(today),
            task.id,
            task.tenant_id,
            task.hold_nanocredits,
            task.created_ms,
            task.deadline_ms + HOLD_KEPT_MS,
            task.key_id,
            counted[1] if counted is not None else None,
        ),
        *counting(counted, task.hold_nanocredits),
    )
    if not opened:
        raise ConflictError(f"there is a task {task.id!r} already")
    return None


@lru_cache(maxsize=2)
def _holding(today: str) -> str:
    return f"""INSERT INTO holds
        (task_id, tenant_id, nanocredits, created_ms, expires_ms, key_id, day)
    VALUES ($1, $2, $3, $4, $5, $6, COALESCE(CAST($7 AS TEXT), {today}))
    ON CONFLICT DO NOTHING"""  # noqa: S608 - an expression of the engine's


async def _claimed_key(tx: Transaction, task: NewTask, client_key: str) -> str | None:
    # Whoever inserts the row first has the key; the others find it.
    claimed = await tx.run(
        """INSERT INTO idempotency
            (tenant_id, client_key, fingerprint, task_id, created_ms)
        VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING""",
        task.tenant_id,
        client_key,
        task.fingerprint,
        task.id,
        task.created_ms,
    )
    if claimed:
        return None
    taken_over = await tx.run(
        """UPDATE idempotency SET fingerprint = $3, task_id = $4, created_ms = $5
        WHERE tenant_id = $1 AND client_key = $2 AND created_ms < $6""",
        task.tenant_id,
        client_key,
        task.fingerprint,
        task.id,
        task.created_ms,
        task.created_ms - KEY_KEPT_MS,
    )
    if taken_over:
        return None
    return await _by_key(tx, task.tenant_id, client_key, task.fingerprint, since_ms=0)


async def _by_key(
    tx: Transaction, tenant_id: str, client_key: str, fingerprint: str, *, since_ms: int
) -> str | None:
    row = await tx.one(
        """SELECT task_id, fingerprint FROM idempotency
        WHERE tenant_id = $1 AND client_key = $2 AND created_ms >= $3""",
        tenant_id,
        client_key,
        since_ms,
    )
    if row is None:
        return None
    if row[1] != fingerprint:
        raise conflict()
    return str(row[0])


async def _earlier(tx: Transaction, wanted: Earlier) -> str | None:
    if wanted.idempotency_key is not None:
        return await _by_key(
            tx,
            wanted.tenant_id,
            wanted.idempotency_key,
            wanted.fingerprint,
            since_ms=wanted.since_ms,
        )
    row = await tx.one(
        """SELECT id FROM tasks
        WHERE key_id = $1 AND fingerprint = $2
            AND (finished_ms IS NULL OR finished_ms >= $3)
        ORDER BY created_ms DESC, id DESC LIMIT 1""",
        wanted.key_id,
        wanted.fingerprint,
        wanted.since_ms,
    )
    return str(row[0]) if row else None


async def _check_queue(tx: Transaction) -> None:
    row = await tx.one("SELECT SUM(queued) FROM accounts WHERE queued > 0")
    if row is not None and row[0] > QUEUE_MAX_TASKS:
        raise queue_full(mine=False)


async def _refusal(tx: Transaction, task: NewTask) -> GatewayError:
    row = await tx.one(
        "SELECT posted - held, suspended_ms FROM accounts WHERE tenant_id = $1",
        task.tenant_id,
    )
    if row is None:
        return NotFoundError(f"there is no tenant {task.tenant_id!r}")
    if row[1] is not None:
        return tenant_suspended()
    if row[0] >= task.hold_nanocredits:
        return queue_full(mine=True)
    return insufficient_credits(task.hold_nanocredits, row[0])


async def _begin_attempt(
    tx: Transaction, attempt: NewAttempt, route_json: str | None
) -> None:
    running = await tx.run(
        """UPDATE tasks SET state = $2, route_json = COALESCE($3, route_json),
            started_ms = COALESCE(started_ms, $4)
        WHERE id = $1 AND finished_ms IS NULL AND fence = $5""",
        attempt.task_id,
        TaskState.PROCESSING.value,
        route_json,
        attempt.started_ms,
        attempt.fence,
    )
    if not running:
        await check_fence(tx, attempt.task_id, attempt.fence)
        raise ConflictError(f"task {attempt.task_id!r} is over")
    begun = await tx.run(
        """INSERT INTO attempts
            (task_id, seq, offer_id, upstream, state, estimate_nanousd, started_ms, n)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING""",
        attempt.task_id,
        attempt.seq,
        attempt.offer_id,
        attempt.upstream,
        AttemptState.SENDING.value,
        attempt.estimate_nanousd,
        attempt.started_ms,
        attempt.n,
    )
    if not begun:
        raise ConflictError(
            f"attempt {attempt.seq} of task {attempt.task_id!r} was begun before"
        )


async def _accept_attempt(tx: Transaction, task_id: str, seq: int, job_id: str) -> None:
    accepted = await tx.run(
        """UPDATE attempts SET job_id = $3,
            state = CASE WHEN finished_ms IS NULL THEN $4 ELSE state END
        WHERE task_id = $1 AND seq = $2""",
        task_id,
        seq,
        job_id,
        AttemptState.ACCEPTED.value,
    )
    if not accepted:
        raise NotFoundError(f"there is no attempt {seq} of task {task_id!r}")


async def _keep_order(tx: Transaction, task_id: str, order_json: str) -> None:
    await tx.run(
        """UPDATE tasks SET order_json = COALESCE(order_json, $2)
        WHERE id = $1 AND finished_ms IS NULL""",
        task_id,
        order_json,
    )


async def _end_attempt(tx: Transaction, end: AttemptEnd) -> None:
    row = await tx.one(
        """UPDATE attempts SET state = $3, finished_ms = $4, billed = $5,
            cost_nanousd = $6, kind = $7, upstream_status = $8, upstream_code = $9,
            detail = $10, alive = $11
        WHERE task_id = $1 AND seq = $2 AND finished_ms IS NULL
            AND (SELECT fence FROM tasks WHERE tasks.id = attempts.task_id) = $12
        RETURNING upstream,
            (SELECT variant FROM tasks WHERE tasks.id = attempts.task_id), job_id""",
        end.task_id,
        end.seq,
        end.state.value,
        end.finished_ms,
        end.billed.value,
        end.cost_nanousd,
        end.kind,
        end.upstream_status,
        end.upstream_code,
        end.detail,
        int(end.alive),
        end.fence,
    )
    if row is None:
        await check_fence(tx, end.task_id, end.fence)
    paid = end.won or end.cost_nanousd > 0 or end.billed is not Billed.NO
    if row is not None and paid:
        await _book_cost(tx, end, *row)


async def _rebuy(tx: Transaction, rebuy: Rebuy, since_ms: int) -> bool:
    # Asked and noted at once: of a thousand that fail together, each sees those before.
    noted = await tx.one(
        "SELECT 1 FROM rebuys WHERE task_id = $1 AND seq = $2", rebuy.task_id, rebuy.seq
    )
    if noted is not None:
        return True
    # One at a time: who comes second must see what the first one has noted.
    await tx.run("UPDATE turns SET taken = $1 WHERE name = 'rebuys'", rebuy.created_ms)
    row = await tx.one(
        """SELECT COUNT(*), CAST(COALESCE(SUM(risked_nanousd), 0) AS BIGINT),
            (SELECT CAST(COALESCE(SUM(nanousd), 0) AS BIGINT)
                FROM cost_book WHERE created_ms >= $1)
        FROM rebuys WHERE created_ms >= $1""",
        since_ms,
    )
    if not limits.may_rebuy(RiskBook(*row or (0, 0, 0)), rebuy.risked_nanousd):
        return False
    await tx.run(
        """INSERT INTO rebuys (task_id, seq, risked_nanousd, created_ms)
        VALUES ($1, $2, $3, $4)""",
        rebuy.task_id,
        rebuy.seq,
        rebuy.risked_nanousd,
        rebuy.created_ms,
    )
    return True


async def _book_cost(
    tx: Transaction, end: AttemptEnd, upstream: str, variant: str, job_id: str | None
) -> None:
    await tx.run(
        """INSERT INTO cost_book (task_id, seq, upstream, variant, kind, source,
            nanousd, unknown_outcome, created_ms, job_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
        end.task_id,
        end.seq,
        upstream,
        variant,
        "cost" if end.won else "waste",
        end.cost_source,
        end.cost_nanousd,
        int(end.billed is Billed.MAYBE and end.kind == FailureKind.TIMEOUT.value),
        end.finished_ms,
        job_id,
    )


async def finish_task(tx: Transaction, end: TaskEnd) -> Settled:
    """Settle and close a task, once; a part of a larger transaction.

    Raises:
        NotFoundError: there is no such task.
        FencedError: somebody else has claimed it.
    """
    # The account is locked before the settlement is looked at: whoever settles the
    # same task meanwhile waits here, and then finds it settled.
    account = await tx.one(
        """UPDATE accounts SET held = held
        WHERE tenant_id = (SELECT tenant_id FROM holds WHERE task_id = $1)
        RETURNING tenant_id, lots, posted, held, spent""",
        end.task_id,
    )
    task = await tx.one(
        """SELECT h.nanocredits, t.mode, t.state, t.callback_url, s.charged, s.absorbed,
            k.meter_id, h.day, t.key_id, t.variant
        FROM tasks t JOIN holds h ON h.task_id = t.id
        LEFT JOIN settlements s ON s.task_id = t.id
        LEFT JOIN keys k ON k.id = h.key_id AND k.counted = 1 WHERE t.id = $1""",
        end.task_id,
    )
    if task is None or account is None:
        raise NotFoundError(f"there is no task {end.task_id!r}")
    held, mode, state, callback_url, charged, absorbed, meter, day, *sold = task
    if charged is not None:
        return Settled(charged, absorbed, again=True)
    after, settled = settle(Balance(*account[2:]), held, end.due_nanocredits)
    is_async = int(mode == DeliveryMode.ASYNC.value)
    waiting = int(state == TaskState.PENDING.value)
    _, _, closed, *_ = await tx.changes(
        _settling(end, settled, day, account[0], *sold),
        (
            """UPDATE accounts SET posted = $2, held = $3, spent = $4,
                queued = queued - $5, running = running - $6
            WHERE tenant_id = $1""",
            account[0],
            after.posted,
            after.held,
            after.spent,
            is_async * waiting,
            is_async * (1 - waiting),
        ),
        _closing(end),
        *entry_lines(
            settlement_entries(account[0], settled),
            kind=CHARGE,
            reference=end.task_id,
            now_ms=end.finished_ms,
        ),
        *(_keeping(end.task_id, result) for result in end.results),
        *settling(meter, day, settled.charged - held),
    )
    if not closed:
        raise FencedError(end.task_id)  # and all of the settlement is undone
    if account[1]:
        charge = f"{CHARGE}:{end.task_id}"
        await draw_lots(tx, account[0], charge, settled.charged, end.finished_ms)
    for attempt in end.attempts:
        await _end_attempt(tx, attempt)
    await _end_forgotten(tx, end)
    if end.forget_key:
        await tx.run("DELETE FROM idempotency WHERE task_id = $1", end.task_id)
        await tx.run("UPDATE tasks SET fingerprint = NULL WHERE id = $1", end.task_id)
    if callback_url is not None:
        await add_delivery(tx, end)
    return settled


async def check_fence(tx: Transaction, task_id: str, fence: int) -> None:
    """See that nobody else has claimed the task since.

    Raises:
        FencedError: somebody has.
    """
    row = await tx.one("SELECT fence FROM tasks WHERE id = $1", task_id)
    if row is not None and row[0] != fence:
        raise FencedError(task_id)


def _settling(
    end: TaskEnd,
    settled: Settled,
    day: str | None,
    tenant_id: str,
    key_id: str,
    variant: str,
) -> Change:
    return (
        """INSERT INTO settlements (task_id, due, charged, absorbed, usage_source,
            created_ms, tenant_id, key_id, variant, images, text_input, text_cached,
            image_input, image_cached, image_output, text_input_price,
            text_cached_price, image_input_price, image_cached_price,
            image_output_price, multiplier, day)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,
            $17, $18, $19, $20, $21, $22)""",
        end.task_id,
        end.due_nanocredits,
        settled.charged,
        settled.absorbed,
        end.usage_source,
        end.finished_ms,
        tenant_id,
        key_id,
        variant,
        len(end.results),
        *_tokens(end.usage),
        *_price(end.price),
        day,
    )


def _price(
    price: TenantPrice | None,
) -> tuple[int | None, int | None, int | None, int | None, int | None, int | None]:
    if price is None:
        return (None, None, None, None, None, None)
    card = price.card
    return (
        card.text_input,
        card.text_cached,
        card.image_input,
        card.image_cached,
        card.image_output,
        price.multiplier_millionths,
    )


def _tokens(
    usage: Usage | None,
) -> tuple[int | None, int | None, int | None, int | None, int | None]:
    if usage is None:
        return (None, None, None, None, None)
    return (
        usage.text_input,
        usage.text_cached,
        usage.image_input,
        usage.image_cached,
        usage.image_output,
    )


def _closing(end: TaskEnd) -> Change:
    return (
        """UPDATE tasks SET state = $2, finished_ms = $3, answer_json = $4,
            error_json = $5, text_input = $6, text_cached = $7, image_input = $8,
            image_cached = $9, image_output = $10,
            route_json = COALESCE($11, route_json), order_json = NULL,
            lease_until_ms = NULL
        WHERE id = $1 AND finished_ms IS NULL AND fence = $12""",
        end.task_id,
        end.state.value,
        end.finished_ms,
        end.answer_json,
        end.error_json,
        *_tokens(end.usage),
        end.route_json,
        end.fence,
    )


async def _end_forgotten(tx: Transaction, end: TaskEnd) -> None:
    # Whoever ran them could not say how they ended: they may have been bought. What a
    # tenant cancels is no unknown outcome, of which only so many are bought again.
    cancelled = end.state is TaskState.CANCELLED
    left = await tx.all(
        """SELECT seq, estimate_nanousd FROM attempts
        WHERE task_id = $1 AND finished_ms IS NULL""",
        end.task_id,
    )
    for seq, estimate_nanousd in left:
        await _end_attempt(
            tx,
            AttemptEnd(
                task_id=end.task_id,
                seq=seq,
                state=AttemptState.FAILED,
                finished_ms=end.finished_ms,
                won=False,
                billed=Billed.MAYBE,
                cost_nanousd=estimate_nanousd,
                cost_source="estimate",
                kind=STOPPED if cancelled else FailureKind.TIMEOUT.value,
                detail="nobody was left to say how this call ended",
                fence=end.fence,
            ),
        )


def _keeping(task_id: str, result: StoredResult) -> Change:
    return (
        """INSERT INTO results (task_id, idx, blob, media_type, size_bytes, width_px,
            height_px, inline, expires_ms, revised_prompt)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)""",
        task_id,
        result.index,
        result.blob,
        result.media_type,
        result.size_bytes,
        result.width_px,
        result.height_px,
        int(result.inline),
        result.expires_ms,
        result.revised_prompt,
    )


async def _read_unfinished(tx: Transaction, limit: int) -> list[TaskRecord]:
    rows = await tx.all(
        """SELECT id FROM tasks
        WHERE finished_ms IS NULL AND mode = 'sync' AND order_json IS NULL
        ORDER BY created_ms, id LIMIT $1""",
        limit,
    )
    return await _read_all(tx, rows)


async def _read_orphaned(tx: Transaction, limit: int) -> list[TaskRecord]:
    rows = await tx.all(
        """SELECT id FROM tasks
        WHERE finished_ms IS NULL AND mode = 'sync' AND order_json IS NULL
            AND (owner IS NULL OR owner NOT IN (SELECT id FROM processes))
        ORDER BY created_ms, id LIMIT $1""",
        limit,
    )
    return await _read_all(tx, rows)


async def _read_all(tx: Transaction, rows: Sequence[Row]) -> list[TaskRecord]:
    found = [await read_task(tx, row[0]) for row in rows]
    return [task for task in found if task is not None]


async def read_task(tx: Transaction, task_id: str) -> TaskRecord | None:
    """Read a task with its attempts and results; a part of a larger transaction."""
    row = await tx.one(
        """SELECT t.id, t.tenant_id, t.key_id, t.variant, t.operation, t.mode, t.state,
            t.request_json, t.route_json, t.answer_json, t.error_json,
            t.text_input, t.text_cached, t.image_input, t.image_cached, t.image_output,
            s.usage_source, h.nanocredits, s.charged, s.absorbed,
            t.created_ms, t.deadline_ms, t.finished_ms,
            t.started_ms, t.callback_url, t.origin, t.class
        FROM tasks t JOIN holds h ON h.task_id = t.id
        LEFT JOIN settlements s ON s.task_id = t.id
        WHERE t.id = $1""",
        task_id,
    )
    if row is None:
        return None
    attempts = await tx.all(
        """SELECT seq, offer_id, upstream, state, estimate_nanousd, started_ms,
            finished_ms, job_id, kind, upstream_status, upstream_code, detail, billed,
            cost_nanousd, n, alive
        FROM attempts WHERE task_id = $1 ORDER BY seq""",
        task_id,
    )
    results = await tx.all(
        """SELECT idx, blob, media_type, size_bytes, width_px, height_px, inline,
            expires_ms, revised_prompt
        FROM results WHERE task_id = $1 ORDER BY idx""",
        task_id,
    )
    return _task(row, attempts, results)


def _task(row: Row, attempts: Sequence[Row], results: Sequence[Row]) -> TaskRecord:
    (task_id, tenant_id, key_id, variant, operation, mode, state) = row[:7]
    (request_json, route_json, answer_json, error_json) = row[7:11]
    (usage_source, hold_nanocredits, charged, absorbed) = row[16:20]
    (created_ms, deadline_ms, finished_ms) = row[20:23]
    (started_ms, callback_url, origin, task_class) = row[23:]
    return TaskRecord(
        id=task_id,
        tenant_id=tenant_id,
        key_id=key_id,
        variant=variant,
        operation=operation,
        mode=DeliveryMode(mode),
        state=TaskState(state),
        request_json=request_json,
        route_json=route_json,
        answer_json=answer_json,
        error_json=error_json,
        usage=_usage(row[11:16]),
        usage_source=usage_source,
        hold_nanocredits=hold_nanocredits,
        charged_nanocredits=charged,
        absorbed_nanocredits=absorbed,
        created_ms=created_ms,
        deadline_ms=deadline_ms,
        finished_ms=finished_ms,
        attempts=tuple(_attempt(each) for each in attempts),
        results=tuple(_result(each) for each in results),
        started_ms=started_ms,
        callback_url=callback_url,
        origin=origin or "",
        task_class=task_class or "",
    )


def _usage(row: Row) -> Usage | None:
    return None if row[0] is None else Usage(*row)


def _attempt(row: Row) -> AttemptRecord:
    seq, offer_id, upstream, state, *rest, alive = row
    known = AttemptRecord(seq, offer_id, upstream, AttemptState(state), *rest)
    return replace(known, alive=bool(alive))


def _result(row: Row) -> StoredResult:
    index, blob, media_type, size_bytes, width_px, height_px, inline, *rest = row
    return StoredResult(
        index, blob, media_type, size_bytes, width_px, height_px, bool(inline), *rest
    )
