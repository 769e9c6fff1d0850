"""From the words of size and resolution to pixels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import TokenRule
from gateway.core.errors import InvalidRequestError
from gateway.core.sizes import (
    AREA_MAX_PX,
    AREA_MIN_PX,
    EDGE_MAX_PX,
    RATIOS,
    TIER_BUDGETS_PX,
    Size,
    resolve_size,
)

TILES, TABLE = TokenRule.TILES, TokenRule.TABLE

PORTRAITS = {
    "1:1": ("1024x1024", "2048x2048", "2880x2880"),
    "1:2": ("720x1456", "1456x2896", "1920x3840"),
    "1:3": ("592x1776", "1184x3552", "1280x3840"),
    "2:3": ("832x1248", "1680x2512", "2352x3520"),
    "3:4": ("880x1184", "1776x2368", "2480x3312"),
    "4:5": ("912x1152", "1824x2288", "2576x3216"),
    "9:16": ("768x1360", "1536x2736", "2160x3840"),
    "9:21": ("672x1568", "1344x3136", "1648x3840"),
}
"""The published table; a landscape is its portrait, swapped."""


def turned(text: str, sign: str) -> str:
    return sign.join(reversed(text.split(sign)))


CELLS = [
    cell
    for ratio, row in PORTRAITS.items()
    for tier, pixels in zip(("1K", "2K", "4K"), row, strict=True)
    for cell in (
        (ratio, tier, pixels),
        (turned(ratio, ":"), tier, turned(pixels, "x")),
    )
]


def refusal(size: str, resolution: object = None, rule: TokenRule = TILES) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        resolve_size(size, resolution, rule)
    return f"{caught.value.param}: {caught.value}"


def test_the_table_names_every_ratio() -> None:
    assert {ratio for ratio, _, _ in CELLS} == set(RATIOS)
    assert len({cell[:2] for cell in CELLS}) == 45


@pytest.mark.parametrize(("ratio", "tier", "pixels"), CELLS)
def test_a_ratio_and_a_tier_give_the_published_pixels(
    ratio: str, tier: str, pixels: str
) -> None:
    size = resolve_size(ratio, tier, TILES)

    assert size is not None
    assert size.text == pixels


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("tier", TIER_BUDGETS_PX)
def test_a_size_from_the_table_may_also_be_asked_for_as_pixels(
    ratio: str, tier: str
) -> None:
    size = resolve_size(ratio, tier, TILES)

    assert size is not None
    assert resolve_size(size.text, None, TILES) == size


def test_auto_leaves_the_pixels_to_the_model() -> None:
    assert resolve_size("auto", "4K", TILES) is None


@pytest.mark.parametrize("tier", ["2k", "2K"])
def test_a_tier_may_be_written_in_any_case(tier: str) -> None:
    assert resolve_size("16:9", tier, TILES) == (2736, 1536)


def test_a_ratio_without_a_tier_is_made_at_1k() -> None:
    assert resolve_size("16:9", None, TILES) == (1360, 768)


@pytest.mark.parametrize("sign", ["x", "X", "\u00d7"])
def test_pixels_may_be_written_with_any_sign(sign: str) -> None:
    assert resolve_size(f"1536{sign}1024", None, TILES) == Size(1536, 1024)


@pytest.mark.parametrize("resolution", ["8K", 4, ["1K"]])
def test_a_tier_is_not_even_looked_at_without_a_ratio(resolution: object) -> None:
    assert resolve_size("1024x1024", resolution, TILES) == (1024, 1024)
    assert resolve_size("auto", resolution, TILES) is None


@pytest.mark.parametrize("resolution", ["8K", "", 4, ["1K"]])
def test_an_unknown_tier_is_refused(resolution: object) -> None:
    assert refusal("1:1", resolution) == (
        "resolution: resolution must be one of 1K, 2K, 4K."
    )


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("1000x1024", "The width must be a multiple of 16 px, and 1000 is not: use 99"),
        ("1024x1000", "The height must be a multiple of 16 px"),
        ("8x1024", "use 16."),
        ("4096x4096", "No edge may be over 3840 px"),
        ("3840x1264", "at most 3 times the shorter"),
        ("800x800", "at least 655,360 pixels, and 800x800 has 640,000"),
        ("3840x2176", "at most 8,294,400 pixels"),
    ],
)
def test_each_broken_rule_of_pixels_says_what_to_do(size: str, says: str) -> None:
    assert says in refusal(size)


@pytest.mark.parametrize("size", ["3840x2160", "2160x3840", "1024x640", "3840x1280"])
def test_the_very_limits_are_allowed(size: str) -> None:
    made = resolve_size(size, None, TILES)

    assert made is not None
    assert made.text == size


@pytest.mark.parametrize(
    "size",
    [
        "17:3",
        "",
        "1024",
        "0x1024",
        "-16x16",
        "1024 x 1024",
        "\u0661:1",
        "AUTO",
        "1024*9",
    ],
)
def test_what_is_no_size_is_refused_with_all_that_is(size: str) -> None:
    said = refusal(size)

    assert said.startswith("size: ")
    assert said.isascii()
    assert "21:9" in said


def test_a_long_wrong_size_is_not_repeated_in_full() -> None:
    assert len(refusal("9" * 100_000)) < 300


@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        ("1:1", (1024, 1024)),
        ("2:3", (1024, 1536)),
        ("3:2", (1536, 1024)),
        ("1536x1024", (1536, 1024)),
        ("auto", None),
    ],
)
def test_the_older_family_makes_three_sizes(
    size: str, pixels: tuple[int, int] | None
) -> None:
    assert resolve_size(size, None, TABLE) == pixels


@pytest.mark.parametrize("size", ["16:9", "2048x2048", "17:3"])
def test_the_older_family_refuses_any_other_size(size: str) -> None:
    assert "use auto, 1:1, 2:3, 3:2, 1024x1024" in refusal(size, None, TABLE)


def test_the_older_family_does_not_pretend_to_make_4k() -> None:
    assert refusal("1:1", "4k", TABLE).startswith("resolution: ")
    assert resolve_size("1:1", "1k", TABLE) == (1024, 1024)


@given(st.integers(1, 300), st.integers(1, 300))
def test_whatever_passes_keeps_every_rule(columns: int, rows: int) -> None:
    size = Size(columns * 16, rows * 16)
    keeps = (
        max(size) <= EDGE_MAX_PX
        and max(size) <= 3 * min(size)
        and AREA_MIN_PX <= size.area_px <= AREA_MAX_PX
    )

    try:
        passed = resolve_size(size.text, None, TILES) == size
    except InvalidRequestError:
        passed = False

    assert passed == keeps
