"""Pictures that simulators sell, and how much is in those they are given."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from fractions import Fraction
from functools import lru_cache

from PIL import Image

BIG_BYTES = 9 * 1024 * 1024
"""Of a picture that is 12 MiB as base64."""
PATCHES_MAX = 1536


@lru_cache(maxsize=64)
def picture(width: int, height: int, file_format: str, background: str) -> bytes:
    if file_format == "png":
        return png(width, height, clear=background == "transparent")
    file = io.BytesIO()
    mode = "RGBA" if background == "transparent" else "RGB"
    Image.new(mode, (width, height)).save(file, file_format)
    return file.getvalue()


def png(width: int, height: int, *, clear: bool = False, padding: int = 0) -> bytes:
    """Write a PNG by hand: one bit per pixel, or 8-bit RGBA."""
    depth, colour, row = (8, 6, 4 * width) if clear else (1, 0, (width + 7) // 8)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress((b"\x00" + bytes(row)) * height, 1)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    if padding:
        chunks.insert(2, (b"paDd", bytes(padding)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


@lru_cache(maxsize=1)
def big_picture() -> str:
    return base64.b64encode(png(64, 32, padding=BIG_BYTES)).decode()


def patches(width: int, height: int) -> int:
    """Count the tokens of a reference by the published formula."""
    return min(math.ceil(width / 32) * math.ceil(height / 32), PATCHES_MAX)


def output_tokens(base: int, width: int, height: int) -> int:
    """Count by the published formula, in exact fractions."""
    short, long = sorted((width, height))
    across = math.floor(Fraction(base * short, long) + Fraction(1, 2))
    pixels = width * height
    return math.ceil(base * across * Fraction(2_000_000 + pixels, 4_000_000))
