"""Reads type and size of a picture from its first bytes. Nothing is ever decoded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from providers.kit.contract import Payload
from providers.kit.payloads import BrokenBase64Error, raw_chunks

HEADER_MAX_BYTES = 1024 * 1024
"""A header is looked for in so many first bytes (JPEG puts profiles before it)."""

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
        NotAnImageError: anything else, and a header beyond ``HEADER_MAX_BYTES``.
    """
    prefix = prefix[:HEADER_MAX_BYTES]
    if prefix.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(prefix)
    if prefix.startswith(b"\xff\xd8\xff"):
        return _jpeg(prefix)
    if prefix.startswith(b"RIFF") and prefix[8:12] == b"WEBP":
        return _webp(prefix)
    raise NotAnImageError("not a PNG, JPEG or WebP")


def read_payload_header(payload: Payload) -> ImageHeader:
    """Read the header of a spooled picture, decoding only as much as is needed.

    Raises:
        NotAnImageError: as ``read_header``; also when the base64 is broken.
    """
    start = b""
    try:
        for raw in raw_chunks(payload):
            start += raw
            try:
                return read_header(start)
            except TruncatedImageError:
                if len(start) >= HEADER_MAX_BYTES:
                    break
    except BrokenBase64Error as error:
        raise NotAnImageError("broken base64") from error
    raise NotAnImageError("no whole header of a picture")


def _take(data: bytes, at: int, count: int) -> bytes:
    piece = data[at : at + count]
    if len(piece) < count:
        raise TruncatedImageError("the header is cut off")
    return piece


def _header(
    media_type: str, size_px: tuple[int, int], *, alpha: bool, animated: bool
) -> ImageHeader:
    if 0 in size_px:
        raise NotAnImageError("a picture without area")
    return ImageHeader(media_type, *size_px, has_alpha=alpha, animated=animated)


def _png(data: bytes) -> ImageHeader:
    # Signature (8), length (4), "IHDR" (4), 13 bytes of which the first 10 are width,
    # height, depth, colour type; then the CRC over name and content.
    chunk = _take(data, 8, 25)
    if chunk[:8] != b"\x00\x00\x00\x0dIHDR":
        raise NotAnImageError("a PNG that does not start with its header")
    if zlib.crc32(chunk[4:21]) != int.from_bytes(chunk[21:], "big"):
        raise NotAnImageError("a PNG whose header is damaged")
    width_px = int.from_bytes(chunk[8:12], "big")
    height_px = int.from_bytes(chunk[12:16], "big")
    if max(width_px, height_px) > _PNG_EDGE_MAX_PX:
        raise NotAnImageError("a PNG of impossible size")
    names = set(_png_chunk_names_before_pixels(data))
    alpha = chunk[17] in {4, 6} or b"tRNS" in names
    return _header(
        "image/png", (width_px, height_px), alpha=alpha, animated=b"acTL" in names
    )


def _png_chunk_names_before_pixels(data: bytes) -> Iterator[bytes]:
    at = 33
    while len(head := data[at : at + 8]) == 8 and head[4:] != b"IDAT":  # noqa: PLR2004 - length and name
        yield head[4:]
        at += 12 + int.from_bytes(head[:4], "big")


def _jpeg(data: bytes) -> ImageHeader:
    found: tuple[int, int] | None = None
    at = 2
    while True:
        try:
            code, length = _jpeg_marker(data, at)
            if code == _JPEG_START_OF_SCAN:
                break
            if code in _JPEG_SOF:
                if found is not None:
                    raise NotAnImageError("a JPEG with two frames")
                found = _jpeg_frame(_take(data, at + 2, 8))
        except TruncatedImageError:
            # Pixels are not needed once the frame was seen, only its rivals are.
            if found is None:
                raise
            break
        at += 2 + length
    if found is None:
        raise NotAnImageError("a JPEG without a frame")
    return _header("image/jpeg", found, alpha=False, animated=False)


def _jpeg_marker(data: bytes, at: int) -> tuple[int, int]:
    """Read a marker's code and the length of what follows it."""
    first, code = _take(data, at, 2)
    if first != _MARKER:
        raise NotAnImageError("a JPEG with stray bytes between its segments")
    if code == _JPEG_START_OF_SCAN:
        return code, 0
    if code not in _JPEG_SOF | _JPEG_SKIPPED:
        raise NotAnImageError("a JPEG with an unknown segment")
    length = int.from_bytes(_take(data, at + 2, 2), "big")
    if length < _LENGTH_BYTES:
        raise NotAnImageError("a JPEG with an impossible segment")
    return code, length


def _jpeg_frame(segment: bytes) -> tuple[int, int]:
    # Length (2), bits (1), height (2), width (2), number of components (1).
    if segment[2] != _JPEG_BITS or segment[7] not in _JPEG_COMPONENTS:
        raise NotAnImageError("a JPEG of a kind that browsers do not show")
    return int.from_bytes(segment[5:7], "big"), int.from_bytes(segment[3:5], "big")


def _webp(data: bytes) -> ImageHeader:
    kind = _take(data, 12, 4)
    if kind == b"VP8 ":
        return _webp_lossy(_take(data, 20, 10))
    if kind == b"VP8L":
        return _webp_lossless(_take(data, 20, 5))
    if kind == b"VP8X":
        return _webp_extended(_take(data, 20, 10))
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
