"""Plain ASGI in and out: the note of a request, its body, its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias, cast

import msgspec
from litestar import Request
from litestar.types import Message, Receive, Scope, Send

from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    TooLargeError,
)
from gateway.core.outcomes import RequestOutcome

JSON_BODY_MAX_BYTES = 1024 * 1024
DRAIN_MAX_BYTES = 64 * 1024 * 1024
"""How much of a refused body is read and thrown away, so that the refusal arrives."""
DRAIN_MAX_S = 10.0
BODY_MAX_S = 60.0
STALLED_MAX_S = 60.0
"""A reader that takes nothing for so long is given up."""
NOTE = "imageway"
EXPONENT_MAX = 307
"""Of numbers in JSON: all below 1e308 fit into a double."""

AnyRequest: TypeAlias = Request[Any, Any, Any]
"""Litestar's request, whose user, auth and state are not used here."""


@dataclass(slots=True)
class RequestNote:
    """What is noted of a request while it is handled, for its answer and its log."""

    id: str
    started_ms: int
    received_s: int = 0
    task_id: str | None = None
    tenant_id: str | None = None
    key_id: str | None = None
    error_code: str | None = None
    client_gone: bool = False
    repeats: bool = False
    """It asked again for what an earlier request had begun."""
    address: str = ""
    """Where the request comes from."""
    operation: str | None = None
    """Of a request for pictures, until it has come to a task: that tells of its end."""
    variant: str | None = None
    mode: str = "sync"
    outcome: RequestOutcome | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def refused(self, error: GatewayError) -> None:
        """Note that an error is the answer."""
        self.error_code, self.outcome = error.code, error.counts_as
        self.client_gone = self.client_gone or isinstance(error, ClientGoneError)


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


def header_texts(scope: Scope) -> list[tuple[str, str]]:
    """Read all request headers, in order; names are in lower case."""
    return [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]


def header_list(scope: Scope, name: str) -> str:
    """Read a header that is a list: all its lines, joined as RFC 9110 5.3 has it."""
    wanted = name.lower().encode()
    lines = [value for key, value in scope["headers"] if key == wanted]
    return b", ".join(lines).decode("latin-1")


def whole_number(text: str | None, name: str, *, default: int, at_most: int) -> int:
    """Read a number of a query, 1 to ``at_most``; ``default`` where it is not given.

    Raises:
        InvalidRequestError: it is not one; more digits than ``at_most`` are none.
    """
    if text is None:
        return default
    short = text.isascii() and text.isdigit() and len(text) <= len(str(at_most))
    if not short or not 1 <= int(text) <= at_most:
        raise InvalidRequestError(
            f"{name} must be a whole number from 1 to {at_most:,}.", param=name
        )
    return int(text)


async def read_json(receive: Receive) -> object:
    """Read and decode a JSON body; a number with a fraction becomes a ``Decimal``.

    Raises:
        TooLargeError: it is over 1 MiB.
        InvalidRequestError: it is not JSON.
    """
    return decode_json(await read_body(receive, JSON_BODY_MAX_BYTES), exact=True)


async def read_texts_json(receive: Receive) -> object:
    """Read and decode a JSON body; a number with a fraction or exponent becomes a text.

    It is the text that was sent: a rule may tell 1.5e1 from 15.

    Raises:
        TooLargeError: it is over 1 MiB.
        InvalidRequestError: it is not JSON.
    """
    body = await read_body(receive, JSON_BODY_MAX_BYTES)
    try:
        return _TEXTS.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return decode_json(body)  # which says what is wrong


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Read a whole body, at most so many bytes of it.

    Raises:
        TooLargeError: it is longer.
        InvalidRequestError: it did not arrive in time.
    """
    body = bytearray()

    def take(chunk: bytes) -> None:
        if len(body) + len(chunk) > max_bytes:
            raise TooLargeError(
                f"The body may have at most {max_bytes:,} bytes.",
            )
        body.extend(chunk)

    await consume(receive, take)
    return bytes(body)


async def consume(
    receive: Receive, take: Callable[[bytes], None], *, max_s: float = BODY_MAX_S
) -> None:
    """Hand a body over in pieces, to its end.

    A piece that ``take`` refuses ends it, with what ``take`` raised; but first the rest
    is read and thrown away, within bounds: a client that is still writing would not
    read the refusal, but meet a reset.

    Raises:
        InvalidRequestError: the body did not arrive in time.
        ClientGoneError: the client hung up before it was whole.
    """
    refusal: GatewayError | None = None
    dropped_bytes = 0
    try:
        async with asyncio.timeout(max_s) as limit:
            async for chunk in body_chunks(receive):
                if refusal is not None:
                    dropped_bytes += len(chunk)
                    if dropped_bytes > DRAIN_MAX_BYTES:
                        break
                    continue
                try:
                    take(chunk)
                except GatewayError as error:
                    refusal = error
                    limit.reschedule(asyncio.get_running_loop().time() + DRAIN_MAX_S)
    except TimeoutError:
        refusal = refusal or InvalidRequestError(
            f"The body did not arrive within {max_s:.0f} s.", code="request_timeout"
        )
    if refusal is not None:
        raise refusal


def decode_json(body: bytes, *, exact: bool = False) -> object:
    """Decode JSON of any shape; ``exact`` makes each fraction a ``Decimal``.

    Raises:
        InvalidRequestError: it is not JSON, or nested deeper than the decoder goes.
    """
    try:
        return (_EXACT if exact else _PLAIN).decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if b"\\ud" in body.lower():
            return _with_surrogates(body, error)
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequestError(
            f"The body must be a JSON object; it could not be read: {why}.",
            code="invalid_json",
        ) from error


def _decimal(text: str) -> Decimal:
    # Within what other decoders take: 1e999 is no number to most of them.
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("Infinity")
    if not number.is_finite() or number.adjusted() > EXPONENT_MAX:
        raise ValueError("a number is out of range")
    return number


_PLAIN = msgspec.json.Decoder[object]()
_TEXTS = msgspec.json.Decoder[object](float_hook=str)
_EXACT = msgspec.json.Decoder[object](float_hook=_decimal)


def _with_surrogates(body: bytes, cause: Exception) -> object:
    # The fast decoder says of half a surrogate pair only that it is broken. The rules
    # of the request name the field that has one.
    def refused(constant: str) -> object:
        raise ValueError(constant)

    try:
        return cast(
            "object", json.loads(body, parse_float=_decimal, parse_constant=refused)
        )
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "The body must be a JSON object; it could not be read.",
            code="invalid_json",
        ) from cause


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield a body as it comes.

    Raises:
        ClientGoneError: the client hung up before it was whole.
    """
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
    outcome = RequestOutcome.CANCELLED

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


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


class StalledError(Exception):
    """The client has not read anything for too long: its connection is given up."""


async def send_chunk(send: Send, body: bytes, *, last: bool) -> None:
    """Send a part of the body; waits while the client reads slowly.

    Raises:
        StalledError: it has read nothing for ``STALLED_MAX_S``.
    """
    message = {"type": "http.response.body", "body": body, "more_body": not last}
    try:
        async with asyncio.timeout(STALLED_MAX_S):
            await send(cast("Message", message))
    except TimeoutError:
        raise StalledError from None
