"""Plain ASGI in and out: the note of a request, its body, its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import msgspec
from litestar import Request
from litestar.types import Message, Receive, Scope, Send

from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    TooLargeError,
)

JSON_BODY_MAX_BYTES = 1024 * 1024
DRAIN_MAX_BYTES = 64 * 1024 * 1024
"""How much of a refused body is read and thrown away, so that the refusal arrives."""
DRAIN_MAX_S = 10.0
BODY_MAX_S = 60.0
NOTE = "imageway"

AnyRequest: TypeAlias = Request[Any, Any, Any]
"""Litestar's request, whose user, auth and state are not used here."""


@dataclass(slots=True)
class RequestNote:
    """What is noted of a request while it is handled, for its answer and its log."""

    id: str
    started_ms: int
    task_id: str | None = None
    tenant_id: str | None = None
    key_id: str | None = None
    error_code: str | None = None
    client_gone: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def note_of(scope: Scope) -> RequestNote:
    """Find the note that the front put into a request's scope."""
    found = cast("dict[str, object]", scope)[NOTE]
    assert isinstance(found, RequestNote)
    return found


def header(scope: Scope, name: str) -> str | None:
    """Read a request header; None if it is not there."""
    wanted = name.lower().encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return value.decode("latin-1")
    return None


async def read_json(receive: Receive) -> object:
    """Read and decode a JSON body.

    Raises:
        TooLargeError: it is over 1 MiB.
        InvalidRequestError: it is not JSON.
    """
    return decode_json(await read_body(receive, JSON_BODY_MAX_BYTES))


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Read a whole body, at most so many bytes of it."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_MAX_S):
            async for chunk in _chunks(receive):
                size += len(chunk)
                if size > max_bytes:
                    break
                chunks.append(chunk)
    except TimeoutError:
        raise InvalidRequestError(
            f"The body did not arrive within {BODY_MAX_S:.0f} s.",
            code="request_timeout",
        ) from None
    if size > max_bytes:
        await _drain(receive)
        raise TooLargeError(
            f"The body may have at most {max_bytes:,} bytes. "
            "Send pictures by URL or as multipart instead of inside the JSON."
        )
    return b"".join(chunks)


def decode_json(body: bytes) -> object:
    """Decode JSON of any shape.

    Raises:
        InvalidRequestError: it is not JSON, or nested deeper than the decoder goes.
    """
    try:
        return cast("object", msgspec.json.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(
            f"The body must be a JSON object; it could not be read: {why}.",
            code="invalid_json",
        ) from error


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        yield message["body"]
        if not message["more_body"]:
            return


class ClientGoneError(GatewayError):
    """The client hung up before its request was whole. Nobody reads the answer."""

    status = 499
    type = "invalid_request_error"
    code = "client_closed_request"

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


async def _drain(receive: Receive) -> None:
    # A client that is still writing would not read the refusal, but meet a reset.
    size = 0
    try:
        async with asyncio.timeout(DRAIN_MAX_S):
            async for chunk in _chunks(receive):
                size += len(chunk)
                if size > DRAIN_MAX_BYTES:
                    return
    except TimeoutError:
        return


async def disconnected(receive: Receive) -> None:
    """Wait until the client hangs up. To be called after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_answer(
    send: Send, status: int, headers: dict[str, str], body: bytes
) -> None:
    """Send a whole answer."""
    await send_start(send, status, {**headers, "content-length": str(len(body))})
    await send_chunk(send, body, last=True)


async def send_start(send: Send, status: int, headers: dict[str, str]) -> None:
    """Send status and headers."""
    raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()]
    message = {"type": "http.response.start", "status": status, "headers": raw}
    await send(cast("Message", message))


async def send_chunk(send: Send, body: bytes, *, last: bool) -> None:
    """Send a part of the body; waits while the client reads slowly."""
    message = {"type": "http.response.body", "body": body, "more_body": not last}
    await send(cast("Message", message))
