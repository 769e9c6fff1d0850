"""Turns a picture into the format that was asked for, where an upstream cannot."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from dataclasses import dataclass, field, replace

from PIL import Image

from gateway.ports import Spools
from providers.kit.contract import MadeImage
from providers.kit.payloads import raw_chunks

AREA_MAX_PX = 64_000_000
"""What is decoded at most: 256 MB of pixels."""
AT_ONCE = 2
DEFAULT_QUALITY = 95
UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises over files that are broken in one way or another."""


@dataclass(frozen=True, slots=True)
class PillowStudio:
    """Implements ``Studio`` with Pillow, in threads, few at a time."""

    spools: Spools
    _gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def convert(
        self, image: MadeImage, output_format: str, compression: int | None
    ) -> MadeImage | None:
        """Re-encode a picture; None if it cannot be decoded."""
        if image.width_px * image.height_px > AREA_MAX_PX:
            return None
        async with self._gate:
            encoded = await asyncio.to_thread(
                _encode, image, output_format, compression
            )
        if encoded is None:
            return None
        spool = self.spools.open("raw", limit_bytes=len(encoded))
        try:
            spool.append(encoded)
        except OSError:
            spool.close()
            return None
        return replace(image, payload=spool, media_type=f"image/{output_format}")


def _encode(
    image: MadeImage, output_format: str, compression: int | None
) -> bytes | None:
    try:
        raw = b"".join(raw_chunks(image.payload))
        with Image.open(io.BytesIO(raw)) as decoded:
            flat = decoded.convert("RGB") if output_format == "jpeg" else decoded
            out = io.BytesIO()
            flat.save(
                out, output_format.upper(), **_options(output_format, compression)
            )
    except UNDECODABLE:
        return None
    return out.getvalue()


def _options(output_format: str, compression: int | None) -> dict[str, int]:
    if output_format == "png":
        return {}
    return {"quality": DEFAULT_QUALITY if compression is None else compression}
