"""Reads JSON bodies that carry pictures as data URLs, without holding the pictures.

While the body comes in, the base64 of each data URL goes to a spool, and a short mark
takes its place: ``data:#3`` stands for the fourth. What is left is small.
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
MARK = "data:#"
_START = re.compile(rb'"data:image(?:/|\\/)[a-zA-Z0-9.+-]{1,32};base64,')
_START_MAX_BYTES = 64


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
    spools: Spools
    body: LiftedBody = field(default_factory=LiftedBody)
    kept: bytearray = field(default_factory=bytearray)
    rest: bytes = b""
    inside: WritableSpool | None = None

    def feed(self, chunk: bytes) -> None:
        data, self.rest = self.rest + chunk, b""
        while data:
            data = self._inside(data) if self.inside else self._outside(data)

    def _outside(self, data: bytes) -> bytes:
        found = _START.search(data)
        if found is None:
            # The start of a data URL may be cut: the tail waits for the next chunk.
            tail = data.rfind(b'"', max(0, len(data) - _START_MAX_BYTES))
            whole = len(data) if tail < 0 else tail
            self._keep(data[:whole])
            self.rest = data[whole:]
            return b""
        if len(self.body.spools) >= LIFTED_MAX:
            raise InvalidRequestError(
                f"A request may carry at most {LIFTED_MAX} pictures as data URLs."
            )
        self._keep(data[: found.start()])
        self._keep(f'"{MARK}{len(self.body.spools)}'.encode())
        self.inside = self.spools.open("base64", limit_bytes=IMAGE_URL_MAX_CHARS + 1)
        self.body.spools.append(self.inside)
        return data[found.end() :]

    def _inside(self, data: bytes) -> bytes:
        assert self.inside is not None
        end = data.find(b'"')
        part = data if end < 0 else data[:end]
        if b"\\" in part:  # some encoders write every / as \/
            part = part.replace(b"\\", b"")
        if self.inside.size_bytes + len(part) > IMAGE_URL_MAX_CHARS:
            raise TooLargeError(
                f"A data URL may have at most {IMAGE_URL_MAX_CHARS:,} characters. "
                "Upload the picture as a file, or give its URL.",
                code="image_too_large",
            )
        self.inside.append(part)
        if end < 0:
            return b""
        self.inside = None
        return data[end:]

    def _keep(self, data: bytes) -> None:
        self.kept += data
        if len(self.kept) > JSON_BODY_MAX_BYTES:
            raise TooLargeError(
                f"The body may have at most {JSON_BODY_MAX_BYTES:,} bytes beside its "
                "data URLs. Send pictures by URL or as multipart."
            )

    def finish(self) -> None:
        self._keep(self.rest)
        self.body.json = decode_json(bytes(self.kept))


async def read_lifted(receive: Receive, spools: Spools) -> LiftedBody:
    """Read a JSON body and lift its data URLs out.

    Raises:
        TooLargeError: a data URL, or what is left without them, is over its limit.
        InvalidRequestError: it is not JSON, or carries too many data URLs.
    """
    lifter = _Lifter(spools)
    try:
        await consume(receive, lifter.feed)
        lifter.finish()
    except BaseException:
        lifter.body.close()
        raise
    return lifter.body
