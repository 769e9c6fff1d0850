"""Server-sent events of an image request: partial pictures, the picture, or an error.

The stream begins with the first event or the first keep-alive: what fails before is
answered with its status, so that a client's library sees it as it sees any error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from litestar.types import Send

from gateway.api.errors import render_error
from gateway.api.http import send_chunk, send_start
from gateway.api.render import token_counts
from gateway.core.catalogue import Operation, Usage
from gateway.core.errors import GatewayError
from gateway.flows.tasks import Facts, TaskView
from providers.kit.contract import MadeImage, Partial
from providers.kit.payloads import base64_chunks

IMAGES = "/v1/images"
KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
PARTIALS_WAITING_MAX = 32
"""Partial pictures that a slow reader may be behind; older ones are left out."""
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_PREFIX = {Operation.GENERATE: "image_generation", Operation.EDIT: "image_edit"}


@dataclass(slots=True)
class EventStream:
    """Partial pictures on their way to one client.

    ``facts`` is what the request says of its pictures, as far as it is known before
    they are made.
    """

    operation: Operation
    facts: Facts
    created_s: int
    _waiting: deque[Partial] = field(default_factory=deque)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = False

    @property
    def prefix(self) -> str:
        """What the event names of this route begin with."""
        return _PREFIX[self.operation]

    def on_partial(self, partial: Partial) -> None:
        """Take a partial picture from the flow."""
        if self._closed:
            partial.image.payload.close()
            return
        self._waiting.append(partial)
        if len(self._waiting) > PARTIALS_WAITING_MAX:
            self._waiting.popleft().image.payload.close()
        self._news.set()

    async def wait(self) -> None:
        """Wait until there are partial pictures."""
        await self._news.wait()

    def take(self) -> list[Partial]:
        """Hand over what is there."""
        self._news.clear()
        taken = list(self._waiting)
        self._waiting.clear()
        return taken

    def close(self) -> None:
        """Let go of what nobody will read, now and later."""
        self._closed = True
        for partial in self.take():
            partial.image.payload.close()


async def send_events(
    send: Send,
    events: EventStream,
    task: asyncio.Task[TaskView],
    watch: asyncio.Future[None],
    request_id: str,
) -> bool:
    """Send events until the task is over; tell whether the client saw its end.

    Raises:
        GatewayError: the task failed before anything was sent.
    """
    out = _Out(send)
    if not await _send_partials(out, events, task, watch):
        return False
    try:
        pieces = _completed(task.result(), events.prefix)
    except GatewayError as error:
        if not out.started:
            raise
        pieces = iter([_error_event(error, request_id)])
    for piece in pieces:
        await out.send(piece)
        await asyncio.sleep(0)  # lets a disconnect that is already known be seen
        if watch.done():
            return False
    await send_chunk(send, b"", last=True)
    return True


async def _send_partials(
    out: _Out,
    events: EventStream,
    task: asyncio.Task[TaskView],
    watch: asyncio.Future[None],
) -> bool:
    # Until the task is over; tells whether the client is still there.
    while not task.done():
        await _wait(events, task, watch)
        if watch.done():
            return False
        partials = events.take()
        await _send_all(out, events, partials)
        if not partials and not task.done():
            await out.send(KEEP_ALIVE)
    await _send_all(out, events, events.take())
    return True


async def _send_all(out: _Out, events: EventStream, partials: list[Partial]) -> None:
    try:
        for partial in partials:
            await _send_partial(out, events, partial)
    finally:
        for partial in partials:
            partial.image.payload.close()


async def _wait(
    events: EventStream, task: asyncio.Task[TaskView], watch: asyncio.Future[None]
) -> None:
    # Partials that are waiting are taken by the caller.
    news = asyncio.ensure_future(events.wait())
    try:
        waited: set[asyncio.Future[Any]] = {news, task, watch}
        await asyncio.wait(
            waited,
            timeout=KEEP_ALIVE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
    finally:
        news.cancel()


@dataclass(slots=True)
class _Out:
    _send: Send
    started: bool = False

    async def send(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            await send_start(self._send, 200, HEADERS)
        await send_chunk(self._send, data, last=False)


async def _send_partial(out: _Out, stream: EventStream, partial: Partial) -> None:
    image = partial.image
    fields = _facts(stream.facts, image) | {
        "partial_image_index": partial.index,
        "created_at": stream.created_s,
    }
    try:
        for piece in _event(f"{stream.prefix}.partial_image", image, fields):
            await out.send(piece)
    finally:
        image.payload.close()


def _completed(view: TaskView, prefix: str) -> Iterator[bytes]:
    assert view.facts is not None
    shares = _shares(view.usage or Usage(), len(view.pictures))
    for picture, usage in zip(view.pictures, shares, strict=True):
        assert picture.made is not None
        fields = _facts(view.facts, picture.made) | {
            "created_at": view.created_s,
            "usage": token_counts(usage),
            "id": view.id,
            "index": picture.index,
        }
        yield from _event(f"{prefix}.completed", picture.made, fields)


def _facts(facts: Facts, image: MadeImage) -> dict[str, object]:
    return {
        "size": f"{image.width_px}x{image.height_px}",
        "quality": facts.quality,
        "background": facts.background,
        "output_format": image.media_type.removeprefix("image/"),
    }


def _event(name: str, image: MadeImage, fields: dict[str, object]) -> Iterator[bytes]:
    rest = msgspec.json.encode(fields)[1:]
    yield f'event: {name}\ndata: {{"type":"{name}","b64_json":"'.encode()
    yield from base64_chunks(image.payload)
    yield b'",' + rest + b"\n\n"


def _shares(usage: Usage, pictures: int) -> list[Usage]:
    # One total for all pictures: the events' usages add up to it.
    each = usage.shared(pictures)
    return [each] * (pictures - 1) + [usage.minus(each.times(pictures - 1))]


def _error_event(error: GatewayError, request_id: str) -> bytes:
    body = msgspec.json.decode(render_error(error, request_id, IMAGES).body)
    data = msgspec.json.encode({"type": "error", **body})
    return b"event: error\ndata: " + data + b"\n\n"
