"""What was up, when: from counts of five minutes and of days. Pure.

A model counts requests, an upstream calls. What the client did wrong, or took back, is
in no count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gateway.core.outcomes import EXCLUDED, SERVED, RequestOutcome

SLOT_MS = 300_000
DAY_MS = 86_400_000
KEPT_DAYS = 90
WINDOWS_MS: Mapping[str, int] = {
    "5m": SLOT_MS,
    "30m": 6 * SLOT_MS,
    "24h": DAY_MS,
    "7d": 7 * DAY_MS,
    "30d": 30 * DAY_MS,
    "90d": 90 * DAY_MS,
}
"""Those up to 7 d are added up from slots, longer ones from days in UTC. The one that
has begun counts too: a window is up to one slot, or one day, longer than its name."""
TROUBLE_FAILED_MIN = 3
"""So many failures in a slot at least: one or two make no incident."""
TROUBLE_SHARE = 20
"""And at least one in so many."""
DOWN_SHARE = 2
QUIET_MAX_SLOTS = 2
"""An incident goes on over so many slots without trouble."""
GOAL_MILLIONTHS = 999_000
FAIR_MILLIONTHS = 990_000

# Kinds of failed calls that the request itself was to blame for, or that were stopped.
_NOT_THE_UPSTREAMS = frozenset(
    {"invalid_request", "content_policy", "unsupported", "cancelled"}
)


class Kind(Enum):
    """What has an uptime."""

    MODEL = "model"
    UPSTREAM = "upstream"


class State(Enum):
    """How something is now, by its last slots."""

    UP = "up"
    DEGRADED = "degraded"
    DOWN = "down"
    UNKNOWN = "unknown"
    """Nobody asked."""


Subject = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class Count:
    """How many were served and how many failed."""

    served: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """How many count."""
        return self.served + self.failed

    @property
    def millionths(self) -> int | None:
        """Served, in millionths of all, rounded down; None of none."""
        return self.served * 1_000_000 // self.total if self.total else None

    @property
    def troubled(self) -> bool:
        """Whether so much failed that it is part of an incident."""
        enough = self.failed >= TROUBLE_FAILED_MIN
        return enough and self.failed * TROUBLE_SHARE >= self.total

    def plus(self, other: Count) -> Count:
        """Add another count."""
        return Count(self.served + other.served, self.failed + other.failed)


NONE = Count()


@dataclass(frozen=True, slots=True)
class Slot:
    """The count of a subject from ``since_ms`` on, for five minutes or a day."""

    subject: Subject
    since_ms: int
    count: Count


@dataclass(frozen=True, slots=True)
class Incident:
    """Slots with trouble that belong together; ``until_ms`` is None while it lasts."""

    subject: Subject
    since_ms: int
    until_ms: int | None
    count: Count
    """Of the slots with trouble."""


@dataclass(frozen=True, slots=True)
class Uptime:
    """Of one subject. ``days`` has the last 90, the oldest first, None of none."""

    subject: Subject
    state: State
    windows: Mapping[str, Count]
    days: tuple[Count, ...]


def of_request(outcome: str) -> Count | None:
    """Count a request by its outcome; None if it does not count."""
    value = RequestOutcome(outcome)
    if value in EXCLUDED:
        return None
    return Count(served=1) if value in SERVED else Count(failed=1)


def of_attempt(outcome: str) -> Count | None:
    """Count a call by its outcome; None if it says nothing of the upstream."""
    if outcome in _NOT_THE_UPSTREAMS:
        return None
    return Count(served=1) if outcome == "done" else Count(failed=1)


def slot_of(now_ms: int) -> int:
    """Tell when the slot of a moment began."""
    return now_ms - now_ms % SLOT_MS


def day_of(now_ms: int) -> int:
    """Tell when the day of a moment began, in UTC."""
    return now_ms - now_ms % DAY_MS


def uptime_of(
    subject: Subject, slots: Sequence[Slot], days: Sequence[Slot], now_ms: int
) -> Uptime:
    """Add up what is known of a subject: slots of 7 days, days of 90."""
    windows = {}
    for name, ms in WINDOWS_MS.items():
        long = ms > WINDOWS_MS["7d"]
        shown, width_ms = (days, DAY_MS) if long else (slots, SLOT_MS)
        windows[name] = _sum(shown, now_ms - ms - width_ms)
    today_ms = day_of(now_ms)
    by_day = {slot.since_ms: slot.count for slot in days}
    return Uptime(
        subject=subject,
        state=_state(windows["5m"]),
        windows=windows,
        days=tuple(
            by_day.get(today_ms - back * DAY_MS, NONE)
            for back in reversed(range(KEPT_DAYS))
        ),
    )


def incidents_of(slots: Iterable[Slot], now_ms: int) -> list[Incident]:
    """Join slots with trouble to incidents, the latest first.

    Slots of one subject that are at most ``QUIET_MAX_SLOTS`` apart are one.
    """
    open_ones: dict[Subject, Incident] = {}
    ended: list[Incident] = []
    for slot in sorted(slots, key=lambda each: each.since_ms):
        if not slot.count.troubled:
            continue
        until_ms = slot.since_ms + SLOT_MS
        before = open_ones.get(slot.subject)
        if before is not None and before.until_ms is not None:
            if slot.since_ms <= before.until_ms + QUIET_MAX_SLOTS * SLOT_MS:
                count = before.count.plus(slot.count)
                joined = Incident(slot.subject, before.since_ms, until_ms, count)
                open_ones[slot.subject] = joined
                continue
            ended.append(before)
        open_ones[slot.subject] = Incident(
            slot.subject, slot.since_ms, until_ms, slot.count
        )
    found = ended + [_lasting(each, now_ms) for each in open_ones.values()]
    return sorted(found, key=lambda each: each.since_ms, reverse=True)


def _lasting(last: Incident, now_ms: int) -> Incident:
    # Over only once as long a time as joins two went by without trouble.
    assert last.until_ms is not None
    if now_ms >= last.until_ms + QUIET_MAX_SLOTS * SLOT_MS:
        return last
    return Incident(last.subject, last.since_ms, None, last.count)


def _state(count: Count) -> State:
    if not count.total:
        return State.UNKNOWN
    if count.failed * DOWN_SHARE >= count.total and count.troubled:
        return State.DOWN
    return State.DEGRADED if count.troubled else State.UP


def _sum(slots: Iterable[Slot], after_ms: int) -> Count:
    total = NONE
    for slot in slots:
        if slot.since_ms > after_ms:
            total = total.plus(slot.count)
    return total
