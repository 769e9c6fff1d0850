"""Closes tasks that a dead process left open, so that no hold stays for ever."""

from __future__ import annotations

import json
from dataclasses import dataclass

from gateway.core.errors import ServiceUnavailableError
from gateway.core.events import TaskFinished
from gateway.core.tasks import HOLD_KEPT_MS, TaskState
from gateway.flows.generate import task_error
from gateway.ports import Clock, Events, TaskEnd, TaskRecord, TaskStore

BATCH_TASKS = 200


@dataclass(frozen=True, slots=True)
class Recovery:
    """Finds unfinished tasks that nobody works on, and fails them.

    These are sync tasks without a job to go back to: their clients lost the connection
    together with the process. What may have been bought is booked as waste by the
    store, the tenant pays nothing. All others are taken up by a worker.
    """

    store: TaskStore
    clock: Clock
    events: Events

    async def after_start(self) -> int:
        """Close every unfinished task: call it before the first request is taken.

        Returns the number of tasks closed.
        """
        return await self._close(before_ms=None)

    async def overdue(self) -> int:
        """Close tasks long past their deadline; returns their number.

        What has a job is left to a worker: its pictures may be there.
        """
        before_ms = self.clock.now_ms() - HOLD_KEPT_MS
        await self.store.take_up_overdue(before_ms)
        return await self._close(before_ms=before_ms)

    async def _close(self, before_ms: int | None) -> int:
        closed = 0
        while batch := await self.store.unfinished(BATCH_TASKS):
            due = [t for t in batch if before_ms is None or t.deadline_ms < before_ms]
            for task in due:
                await self._give_up(task)
            closed += len(due)
            if len(due) < len(batch) or len(batch) < BATCH_TASKS:
                break
        return closed

    async def _give_up(self, task: TaskRecord) -> None:
        error = ServiceUnavailableError(
            "The gateway stopped while it worked on this task. You were not charged. "
            "Send the request again."
        )
        await self.store.finish(
            TaskEnd(
                task_id=task.id,
                state=TaskState.FAILED,
                finished_ms=self.clock.now_ms(),
                error_json=json.dumps(task_error(error)),
                forget_key=True,
            )
        )
        self.events.emit(
            TaskFinished(
                task_id=task.id,
                variant=task.variant,
                state=TaskState.FAILED.value,
                served="failed",
                error_code=error.code,
                attempts=len(task.attempts),
                saved_by_fallback=False,
                images=0,
                duration_ms=max(0, self.clock.now_ms() - task.created_ms),
                charged_nanocredits=0,
                absorbed_nanocredits=0,
                usage=None,
                usage_source="none",
            )
        )
