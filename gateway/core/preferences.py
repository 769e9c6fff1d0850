"""Reads routing preferences: from a body, from headers, from what a key keeps. Pure.

A header counts before the body, the body before the key, field by field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation

from gateway.core.catalogue import Catalogue, Offer
from gateway.core.errors import ForbiddenError, InvalidRequestError
from gateway.core.money import DECIMALS_MAX, NANO_MAX, decimal_text, parse_nano
from gateway.core.routing import NO_PREFERENCES, Preferences, Sort
from gateway.core.sizes import shown

NAMES_MAX = 32
NAME_MAX_CHARS = 129
"""Of an offer's id: upstream and variant, 64 characters each, and the stroke."""
HEADER_PREFIX = "x-route-"
HEADERS = {
    "only": "X-Route-Only",
    "ignore": "X-Route-Ignore",
    "order": "X-Route-Order",
    "sort": "X-Route-Sort",
    "max_credits": "X-Route-Max-Credits",
    "allow_fallbacks": "X-Route-Allow-Fallbacks",
}
"""Which header says the same as which field."""
_FIELD_BY_HEADER = {header.lower(): field for field, header in HEADERS.items()}
_LISTS = ("only", "ignore", "order")
_CHOOSING = {*HEADERS} - {"max_credits"}
_SWITCHES: Mapping[str, object] = {"true": True, "false": False, "1": True, "0": False}
_AMOUNT = f"must be a plain decimal such as 12.5, with at most {DECIMALS_MAX} decimals"


@dataclass(frozen=True, slots=True)
class Said:
    """Preferences as they were given, by where."""

    header: Preferences = NO_PREFERENCES
    body: Preferences = NO_PREFERENCES
    key: Preferences = NO_PREFERENCES

    @property
    def together(self) -> Preferences:
        """What counts."""
        return self.header.over(self.body).over(self.key)


def parse_routing(value: object, param: str = "routing") -> Preferences:
    """Read a ``routing`` object; None says nothing.

    Decimals must come as ``Decimal`` or as text: a float would not be exact.

    Raises:
        InvalidRequestError: a field breaks a rule; ``param`` says which.
    """
    if value is None:
        return NO_PREFERENCES
    if not isinstance(value, Mapping):
        raise _wrong(param, 'must be an object such as {"sort": "price"}')
    given = {str(name): each for name, each in value.items() if each is not None}
    strange = [name for name in given if name not in HEADERS]
    if strange:
        known = ", ".join(HEADERS)
        raise _wrong(
            f"{param}.{shown(strange[0])[1:-1]}", f"does not exist; there are {known}"
        )
    return _read(given, lambda name: f"{param}.{name}")


def parse_routing_text(text: str) -> object:
    """Decode JSON with exact decimals; what cannot be decoded stays a text."""
    try:
        return json.loads(text, parse_float=_decimal, parse_constant=_decimal)
    except (ValueError, RecursionError):
        return text


def parse_headers(headers: Iterable[tuple[str, str]]) -> Preferences:
    """Read the ``X-Route-`` headers among others; an empty one says nothing.

    Raises:
        InvalidRequestError: one breaks a rule; ``param`` is its name.
    """
    texts: dict[str, str] = {}
    for name, text in headers:
        field = _FIELD_BY_HEADER.get(name.lower())
        if field is not None and text.strip():
            before = f"{texts[field]}," if field in texts else ""
            texts[field] = before + text.strip()
    given: dict[str, object] = dict(texts)
    for field in _LISTS:
        if field in texts:
            given[field] = [n.strip() for n in texts[field].split(",") if n.strip()]
    switch = texts.get("allow_fallbacks", "")
    given |= (
        {"allow_fallbacks": _SWITCHES.get(switch.lower(), switch)} if switch else {}
    )
    return _read(given, HEADERS.__getitem__)


def strange_headers(headers: Iterable[tuple[str, str]]) -> list[str]:
    """Name the headers that look like preferences, and are none."""
    names = {name.lower() for name, _ in headers}
    return sorted(
        n for n in names if n.startswith(HEADER_PREFIX) and n not in _FIELD_BY_HEADER
    )


def check_said(
    said: Said, variant: str, catalogue: Catalogue, *, tenants_may_choose: bool
) -> None:
    """See that a tenant may say what it says, and that the names mean something.

    A limit of its own spending is everyone's to set. What a key keeps is the
    operator's, and is not looked at: it is for all variants.

    Raises:
        ForbiddenError: the operator lets no tenant choose; nothing is named then.
        InvalidRequestError: there is no such upstream or offer.
    """
    for given, param in (
        (said.header, HEADERS.__getitem__),
        (said.body, "routing.{}".format),
    ):
        chosen = [field.name for field in fields(given) if field.name in _CHOOSING]
        chosen = [name for name in chosen if getattr(given, name) is not None]
        if chosen and not tenants_may_choose:
            raise ForbiddenError(
                "Where requests go is not yours to choose at this gateway: leave "
                f"{param(chosen[0])} out.",
                param=param(chosen[0]),
                code="routing_not_allowed",
            )
        _check_names(given, variant, catalogue, param)


def routing_facts(preferences: Preferences) -> dict[str, object]:
    """Write preferences as ``parse_routing`` reads them, without what is usual anyway.

    Equal ones give equal facts.
    """
    names = {
        "only": sorted({*(preferences.only or ())}),
        "ignore": sorted({*(preferences.ignore or ())}),
        "order": list(dict.fromkeys(preferences.order or ())),
    }
    facts: dict[str, object] = {name: each for name, each in names.items() if each}
    if preferences.sort not in {None, Sort.PRICE}:
        facts["sort"] = (preferences.sort or Sort.PRICE).value
    if preferences.max_nanocredits is not None:
        facts["max_credits"] = decimal_text(preferences.max_nanocredits)
    if preferences.allow_fallbacks is False:
        facts["allow_fallbacks"] = False
    return facts


def routing_text(preferences: Preferences) -> str | None:
    """Write preferences as JSON; None when they say nothing."""
    facts = routing_facts(preferences)
    return json.dumps(facts) if facts else None


def routing_from_text(text: str | None) -> Preferences:
    """Read what ``routing_text`` wrote."""
    return parse_routing(None if text is None else parse_routing_text(text))


_Namer = Callable[[str], str]


def _read(given: Mapping[str, object], param: _Namer) -> Preferences:
    names = {
        name: _names(given[name], param(name), least=name == "only")
        for name in _LISTS
        if name in given
    }
    sort, fallbacks = given.get("sort"), given.get("allow_fallbacks")
    sorts = {each.value: each for each in Sort}
    if sort is not None and (not isinstance(sort, str) or sort not in sorts):
        raise _wrong(param("sort"), f"must be one of {', '.join(sorts)}")
    if fallbacks is not None and not isinstance(fallbacks, bool):
        raise _wrong(param("allow_fallbacks"), "must be true or false")
    limit = given.get("max_credits")
    return Preferences(
        **names,
        sort=sorts[sort] if isinstance(sort, str) else None,
        max_nanocredits=None if limit is None else _nano(limit, param("max_credits")),
        allow_fallbacks=fallbacks,
    )


def _names(value: object, param: str, *, least: bool) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not least <= len(value) <= NAMES_MAX:
        raise _wrong(
            param,
            f"must be an array of {int(least)} to {NAMES_MAX} names of upstreams or "
            "ids of offers",
        )
    for place, name in enumerate(value):
        if not isinstance(name, str) or not 1 <= len(name) <= NAME_MAX_CHARS:
            raise _wrong(
                f"{param}[{place}]",
                f"must be a name of 1 to {NAME_MAX_CHARS} characters",
            )
    return tuple(value)


def _nano(value: object, param: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Decimal | str):
        raise _wrong(param, _AMOUNT)
    text = value if isinstance(value, str) else _plain(value)
    try:
        return parse_nano(text)
    except ValueError as error:
        raise _wrong(param, str(error) if text else _AMOUNT) from error


def _plain(number: int | Decimal) -> str:
    # Written out only where it is short: 1e999999999 has a billion digits.
    if isinstance(number, int):
        return str(number) if 0 <= number <= NANO_MAX else ""
    exponent = number.as_tuple().exponent
    fits = isinstance(exponent, int) and -DECIMALS_MAX <= exponent <= DECIMALS_MAX
    return f"{number:f}" if fits else ""


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:
        raise ValueError(text) from error


def _check_names(
    preferences: Preferences, variant: str, catalogue: Catalogue, param: _Namer
) -> None:
    lists: dict[str, Collection[str] | None] = {
        "only": preferences.only,
        "ignore": preferences.ignore,
        "order": preferences.order,
    }
    if not any(lists.values()):
        return  # as nearly every request
    every = [offer for offers in catalogue.offers.values() for offer in offers]
    known = {offer.upstream for offer in every} | {offer.id for offer in every}
    for name, given in lists.items():
        for place, each in enumerate(given or ()):
            if each not in known:
                serve = _serving(catalogue.offers.get(variant, ()))
                raise _wrong(
                    f"{param(name)}[{place}]",
                    f"names no upstream and no offer of this gateway: {shown(each)}. "
                    f"{variant} is served by {serve}",
                )


def _serving(offers: Iterable[Offer]) -> str:
    return ", ".join(sorted({offer.upstream for offer in offers})) or "none"


def _wrong(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {rule}.", param=param)
