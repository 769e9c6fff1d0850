"""PostgreSQL behind the driver port: a small pool, and short transactions.

The SQL takes row locks in the same order everywhere, so READ COMMITTED is enough for
writes: each statement sees what was committed before it. A read sees one snapshot.
Where two transactions get in each other's way all the same, the engine says so and the
transaction is run again.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, Protocol

import asyncpg
from asyncpg.exceptions import (
    DeadlockDetectedError,
    LockNotAvailableError,
    SerializationError,
)

from gateway.adapters.sql.database import (
    Change,
    Dialect,
    Operation,
    Row,
    StoreBusyError,
    StoreFailedError,
    StoreUnknownError,
    T,
    Transaction,
    Value,
)

CONNECTIONS_MAX = 16
WAITING_MAX = 10_000
CONNECT_MAX_S = 5.0
CONNECTION_WAIT_MAX_S = 10.0
STATEMENT_MAX_S = 60.0
"""An audit of many rows takes that long; nothing else does."""
RELEASE_MAX_S = 2.0
"""A connection that does not get over what was given up by then is ended."""
CLOSE_MAX_S = 5.0
"""What is waiting by then will not be answered."""
LOCK_WAIT_MAX_MS = 5_000
RUNS_MAX = 5
"""How often a transaction is run that another one got in the way of."""
PAUSE_S = 0.01
GROUP_MAX = 32
STATEMENTS_CACHED = 256
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

POSTGRES = Dialect(
    blob="BYTEA",
    immutable=(
        """CREATE OR REPLACE FUNCTION {table}_refuse() RETURNS trigger
        LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '{table} is append only'; END $$""",
        """CREATE TRIGGER {table}_refuses_changes
        BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()""",
    ),
    today="to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    reopened=("DROP TRIGGER {table}_refuses_changes ON {table}",),
    # Whoever has it may need longer than the other locks are waited for.
    alone=(
        "SET LOCAL lock_timeout = '55s'",
        "SELECT pg_advisory_xact_lock(7246173)",
    ),
)

_IN_THE_WAY = (DeadlockDetectedError, SerializationError)
_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,  # refused, reset, a name that is not known, broken TLS
    TimeoutError,
)
_BREAKS_GROUP = (*_IN_THE_WAY, StoreBusyError, asyncpg.InterfaceError, OSError)
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
        self._lanes: dict[str, deque[_Waiting]] = {}
        self._serving: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        connections_max: int = CONNECTIONS_MAX,
        waiting_max: int = WAITING_MAX,
        statement_max_s: float = STATEMENT_MAX_S,
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
                command_timeout=statement_max_s,
                reset=_keep_as_it_is,
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

    async def write(self, op: Operation[T], lane: str | None = None) -> T:
        """See ``Database``; those of a lane share a connection, and commits."""
        if lane is None:
            return await self._write(op)
        waiting = self._lanes.get(lane)
        if waiting is not None and len(waiting) >= self._waiting_max:
            raise _busy()
        mine = _Waiting(op, asyncio.get_running_loop().create_future())
        if waiting is not None:
            waiting.append(mine)
        else:
            self._lanes[lane] = deque((mine,))
            serving = asyncio.create_task(self._serve(lane))
            self._serving.add(serving)
            serving.add_done_callback(self._serving.discard)
        value: T = await mine.future
        return value

    async def _write(self, op: Operation[T]) -> T:
        for run in range(1, RUNS_MAX + 1):
            try:
                return await self._run(op, "read_committed", readonly=False)
            except _IN_THE_WAY as error:
                if run == RUNS_MAX:
                    raise _busy() from error
            await asyncio.sleep(PAUSE_S * run)
        raise AssertionError(op)

    async def _serve(self, lane: str) -> None:
        # Whatever comes while a commit runs forms the next group.
        waiting, group = self._lanes[lane], list[_Waiting]()
        try:
            while waiting:
                group = [waiting.popleft() for _ in range(min(len(waiting), GROUP_MAX))]
                group = [each for each in group if not each.future.done()]
                together = len(group) > 1 and await self._together(group)
                if not together:
                    await self._one_by_one(group)
        finally:
            # Nobody waits for a lane that was cut off, and the next one is a new one.
            del self._lanes[lane]
            for each in group:
                each.fail(_unknown())
            for each in waiting:
                each.fail(_failed())

    async def _one_by_one(self, group: Sequence[_Waiting]) -> None:
        for each in group:
            if each.future.done():
                continue
            try:
                value = await self._write(each.op)
            except BaseException as error:  # noqa: BLE001 - for who asked for it
                each.fail(error)
            else:
                each.succeed(value)

    async def _together(self, group: Sequence[_Waiting]) -> bool:
        """Run a group in one transaction; False: nothing came of it."""
        try:
            outcomes = await self._run(
                partial(_run_all, group), "read_committed", readonly=False
            )
        except StoreUnknownError as unknown:
            for each in group:
                each.fail(unknown)
            return True
        except (StoreBusyError, StoreFailedError, *_IN_THE_WAY):
            return False  # each of them may do better alone, or learn why not
        except Exception as unforeseen:  # noqa: BLE001 - for who asked for it
            for each in group:
                each.fail(unforeseen)
            return True
        for each, value, error in outcomes:
            if error is not None:
                each.fail(error)
            else:
                each.succeed(value)
        return True

    async def read(self, op: Operation[T]) -> T:
        """See ``Database``."""
        return await self._run(op, "repeatable_read", readonly=True)

    async def close(self) -> None:
        """See ``Database``; what is not answered within ``CLOSE_MAX_S`` is cut off."""
        try:
            async with asyncio.timeout(CLOSE_MAX_S):
                if self._serving:
                    await asyncio.wait(self._serving)
                self._closed = True
                await self._pool.close()
        except TimeoutError:
            self._closed = True
            self._pool.terminate()

    async def _run(
        self, op: Operation[T], isolation: Isolation, *, readonly: bool
    ) -> T:
        async with self._connection() as connection:
            committing = False
            transaction = connection.transaction(isolation=isolation, readonly=readonly)
            try:
                await transaction.start()
                try:
                    value = await op(_PostgresTransaction(connection))
                except BaseException:
                    await _undone(transaction, connection)
                    raise
                committing = True
                await transaction.commit()
            except _IN_THE_WAY:
                raise
            except LockNotAvailableError as error:
                raise _busy() from error
            except _FAILURES as error:
                # One that does not answer in time may have heard us.
                lost = isinstance(error, TimeoutError) or _is_gone(connection)
                if committing and not readonly and lost:
                    raise _unknown() from error
                raise _failed() from error
            return value

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
            # One that cannot be used again is ended: what came of it stays the same.
            with suppress(*_FAILURES):
                await self._pool.release(connection, timeout=RELEASE_MAX_S)


async def _keep_as_it_is(_: object) -> None:
    """Save the round trip of a reset: no transaction changes its session."""


async def _undone(transaction: Undoing, connection: Closing) -> None:
    # A connection that is gone has undone all of it.
    if not _is_gone(connection):
        await transaction.rollback()


def _is_gone(connection: Closing) -> bool:
    # The pool takes a connection that breaks from its user at once, and then refuses to
    # tell of it.
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


class Undoing(Protocol):
    """As much of a transaction as is needed to undo it."""

    async def rollback(self) -> None:
        """Undo it."""


class Closing(Protocol):
    """As much of a connection as tells whether it is there."""

    def is_closed(self) -> bool:
        """Tell whether it is gone."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A transaction in a lane; its caller may be gone when it is over."""

    op: Operation[Any]
    future: asyncio.Future[Any]

    def succeed(self, value: object) -> None:
        if not self.future.done():
            self.future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _PostgresTransaction:
    """One transaction. A class of few parts: it is made for every one of them."""

    __slots__ = ("_connection",)

    def __init__(self, connection: asyncpg.pool.PoolConnectionProxy[Any]) -> None:
        self._connection = connection

    async def one(self, sql: str, *params: Value) -> Row | None:
        rows = await self._connection.fetch(sql, *_sendable(params))
        assert len(rows) <= 1, sql
        return tuple(rows[0]) if rows else None

    async def all(self, sql: str, *params: Value) -> Sequence[Row]:
        rows = await self._connection.fetch(sql, *_sendable(params))
        return [tuple(row) for row in rows]

    async def run(self, sql: str, *params: Value) -> int:
        tag: str = await self._connection.execute(sql, *_sendable(params))
        count = tag.rpartition(" ")[2]
        return int(count) if count.isdecimal() else 0

    async def changes(self, *changes: Change) -> list[int]:
        # One round trip, and as long as it takes the row locks are held.
        sql = _as_one(tuple(change[0] for change in changes))
        params = [param for change in changes for param in change[1:]]
        (row,) = await self._connection.fetch(sql, *_sendable(params))
        return list(row)

    def is_closed(self) -> bool:
        return _is_gone(self._connection)


Outcome = tuple[_Waiting, Any, Exception | None]


async def _run_all(group: Sequence[_Waiting], tx: Transaction) -> list[Outcome]:
    assert isinstance(tx, _PostgresTransaction)
    mark, outcomes = "SAVEPOINT op", list[Outcome]()
    for each in group:
        await tx.run(mark)
        mark = "RELEASE SAVEPOINT op; SAVEPOINT op"
        try:
            outcomes.append((each, await each.op(tx), None))
        except Exception as error:
            if isinstance(error, _BREAKS_GROUP) or tx.is_closed():
                raise
            outcomes.append((each, None, _typed(error)))
            await tx.run("ROLLBACK TO SAVEPOINT op")
    return outcomes


@lru_cache(maxsize=STATEMENTS_CACHED)
def _as_one(statements: tuple[str, ...]) -> str:
    parts, before = [], 0
    for number, sql in enumerate(statements):
        parts.append(f"s{number} AS ({_moved(sql, before)} RETURNING 1)")
        before += max((int(n) for n in re.findall(r"\$(\d+)", sql)), default=0)
    names = (f"s{number}" for number in range(len(parts)))
    counts = ", ".join(f"(SELECT count(*) FROM {name})" for name in names)  # noqa: S608
    return f"WITH {', '.join(parts)} SELECT {counts}"


def _moved(sql: str, by: int) -> str:
    return re.sub(r"\$(\d+)", lambda found: f"${int(found[1]) + by}", sql)


def _sendable(params: Sequence[Value]) -> list[Value]:
    # PostgreSQL knows no text with a NUL; upstreams and clients do.
    return [
        each.replace("\0", REPLACEMENT) if isinstance(each, str) else each
        for each in params
    ]


def _typed(error: Exception) -> Exception:
    typed = error
    if isinstance(error, LockNotAvailableError):
        typed = _busy()
    elif isinstance(error, _FAILURES):
        typed = _failed()
    if typed is not error:
        typed.__cause__ = error
    return typed


def _busy() -> StoreBusyError:
    return StoreBusyError("storage is busy; try again in a moment")


def _failed() -> StoreFailedError:
    return StoreFailedError("storage failed and nothing was changed; try again")


def _unknown() -> StoreUnknownError:
    return StoreUnknownError("storage failed while it wrote; try again")


def _named(error: BaseException) -> str:
    # asyncpg's own messages name host, user and database, never the password; others
    # are about a part of the URL, which may be one of a password.
    if isinstance(error, ValueError) and not isinstance(error, asyncpg.InterfaceError):
        return (
            "its URL is not postgresql://user:password@host:port/name; what is special "
            "in a password is written as %XX"
        )
    return str(error) or type(error).__name__
