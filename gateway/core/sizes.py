"""Turns the words of ``size`` and ``resolution`` into pixels. Pure and exact."""

from __future__ import annotations

import re
from math import isqrt
from typing import NamedTuple

from gateway.core.catalogue import TokenRule
from gateway.core.errors import InvalidRequestError

GRID_PX = 16
EDGE_MAX_PX = 3840
AREA_MIN_PX = 655_360
AREA_MAX_PX = 8_294_400
ASPECT_MAX = 3
SHOWN_MAX_CHARS = 40
"""As much of a wrong value as an error message repeats."""

TIER_BUDGETS_PX = {"1K": 1024 * 1024, "2K": 2048 * 2048, "4K": 3840 * 2160}
DEFAULT_TIER = "1K"
CLASS_MAX_PX = {"1K": 1_700_000, "2K": 4_400_000, "4K": AREA_MAX_PX}
"""Up to which area a picture is of which class, as EvoLink draws the lines."""
AUTO_CLASS = "auto"

RATIOS = {
    "1:1": (1, 1),
    "1:2": (1, 2),
    "2:1": (2, 1),
    "1:3": (1, 3),
    "3:1": (3, 1),
    "2:3": (2, 3),
    "3:2": (3, 2),
    "3:4": (3, 4),
    "4:3": (4, 3),
    "4:5": (4, 5),
    "5:4": (5, 4),
    "9:16": (9, 16),
    "16:9": (16, 9),
    "21:9": (21, 9),
    "9:21": (9, 21),
}

_PIXELS = re.compile(r"([1-9][0-9]{0,5})[xX×]([1-9][0-9]{0,5})")  # noqa: RUF001 - the sign is part of the contract


class Size(NamedTuple):
    """Width and height of a picture, in pixels."""

    width_px: int
    height_px: int

    @property
    def area_px(self) -> int:
        """Width times height."""
        return self.width_px * self.height_px

    @property
    def text(self) -> str:
        """``WxH``, as the contracts write it."""
        return f"{self.width_px}x{self.height_px}"


TABLE_SIZES = {
    "1:1": Size(1024, 1024),
    "2:3": Size(1024, 1536),
    "3:2": Size(1536, 1024),
}
"""All that a variant of the gpt-image-1 family can make, by ratio."""


def resolve_size(text: str, resolution: object, rule: TokenRule) -> Size | None:
    """Decide the pixels that a request asks for; None leaves them to the model.

    Args:
        text: ``auto``, a ratio such as ``16:9``, or pixels such as ``1024x1024``.
        resolution: the tier as it came, None if it did not; it counts only with a
            ratio and is not even looked at otherwise.
        rule: whether the variant makes any size or only those of ``TABLE_SIZES``.

    Raises:
        InvalidRequestError: ``size`` or ``resolution`` is not allowed.
    """
    if text == "auto":
        return None
    pixels = _PIXELS.fullmatch(text)
    if pixels is not None:
        size = Size(int(pixels[1]), int(pixels[2]))
        return _table_pixels(size) if rule is TokenRule.TABLE else _free_pixels(size)
    if rule is TokenRule.TABLE:
        return _table_ratio(text, resolution)
    if text not in RATIOS:
        raise InvalidRequestError(
            f"{shown(text)} is no size: use auto, pixels such as 1024x1024, "
            f"or one of the ratios {', '.join(RATIOS)}.",
            param="size",
        )
    return size_for_ratio(*RATIOS[text], TIER_BUDGETS_PX[parse_tier(resolution)])


def size_for_ratio(ratio_w: int, ratio_h: int, budget_px: int) -> Size:
    """Pick the size that best fills a pixel budget at a given aspect ratio.

    Both edges are multiples of 16, and the longer one is at most 3840 px. The area
    may overshoot the budget by the rounding (16:9 at 2K is 2736x1536), but never the
    hard limit of 8,294,400 px: there both edges are rounded down instead.
    Whole numbers only, so every machine gets the same pixels.

    Args:
        ratio_w: left side of the ratio, e.g. 16.
        ratio_h: right side of the ratio, e.g. 9.
        budget_px: area to aim for, in pixels, e.g. 1024 * 1024 for 1K.
    """
    assert 0 < budget_px <= AREA_MAX_PX, budget_px
    if ratio_w < ratio_h:
        height, width = size_for_ratio(ratio_h, ratio_w, budget_px)
        return Size(width, height)

    if budget_px * ratio_w > EDGE_MAX_PX**2 * ratio_h:
        lanes = 2 * EDGE_MAX_PX // GRID_PX * ratio_h
        return Size(EDGE_MAX_PX, (lanes + ratio_w) // (2 * ratio_w) * GRID_PX)

    size = Size(
        _nearest_root(budget_px * ratio_w, ratio_h),
        _nearest_root(budget_px * ratio_h, ratio_w),
    )
    if size.area_px > AREA_MAX_PX:
        size = Size(
            _floor_root(budget_px * ratio_w, ratio_h),
            _floor_root(budget_px * ratio_h, ratio_w),
        )
    return size


def size_class(size: tuple[int, int] | None) -> str:
    """Name the class of a size: 1K, 2K, 4K, or auto where the model chooses."""
    if size is None:
        return AUTO_CLASS
    area_px = size[0] * size[1]
    fits = (name for name, most_px in CLASS_MAX_PX.items() if area_px <= most_px)
    return next(fits, "4K")


def parse_tier(resolution: object) -> str:
    """Read a resolution tier, in any case; 1K when it was not given.

    Raises:
        InvalidRequestError: not one of the tiers.
    """
    if resolution is None:
        return DEFAULT_TIER
    tier = resolution.upper() if isinstance(resolution, str) else ""
    if tier not in TIER_BUDGETS_PX:
        raise InvalidRequestError(
            f"resolution must be one of {', '.join(TIER_BUDGETS_PX)}.",
            param="resolution",
        )
    return tier


def shown(text: str) -> str:
    """Quote a client's text for an error message: short, and plain ASCII."""
    short = text if len(text) <= SHOWN_MAX_CHARS else f"{text[:SHOWN_MAX_CHARS]}..."
    return ascii(short)


def _nearest_root(numerator: int, denominator: int) -> int:
    """Round sqrt(numerator/denominator) to the nearest multiple of 16, halves up.

    floor(y/2 + 1/2) equals (floor(y) + 1) // 2, so the root of four times the number
    need only be known to its whole part.
    """
    return (isqrt(4 * numerator // (denominator * GRID_PX**2)) + 1) // 2 * GRID_PX


def _floor_root(numerator: int, denominator: int) -> int:
    return isqrt(numerator // (denominator * GRID_PX**2)) * GRID_PX


def _free_pixels(size: Size) -> Size:
    for name, edge in zip(("width", "height"), size, strict=True):
        if edge % GRID_PX:
            below = edge // GRID_PX * GRID_PX
            near = f"{below} or {below + GRID_PX}" if below else str(GRID_PX)
            raise _wrong(
                f"The {name} must be a multiple of {GRID_PX} px, and {edge} is not: "
                f"use {near}."
            )
    if max(size) > EDGE_MAX_PX:
        raise _wrong(
            f"No edge may be over {EDGE_MAX_PX} px, and {size.text} has one of "
            f"{max(size)}: use a smaller size."
        )
    if max(size) > ASPECT_MAX * min(size):
        raise _wrong(
            f"The longer edge may be at most {ASPECT_MAX} times the shorter, and in "
            f"{size.text} it is not: choose between 1:3 and 3:1."
        )
    if size.area_px < AREA_MIN_PX:
        raise _wrong(
            f"A picture needs at least {AREA_MIN_PX:,} pixels, and {size.text} has "
            f"{size.area_px:,}: use a larger size such as 1024x1024."
        )
    if size.area_px > AREA_MAX_PX:
        raise _wrong(
            f"A picture may have at most {AREA_MAX_PX:,} pixels, and {size.text} has "
            f"{size.area_px:,}: use a smaller size such as 2880x2880."
        )
    return size


def _table_pixels(size: Size) -> Size:
    if size not in TABLE_SIZES.values():
        raise _not_in_table(size.text)
    return size


def _table_ratio(text: str, resolution: object) -> Size:
    if text not in TABLE_SIZES:
        raise _not_in_table(text)
    if parse_tier(resolution) != DEFAULT_TIER:
        raise InvalidRequestError(
            f"This model makes pictures at {DEFAULT_TIER} only: leave resolution out "
            "or use another model.",
            param="resolution",
        )
    return TABLE_SIZES[text]


def _not_in_table(text: str) -> InvalidRequestError:
    ratios = ", ".join(TABLE_SIZES)
    pixels = ", ".join(size.text for size in TABLE_SIZES.values())
    return _wrong(
        f"This model cannot make {shown(text)}: use auto, {ratios}, {pixels}."
    )


def _wrong(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="size")
