"""When upstreams are in trouble, of which sort, and what becomes of a call in it.

All of it follows from a seed before the simulation begins, so that an oracle can know.
Times are seconds from the start.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from random import Random

from providers.kit.contract import FailureKind

DAY_S = 86_400
REFUSAL_S = 0.2
SLOW_TIMES = 4
"""Half of the calls then take more than 100 s: slow by any rule, and not yet lost."""
RETRY_AFTER_S = 20.0
RESET_BILLED_SHARE = 0.5


class Trouble(Enum):
    """What an upstream does while it is not well."""

    CRASHES = "crashes"
    """503 at once. Calls that were under way are cut off."""

    REFUSES = "refuses"
    """503 at once. Calls that were under way are finished."""

    HANGS = "hangs"
    """A black hole: neither those under way nor new calls ever return."""

    RESETS = "resets"
    """Takes the request, and breaks off somewhere in its answer."""

    SLOW = "slow"
    """Everything takes four times as long."""

    LIMITS = "limits"
    """429 with Retry-After."""

    MODERATES = "moderates"
    """Refuses every prompt. No outage: a way to play moderation."""


CUTS_OFF = frozenset({Trouble.CRASHES, Trouble.HANGS, Trouble.RESETS})
"""Troubles that calls already under way do not survive."""


@dataclass(frozen=True, slots=True)
class Outage:
    """A time of trouble. ``shared``: it struck a whole failure domain."""

    begin_s: float
    end_s: float
    trouble: Trouble
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Climate:
    """How often there is trouble, how long it lasts, and what it is.

    Four of five outages are short and one is long; both are exponential. With
    ``share`` 1 % that is one outage in 22 h, of 14 min on average.
    """

    share: float = 0.01
    short_s: float = 120.0
    long_s: float = 3600.0
    long_share: float = 0.2
    mix: tuple[tuple[Trouble, float], ...] = (
        (Trouble.CRASHES, 0.35),
        (Trouble.REFUSES, 0.15),
        (Trouble.HANGS, 0.25),
        (Trouble.RESETS, 0.10),
        (Trouble.SLOW, 0.10),
        (Trouble.LIMITS, 0.05),
    )

    @property
    def repair_s(self) -> float:
        """Mean time to repair."""
        return self.short_s * (1 - self.long_share) + self.long_s * self.long_share

    @property
    def between_s(self) -> float:
        """Mean time from the end of an outage to the next."""
        return self.repair_s * (1 - self.share) / self.share


def outages(climate: Climate, length_s: float, dice: Random) -> tuple[Outage, ...]:
    """Draw the outages of one upstream, one after the other."""
    troubles = [trouble for trouble, _ in climate.mix]
    weights = [weight for _, weight in climate.mix]
    drawn = []
    at_s = dice.expovariate(1 / climate.between_s)
    while at_s < length_s:
        long = dice.random() < climate.long_share
        lasts_s = dice.expovariate(1 / (climate.long_s if long else climate.short_s))
        (trouble,) = dice.choices(troubles, weights)
        drawn.append(Outage(at_s, at_s + lasts_s, trouble))
        at_s += lasts_s + dice.expovariate(1 / climate.between_s)
    return tuple(drawn)


def together(own: Iterable[Outage], shared: Iterable[Outage]) -> tuple[Outage, ...]:
    """Put the outages of a failure domain over those of one upstream."""
    struck = [Outage(o.begin_s, o.end_s, o.trouble, shared=True) for o in shared]
    kept = [
        o
        for o in own
        if all(o.end_s <= s.begin_s or o.begin_s >= s.end_s for s in struck)
    ]
    return tuple(sorted([*kept, *struck], key=lambda o: o.begin_s))


class Weather:
    """The outages of one upstream, to be asked by time."""

    def __init__(self, outages: tuple[Outage, ...]) -> None:
        self.outages = outages
        self._begins_s = [outage.begin_s for outage in outages]

    def at(self, now_s: float) -> Outage | None:
        """Tell the trouble of a moment, if there is any."""
        place = bisect_right(self._begins_s, now_s) - 1
        if place < 0 or self.outages[place].end_s <= now_s:
            return None
        return self.outages[place]

    def cut_within(self, begin_s: float, end_s: float) -> Outage | None:
        """Find the first trouble that ends a call between two moments."""
        place = bisect_right(self._begins_s, begin_s)
        while place < len(self.outages) and self._begins_s[place] < end_s:
            if self.outages[place].trouble in CUTS_OFF:
                return self.outages[place]
            place += 1
        return None

    def share_down(self, length_s: float) -> float:
        """Tell the share of the time with trouble."""
        return sum(min(o.end_s, length_s) - o.begin_s for o in self.outages) / length_s


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a call: it ends after a while, well or with a failure.

    ``after_s`` is infinite for one that never returns. ``bought`` tells whether the
    upstream charges for it; that of a call given up meanwhile is ``bought_if_left``.
    """

    after_s: float
    kind: FailureKind | None = None
    bought: bool = False
    bought_if_left: bool = False
    retry_after_s: float | None = None


def fate(weather: Weather, now_s: float, work_s: float, chance: float) -> Fate:
    """Say what becomes of a call that takes ``work_s`` where all is well.

    ``chance`` (0 to 1) decides where an answer breaks off, and whether what broke off
    is charged.
    """
    trouble = weather.at(now_s)
    if trouble is not None and trouble.trouble is not Trouble.SLOW:
        return _met(trouble.trouble, work_s, chance)
    takes_s = work_s * (SLOW_TIMES if trouble is not None else 1)
    cut = weather.cut_within(now_s, now_s + takes_s)
    if cut is None:
        return Fate(takes_s, bought=True, bought_if_left=True)
    if cut.trouble is Trouble.HANGS:
        return Fate(math.inf, bought_if_left=_is_charged(chance))
    return _reset(cut.begin_s - now_s, chance)


def failure(after_s: float, kind: FailureKind, chance: float) -> Fate:
    """Say what becomes of a call that fails though the upstream is well."""
    if kind is FailureKind.TIMEOUT:
        return _reset(after_s, chance)
    return Fate(after_s, kind)


def _met(trouble: Trouble, work_s: float, chance: float) -> Fate:
    if trouble is Trouble.REFUSES or trouble is Trouble.CRASHES:
        return Fate(REFUSAL_S, FailureKind.OVERLOADED)
    if trouble is Trouble.HANGS:
        return Fate(math.inf)
    if trouble is Trouble.LIMITS:
        kind = FailureKind.RATE_LIMITED
        return Fate(REFUSAL_S, kind, retry_after_s=RETRY_AFTER_S)
    if trouble is Trouble.MODERATES:
        return Fate(REFUSAL_S, FailureKind.CONTENT_POLICY)
    return _reset(work_s * chance, chance)


def _reset(after_s: float, chance: float) -> Fate:
    return Fate(after_s, FailureKind.TIMEOUT, bought=_is_charged(chance))


def _is_charged(chance: float) -> bool:
    # Independent enough of where it breaks off: another digit of the same draw.
    return (chance * 1000) % 1 < RESET_BILLED_SHARE
