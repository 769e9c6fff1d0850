"""What can be asked for and where it can be bought: variants and offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from providers.kit.contract import Capabilities, Operation, Usage


class TokenRule(Enum):
    """How a variant's output tokens follow from size and quality."""

    TILES = "tiles"
    """The tile formula of the gpt-image-2 family: any size."""

    TABLE = "table"
    """The fixed table of the gpt-image-1 family: three sizes."""


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Price of one token of each class, in a whole number of nano units.

    For a tenant the unit is the nano-credit, for an upstream the nano-dollar.
    """

    text_input: int
    text_cached: int
    image_input: int
    image_cached: int
    image_output: int

    def total(self, usage: Usage) -> int:
        """Price a usage, in the same nano unit. Exact: nothing is rounded."""
        return (
            usage.text_input * self.text_input
            + usage.text_cached * self.text_cached
            + usage.image_input * self.image_input
            + usage.image_cached * self.image_cached
            + usage.image_output * self.image_output
        )


MILLIONTHS = 1_000_000


@dataclass(frozen=True, slots=True)
class TenantPrice:
    """What a tenant pays: a card, times a multiplier in millionths."""

    card: TokenPrice
    multiplier_millionths: int = MILLIONTHS

    def total(self, usage: Usage) -> int:
        """Price the whole usage of a request, in nano-credits.

        The card is exact; what the multiplier makes of the sum is rounded once, half
        up.
        """
        exact = self.card.total(usage) * self.multiplier_millionths
        return (exact + MILLIONTHS // 2) // MILLIONTHS


@dataclass(frozen=True, slots=True)
class Variant:
    """A model name that clients ask for, with its limits and the tenant's price.

    ``tile_bases`` maps each quality to the base of the tile formula, or, for a
    variant whose rule is TABLE, only names the qualities (values unused).
    ``retired_on`` and ``successor`` are set together once it is gone.
    """

    name: str
    price: TokenPrice
    tile_bases: Mapping[str, int]
    token_rule: TokenRule = TokenRule.TILES
    default_quality: str = "medium"
    aliases: frozenset[str] = frozenset()
    n_max: int = 10
    references_max: int = 16
    shutdown_on: str | None = None
    successor: str | None = None
    retired: bool = False
    created_s: int = 0
    multiplier_millionths: int = MILLIONTHS
    """Of the tenant that asks; see ``core.terms``."""

    @property
    def tenant_price(self) -> TenantPrice:
        """What the tenant pays."""
        return TenantPrice(self.price, self.multiplier_millionths)


@dataclass(frozen=True, slots=True)
class PerToken:
    """An upstream that charges by token, in nano-dollars.

    Here and in the other cards ``unit_nanousd`` is what one of the billable units
    costs that the upstream counts for a finished job, None if it counts none.
    """

    price: TokenPrice
    unit_nanousd: int | None = None


@dataclass(frozen=True, slots=True)
class PerImage:
    """An upstream that charges by picture, in nano-dollars.

    ``table`` is keyed by quality and size: ``low/1024x1024``, or by class ``low/1K``,
    or ``low/*``; ``*`` may stand for the quality too. ``flat`` is the price of whatever
    the table does not name, None when that cannot be bought.
    """

    flat: int | None = None
    table: Mapping[str, int] = field(default_factory=dict)
    unit_nanousd: int | None = None


@dataclass(frozen=True, slots=True)
class PerMegapixel:
    """An upstream that charges by area: nano-dollars per 1,000,000 pixels."""

    nanousd: int
    unit_nanousd: int | None = None


CostCard = PerToken | PerImage | PerMegapixel


@dataclass(frozen=True, slots=True)
class Offer:
    """One variant at one upstream, with what it costs the operator."""

    upstream: str
    variant: str
    model: str
    cost: CostCard
    capabilities: Capabilities
    failure_domain: str = ""
    sunset_on: str | None = None

    @property
    def id(self) -> str:
        """``upstream/variant``, unique in a catalogue."""
        return f"{self.upstream}/{self.variant}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All variants by name and alias, all offers by variant."""

    variants: Mapping[str, Variant]
    offers: Mapping[str, tuple[Offer, ...]]

    def variant(self, name: str) -> Variant | None:
        """Find a variant by its name or an alias of it."""
        found = self.variants.get(name)
        if found is not None:
            return found
        return next((v for v in self.variants.values() if name in v.aliases), None)


__all__ = [
    "MILLIONTHS",
    "Capabilities",
    "Catalogue",
    "CostCard",
    "Offer",
    "Operation",
    "PerImage",
    "PerMegapixel",
    "PerToken",
    "TenantPrice",
    "TokenPrice",
    "TokenRule",
    "Usage",
    "Variant",
]
