"""Reads answers whole: JSON of limited size, pictures in it straight into spools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager

import msgspec

from providers.kit.answers import Answer, AnswerReader, UnreadableAnswerError
from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.spool import SpoolFolder
from providers.kit.wire import Reply, scrub

JSON_MAX_BYTES = 4 * 1024 * 1024
"""Of an answer that is held in memory."""

Fields = Mapping[str, object]

_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decoded(body: bytes) -> object:
    """Decode a body; None when it is no JSON."""
    try:
        value: object = msgspec.json.decode(body)
    except _UNDECODABLE:
        return None
    return value


def as_object(value: object) -> Fields:
    """Take a decoded value for an object; an empty one when it is none."""
    return value if isinstance(value, dict) else {}


async def read_answer(reply: Reply, spools: SpoolFolder) -> Answer:
    """Read a success that may hold pictures; whoever gets it closes it.

    Raises:
        ProviderError: BAD_GATEWAY it cannot be used, RESULT_LOST we have no room.
    """
    reader = AnswerReader(spools)
    try:
        with readable(reply):
            async with aclosing(reply.chunks()) as chunks:
                async for chunk in chunks:
                    reader.feed(chunk)
            return reader.finish()
    finally:
        reader.close()


async def read_object(reply: Reply, *, secret: str) -> Fields:
    """Read a success that is an object of at most ``JSON_MAX_BYTES``.

    Raises:
        ProviderError: BAD_GATEWAY, it is none.
    """
    body = bytearray()
    async with aclosing(reply.chunks()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > JSON_MAX_BYTES:
                told = f"more than {JSON_MAX_BYTES} bytes"
                raise unreadable(told, reply.status, secret)
    try:
        value = msgspec.json.decode(body)
    except _UNDECODABLE as error:
        raise unreadable(f"not JSON: {error}", reply.status, secret) from error
    if not isinstance(value, dict):
        raise unreadable("no object", reply.status, secret)
    return value


@contextmanager
def readable(reply: Reply) -> Iterator[None]:
    """Say in the contract's words why an answer cannot be taken in."""
    try:
        yield
    except UnreadableAnswerError as error:
        raise unreadable(str(error), reply.status) from error
    except OSError as error:
        raise ProviderError(
            FailureKind.RESULT_LOST, f"no room for the answer: {error.strerror}"
        ) from error


def unreadable(detail: str, status: int, secret: str = "") -> ProviderError:
    """Say that a success is none; it may have been billed."""
    return ProviderError(
        FailureKind.BAD_GATEWAY,
        scrub(f"{status} with what cannot be used: {detail}", secret),
        status=status,
        billed=Billed.MAYBE,
    )
