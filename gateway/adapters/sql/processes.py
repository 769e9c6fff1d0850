"""Which gateway processes are alive, in SQL: each says so every few seconds."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Transaction


@dataclass(frozen=True, slots=True)
class SqlProcesses:
    """The ``Processes`` port over any SQL database."""

    database: Database

    async def beat(self, process_id: str, *, now_ms: int) -> None:
        """See ``Processes``."""
        await self.database.write(
            lambda tx: tx.run(
                """INSERT INTO processes (id, seen_ms) VALUES ($1, $2)
                ON CONFLICT (id) DO UPDATE SET seen_ms = $2""",
                process_id,
                now_ms,
            )
        )

    async def leave(self, process_id: str) -> None:
        """See ``Processes``."""
        await self.database.write(
            lambda tx: tx.run("DELETE FROM processes WHERE id = $1", process_id)
        )

    async def clear(self) -> None:
        """See ``Processes``."""
        await self.database.write(lambda tx: tx.run("DELETE FROM processes"))

    async def forget_lost(self, *, before_ms: int, but: str) -> int:
        """See ``Processes``."""
        return await self.database.write(lambda tx: _forget_lost(tx, before_ms, but))


async def _forget_lost(tx: Transaction, before_ms: int, but: str) -> int:
    await tx.run(
        "DELETE FROM processes WHERE seen_ms < $1 AND id <> $2", before_ms, but
    )
    # What has a job to be found again can be claimed by any worker from now on.
    return await tx.run(
        """UPDATE tasks SET lease_until_ms = 0
        WHERE finished_ms IS NULL AND mode = 'sync' AND order_json IS NOT NULL
            AND lease_until_ms IS NULL
            AND owner NOT IN (SELECT id FROM processes)"""
    )
