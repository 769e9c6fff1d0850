"""PostgreSQL behind the driver port: a small pool, and short transactions.

The SQL takes row locks in the same order everywhere, so READ COMMITTED is enough for
writes: each statement sees what was committed before it. A read sees one snapshot.
Where two transactions get in each other's way all the same, the engine says so and the
transaction is run again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg
from asyncpg.exceptions import (
    DeadlockDetectedError,
    LockNotAvailableError,
    SerializationError,
)

from gateway.adapters.sql.database import (
    Dialect,
    Operation,
    Row,
    StoreBusyError,
    StoreFailedError,
    T,
    Value,
)

CONNECTIONS_MAX = 16
WAITING_MAX = 10_000
CONNECT_MAX_S = 5.0
CONNECTION_WAIT_MAX_S = 10.0
STATEMENT_MAX_S = 60.0
"""An audit of many rows takes that long; nothing else does."""
LOCK_WAIT_MAX_MS = 5_000
RUNS_MAX = 5
"""How often a transaction is run that another one got in the way of."""
PAUSE_S = 0.01

POSTGRES = Dialect(
    blob="BYTEA",
    immutable=(
        """CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '{table} is append only'; END $$""",
        """CREATE TRIGGER {table}_refuses_changes
        BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()""",
    ),
    alone="SELECT pg_advisory_xact_lock(7246173)",
)

_IN_THE_WAY = (DeadlockDetectedError, SerializationError)
_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # refused, reset, a name that is not known, broken TLS
    TimeoutError,
)
Isolation = Literal["read_committed", "repeatable_read"]


class PostgresDatabase:
    """A PostgreSQL database, used from one event loop. Made by ``open``."""

    dialect = POSTGRES
    single_process = False

    def __init__(self, pool: asyncpg.Pool[Any], waiting_max: int) -> None:
        self._pool = pool
        self._waiting_max = waiting_max
        self._waiting = 0
        self._closed = False

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        connections_max: int = CONNECTIONS_MAX,
        waiting_max: int = WAITING_MAX,
    ) -> PostgresDatabase:
        """Connect to a database by its ``postgresql://`` URL.

        Raises:
            StoreFailedError: it cannot be reached, or refuses us. The message holds
                neither the password nor the whole URL.
        """
        try:
            pool = await asyncpg.create_pool(
                url,
                min_size=1,
                max_size=connections_max,
                timeout=CONNECT_MAX_S,
                command_timeout=STATEMENT_MAX_S,
                server_settings={
                    "application_name": "imageway",
                    "lock_timeout": str(LOCK_WAIT_MAX_MS),
                },
            )
        except (*_FAILURES, ssl.SSLError, ValueError) as error:
            raise StoreFailedError(
                f"cannot open the database: {_named(error)}"
            ) from error
        return cls(pool, waiting_max)

    async def write(self, op: Operation[T]) -> T:
        """See ``Database``."""
        for run in range(1, RUNS_MAX + 1):
            try:
                return await self._run(op, "read_committed", readonly=False)
            except _IN_THE_WAY as error:
                if run == RUNS_MAX:
                    raise _busy() from error
            await asyncio.sleep(PAUSE_S * run)
        raise AssertionError(op)

    async def read(self, op: Operation[T]) -> T:
        """See ``Database``."""
        return await self._run(op, "repeatable_read", readonly=True)

    async def close(self) -> None:
        """See ``Database``."""
        self._closed = True
        await self._pool.close()

    async def _run(
        self, op: Operation[T], isolation: Isolation, *, readonly: bool
    ) -> T:
        async with self._connection() as connection:
            try:
                async with connection.transaction(
                    isolation=isolation, readonly=readonly
                ):
                    return await op(_PostgresTransaction(connection))
            except _IN_THE_WAY:
                raise
            except LockNotAvailableError as error:
                raise _busy() from error
            except _FAILURES as error:
                raise _failed() from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.pool.PoolConnectionProxy[Any]]:
        if self._closed:
            raise StoreFailedError("storage is closed")
        if self._waiting >= self._waiting_max:
            raise _busy()
        self._waiting += 1
        try:
            connection = await self._pool.acquire(timeout=CONNECTION_WAIT_MAX_S)
        except TimeoutError as error:
            raise _busy() from error
        except _FAILURES as error:
            raise _failed() from error
        finally:
            self._waiting -= 1
        try:
            yield connection
        finally:
            await self._pool.release(connection)


class _PostgresTransaction:
    """One transaction. A class of few parts: it is made for every one of them."""

    __slots__ = ("_connection",)

    def __init__(self, connection: asyncpg.pool.PoolConnectionProxy[Any]) -> None:
        self._connection = connection

    async def one(self, sql: str, *params: Value) -> Row | None:
        rows = await self._connection.fetch(sql, *params)
        assert len(rows) <= 1, sql
        return tuple(rows[0]) if rows else None

    async def all(self, sql: str, *params: Value) -> Sequence[Row]:
        return [tuple(row) for row in await self._connection.fetch(sql, *params)]

    async def run(self, sql: str, *params: Value) -> int:
        tag: str = await self._connection.execute(sql, *params)
        count = tag.rpartition(" ")[2]
        return int(count) if count.isdecimal() else 0


def _busy() -> StoreBusyError:
    return StoreBusyError("storage is busy; try again in a moment")


def _failed() -> StoreFailedError:
    return StoreFailedError("storage failed and nothing was changed; try again")


def _named(error: BaseException) -> str:
    # asyncpg's own messages name host, user and database, never the password.
    return str(error) or type(error).__name__
