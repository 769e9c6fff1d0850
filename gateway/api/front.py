"""Around every request: its id, its headers, its log line, and the last resort.

Plain ASGI, so that also what no route answers is counted and carries a request id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import internal_error, render_error
from gateway.api.http import NOTE, RequestNote, header_list, send_answer
from gateway.core.addresses import Network, client_address
from gateway.core.errors import GatewayError
from gateway.core.events import Asked, RequestFinished
from gateway.ports import Chance, Clock, Events

ID_ALPHABET = "0123456789abcdef"
ID_CHARS = 32
UNMATCHED = "unmatched"


@dataclass(frozen=True, slots=True)
class Front:
    """The outermost ASGI application.

    ``crashed`` is told of every error that nobody foresaw.
    """

    inner: ASGIApp
    clock: Clock
    chance: Chance
    events: Events
    crashed: Callable[[BaseException, str], None]
    leaving: Callable[[], bool] = lambda: False
    """Whether the process is about to stop: its connections are to be used no more."""
    trusted_proxies: Callable[[], tuple[Network, ...]] = tuple
    """Whose word is taken for where a request comes from."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the life span of the application."""
        if scope["type"] != ScopeType.HTTP:
            await self.inner(scope, receive, send)
            return
        note = RequestNote(
            id="req_" + self.chance.token(ID_ALPHABET, ID_CHARS),
            started_ms=self.clock.monotonic_ms(),
            received_s=self.clock.now_ms() // 1000,
            address=self._address(scope),
        )
        cast("dict[str, object]", scope)[NOTE] = note
        answer = _Answer(send, note, self.clock, self.leaving)
        try:
            await self._handle(scope, receive, answer, note)
        finally:
            self._tell(scope, note, answer.status)

    def _address(self, scope: Scope) -> str:
        client = cast("dict[str, object]", scope).get("client")
        peer = str(client[0]) if isinstance(client, list | tuple) else ""
        trusted = self.trusted_proxies()
        if not trusted:
            return peer
        forwarded = header_list(scope, "x-forwarded-for")
        return client_address(peer, forwarded, trusted)

    async def _handle(
        self, scope: Scope, receive: Receive, answer: _Answer, note: RequestNote
    ) -> None:
        try:
            await self.inner(scope, receive, answer)
        except GatewayError as error:
            await _refuse(answer, error, note, scope["path"])
        except Exception as error:  # noqa: BLE001 - the supervisor of every request
            self.crashed(error, note.id)
            await _refuse(answer, internal_error(), note, scope["path"])

    def _tell(self, scope: Scope, note: RequestNote, status: int) -> None:
        asked = None
        if note.operation is not None and note.outcome is not None:
            asked = Asked(note.operation, note.mode, note.variant)
        template = cast("dict[str, object]", scope).get("path_template")
        self.events.emit(
            RequestFinished(
                request_id=note.id,
                method=str(scope.get("method", "")),
                route=template if isinstance(template, str) else UNMATCHED,
                status=status,
                duration_ms=self.clock.monotonic_ms() - note.started_ms,
                error_code=note.error_code,
                task_id=note.task_id,
                tenant_id=note.tenant_id,
                key_id=note.key_id,
                client_gone=note.client_gone,
                repeats=note.repeats,
                asked=asked,
                outcome=note.outcome.value if asked and note.outcome else None,
            )
        )


async def _refuse(
    answer: _Answer, error: GatewayError, note: RequestNote, path: str
) -> None:
    note.refused(error)
    if answer.started:
        raise error  # half an answer is out: only a broken connection tells the truth
    rendered = render_error(error, note.id, path)
    await send_answer(answer, rendered.status, dict(rendered.headers), rendered.body)


class _Answer:
    """The way out: adds the headers that every answer has."""

    def __init__(
        self,
        send: Send,
        note: RequestNote,
        clock: Clock,
        leaving: Callable[[], bool],
    ) -> None:
        self._send = send
        self._note = note
        self._clock = clock
        self._leaving = leaving
        self.started = False
        self.status = 499

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            took_ms = self._clock.monotonic_ms() - self._note.started_ms
            extra = {
                "x-request-id": self._note.id,
                "openai-processing-ms": str(took_ms),
                "x-content-type-options": "nosniff",
                **self._note.headers,
            }
            if self._note.task_id is not None:
                extra["x-task-id"] = self._note.task_id
            if self._leaving():
                extra["connection"] = "close"
            raw = [(k.encode(), v.encode("latin-1")) for k, v in extra.items()]
            message["headers"] = [*message["headers"], *raw]
        await self._send(message)
