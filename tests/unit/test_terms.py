"""A tenant's own prices: how they are given, and what a request costs by them."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import Catalogue, TenantPrice, TokenPrice, Variant
from gateway.core.errors import InvalidRequestError
from gateway.core.orders import order_json, request_from
from gateway.core.pricing import charge_nanocredits, hold_nanocredits
from gateway.core.requests import ImageRequest
from gateway.core.sizes import Size
from gateway.core.terms import (
    USUAL,
    Terms,
    amount_nano,
    at_price,
    card_facts,
    cards_from,
    cards_text,
    multiplier_text,
    parse_cards,
    parse_multiplier,
    price_facts,
    priced,
)
from providers.kit.contract import Usage

CARD = TokenPrice(306_000, 76_500, 489_600, 122_400, 1_836_000)
VARIANT = Variant("gpt-image-2", CARD, {"low": 16, "medium": 48, "high": 96})
OWN = {
    "text_input": "0.1",
    "text_cached": "0",
    "image_input": 1,
    "image_cached": "0.000001",
    "image_output": "2.5",
}
USAGES = st.builds(Usage, *[st.integers(0, 20_000)] * 5)


@given(USAGES, st.integers(1, 1_000_000_000))
def test_a_price_is_exact_and_rounded_once_half_up(usage: Usage, by: int) -> None:
    found = TenantPrice(CARD, by).total(usage)

    exact = Fraction(CARD.total(usage) * by, 1_000_000)
    assert found - Fraction(1, 2) <= exact < found + Fraction(1, 2)


def test_half_a_nano_credit_is_rounded_up() -> None:
    one = TokenPrice(1, 1, 1, 1, 1)

    assert TenantPrice(one, 500_000).total(Usage(text_input=3)) == 2
    assert TenantPrice(one, 499_999).total(Usage(text_input=1)) == 0


@given(USAGES)
def test_without_terms_nothing_is_rounded(usage: Usage) -> None:
    assert charge_nanocredits(usage, priced(VARIANT, USUAL)) == CARD.total(usage)


@given(st.integers(1, 1_000_000_000))
def test_a_hold_is_above_zero_and_covers_the_charge(by: int) -> None:
    request = ImageRequest(
        priced(VARIANT, Terms(by)), "a fox", Size(1024, 1024), "low", n=2
    )

    held = hold_nanocredits(request)

    assert held >= 1
    assert held >= charge_nanocredits(Usage(text_input=4), request.variant)


def test_a_price_survives_being_written_down() -> None:
    own = priced(VARIANT, Terms(1_500_000, parse_cards({"gpt-image-2": OWN}, _KNOWN)))

    assert own.price == TokenPrice(100_000, 0, 1_000_000, 1, 2_500_000)
    assert at_price(VARIANT, price_facts(own)) == own


_KNOWN = ("gpt-image-2", "gpt-image-1.5")


def test_own_cards_are_given_and_shown_alike() -> None:
    cards = parse_cards({"gpt-image-2": OWN}, _KNOWN)

    assert cards_from(cards_text(cards)) == cards
    assert parse_cards(card_facts(cards), _KNOWN) == cards
    assert (parse_cards(None, _KNOWN), cards_text({})) == ({}, None)
    assert priced(VARIANT, Terms(cards=cards)).price == cards["gpt-image-2"]


@pytest.mark.parametrize(
    ("given_", "shown"),
    [("1", "1"), (2, "2"), ("0.000001", "0.000001"), ("1000", "1000"), ("1.50", "1.5")],
)
def test_multipliers_have_six_decimals(given_: object, shown: str) -> None:
    assert multiplier_text(parse_multiplier(given_)) == shown


BAD_AMOUNTS = [
    "",
    "-1",
    "+1",
    "1e3",
    "1E3",
    "NaN",
    "Infinity",
    "0x10",
    "1,5",
    " 1",
    "1_000",
    ".5",
    "1.",
    "0.0000000001",
    "99999999999",
    "9223372036.854775808",
    "\u0661",
    10**30,
    -1,
    True,
    1.5,
    None,
    [],
    {},
]


@pytest.mark.parametrize("value", BAD_AMOUNTS, ids=repr)
def test_what_is_no_amount_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        amount_nano(value, "credits")
    assert refused.value.param == "credits"


@pytest.mark.parametrize("value", [*BAD_AMOUNTS, "0", "0.0000001", "1000.000001"])
def test_what_is_no_multiplier_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError):
        parse_multiplier(value)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"gpt-9": OWN},
        {"gpt-image-2": {}},
        {"gpt-image-2": OWN | {"more": "1"}},
        {"gpt-image-2": OWN | {"text_input": "0.0000001"}},
        {"gpt-image-2": OWN | {"text_input": "1000000.1"}},
        {"gpt-image-2": OWN | {"text_input": "-1"}},
        {str(n): OWN for n in range(65)},
    ],
)
def test_what_is_no_card_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError):
        parse_cards(value, _KNOWN)


def test_a_task_that_waits_is_settled_at_the_price_that_it_was_held_at() -> None:
    own = priced(VARIANT, Terms(1_500_000))
    request = ImageRequest(own, "a fox", Size(1024, 1024), "low")
    dearer = replace(VARIANT, price=TokenPrice(9, 9, 9, 9, 9))
    catalogue = Catalogue({"gpt-image-2": dearer}, {})

    text = order_json(request, 0, has_mask=False)
    later = request_from(text, catalogue)

    assert later == request
    before = json.dumps({k: v for k, v in json.loads(text).items() if k != "price"})
    from_before = request_from(before, catalogue)
    assert from_before is not None
    assert from_before.variant == dearer
