"""Keeps delivered pictures: as links for 24 h, or until an answer was sent whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gateway.flows.tasks import Picture
from gateway.ports import BlobStore, Clock, StoredResult
from providers.kit.contract import MadeImage

RESULT_KEPT_MS = 24 * 3600 * 1000
SENT_KEPT_MS = 15 * 60 * 1000
"""An answer that was handed to the network may still be lost on its way, or by a client
that crashes: its pictures stay a while under the task's id."""


@dataclass(frozen=True, slots=True)
class Results:
    """Stores pictures under their task's name."""

    blobs: BlobStore
    clock: Clock
    _sent: deque[tuple[int, str]] = field(default_factory=deque)

    async def keep(
        self, task_id: str, images: Sequence[MadeImage], now_ms: int, *, inline: bool
    ) -> tuple[StoredResult, ...]:
        """Store every picture before the task is settled: no charge without a picture.

        ``inline`` pictures are stored as they came, and forgotten some time after
        the answer that carries them is out (``sent``).
        """
        kept = []
        for index, image in enumerate(images):
            blob = blob_name(task_id, index)
            size_bytes = await self.blobs.keep(blob, image, as_it_came=inline)
            result = _stored(task_id, index, image, now_ms)
            kept.append(replace(result, size_bytes=size_bytes, inline=inline))
        return tuple(kept)

    def unkept(
        self, task_id: str, images: Sequence[MadeImage], now_ms: int
    ) -> tuple[StoredResult, ...]:
        """Describe pictures that go out in the answer and could not be stored."""
        return tuple(_stored(task_id, i, m, now_ms) for i, m in enumerate(images))

    def sent(self, pictures: Sequence[Picture]) -> None:
        """Note pictures that went out in the answer itself: they are kept 15 minutes.

        After a restart nobody remembers, and they stay as long as links do.
        """
        due_ms = self.clock.monotonic_ms() + SENT_KEPT_MS
        self._sent.extend((due_ms, p.blob) for p in pictures if p.blob is not None)

    async def forget_sent(self) -> int:
        """Delete what was sent long enough ago; returns how many."""
        now_ms, count = self.clock.monotonic_ms(), 0
        while self._sent and self._sent[0][0] <= now_ms:
            await self.blobs.delete(self._sent[0][1])
            self._sent.popleft()  # only now: a store that is away is asked again
            count += 1
        return count


def _stored(task_id: str, index: int, image: MadeImage, now_ms: int) -> StoredResult:
    return StoredResult(
        index=index,
        blob=blob_name(task_id, index),
        media_type=image.media_type,
        size_bytes=0,
        width_px=image.width_px,
        height_px=image.height_px,
        inline=True,
        expires_ms=now_ms + RESULT_KEPT_MS,
        revised_prompt=image.revised_prompt,
    )


def blob_name(task_id: str, index: int) -> str:
    """Name a task's picture in the blob store."""
    return f"{task_id}/{index}"
