"""Bounds on what the gateway does: calls at once, retries, second purchases. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gateway.core.breaker import Effect, Flight

SLOTS_SHRINK = 0.7
SLOTS_GROW = 0.1
RETRY_PER_REQUEST = 0.2
RETRY_TOKENS_MAX = 100.0
RETRY_FLOOR_PER_S = 0.3
"""At least three further attempts in ten seconds, however few requests come in."""

REBUY_SHARE_PERCENT = 1
REBUYS_ALWAYS = 10
"""So many second purchases in 24 h are fine whatever was spent: below that, a share
of the spend is no measure."""
REBUY_WINDOW_MS = 24 * 3600 * 1000
MINUTE_S = 60


@dataclass(frozen=True, slots=True)
class Slots:
    """How many calls at once an upstream is trusted with, of the ``most`` allowed."""

    most: int
    now: float
    good_run: int = 0
    shrunk_at_ms: int = -1


def slots_after(
    slots: Slots, flight: Flight, effect: Effect, now_ms: int, *, given_up: bool
) -> Slots:
    """Fit the slots after a call: a tenth more after a round of successes, 0.7 if not.

    Too much were calls that the upstream limits, and those given up after a fair time;
    one that was broken off says nothing of the load. Calls that began before the last
    shrinking are part of the crowd that it was for, and one slot always remains. What a
    probe meets is the breaker's business.
    """
    if effect is Effect.GOOD:
        return _grown(slots)
    too_much = effect is Effect.PAUSE or (effect is Effect.BAD and given_up)
    if not too_much or flight.probe or flight.started_ms < slots.shrunk_at_ms:
        return slots
    fewer = max(1.0, slots.now * SLOTS_SHRINK)
    return replace(slots, now=fewer, good_run=0, shrunk_at_ms=now_ms)


def share_of(most: int, processes: int, rank: int) -> int:
    """Tell how much of something a process has, with the others as many as ``most``.

    ``rank`` counts from 0. Nobody goes without: of more processes than there are
    slots each has one.
    """
    return max(1, most // processes + (rank < most % processes))


def resized(slots: Slots, most: int) -> Slots:
    """Fit the slots to another number allowed; how far they shrank stays."""
    if most == slots.most:
        return slots
    return replace(slots, most=most, now=max(1.0, slots.now * most / slots.most))


def _grown(slots: Slots) -> Slots:
    if slots.good_run + 1 < slots.now:
        return replace(slots, good_run=slots.good_run + 1)
    more = max(1.0, slots.now * SLOTS_GROW)
    return replace(slots, now=min(slots.most, slots.now + more), good_run=0)


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """A token bucket of further attempts, shared by all requests of a process."""

    tokens: float = RETRY_TOKENS_MAX
    at_ms: int = 0


def earned(budget: RetryBudget, now_ms: int) -> RetryBudget:
    """Note a first attempt, which earns a fifth of a further one."""
    return _filled(budget, now_ms, RETRY_PER_REQUEST)


def spent(budget: RetryBudget, now_ms: int) -> RetryBudget | None:
    """Take a further attempt; None if there is none left."""
    filled = _filled(budget, now_ms, 0.0)
    if filled.tokens < 1:
        return None
    return replace(filled, tokens=filled.tokens - 1)


def _filled(budget: RetryBudget, now_ms: int, extra: float) -> RetryBudget:
    trickle = max(0, now_ms - budget.at_ms) / 1000 * RETRY_FLOOR_PER_S
    return RetryBudget(min(RETRY_TOKENS_MAX, budget.tokens + trickle + extra), now_ms)


@dataclass(frozen=True, slots=True)
class RiskBook:
    """Second purchases, what the first ones may have cost, and all spend, over 24 h."""

    rebuys: int
    risked_nanousd: int
    spent_nanousd: int


def may_rebuy(book: RiskBook, risk_nanousd: int) -> bool:
    """Tell whether one more purchase may be made after an unknown outcome.

    ``risk_nanousd`` is what that outcome may have cost. What is risked stays within one
    percent of the spend, or within the first few of a day.
    """
    if book.rebuys < REBUYS_ALWAYS:
        return True
    risked_nanousd = book.risked_nanousd + risk_nanousd
    return risked_nanousd * 100 <= book.spent_nanousd * REBUY_SHARE_PERCENT


@dataclass(frozen=True, slots=True)
class Rate:
    """What one more request came to: whether it may go on, and what is left.

    ``frees_in_s`` is how long until a place comes free, from 1 to 60 s.
    """

    allowed: bool
    limit: int
    left: int
    frees_in_s: int


@dataclass(frozen=True, slots=True)
class Minute:
    """What was let through in the last 60 s of the clock: (second, how many)."""

    counts: tuple[tuple[int, int], ...] = ()


def taken(minute: Minute, limit: int, now_ms: int) -> tuple[Minute, Rate]:
    """Let one more through, if in 60 whole seconds of the clock there are not too many.

    What is turned away does not count: who asks too often is let through ``limit``
    times a minute all the same. A clock that is set back forgets.
    """
    assert limit > 0, limit
    second = now_ms // 1000
    counts = [(at, n) for at, n in minute.counts if second - MINUTE_S < at <= second]
    used = sum(n for _, n in counts)
    allowed = used < limit
    if allowed:
        last = counts.pop()[1] if counts and counts[-1][0] == second else 0
        counts.append((second, last + 1))
    left = max(0, limit - used - allowed)
    rate = Rate(allowed, limit, left, counts[0][0] + MINUTE_S - second)
    return Minute(tuple(counts)), rate
