"""What a task looks like to its owner: read it, and the links to its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.core import tasks as rules
from gateway.core.errors import InvalidRequestError, NotFoundError
from gateway.core.tasks import DeliveryMode, TaskState
from gateway.ports import BlobStore, Clock, StoredResult, TaskRecord, TaskStore
from providers.kit.contract import MadeImage, Usage


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


@dataclass(frozen=True, slots=True)
class ReadTask:
    """Reads a task for its tenant, or for an admin."""

    store: TaskStore
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
        )


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
