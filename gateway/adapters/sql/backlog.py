"""What is open at this moment, in SQL: for whoever watches the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Transaction
from gateway.ports import Backlog


@dataclass(frozen=True, slots=True)
class SqlBacklog:
    """Reads the backlog of all processes."""

    database: Database

    async def read(self) -> Backlog:
        """Count open tasks, and the credits held for them."""
        return await self.database.read(_backlog)


async def _backlog(tx: Transaction) -> Backlog:
    rows = await tx.all(
        """SELECT state, COUNT(*) FROM tasks WHERE finished_ms IS NULL
        GROUP BY state"""
    )
    counts = {str(row[0]): int(row[1]) for row in rows}
    oldest = await tx.one(
        """SELECT MIN(created_ms) FROM tasks
        WHERE state = 'pending' AND mode = 'async'"""
    )
    held = await tx.one("SELECT COALESCE(SUM(held), 0) FROM accounts")
    return Backlog(
        pending=counts.get("pending", 0),
        processing=counts.get("processing", 0),
        oldest_queued_ms=oldest[0] if oldest else None,
        held_nanocredits=int(held[0]) if held else 0,
    )
