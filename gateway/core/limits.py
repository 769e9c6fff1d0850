"""Bounds on what the gateway does on its own: retries and second purchases. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

RETRY_PER_REQUEST = 0.2
RETRY_TOKENS_MAX = 100.0
RETRY_FLOOR_PER_S = 0.3
"""At least three further attempts in ten seconds, however few requests come in."""

REBUY_SHARE_PERCENT = 1
REBUYS_ALWAYS = 10
"""So many second purchases in 24 h are fine whatever was spent: below that, a share
of the spend is no measure."""
REBUY_WINDOW_MS = 24 * 3600 * 1000


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
    """Second purchases after unknown outcomes, and all spend, over 24 h."""

    rebuys: int
    risked_nanousd: int
    spent_nanousd: int


def may_rebuy(book: RiskBook) -> bool:
    """Tell whether a second purchase may be made after an unknown outcome.

    The book counts that outcome already. Second purchases stay within one percent of
    the spend, or within the first few of a day.
    """
    if book.rebuys <= REBUYS_ALWAYS:
        return True
    return book.risked_nanousd * 100 <= book.spent_nanousd * REBUY_SHARE_PERCENT
