"""Routing preferences as they are given: by header, by body, by key."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import Capabilities, Catalogue, Offer, PerImage
from gateway.core.errors import ForbiddenError, InvalidRequestError
from gateway.core.idempotency import fingerprint
from gateway.core.orders import order_json, request_from
from gateway.core.preferences import (
    NAMES_MAX,
    Said,
    check_said,
    parse_headers,
    parse_routing,
    parse_routing_text,
    routing_facts,
    routing_from_text,
    routing_text,
    strange_headers,
)
from gateway.core.requests import parse_edit_form, parse_generation
from gateway.core.routing import NO_PREFERENCES, Preferences, Sort
from gateway.settings import load_settings

NAMES = ("thrifty", "fair")
VARIANTS = load_settings(None, {}, kinds=None).variants
CATALOGUE = Catalogue(
    VARIANTS,
    {
        name: tuple(
            Offer(upstream, name, "m", PerImage(flat=1), Capabilities())
            for upstream in NAMES
        )
        for name in VARIANTS
    },
)
ALL = {
    "only": ["thrifty", "fair/gpt-image-2"],
    "ignore": ["fair"],
    "order": ["thrifty"],
    "sort": "latency",
    "max_credits": Decimal("12.5"),
    "allow_fallbacks": False,
}
READ = Preferences(
    only=("thrifty", "fair/gpt-image-2"),
    ignore=("fair",),
    order=("thrifty",),
    sort=Sort.LATENCY,
    max_nanocredits=12_500_000_000,
    allow_fallbacks=False,
)


def wrong(value: object) -> str | None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_routing(value)
    return caught.value.param


def test_every_field_is_read() -> None:
    assert parse_routing(ALL) == READ


def test_headers_say_the_same_as_a_body() -> None:
    headers = [
        ("x-route-only", "thrifty , fair/gpt-image-2"),
        ("x-route-ignore", "fair"),
        ("x-route-order", "thrifty"),
        ("x-route-sort", "latency"),
        ("x-route-max-credits", "12.5"),
        ("x-route-allow-fallbacks", "False"),
    ]

    assert parse_headers(headers) == READ
    assert parse_headers([("x-route-only", ""), ("accept", "*/*")]) == NO_PREFERENCES


def test_a_header_that_comes_twice_is_one_list() -> None:
    twice = [("x-route-order", "fair"), ("x-route-order", "thrifty")]

    assert parse_headers(twice).order == ("fair", "thrifty")


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "routing"),
        ("only", "routing"),
        ({"onyl": ["a"]}, "routing.onyl"),
        ({"only": "thrifty"}, "routing.only"),
        ({"only": []}, "routing.only"),
        ({"only": ["a"] * (NAMES_MAX + 1)}, "routing.only"),
        ({"only": ["thrifty", 7]}, "routing.only[1]"),
        ({"ignore": [""]}, "routing.ignore[0]"),
        ({"order": [["a"]]}, "routing.order[0]"),
        ({"sort": "cheapest"}, "routing.sort"),
        ({"sort": ["price"]}, "routing.sort"),
        ({"max_credits": True}, "routing.max_credits"),
        ({"max_credits": -1}, "routing.max_credits"),
        ({"max_credits": Decimal("-0.5")}, "routing.max_credits"),
        ({"max_credits": Decimal("0.1234567891")}, "routing.max_credits"),
        ({"max_credits": "0.1234567891"}, "routing.max_credits"),
        ({"max_credits": "1e3"}, "routing.max_credits"),
        ({"max_credits": Decimal("1e999999999")}, "routing.max_credits"),
        ({"max_credits": Decimal("1e-999999999")}, "routing.max_credits"),
        ({"max_credits": Decimal("NaN")}, "routing.max_credits"),
        ({"max_credits": 10**5000}, "routing.max_credits"),
        ({"allow_fallbacks": "false"}, "routing.allow_fallbacks"),
    ],
)
def test_what_is_wrong_is_named(value: object, param: str) -> None:
    assert wrong(value) == param


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-route-only": ","}, "X-Route-Only"),
        ({"x-route-only": "a," + "b" * 130}, "X-Route-Only[1]"),
        ({"x-route-sort": "best"}, "X-Route-Sort"),
        ({"x-route-max-credits": "a lot"}, "X-Route-Max-Credits"),
        ({"x-route-allow-fallbacks": "maybe"}, "X-Route-Allow-Fallbacks"),
    ],
)
def test_a_wrong_header_is_named_by_its_name(
    headers: dict[str, str], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_headers(headers.items())

    assert caught.value.param == param


def test_a_header_that_is_no_preference_is_told_and_has_no_effect() -> None:
    headers = [("x-route-onyl", "a"), ("x-route-only", "b"), ("x-request-id", "c")]

    assert strange_headers(headers) == ["x-route-onyl"]


def test_a_limit_of_credits_is_exact_to_the_last_place() -> None:
    text = '{"max_credits": 8000000000.123456789}'

    limit = parse_routing(parse_routing_text(text)).max_nanocredits

    assert limit == 8_000_000_000_123_456_789


names = st.none() | st.lists(st.sampled_from(["a", "b", "c/d"]), min_size=1).map(tuple)
preferences = st.builds(
    Preferences,
    only=names,
    ignore=names,
    order=names,
    sort=st.none() | st.sampled_from(Sort),
    max_nanocredits=st.none() | st.integers(0, 2**63 - 1),
    allow_fallbacks=st.none() | st.booleans(),
)


@given(preferences)
def test_what_is_written_down_is_read_again_with_the_same_effect(
    said: Preferences,
) -> None:
    again = routing_from_text(routing_text(said))

    assert routing_facts(again) == routing_facts(said)
    assert again.max_nanocredits == said.max_nanocredits
    assert {*(again.only or ())} == {*(said.only or ())}
    assert again.attempts_max == said.attempts_max


def check(
    *, free: bool = True, catalogue: Catalogue = CATALOGUE, **said: Preferences
) -> None:
    check_said(Said(**said), "gpt-image-2", catalogue, tenants_may_choose=free)


def test_for_who_names_nothing_no_offer_is_looked_at() -> None:
    class Unread(dict[str, Any]):
        def values(self) -> Any:
            raise AssertionError("looked at, for every request")

    catalogue = Catalogue(VARIANTS, Unread(CATALOGUE.offers))

    check(body=Preferences(sort=Sort.LATENCY, ignore=()), catalogue=catalogue)
    with pytest.raises(AssertionError):
        check(body=Preferences(only=("fair",)), catalogue=catalogue)


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InvalidRequestError, match="served by fair, thrifty") as caught:
        check(body=Preferences(order=("fair", "nobody")))

    assert caught.value.param == "routing.order[1]"


def test_an_unknown_name_in_a_header_is_named_by_the_header() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(header=Preferences(ignore=("nobody",)))

    assert caught.value.param == "X-Route-Ignore[0]"


def test_what_a_key_keeps_may_name_what_is_gone() -> None:
    check(key=Preferences(only=("nobody",)))


@pytest.mark.parametrize(
    "said",
    [
        Preferences(only=("nobody",)),
        Preferences(ignore=()),
        Preferences(sort=Sort.PRICE),
        Preferences(allow_fallbacks=True),
    ],
)
def test_where_tenants_may_not_choose_nothing_is_chosen_and_nothing_named(
    said: Preferences,
) -> None:
    with pytest.raises(ForbiddenError) as caught:
        check(free=False, body=said)

    assert caught.value.code == "routing_not_allowed"
    assert not any(name in str(caught.value) for name in NAMES)


def test_a_limit_of_their_own_spending_is_always_for_tenants_to_set() -> None:
    check(free=False, body=Preferences(max_nanocredits=1), key=READ)


def request(**fields: Any) -> Any:
    return parse_generation({"prompt": "a fox", **fields}, CATALOGUE)


def test_requests_that_go_elsewhere_are_not_the_same() -> None:
    prints = {
        fingerprint(request(**fields), ())
        for fields in (
            {},
            {"routing": {"only": ["fair"]}},
            {"routing": {"only": ["thrifty"]}},
            {"routing": {"max_credits": 9}},
            {"routing": {"allow_fallbacks": False}},
        )
    }

    assert len(prints) == 5


def test_the_spelling_of_preferences_does_not_count() -> None:
    usual = {"sort": "price", "allow_fallbacks": True, "ignore": [], "order": None}
    one = {"only": ["fair", "thrifty"], "max_credits": 9}
    other = {"only": ["thrifty", "fair", "fair"], "max_credits": Decimal("9.0")}

    assert fingerprint(request(routing=usual), ()) == fingerprint(request(), ())
    assert fingerprint(request(routing=one), ()) == fingerprint(
        request(routing=other), ()
    )


def test_an_order_for_later_keeps_them() -> None:
    asked = request(routing=ALL)

    kept = request_from(order_json(asked, 0, has_mask=False), CATALOGUE)

    assert kept is not None
    assert routing_facts(kept.routing) == routing_facts(READ)


def test_an_order_that_was_written_down_before_there_were_any_is_still_read() -> None:
    facts = json.loads(order_json(request(), 0, has_mask=False))
    del facts["routing"]

    kept = request_from(json.dumps(facts), CATALOGUE)

    assert kept is not None
    assert kept.routing == NO_PREFERENCES


def test_a_form_brings_them_as_json_in_a_text_field() -> None:
    form = {"prompt": "a hat", "routing": '{"max_credits": 0.1, "only": ["fair"]}'}

    asked = parse_edit_form(form, 1, CATALOGUE, has_mask=False)

    assert asked.routing == Preferences(only=("fair",), max_nanocredits=100_000_000)


@pytest.mark.parametrize("text", ["only fair", "{", "[" * 100_000, "7", "NaN"])
def test_a_form_field_that_is_no_object_is_refused(text: str) -> None:
    form = {"prompt": "a hat", "routing": text}

    with pytest.raises(InvalidRequestError) as caught:
        parse_edit_form(form, 1, CATALOGUE, has_mask=False)

    assert caught.value.param == "routing"
