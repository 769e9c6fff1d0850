"""Upstreams that are taken out of service, in SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.adapters.sql.database import Database


@dataclass(frozen=True, slots=True)
class SqlDrains:
    """The ``Drains`` port over any SQL database."""

    database: Database

    async def drained(self) -> Mapping[str, int]:
        """See ``Drains``."""
        rows = await self.database.read(
            lambda tx: tx.all("SELECT upstream, since_ms FROM drains")
        )
        return {str(row[0]): int(row[1]) for row in rows}

    async def drain(self, upstream: str, *, now_ms: int) -> None:
        """See ``Drains``."""
        await self.database.write(
            lambda tx: tx.run(
                """INSERT INTO drains (upstream, since_ms) VALUES ($1, $2)
                ON CONFLICT DO NOTHING""",
                upstream,
                now_ms,
            )
        )

    async def enable(self, upstream: str) -> None:
        """See ``Drains``."""
        await self.database.write(
            lambda tx: tx.run("DELETE FROM drains WHERE upstream = $1", upstream)
        )
