"""Async tasks that wait for a worker, in SQL: the tasks table is the queue."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.adapters.sql.tasks import finish_task, read_task
from gateway.core.tasks import TaskState, cancelled_json
from gateway.ports import Cancelling, Claimed, Lease, TaskEnd, TaskFilter, TaskLine

USUAL_OF_LAST_TASKS = 20
TENANTS_ASKED_MAX = 100
"""For a task that can be begun, while some variants have no place left."""


@dataclass(frozen=True, slots=True)
class SqlQueue:
    """The ``Queue`` port over any SQL database."""

    database: Database

    async def claim(
        self,
        *,
        now_ms: int,
        lease_ms: int,
        held: Collection[str] = (),
        full: Collection[str] = (),
    ) -> Claimed | None:
        """See ``Queue``."""

        async def claim(tx: Transaction) -> Claimed | None:
            task_id, expired = await _left_behind(tx, now_ms, held)
            task_id = task_id or await _next_in_turn(tx, now_ms, full)
            if task_id is None:
                return None
            claimed = await _claim(tx, task_id, now_ms, lease_ms)
            return replace(claimed, expired=expired) if claimed else None

        return await self.database.write(claim)

    async def renew(
        self, task_id: str, fence: int, *, now_ms: int, lease_ms: int
    ) -> Lease:
        """See ``Queue``."""
        row = await self.database.write(
            lambda tx: tx.one(
                """UPDATE tasks SET lease_until_ms = $3
                WHERE id = $1 AND fence = $2 AND state = 'processing'
                RETURNING cancel_ms""",
                task_id,
                fence,
                now_ms + lease_ms,
            )
        )
        return Lease(held=row is not None, cancelled=bool(row and row[0]))

    async def reclaim(self) -> int:
        """See ``Queue``."""
        return await self.database.write(
            lambda tx: tx.run(
                """UPDATE tasks SET lease_until_ms = 0
                WHERE state = 'processing' AND order_json IS NOT NULL"""
            )
        )

    async def release(self, task_id: str, fence: int) -> None:
        """See ``Queue``."""
        await self.database.write(
            lambda tx: tx.run(
                """UPDATE tasks SET lease_until_ms = 0, takeovers = takeovers - 1
                WHERE id = $1 AND fence = $2 AND state = 'processing'""",
                task_id,
                fence,
            )
        )

    async def cancel(
        self, task_id: str, tenant_id: str, *, now_ms: int
    ) -> Cancelling | None:
        """See ``Queue``."""
        return await self.database.write(
            lambda tx: _cancel(tx, task_id, tenant_id, now_ms)
        )

    async def tasks(
        self, tenant_id: str, wanted: TaskFilter, *, offset: int, limit: int
    ) -> tuple[int, Sequence[TaskLine]]:
        """See ``Queue``."""
        return await self.database.read(
            lambda tx: _tasks(tx, tenant_id, wanted, offset, limit)
        )

    async def usual_ms(self, task_class: str) -> int | None:
        """See ``Queue``."""
        row = await self.database.read(
            lambda tx: tx.one(
                """SELECT AVG(took) FROM (
                    SELECT finished_ms - started_ms AS took FROM tasks
                    WHERE class = $1 AND state = 'completed'
                    ORDER BY finished_ms DESC LIMIT $2) AS last""",
                task_class,
                USUAL_OF_LAST_TASKS,
            )
        )
        # A clock that was set back makes tasks that ended before they started.
        return max(0, int(row[0])) if row and row[0] is not None else None

    async def forget_tasks(self, before_ms: int, limit: int) -> Sequence[str]:
        """See ``Queue``."""
        return await self.database.write(lambda tx: _forget(tx, before_ms, limit))


async def _claim(
    tx: Transaction, task_id: str, now_ms: int, lease_ms: int
) -> Claimed | None:
    row = await tx.one(
        """UPDATE tasks SET fence = fence + 1, lease_until_ms = $2,
            takeovers = takeovers + CASE WHEN state = 'processing' THEN 1 ELSE 0 END,
            state = 'processing', started_ms = COALESCE(started_ms, $3)
        WHERE id = $1 AND (state = 'pending'
            OR (state = 'processing' AND lease_until_ms < $3))
        RETURNING fence, takeovers, order_json, cancel_ms""",
        task_id,
        now_ms + lease_ms,
        now_ms,
    )
    if row is None:
        return None  # somebody else took it over at the same moment
    record = await read_task(tx, task_id)
    assert record is not None, task_id
    fence, takeovers, order_json, cancel_ms = row
    cancelled = cancel_ms is not None
    return Claimed(record, order_json or "{}", fence, takeovers, cancelled)


async def _left_behind(
    tx: Transaction, now_ms: int, held: Collection[str]
) -> tuple[str | None, bool]:
    # Whoever lets go of a task sets its lease to 0; any other has expired.
    rows = await tx.all(
        """SELECT id, lease_until_ms FROM tasks
        WHERE state = 'processing' AND lease_until_ms < $1
        ORDER BY lease_until_ms LIMIT $2""",
        now_ms,
        len(held) + 1,
    )
    found = ((str(row[0]), row[1] > 0) for row in rows if row[0] not in held)
    return next(found, (None, False))


async def _next_in_turn(
    tx: Transaction, now_ms: int, full: Collection[str]
) -> str | None:
    # The tenant with the fewest tasks running; of equals, the one served longest ago.
    tenants = await tx.all(
        """SELECT tenant_id FROM accounts WHERE queued > 0
        ORDER BY running, claimed_ms, tenant_id LIMIT $1""",
        TENANTS_ASKED_MAX if full else 1,
    )
    for (tenant_id,) in tenants:
        # Whoever claims for the same tenant, or cancels, waits here for the other.
        locked = await tx.run(
            "UPDATE accounts SET queued = queued WHERE tenant_id = $1 AND queued > 0",
            tenant_id,
        )
        task_id = await _first_of(tx, tenant_id, full) if locked else None
        if task_id is None:
            continue
        await tx.run(
            """UPDATE accounts SET queued = queued - 1, running = running + 1,
                claimed_ms = $2
            WHERE tenant_id = $1""",
            tenant_id,
            now_ms,
        )
        return task_id
    return None


async def _first_of(
    tx: Transaction, tenant_id: str, full: Collection[str]
) -> str | None:
    names = ", ".join(f"${place}" for place in range(2, 2 + len(full)))
    unless = f"AND variant NOT IN ({names})" if full else ""
    row = await tx.one(
        f"""SELECT id FROM tasks
        WHERE tenant_id = $1 AND state = 'pending' AND mode = 'async' {unless}
        ORDER BY created_ms, id LIMIT 1""",  # noqa: S608 - numbers of parameters
        tenant_id,
        *full,
    )
    return str(row[0]) if row else None


async def _cancel(
    tx: Transaction, task_id: str, tenant_id: str, now_ms: int
) -> Cancelling | None:
    # No worker claims it in between: that takes the account too.
    await tx.run("UPDATE accounts SET held = held WHERE tenant_id = $1", tenant_id)
    row = await tx.one(
        "SELECT state, mode, fence FROM tasks WHERE id = $1 AND tenant_id = $2",
        task_id,
        tenant_id,
    )
    if row is None:
        return None
    state, mode, fence = TaskState(row[0]), row[1], row[2]
    if state is TaskState.PENDING and mode == "async":
        end = TaskEnd(
            task_id=task_id,
            state=TaskState.CANCELLED,
            finished_ms=now_ms,
            error_json=cancelled_json(0),
            fence=fence,
        )
        await finish_task(tx, end)
        return Cancelling(TaskState.CANCELLED, ended=True)
    if state is TaskState.PROCESSING and mode == "async":
        await tx.run(
            "UPDATE tasks SET cancel_ms = COALESCE(cancel_ms, $2) WHERE id = $1",
            task_id,
            now_ms,
        )
    return Cancelling(state)


async def _tasks(
    tx: Transaction, tenant_id: str, wanted: TaskFilter, offset: int, limit: int
) -> tuple[int, Sequence[TaskLine]]:
    states = [state.value for state in wanted.states or tuple(TaskState)]
    padded = (states + [states[0]] * len(TaskState))[: len(TaskState)]
    where = """t.tenant_id = $1 AND t.state IN ($2, $3, $4, $5, $6)
        AND t.variant = COALESCE($7, t.variant)"""
    params = (tenant_id, *padded, wanted.variant)
    total = await tx.one(f"SELECT COUNT(*) FROM tasks t WHERE {where}", *params)  # noqa: S608 - constants
    rows = await tx.all(
        f"""SELECT t.id, t.variant, t.state, t.created_ms, t.started_ms, t.finished_ms,
            (SELECT COUNT(*) FROM results r WHERE r.task_id = t.id), t.error_json,
            s.charged, t.class
        FROM tasks t LEFT JOIN settlements s ON s.task_id = t.id
        WHERE {where} ORDER BY t.created_ms DESC, t.id DESC LIMIT $8 OFFSET $9""",  # noqa: S608
        *params,
        limit,
        offset,
    )
    return (total[0] if total else 0), [_line(row) for row in rows]


def _line(row: Row) -> TaskLine:
    task_id, variant, state, created, started, finished, *rest = row
    results, error, charged, task_class = rest
    return TaskLine(
        id=task_id,
        variant=variant,
        state=TaskState(state),
        created_ms=created,
        started_ms=started,
        finished_ms=finished,
        results=results,
        has_error=error is not None,
        charged_nanocredits=charged,
        task_class=task_class or "",
    )


async def _forget(tx: Transaction, before_ms: int, limit: int) -> list[str]:
    rows = await tx.all(
        """SELECT id FROM tasks WHERE finished_ms < $1
        ORDER BY finished_ms LIMIT $2""",
        before_ms,
        limit,
    )
    for row in rows:
        await tx.run("DELETE FROM tasks WHERE id = $1", row[0])
        await tx.run("DELETE FROM deliveries WHERE task_id = $1", row[0])
    await tx.run(
        "DELETE FROM deliveries WHERE task_id = '' AND created_ms < $1", before_ms
    )
    return [str(row[0]) for row in rows]
