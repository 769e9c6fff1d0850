"""Counts of what was served and what failed, in SQL: by five minutes and by day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.core.uptime import (
    TROUBLE_FAILED_MIN,
    TROUBLE_SHARE,
    Count,
    Kind,
    Slot,
    day_of,
)

SLOT, DAY = "slot", "day"


@dataclass(frozen=True, slots=True)
class SqlUptime:
    """The ``UptimeBook`` port over any SQL database."""

    database: Database

    async def add(self, slots: Iterable[Slot]) -> None:
        """See ``UptimeBook``."""
        # In one order: processes that add at once must not wait for each other's rows
        # in a ring.
        ordered = sorted(slots, key=lambda s: (s.subject[0].value, *s.subject[1:]))
        ordered.sort(key=lambda s: s.since_ms)

        async def add(tx: Transaction) -> None:
            for slot in ordered:
                await _add(tx, slot, SLOT, slot.since_ms)
            for slot in ordered:
                await _add(tx, slot, DAY, day_of(slot.since_ms))

        await self.database.write(add)

    async def slots(self, since_ms: int) -> Sequence[Slot]:
        """See ``UptimeBook``."""
        return await self._read(SLOT, since_ms)

    async def days(self, since_ms: int) -> Sequence[Slot]:
        """See ``UptimeBook``."""
        return await self._read(DAY, since_ms)

    async def troubled(self, since_ms: int, limit: int) -> Sequence[Slot]:
        """See ``UptimeBook``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT kind, name, since_ms, served, failed FROM uptime
                WHERE width = 'slot' AND since_ms >= $1 AND failed >= $2
                    AND failed * $3 >= served + failed
                ORDER BY since_ms DESC LIMIT $4""",
                since_ms,
                TROUBLE_FAILED_MIN,
                TROUBLE_SHARE,
                limit,
            )
        )
        return [_slot(row) for row in rows]

    async def forget(self, before_ms: int) -> int:
        """See ``UptimeBook``."""
        return await self.database.write(
            lambda tx: tx.run("DELETE FROM uptime WHERE since_ms < $1", before_ms)
        )

    async def _read(self, width: str, since_ms: int) -> Sequence[Slot]:
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT kind, name, since_ms, served, failed FROM uptime
                WHERE width = $1 AND since_ms >= $2 ORDER BY since_ms""",
                width,
                since_ms,
            )
        )
        return [_slot(row) for row in rows]


async def _add(tx: Transaction, slot: Slot, width: str, since_ms: int) -> None:
    kind, name = slot.subject
    await tx.run(
        """INSERT INTO uptime (kind, name, width, since_ms, served, failed)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (width, since_ms, kind, name) DO UPDATE SET
            served = uptime.served + excluded.served,
            failed = uptime.failed + excluded.failed""",
        kind.value,
        name,
        width,
        since_ms,
        slot.count.served,
        slot.count.failed,
    )


def _slot(row: Row) -> Slot:
    kind, name, since_ms, served, failed = row
    return Slot((Kind(kind), name), since_ms, Count(int(served), int(failed)))
