"""Who asked for the configuration to be read again, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.adapters.sql.database import Database, Transaction
from gateway.ports import ReloadNote


@dataclass(frozen=True, slots=True)
class SqlReloads:
    """The ``Reloads`` port over any SQL database."""

    database: Database

    async def ask(self) -> int:
        """See ``Reloads``."""
        return await self.database.write(_ask)

    async def asked(self) -> int:
        """See ``Reloads``."""
        row = await self.database.read(lambda tx: tx.one("SELECT asked FROM reloads"))
        return int(row[0]) if row else 0

    async def note(self, process_id: str, number: int, problem: str | None) -> None:
        """See ``Reloads``."""
        await self.database.write(
            lambda tx: tx.run(
                """UPDATE processes SET reload_heeded = $2, reload_problem = $3
                WHERE id = $1""",
                process_id,
                number,
                problem,
            )
        )

    async def notes(self, *, alive_since_ms: int) -> Sequence[ReloadNote]:
        """See ``Reloads``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT id, reload_heeded, reload_problem FROM processes
                WHERE seen_ms >= $1 ORDER BY id""",
                alive_since_ms,
            )
        )
        return [ReloadNote(str(row[0]), row[1], row[2]) for row in rows]


async def _ask(tx: Transaction) -> int:
    await tx.run("UPDATE reloads SET asked = asked + 1")
    row = await tx.one("SELECT asked FROM reloads")
    assert row is not None
    return int(row[0])
