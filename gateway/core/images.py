"""What a picture must be to go into a request: its limits, and their checks. Pure.

The same rules hold for uploads, URLs, data URLs and the parts of an edit, so that no
way in is laxer than another.
"""

from __future__ import annotations

from typing import Protocol

from gateway.core.errors import InvalidRequestError, TooLargeError
from providers.kit.images import ImageHeader

IMAGE_MAX_BYTES = 50 * 1024 * 1024
EDGE_MAX_PX = 16_384
AREA_MAX_PX = 64_000_000
MEDIA_TYPES = frozenset({"image/png", "image/jpeg", "image/webp"})

ACCEPTED = "PNG, JPEG or WebP"


class Sized(Protocol):
    """Anything that knows its size in pixels."""

    @property
    def width_px(self) -> int:
        """Width, in pixels."""
        ...

    @property
    def height_px(self) -> int:
        """Height, in pixels."""
        ...


def check_reference(header: ImageHeader, size_bytes: int, param: str) -> None:
    """See that a picture may be used as a reference, a mask or an upload.

    Raises:
        TooLargeError: it has more than ``IMAGE_MAX_BYTES``.
        InvalidRequestError: its type, its size in pixels or its being animated rules
            it out; the message tells which.
    """
    if size_bytes > IMAGE_MAX_BYTES:
        raise too_large(param)
    if header.media_type not in MEDIA_TYPES:
        raise not_an_image(param)
    if header.animated:
        raise _invalid("The picture is animated. Send a still one.", param)
    width_px, height_px = header.width_px, header.height_px
    if max(width_px, height_px) > EDGE_MAX_PX or width_px * height_px > AREA_MAX_PX:
        raise _invalid(
            f"The picture has {width_px}x{height_px} pixels. At most {EDGE_MAX_PX:,} "
            f"pixels a side and {AREA_MAX_PX:,} in all are accepted: make it smaller.",
            param,
        )


def check_mask(header: ImageHeader, first_reference: Sized, param: str) -> None:
    """See that a mask fits the first reference picture.

    Raises:
        InvalidRequestError: it is no PNG with transparency, or of another size; then
            the message names both sizes.
    """
    if header.media_type != "image/png" or not header.has_alpha:
        raise _invalid(
            "The mask must be a PNG with an alpha channel: its transparent pixels "
            "mark what is made anew.",
            param,
        )
    mask_px = (header.width_px, header.height_px)
    picture_px = (first_reference.width_px, first_reference.height_px)
    if mask_px != picture_px:
        raise InvalidRequestError(
            f"The mask has {mask_px[0]}x{mask_px[1]} pixels, the first picture "
            f"{picture_px[0]}x{picture_px[1]}. Both must have exactly the same size.",
            param=param,
            code="image_dimension_mismatch",
        )


def too_large(param: str) -> TooLargeError:
    """Say that a picture's file is over the limit."""
    return TooLargeError(
        f"The picture has more than {IMAGE_MAX_BYTES:,} bytes (50 MB). "
        "Send a smaller one.",
        param=param,
        code="image_too_large",
    )


def not_an_image(param: str) -> InvalidRequestError:
    """Say that a file is no picture that a model could use, whatever its name."""
    return _invalid(
        f"The file is not a {ACCEPTED} picture, by its content. Models take no other "
        "type, GIF neither.",
        param,
    )


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_image")
