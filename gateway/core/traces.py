"""Ids of traces and spans, made from the id of a task. Pure.

Any process that works on a task, and any log line about it, has the same ids without
being told: nothing is carried along, and a task that is taken over stays one trace.
"""

from __future__ import annotations

from hashlib import blake2b

TRACE_BYTES, SPAN_BYTES = 16, 8


def trace_id_of(task_id: str) -> str:
    """Return the trace id of a task, 32 hexadecimal digits."""
    return blake2b(task_id.encode(), digest_size=TRACE_BYTES).hexdigest()


def span_id_of(task_id: str, part: str) -> str:
    """Return the span id of a part of a task, 16 hexadecimal digits."""
    return blake2b(f"{task_id} {part}".encode(), digest_size=SPAN_BYTES).hexdigest()
