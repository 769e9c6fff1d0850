"""A task's life: its states, its attempts, and how long it may wait."""

from __future__ import annotations

import json
from enum import Enum

from gateway.core.errors import ConflictError, RateLimitedError

TASK_ID_PREFIX = "task-unified-"
TASK_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
TASK_ID_CHARS = 8
QUEUE_MAX_TASKS = 10_000
QUEUE_MAX_TASKS_PER_TENANT = 1_000
QUEUE_RETRY_AFTER_S = 30
TAKEOVERS_MAX = 5
"""So many times a task may be taken over from a worker that stopped renewing."""
TAKEOVERS_WITH_JOB_MAX = 20
"""Of a task whose pictures are being made, or paid already."""
STOPPED = "cancelled"
"""How an attempt ended that was stopped because its task was cancelled."""
HOLD_KEPT_MS = 900_000
"""How long after its deadline a task may still be settled by its own process."""


class TaskState(Enum):
    """Where a task is. The last three are final."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing can happen to the task any more."""
        return self in {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED}


class DeliveryMode(Enum):
    """How the client gets the pictures: in the answer, or later by task id."""

    SYNC = "sync"
    ASYNC = "async"


class AttemptState(Enum):
    """Where an attempt is; committed before each step that it names."""

    SENDING = "sending"
    """The first byte may be out: from here the outcome may be unknown."""

    ACCEPTED = "accepted"
    """The upstream gave a job id: re-attach, never resubmit."""

    DONE = "done"
    FAILED = "failed"


def cancelled_json(charged_nanocredits: int) -> str:
    """Say of a task that it was cancelled, in the words of the task contract."""
    charge = "You were not charged."
    if charged_nanocredits:
        charge = "What was made until then was charged."
    return json.dumps(
        {
            "code": "request_cancelled",
            "message": f"The task was cancelled. {charge}",
            "type": "task_error",
        }
    )


class TaskCancelledError(ConflictError):
    """The request repeats, or waited for, a task that its owner cancelled."""

    code = "request_cancelled"
    client_may_retry = False


class FencedError(Exception):
    """Somebody else has claimed the task: whatever was to be written is void."""


class QueueFullError(RateLimitedError):
    """As many tasks wait as may wait."""

    code = "queue_full"


def queue_full(*, mine: bool) -> QueueFullError:
    """Say that no more tasks may wait, of the tenant or of all together."""
    whose, most = ("your tasks", QUEUE_MAX_TASKS_PER_TENANT)
    if not mine:
        whose, most = ("tasks", QUEUE_MAX_TASKS)
    return QueueFullError(
        f"{most:,} of {whose} are waiting, and no more may. Try again after the time "
        "in Retry-After.",
        retry_after_s=QUEUE_RETRY_AFTER_S,
    )


def task_id_for(created_s: int, suffix: str) -> str:
    """Build a task id, ``task-unified-<unix>-<8>``."""
    assert len(suffix) == TASK_ID_CHARS, suffix
    return f"{TASK_ID_PREFIX}{created_s}-{suffix}"


def made_ms(task_id: str) -> int:
    """Tell when a task was made, from its id: milliseconds since the epoch."""
    return int(task_id.removeprefix(TASK_ID_PREFIX).partition("-")[0]) * 1000


def is_task_id(text: str) -> bool:
    """Tell whether a text has the form of a task id."""
    stamp, _, suffix = text.removeprefix(TASK_ID_PREFIX).partition("-")
    return (
        text.startswith(TASK_ID_PREFIX)
        and stamp.isascii()
        and stamp.isdigit()
        and len(suffix) == TASK_ID_CHARS
        and all(char in TASK_ID_ALPHABET for char in suffix)
    )
