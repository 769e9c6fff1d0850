"""Keeps delivered pictures: as links for 24 h, or until an answer was sent whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.flows.tasks import Picture
from gateway.ports import BlobStore, StoredResult
from providers.kit.contract import MadeImage

RESULT_KEPT_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Results:
    """Stores pictures under their task's name."""

    blobs: BlobStore

    async def keep(
        self, task_id: str, images: Sequence[MadeImage], now_ms: int, *, inline: bool
    ) -> tuple[StoredResult, ...]:
        """Store every picture before the task is settled, so that a crash loses none.

        ``inline`` pictures are stored as they came, and forgotten by ``sent`` once
        the answer that carries them is out.
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

    async def sent(self, pictures: Sequence[Picture]) -> None:
        """Forget pictures that reached the client in the answer itself."""
        for picture in pictures:
            if picture.blob is not None:
                await self.blobs.delete(picture.blob)


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
