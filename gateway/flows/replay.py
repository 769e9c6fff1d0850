"""Answers a request that repeats an earlier one with the earlier one's answer.

A request is a repetition by its ``Idempotency-Key``, or because the client's library
says that it tries again by itself. What is still under way is waited for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.core.errors import GatewayError, NotFoundError
from gateway.core.idempotency import KEY_KEPT_MS, RETRY_JOINS_MS
from gateway.core.tasks import TaskCancelledError, TaskState
from gateway.flows.generate import Once
from gateway.flows.tasks import Picture, ReadTask, TaskView
from gateway.ports import BlobStore, Clock, Earlier, Key, OpenBlob, Spools, TaskStore
from providers.kit.contract import MadeImage, Payload

LOOK_EVERY_S = 0.25
JOIN_MAX_S = 300.0
COPY_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Replay:
    """Finds what a request repeats, waits for it, and answers with it."""

    store: TaskStore
    read_task: ReadTask
    blobs: BlobStore
    clock: Clock
    spools: Spools

    async def find(self, once: Once, key: Key) -> str | None:
        """Find the task that a request repeats; None for one that is new.

        Raises:
            IdempotencyConflictError: the key stands for another request.
        """
        if once.idempotency_key is None and not once.is_retry:
            return None
        kept_ms = RETRY_JOINS_MS if once.idempotency_key is None else KEY_KEPT_MS
        return await self.store.earlier(
            Earlier(
                tenant_id=key.tenant_id,
                key_id=key.id,
                fingerprint=once.fingerprint,
                idempotency_key=once.idempotency_key,
                since_ms=self.clock.now_ms() - kept_ms,
            )
        )

    async def join(
        self, task_id: str, key: Key, *, links: bool, within_s: float = JOIN_MAX_S
    ) -> TaskView:
        """Wait for a task, and return it with its pictures at hand.

        ``links`` leaves the pictures in the store, to be linked to. A task that is not
        over ``within_s`` is returned as it is then.

        Raises:
            GatewayError: the task failed; the error is the one that it failed with.
        """
        until_ms = self.clock.monotonic_ms() + round(within_s * 1000)
        view = await self.read_task(task_id, key.tenant_id)
        while not view.state.final and self.clock.monotonic_ms() < until_ms:
            await self.clock.sleep(LOOK_EVERY_S)
            view = await self.read_task(task_id, key.tenant_id)
        if view.state.final and view.state is not TaskState.COMPLETED:
            raise _failure_of(view)
        if links or not view.state.final:
            return view
        made = await self._all_at_hand(view.pictures)
        if not made:
            raise NotFoundError(
                "The pictures of the request that this one repeats are not kept any "
                "more. Send a new request.",
                code="result_expired",
            )
        return replace(view, pictures=made)

    async def read(self, task_id: str, key: Key) -> TaskView:
        """Return a task as it is now."""
        return await self.read_task(task_id, key.tenant_id)

    async def _all_at_hand(self, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
        made: list[Picture] = []
        try:
            for picture in pictures:
                at_hand = await self._at_hand(picture)
                if at_hand is not None:
                    made.append(at_hand)
        except BaseException:
            for picture in made:
                assert picture.made is not None
                picture.made.payload.close()
            raise
        return tuple(made)

    async def _at_hand(self, picture: Picture) -> Picture | None:
        opened = await self.blobs.open(picture.blob) if picture.blob else None
        if opened is None:
            return None
        made = MadeImage(
            payload=await self._spooled(opened),
            media_type=picture.media_type,
            width_px=picture.width_px,
            height_px=picture.height_px,
            revised_prompt=picture.revised_prompt,
        )
        return replace(picture, made=made)

    async def _spooled(self, opened: OpenBlob) -> Payload:
        # An answer is written from what is at hand: nothing in it waits for a store.
        spool = self.spools.open("raw", limit_bytes=opened.size_bytes)
        try:
            for offset in range(0, opened.size_bytes, COPY_BYTES):
                spool.append(await opened.read(offset, COPY_BYTES))
                await asyncio.sleep(0)  # others get their turn
        except BaseException:
            spool.close()
            raise
        finally:
            opened.close()
        return spool


def _failure_of(view: TaskView) -> GatewayError:
    assert view.record is not None
    stored = json.loads(view.record.error_json or "{}")
    if view.state is TaskState.CANCELLED:
        said = stored.get("message", "The task was cancelled.")
        return TaskCancelledError(
            f"{said} To have it made after all, send it as a new request, with another "
            "Idempotency-Key if it has one."
        )
    http = stored.get("http") or {}
    error = GatewayError(
        stored.get("message", "The request that this one repeats failed."),
        param=http.get("param"),
        code=http.get("code", "internal_error"),
        client_may_retry=False,
    )
    error.status = http.get("status", 500)
    error.type = http.get("type", "api_error")
    return error
