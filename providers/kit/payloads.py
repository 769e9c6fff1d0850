"""Reads a payload as the file itself or as base64, whatever it is encoded as."""

from __future__ import annotations

import binascii
from collections.abc import Iterator

from providers.kit.contract import Payload


class BrokenBase64Error(ValueError):
    """The text of a payload is no base64."""


def raw_chunks(payload: Payload) -> Iterator[bytes]:
    """Yield the bytes of the file, base64 decoded on the way.

    Raises:
        BrokenBase64Error: as soon as it shows; what was yielded before stands.
        OSError: the payload cannot be read.
        ValueError: the payload is closed.
    """
    if payload.encoding == "raw":
        yield from payload.chunks()
        return
    rest = b""
    for chunk in payload.chunks():
        text = rest + chunk
        whole = len(text) - len(text) % 4
        rest = text[whole:]
        try:
            yield binascii.a2b_base64(text[:whole], strict_mode=True)
        except binascii.Error as error:
            raise BrokenBase64Error(f"broken base64: {error}") from error
    if rest:
        raise BrokenBase64Error("base64 that is cut off")


def raw_length(payload: Payload) -> int:
    """Length of what ``raw_chunks`` yields, in bytes.

    Raises:
        OSError: the payload cannot be read.
        ValueError: the payload is closed.
    """
    if payload.encoding == "raw":
        return payload.size_bytes
    end = b""
    for chunk in payload.chunks():
        end = (end + chunk)[-2:]
    padding = len(end) - len(end.rstrip(b"="))
    return payload.size_bytes // 4 * 3 - padding


def base64_chunks(payload: Payload) -> Iterator[bytes]:
    """Yield the file as base64 text; text that came as such is passed on.

    Raises:
        OSError: the payload cannot be read.
        ValueError: the payload is closed.
    """
    if payload.encoding == "base64":
        yield from payload.chunks()
        return
    rest = b""
    for chunk in payload.chunks():
        raw = rest + chunk
        whole = len(raw) // 3 * 3
        yield binascii.b2a_base64(raw[:whole], newline=False)
        rest = raw[whole:]
    yield binascii.b2a_base64(rest, newline=False)


def base64_length(payload: Payload) -> int:
    """Length of what ``base64_chunks`` yields, in bytes."""
    size_bytes = payload.size_bytes
    return size_bytes if payload.encoding == "base64" else -(-size_bytes // 3) * 4
