"""Reads JSON bodies that carry pictures as data URLs, without holding the pictures.

While the body comes in, the base64 of each data URL goes to a spool, and a short mark
takes its place: ``data:#3`` stands for the fourth. What is left is small. Only the
values of the fields that may hold pictures are looked at: a prompt may quote anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from litestar.types import Receive

from gateway.api.http import JSON_BODY_MAX_BYTES, consume, decode_json
from gateway.core.errors import InvalidRequestError, TooLargeError
from gateway.core.requests import IMAGE_URL_MAX_CHARS
from gateway.ports import Spools, WritableSpool

LIFTED_MAX = 17
"""Sixteen references and a mask."""
LIFT_MAX_S = 600.0
"""Time for a whole body to arrive, as for a form."""
MARK = "data:#"
PICTURE_FIELDS = frozenset({b"image_url", b"image_urls", b"mask_url"})
FIELD_MAX_BYTES = 64

_START = re.compile(
    rb"data:image(?:/|\\/)[a-z0-9.+-]{1,32}(?:;[a-z0-9=._-]{1,64}){0,3};base64,",
    re.IGNORECASE,
)
_START_MAX_BYTES = 256
_TEXT = re.compile(rb'(?:[^"\\]|\\.)*', re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|([^u]))", re.DOTALL)
_ESCAPE_MAX_BYTES = 6


@dataclass(slots=True)
class LiftedBody:
    """A decoded body and the spools of its data URLs; whoever has it closes it."""

    json: object = None
    spools: list[WritableSpool] = field(default_factory=list)

    def close(self) -> None:
        """Give the spools back."""
        for spool in self.spools:
            spool.close()


@dataclass(slots=True)
class _Lifter:
    # Goes through the JSON string by string. ``text`` is the string being kept, as far
    # as a field's name may go; ``field_name`` is the last one that a colon followed.
    spools: Spools
    body: LiftedBody = field(default_factory=LiftedBody)
    kept: bytearray = field(default_factory=bytearray)
    rest: bytes = b""
    text: bytes | None = None
    last_text: bytes = b""
    field_name: bytes = b""
    lifting: WritableSpool | None = None

    def feed(self, chunk: bytes, *, last: bool = False) -> None:
        data, self.rest = self.rest + chunk, b""
        while data:
            if self.lifting is not None:
                data = self._lift(data, self.lifting)
            elif self.text is not None:
                data = self._through_text(data, self.text)
            else:
                data = self._between(data, last=last)

    def finish(self) -> None:
        self.feed(b"", last=True)
        self._keep(self.rest)
        self.body.json = decode_json(bytes(self.kept), exact=True)

    def _between(self, data: bytes, *, last: bool) -> bytes:
        quote = data.find(b'"')
        gap = data if quote < 0 else data[:quote]
        if b":" in gap:
            self.field_name = self.last_text
        if quote < 0:
            self._keep(data)
            return b""
        after = data[quote + 1 :]
        may_start = self.field_name in PICTURE_FIELDS
        undecided = len(after) < _START_MAX_BYTES and b'"' not in after
        if may_start and undecided and not last:
            self._keep(gap)
            self.rest = data[quote:]
            return b""
        self._keep(data[: quote + 1])
        start = _START.match(after) if may_start else None
        if start is None:
            self.text = b""
            return after
        self._begin()
        return after[start.end() :]

    def _begin(self) -> None:
        if len(self.body.spools) >= LIFTED_MAX:
            raise InvalidRequestError(
                f"A request may carry at most {LIFTED_MAX} pictures as data URLs."
            )
        self._keep(f"{MARK}{len(self.body.spools)}".encode())
        self.lifting = self.spools.open("base64", limit_bytes=IMAGE_URL_MAX_CHARS + 1)
        self.body.spools.append(self.lifting)

    def _through_text(self, data: bytes, text: bytes) -> bytes:
        found = _TEXT.match(data)
        end = found.end() if found else 0
        self._keep(data[:end])
        self.text = (text + data[:end])[: FIELD_MAX_BYTES + 1]
        if end == len(data):
            return b""
        if data[end : end + 1] == b'"':
            self._keep(b'"')
            self.last_text, self.text = self.text, None
            return data[end + 1 :]
        self.rest = data[end:]  # a backslash whose other half is still to come
        return b""

    def _lift(self, data: bytes, spool: WritableSpool) -> bytes:
        end = data.find(b'"')
        part = data if end < 0 else data[:end]
        if end < 0:
            cut = part.rfind(b"\\", max(0, len(part) - _ESCAPE_MAX_BYTES + 1))
            if cut >= 0 and _ESCAPE.fullmatch(part, cut) is None:
                part, self.rest = part[:cut], part[cut:]
        if b"\\" in part:
            part = _ESCAPE.sub(_unescaped, part)
        if spool.size_bytes + len(part) > IMAGE_URL_MAX_CHARS:
            raise TooLargeError(
                f"A data URL may have at most {IMAGE_URL_MAX_CHARS:,} characters. "
                "Upload the picture as a file, or give its URL.",
                code="image_too_large",
            )
        spool.append(part)
        if end < 0:
            return b""
        self.lifting, self.text = None, b""
        return data[end:]

    def _keep(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > JSON_BODY_MAX_BYTES:
            raise TooLargeError(
                f"The body may have at most {JSON_BODY_MAX_BYTES:,} bytes beside its "
                "data URLs. Send pictures by URL or as multipart."
            )


def _unescaped(found: re.Match[bytes]) -> bytes:
    # What encoders write in base64: / and + by number or with a backslash, line ends.
    number, sign = found.groups()
    char = bytes([int(number, 16)]) if number and int(number, 16) < 128 else b""  # noqa: PLR2004
    if sign is not None:
        char = {b"/": b"/", b"n": b"\n", b"r": b"\r", b"t": b"\t"}.get(sign, b"")
    if char in {b"\n", b"\r", b"\t"}:
        return b""
    if not char or char == b"\\":
        raise InvalidRequestError(
            "A data URL has an escape that base64 cannot have.", code="invalid_image"
        )
    return char


async def read_lifted(receive: Receive, spools: Spools) -> LiftedBody:
    """Read a JSON body and lift its data URLs out.

    Raises:
        TooLargeError: a data URL, or what is left without them, is over its limit.
        InvalidRequestError: it is not JSON, or carries too many data URLs.
    """
    lifter = _Lifter(spools)
    try:
        await consume(receive, lifter.feed, max_s=LIFT_MAX_S)
        lifter.finish()
    except BaseException:
        lifter.body.close()
        raise
    return lifter.body
