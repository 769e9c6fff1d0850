"""How much more, or less, an offer really costs than was estimated. Pure.

Learned per tier, a quality and a class of sizes such as ``low/1K``, from costs that
upstreams report. Whole numbers only: a ratio is kept in millionths, times are
milliseconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.sizes import size_class

RATIO_SCALE = 1_000_000
RATIO_MIN, RATIO_MAX = RATIO_SCALE // 2, RATIO_SCALE * 2
WEIGHT_DIVISOR = 10
"""A cost moves the ratio by a tenth of the way."""
SAMPLES_MIN = 20
"""So many costs must have been seen before a ratio is believed."""
LIFE_MS = 24 * 3_600_000
"""Without news a ratio fades to 1, evenly, and is forgotten after this long: an offer
that was ranked behind others, rightly or not, gets another chance."""
TIERS_MAX = 32
"""Per offer and operation: six qualities in four classes of sizes, and some room."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a call was estimated to cost, and what the upstream says it did."""

    tier: str
    estimate_nanousd: int
    actual_nanousd: int

    def __post_init__(self) -> None:
        assert self.estimate_nanousd > 0, self
        assert self.actual_nanousd >= 0, self


@dataclass(frozen=True, slots=True)
class Ratio:
    """What is known of one tier. ``samples`` counts up to ``SAMPLES_MIN``."""

    tier: str
    millionths: int = RATIO_SCALE
    samples: int = 0
    at_ms: int = 0


Ratios = tuple[Ratio, ...]


def tier_of(quality: str, size: tuple[int, int] | None) -> str:
    """Name the tier of a request, such as ``low/1K`` or ``auto/auto``."""
    return f"{quality}/{size_class(size)}"


def learned(ratios: Ratios, sample: Sample, now_ms: int) -> Ratios:
    """Take a cost into account.

    It counts as no more than 3/2 and no less than 2/3 of what was known, so that one
    odd answer moves the ratio by a twentieth at most.
    """
    kept = _alive(ratios, now_ms)
    old = kept.pop(sample.tier, Ratio(sample.tier))
    known = _faded(old, now_ms)
    seen = sample.actual_nanousd * RATIO_SCALE // sample.estimate_nanousd
    off = min(known * 3 // 2, max(known * 2 // 3, seen)) - known
    # The last few millionths are taken whole, or they would never be.
    moved = known + (off // WEIGHT_DIVISOR or off)
    new = Ratio(
        sample.tier,
        min(RATIO_MAX, max(RATIO_MIN, moved)),
        min(old.samples + 1, SAMPLES_MIN),
        now_ms,
    )
    latest = sorted(kept.values(), key=lambda ratio: (ratio.at_ms, ratio.tier))
    return (*latest[-(TIERS_MAX - 1) :], new)


def believed(ratios: Ratios, now_ms: int) -> dict[str, int]:
    """Return the ratios that enough was seen for: millionths by tier, from 1/2 to 2."""
    return {
        ratio.tier: _faded(ratio, now_ms)
        for ratio in _alive(ratios, now_ms).values()
        if ratio.samples >= SAMPLES_MIN
    }


def adjusted(nanousd: int, millionths: int) -> int:
    """Multiply an estimate by a ratio, rounded up."""
    return -(-nanousd * millionths // RATIO_SCALE)


def _alive(ratios: Ratios, now_ms: int) -> dict[str, Ratio]:
    return {r.tier: r for r in ratios if now_ms - r.at_ms < LIFE_MS}


def _faded(ratio: Ratio, now_ms: int) -> int:
    left_ms = max(0, LIFE_MS - (now_ms - ratio.at_ms))
    return RATIO_SCALE + (ratio.millionths - RATIO_SCALE) * left_ms // LIFE_MS
