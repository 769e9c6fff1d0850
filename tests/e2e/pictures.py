"""Small pictures to send, and a look at those that come back."""

from __future__ import annotations

import base64
import io

from PIL import Image

RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (30, 40, 220)
EDGE_PX = 64
PATCHES = 4
"""Input tokens of a picture of this size: one for each 32 px square."""
TOLERANCE = 12
"""Of each channel: JPEG and WebP are not exact."""


def file_of(
    colour: tuple[int, ...], file_format: str = "png", edge_px: int = EDGE_PX
) -> bytes:
    """Make a file of one colour; four channels make it transparent."""
    mode = "RGBA" if len(colour) == 4 else "RGB"
    return encoded(Image.new(mode, (edge_px, edge_px), colour), file_format)


def mask_that_clears_the_left_half() -> bytes:
    mask = Image.new("RGBA", (EDGE_PX, EDGE_PX), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, EDGE_PX // 2, EDGE_PX))
    return encoded(mask, "png")


def encoded(image: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format)
    return file.getvalue()


def opened(b64_json: str | None) -> Image.Image:
    """Decode a picture of an answer, all of it."""
    assert b64_json is not None
    image = Image.open(io.BytesIO(base64.b64decode(b64_json, validate=True)))
    image.load()
    return image


def alike(image: Image.Image, place: tuple[int, int], colour: tuple[int, ...]) -> bool:
    """Tell whether a pixel has a colour, or nearly so."""
    seen = image.convert("RGB").getpixel(place)
    assert isinstance(seen, tuple)
    return all(
        abs(one - other) <= TOLERANCE for one, other in zip(seen, colour, strict=True)
    )
