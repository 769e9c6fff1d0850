"""What a tenant pays instead of the catalogue's prices. Pure.

A multiplier counts in millionths and applies to every price, own cards included. Own
cards replace those of the catalogue, variant by variant.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gateway.core.catalogue import MILLIONTHS, TenantPrice, TokenPrice, Variant
from gateway.core.errors import InvalidRequestError
from gateway.core.money import decimal_text, parse_nano

TOKEN_CLASSES = (
    "text_input",
    "text_cached",
    "image_input",
    "image_cached",
    "image_output",
)
PER_TOKENS = 1_000
"""Own cards say what so many tokens cost, as the catalogue does."""
MULTIPLIER_MAX = 1_000
PRICE_MAX_NANOCREDITS = 1_000_000 * 10**9
"""Of 1,000 tokens."""
CARDS_MAX = 64
NANO_PER_MILLIONTH = 1_000
AMOUNT_DIGITS_MAX = 10
_NO_CARDS: Mapping[str, TokenPrice] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Terms:
    """A tenant's multiplier, and its own cards by variant."""

    multiplier_millionths: int = MILLIONTHS
    cards: Mapping[str, TokenPrice] = field(default_factory=dict)


USUAL = Terms()


def priced(variant: Variant, terms: Terms) -> Variant:
    """Return a variant at a tenant's price."""
    if terms == USUAL:
        return variant
    return replace(
        variant,
        price=terms.cards.get(variant.name, variant.price),
        multiplier_millionths=terms.multiplier_millionths,
    )


def price_facts(variant: Variant) -> list[int]:
    """Write a variant's price down: five prices of one token, then the multiplier."""
    return price_row(variant.tenant_price)


def price_row(price: TenantPrice) -> list[int]:
    """Write a price as whole numbers, by ``TOKEN_CLASSES``, then the multiplier."""
    prices = [getattr(price.card, name) for name in TOKEN_CLASSES]
    return [*prices, price.multiplier_millionths]


def at_price(variant: Variant, facts: Sequence[int]) -> Variant:
    """Return a variant at a price that was written down."""
    *prices, multiplier_millionths = facts
    return replace(
        variant,
        price=TokenPrice(*prices),
        multiplier_millionths=multiplier_millionths,
    )


def amount_nano(value: object, name: str) -> int:
    """Read an amount of credits, given as a text or as a whole number.

    A number with a fraction is expected as the text that was sent: see
    ``api.http.read_texts_json``.

    Raises:
        InvalidRequestError: it is no plain decimal of at most 9 decimals.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    text = str(value)[: AMOUNT_DIGITS_MAX + 1] if whole else value
    try:
        if not isinstance(text, str):
            return parse_nano("")
        return parse_nano(text)
    except ValueError as error:
        raise InvalidRequestError(f"{name} {error}.", param=name) from error


def parse_multiplier(value: object, name: str = "price_multiplier") -> int:
    """Read a multiplier as millionths.

    Raises:
        InvalidRequestError: it is no plain decimal above 0, up to 1,000, with at most
            6 decimals.
    """
    nano = amount_nano(value, name)
    millionths, rest = divmod(nano, NANO_PER_MILLIONTH)
    if rest or not 0 < millionths <= MULTIPLIER_MAX * MILLIONTHS:
        raise InvalidRequestError(
            f"{name} must be above 0 and at most {MULTIPLIER_MAX:,}, with at most 6 "
            "decimals.",
            param=name,
        )
    return millionths


def multiplier_text(millionths: int) -> str:
    """Write a multiplier as the shortest decimal."""
    return decimal_text(millionths * NANO_PER_MILLIONTH)


def parse_cards(value: object, known: Collection[str]) -> Mapping[str, TokenPrice]:
    """Read own cards: by variant, what 1,000 tokens of each class cost in credits.

    Raises:
        InvalidRequestError: a variant or class is not known, one is missing, or a price
            is not a whole number of nano-credits per token.
    """
    if value is None:
        return _NO_CARDS
    if not isinstance(value, dict) or len(value) > CARDS_MAX:
        raise InvalidRequestError(
            f"prices must be an object of at most {CARDS_MAX} models.", param="prices"
        )
    return {str(name): _card(str(name), card, known) for name, card in value.items()}


def _card(variant: str, card: object, known: Collection[str]) -> TokenPrice:
    where = f"prices.{variant[:64]}"
    if variant not in known:
        raise InvalidRequestError(
            f"{where}: there is no such model. There are: {', '.join(sorted(known))}.",
            param="prices",
        )
    if not isinstance(card, dict) or set(card) != set(TOKEN_CLASSES):
        raise InvalidRequestError(
            f"{where} must say what 1,000 tokens cost of each of "
            f"{', '.join(TOKEN_CLASSES)}.",
            param=where,
        )
    return TokenPrice(
        **{name: _price(card[name], f"{where}.{name}") for name in TOKEN_CLASSES}
    )


def _price(value: object, where: str) -> int:
    nano = amount_nano(value, where)
    each, rest = divmod(nano, PER_TOKENS)
    if rest or nano > PRICE_MAX_NANOCREDITS:
        raise InvalidRequestError(
            f"{where} must be at most {decimal_text(PRICE_MAX_NANOCREDITS)} with at "
            "most 6 decimals: a token costs whole nano-credits.",
            param=where,
        )
    return each


def card_facts(cards: Mapping[str, TokenPrice]) -> dict[str, dict[str, str]]:
    """Write own cards as they are given."""
    return {
        variant: {
            name: decimal_text(getattr(card, name) * PER_TOKENS)
            for name in TOKEN_CLASSES
        }
        for variant, card in sorted(cards.items())
    }


def cards_text(cards: Mapping[str, TokenPrice]) -> str | None:
    """Write own cards for the store, as prices of one token; None for no card."""
    if not cards:
        return None
    rows = {
        variant: [getattr(card, name) for name in TOKEN_CLASSES]
        for variant, card in sorted(cards.items())
    }
    return json.dumps(rows)


def cards_from(text: str | None) -> Mapping[str, TokenPrice]:
    """Read what ``cards_text`` wrote."""
    if text is None:
        return _NO_CARDS
    return {variant: TokenPrice(*row) for variant, row in json.loads(text).items()}


def terms_from(multiplier_millionths: int, cards: str | None) -> Terms:
    """Read terms as the store keeps them."""
    if cards is None and multiplier_millionths == MILLIONTHS:
        return USUAL
    return Terms(multiplier_millionths, cards_from(cards))
