"""What a reference and a mask must be."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.errors import InvalidRequestError, TooLargeError
from gateway.core.images import (
    AREA_MAX_PX,
    EDGE_MAX_PX,
    IMAGE_MAX_BYTES,
    check_mask,
    check_reference,
)
from providers.kit.images import ImageHeader


def a_header(**changes: Any) -> ImageHeader:
    fields: dict[str, Any] = {
        "media_type": "image/png",
        "width_px": 1024,
        "height_px": 768,
        "has_alpha": True,
        "animated": False,
    }
    return ImageHeader(**(fields | changes))


@pytest.mark.parametrize(
    "header",
    [
        a_header(),
        a_header(media_type="image/webp", has_alpha=False),
        a_header(media_type="image/jpeg", width_px=1, height_px=1),
        a_header(width_px=EDGE_MAX_PX, height_px=AREA_MAX_PX // EDGE_MAX_PX),
        a_header(width_px=8_000, height_px=8_000),
    ],
)
def test_pictures_up_to_the_limits_are_references(header: ImageHeader) -> None:
    check_reference(header, IMAGE_MAX_BYTES, "image")


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (a_header(animated=True), "animated"),
        (a_header(media_type="image/gif"), "GIF"),
        (a_header(width_px=EDGE_MAX_PX + 1, height_px=1), "16385x1"),
        (a_header(width_px=1, height_px=EDGE_MAX_PX + 1), "1x16385"),
        (a_header(width_px=8_001, height_px=8_000), "8001x8000"),
    ],
)
def test_a_picture_past_a_limit_is_told_which(header: ImageHeader, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as refused:
        check_reference(header, 1, "image[3]")

    assert (refused.value.code, refused.value.param) == ("invalid_image", "image[3]")


def test_a_byte_too_many_is_too_large() -> None:
    with pytest.raises(TooLargeError) as refused:
        check_reference(a_header(), IMAGE_MAX_BYTES + 1, "image")

    assert (refused.value.code, refused.value.param) == ("image_too_large", "image")


def test_a_png_with_alpha_of_the_same_size_is_a_mask() -> None:
    check_mask(a_header(), a_header(media_type="image/jpeg", has_alpha=False), "mask")


@pytest.mark.parametrize(
    "changes", [{"has_alpha": False}, {"media_type": "image/webp"}]
)
def test_a_mask_without_transparency_marks_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="alpha") as refused:
        check_mask(a_header(**changes), a_header(), "mask")

    assert (refused.value.code, refused.value.param) == ("invalid_image", "mask")


@pytest.mark.parametrize("size", [(1023, 768), (1024, 769), (768, 1024)])
def test_a_mask_of_another_size_is_told_both_sizes(size: tuple[int, int]) -> None:
    mask = a_header(width_px=size[0], height_px=size[1])

    with pytest.raises(InvalidRequestError) as refused:
        check_mask(mask, a_header(), "mask_url")

    assert refused.value.code == "image_dimension_mismatch"
    assert refused.value.param == "mask_url"
    assert f"{size[0]}x{size[1]}" in str(refused.value)
    assert "1024x768" in str(refused.value)
