"""Token counts against every number that was ever published."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import Usage
from gateway.core.requests import ImageRequest
from gateway.core.sizes import RATIOS, Size, resolve_size
from gateway.core.tokens import (
    bound_usage,
    estimated_usage,
    expected_usage,
    least_usage,
    output_tokens,
    reference_tokens,
)
from gateway.settings import load_settings

VARIANTS = load_settings(None, {}, kinds={"sandbox", "openai"}).variants
GPT_2 = VARIANTS["gpt-image-2"]
GPT_2_5 = VARIANTS["gpt-image-2.5-flare"]
GPT_1_5 = VARIANTS["gpt-image-1.5"]
SUNSET = "A beautiful colorful sunset over the ocean"
SQUARE = Size(1024, 1024)

PUBLISHED = [
    ("gpt-image-2", "1024x1024", "low", 196),
    ("gpt-image-2", "1024x1024", "medium", 1756),
    ("gpt-image-2", "1024x1024", "high", 7024),
    ("gpt-image-2", "1536x1024", "high", 5488),
    ("gpt-image-2", "1792x1024", "high", 5063),
    ("gpt-image-2", "3584x2048", "high", 12329),
    ("gpt-image-2", "960x720", "low", 130),
    ("gpt-image-2", "976x704", "low", 129),
    ("gpt-image-2.5-flare", "1024x1024", "low", 196),
    ("gpt-image-2.5-flare", "1024x1024", "medium", 439),
    ("gpt-image-2.5-flare", "1024x1024", "high", 1756),
    ("gpt-image-2.5-flare", "1024x1024", "xhigh", 3122),
    ("gpt-image-2.5-flare", "1024x1024", "max", 7024),
    # what a production log and a reseller's price list add
    ("gpt-image-2", "1536x1024", "low", 158),
    ("gpt-image-2", "1536x1024", "medium", 1372),
    ("gpt-image-2", "2048x2048", "high", 14272),
    ("gpt-image-2.5-sunburst", "1024x1024", "max", 7024),
    ("gpt-image-1.5", "1024x1024", "low", 272),
    ("gpt-image-1.5", "1024x1536", "medium", 1584),
    ("gpt-image-1-mini", "1536x1024", "high", 6208),
]

TABLE = {
    "1:1": ((196, 1756, 7024), (397, 3568, 14272), (659, 5930, 23719)),
    "1:2": ((98, 878, 3439), (199, 1791, 7162), (300, 2700, 10798)),
    "1:3": ((62, 586, 2344), (125, 1192, 4766), (139, 1328, 5311)),
    "2:3": ((134, 1167, 4667), (274, 2389, 9555), (453, 3948, 15789)),
    "3:4": ((147, 1315, 5184), (298, 2681, 10724), (491, 4413, 17650)),
    "4:5": ((159, 1392, 5565), (322, 2816, 11409), (535, 4690, 19006)),
    "9:16": ((110, 987, 3946), (224, 2010, 8039), (371, 3336, 13342)),
    "9:21": ((86, 770, 3005), (175, 1567, 6116), (234, 2099, 8196)),
}
CELLS = [
    (ratio, tier, tokens)
    for portrait, row in TABLE.items()
    for ratio in sorted({portrait, ":".join(reversed(portrait.split(":")))})
    for tier, tokens in zip(("1K", "2K", "4K"), row, strict=True)
]

RESELLER_USD_PER_1000 = [
    ("1024x768", (5, 37, 145)),
    ("1024x1024", (6, 53, 211)),
    ("1024x1536", (5, 42, 165)),
    ("1920x1080", (5, 40, 158)),
    ("2560x1440", (7, 56, 222)),
    ("3840x2160", (12, 101, 401)),
]
"""fal's list, in USD per 1,000 pictures: USD 30 per 1M tokens plus a little text."""


def size_of(text: str) -> Size:
    width, height = text.split("x")
    return Size(int(width), int(height))


def request(**given: Any) -> ImageRequest:
    plain = ImageRequest(variant=GPT_2, prompt=SUNSET, size=SQUARE, quality="low")
    return replace(plain, **given)


@pytest.mark.parametrize(("variant", "size", "quality", "tokens"), PUBLISHED)
def test_every_published_number_comes_out(
    variant: str, size: str, quality: str, tokens: int
) -> None:
    assert output_tokens(VARIANTS[variant], size_of(size), quality) == tokens


@pytest.mark.parametrize(("ratio", "tier", "tokens"), CELLS)
def test_every_cell_of_the_table_comes_out(
    ratio: str, tier: str, tokens: tuple[int, int, int]
) -> None:
    size = resolve_size(ratio, tier, GPT_2.token_rule)

    assert size is not None
    assert tokens == tuple(
        output_tokens(GPT_2, size, quality) for quality in ("low", "medium", "high")
    )


def test_the_table_has_45_cells() -> None:
    assert len(CELLS) == 45
    assert {ratio for ratio, _, _ in CELLS} == set(RATIOS)


@pytest.mark.parametrize(("size", "listed"), RESELLER_USD_PER_1000)
def test_a_resellers_price_list_agrees(size: str, listed: tuple[int, ...]) -> None:
    ours = [
        output_tokens(GPT_2, size_of(size), quality) * 30 / 1000
        for quality in ("low", "medium", "high")
    ]

    assert [abs(a - b) <= 1 for a, b in zip(ours, listed, strict=True)] == [True] * 3


def test_turning_a_picture_changes_nothing() -> None:
    for high, wide in itertools.product(range(656, 1600, 176), repeat=2):
        assert output_tokens(GPT_2, Size(wide, high), "high") == output_tokens(
            GPT_2, Size(high, wide), "high"
        )


def test_high_of_2_5_is_medium_of_2() -> None:
    pairs = {"high": "medium", "max": "high", "low": "low"}

    for newer, older in pairs.items():
        assert output_tokens(GPT_2_5, SQUARE, newer) == output_tokens(
            GPT_2, SQUARE, older
        )


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        (Size(1024, 1024), 1024),
        (Size(1025, 1024), 1056),
        (Size(1, 1), 1),
        (Size(1536, 1024), 1536),
        (Size(8000, 8000), 1536),
    ],
)
def test_a_reference_takes_its_patches_up_to_a_cap(size: Size, tokens: int) -> None:
    assert reference_tokens(size) == tokens


def test_text_is_bound_by_its_bytes_and_an_overhead() -> None:
    assert bound_usage(request(prompt="sunset")).text_input == 12
    assert bound_usage(request(prompt="\u5915\u713c")).text_input == 12
    assert least_usage(request(prompt="\u5915\u713c")).text_input == 7
    assert expected_usage(request(prompt=SUNSET)).text_input == 20


def test_without_a_prompt_no_text_is_counted() -> None:
    empty = request(prompt="")

    assert bound_usage(empty) == least_usage(empty) == Usage(image_output=196)


def test_an_auto_size_is_bound_by_2048_squared_and_starts_at_the_smallest() -> None:
    auto = request(size=None, quality="high")

    assert bound_usage(auto).image_output == 14272
    assert least_usage(auto).image_output == 2344


def test_an_auto_size_of_the_older_family_is_one_of_its_table() -> None:
    auto = request(variant=GPT_1_5, size=None, quality="medium")

    assert bound_usage(auto).image_output == 1584
    assert least_usage(auto).image_output == 1056


@pytest.mark.parametrize(
    ("variant", "low", "high"), [(GPT_2, 196, 7024), (GPT_2_5, 196, 7024)]
)
def test_an_auto_quality_spans_all_that_the_variant_has(
    variant: object, low: int, high: int
) -> None:
    auto = request(variant=variant, quality="auto")

    assert least_usage(auto).image_output == low
    assert bound_usage(auto).image_output == high


def test_references_count_in_full_until_their_size_is_known() -> None:
    edit = request(references=("https://a.test/1", "https://a.test/2"))

    assert bound_usage(edit).image_input == 2 * 1536
    assert least_usage(edit).image_input == 2
    assert expected_usage(edit).image_input == 2 * 1536
    assert expected_usage(edit, [SQUARE, None]).image_input == 1024 + 1536
    assert bound_usage(edit, [SQUARE, None]).image_input == 2 * 1536


def test_a_mask_is_held_for_but_not_charged_by_the_estimate() -> None:
    edit = request(references=("https://a.test/1",), mask="https://a.test/m")

    assert bound_usage(edit).image_input == 2 * 1536
    assert expected_usage(edit, [SQUARE]).image_input == 1024
    settled = estimated_usage(edit, [SQUARE], references=[SQUARE])
    assert settled.image_input == 1024
    assert least_usage(edit).image_input == 1


def test_each_partial_picture_is_held_for_when_streaming() -> None:
    assert bound_usage(request(stream=True, partial_images=3)).image_output == 496
    assert bound_usage(request(stream=False, partial_images=3)).image_output == 196


def test_a_job_without_reported_usage_is_settled_by_what_was_made() -> None:
    asked = request(size=None, quality="high", n=3)

    usage = estimated_usage(asked, [SQUARE, Size(1024, 1536)])

    assert usage == Usage(text_input=40, image_output=7024 + 5488)


def test_the_quality_that_the_upstream_used_counts() -> None:
    asked = request(quality="auto")

    assert estimated_usage(asked, [SQUARE], quality="medium").image_output == 1756
    assert estimated_usage(asked, [SQUARE], quality="superb").image_output == 7024


def test_a_picture_larger_than_asked_is_not_charged_over_the_hold() -> None:
    asked = request(quality="high")

    made = estimated_usage(asked, [Size(2880, 2880)])

    assert made.image_output == bound_usage(asked).image_output


REQUESTS = st.builds(
    ImageRequest,
    variant=st.sampled_from([GPT_2, GPT_2_5, GPT_1_5]),
    prompt=st.text(max_size=60),
    size=st.sampled_from([None, SQUARE, Size(1024, 1536), Size(1536, 1024)]),
    quality=st.sampled_from(["auto", "low", "medium", "high"]),
    n=st.integers(1, 10),
    references=st.lists(st.just("https://a.test/1"), max_size=16).map(tuple),
    mask=st.sampled_from([None, "https://a.test/m"]),
    stream=st.booleans(),
    partial_images=st.integers(0, 3),
)


@given(REQUESTS)
def test_least_expected_and_bound_never_cross(asked: ImageRequest) -> None:
    low, middle, high = least_usage(asked), expected_usage(asked), bound_usage(asked)

    for name in ("text_input", "image_input", "image_output"):
        assert getattr(low, name) <= getattr(middle, name) <= getattr(high, name)


@given(REQUESTS, st.lists(st.sampled_from([SQUARE, Size(3840, 2160)]), max_size=10))
def test_an_estimated_usage_stays_within_the_hold(
    asked: ImageRequest, made: list[Size]
) -> None:
    used = estimated_usage(asked, made)
    held = bound_usage(asked).times(len(made))

    assert used.text_input <= held.text_input
    assert used.image_input <= held.image_input
    assert used.image_output <= held.image_output
