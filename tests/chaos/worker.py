"""A process that carries tasks out and sends webhooks, and serves nothing.

``python -m tests.chaos.worker CONFIG DATA_DIR LEASE_MS [unfenced]`` shares a data
folder with others like it. It is the gateway's own worker; ``unfenced`` lets it write
whoever has the task meanwhile, to see what the fence is good for.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from gateway import workers
from gateway.adapters.logs import LogListener
from gateway.adapters.sql.queue import SqlQueue
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.app import build_gateway, read_settings
from gateway.books import Books, open_books
from gateway.core.ledger import Settled
from gateway.ports import AttemptEnd, Lease, NewAttempt, TaskEnd

RENEWALS_PER_LEASE = 10


async def _fence(books: Books, task_id: str) -> int:
    row = await books.database.read(
        lambda tx: tx.one("SELECT fence FROM tasks WHERE id = $1", task_id)
    )
    assert row is not None
    return int(row[0])


@dataclass(frozen=True, slots=True)
class UnfencedStore(SqlTaskStore):
    """Writes as if the task were still its own."""

    books: Books | None = None

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        assert self.books is not None
        fence = await _fence(self.books, attempt.task_id)
        begun = replace(attempt, fence=fence, seq=attempt.seq + 10 * fence)
        await SqlTaskStore.begin_attempt(self, begun, route_json)

    async def end_attempt(self, end: AttemptEnd) -> None:
        assert self.books is not None
        fence = await _fence(self.books, end.task_id)
        await SqlTaskStore.end_attempt(self, replace(end, fence=fence))

    async def finish(self, end: TaskEnd) -> Settled:
        assert self.books is not None
        fence = await _fence(self.books, end.task_id)
        ends = tuple(replace(attempt, fence=fence) for attempt in end.attempts)
        written = replace(end, fence=fence, attempts=ends)
        return await SqlTaskStore.finish(self, written)


@dataclass(frozen=True, slots=True)
class UnfencedQueue(SqlQueue):
    """Believes that every lease is still held."""

    async def renew(
        self, task_id: str, fence: int, *, now_ms: int, lease_ms: int
    ) -> Lease:
        lease = await SqlQueue.renew(
            self, task_id, fence, now_ms=now_ms, lease_ms=lease_ms
        )
        return replace(lease, held=True)


def _unfenced(books: Books) -> Books:
    store = UnfencedStore(books.database, books)
    return replace(books, tasks=store, queue=UnfencedQueue(books.database))


async def work(config: Path, data_dir: Path, *, fenced: bool) -> None:
    """Work until killed."""
    settings = read_settings(config, {"storage.data_dir": str(data_dir)})
    async with open_books(settings) as opened:
        books = opened if fenced else _unfenced(opened)
        gateway = build_gateway(settings, books, LogListener())
        print("works", flush=True)  # noqa: T201 - what the caller waits for
        await asyncio.gather(gateway.worker.run(), gateway.loops.run())


def main() -> None:
    """Read the command line."""
    config, data_dir, lease_ms, *more = sys.argv[1:]
    workers.LEASE_MS = int(lease_ms)
    workers.RENEW_EVERY_S = int(lease_ms) / 1000 / RENEWALS_PER_LEASE
    asyncio.run(work(Path(config), Path(data_dir), fenced="unfenced" not in more))


if __name__ == "__main__":
    main()
