"""``POST /v1/images/generations``: decode, call one flow, answer.

A plain ASGI handler: the answer is streamed from the spools, and the client is watched
while it waits.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from gateway.api.http import (
    disconnected,
    header,
    note_of,
    read_json,
    send_answer,
    send_chunk,
    send_start,
)
from gateway.api.links import Links
from gateway.api.render import InlineAnswer, Renderer
from gateway.core.catalogue import Catalogue
from gateway.core.errors import GatewayError, InvalidRequestError
from gateway.core.requests import ImageRequest, parse_generation
from gateway.flows.generate import Accepted, Generate
from gateway.flows.keys import Authenticate
from gateway.flows.results import Results
from gateway.flows.tasks import TaskView

JSON = {"content-type": "application/json"}
IGNORED_PARAMS = "x-gateway-ignored-params"


class MethodNotAllowedError(GatewayError):
    """The route is there, the method is not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Runner(Protocol):
    """Carries tasks out to their end, whatever the client does."""

    def check_room(self) -> None:
        """Refuse new work while as much as may be is under way."""
        ...

    def start(self, accepted: Accepted, *, links: bool) -> asyncio.Task[TaskView]:
        """Start carrying a task out."""
        ...


@dataclass(frozen=True, slots=True)
class Generations:
    """The endpoint of ``POST /v1/images/generations``."""

    catalogue: Catalogue
    authenticate: Authenticate
    generate: Generate
    runner: Runner
    results: Results
    links: Links
    renderer: Renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        note = note_of(scope)
        if scope["method"] != "POST":  # type: ignore[typeddict-item]
            note.headers["allow"] = "POST"
            raise MethodNotAllowedError("Use POST on this route.")
        note.task_id = self.generate.new_task_id()
        key = await self.authenticate(header(scope, "authorization"))
        note.tenant_id, note.key_id = key.tenant_id, key.id
        request = parse_generation(await read_json(receive), self.catalogue)
        _only_what_works(request)
        if request.ignored:
            note.headers[IGNORED_PARAMS] = ", ".join(request.ignored)
        note.headers["x-gateway-mode"] = "sync"
        self.runner.check_room()
        accepted = await self.generate.accept(note.task_id, request, key)
        as_links = request.response_format == "url"
        work = self.runner.start(accepted, links=as_links)
        watch = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                note.client_gone = True
                work.add_done_callback(_close_pictures)
                return
            await self._answer(scope, send, work.result(), watch, as_links=as_links)
        finally:
            note.client_gone = note.client_gone or watch.done()
            watch.cancel()

    async def _answer(
        self,
        scope: Scope,
        send: Send,
        view: TaskView,
        watch: asyncio.Future[None],
        *,
        as_links: bool,
    ) -> None:
        try:
            if as_links:
                body = self.renderer.task(view, self.links.to(scope))
                await send_answer(send, 200, JSON, msgspec.json.encode(body))
            elif await _sent_whole(send, self.renderer.inline(view), watch):
                await self.results.sent(view.pictures)
        finally:
            _close(view)


async def _sent_whole(
    send: Send, answer: InlineAnswer, watch: asyncio.Future[None]
) -> bool:
    """Stream an answer out; tell whether the client was there to the end."""
    length = str(answer.length_bytes)
    await send_start(send, 200, JSON | {"content-length": length})
    for chunk in answer.chunks():
        await send_chunk(send, chunk, last=False)
        if watch.done():
            return False
    await asyncio.sleep(0)  # lets a disconnect that is already known be seen
    here = not watch.done()
    await send_chunk(send, b"", last=True)
    return here


def _only_what_works(request: ImageRequest) -> None:
    # Better refused than a picture that is not what was asked for, and paid.
    not_yet = {
        "image_urls": bool(request.image_urls),
        "callback_url": request.callback_url is not None,
        "stream": request.stream,
    }
    for param, asked in not_yet.items():
        if asked:
            raise InvalidRequestError(
                f"{param} is not supported by this version of the gateway. "
                "Leave it out.",
                param=param,
                code="unsupported_parameter",
            )


def _close_pictures(work: asyncio.Task[TaskView]) -> None:
    if not work.cancelled() and work.exception() is None:
        _close(work.result())


def _close(view: TaskView) -> None:
    for picture in view.pictures:
        if picture.made is not None:
            picture.made.payload.close()


def image_routes(endpoint: Generations) -> list[ASGIRouteHandler]:
    """Route the image endpoints."""

    @asgi("/v1/images/generations", copy_scope=False)
    async def generations(scope: Scope, receive: Receive, send: Send) -> None:
        await endpoint(scope, receive, send)

    return [generations]
