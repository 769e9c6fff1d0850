"""Books what is paid, whatever the database does: at once, or when it is back.

While the database is away nothing new is begun, for that must be written first. What
had begun goes on, and how it ended is kept in a journal on the local disk. The store
takes each entry once: an entry that is replayed twice changes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.core.errors import (
    NotFoundError,
    OutcomeUnknownError,
    ServiceUnavailableError,
)
from gateway.core.events import Journaled
from gateway.core.ledger import Settled
from gateway.core.tasks import AttemptState, FencedError, TaskState
from gateway.ports import (
    AttemptEnd,
    Clock,
    Earlier,
    Events,
    JobAccepted,
    Journal,
    NewAttempt,
    NewTask,
    Rebuy,
    TaskEnd,
    TaskRecord,
    TaskStore,
)
from providers.kit.contract import Billed

TRIES = 2
PAUSE_S = 1.0
WRITE_MAX_S = 10.0
REPLAY_EVERY_S = 1.0

T = TypeVar("T")


@dataclass(slots=True)
class JournaledTasks:
    """A ``TaskStore`` that never fails to take what is over, while there is a disk."""

    store: TaskStore
    journal: Journal
    clock: Clock
    events: Events
    _replaying: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open(self, task: NewTask) -> str | None:
        """See ``TaskStore``.

        Where it is not known whether the task was written, and it cannot be seen, it is
        closed later: whoever asked for it was told that it was not.
        """
        try:
            return await self.store.open(task)
        except OutcomeUnknownError:
            # A worker may find it: an answer that it is not there would be wrong then.
            if await self._is_written(task.id):
                return None
            end = TaskEnd(
                task_id=task.id,
                state=TaskState.FAILED,
                finished_ms=self.clock.now_ms(),
                error_json=_never_begun_json(),
                forget_key=True,
                tenant_id=task.tenant_id,
            )
            await self._kept(end)
            raise

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        """See ``TaskStore``; what may have been written is ended later: never sent."""
        try:
            await self.store.begin_attempt(attempt, route_json)
        except OutcomeUnknownError:
            end = AttemptEnd(
                task_id=attempt.task_id,
                seq=attempt.seq,
                state=AttemptState.FAILED,
                finished_ms=self.clock.now_ms(),
                won=False,
                billed=Billed.NO,
                cost_nanousd=0,
                cost_source="estimate",
                detail="never sent: it could not be written down",
                fence=attempt.fence,
            )
            await self._kept(end)
            raise

    async def accept_attempt(
        self,
        task_id: str,
        seq: int,
        job_id: str,
        order_json: str | None = None,
        *,
        fence: int = 0,
    ) -> None:
        """See ``TaskStore``; kept in the journal while the store is away."""
        entry = JobAccepted(task_id, seq, job_id, order_json, fence)
        if not self.journal.knows(task_id):
            with suppress(ServiceUnavailableError):
                await self._in_time(self._accept(entry))
                return
        await self._kept(entry)

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See ``TaskStore``; kept in the journal while the store is away."""
        if not self.journal.knows(end.task_id):
            with suppress(ServiceUnavailableError):
                await self._in_time(self.store.end_attempt(end))
                return
        await self._kept(end)

    async def finish(self, end: TaskEnd) -> Settled:
        """See ``TaskStore``; kept in the journal while the store is away.

        Then what is due is said to be charged: what the tenant cannot pay of it is
        known only when it is booked.
        """
        for attempt in range(1, TRIES + 1):
            if self.journal.knows(end.task_id):
                break
            try:
                settled = await self._in_time(self.store.finish(end))
            except ServiceUnavailableError:
                if attempt < TRIES:
                    await self.clock.sleep(PAUSE_S)
                continue
            if _falls_short(settled, end):
                self.events.emit(Journaled(end.task_id, "TaskEnd", "too_late"))
            return settled
        await self._kept(end)
        return Settled(end.due_nanocredits)

    async def replay(self) -> int:
        """Book what is in the journal; returns how many entries that were.

        Stops while the store is away. What it refuses waits, with what comes after it
        for the same task, and keeps no other task waiting.
        """
        done, refused = 0, set[str]()
        async with self._replaying:
            if not self.journal.waiting:
                return 0
            for kept in await self.journal.kept():
                if kept.entry.task_id in refused:
                    continue
                try:
                    outcome = await self._in_time(self._replayed(kept.entry))
                except ServiceUnavailableError:
                    if not await self._is_there():
                        return done
                    refused.add(kept.entry.task_id)
                    continue
                await self.journal.drop(kept)
                what = type(kept.entry).__name__
                self.events.emit(Journaled(kept.entry.task_id, what, outcome))
                done += 1
        return done

    async def _replayed(self, entry: JobAccepted | AttemptEnd | TaskEnd) -> str:
        try:
            match entry:
                case JobAccepted():
                    await self._accept(entry)
                case AttemptEnd():
                    await self.store.end_attempt(entry)
                case TaskEnd():
                    settled = await self.store.finish(entry)
                    if _falls_short(settled, entry):
                        return "too_late"
        except NotFoundError:
            return "never_begun"
        except FencedError:
            # Whoever claimed the task since carries it out, and settles it.
            return "taken_over"
        return "booked"

    async def _is_there(self) -> bool:
        try:
            await self._in_time(self.store.get(""))
        except ServiceUnavailableError:
            return False
        return True

    async def _accept(self, entry: JobAccepted) -> None:
        await self.store.accept_attempt(
            entry.task_id,
            entry.seq,
            entry.job_id,
            entry.order_json,
            fence=entry.fence,
        )

    async def _is_written(self, task_id: str) -> bool:
        try:
            return await self._in_time(self.store.get(task_id)) is not None
        except ServiceUnavailableError:
            return False

    async def _in_time(self, writing: Awaitable[T]) -> T:
        # A database that hangs is away too. What it does after all, it does once.
        try:
            async with asyncio.timeout(WRITE_MAX_S):
                return await writing
        except TimeoutError as error:
            raise OutcomeUnknownError("The books did not answer in time.") from error

    async def _kept(self, entry: JobAccepted | AttemptEnd | TaskEnd) -> None:
        await self.journal.keep(entry)
        self.events.emit(Journaled(entry.task_id, type(entry).__name__, "kept"))

    async def earlier(self, wanted: Earlier) -> str | None:
        """See ``TaskStore``."""
        return await self.store.earlier(wanted)

    async def forget_keys(self, before_ms: int) -> int:
        """See ``TaskStore``."""
        return await self.store.forget_keys(before_ms)

    async def get(self, task_id: str) -> TaskRecord | None:
        """See ``TaskStore``."""
        return await self.store.get(task_id)

    async def unfinished(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``."""
        return await self.store.unfinished(limit)

    async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``."""
        return await self.store.orphaned(limit)

    async def take_up_overdue(self, before_ms: int) -> int:
        """See ``TaskStore``."""
        return await self.store.take_up_overdue(before_ms)

    async def rebuy(self, rebuy: Rebuy, since_ms: int) -> bool:
        """See ``TaskStore``."""
        return await self.store.rebuy(rebuy, since_ms)


def _falls_short(settled: Settled, end: TaskEnd) -> bool:
    # Others held this process for dead and closed the task: its pictures are free.
    return settled.charged + settled.absorbed < end.due_nanocredits


def _never_begun_json() -> str:
    return json.dumps(
        {
            "code": "service_unavailable",
            "message": "The books could not be written. You were not charged. "
            "Send the request again.",
            "type": "task_error",
            "http": {
                "status": 503,
                "type": "api_error",
                "code": "storage_unavailable",
                "param": None,
            },
        }
    )
