"""``/v1/images/generations`` and ``/v1/images/edits``: decode, call one flow, answer.

Plain ASGI handlers: bodies are spooled while they come in, answers are streamed from
the spools, and the client is watched while it waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from gateway.api.door import count_request, key_of
from gateway.api.events import EventStream, send_events
from gateway.api.forms import Form, FormLimits, boundary_of, read_form
from gateway.api.http import (
    RequestNote,
    StalledError,
    disconnected,
    header,
    header_list,
    header_texts,
    note_of,
    send_answer,
    send_chunk,
    send_start,
)
from gateway.api.lifting import read_lifted
from gateway.api.links import Links
from gateway.api.render import InlineAnswer, Renderer
from gateway.core.catalogue import Catalogue
from gateway.core.delivery import Delivery, delivery_of, surely_sync
from gateway.core.errors import GatewayError, InvalidRequestError, storage_full
from gateway.core.idempotency import fingerprint, parse_key
from gateway.core.images import IMAGE_MAX_BYTES
from gateway.core.key_limits import KeyScope, check_model
from gateway.core.preferences import (
    Said,
    check_said,
    parse_headers,
    strange_headers,
)
from gateway.core.requests import (
    IGNORED_MAX,
    ImageRequest,
    parse_edit,
    parse_edit_form,
    parse_generation,
)
from gateway.core.tasks import DeliveryMode
from gateway.core.terms import priced
from gateway.core.webhooks import CallbackRules, check_callback_url
from gateway.flows.admission import Admission
from gateway.flows.generate import (
    NOT_ONCE,
    Accepted,
    Generate,
    Later,
    Once,
    Repeated,
    facts_of,
    wish_of,
)
from gateway.flows.inputs import NO_INPUTS, Inputs, KeptInputs, LoadInputs
from gateway.flows.keys import Authenticate
from gateway.flows.line import Place
from gateway.flows.replay import Replay
from gateway.flows.results import Results
from gateway.flows.tasks import TaskView
from gateway.ports import Key, Spools
from providers.kit.contract import Operation, Partial, Payload

JSON = {"content-type": "application/json"}
IGNORED_PARAMS = "x-gateway-ignored-params"
LARGE_BODY_BYTES = 1024 * 1024
"""A body over it, or of unknown length, is not read for a request that has no place."""
RETRY_COUNT = "x-stainless-retry-count"
"""OpenAI's libraries count in it how often they tried again by themselves."""
FORM_LIMITS = FormLimits(files=17, file_max_bytes=IMAGE_MAX_BYTES)
IMAGE_FIELDS = ("image", "image[]")
_RETRIES = re.compile("0*[1-9][0-9]*")
"""A count above 0, however long: it is not worth being made a number."""


class MethodNotAllowedError(GatewayError):
    """The route is there, the method is not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Runner(Protocol):
    """Carries tasks out to their end, whatever the client does."""

    def start(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None = None,
    ) -> asyncio.Task[TaskView]:
        """Start carrying a task out."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and the files that came with it."""

    request: ImageRequest
    brought: Sequence[Payload] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, how it is to be delivered, and what makes it one of a kind."""

    request: ImageRequest
    delivery: Delivery
    once: Once = NOT_ONCE


@dataclass(frozen=True, slots=True)
class Images:
    """What both image routes do, once their body is read."""

    catalogue: Catalogue
    authenticate: Authenticate
    generate: Generate
    admission: Admission
    load_inputs: LoadInputs
    runner: Runner
    results: Results
    links: Links
    renderer: Renderer
    spools: Spools
    replay: Replay
    kept_inputs: KeptInputs
    callback_rules: CallbackRules
    wake_worker: Callable[[], None]
    storage_trouble: Callable[[], Awaitable[str | None]]
    tenants_may_choose: bool = False
    """Whether tenants may say where their requests go."""

    async def generations(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of the generation route."""
        note_of(scope).operation = Operation.GENERATE.value
        key = await self._key(scope)
        await self._check_large(scope, key, Operation.GENERATE)
        body = await read_lifted(receive, self.spools)
        try:
            self._note_variant(scope, body.json)
            request = parse_generation(body.json, self.catalogue)
            work = await self._start(scope, key, Asked(request, body.spools))
        finally:
            body.close()
        await self._answer(scope, receive, send, work)

    async def edits(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request of the edit route: a form, or JSON."""
        note_of(scope).operation = Operation.EDIT.value
        key = await self._key(scope)
        if await self.storage_trouble() is not None:
            raise storage_full()  # before 800 MB are taken in
        await self._check_large(scope, key, Operation.EDIT)
        await self.generate.check_any_credits(key)
        work = await self._edit(scope, receive, key)
        await self._answer(scope, receive, send, work)

    async def _key(self, scope: Scope) -> Key:
        note = note_of(scope)
        note.task_id = self.generate.new_task_id()
        if scope["method"] != "POST":  # type: ignore[typeddict-item]
            note.headers["allow"] = "POST"
            raise MethodNotAllowedError("Use POST on this route.")
        key = await key_of(self.authenticate, scope, KeyScope.IMAGES)
        await count_request(self.authenticate, scope, key)
        return key

    async def _check_large(self, scope: Scope, key: Key, operation: Operation) -> None:
        # Refused before it is read: what is surely new, surely sync, and takes long
        # to read. Anything else is read first, to learn what it is.
        length = header(scope, "content-length") or ""
        if length.isascii() and length.isdigit() and int(length) <= LARGE_BODY_BYTES:
            return
        repeats = header(scope, "idempotency-key") or _is_retry(scope)
        prefer = header_list(scope, "prefer")
        if not repeats and surely_sync(prefer, key.delivery):
            await self.admission.check_any(key.tenant_id, operation)

    async def _edit(self, scope: Scope, receive: Receive, key: Key) -> Work:
        content_type = header(scope, "content-type")
        boundary = boundary_of(content_type)
        if boundary is not None:
            form = await read_form(receive, boundary, self.spools, FORM_LIMITS)
            work = None
            try:
                self._note_variant(scope, form.texts)
                work = await self._start(scope, key, _from_form(form, self.catalogue))
            finally:
                if work is None or not work.has_files:
                    form.close()
            return work
        if "json" not in (content_type or "").lower():
            raise InvalidRequestError(
                "Send multipart/form-data with the image files, or application/json.",
                code="unsupported_content_type",
            )
        body = await read_lifted(receive, self.spools)
        try:
            self._note_variant(scope, body.json)
            request = parse_edit(body.json, self.catalogue)
            return await self._start(scope, key, Asked(request, body.spools))
        finally:
            body.close()

    def _note_variant(self, scope: Scope, body: object) -> None:
        # Before anything of it is checked: refusals are counted by it too.
        named = body.get("model") if isinstance(body, Mapping) else None
        found = self.catalogue.variant(named) if isinstance(named, str) else None
        note_of(scope).variant = found.name if found is not None else None

    async def _start(self, scope: Scope, key: Key, asked: Asked) -> Work:
        note = note_of(scope)
        check_model(key.limits, asked.request.variant.name)
        headers = header_texts(scope)
        said = Said(parse_headers(headers), asked.request.routing, key.routing)
        check_said(
            said,
            asked.request.variant.name,
            self.catalogue,
            tenants_may_choose=self.tenants_may_choose,
        )
        request = replace(
            asked.request,
            routing=said.together,
            variant=priced(asked.request.variant, key.terms),
        )
        asked = replace(asked, request=request)
        if request.callback_url is not None:
            check_callback_url(request.callback_url, self.callback_rules)
        ignored = [*request.ignored, *strange_headers(headers)][:IGNORED_MAX]
        if ignored:
            note.headers[IGNORED_PARAMS] = ", ".join(ignored)
        delivery = delivery_of(header_list(scope, "prefer"), request, key.delivery)
        note.headers["x-gateway-mode"] = note.mode = delivery.mode.value
        note.operation, note.variant = request.operation.value, request.variant.name
        once = await _once(scope, asked)
        repeated = await self.replay.find(once, key)
        if repeated is not None:
            return self._joined(note, key, Ask(request, delivery), repeated)
        return await self._new(scope, key, asked, Ask(request, delivery, once))

    async def _new(self, scope: Scope, key: Key, asked: Asked, ask: Ask) -> Work:
        note, request = note_of(scope), ask.request
        self.generate.check_route(request)
        if ask.delivery.mode is DeliveryMode.SYNC:
            place = await self.admission.enter(
                key.tenant_id, request.variant.name, wish_of(request), request.routing
            )
            try:
                return await self._sync(scope, key, asked, ask, place)
            except BaseException:
                self.admission.line.leave(place)
                raise
        self.admission.check_new(request.variant.name, key.tenant_id)
        inputs = await self._inputs(key, asked)
        try:
            accepted = await self._enqueued(scope, key, ask, inputs)
        finally:
            inputs.close()
        if isinstance(accepted, Repeated):
            return self._joined(note, key, ask, accepted.task_id)
        assert note.task_id is not None
        return self._queued(note, key, ask, note.task_id)

    async def _inputs(self, key: Key, asked: Asked) -> Inputs:
        if await self.storage_trouble() is not None:
            raise storage_full()
        if not asked.request.references:
            return NO_INPUTS
        await self.generate.check_credits(asked.request, key)
        return await self.load_inputs(asked.request, key.tenant_id, asked.brought)

    async def _sync(
        self, scope: Scope, key: Key, asked: Asked, ask: Ask, place: Place
    ) -> Work:
        note = note_of(scope)
        assert note.task_id is not None
        inputs = await self._inputs(key, asked)
        try:
            accepted = await self.generate.accept(
                note.task_id, ask.request, key, inputs, ask.once
            )
        except BaseException:
            inputs.close()
            raise
        if isinstance(accepted, Repeated):
            inputs.close()
            self.admission.line.leave(place)
            return self._joined(note, key, ask, accepted.task_id)
        note.operation = None
        return self._started(replace(accepted, place=place), ask)

    async def _enqueued(
        self, scope: Scope, key: Key, ask: Ask, inputs: Inputs
    ) -> Accepted | Repeated:
        # The pictures are stored before the task is there for a worker to take.
        task_id = note_of(scope).task_id
        assert task_id is not None
        accepted = None
        try:
            await self.kept_inputs.keep(task_id, inputs)
            later = Later(self.links.origin(scope))
            accepted = await self.generate.accept(
                task_id, ask.request, key, inputs, ask.once, later
            )
        finally:
            if not isinstance(accepted, Accepted):
                await self.kept_inputs.forget(task_id)
        self.wake_worker()
        return accepted

    def _started(self, accepted: Accepted, ask: Ask) -> Work:
        request = ask.request
        events = _events(request, accepted.task.created_ms // 1000)
        as_links = request.response_format == "url" and events is None
        task = self.runner.start(
            accepted,
            links=as_links,
            on_partial=events.on_partial if events is not None else None,
        )
        kept = ask.once.idempotency_key is not None
        return Work(task, as_links=as_links, events=events, kept=kept, has_files=True)

    def _queued(self, note: RequestNote, key: Key, ask: Ask, task_id: str) -> Work:
        # An async task: answered with itself, or within the time that was preferred.
        note.operation = None
        if ask.delivery.wait_s is None:
            read = self.replay.read(task_id, key)
            return Work(asyncio.ensure_future(read), as_links=True, kept=True)
        note.headers["preference-applied"] = f"wait={ask.delivery.wait_s}"
        as_links = ask.request.response_format == "url"
        joined = self.replay.join(
            task_id, key, links=as_links, within_s=ask.delivery.wait_s
        )
        return Work(asyncio.ensure_future(joined), as_links=as_links, kept=True)

    def _joined(self, note: RequestNote, key: Key, ask: Ask, task_id: str) -> Work:
        note.task_id, note.operation, note.repeats = task_id, None, True
        note.headers["idempotency-replayed"] = "true"
        if ask.delivery.mode is DeliveryMode.ASYNC:
            return self._queued(note, key, ask, task_id)
        events = _events(ask.request, note.received_s)
        as_links = ask.request.response_format == "url" and events is None
        joined = self.replay.join(task_id, key, links=as_links)
        task = asyncio.ensure_future(joined)
        return Work(task, as_links=as_links, events=events, kept=True)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, work: Work
    ) -> None:
        note = note_of(scope)
        watch = asyncio.ensure_future(disconnected(receive))
        try:
            if work.events is not None:
                await self._answer_events(note, send, work, work.events, watch)
            elif await _waited(note, work.task, watch):
                await self._answer_whole(scope, send, work, watch)
        except StalledError:
            note.client_gone = True  # half an answer is out: the server hangs up
        finally:
            note.client_gone = note.client_gone or watch.done()
            watch.cancel()

    async def _answer_whole(
        self, scope: Scope, send: Send, work: Work, watch: asyncio.Future[None]
    ) -> None:
        view = work.task.result()
        try:
            if work.as_links or not view.state.final:
                body = self.renderer.task(view, self.links.to(scope))
                await send_answer(send, 200, JSON, msgspec.json.encode(body))
            elif (
                await _sent_whole(send, self.renderer.inline(view), watch)
                and not work.kept
            ):
                self.results.sent(view.pictures)
        finally:
            close_pictures(view)

    async def _answer_events(
        self,
        note: RequestNote,
        send: Send,
        work: Work,
        events: EventStream,
        watch: asyncio.Future[None],
    ) -> None:
        sent = False
        try:
            sent = await send_events(send, events, work.task, watch, note.id)
        finally:
            events.close()
            if not work.task.done():
                work.task.add_done_callback(_close_later)
            elif not work.task.cancelled() and work.task.exception() is None:
                view = work.task.result()
                if sent and not work.kept:
                    self.results.sent(view.pictures)
                close_pictures(view)


@dataclass(frozen=True, slots=True)
class Work:
    """A task under way, and how its answer goes out."""

    task: asyncio.Task[TaskView]
    as_links: bool
    events: EventStream | None = None
    kept: bool = False
    """Its pictures stay, whether or not the answer arrives: for repetitions."""
    has_files: bool = False
    """Whether the files that came with the request are the task's now, to be closed."""


async def _waited(
    note: RequestNote, task: asyncio.Task[TaskView], watch: asyncio.Future[None]
) -> bool:
    """Wait for the task; tell whether the client is still there."""
    waited: set[asyncio.Future[Any]] = {task, watch}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return True
    note.client_gone = True
    task.add_done_callback(_close_later)
    return False


async def _sent_whole(
    send: Send, answer: InlineAnswer, watch: asyncio.Future[None]
) -> bool:
    """Stream an answer out; tell whether the client was there to the end."""
    length = str(answer.length_bytes)
    await send_start(send, 200, JSON | {"content-length": length})
    for chunk in answer.chunks():
        await send_chunk(send, chunk, last=False)
        await asyncio.sleep(0)  # lets a disconnect that is already known be seen
        if watch.done():
            return False
    here = not watch.done()
    await send_chunk(send, b"", last=True)
    return here


def _from_form(form: Form, catalogue: Catalogue) -> Asked:
    images = [file.spool for file in form.files if file.name in IMAGE_FIELDS]
    masks = [file.spool for file in form.files if file.name == "mask"]
    if len(masks) > 1:
        raise InvalidRequestError("There may be one mask.", param="mask")
    others = [
        file.name for file in form.files if file.name not in {*IMAGE_FIELDS, "mask"}
    ]
    if others:
        raise InvalidRequestError(
            f"There is a file in the field {others[0][:64]!r}. Send one picture as "
            "image, several as image[], and a mask as mask.",
            param=others[0][:64],
        )
    request = parse_edit_form(form.texts, len(images), catalogue, has_mask=bool(masks))
    return Asked(request, [*images, *masks])


async def _once(scope: Scope, asked: Asked) -> Once:
    # Contents are hashed in a thread: a request may bring 800 MB.
    digests = [await asyncio.to_thread(_digest, payload) for payload in asked.brought]
    return Once(
        fingerprint=fingerprint(asked.request, digests),
        idempotency_key=parse_key(header(scope, "idempotency-key")),
        is_retry=_is_retry(scope),
    )


def _is_retry(scope: Scope) -> bool:
    return _RETRIES.fullmatch(header(scope, RETRY_COUNT) or "") is not None


def _digest(payload: Payload) -> str:
    digest = hashlib.sha256()
    for chunk in payload.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _events(request: ImageRequest, created_s: int) -> EventStream | None:
    if not request.stream:
        return None
    return EventStream(request.operation, facts_of(request), created_s)


def _close_later(work: asyncio.Task[TaskView]) -> None:
    if not work.cancelled() and work.exception() is None:
        close_pictures(work.result())


def close_pictures(view: TaskView) -> None:
    """Give the spools of an answer's pictures back."""
    for picture in view.pictures:
        if picture.made is not None:
            picture.made.payload.close()


def image_routes(images: Images) -> list[ASGIRouteHandler]:
    """Route the image endpoints."""

    @asgi("/v1/images/generations", copy_scope=False)
    async def generations(scope: Scope, receive: Receive, send: Send) -> None:
        await images.generations(scope, receive, send)

    @asgi("/v1/images/edits", copy_scope=False)
    async def edits(scope: Scope, receive: Receive, send: Send) -> None:
        await images.edits(scope, receive, send)

    return [generations, edits]
