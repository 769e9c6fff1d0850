"""Reads a JSON body with a picture in its ``base64_data``, without holding the picture.

While the body comes in, the text of that field is decoded into a spool; the rest of the
body is small and is decoded as JSON at the end, with an empty text in its place.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass, field

import msgspec
from litestar.types import Receive

from gateway.api.http import JSON_BODY_MAX_BYTES, consume, decode_json
from gateway.core.errors import InvalidRequestError, TooLargeError
from gateway.core.images import IMAGE_MAX_BYTES, too_large
from gateway.ports import WritableSpool
from providers.kit.spool import SpoolLimitError

BODY_MAX_BYTES = 72 * 1024 * 1024
"""50 MB as base64 in JSON, with room for escaped slashes and line breaks."""
BODY_MAX_S = 600.0
DATA_URL_HEAD_MAX_CHARS = 256
FIELD = b"base64_data"

_TEXT = re.compile(rb'[^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+', re.DOTALL)
_ESCAPE_MAX_BYTES = 6


async def read_base64_upload(
    receive: Receive, into: WritableSpool
) -> dict[str, object]:
    """Decode the picture of a body into a spool; returns the body's other fields.

    Raises:
        TooLargeError: the picture, or the body, is over its limit.
        InvalidRequestError: it is no JSON object, or carries no base64.
    """
    reader = _Reader(_Decoder(into))
    await consume(receive, reader.feed, max_s=BODY_MAX_S)
    return reader.finish()


@dataclass(slots=True)
class _Decoder:
    """Takes base64, or a data URL, in pieces of any length."""

    into: WritableSpool
    head: bytes | None = b""
    rest: bytes = b""
    padded: bool = False

    def feed(self, text: bytes) -> None:
        if self.head is None:
            self._decode(self.rest + text)
            return
        self.head += text
        if len(self.head) >= DATA_URL_HEAD_MAX_CHARS:
            self._end_head(self.head)

    def finish(self) -> None:
        if self.head is not None:
            self._end_head(self.head)
        self._decode(self.rest + b"=" * (-len(self.rest) % 4))  # some leave it out
        if not self.into.size_bytes:
            raise no_base64()

    def _end_head(self, head: bytes) -> None:
        self.head = None
        self._decode(_without_data_head(head))

    def _decode(self, text: bytes) -> None:
        if not text:
            return
        if self.padded:
            raise no_base64()
        whole = len(text) - len(text) % 4
        self.rest = text[whole:]
        self.padded = text[:whole].endswith(b"=")
        try:
            self.into.append(binascii.a2b_base64(text[:whole], strict_mode=True))
        except binascii.Error as error:
            raise no_base64() from error
        except SpoolLimitError as error:
            raise too_large("base64_data") from error


@dataclass(slots=True)
class _Reader:
    # Goes through the JSON string by string. ``text`` is the string being read, as far
    # as a field's name may go; ``colon`` says that nothing else came after the last.
    decoder: _Decoder
    kept: bytearray = field(default_factory=bytearray)
    length: int = 0
    rest: bytes = b""
    depth: int = 0
    text: bytes | None = None
    last_text: bytes = b""
    colon: bool = False
    inside: bool = False
    found: bool = False

    def feed(self, chunk: bytes) -> None:
        self.length += len(chunk)
        if self.length > BODY_MAX_BYTES:
            raise TooLargeError(
                f"The body may have at most {BODY_MAX_BYTES:,} bytes, the picture in "
                f"it {IMAGE_MAX_BYTES:,}."
            )
        data, self.rest = self.rest + chunk, b""
        while data:
            if self.text is None:
                data = self._between(data)
            else:
                data = self._through_text(data, self.text)

    def finish(self) -> dict[str, object]:
        self._keep(self.rest)
        fields = decode_json(bytes(self.kept))
        if not isinstance(fields, dict):
            raise InvalidRequestError(
                "The body must be a JSON object.", code="invalid_body"
            )
        if not self.found:
            raise no_base64()
        return {key: value for key, value in fields.items() if key != FIELD.decode()}

    def _between(self, data: bytes) -> bytes:
        gap, quote, after = data.partition(b'"')
        self._keep(gap + quote)
        self.depth += gap.count(b"{") + gap.count(b"[")
        self.depth -= gap.count(b"}") + gap.count(b"]")
        if signs := gap.strip(b" \t\r\n"):
            self.colon = signs == b":"
        if quote:
            self.text = b""
            self.inside = self.colon and self.depth == 1 and self.last_text == FIELD
            if self.inside and self.found:
                raise InvalidRequestError(
                    "base64_data is there twice. Send one picture.",
                    param="base64_data",
                )
        return after

    def _through_text(self, data: bytes, text: bytes) -> bytes:
        end = _text_end(data)
        if self.inside:
            self.decoder.feed(_plain(data[:end]))
        else:
            self._keep(data[:end])
            self.text = (text + data[:end])[: len(FIELD) + 1]
        if end == len(data):
            return b""
        if data[end : end + 1] == b'"':
            self._end_text()
            return data[end + 1 :]
        self.rest = data[end:]  # an escape whose other half is still to come
        return b""

    def _end_text(self) -> None:
        self._keep(b'"')
        if self.inside:
            self.decoder.finish()
            self.found = True
        self.last_text, self.text = self.text or b"", None
        self.colon = self.inside = False

    def _keep(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > JSON_BODY_MAX_BYTES:
            raise TooLargeError(
                f"The body may have at most {JSON_BODY_MAX_BYTES:,} bytes beside its "
                "base64_data."
            )


def _text_end(data: bytes) -> int:
    """Find where a string ends, or an escape of it that is not whole."""
    found = _TEXT.match(data)
    end = found.end() if found else 0
    broken = data[end : end + 1] == b"\\" and len(data) - end >= _ESCAPE_MAX_BYTES
    if broken:
        raise InvalidRequestError(
            "The body must be a JSON object; it could not be read: a text in it has "
            "an invalid escape.",
            code="invalid_json",
        )
    return end


def _plain(text: bytes) -> bytes:
    """Undo the escapes of some encoders: slashes, line breaks, signs by number."""
    if b"\\" in text:
        try:
            decoded = msgspec.json.decode(b'"' + text + b'"', type=str)
        except (msgspec.MsgspecError, ValueError) as error:
            raise no_base64() from error
        text = decoded.encode("ascii", "replace").translate(None, b"\r\n\t")
    return text.replace(b" ", b"")


def _without_data_head(text: bytes) -> bytes:
    if text[:5].lower() != b"data:":
        return text
    head, comma, content = text.partition(b",")
    known = comma and len(head) < DATA_URL_HEAD_MAX_CHARS
    if not known or not head.lower().endswith(b";base64"):
        raise no_base64()
    return content


def no_base64() -> InvalidRequestError:
    """Say what ``base64_data`` must be."""
    return InvalidRequestError(
        "base64_data must be the picture as base64 text, or as a data URL such as "
        "data:image/png;base64,iVBORw0….",
        param="base64_data",
    )
