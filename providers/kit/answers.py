"""Reads an OpenAI-style images answer while it arrives, pictures straight into spools.

The base64 of a picture is never held whole, never decoded and encoded again. All the
rest of the answer (the skeleton) is kept and decoded when the last byte is in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, auto

import msgspec

from providers.kit.images import ImageHeader, NotAnImageError, read_payload_header
from providers.kit.spool import Spool, SpoolFolder, SpoolLimitError

SKELETON_MAX_BYTES = 1024 * 1024
PAYLOAD_MAX_BYTES = 64 * 1024 * 1024
PAYLOADS_MAX = 32
ANSWER_MAX_BYTES = 512 * 1024 * 1024

_KEY_MAX_BYTES = 64
_DATA_PREFIX_MAX_BYTES = 256
_ESCAPE_BYTES = 6
_QUOTE = 0x22
_BODY = re.compile(rb'(?:[^"\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+', re.DOTALL)
"""The inside of a JSON string, up to its quote or to an escape that is cut off."""
_ESCAPE = re.compile(rb"\\u[0-9a-fA-F]{4}|\\.", re.DOTALL)
_WHITE = b" \t\r\n"
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_PADDING_MAX = 2
_DATA = b"data:"
_DECODER = msgspec.json.Decoder(float_hook=Decimal)
"""Amounts of money stand in answers: a float would not keep them."""
_UNDECODABLE = (
    msgspec.DecodeError,
    UnicodeDecodeError,
    RecursionError,
    ArithmeticError,  # of a number with an exponent beyond all bounds
)


class UnreadableAnswerError(Exception):
    """The answer is not whole, not JSON, or over a limit."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of an answer: base64 as it came, its header read. Close the spool."""

    spool: Spool
    header: ImageHeader


@dataclass(slots=True)
class Answer:
    """A whole answer.

    In ``body`` a mark stands in place of the text of each picture; ``pictures`` has
    the good ones by mark, ``faults`` says what is wrong with each of the others.
    """

    body: object
    pictures: dict[str, Picture]
    faults: tuple[str, ...]

    def take(self, mark: object) -> Picture | None:
        """Hand a picture over, once."""
        return self.pictures.pop(mark, None) if isinstance(mark, str) else None

    def close(self) -> None:
        """Give back all pictures that nobody took."""
        while self.pictures:
            self.pictures.popitem()[1].spool.close()


class _At(Enum):
    OUTSIDE = auto()
    STRING = auto()
    PICTURE = auto()


class AnswerReader:
    """Takes an answer in chunks of any size; ``finish`` gives what was in it.

    A picture is any string under the key ``b64_json``, and any under ``url`` that is
    a data URI. ``close`` after a failure gives every spool back.
    """

    def __init__(
        self, spools: SpoolFolder, *, payload_max_bytes: int = PAYLOAD_MAX_BYTES
    ) -> None:
        self._spools = spools
        self._payload_max_bytes = payload_max_bytes
        self._at = _At.OUTSIDE
        self._carry = b""
        self._skeleton = bytearray()
        self._string_start = 0
        self._string = b""
        self._gap = b""
        self._key = b""
        self._inlets: list[_Inlet] = []
        self._read_bytes = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            UnreadableAnswerError: this cannot become an answer any more.
            OSError: a spool cannot be written.
        """
        self._read_bytes += len(chunk)
        if self._read_bytes > ANSWER_MAX_BYTES:
            raise UnreadableAnswerError(f"more than {ANSWER_MAX_BYTES} bytes")
        data = self._carry + chunk
        at = 0
        while at < len(data):
            step = self._outside if self._at is _At.OUTSIDE else self._inside
            after = step(data, at)
            if after == at:
                break
            at = after
        self._carry = data[at:]

    def finish(self) -> Answer:
        """Decode the skeleton and look at the pictures. The reader is empty after it.

        Raises:
            UnreadableAnswerError: the answer ended early or is not JSON.
            OSError: a spool cannot be read.
        """
        if self._at is not _At.OUTSIDE:
            raise UnreadableAnswerError("the answer is cut off")
        try:
            body = _DECODER.decode(self._skeleton.removeprefix(b"\xef\xbb\xbf"))
        except _UNDECODABLE as error:
            raise UnreadableAnswerError(f"not JSON: {error}") from error
        pictures: dict[str, Picture] = {}
        faults: list[str] = []
        for index, inlet in enumerate(self._inlets):
            found = inlet.look()
            if isinstance(found, Picture):
                pictures[str(index)] = found
            else:
                faults.append(found)
        self._inlets = []
        return Answer(body, pictures, tuple(faults))

    def close(self) -> None:
        """Give all spools back."""
        for inlet in self._inlets:
            inlet.spool.close()
        self._inlets = []

    def _outside(self, data: bytes, at: int) -> int:
        quote = data.find(b'"', at)
        end = len(data) if quote < 0 else quote
        self._keep(data[at:end])
        self._gap = (self._gap + data[at:end].translate(None, _WHITE))[:2]
        if quote < 0:
            return end
        self._key = self._string if self._gap == b":" else b""
        self._gap = b""
        self._keep(b'"')
        self._string_start = len(self._skeleton)
        self._at = _At.STRING
        if self._key == b"b64_json":
            self._start_picture()
        return quote + 1

    def _inside(self, data: bytes, at: int) -> int:
        """Take what there is of a string; stops before an escape that is cut off."""
        end = _end_of_text(data, at)
        self._take_text(data[at:end])
        if end == len(data):
            return end
        if data[end] == _QUOTE:
            self._end_string()
            return end + 1
        if len(data) - end >= _ESCAPE_BYTES:
            raise UnreadableAnswerError("not JSON: a broken escape")
        return end

    def _take_text(self, text: bytes) -> None:
        if self._at is _At.PICTURE:
            self._inlets[-1].append(text)
            return
        if self._key == b"url":
            text = bytes(self._skeleton[self._string_start :]) + text
            del self._skeleton[self._string_start :]
            if len(text) >= len(_DATA):
                # Known either way now, and looked at only once.
                self._key = b""
            if text.startswith(_DATA):
                self._start_picture()
                self._inlets[-1].append(text)
                return
        self._keep(text)

    def _start_picture(self) -> None:
        if len(self._inlets) == PAYLOADS_MAX:
            raise UnreadableAnswerError(f"more than {PAYLOADS_MAX} pictures")
        self._keep(str(len(self._inlets)).encode())
        spool = self._spools.open("base64", limit_bytes=self._payload_max_bytes)
        self._inlets.append(_Inlet(spool))
        self._at = _At.PICTURE

    def _end_string(self) -> None:
        self._string = b""
        if self._at is _At.STRING:
            self._string = _plain(bytes(self._skeleton[self._string_start :]))
        self._keep(b'"')
        self._at = _At.OUTSIDE

    def _keep(self, data: bytes) -> None:
        if len(self._skeleton) + len(data) > SKELETON_MAX_BYTES:
            raise UnreadableAnswerError(
                f"more than {SKELETON_MAX_BYTES} bytes beside the pictures"
            )
        self._skeleton += data


def _end_of_text(data: bytes, at: int) -> int:
    """Find the quote that ends a string, or the escape that is cut off."""
    quote = data.find(b'"', at)
    end = len(data) if quote < 0 else quote
    if data.find(b"\\", at, end) < 0:
        return end
    match = _BODY.match(data, at)
    return match.end() if match else at


def _plain(string: bytes) -> bytes:
    """Undo the escapes of a string that may be a key."""
    if len(string) > _KEY_MAX_BYTES or b"\\" not in string:
        return string
    try:
        return msgspec.json.decode(b'"' + string + b'"', type=str).encode()
    except ValueError:
        return b""


class _Inlet:
    """Takes the text of one picture, as it stands in the JSON, into a spool.

    Escapes, white space and a data URI's head are taken out, the alphabet and the
    padding checked. After the first fault the rest is let go.
    """

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self._fault: str | None = None
        self._head: bytes | None = b""
        self._padding = 0

    def append(self, text: bytes) -> None:
        if self._fault is not None:
            return
        if b"\\" in text:
            # A slash is the only escape that some encoders write all over base64.
            text = _ESCAPE.sub(_unescape, text.replace(b"\\/", b"/"))
        if self._head is not None:
            text = self._after_head(self._head + text.translate(None, _WHITE))
        self._write(text)

    def look(self) -> Picture | str:
        """Close the writing: a picture, or what is wrong with it (spool closed)."""
        try:
            return Picture(self.spool, self._checked_header())
        except NotAnImageError as error:
            self.spool.close()
            return str(error)

    def _checked_header(self) -> ImageHeader:
        if self._head:
            self._fault = "broken base64"
        if self._fault is None and self.spool.size_bytes % 4:
            self._fault = "base64 that is cut off"
        if self._fault is not None:
            raise NotAnImageError(self._fault)
        return read_payload_header(self.spool)

    def _after_head(self, start: bytes) -> bytes:
        """Cut a data URI's head off as soon as there is enough to tell."""
        self._head = None
        if not start.startswith(_DATA[: len(start)]):
            return start
        head, comma, text = start.partition(b",")
        if comma:
            if not head.endswith(b";base64"):
                self._fault = "a data URI that is not base64"
            return text
        if len(start) > _DATA_PREFIX_MAX_BYTES:
            self._fault = "a data URI without data"
        self._head = start
        return b""

    def _write(self, text: bytes) -> None:
        if self._padding or text.translate(None, _ALPHABET):
            text = self._end_of_base64(text.translate(None, _WHITE))
        if self._fault is not None:
            return
        try:
            self.spool.append(text)
        except SpoolLimitError as error:
            self._fault = f"a picture of {error}"

    def _end_of_base64(self, text: bytes) -> bytes:
        """Check a piece that is more than plain alphabet: only padding may follow."""
        body = text.rstrip(b"=")
        stray = body.translate(None, _ALPHABET) or (body and self._padding)
        self._padding += len(text) - len(body)
        if stray or self._padding > _PADDING_MAX:
            self._fault = "broken base64"
        return text


def _unescape(match: re.Match[bytes]) -> bytes:
    escape = match[0]
    if escape.startswith(b"\\u"):
        code = int(escape[-4:], base=16)
        return chr(code).encode(errors="replace")
    # What is no white space stays (a backslash too), and fails the alphabet.
    return {b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t"}.get(escape, escape)
