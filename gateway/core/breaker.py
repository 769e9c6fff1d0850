"""When an offer is left alone, and how it comes back. Pure: a rule over counters.

One ``Record`` is kept per offer and operation, and one per upstream credential. A
record is plain numbers, so that memory and a shared store can run the same rule.
Times are milliseconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from gateway.core.ratios import Ratios, Sample, learned
from providers.kit.contract import FailureKind

WINDOW_MS = 120_000
BUCKET_MS = 10_000
CALLS_MIN = 10
BAD_SHARE_OPENS = 0.5
BAD_STREAK_OPENS = 5
SLOW_AFTER_MS = 90_000
SLOW_TIMES_USUAL = 3
OPEN_FIRST_MS = 15_000
OPEN_MAX_MS = 300_000
OPEN_JITTER = 0.2
OPENINGS_FORGOTTEN_AFTER_MS = 600_000
PROBES_TO_CLOSE = 2
REENTRY_SLOTS = 2
REENTRY_STEP_MS = 10_000
REENTRY_MS = 60_000
PAUSE_DEFAULT_MS = 5_000
PAUSE_MAX_MS = 300_000
FORCED_EVERY_MS = 5_000
AUTH_OPEN_MS = 900_000
FUNDS_OPEN_MS = 300_000
SHRINK_SLOTS = 0.7
USUAL_WEIGHT = 0.1


class BreakerState(Enum):
    """Whether an offer may be called."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    PAUSED = "paused"
    """Rate limited: nothing is wrong with it, it asked for a rest."""


class Effect(Enum):
    """What the end of a call means to the breakers."""

    NONE = "none"
    GOOD = "good"
    BAD = "bad"
    SOFT = "soft"
    """Counts in the window's share, not in the streak."""

    PAUSE = "pause"
    OPEN_CREDENTIAL = "open_credential"


EFFECT_BY_KIND: Mapping[FailureKind, Effect] = {
    FailureKind.INVALID_REQUEST: Effect.NONE,
    FailureKind.CONTENT_POLICY: Effect.NONE,
    FailureKind.UNSUPPORTED: Effect.NONE,
    FailureKind.AUTH: Effect.OPEN_CREDENTIAL,
    FailureKind.INSUFFICIENT_FUNDS: Effect.OPEN_CREDENTIAL,
    FailureKind.RATE_LIMITED: Effect.PAUSE,
    FailureKind.OVERLOADED: Effect.BAD,
    FailureKind.BAD_GATEWAY: Effect.BAD,
    FailureKind.NETWORK: Effect.BAD,
    FailureKind.TIMEOUT: Effect.BAD,
    FailureKind.NO_OUTPUT: Effect.SOFT,
    FailureKind.RESULT_LOST: Effect.NONE,
}
_CREDENTIAL_OPEN_MS = {
    FailureKind.AUTH: AUTH_OPEN_MS,
    FailureKind.INSUFFICIENT_FUNDS: FUNDS_OPEN_MS,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call went. No ``kind`` means that it delivered.

    ``cancelled`` says that we gave up for reasons of our own: it tells nothing about
    the upstream. ``sample`` feeds the learned ratio; None when it teaches nothing.
    """

    kind: FailureKind | None = None
    cancelled: bool = False
    retry_after_s: float | None = None
    sample: Sample | None = None

    @property
    def effect(self) -> Effect:
        """What it means to the breakers."""
        if self.cancelled:
            return Effect.NONE
        return Effect.GOOD if self.kind is None else EFFECT_BY_KIND[self.kind]


@dataclass(frozen=True, slots=True)
class Flight:
    """A call under way."""

    started_ms: int
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """All that is remembered of one offer and operation.

    ``buckets`` holds (bucket number, good, bad) of the last 120 s.
    """

    buckets: tuple[tuple[int, int, int], ...] = ()
    bad_streak: int = 0
    last_good_started_ms: int = -1
    open_until_ms: int | None = None
    opened_at_ms: int = -1
    openings: int = 0
    probes_good: int = 0
    closed_at_ms: int | None = None
    paused_until_ms: int = 0
    forced_at_ms: int | None = None
    usual_ms: float | None = None
    ratios: Ratios = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of an offer at this moment.

    ``slots_free`` is how many more calls it may take. ``retry_at_ms`` is when it may
    be called again, for an offer that may not be called now. ``cost_ratios`` gives, in
    millionths by tier, real cost over estimate where it is known. ``doubtful`` is one
    whose last call failed, or that is only being tried again.
    """

    state: BreakerState = BreakerState.CLOSED
    reason: str = ""
    retry_at_ms: int | None = None
    slots_free: int = 1
    in_flight: int = 0
    usual_ms: float | None = None
    cost_ratios: Mapping[str, int] = field(default_factory=dict)
    doubtful: bool = False

    @property
    def callable(self) -> bool:
        """Whether the breaker allows a call (slots aside)."""
        return self.state in {BreakerState.CLOSED, BreakerState.HALF_OPEN}


@dataclass(frozen=True, slots=True)
class Window:
    """Counts of the last 120 s, calls that hang included."""

    good: int
    bad: int
    slow: int
    slow_streak: int


def window_of(record: Record, flights: Iterable[Flight], now_ms: int) -> Window:
    """Count good, bad and slow calls. A call that hangs counts while it hangs."""
    oldest = (now_ms - WINDOW_MS) // BUCKET_MS
    live = [bucket for bucket in record.buckets if bucket[0] > oldest]
    limit_ms = max(SLOW_AFTER_MS, SLOW_TIMES_USUAL * (record.usual_ms or 0.0))
    slow = [
        flight
        for flight in flights
        if now_ms - flight.started_ms > limit_ms and _is_news(record, flight)
    ]
    return Window(
        good=sum(good for _, good, _ in live),
        bad=sum(bad for _, _, bad in live),
        slow=len(slow),
        slow_streak=sum(f.started_ms > record.last_good_started_ms for f in slow),
    )


def trouble(record: Record, flights: Iterable[Flight], now_ms: int) -> str | None:
    """Say why the breaker must open now, if it must."""
    seen = window_of(record, flights, now_ms)
    bad = seen.bad + seen.slow
    calls = seen.good + bad
    if record.bad_streak + seen.slow_streak >= BAD_STREAK_OPENS:
        what = "slow calls" if seen.slow_streak else "failures"
        return f"{record.bad_streak + seen.slow_streak} {what} in a row"
    if calls >= CALLS_MIN and bad >= BAD_SHARE_OPENS * calls:
        return f"{bad} of {calls} calls bad in {WINDOW_MS // 1000} s"
    return None


def state_of(record: Record, now_ms: int) -> BreakerState:
    """Tell the state that the record stands in."""
    if record.open_until_ms is not None and now_ms < record.open_until_ms:
        return BreakerState.OPEN
    if now_ms < record.paused_until_ms:
        return BreakerState.PAUSED
    return (
        BreakerState.CLOSED if record.open_until_ms is None else BreakerState.HALF_OPEN
    )


def opened(record: Record, reason: str, now_ms: int, fraction: float) -> Record:
    """Open, or open again: 15 s, doubling to 300 s, give or take a fifth."""
    forgotten = (
        record.closed_at_ms is not None
        and now_ms - record.closed_at_ms > OPENINGS_FORGOTTEN_AFTER_MS
    )
    openings = 1 if forgotten else record.openings + 1
    base_ms = min(OPEN_FIRST_MS * 2 ** min(openings - 1, 10), OPEN_MAX_MS)
    jitter = 1 + OPEN_JITTER * (2 * fraction - 1)
    return replace(
        record,
        open_until_ms=now_ms + round(base_ms * jitter),
        openings=openings,
        probes_good=0,
        reason=reason,
    )


def credential_opened(record: Record, kind: FailureKind, now_ms: int) -> Record:
    """Open a whole credential: 900 s for a refused one, 300 s for an empty one."""
    return replace(
        record,
        open_until_ms=now_ms + _CREDENTIAL_OPEN_MS[kind],
        opened_at_ms=now_ms,
        probes_good=0,
        reason=kind.value,
    )


def credential_after_good(record: Record, flight: Flight) -> Record:
    """Trust a credential again, but not for a call that began before its refusal."""
    return Record() if flight.started_ms >= record.opened_at_ms else record


def after_call(
    record: Record, flight: Flight, outcome: Outcome, now_ms: int, fraction: float
) -> Record:
    """Note the end of a call, and open or close if that follows from it."""
    effect = outcome.effect
    if effect is Effect.GOOD:
        return _after_good(record, flight, outcome, now_ms)
    if effect is Effect.PAUSE:
        rest_ms = PAUSE_DEFAULT_MS
        if outcome.retry_after_s is not None:
            rest_ms = min(PAUSE_MAX_MS, max(0, round(outcome.retry_after_s * 1000)))
        until_ms = max(record.paused_until_ms, now_ms + rest_ms)
        return replace(record, paused_until_ms=until_ms, reason="rate_limited")
    if effect in {Effect.BAD, Effect.SOFT} and outcome.kind is not None:
        if not _is_news(record, flight):
            return record
        noted = replace(
            _counted(record, now_ms, bad=1),
            bad_streak=record.bad_streak + (effect is Effect.BAD),
        )
        if not flight.probe:
            return noted
        return opened(noted, f"probe failed: {outcome.kind.value}", now_ms, fraction)
    return record


def closed_by_hand(record: Record, now_ms: int) -> Record:
    """Close it whatever was seen, and end its pause; traffic returns in steps.

    What is under way from before counts no more. One that was closed stays as it is.
    """
    if state_of(record, now_ms) is BreakerState.CLOSED:
        return record
    was_open = record.open_until_ms is not None
    return replace(
        record,
        buckets=(),
        bad_streak=0,
        open_until_ms=None,
        openings=0,
        probes_good=0,
        closed_at_ms=now_ms if was_open else record.closed_at_ms,
        paused_until_ms=0,
        reason="",
    )


def reentry_slots(record: Record, now_ms: int) -> int | None:
    """How many calls at once a returning offer may take; None once it is back."""
    if record.closed_at_ms is None:
        return None
    back_ms = now_ms - record.closed_at_ms
    if back_ms >= REENTRY_MS:
        return None
    return REENTRY_SLOTS << back_ms // REENTRY_STEP_MS


def _is_news(record: Record, flight: Flight) -> bool:
    # What began before the last recovery belongs to the outage that is over.
    return record.closed_at_ms is None or flight.started_ms >= record.closed_at_ms


def _after_good(
    record: Record, flight: Flight, outcome: Outcome, now_ms: int
) -> Record:
    took_ms = now_ms - flight.started_ms
    noted = replace(
        _counted(record, now_ms, good=1),
        bad_streak=0,
        last_good_started_ms=max(record.last_good_started_ms, flight.started_ms),
        usual_ms=_blend(record.usual_ms, took_ms, USUAL_WEIGHT),
    )
    if outcome.sample is not None:
        noted = replace(noted, ratios=learned(record.ratios, outcome.sample, now_ms))
    if record.open_until_ms is None or not flight.probe:
        return noted
    if record.probes_good + 1 < PROBES_TO_CLOSE:
        return replace(noted, probes_good=record.probes_good + 1)
    return replace(
        noted,
        open_until_ms=None,
        probes_good=0,
        closed_at_ms=now_ms,
        buckets=(),
        reason="",
    )


def _counted(record: Record, now_ms: int, *, good: int = 0, bad: int = 0) -> Record:
    number = now_ms // BUCKET_MS
    oldest = (now_ms - WINDOW_MS) // BUCKET_MS
    kept = [bucket for bucket in record.buckets if oldest < bucket[0] != number]
    old = next((b for b in record.buckets if b[0] == number), (number, 0, 0))
    return replace(record, buckets=(*kept, (number, old[1] + good, old[2] + bad)))


def _blend(old: float | None, new: float, weight: float) -> float:
    return new if old is None else old + weight * (new - old)
