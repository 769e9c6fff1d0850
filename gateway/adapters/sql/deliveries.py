"""Webhooks to be sent, in SQL: written with the settlement, claimed by lease."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.core.webhooks import (
    PENDING,
    Delivery,
    Due,
    Places,
    chosen,
    event_id,
    event_name,
    host_of,
)
from gateway.ports import TaskEnd


@dataclass(frozen=True, slots=True)
class SqlOutbox:
    """The ``Outbox`` port over any SQL database."""

    database: Database

    async def claim(
        self, *, now_ms: int, lease_ms: int, limit: int, places: Places
    ) -> Sequence[Delivery]:
        """See ``Outbox``."""
        return await self.database.write(
            lambda tx: _claim(tx, now_ms, lease_ms, limit, places)
        )

    async def note(self, delivery: Delivery) -> bool:
        """See ``Outbox``."""
        return await self.database.write(lambda tx: _note(tx, delivery))

    async def list(
        self, *, tenant_id: str | None, state: str | None, offset: int, limit: int
    ) -> tuple[int, Sequence[Delivery]]:
        """See ``Outbox``."""
        return await self.database.read(
            lambda tx: _list(tx, (tenant_id, state), offset, limit)
        )

    async def get(self, delivery_id: str) -> Delivery | None:
        """See ``Outbox``."""
        row = await self.database.read(
            lambda tx: tx.one(
                """SELECT id, task_id, tenant_id, key_id, event, url, state, tries,
                    next_ms, created_ms, status, error, delivered_ms, round, body
                FROM deliveries WHERE id = $1""",
                delivery_id,
            )
        )
        return Delivery(*row) if row else None

    async def redeliver(self, delivery_id: str, *, now_ms: int) -> bool:
        """See ``Outbox``."""
        changed = await self.database.write(
            lambda tx: tx.run(
                """UPDATE deliveries SET state = $3, tries = 0, next_ms = $2,
                    lease_until_ms = 0, round = round + 1
                WHERE id = $1""",
                delivery_id,
                now_ms,
                PENDING,
            )
        )
        return changed > 0


async def add_delivery(tx: Transaction, end: TaskEnd) -> None:
    """Write what a task's callback URL, if it has one, is to be told of its end.

    A part of the settlement's transaction: there is no settlement without it, and
    nothing is sent before.
    """
    task = await tx.one(
        "SELECT tenant_id, key_id, callback_url FROM tasks WHERE id = $1", end.task_id
    )
    if task is None or task[2] is None:
        return
    tenant_id, key_id, url = task
    await tx.run(
        """INSERT INTO deliveries (id, task_id, tenant_id, key_id, event, url, host,
            state, next_ms, created_ms)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9) ON CONFLICT DO NOTHING""",
        event_id(end.task_id, end.state.value),
        end.task_id,
        tenant_id,
        key_id,
        event_name(end.state.value),
        url,
        host_of(url),
        PENDING,
        end.finished_ms,
    )


async def _claim(
    tx: Transaction, now_ms: int, lease_ms: int, limit: int, places: Places
) -> list[Delivery]:
    if not await _due(tx, now_ms, 1):
        return []
    # One at a time: who comes second must not choose what the first one has taken.
    await tx.run("UPDATE turns SET taken = $1 WHERE name = 'deliveries'", now_ms)
    rows = await _due(tx, now_ms, places.each)
    claimed = []
    for delivery_id in chosen((Due(*row) for row in rows), limit, places):
        row = await tx.one(
            """UPDATE deliveries SET lease_until_ms = $3
            WHERE id = $1 AND state = 'pending' AND lease_until_ms <= $2
            RETURNING id, task_id, tenant_id, key_id, event, url, state, tries,
                next_ms, created_ms, status, error, delivered_ms, round, body""",
            delivery_id,
            now_ms,
            now_ms + lease_ms,
        )
        if row is not None:
            claimed.append(Delivery(*row))
    return claimed


async def _due(tx: Transaction, now_ms: int, each: int) -> Sequence[Row]:
    # Few rows per tenant and host come back, however many are due for them.
    return await tx.all(
        """SELECT id, host, tenant_id, next_ms FROM (
            SELECT id, host, tenant_id, next_ms, ROW_NUMBER() OVER (
                PARTITION BY tenant_id, host ORDER BY next_ms, id) AS place
            FROM deliveries
            WHERE state = 'pending' AND next_ms <= $1 AND lease_until_ms <= $1
        ) AS due WHERE place <= $2""",
        now_ms,
        each,
    )


async def _note(tx: Transaction, delivery: Delivery) -> bool:
    # A try by one whose lease is over, or of an earlier round, finds the row moved on.
    noted = await tx.run(
        """UPDATE deliveries SET state = $2, tries = $3, next_ms = $4, status = $5,
            error = $6, delivered_ms = $7, lease_until_ms = 0
        WHERE id = $1 AND state = 'pending' AND tries = $3 - 1 AND round = $8""",
        delivery.id,
        delivery.state,
        delivery.tries,
        delivery.next_ms,
        delivery.status,
        delivery.error,
        delivery.delivered_ms,
        delivery.round,
    )
    return noted > 0


async def _list(
    tx: Transaction, wanted: tuple[str | None, str | None], offset: int, limit: int
) -> tuple[int, list[Delivery]]:
    # A filter that is not given lets everything through.
    tenant_id, state = (text or "" for text in wanted)
    counted = await tx.one(
        """SELECT COUNT(*) FROM deliveries
        WHERE ($1 = '' OR tenant_id = $1) AND ($2 = '' OR state = $2)""",
        tenant_id,
        state,
    )
    rows = await tx.all(
        """SELECT id, task_id, tenant_id, key_id, event, url, state, tries,
            next_ms, created_ms, status, error, delivered_ms, round, body
        FROM deliveries
        WHERE ($1 = '' OR tenant_id = $1) AND ($2 = '' OR state = $2)
        ORDER BY created_ms DESC, id LIMIT $3 OFFSET $4""",
        tenant_id,
        state,
        limit,
        offset,
    )
    return (counted[0] if counted else 0), [Delivery(*row) for row in rows]
