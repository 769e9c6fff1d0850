"""Every SQL engine that the storage contract is run over, and what the suites share.

Run as a program it is a second process on the same database: see ``child``.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import Database, Operation, Row, T, Transaction
from gateway.adapters.sql.deliveries import SqlOutbox
from gateway.adapters.sql.drains import SqlDrains
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.postgres import PostgresDatabase
from gateway.adapters.sql.queue import SqlQueue
from gateway.adapters.sql.reports import SqlReports
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.adapters.sql.tenants import SqlTenants
from gateway.core.ledger import Balance
from gateway.core.tasks import AttemptState, DeliveryMode, TaskState
from gateway.ports import (
    AttemptEnd,
    Mark,
    NewAttempt,
    NewTask,
    StoredResult,
    TaskEnd,
    Tenant,
)
from providers.kit.contract import Billed, Usage
from tests.servers import postgres_database

NOW_MS = 1_700_000_000_000
TENANT = "t-1"


class Backend(Protocol):
    """One engine with one database, empty at first."""

    def connect(self) -> Any:
        """Return an awaitable of the database, opened anew and migrated."""

    def corrupting(self, sql: str) -> tuple[str, ...]:
        """Return the statements that push a change past every guard of the schema."""


@dataclass(frozen=True, slots=True)
class Sqlite:
    """SQLite in a file."""

    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / "imageway.db"

    async def connect(self) -> SqliteDatabase:
        database = await SqliteDatabase.open(self.path)
        await migrate(database, now_ms=NOW_MS)
        return database

    def corrupting(self, sql: str) -> tuple[str, ...]:
        tables = (
            *("entries", "grants", "holds", "settlements", "cost_book"),
            *("draws", "refunds", "trail"),
        )
        triggers = (
            f"DROP TRIGGER IF EXISTS {table}_refuses_{verb}"
            for table in tables
            for verb in ("update", "delete")
        )
        # Foreign keys cannot be switched off inside a transaction: it is ended first.
        unguard = ("COMMIT", "PRAGMA foreign_keys = OFF", "BEGIN IMMEDIATE")
        return (*unguard, "PRAGMA ignore_check_constraints = ON", *triggers, sql)


@dataclass(slots=True)
class Postgres:
    """A database of its own in a PostgreSQL that all tests share."""

    directory: Path
    url: str = field(default_factory=postgres_database)

    async def connect(self) -> PostgresDatabase:
        database = await PostgresDatabase.open(self.url)
        await migrate(database, now_ms=NOW_MS)
        return database

    def corrupting(self, sql: str) -> tuple[str, ...]:
        return ("SET LOCAL session_replication_role = replica", _NO_CHECKS, sql)


_NO_CHECKS = """DO $$ DECLARE one record; BEGIN
    FOR one IN SELECT conrelid::regclass AS place, conname FROM pg_constraint
        WHERE contype = 'c' AND connamespace = 'public'::regnamespace
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', one.place, one.conname);
    END LOOP;
END $$"""
BACKENDS: dict[str, Callable[[Path], Backend]] = {
    "sqlite": Sqlite,
    "postgres": Postgres,
}


@dataclass(slots=True)
class Stores:
    """The stores over one database."""

    backend: Backend
    database: Database

    @property
    def tasks(self) -> SqlTaskStore:
        return SqlTaskStore(self.database)

    @property
    def queue(self) -> SqlQueue:
        return SqlQueue(self.database)

    @property
    def ledger(self) -> SqlLedger:
        return SqlLedger(self.database)

    @property
    def outbox(self) -> SqlOutbox:
        return SqlOutbox(self.database)

    @property
    def tenants(self) -> SqlTenants:
        return SqlTenants(self.database)

    @property
    def accounts(self) -> SqlAccounts:
        return SqlAccounts(self.database)

    @property
    def reports(self) -> SqlReports:
        return SqlReports(self.database)

    @property
    def drains(self) -> SqlDrains:
        return SqlDrains(self.database)

    async def reopen(self) -> None:
        """Close the database and open it again, as a restart does."""
        await self.database.close()
        self.database = await self.backend.connect()

    async def fund(self, nanocredits: int, tenant_id: str = TENANT) -> None:
        """Make a tenant with so many credits."""
        await self.accounts.add_tenant(
            Tenant(tenant_id, f"name of {tenant_id}"), now_ms=NOW_MS
        )
        if nanocredits:
            await self.ledger.grant(
                tenant_id, nanocredits, reference="first", now_ms=NOW_MS
            )

    async def balance(self, tenant_id: str = TENANT) -> Balance:
        """Read the balance of a tenant that is there."""
        balance = await self.ledger.balance(tenant_id)
        assert balance is not None
        return balance

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Read rows by raw SQL."""
        found = await self.database.read(lambda tx: tx.all(sql))
        return [tuple(row) for row in found]

    async def change(self, *statements: str) -> None:
        """Change rows by raw SQL."""

        async def run(tx: Transaction) -> None:
            for statement in statements:
                await tx.run(statement)

        await self.database.write(run)

    async def corrupt(self, sql: str) -> None:
        """Change rows by raw SQL, past triggers, checks and foreign keys."""
        await self.change(*self.backend.corrupting(sql))

    async def broken(self) -> set[tuple[str, str]]:
        """Run the audit; returns (invariant, subject) of what it finds."""
        report = await self.ledger.audit()
        return {(drift.invariant, drift.subject) for drift in report.drifts}


@asynccontextmanager
async def open_stores(backend: str, directory: Path) -> AsyncIterator[Stores]:
    """Open the stores over an empty database of the named backend."""
    chosen = BACKENDS[backend](directory)
    stores = Stores(chosen, await chosen.connect())
    try:
        yield stores
    finally:
        await stores.database.close()


@dataclass(frozen=True, slots=True)
class Recorded:
    """A database that notes every statement it is given."""

    inner: Database
    statements: set[str] = field(default_factory=set)

    @property
    def dialect(self) -> Any:
        return self.inner.dialect

    @property
    def single_process(self) -> bool:
        return self.inner.single_process

    async def write(self, op: Operation[T], lane: str | None = None) -> T:
        return await self.inner.write(lambda tx: op(_Noting(tx, self.statements)), lane)

    async def read(self, op: Operation[T]) -> T:
        return await self.inner.read(lambda tx: op(_Noting(tx, self.statements)))

    async def close(self) -> None:
        await self.inner.close()


@dataclass(frozen=True, slots=True)
class _Noting:
    inner: Transaction
    statements: set[str]

    async def one(self, sql: str, *params: Any) -> Row | None:
        self.statements.add(sql)
        return await self.inner.one(sql, *params)

    async def all(self, sql: str, *params: Any) -> Any:
        self.statements.add(sql)
        return await self.inner.all(sql, *params)

    async def run(self, sql: str, *params: Any) -> int:
        self.statements.add(sql)
        return await self.inner.run(sql, *params)

    async def changes(self, *changes: Any) -> list[int]:
        self.statements.update(change[0] for change in changes)
        return await self.inner.changes(*changes)


def a_mark(change_id: str = "chg-1", at_ms: int = NOW_MS) -> Mark:
    return Mark(change_id, "a test", at_ms)


def a_task(task_id: str = "task-1", **changes: Any) -> NewTask:
    fields: dict[str, Any] = {
        "id": task_id,
        "tenant_id": TENANT,
        "key_id": "key-1",
        "variant": "gpt-image-2",
        "operation": "generate",
        "mode": DeliveryMode.SYNC,
        "request_json": '{"n":1}',
        "hold_nanocredits": 100,
        "created_ms": NOW_MS,
        "deadline_ms": NOW_MS + 300_000,
    }
    return NewTask(**(fields | changes))


def an_attempt(task_id: str = "task-1", **changes: Any) -> NewAttempt:
    fields: dict[str, Any] = {
        "task_id": task_id,
        "seq": 1,
        "offer_id": "openai/gpt-image-2",
        "upstream": "openai",
        "estimate_nanousd": 7_000_000,
        "started_ms": NOW_MS + 10,
    }
    return NewAttempt(**(fields | changes))


def a_lost_attempt(task_id: str = "task-1", **changes: Any) -> AttemptEnd:
    fields: dict[str, Any] = {
        "task_id": task_id,
        "seq": 1,
        "state": AttemptState.FAILED,
        "finished_ms": NOW_MS + 2_000,
        "won": False,
        "billed": Billed.MAYBE,
        "cost_nanousd": 7_000_000,
        "cost_source": "estimate",
        "kind": "timeout",
    }
    return AttemptEnd(**(fields | changes))


def a_won_attempt(task_id: str = "task-1", **changes: Any) -> AttemptEnd:
    fields: dict[str, Any] = {
        "state": AttemptState.DONE,
        "won": True,
        "billed": Billed.YES,
        "cost_nanousd": 6_000_000,
        "cost_source": "usage",
        "kind": None,
    }
    return a_lost_attempt(task_id, **(fields | changes))


def a_result(**changes: Any) -> StoredResult:
    fields: dict[str, Any] = {
        "index": 0,
        "blob": "task-1/0",
        "media_type": "image/png",
        "size_bytes": 1_234,
        "width_px": 1024,
        "height_px": 1536,
        "inline": True,
        "expires_ms": NOW_MS + 86_400_000,
        "revised_prompt": "a sunset, at sea",
    }
    return StoredResult(**(fields | changes))


def an_end(task_id: str = "task-1", **changes: Any) -> TaskEnd:
    fields: dict[str, Any] = {
        "task_id": task_id,
        "state": TaskState.COMPLETED,
        "finished_ms": NOW_MS + 3_000,
        "due_nanocredits": 60,
        "usage": Usage(text_input=5, image_output=196),
        "usage_source": "reported",
    }
    return TaskEnd(**(fields | changes))


def a_void(task_id: str = "task-1", **changes: Any) -> TaskEnd:
    fields: dict[str, Any] = {
        "state": TaskState.FAILED,
        "due_nanocredits": 0,
        "usage": None,
        "usage_source": "none",
        "error_json": '{"code":"upstream_error"}',
    }
    return an_end(task_id, **(fields | changes))


async def child(path: Path, name: str, pairs: Iterator[int]) -> None:
    """Open and finish tasks, eight at a time, naming on stdout what is durable."""
    database = await SqliteDatabase.open(path)
    tasks = SqlTaskStore(database)

    async def work() -> None:
        for number in pairs:
            task_id = f"{name}-{number}"
            await tasks.open(a_task(task_id))
            print(f"opened {task_id}.", flush=True)  # noqa: T201 - the parent reads it
            await tasks.begin_attempt(an_attempt(task_id))
            await tasks.finish(an_end(task_id, attempts=(a_won_attempt(task_id),)))
            print(f"finished {task_id}.", flush=True)  # noqa: T201 - the parent reads it

    await asyncio.gather(*(work() for _ in range(8)))
    await database.close()


if __name__ == "__main__":
    asyncio.run(
        child(
            Path(sys.argv[1]),
            sys.argv[2],
            iter(range(int(sys.argv[3]))) if sys.argv[3:] else itertools.count(),
        )
    )
