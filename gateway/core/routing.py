"""Which offer to try, in which order, and why. Pure.

Prices and health come in, an explained order goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from math import inf

from gateway.core.breaker import BreakerState, Health
from gateway.core.catalogue import Offer
from gateway.core.ratios import RATIO_SCALE, adjusted, tier_of
from providers.kit.contract import Capabilities, FailureKind, Operation

ATTEMPTS_MAX = 3
_UNSEEN = Health()


class Next(Enum):
    """Whether a failed request is tried at another offer."""

    NEVER = "never"
    YES = "yes"
    ONCE = "once"
    IF_AFFORDABLE = "if_affordable"
    """Once, and only while such second purchases stay a small share of the spend."""


NEXT_BY_KIND: Mapping[FailureKind, Next] = {
    FailureKind.INVALID_REQUEST: Next.NEVER,
    FailureKind.CONTENT_POLICY: Next.NEVER,
    FailureKind.UNSUPPORTED: Next.YES,
    FailureKind.AUTH: Next.YES,
    FailureKind.INSUFFICIENT_FUNDS: Next.YES,
    FailureKind.RATE_LIMITED: Next.YES,
    FailureKind.OVERLOADED: Next.YES,
    FailureKind.BAD_GATEWAY: Next.YES,
    FailureKind.NETWORK: Next.YES,
    FailureKind.TIMEOUT: Next.IF_AFFORDABLE,
    FailureKind.NO_OUTPUT: Next.ONCE,
    FailureKind.RESULT_LOST: Next.NEVER,
}
NEEDS_BUDGET = frozenset(
    {
        FailureKind.OVERLOADED,
        FailureKind.BAD_GATEWAY,
        FailureKind.NETWORK,
        FailureKind.NO_OUTPUT,
    }
)
"""Kinds after which a further attempt could pile load onto a struggling pool.

A timeout is not among them: when an upstream dies, all that it had under way is cut off
at once, far more than any budget of retries. What bounds it is the share of the spend.
"""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request needs an offer to be able to do."""

    operation: Operation
    size: tuple[int, int] | None
    quality: str
    n: int
    background: str | None = None
    references: int = 0
    mask: bool = False


class Sort(Enum):
    """What decides between two offers that may both be tried."""

    PRICE = "price"
    LATENCY = "latency"
    """How long it usually takes; those of which that is not known yet come last."""

    THROUGHPUT = "throughput"
    """How many more calls it may take at once."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """Where a request may go, and what first; None says nothing.

    ``only``, ``ignore`` and ``order`` name upstreams or offers (by id). A request that
    may cost its tenant more than ``max_nanocredits`` is refused. Without
    ``allow_fallbacks`` it is tried at one offer, once.
    """

    only: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    order: tuple[str, ...] | None = None
    sort: Sort | None = None
    max_nanocredits: int | None = None
    allow_fallbacks: bool | None = None

    def over(self, weaker: Preferences) -> Preferences:
        """Return both as one; where both say something, these count."""
        said = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(weaker, **{n: value for n, value in said if value is not None})

    def leaves_out(self, offer: Offer) -> str | None:
        """Name the preference that leaves an offer out, if one does."""
        if self.only is not None and not _named(self.only, offer):
            return "only"
        return "ignore" if self.ignore and _named(self.ignore, offer) else None

    def place_of(self, offer: Offer) -> int:
        """Tell an offer's place in ``order``; all that it does not name share one."""
        for place, name in enumerate(self.order or ()):
            if name in {offer.upstream, offer.id}:
                return place
        return len(self.order or ())

    def placed_by(self, offer: Offer) -> str:
        """Say what gave an offer its place among those that may be tried."""
        place = self.place_of(offer)
        if place < len(self.order or ()):
            return f"routing.order[{place}]"
        return (self.sort or Sort.PRICE).value

    @property
    def attempts_max(self) -> int:
        """How many offers may fail a request."""
        return 1 if self.allow_fallbacks is False else ATTEMPTS_MAX


NO_PREFERENCES = Preferences()


def _named(names: tuple[str, ...], offer: Offer) -> bool:
    return offer.upstream in names or offer.id in names


@dataclass(frozen=True, slots=True)
class Candidate:
    """One offer as the decision saw it.

    ``cost_nanousd`` is the estimate for the whole request times the learned ratio,
    None when it is not known. ``reason`` says why it was left out; empty when it may
    be tried. ``waits`` marks one that is only out of slots for the moment, ``rests``
    one that nothing but its breaker keeps out, ``shut`` one whose breaker is open at
    that; ``unwanted`` names the preference that
    left it out, ``drained`` says that the operator did.
    """

    offer: Offer
    cost_nanousd: int | None
    state: BreakerState
    reason: str = ""
    retry_at_ms: int | None = None
    waits: bool = False
    rests: bool = False
    shut: bool = False
    unwanted: str | None = None
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Every offer of the variant: those to try, in order, then those left out."""

    ranked: tuple[Candidate, ...]
    left_out: tuple[Candidate, ...]
    preferences: Preferences = NO_PREFERENCES

    @property
    def all(self) -> tuple[Candidate, ...]:
        """Every candidate."""
        return self.ranked + self.left_out

    @property
    def resting(self) -> bool:
        """Whether nothing but rate limits keeps out every offer that could do it."""
        states = {c.state for c in self.left_out if c.retry_at_ms is not None}
        return not self.ranked and states == {BreakerState.PAUSED}

    @property
    def soonest_retry_ms(self) -> int | None:
        """When the first of those left out may be called again."""
        times = [c.retry_at_ms for c in self.left_out if c.retry_at_ms is not None]
        return min(times, default=None)

    @property
    def may_return(self) -> bool:
        """Whether one of those left out may be called later, by itself or by hand."""
        drained = any(c.drained for c in self.left_out)
        return drained or self.soonest_retry_ms is not None


def cannot(capabilities: Capabilities, wish: Wish) -> str | None:
    """Say what an offer cannot do of a wish; None if it can do all of it.

    The output format is no matter: what an upstream cannot make is converted here.
    """
    checks = (
        (wish.operation in capabilities.operations, "cannot {operation}"),
        (
            not capabilities.sizes or wish.size in capabilities.sizes,
            "cannot make size {size}",
        ),
        (
            not capabilities.qualities or wish.quality in capabilities.qualities,
            "cannot make quality {quality}",
        ),
        (bool(capabilities.output_formats), "makes no picture format"),
        (
            wish.background is None
            or wish.background == "auto"
            or wish.background in capabilities.backgrounds,
            "cannot make a {background} background",
        ),
        (
            wish.references <= capabilities.references_max,
            "takes at most {references_max} references",
        ),
        (capabilities.mask or not wish.mask, "cannot use a mask"),
    )
    for fine, reason in checks:
        if not fine:
            return reason.format(
                operation=wish.operation.value,
                size=f"{wish.size[0]}x{wish.size[1]}" if wish.size else "auto",
                quality=wish.quality,
                background=wish.background,
                references_max=capabilities.references_max,
            )
    return None


@dataclass(frozen=True, slots=True)
class Moment:
    """When a decision is taken: today's date, and how long there is left.

    ``drained`` are the upstreams that the operator lets nothing new go to.
    """

    today: str
    left_ms: int
    drained: frozenset[str] = frozenset()


def decide(
    wish: Wish,
    priced: Iterable[tuple[Offer, int | None]],
    health: Mapping[str, Health],
    moment: Moment,
    *,
    tried: frozenset[str] = frozenset(),
    preferences: Preferences = NO_PREFERENCES,
) -> Decision:
    """Order the offers that can be tried, the cheapest first, and explain the rest.

    Of two that cost the same, the one with fewer calls in flight goes first; then the
    id decides, so that the order never depends on chance. A request that has failed
    somewhere goes to the doubtful last: it has few attempts, and must not spend them
    all on finding out what is down. ``health`` has no entry for an offer that nobody
    has called yet. Preferences come before the price: first those that ``order``
    names, then by ``sort``.
    """
    ranked: list[Candidate] = []
    left_out: list[Candidate] = []
    for offer, cost_nanousd in priced:
        seen = health.get(offer.id, _UNSEEN)
        candidate = _judged(wish, offer, cost_nanousd, seen, moment, tried)
        candidate = _wanted(candidate, preferences, moment)
        (left_out if candidate.reason else ranked).append(candidate)

    def order(candidate: Candidate) -> tuple[int, bool, float, int, int, str]:
        offer, cost_nanousd = candidate.offer, candidate.cost_nanousd or 0
        seen = health.get(offer.id, _UNSEEN)
        place = preferences.place_of(offer) if preferences.order else 0
        late = bool(tried) and seen.doubtful
        first = _sort_key(preferences.sort, seen)
        return place, late, first, cost_nanousd, seen.in_flight, offer.id

    return Decision(
        tuple(sorted(ranked, key=order)),
        tuple(sorted(left_out, key=lambda c: c.offer.id)),
        preferences,
    )


def _wanted(
    candidate: Candidate, preferences: Preferences, moment: Moment
) -> Candidate:
    # What is not wanted is not waited for either, and no try is forced there.
    unwanted = preferences.leaves_out(candidate.offer)
    drained = candidate.offer.upstream in moment.drained
    if unwanted is None and not drained:
        return candidate
    fits = not candidate.reason or candidate.waits or candidate.rests
    return replace(
        candidate,
        reason=f"left out by routing.{unwanted}" if unwanted else "drained",
        retry_at_ms=None,
        waits=False,
        rests=False,
        shut=False,
        unwanted=unwanted,
        drained=unwanted is None and fits,
    )


def _sort_key(sort: Sort | None, health: Health) -> float:
    # The smaller goes first; what is equal here is decided by the price.
    if sort is Sort.LATENCY:
        return inf if health.usual_ms is None else health.usual_ms
    return -health.slots_free if sort is Sort.THROUGHPUT else 0


def _judged(
    wish: Wish,
    offer: Offer,
    cost_nanousd: int | None,
    health: Health,
    moment: Moment,
    tried: frozenset[str],
) -> Candidate:
    ratio = health.cost_ratios.get(tier_of(wish.quality, wish.size), RATIO_SCALE)
    likely = None if cost_nanousd is None else adjusted(cost_nanousd, ratio)
    reason = cannot(offer.capabilities, wish)
    if reason is None and likely is None:
        reason = "cost unknown for this size and quality"
    if reason is None and offer.id in tried:
        reason = "already tried"
    if reason is None:
        reason = _too_late(offer, health, moment)
    # Only who is left alone for a while may come back.
    rests = reason is None and not health.callable
    shut = rests and health.state is BreakerState.OPEN
    if rests:
        reason = f"{health.state.value}: {health.reason}".rstrip(": ")
    waits = reason is None and health.slots_free < 1
    return Candidate(
        offer,
        likely,
        health.state,
        reason="no free slot" if waits else reason or "",
        retry_at_ms=health.retry_at_ms if rests else None,
        rests=rests,
        waits=waits,
        shut=shut and health.slots_free > 0,
    )


def _too_late(offer: Offer, health: Health, moment: Moment) -> str | None:
    if offer.sunset_on is not None and moment.today >= offer.sunset_on:
        return f"ended at this upstream on {offer.sunset_on}"
    # What is never tried could not show that it has become quicker.
    usual_ms = None if health.usual_is_old else health.usual_ms
    if usual_ms is not None and moment.left_ms < usual_ms:
        return "usually takes longer than the time left"
    return None
