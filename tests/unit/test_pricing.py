"""What tenants pay and what it costs the operator, to the last nano."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import (
    Capabilities,
    CostCard,
    Offer,
    PerImage,
    PerMegapixel,
    PerToken,
    TokenPrice,
    Usage,
)
from gateway.core.money import NANO, decimal_text
from gateway.core.pricing import (
    COST_SOURCES,
    charge_nanocredits,
    estimate,
    hold_nanocredits,
    offer_cost_nanousd,
    real_cost,
)
from gateway.core.requests import ImageRequest
from gateway.core.sizes import (
    RATIOS,
    TIER_BUDGETS_PX,
    Size,
    resolve_size,
    size_class,
)
from gateway.settings import load_settings
from providers.kit.contract import Done
from tests.fakes import a_picture

SETTINGS = load_settings(None, {}, kinds={"sandbox", "openai"})
GPT_2 = SETTINGS.variants["gpt-image-2"]
PER_USD = SETTINGS.nanocredits_per_usd
SQUARE = Size(1024, 1024)
QUALITIES = ("low", "medium", "high")


def asked(quality: str = "low", size: Size | None = SQUARE, n: int = 1) -> ImageRequest:
    return ImageRequest(variant=GPT_2, prompt="", size=size, quality=quality, n=n)


def an_offer(cost: CostCard) -> Offer:
    return Offer("up", "gpt-image-2", "gpt-image-2", cost, Capabilities())


def test_the_product_pages_range_comes_out_to_the_last_digit() -> None:
    prices = {
        (ratio, tier, quality, references): hold_nanocredits(
            replace(
                asked(quality, resolve_size(ratio, tier, GPT_2.token_rule)),
                references=("https://a.test/1",) * references,
            )
        )
        for ratio in (*RATIOS, "auto")
        for tier in TIER_BUDGETS_PX
        for quality in QUALITIES
        for references in range(17)
    }

    assert len(prices) == 16 * 3 * 3 * 17
    low, high = min(prices.values()), max(prices.values())
    assert (low, high) == (113_832_000, 55_580_493_600)
    assert (decimal_text(low), decimal_text(high)) == ("0.113832", "55.5804936")
    assert {where for where, price in prices.items() if price == low} == {
        ("1:3", "1K", "low", 0),
        ("3:1", "1K", "low", 0),
    }
    assert {where for where, price in prices.items() if price == high} == {
        ("1:1", "4K", "high", 16)
    }


@pytest.mark.parametrize(
    ("quality", "credits_", "usd"),
    [
        ("low", "0.359856", "0.005292"),
        ("medium", "3.224016", "0.047412"),
        ("high", "12.896064", "0.189648"),
    ],
)
def test_the_known_prices_of_a_square_come_out(
    quality: str, credits_: str, usd: str
) -> None:
    quoted = estimate(asked(quality), nanocredits_per_usd=PER_USD)

    assert quoted.low == quoted.high
    assert decimal_text(quoted.high.nanocredits) == credits_
    assert decimal_text(quoted.high.nanousd) == usd


@pytest.mark.parametrize(
    ("usage", "credits_"),
    [
        (Usage(image_output=1000), "1.836"),
        (Usage(image_input=1000), "0.4896"),
        (Usage(image_cached=1000), "0.1224"),
        (Usage(text_input=1000), "0.306"),
        (Usage(text_cached=1000), "0.0765"),
        (Usage(text_cached=1), "0.0000765"),
    ],
)
def test_every_class_of_token_has_the_page_price(usage: Usage, credits_: str) -> None:
    assert decimal_text(charge_nanocredits(usage, GPT_2)) == credits_


@pytest.mark.parametrize(
    ("variant", "credits_"),
    [("gpt-image-1.5", "1.9584"), ("gpt-image-1-mini", "0.4896")],
)
def test_the_older_models_cost_nine_tenths_of_the_list(
    variant: str, credits_: str
) -> None:
    price = SETTINGS.variants[variant].price

    assert decimal_text(price.image_output * 1000) == credits_


def test_an_estimate_counts_every_picture() -> None:
    one = estimate(replace(asked(), prompt="x"), nanocredits_per_usd=PER_USD)
    ten = estimate(replace(asked(n=10), prompt="x"), nanocredits_per_usd=PER_USD)

    assert ten.high.usage == one.high.usage.times(10)
    assert ten.low.nanocredits == 10 * one.low.nanocredits


def test_a_range_is_as_wide_as_what_is_left_open() -> None:
    quoted = estimate(asked("auto", None), nanocredits_per_usd=PER_USD)

    assert quoted.low.usage.image_output == 62
    assert quoted.high.usage.image_output == 14272


def test_a_token_card_is_exact() -> None:
    offer = an_offer(PerToken(TokenPrice(5000, 1250, 8000, 2000, 30_000)))

    cost = offer_cost_nanousd(offer, Usage(13, 0, 1, 0, 196), SQUARE, "low", 3)

    assert cost == 3 * (13 * 5000 + 8000 + 196 * 30_000)


@pytest.mark.parametrize(
    ("size", "quality", "cost"),
    [
        (SQUARE, "low", 6),
        (Size(2048, 2048), "low", 7),
        (Size(3840, 2160), "high", 8),
        (None, "high", 9),
        (Size(2048, 2048), "high", None),
        (None, "medium", None),
    ],
)
def test_a_table_is_read_from_the_exact_row_to_the_general_one(
    size: Size | None, quality: str, cost: int | None
) -> None:
    rows = {"low/1024x1024": 6, "low/*": 7, "*/3840x2160": 8, "high/auto": 9}
    offer = an_offer(PerImage(table=rows))

    assert offer_cost_nanousd(offer, Usage(), size, quality, 1) == cost
    assert offer_cost_nanousd(offer, Usage(), size, quality, 2) == (cost and 2 * cost)


def test_a_class_of_sizes_prices_what_no_row_names_by_its_pixels() -> None:
    rows = {"low/1024x1024": 6, "low/1K": 7, "low/*": 9, "*/2048x2048": 20, "*/2K": 22}
    offer = an_offer(PerImage(table={**rows, "*/4K": 44}))

    def price(size: Size | None, quality: str) -> int | None:
        return offer_cost_nanousd(offer, Usage(), size, quality, 1)

    assert price(SQUARE, "low") == 6
    assert price(Size(1360, 768), "low") == 7
    assert price(Size(3840, 2160), "low") == 9
    assert price(Size(2048, 2048), "high") == 20
    assert price(Size(2736, 1536), "high") == 22
    assert price(Size(2880, 2880), "high") == 44
    assert price(SQUARE, "high") is None
    assert price(None, "high") is None


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (None, "auto"),
        (Size(1536, 1024), "1K"),
        (Size(1700, 1000), "1K"),
        (Size(1701, 1000), "2K"),
        (Size(2736, 1536), "2K"),
        (Size(2200, 2000), "2K"),
        (Size(2201, 2000), "4K"),
        (Size(3840, 2160), "4K"),
        (Size(9999, 9999), "4K"),
    ],
)
def test_sizes_fall_into_three_classes(size: Size | None, named: str) -> None:
    assert size_class(size) == named


@pytest.mark.parametrize("tier", TIER_BUDGETS_PX)
def test_every_ratio_of_a_tier_is_of_its_class(tier: str) -> None:
    sizes = {resolve_size(ratio, tier, GPT_2.token_rule) for ratio in RATIOS}

    assert {size_class(size) for size in sizes} == {tier}


def test_a_flat_price_is_for_what_the_table_does_not_name() -> None:
    offer = an_offer(PerImage(flat=40, table={"low/*": 7}))

    assert offer_cost_nanousd(offer, Usage(), SQUARE, "high", 2) == 80
    assert offer_cost_nanousd(offer, Usage(), SQUARE, "low", 2) == 14


def test_a_megapixel_price_is_rounded_up_for_each_picture() -> None:
    offer = an_offer(PerMegapixel(nanousd=1))

    assert offer_cost_nanousd(offer, Usage(), SQUARE, "low", 1) == 2
    assert offer_cost_nanousd(offer, Usage(), SQUARE, "low", 3) == 6
    assert offer_cost_nanousd(offer, Usage(), None, "low", 1) == 5


def a_job(**said: Any) -> Done:
    return Done((a_picture(),), **({"usage": None} | said))


TOKEN_PRICE = TokenPrice(5000, 1250, 8000, 2000, 30_000)
REPORTED_USAGE = Usage(text_input=1, image_output=196)


@pytest.mark.parametrize(
    ("card", "said", "cost", "source"),
    [
        (PerToken(TOKEN_PRICE, 10), {"cost_nanousd": 0}, 0, "usd"),
        (PerToken(TOKEN_PRICE), {"cost_nanousd": 3}, 3, "usd"),
        (PerImage(7, unit_nanousd=10), {"cost_nanousd": 3}, 3, "usd"),
        (PerImage(7, unit_nanousd=10), {"units_millionths": 1_500_001}, 16, "units"),
        (PerImage(7, unit_nanousd=10), {"units_millionths": 0}, 0, "units"),
        (PerMegapixel(7, 10), {"units_millionths": 2_000_000}, 20, "units"),
        (
            PerToken(TOKEN_PRICE, 10),
            {"units_millionths": 1, "usage": REPORTED_USAGE},
            1,
            "units",
        ),
        (PerToken(TOKEN_PRICE), {"usage": REPORTED_USAGE}, 5_885_000, "usage"),
        (PerToken(TOKEN_PRICE, 10), {"usage": REPORTED_USAGE}, 5_885_000, "usage"),
        (PerToken(TOKEN_PRICE), {"units_millionths": 5}, 99, "estimate"),
        (PerImage(7), {"units_millionths": 5, "usage": REPORTED_USAGE}, 7, "card"),
        (PerMegapixel(7), {}, 7, "card"),
    ],
)
def test_what_it_cost_comes_from_the_best_source_there_is(
    card: CostCard, said: dict[str, Any], cost: int, source: str
) -> None:
    found = real_cost(
        an_offer(card), a_job(**said), card_nanousd=7, estimate_nanousd=99
    )

    assert found == (cost, source)
    assert source in COST_SOURCES


def test_a_card_that_says_nothing_of_what_was_made_leaves_the_estimate() -> None:
    offer = an_offer(PerImage(table={"low/1K": 1}))

    found = real_cost(offer, a_job(), card_nanousd=None, estimate_nanousd=99)

    assert found == (99, "estimate")


@given(st.integers(0, 10**12), st.integers(1, 10**15))
def test_units_are_rounded_up_to_a_whole_nano_and_never_by_more(
    units_millionths: int, unit_nanousd: int
) -> None:
    offer = an_offer(PerImage(flat=1, unit_nanousd=unit_nanousd))
    done = a_job(units_millionths=units_millionths)

    cost, _ = real_cost(offer, done, card_nanousd=1, estimate_nanousd=1)

    assert 0 <= cost - Fraction(units_millionths * unit_nanousd, 10**6) < 1


AMOUNTS = st.integers(1, 10**15)
PRICES = st.builds(TokenPrice, *[AMOUNTS] * 5)
CARDS: st.SearchStrategy[CostCard] = st.one_of(
    st.builds(PerToken, PRICES),
    st.builds(PerImage, flat=AMOUNTS),
    st.builds(PerMegapixel, AMOUNTS),
)
USAGES = st.builds(Usage, *[st.integers(0, 10**6)] * 5)
SIZES = st.sampled_from([None, SQUARE, Size(592, 1776), Size(2880, 2880)])


@given(CARDS, USAGES, SIZES, st.integers(1, 9))
def test_one_more_picture_always_costs_more_and_in_whole_nanos(
    card: CostCard, usage: Usage, size: Size | None, n: int
) -> None:
    fewer = offer_cost_nanousd(an_offer(card), usage, size, "low", n)
    more = offer_cost_nanousd(an_offer(card), usage, size, "low", n + 1)

    assert type(fewer) is int
    assert type(more) is int
    assert 0 <= fewer <= more


@given(
    PRICES,
    st.text(max_size=40),
    SIZES,
    st.sampled_from(["auto", *QUALITIES]),
    st.integers(1, 10),
)
def test_the_low_end_is_never_over_the_high_end(
    price: TokenPrice, prompt: str, size: Size | None, quality: str, n: int
) -> None:
    request = ImageRequest(
        variant=replace(GPT_2, price=price),
        prompt=prompt,
        size=size,
        quality=quality,
        n=n,
    )

    quoted = estimate(request, nanocredits_per_usd=68 * NANO)

    assert 0 < quoted.low.nanocredits <= quoted.high.nanocredits
    assert 0 <= quoted.low.nanousd <= quoted.high.nanousd
    assert quoted.high.nanocredits == hold_nanocredits(request)
    assert {type(quoted.high.nanocredits), type(quoted.high.nanousd)} == {int}
