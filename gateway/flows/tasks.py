"""What a task looks like to its owner: read it, and the links to its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gateway.core import tasks as rules
from gateway.core.errors import ConflictError, InvalidRequestError, NotFoundError
from gateway.core.events import TaskFinished
from gateway.core.outcomes import RequestOutcome
from gateway.core.tasks import DeliveryMode, TaskState
from gateway.ports import (
    BlobStore,
    Clock,
    Events,
    Queue,
    StoredResult,
    TaskFilter,
    TaskLine,
    TaskRecord,
    TaskStore,
)
from providers.kit.contract import MadeImage, Usage

PROGRESS_MAX = 95
USUAL_UNKNOWN_MS = 100_000
"""What is told of a kind of task that never was completed yet."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a task.

    ``made`` is set while the bytes are at hand, ``blob`` where they are stored.
    """

    index: int
    media_type: str
    width_px: int = 0
    height_px: int = 0
    revised_prompt: str | None = None
    made: MadeImage | None = None
    blob: str | None = None
    expires_ms: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the answer says about the pictures: resolved values, never ``auto``."""

    background: str
    output_format: str
    quality: str
    size: str


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as its owner sees it; the API renders it for sync and async alike."""

    id: str
    created_s: int
    variant: str
    mode: DeliveryMode
    state: TaskState
    reserved_nanocredits: int
    charged_nanocredits: int | None = None
    usage: Usage | None = None
    usage_source: str | None = None
    facts: Facts | None = None
    pictures: tuple[Picture, ...] = ()
    error: Mapping[str, object] | None = None
    record: TaskRecord | None = field(default=None, repr=False)
    progress: int = 100
    estimated_s: int = 0
    can_cancel: bool = False


@dataclass(frozen=True, slots=True)
class ReadTask:
    """Reads a task for its tenant, or for an admin."""

    store: TaskStore
    queue: Queue
    blobs: BlobStore
    clock: Clock

    async def __call__(self, task_id: str, tenant_id: str | None) -> TaskView:
        """Return the task; ``tenant_id`` None reads as an admin, any tenant's.

        Raises:
            InvalidRequestError: the id has not the form of a task id.
            NotFoundError: there is no such task, or it is another tenant's.
        """
        if not rules.is_task_id(task_id):
            raise InvalidRequestError(
                "The task id must look like task-unified-1700000000-abcd1234: "
                "take it from the X-Task-Id header or the id of the answer.",
                param="task_id",
                code="invalid_task_id",
            )
        record = await self.store.get(task_id)
        if record is None or tenant_id not in {None, record.tenant_id}:
            raise NotFoundError(
                "There is no such task. Tasks are kept for 30 days and are seen "
                "only with a key of the tenant that made them.",
                param="task_id",
                code="task_not_found",
            )
        return await self._view(record)

    async def _view(self, record: TaskRecord) -> TaskView:
        now_ms = self.clock.now_ms()
        pictures = [
            _picture(result)
            for result in record.results
            if result.expires_ms > now_ms and await self.blobs.exists(result.blob)
        ]
        answer = json.loads(record.answer_json) if record.answer_json else None
        usual_ms = None
        if not record.state.final:
            usual_ms = await self.queue.usual_ms(record.task_class)
        expected_s = _expected_s(usual_ms)
        return TaskView(
            id=record.id,
            created_s=record.created_ms // 1000,
            variant=record.variant,
            mode=record.mode,
            state=record.state,
            reserved_nanocredits=record.hold_nanocredits,
            charged_nanocredits=record.charged_nanocredits,
            usage=record.usage,
            usage_source=record.usage_source,
            facts=Facts(**answer) if answer else None,
            pictures=tuple(pictures),
            error=_task_error(record),
            record=record,
            progress=_progress(record.state, record.started_ms, now_ms, expected_s),
            estimated_s=0 if record.state.final else expected_s,
            can_cancel=not record.state.final and record.mode is DeliveryMode.ASYNC,
        )


def _expected_s(usual_ms: int | None) -> int:
    return (usual_ms or USUAL_UNKNOWN_MS) // 1000 or 1


def _progress(
    state: TaskState, started_ms: int | None, now_ms: int, expected_s: int
) -> int:
    # Nobody knows how far a model is: what is shown is the share of the usual time.
    if state.final:
        return 100
    if state is TaskState.PENDING or started_ms is None:
        return 0
    took_s = (now_ms - started_ms) / 1000
    return max(1, min(PROGRESS_MAX, round(100 * took_s / expected_s)))


def _task_error(record: TaskRecord) -> dict[str, object] | None:
    if record.error_json is None:
        return None
    stored = json.loads(record.error_json)
    return {name: stored[name] for name in ("code", "message", "type")}


def _picture(result: StoredResult) -> Picture:
    return Picture(
        index=result.index,
        media_type=result.media_type,
        width_px=result.width_px,
        height_px=result.height_px,
        revised_prompt=result.revised_prompt,
        blob=result.blob,
        expires_ms=result.expires_ms,
    )


BATCH_MAX_TASKS = 50
PAGE_MAX_TASKS = 100


@dataclass(frozen=True, slots=True)
class Listed:
    """A task in a list, and how far it is in percent: as ``TaskView`` tells it."""

    line: TaskLine
    progress: int


@dataclass(frozen=True, slots=True)
class ManageTasks:
    """Lists a tenant's tasks and cancels them."""

    queue: Queue
    read_task: ReadTask
    clock: Clock
    events: Events | None = None
    """Where somebody counts what ends."""

    async def page(
        self, tenant_id: str, wanted: TaskFilter, *, page: int, page_size: int
    ) -> tuple[int, Sequence[Listed]]:
        """List tasks, newest first, with their number; pages count from 1."""
        total, lines = await self.queue.tasks(
            tenant_id, wanted, offset=(page - 1) * page_size, limit=page_size
        )
        running = {x.task_class for x in lines if x.state is TaskState.PROCESSING}
        expected_s = {
            each: _expected_s(await self.queue.usual_ms(each)) for each in running
        }
        now_ms = self.clock.now_ms()
        return total, [
            Listed(
                line,
                _progress(
                    line.state,
                    line.started_ms,
                    now_ms,
                    expected_s.get(line.task_class, 1),
                ),
            )
            for line in lines
        ]

    async def batch(self, tenant_id: str, task_ids: Sequence[str]) -> list[TaskView]:
        """Read several tasks; those that are not there are left out."""
        views = []
        for task_id in dict.fromkeys(task_ids):
            if rules.is_task_id(task_id):
                with suppress(NotFoundError):
                    views.append(await self.read_task(task_id, tenant_id))
        return views

    async def cancel(self, task_id: str, tenant_id: str) -> TaskView:
        """Cancel a task: at once and for free while it waits, soon while it runs.

        Raises:
            InvalidRequestError: the id has not the form of a task id.
            NotFoundError: there is no such task, or it is another tenant's.
            ConflictError: it is a sync task, or it is over.
        """
        before = await self.read_task(task_id, tenant_id)
        if not before.can_cancel and before.state is not TaskState.CANCELLED:
            raise ConflictError(
                "Only an async task that is pending or processing can be cancelled; "
                f"this one is {before.mode.value} and {before.state.value}.",
                code="task_not_cancellable",
            )
        now_ms = self.clock.now_ms()
        found = await self.queue.cancel(task_id, tenant_id, now_ms=now_ms)
        after = await self.read_task(task_id, tenant_id)
        # One that no worker has begun ends here: nobody else tells of it.
        record, events = after.record, self.events
        if found is not None and found.ended and record is not None and events:
            outcome = RequestOutcome.CANCELLED
            events.emit(ended_empty(record, found.state, outcome, now_ms))
        return after


def ended_empty(
    task: TaskRecord,
    state: TaskState,
    outcome: RequestOutcome,
    now_ms: int,
    error_code: str | None = None,
) -> TaskFinished:
    """Tell of a task that was closed without pictures, by whoever closes it."""
    return TaskFinished(
        task_id=task.id,
        variant=task.variant,
        operation=task.operation,
        mode=task.mode.value,
        state=state.value,
        outcome=outcome.value,
        error_code=error_code,
        attempts=len(task.attempts),
        saved_by_fallback=False,
        images=0,
        duration_ms=max(0, now_ms - task.created_ms),
        charged_nanocredits=0,
        absorbed_nanocredits=0,
        usage=None,
        usage_source="none",
    )
