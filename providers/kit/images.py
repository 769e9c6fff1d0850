"""Reads type and size of a picture from its header. Nothing is ever decoded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from providers.kit.contract import Payload
from providers.kit.payloads import BrokenBase64Error, raw_chunks

HEADER_MAX_BYTES = 16 * 1024 * 1024
"""So far a header is followed to the first pixels: texts and profiles come before."""
HEADER_MAX_PARTS = 4_096
"""Chunks or segments of a header."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_MARKS = frozenset({b"tRNS", b"acTL"})
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_SIGNATURE_BYTES = 12
_PNG_EDGE_MAX_PX = 2**31 - 1
_JPEG_SOF = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_JPEG_SKIPPED = frozenset({0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})
_JPEG_START_OF_SCAN = 0xDA
_JPEG_BITS = 8
_JPEG_COMPONENTS = frozenset({1, 3, 4})
_MARKER = 0xFF
_LENGTH_BYTES = 2


class NotAnImageError(ValueError):
    """Not a PNG, JPEG or WebP whose header can be read."""


class LongHeaderError(NotAnImageError):
    """A header that does not end within its limits."""

    def __init__(self) -> None:
        super().__init__("its header is too long")


class TruncatedImageError(NotAnImageError):
    """So far so good, and more bytes are needed."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the first bytes of a picture tell. Sizes are before any EXIF rotation."""

    media_type: str
    width_px: int
    height_px: int
    has_alpha: bool
    animated: bool


def read_header(prefix: bytes) -> ImageHeader:
    """Read the header of a PNG, JPEG or WebP from the first bytes of the file.

    Marks that come later than the size (PNG transparency and animation chunks, which
    stand before the pixels) are seen if ``prefix`` reaches that far.

    Raises:
        TruncatedImageError: the start of a picture, and too little of it.
        LongHeaderError: it does not end within its limits.
        NotAnImageError: anything else.
    """
    return _read(_Walk(iter([prefix])))


def read_payload_header(payload: Payload) -> ImageHeader:
    """Read the header of a spooled picture, as far as its first pixels.

    What is stepped over is not kept.

    Raises:
        NotAnImageError: as ``read_header``; also when the base64 is broken.
        OSError: the payload cannot be read.
    """
    try:
        return _read(_Walk(raw_chunks(payload)))
    except BrokenBase64Error as error:
        raise NotAnImageError("broken base64") from error


@dataclass(slots=True)
class _Walk:
    """Goes once through the first bytes of a file, and no further than it may."""

    chunks: Iterator[bytes]
    left_bytes: int = HEADER_MAX_BYTES
    left_parts: int = HEADER_MAX_PARTS
    rest: memoryview = field(default_factory=lambda: memoryview(b""))

    def peek(self, count: int) -> bytes:
        """Look at the next bytes, fewer where the file ends."""
        while len(self.rest) < count:
            chunk = next(self.chunks, None)
            if chunk is None:
                break
            self.rest = memoryview(bytes(self.rest) + chunk)
        return bytes(self.rest[:count])

    def take(self, count: int) -> bytes:
        taken = b""
        while len(taken) < count:
            taken += self._next(count - len(taken))
        return taken

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._next(count))

    def enter_part(self) -> None:
        """Count a chunk or segment: tiny ones take long to walk, too."""
        self.left_parts -= 1
        if self.left_parts < 0:
            raise LongHeaderError

    def _next(self, at_most: int) -> memoryview:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                raise TruncatedImageError("the header is cut off")
            self.rest = memoryview(chunk)
        given, self.rest = self.rest[:at_most], self.rest[at_most:]
        self.left_bytes -= len(given)
        if self.left_bytes < 0:
            raise LongHeaderError
        return given


def _read(walk: _Walk) -> ImageHeader:
    start = walk.peek(_SIGNATURE_BYTES)
    if start.startswith(_PNG_SIGNATURE):
        return _png(walk)
    if start.startswith(_JPEG_SIGNATURE):
        return _jpeg(walk)
    if start.startswith(b"RIFF") and start[8:] == b"WEBP":
        return _webp(walk)
    raise NotAnImageError("not a PNG, JPEG or WebP")


def _header(
    media_type: str, size_px: tuple[int, int], *, alpha: bool, animated: bool
) -> ImageHeader:
    if 0 in size_px:
        raise NotAnImageError("a picture without area")
    return ImageHeader(media_type, *size_px, has_alpha=alpha, animated=animated)


def _png(walk: _Walk) -> ImageHeader:
    # Signature (8), length (4), "IHDR" (4), 13 bytes of which the first 10 are width,
    # height, depth, colour type; then the CRC over name and content.
    walk.skip(len(_PNG_SIGNATURE))
    chunk = walk.take(25)
    if chunk[:8] != b"\x00\x00\x00\x0dIHDR":
        raise NotAnImageError("a PNG that does not start with its header")
    if zlib.crc32(chunk[4:21]) != int.from_bytes(chunk[21:], "big"):
        raise NotAnImageError("a PNG whose header is damaged")
    width_px = int.from_bytes(chunk[8:12], "big")
    height_px = int.from_bytes(chunk[12:16], "big")
    if max(width_px, height_px) > _PNG_EDGE_MAX_PX:
        raise NotAnImageError("a PNG of impossible size")
    marks = _png_marks_before_pixels(walk)
    alpha = chunk[17] in {4, 6} or b"tRNS" in marks
    return _header(
        "image/png", (width_px, height_px), alpha=alpha, animated=b"acTL" in marks
    )


def _png_marks_before_pixels(walk: _Walk) -> set[bytes]:
    marks: set[bytes] = set()
    try:
        while (head := walk.take(8))[4:] != b"IDAT":
            walk.enter_part()
            marks |= {head[4:]} & _PNG_MARKS
            walk.skip(int.from_bytes(head[:4], "big") + 4)
    except TruncatedImageError:
        pass  # the size is known, and a mark that is not there says nothing
    return marks


def _jpeg(walk: _Walk) -> ImageHeader:
    found: tuple[int, int] | None = None
    walk.skip(2)
    try:
        while (code := _jpeg_marker(walk)) != _JPEG_START_OF_SCAN:
            length = int.from_bytes(walk.take(_LENGTH_BYTES), "big")
            if length < _LENGTH_BYTES:
                raise NotAnImageError("a JPEG with an impossible segment")
            if code in _JPEG_SOF:
                if found is not None:
                    raise NotAnImageError("a JPEG with two frames")
                found = _jpeg_frame(walk.peek(6))
            walk.skip(length - _LENGTH_BYTES)
    except TruncatedImageError:
        # Pixels are not needed once the frame was seen, only its rivals are.
        if found is None:
            raise
    if found is None:
        raise NotAnImageError("a JPEG without a frame")
    return _header("image/jpeg", found, alpha=False, animated=False)


def _jpeg_marker(walk: _Walk) -> int:
    first, code = walk.take(2)
    if first != _MARKER:
        raise NotAnImageError("a JPEG with stray bytes between its segments")
    if code not in _JPEG_SOF | _JPEG_SKIPPED | {_JPEG_START_OF_SCAN}:
        raise NotAnImageError("a JPEG with an unknown segment")
    walk.enter_part()
    return code


def _jpeg_frame(segment: bytes) -> tuple[int, int]:
    # Bits (1), height (2), width (2), number of components (1).
    if len(segment) < 6:  # noqa: PLR2004 - as much as is read below
        raise TruncatedImageError("the frame is cut off")
    if segment[0] != _JPEG_BITS or segment[5] not in _JPEG_COMPONENTS:
        raise NotAnImageError("a JPEG of a kind that browsers do not show")
    return int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big")


def _webp(walk: _Walk) -> ImageHeader:
    walk.skip(12)
    kind = walk.take(8)[:4]
    if kind == b"VP8 ":
        return _webp_lossy(walk.take(10))
    if kind == b"VP8L":
        return _webp_lossless(walk.take(5))
    if kind == b"VP8X":
        return _webp_extended(walk.take(10))
    raise NotAnImageError("a WebP of unknown kind")


def _webp_lossy(frame: bytes) -> ImageHeader:
    key_frame = frame[0] & 1 == 0
    if not key_frame or frame[3:6] != b"\x9d\x01\x2a":
        raise NotAnImageError("a WebP whose frame is damaged")
    width_px = int.from_bytes(frame[6:8], "little") & 0x3FFF
    height_px = int.from_bytes(frame[8:10], "little") & 0x3FFF
    return _header("image/webp", (width_px, height_px), alpha=False, animated=False)


def _webp_lossless(frame: bytes) -> ImageHeader:
    # A signature byte, then 14 bits width - 1, 14 bits height - 1, 1 bit alpha and
    # 3 bits version.
    bits = int.from_bytes(frame[1:], "little")
    if frame[:1] != b"\x2f" or bits >> 29:
        raise NotAnImageError("a WebP whose frame is damaged")
    size_px = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return _header("image/webp", size_px, alpha=bool(bits >> 28 & 1), animated=False)


def _webp_extended(chunk: bytes) -> ImageHeader:
    flags = chunk[0]
    width_px = int.from_bytes(chunk[4:7], "little") + 1
    height_px = int.from_bytes(chunk[7:10], "little") + 1
    return _header(
        "image/webp",
        (width_px, height_px),
        alpha=bool(flags & 0x10),
        animated=bool(flags & 0x02),
    )
