"""Which offer is the cheapest, worked out the long way from the published rules.

An independent witness for routing: exact fractions of a dollar, straight from the
figures of the config, and nothing of the gateway's own arithmetic. The rules are
those of docs/configuration.md (cards, classes) and docs/routing.md (who is left out,
what was learned, ties); the token formula is OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

Pixels = tuple[int, int]

TODAY = "2026-11-24"
LEFT_MS = 300_000
FIRST_FAMILY = {
    (1024, 1024): {"low": 272, "medium": 1056, "high": 4160},
    (1024, 1536): {"low": 408, "medium": 1584, "high": 6240},
    (1536, 1024): {"low": 400, "medium": 1568, "high": 6208},
}


@dataclass(frozen=True)
class Model:
    """A variant: bases of the tile formula by quality, none for the first family."""

    name: str
    bases: Mapping[str, int]

    @property
    def qualities(self) -> list[str]:
        return list(self.bases or FIRST_FAMILY[1024, 1024])


@dataclass(frozen=True)
class Ask:
    """A request, as a client means it."""

    model: Model
    prompt: str
    size: Pixels | None
    quality: str
    n: int
    references: tuple[Pixels | None, ...] = ()
    mask: bool = False
    background: str | None = None
    partials: int = 0


@dataclass(frozen=True)
class Stall:
    """An offer: its card with the figures as they are written, and how it is doing.

    ``ratios`` are real cost over estimate, in millionths, by quality and class.
    """

    name: str
    card: Mapping[str, str]
    table: Mapping[str, str] = field(default_factory=dict)
    can: Mapping[str, object] = field(default_factory=dict)
    sunset: str | None = None
    open: bool = False
    slots: int = 1
    busy: int = 0
    usual_ms: int | None = None
    ratios: Mapping[str, int] = field(default_factory=dict)


def cheapest(stalls: Sequence[Stall], ask: Ask) -> tuple[str, int] | None:
    """Name the offer to buy at, and its cost in 1e-9 USD; None if there is none."""
    best: tuple[int, int, str] | None = None
    for stall in stalls:
        usd = likely_usd(stall, ask)
        if usd is None or not may_be_asked(stall, ask):
            continue
        row = (int(usd * 10**9), stall.busy, stall.name)
        if best is None or row < best:
            best = row
    return (best[2], best[0]) if best else None


def likely_usd(stall: Stall, ask: Ask) -> Fraction | None:
    """Cost of the whole request, in whole 1e-9 USD, times what was learned."""
    each = picture_usd(stall, ask)
    if each is None:
        return None
    learned = stall.ratios.get(f"{ask.quality}/{class_of(ask.size)}", 10**6)
    return whole_nano(whole_nano(each * ask.n) * Fraction(learned, 10**6))


def picture_usd(stall: Stall, ask: Ask) -> Fraction | None:
    """Cost of one picture, by the card."""
    card = {name: Fraction(text) for name, text in stall.card.items() if name != "per"}
    per = stall.card["per"]
    if per == "megapixel":
        width, height = ask.size or (2048, 2048)
        return whole_nano(card["usd"] * Fraction(width * height, 10**6))
    if per == "image":
        return row_usd(stall.table, ask, card.get("flat"))
    tokens = Fraction(1, {"1K tokens": 1000, "1M tokens": 10**6}[per])
    text = ceil(Fraction(len(ask.prompt.encode()), 3)) + 6 if ask.prompt else 0
    pictures = sum(map(reference_tokens, ask.references))
    return tokens * (
        text * card["text_input"]
        + pictures * card["image_input"]
        + output_tokens(ask) * card["image_output"]
    )


def row_usd(
    table: Mapping[str, str], ask: Ask, flat: Fraction | None
) -> Fraction | None:
    """Look a picture up: the quality before any quality, pixels, class, any size."""
    named = f"{ask.size[0]}x{ask.size[1]}" if ask.size else "auto"
    sizes = {"*": 2, class_of(ask.size): 1, named: 0}
    found = []
    for row, text in table.items():
        quality, size = row.split("/")
        if quality in (ask.quality, "*") and size in sizes:
            found.append((quality == "*", sizes[size], Fraction(text)))
    return min(found)[2] if found else flat


def class_of(size: Pixels | None) -> str:
    """Name the class of a size."""
    if size is None:
        return "auto"
    area = size[0] * size[1]
    if area <= 1_700_000:
        return "1K"
    return "2K" if area <= 4_400_000 else "4K"


def reference_tokens(size: Pixels | None) -> int:
    """Count patches of 32 x 32, 1,536 at most and where the size is not known."""
    if size is None:
        return 1536
    return min(1536, ceil(Fraction(size[0], 32)) * ceil(Fraction(size[1], 32)))


def output_tokens(ask: Ask) -> int:
    """Count the tokens of a picture, at the dearest that the request leaves open."""
    qualities = ask.model.qualities if ask.quality == "auto" else [ask.quality]
    return 100 * ask.partials + max(
        tokens_of(ask.model, size, quality)
        for size in sizes_of(ask)
        for quality in qualities
    )


def sizes_of(ask: Ask) -> list[Pixels]:
    """List the sizes that a request may come to."""
    if ask.size is not None:
        return [ask.size]
    return [(2048, 2048)] if ask.model.bases else list(FIRST_FAMILY)


def tokens_of(model: Model, size: Pixels, quality: str) -> int:
    """Count the output tokens of one size and quality."""
    if not model.bases:
        return FIRST_FAMILY[size][quality]
    base = model.bases[quality]
    other = int(Fraction(base * min(size), max(size)) + Fraction(1, 2))
    area = size[0] * size[1]
    return ceil(base * other * Fraction(2_000_000 + area, 4_000_000))


def may_be_asked(stall: Stall, ask: Ask) -> bool:
    """Whether an offer is able, alive, healthy, free, and quick enough."""
    can = stall.can
    operation = "edit" if ask.references else "generate"
    size = f"{ask.size[0]}x{ask.size[1]}" if ask.size else "auto"
    return (
        operation in listed(can, "operations", operation)
        and size in listed(can, "sizes", size)
        and ask.quality in listed(can, "qualities", ask.quality)
        and ask.background
        in (None, "auto", *listed(can, "backgrounds", str(ask.background)))
        and len(ask.references) <= int(str(can.get("references_max", 16)))
        and (bool(can.get("mask", True)) or not ask.mask)
        and (stall.sunset is None or stall.sunset > TODAY)
        and not stall.open
        and stall.slots > 0
        and (stall.usual_ms is None or stall.usual_ms <= LEFT_MS)
    )


def listed(can: Mapping[str, object], name: str, otherwise: str) -> list[str]:
    """Read a list of what an offer can do; without one it can do anything."""
    found = can.get(name, [otherwise])
    assert isinstance(found, list)
    return found


def whole_nano(usd: Fraction) -> Fraction:
    """Round up to a whole 1e-9 USD."""
    return Fraction(ceil(usd * 10**9), 10**9)
