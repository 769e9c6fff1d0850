"""When an offer is left alone, and how it comes back. Pure: a rule over counters.

One ``Record`` is kept per offer and operation, and one per upstream credential. A
record is plain numbers, so that memory and a shared store can run the same rule.
Times are milliseconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Reversible
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
PAUSE_MIN_MS = 1_000
"""However soon it may be asked again by its own word: else each request asks again."""
PAUSE_MAX_MS = 300_000
FORCED_EVERY_MS = 5_000
AUTH_OPEN_MS = 900_000
FUNDS_OPEN_MS = 300_000
USUAL_WEIGHT = 0.03
USUAL_WEIGHT_SLOW = 0.003
"""An outage that slows everything must not become the usual before it is seen."""
USUAL_FRESH_MS = 600_000
FAIR_MS = 180_000
"""A call that had so long counts against its upstream, whatever is usual there."""


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
    the upstream. ``given_up`` says that our time was over: whose fault that is depends
    on how long it had. ``sample`` feeds the learned ratio; None when it teaches
    nothing.
    """

    kind: FailureKind | None = None
    cancelled: bool = False
    given_up: bool = False
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

    ``buckets`` holds (bucket number, good, bad) of the last 120 s. ``bad_since_ms`` is
    when the first call of the streak began. ``usual_ms`` is about the median of what
    calls take: a mean would follow the few that take very long.
    """

    buckets: tuple[tuple[int, int, int], ...] = ()
    bad_streak: int = 0
    bad_since_ms: int = 0
    last_good_started_ms: int = -1
    open_until_ms: int | None = None
    opened_at_ms: int = -1
    openings: int = 0
    probes_good: int = 0
    closed_at_ms: int | None = None
    paused_until_ms: int = 0
    forced_at_ms: int | None = None
    usual_ms: float | None = None
    usual_at_ms: int = 0
    ratios: Ratios = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Others:
    """What other processes saw of an offer lately; it is not in our records.

    ``streak`` is how many of their calls went bad in a row, since the last good one.
    """

    good: int = 0
    bad: int = 0
    streak: int = 0


NOBODY = Others()


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
    usual_is_old: bool = False
    """No call has ended well for so long that it may be quicker by now."""
    cost_ratios: Mapping[str, int] = field(default_factory=dict)
    doubtful: bool = False

    @property
    def callable(self) -> bool:
        """Whether the breaker allows a call (slots aside)."""
        return self.state is BreakerState.CLOSED or self.state is BreakerState.HALF_OPEN


@dataclass(frozen=True, slots=True)
class Window:
    """Counts of the last 120 s, calls that hang included."""

    good: int
    bad: int
    slow: int
    slow_streak: int


def window_of(record: Record, flights: Reversible[Flight], now_ms: int) -> Window:
    """Count good, bad and slow calls. A call that hangs counts while it hangs.

    ``flights`` come oldest first, so that no more of them are looked at than are slow.
    """
    limit_ms = slow_after_ms(record)
    slow = slow_streak = 0
    for flight in flights:
        if now_ms - flight.started_ms <= limit_ms:
            break
        if _is_news(record, flight):
            slow += 1
            slow_streak += flight.started_ms > record.last_good_started_ms
    oldest = (now_ms - WINDOW_MS) // BUCKET_MS
    good = bad = 0
    for number, good_then, bad_then in record.buckets:
        if number > oldest:
            good += good_then
            bad += bad_then
    return Window(good, bad, slow, slow_streak)


def slow_after_ms(record: Record) -> float:
    """Tell the age from which a call counts as slow."""
    return max(SLOW_AFTER_MS, SLOW_TIMES_USUAL * (record.usual_ms or 0.0))


def trouble(
    record: Record, flights: Reversible[Flight], now_ms: int, others: Others = NOBODY
) -> str | None:
    """Say why the breaker must open now, if it must. ``flights`` come oldest first.

    Failures come home before successes do, so failures in a row count only where there
    are as many of them as there are calls still out. What ``others`` saw counts beside
    what was seen here, but never without it.
    """
    seen = window_of(record, flights, now_ms)
    ours = record.bad_streak + seen.slow_streak
    if not ours and not seen.bad and not seen.slow:
        return None
    bad = seen.bad + seen.slow + others.bad
    calls = seen.good + others.good + bad
    streak = ours + others.streak
    if (
        ours
        and streak >= BAD_STREAK_OPENS
        and (
            seen.slow_streak >= BAD_STREAK_OPENS
            or _out_since(record.bad_since_ms, flights, ours) <= ours
        )
    ):
        what = "slow calls" if seen.slow_streak else "failures"
        return f"{streak} {what} in a row"
    if calls >= CALLS_MIN and bad >= BAD_SHARE_OPENS * calls:
        return f"{bad} of {calls} calls bad in {WINDOW_MS // 1000} s"
    return None


def proven_streak(record: Record, flights: Reversible[Flight], now_ms: int) -> int:
    """Count our failures in a row, for others; 0 while more calls than that are out.

    ``flights`` come oldest first.
    """
    seen = window_of(record, flights, now_ms)
    ours = record.bad_streak + seen.slow_streak
    return ours if _out_since(record.bad_since_ms, flights, ours) <= ours else 0


def _out_since(since_ms: int, flights: Reversible[Flight], enough: int) -> int:
    # Counts calls that began since then and are out, and stops when there are more
    # than enough of them.
    out = 0
    for flight in reversed(flights):
        if flight.started_ms < since_ms or out > enough:
            break
        out += 1
    return out


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
    # Only a time that it was closed for counts: a probe that fails ends no such time.
    forgotten = (
        record.open_until_ms is None
        and record.closed_at_ms is not None
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
    if record.open_until_ms is None or flight.started_ms < record.opened_at_ms:
        return record
    return Record()


def effect_of(record: Record, flight: Flight, outcome: Outcome, now_ms: int) -> Effect:
    """Say what the end of a call means to the breaker of its offer."""
    effect = outcome.effect
    if effect is Effect.BAD or effect is Effect.SOFT:
        fair_ms = min(FAIR_MS, slow_after_ms(record))
        hasty = outcome.given_up and now_ms - flight.started_ms <= fair_ms
        if hasty or not _is_news(record, flight):
            return Effect.NONE
    return effect


def after_call(
    record: Record, flight: Flight, outcome: Outcome, now_ms: int, fraction: float
) -> Record:
    """Note the end of a call, and open or close if that follows from it."""
    effect = effect_of(record, flight, outcome, now_ms)
    if effect is Effect.GOOD:
        return _after_good(record, flight, outcome, now_ms)
    if effect is Effect.OPEN_CREDENTIAL:
        return record
    if effect is Effect.PAUSE:
        rest_ms = PAUSE_DEFAULT_MS
        if outcome.retry_after_s is not None:
            asked_ms = round(outcome.retry_after_s * 1000)
            rest_ms = min(PAUSE_MAX_MS, max(PAUSE_MIN_MS, asked_ms))
        until_ms = max(record.paused_until_ms, now_ms + rest_ms)
        return replace(record, paused_until_ms=until_ms, reason="rate_limited")
    if effect is Effect.NONE or outcome.kind is None:
        return record
    since_ms = flight.started_ms
    if record.bad_streak:
        since_ms = min(record.bad_since_ms, since_ms)
    noted = replace(
        record,
        buckets=_counted(record, now_ms, bad=1),
        bad_streak=record.bad_streak + (effect is Effect.BAD),
        bad_since_ms=since_ms,
    )
    # A forced try comes before it is time for a probe, and says nothing of how long
    # the outage will last.
    opens_ms = record.open_until_ms
    forced = opens_ms is not None and flight.started_ms < opens_ms
    if forced or not flight.probe:
        return noted
    return opened(noted, f"probe failed: {outcome.kind.value}", now_ms, fraction)


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


def reentry_room(
    record: Record, flights: Reversible[Flight], now_ms: int, processes: int = 1
) -> int | None:
    """How many more calls a returning offer may take; None once it is back.

    Calls from before its return, which may hang for minutes yet, take no room. Of
    several ``processes`` each has its part of the room, and one call at least.
    """
    if record.closed_at_ms is None:
        return None
    back_ms = now_ms - record.closed_at_ms
    if back_ms >= REENTRY_MS:
        return None
    allowed = max(1, (REENTRY_SLOTS << back_ms // REENTRY_STEP_MS) // processes)
    return allowed - _out_since(record.closed_at_ms, flights, allowed)


def _is_news(record: Record, flight: Flight) -> bool:
    # What began before the last recovery belongs to the outage that is over.
    return record.closed_at_ms is None or flight.started_ms >= record.closed_at_ms


def _after_good(
    record: Record, flight: Flight, outcome: Outcome, now_ms: int
) -> Record:
    took_ms = max(1, now_ms - flight.started_ms)
    slow = took_ms > slow_after_ms(record)
    # A success that was slow in coming excuses no other call: all may be slow there.
    # Nor does one that began before the trouble.
    proof = not slow and flight.started_ms >= record.bad_since_ms
    last_ms = record.last_good_started_ms
    noted = replace(
        record,
        buckets=_counted(record, now_ms, good=1),
        bad_streak=0 if proof else record.bad_streak,
        last_good_started_ms=last_ms if slow else max(last_ms, flight.started_ms),
        usual_ms=_usual_ms(record.usual_ms, took_ms, slow=slow),
        usual_at_ms=now_ms,
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
        bad_streak=0,
        reason="",
    )


def _counted(
    record: Record, now_ms: int, *, good: int = 0, bad: int = 0
) -> tuple[tuple[int, int, int], ...]:
    number = now_ms // BUCKET_MS
    oldest = (now_ms - WINDOW_MS) // BUCKET_MS
    kept = [bucket for bucket in record.buckets if oldest < bucket[0] != number]
    old = next((b for b in record.buckets if b[0] == number), (number, 0, 0))
    return (*kept, (number, old[1] + good, old[2] + bad))


def _usual_ms(old_ms: float | None, took_ms: int, *, slow: bool) -> float:
    # Blended by factors, not by differences: of lognormal times that is the median.
    if old_ms is None:
        return min(took_ms, SLOW_AFTER_MS)  # one long job is no measure of others
    weight = USUAL_WEIGHT_SLOW if slow else USUAL_WEIGHT
    return old_ms * math.pow(took_ms / old_ms, weight)
