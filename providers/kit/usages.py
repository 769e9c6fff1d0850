"""Reads the tokens that OpenAI-style images APIs report, and believes no nonsense."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal

from providers.kit.contract import Usage
from providers.kit.replies import as_object

TOKENS_MAX = 1_000_000_000
"""A usage beyond this is no usage."""
COST_MAX_USD = 10_000
"""Nor does a call cost more than this."""
NANOUSD_PER_USD = 1_000_000_000


def read_usage(reported: object) -> Usage | None:
    """Read a ``usage`` object; None when it is missing or cannot be true.

    A cached token is counted as cached only. Where only the number of all cached
    tokens is given, it is text first: the smaller of the two discounts, so that nobody
    is charged less than the upstream vouches for.
    """
    if not isinstance(reported, dict):
        return None
    details = as_object(reported.get("input_tokens_details"))
    cached = as_object(details.get("cached_tokens_details"))
    try:
        given = _count(reported, "input_tokens")
        output = _count(reported, "output_tokens") or 0
        total = _count(reported, "total_tokens")
        text = _count(details, "text_tokens")
        image = _count(details, "image_tokens")
        if text is None and image is None:
            text = given
        if text is None and image is None:
            return None
        text, image = text or 0, image or 0
        text_cached, image_cached = _cached(details, cached, text)
    except ValueError:
        return None
    consistent = (
        given in {None, text + image}
        and total in {None, text + image + output}
        and text_cached <= text
        and image_cached <= image
    )
    # No picture was ever made of no tokens: zeros are what a relay says that does
    # not know.
    if not consistent or output == 0:
        return None
    return Usage(
        text_input=text - text_cached,
        text_cached=text_cached,
        image_input=image - image_cached,
        image_cached=image_cached,
        image_output=output,
    )


def read_nanousd(usd: object) -> int | None:
    """Read an amount of US dollars, rounded up; None when it cannot be true.

    A float is none: it has lost what was written.
    """
    if type(usd) is int:
        usd = Decimal(usd)
    if not isinstance(usd, Decimal) or not 0 <= usd <= COST_MAX_USD:
        return None
    return int((usd * NANOUSD_PER_USD).to_integral_value(ROUND_CEILING))


def _cached(
    details: Mapping[str, object], by_class: Mapping[str, object], text_tokens: int
) -> tuple[int, int]:
    text = _count(by_class, "text_tokens") or _count(details, "cached_text_tokens")
    image = _count(by_class, "image_tokens") or _count(details, "cached_image_tokens")
    total = _count(details, "cached_tokens")
    if text is None and image is None and total is not None:
        text = min(total, text_tokens)
        image = total - text
    text, image = text or 0, image or 0
    if total not in {None, text + image}:
        raise ValueError("cached tokens that do not add up")
    return text, image


def _count(counts: Mapping[str, object], name: str) -> int | None:
    value = counts.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= TOKENS_MAX:
        raise ValueError(f"{name} is no number of tokens")
    return value
