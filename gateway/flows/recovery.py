"""Closes tasks that a dead process left open, so that no hold stays for ever."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from gateway.core.errors import ServiceUnavailableError
from gateway.core.outcomes import RequestOutcome
from gateway.core.tasks import HOLD_KEPT_MS, TaskState
from gateway.flows.generate import task_error
from gateway.flows.tasks import ended_empty
from gateway.ports import Clock, Events, Processes, TaskEnd, TaskRecord, TaskStore

BATCH_TASKS = 200
BEAT_EVERY_S = 3.0
LOST_AFTER_MS = 30_000
BEATS_BEFORE_JUDGING = 5
LEAVE_MAX_S = 5.0


@dataclass(slots=True)
class Recovery:
    """Finds unfinished tasks that nobody works on, and fails them.

    These are sync tasks without a job to go back to: their clients lost the connection
    together with the process. What may have been bought is booked as waste by the
    store, the tenant pays nothing. All others are taken up by a worker.
    """

    store: TaskStore
    processes: Processes
    process_id: str
    clock: Clock
    events: Events
    _beats: int = 0
    _beaten_ms: int = 0

    async def after_start(self, *, alone: bool) -> int:
        """Join the processes; call it before the first request is taken.

        Whoever is ``alone`` closes at once what others left open; returns the number
        of tasks closed.
        """
        if alone:
            await self.processes.clear()
        await self.beat()
        return await self._close_lost() if alone else 0

    async def beat(self) -> None:
        """Say that this process is alive."""
        await self._say_alive()
        now_ms = self.clock.monotonic_ms()
        timely = now_ms - self._beaten_ms < LOST_AFTER_MS // 3
        self._beats = self._beats + 1 if timely else 1
        self._beaten_ms = now_ms

    async def _say_alive(self) -> None:
        await self.processes.beat(self.process_id, now_ms=self.clock.now_ms())

    async def lost(self) -> int:
        """Close the tasks of processes that are gone; returns their number.

        After a time in which nobody could say that it is alive, everybody gets the
        chance to do so first.
        """
        if self._beats < BEATS_BEFORE_JUDGING:
            return 0
        # The last beat is long ago where the clock was set, or the machine slept.
        await self._say_alive()
        before_ms = self.clock.now_ms() - LOST_AFTER_MS
        await self.processes.forget_lost(before_ms=before_ms, but=self.process_id)
        return await self._close_lost()

    async def leave(self) -> None:
        """Say that this process ends: what it left open is nobody's.

        Raises:
            TimeoutError: the store does not answer; the others find out by themselves.
        """
        async with asyncio.timeout(LEAVE_MAX_S):
            await self.processes.leave(self.process_id)

    async def overdue(self) -> int:
        """Close tasks long past their deadline; returns their number.

        What has a job is left to a worker: its pictures may be there.
        """
        before_ms = self.clock.now_ms() - HOLD_KEPT_MS
        await self.store.take_up_overdue(before_ms)
        due = [
            task
            for task in await self.store.unfinished(BATCH_TASKS)
            if task.deadline_ms < before_ms
        ]
        for task in due:
            await self._give_up(task, RequestOutcome.TIMEOUT)
        return len(due)

    async def _close_lost(self) -> int:
        closed = 0
        while batch := await self.store.orphaned(BATCH_TASKS):
            for task in batch:
                await self._give_up(task, RequestOutcome.GATEWAY_ERROR)
            closed += len(batch)
        return closed

    async def _give_up(self, task: TaskRecord, outcome: RequestOutcome) -> None:
        error = ServiceUnavailableError(
            "The gateway stopped while it worked on this task. You were not charged. "
            "Send the request again."
        )
        settled = await self.store.finish(
            TaskEnd(
                task_id=task.id,
                state=TaskState.FAILED,
                finished_ms=self.clock.now_ms(),
                error_json=json.dumps(task_error(error)),
                forget_key=True,
            )
        )
        if settled.again:
            return  # whoever was first tells of it: every process looks for these
        now_ms = self.clock.now_ms()
        self.events.emit(
            ended_empty(task, TaskState.FAILED, outcome, now_ms, error.code)
        )
