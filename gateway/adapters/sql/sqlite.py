"""SQLite behind the driver port: one writer thread with group commit, two readers.

SQLite has one writer at a time whatever one does, and a commit costs an fsync. So all
writes go through one thread, and whatever waits while a commit runs forms the next
group: one BEGIN IMMEDIATE, a savepoint for each transaction, one COMMIT, one wake-up
of the event loop. Nobody is ever made to wait for a group to fill.

Other processes (the commands of the CLI) may write to the same file: the lock and its
busy timeout keep them apart.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from gateway.adapters.sql.database import (
    Change,
    Dialect,
    Operation,
    Row,
    StoreBusyError,
    StoreFailedError,
    T,
    Value,
)

WRITE_QUEUE_MAX = 10_000
READ_QUEUE_MAX = 10_000
GROUP_MAX = 64
READERS = 2
BUSY_TIMEOUT_MS = 5_000
STATEMENTS_CACHED = 256

SQLITE = Dialect(
    blob="BLOB",
    immutable=(
        """CREATE TRIGGER {table}_refuses_update BEFORE UPDATE ON {table}
        BEGIN SELECT RAISE(ABORT, '{table} is append only'); END""",
        """CREATE TRIGGER {table}_refuses_delete BEFORE DELETE ON {table}
        BEGIN SELECT RAISE(ABORT, '{table} is append only'); END""",
    ),
    today="strftime('%Y-%m-%d', 'now')",
    reopened=(
        "DROP TRIGGER {table}_refuses_update",
        "DROP TRIGGER {table}_refuses_delete",
    ),
)


class SqliteDatabase:
    """An SQLite file, used from one event loop. Made by ``open``."""

    dialect = SQLITE
    single_process = True

    def __init__(self, writer: _Lane, reader: _Lane) -> None:
        self._writer = writer
        self._reader = reader

    @classmethod
    async def open(
        cls, path: Path, *, write_queue_max: int = WRITE_QUEUE_MAX
    ) -> SqliteDatabase:
        """Open or create a database file; its directory must be there.

        Raises:
            StoreFailedError: it cannot be opened, or is no database.
        """
        connections = await asyncio.to_thread(_connect_all, path)
        loop = asyncio.get_running_loop()
        writer = _Lane(loop, "BEGIN IMMEDIATE", GROUP_MAX, write_queue_max)
        # One read per transaction: a long one must not keep others waiting with it.
        reader = _Lane(loop, "BEGIN", 1, READ_QUEUE_MAX)
        writer.serve("sqlite-writer", connections[0])
        for connection in connections[1:]:
            reader.serve("sqlite-reader", connection)
        return cls(writer, reader)

    @property
    def commits(self) -> int:
        """How many write transactions were committed, each for a group."""
        return self._writer.commits

    async def write(self, op: Operation[T], lane: str | None = None) -> T:
        """See ``Database``; there is one lane for all."""
        del lane
        return await self._writer.submit(op)

    async def read(self, op: Operation[T]) -> T:
        """See ``Database``."""
        return await self._reader.submit(op)

    async def close(self) -> None:
        """See ``Database``."""
        await self._reader.close()
        await self._writer.close()


def _connect_all(path: Path) -> list[sqlite3.Connection]:
    connections: list[sqlite3.Connection] = []
    try:
        connections.append(_connect(path))
        for _ in range(READERS):
            connections.append(_connect(path))
            connections[-1].execute("PRAGMA query_only = ON")
    except sqlite3.Error as error:
        for connection in connections:
            connection.close()
        raise StoreFailedError(f"cannot open the database {path}: {error}") from error
    return connections


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=BUSY_TIMEOUT_MS / 1000,
        isolation_level=None,  # transactions begin and end where this file says so
        check_same_thread=False,  # opened here, then used by one thread only
        cached_statements=STATEMENTS_CACHED,
    )
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError("its file system has no write-ahead log")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Without it REPLACE deletes rows past the triggers that forbid it.
        connection.execute("PRAGMA recursive_triggers = ON")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@dataclass(frozen=True, slots=True)
class _Waiting:
    op: Operation[Any]
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    future: asyncio.Future[Any]
    value: object = None
    error: BaseException | None = None


class _Lane:
    """A bounded queue of transactions, and the threads that serve it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        begin: str,
        group_max: int,
        queue_max: int,
    ) -> None:
        self._loop = loop
        self._begin = begin
        self._group_max = group_max
        self._queue_max = queue_max
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self.commits = 0

    def serve(self, name: str, connection: sqlite3.Connection) -> None:
        """Start a thread that works on this connection until the lane is closed."""
        # A daemon: a process that ends without close() loses nothing that was
        # acknowledged, and must not hang.
        thread = threading.Thread(
            target=self._work, args=(connection,), name=name, daemon=True
        )
        self._threads.append(thread)
        thread.start()

    async def submit(self, op: Operation[T]) -> T:
        if self._closed:
            raise StoreFailedError("storage is closed")
        if self._queue.qsize() >= self._queue_max:
            raise StoreBusyError("storage is busy; try again in a moment")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Waiting(op, future))
        return await future

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _work(self, connection: sqlite3.Connection) -> None:
        while group := self._next_group():
            outcomes = self._transact(connection, group)
            # A closed loop took everyone who waited with it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_resolve, outcomes)
        connection.close()

    def _next_group(self) -> list[_Waiting]:
        """Wait for work; returns none when the lane is closed and drained."""
        group: list[_Waiting] = []
        waiting = self._queue.get()
        while waiting is not None:
            group.append(waiting)
            if len(group) == self._group_max:
                return group
            try:
                waiting = self._queue.get_nowait()
            except Empty:
                return group
        if group:
            self._queue.put(None)  # the end, seen early: to be met again
        return group

    def _transact(
        self, connection: sqlite3.Connection, group: Sequence[_Waiting]
    ) -> list[_Outcome]:
        try:
            connection.execute(self._begin)
            outcomes = [
                _run_one(connection, waiting, alone=len(group) == 1)
                for waiting in group
            ]
            if connection.in_transaction:
                connection.execute("COMMIT")
                self.commits += 1
        except sqlite3.Error as error:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            return [_Outcome(each.future, error=_typed(error)) for each in group]
        return outcomes


def _run_one(
    connection: sqlite3.Connection, waiting: _Waiting, *, alone: bool
) -> _Outcome:
    if not alone:
        connection.execute("SAVEPOINT op")
    error: BaseException
    try:
        value = _drive(waiting.op(_SqliteTransaction(connection)))
    except sqlite3.Error as failed:
        if not connection.in_transaction:
            raise  # a full disk, say: SQLite has given up the whole group
        error = _typed(failed)
    except BaseException as raised:  # noqa: BLE001 - it is raised to who asked for it
        error = raised
    else:
        if not alone:
            connection.execute("RELEASE op")
        return _Outcome(waiting.future, value)
    if alone:
        connection.execute("ROLLBACK")
    else:
        connection.execute("ROLLBACK TO op")
        connection.execute("RELEASE op")
    return _Outcome(waiting.future, error=error)


def _drive(operation: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine here and now.

    What a transaction awaits is a statement, and a statement on SQLite never suspends:
    the first ``send`` runs the coroutine to its end, with no event loop about.
    """
    try:
        operation.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    operation.close()
    raise RuntimeError("a transaction may await nothing but its statements")


def _typed(error: sqlite3.Error) -> StoreBusyError | StoreFailedError:
    code = getattr(error, "sqlite_errorcode", 0)  # absent: the module's own error
    typed: StoreBusyError | StoreFailedError
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        typed = StoreBusyError("storage is busy; try again in a moment")
    else:
        typed = StoreFailedError("storage failed and nothing was changed; try again")
    typed.__cause__ = error
    return typed


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    for outcome in outcomes:
        if outcome.future.done():
            continue  # its caller was cancelled
        if outcome.error is None:
            outcome.future.set_result(outcome.value)
        else:
            outcome.future.set_exception(outcome.error)


@dataclass(frozen=True, slots=True)
class _SqliteTransaction:
    connection: sqlite3.Connection

    async def one(self, sql: str, *params: Value) -> Row | None:
        rows = self._execute(sql, params).fetchall()
        assert len(rows) <= 1, sql
        return rows[0] if rows else None

    async def all(self, sql: str, *params: Value) -> Sequence[Row]:
        # Read to the end: a statement left open would keep COMMIT from running.
        return self._execute(sql, params).fetchall()

    async def run(self, sql: str, *params: Value) -> int:
        return self._execute(sql, params).rowcount

    async def changes(self, *changes: Change) -> list[int]:
        return [self._execute(sql, params).rowcount for sql, *params in changes]

    def _execute(self, sql: str, params: Sequence[Value]) -> sqlite3.Cursor:
        text, order = _question_marks(sql)
        return self.connection.execute(text, [params[i] for i in order])


@lru_cache(maxsize=STATEMENTS_CACHED)
def _question_marks(sql: str) -> tuple[str, tuple[int, ...]]:
    """Translate ``$2`` to ``?``, and say which parameter stands at each ``?``.

    Plain ``?``, since Python 3.12.0 to 3.12.3 warn of ``?2`` as if it were a name.
    """
    order = tuple(int(number) - 1 for number in re.findall(r"\$(\d+)", sql))
    return re.sub(r"\$\d+", "?", sql), order
