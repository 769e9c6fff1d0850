"""Turns tokens into money: the tenant's price and the operator's cost.

Whole numbers of 1e-9 credits or dollars. The tenant's price is exact; the operator's
cost is rounded up where it must be rounded at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from gateway.core.catalogue import (
    MILLIONTHS,
    Offer,
    PerImage,
    PerMegapixel,
    PerToken,
    Usage,
    Variant,
)
from gateway.core.money import usd_from_credits
from gateway.core.requests import ImageRequest
from gateway.core.sizes import AUTO_CLASS, Size, size_class
from gateway.core.tokens import (
    AUTO_SIZE,
    References,
    bound_usage,
    expected_usage,
    least_usage,
)
from providers.kit.contract import Done

PIXELS_PER_MEGAPIXEL = 1_000_000

CostSource = Literal["usd", "units", "usage", "card", "estimate"]
"""How it is known what an attempt cost, the best source first: money that the upstream
names, units that it counts, tokens that it reports, the price card, and else the
estimate made before the call."""
COST_SOURCES: tuple[str, ...] = get_args(CostSource)
REPORTED: frozenset[CostSource] = frozenset({"usd", "units", "usage"})
"""What the upstream itself said; only that can teach how good estimates are."""


@dataclass(frozen=True, slots=True)
class Quote:
    """What a number of tokens costs the tenant, for all pictures of a request."""

    usage: Usage
    nanocredits: int
    nanousd: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The range in which the charge will be. ``high`` is what is held."""

    low: Quote
    high: Quote


def charge_nanocredits(usage: Usage, variant: Variant) -> int:
    """Price a usage for the tenant, in nano-credits; see ``TenantPrice``."""
    return variant.tenant_price.total(usage)


def hold_nanocredits(
    request: ImageRequest, references: References | None = None
) -> int:
    """Return the most that a request can cost the tenant, in nano-credits; above 0."""
    usage = bound_usage(request, references).times(request.n)
    return max(1, charge_nanocredits(usage, request.variant))


def estimate(
    request: ImageRequest,
    *,
    nanocredits_per_usd: int,
    references: References | None = None,
) -> Estimate:
    """Price a request before it is made.

    A request without a prompt is priced without its text, as the product page does.
    """
    low, high = (
        _quote(request, usage(request, references), nanocredits_per_usd)
        for usage in (least_usage, bound_usage)
    )
    return Estimate(low=low, high=high)


def cost_rule(
    request: ImageRequest, references: References | None = None
) -> Callable[[Offer, int], int | None]:
    """Return how to estimate what n pictures of a request cost at an offer.

    Args:
        request: what is asked for.
        references: sizes of those really given, as in ``expected_usage``.
    """
    each = expected_usage(request, references)

    def cost_nanousd(offer: Offer, n: int) -> int | None:
        return offer_cost_nanousd(offer, each, request.size, request.quality, n)

    return cost_nanousd


def offer_cost_nanousd(
    offer: Offer, usage: Usage, size: Size | None, quality: str, n: int
) -> int | None:
    """Return what a request costs the operator at an offer, in nano-dollars.

    Args:
        offer: where it would be bought.
        usage: tokens of one picture.
        size: pixels of one picture; None when the model chooses.
        quality: as requested, ``auto`` included.
        n: number of pictures.

    Returns:
        None when the offer's cost card does not say. That is not zero: such an offer
        cannot be compared, so it cannot be bought.
    """
    assert n >= 1, n
    card = offer.cost
    if isinstance(card, PerToken):
        return card.price.total(usage) * n
    if isinstance(card, PerMegapixel):
        area_px = (size or AUTO_SIZE).area_px
        return -(-card.nanousd * area_px // PIXELS_PER_MEGAPIXEL) * n
    each = _image_nanousd(card, size, quality)
    return None if each is None else each * n


def real_cost(
    offer: Offer, done: Done, *, card_nanousd: int | None, estimate_nanousd: int
) -> tuple[int, CostSource]:
    """Return what a finished job cost the operator, and how that is known.

    Args:
        offer: where it was bought.
        done: what came of it.
        card_nanousd: what the card says of the pictures that came; None if nothing.
        estimate_nanousd: what was expected of the call, for want of anything better.

    Returns:
        nano-dollars, rounded up.
    """
    unit_nanousd = offer.cost.unit_nanousd
    if done.cost_nanousd is not None:
        return done.cost_nanousd, "usd"
    if unit_nanousd is not None and done.units_millionths is not None:
        return -(-done.units_millionths * unit_nanousd // MILLIONTHS), "units"
    if isinstance(offer.cost, PerToken):
        if done.usage is not None:
            return offer.cost.price.total(done.usage), "usage"
        return estimate_nanousd, "estimate"
    if card_nanousd is not None:
        return card_nanousd, "card"
    return estimate_nanousd, "estimate"


def _image_nanousd(card: PerImage, size: Size | None, quality: str) -> int | None:
    # The exact row first: a size before its class, a quality before any quality.
    sizes = (size.text if size else AUTO_CLASS, size_class(size))
    rows = [f"{quality}/{name}" for name in (*sizes, "*")]
    rows += [f"*/{name}" for name in sizes]
    return next((card.table[row] for row in rows if row in card.table), card.flat)


def _quote(request: ImageRequest, each: Usage, nanocredits_per_usd: int) -> Quote:
    usage = each.times(request.n)
    nanocredits = charge_nanocredits(usage, request.variant)
    return Quote(usage, nanocredits, usd_from_credits(nanocredits, nanocredits_per_usd))
