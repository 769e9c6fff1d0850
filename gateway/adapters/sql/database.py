"""The driver port: what the stores need from an engine, SQLite or PostgreSQL.

SQL and transactions are written once. A transaction is a coroutine function which
awaits nothing but the statements of ``Transaction``; an engine is free to run
it several times, in another thread or together with others. SQL keeps to what SQLite
3.38 and PostgreSQL 15 share and numbers its parameters ``$1``, ``$2``.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gateway.core.errors import OutcomeUnknownError, ServiceUnavailableError

BUSY_RETRY_AFTER_S = 1
FAILED_RETRY_AFTER_S = 5

T = TypeVar("T")
Value = int | str | bytes | None
Row = Sequence[Any]
Change = tuple[str, *tuple[Value, ...]]
"""A statement that gives no rows, and its parameters."""


class StoreBusyError(ServiceUnavailableError):
    """More is waiting to be stored than may wait. Nothing was changed."""

    code = "storage_unavailable"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=BUSY_RETRY_AFTER_S)


class StoreFailedError(ServiceUnavailableError):
    """The database refused or failed. Nothing was changed; the cause is chained."""

    code = "storage_unavailable"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=FAILED_RETRY_AFTER_S)


class StoreUnknownError(OutcomeUnknownError):
    """The database failed while it committed: all was changed, or nothing."""

    code = "storage_unavailable"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=FAILED_RETRY_AFTER_S)


class Transaction(Protocol):
    """One transaction, as its statements see it."""

    async def one(self, sql: str, *params: Value) -> Row | None:
        """Run a statement that gives at most one row."""
        ...

    async def all(self, sql: str, *params: Value) -> Sequence[Row]:
        """Run a statement and read all its rows."""
        ...

    async def run(self, sql: str, *params: Value) -> int:
        """Run a statement that gives no rows; returns how many it changed."""
        ...

    async def changes(self, *changes: Change) -> list[int]:
        """Run INSERTs, UPDATEs and DELETEs in one go; returns how many each changed.

        None may read, or change again, what another one of them changes.
        """
        ...


Operation = Callable[[Transaction], Coroutine[Any, Any, T]]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where engines differ: in how tables are made, and in what they call today.

    ``immutable`` are the statements that make ``{table}`` refuse UPDATE and DELETE,
    ``reopened`` those that make it take them again, for a migration to fill columns;
    ``alone`` are those that keep others who run them waiting until the transaction is
    over, where every writer does not wait for the others anyway. ``today`` is an
    expression: the day of UTC by the engine's clock, as ``2026-11-25``.
    """

    blob: str
    immutable: tuple[str, ...]
    today: str
    reopened: tuple[str, ...]
    alone: tuple[str, ...] = ()


class Database(Protocol):
    """An open database."""

    @property
    def dialect(self) -> Dialect:
        """How this engine makes tables."""
        ...

    @property
    def single_process(self) -> bool:
        """Whether only one process may serve from it at a time."""
        ...

    async def write(self, op: Operation[T], lane: str | None = None) -> T:
        """Run a transaction that changes rows; committed and durable on return.

        What ``op`` raises undoes all that it did, and is raised here. A caller that
        is cancelled while it waits does not know: its transaction may still commit.

        Those of one ``lane`` would wait for each other: an engine may run them one
        after another, and commit several at once.

        Raises:
            StoreBusyError: too many are waiting, or another process kept the lock.
            StoreUnknownError: the engine failed while it committed.
            StoreFailedError: the engine failed; nothing was changed.
        """
        ...

    async def read(self, op: Operation[T]) -> T:
        """Run a transaction that only reads, all of it from one snapshot.

        It sees every write that returned before.

        Raises:
            StoreBusyError: too many are waiting.
            StoreFailedError: the engine failed.
        """
        ...

    async def close(self) -> None:
        """Finish what is waiting, refuse what comes, and let go. May be repeated."""
        ...
