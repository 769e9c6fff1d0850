"""Lets an adapter tell of its progress while it keeps its own time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from providers.kit.contract import Done, MadeImage, Partial

Emit = Callable[[Partial | Done], None]


async def relayed(
    work: Callable[[Emit], Awaitable[None]],
) -> AsyncGenerator[Partial | Done, None]:
    """Run ``work`` in a task of its own, and yield what it emits.

    Its deadlines so hold while the reader is busy elsewhere, and never interrupt the
    reader. The work is bounded by itself: it never waits for the reader. When the
    generator is closed early, the work is cancelled and what nobody took is closed.
    """
    made: asyncio.Queue[Partial | Done | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await work(made.put_nowait)
        finally:
            made.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        while (item := await made.get()) is not None:
            yield item
        await task
    finally:
        task.cancel()
        try:
            await asyncio.wait([task])
            if not task.cancelled():
                # Looked at, so that nobody complains that nobody did.
                task.exception()
        finally:
            while not made.empty():
                _close(made.get_nowait())


def _close(item: Partial | Done | None) -> None:
    images: tuple[MadeImage, ...] = ()
    if isinstance(item, Partial):
        images = (item.image,)
    elif isinstance(item, Done):
        images = item.images
    for image in images:
        image.payload.close()
