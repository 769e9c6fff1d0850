"""What the others saw, out of what everybody wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

STREAK_FRESH_MS = 10_000
"""A streak is told every second; that of a process which is gone does not count."""
STREAKS_KEPT_MS = 120_000
PROOF = "|proof"
SEEN = ("|good", "|bad")


@dataclass(slots=True)
class Counts:
    """Calls of the last 120 s by bucket: everybody's, and those that were ours.

    ``void`` are breakers that closed: their calls until the end of that bucket do not
    count any more.
    """

    all: dict[int, Mapping[str, str]] = field(default_factory=dict)
    ours: dict[int, Counter[str]] = field(default_factory=dict)
    void: dict[str, int] = field(default_factory=dict)

    def others(self, name: str) -> tuple[int, int]:
        """Sum up what others saw: good calls and bad ones."""
        void = self.void.get(name, -1)
        good, bad = (
            sum(
                self._others(number, name + what)
                for number in self.all
                if number > void
            )
            for what in SEEN
        )
        return good, bad

    def forget(self, before: int) -> None:
        """Drop the buckets up to that one."""
        for number in [n for n in self.all if n <= before]:
            del self.all[number]
        for number in [n for n in self.ours if n <= before]:
            del self.ours[number]

    def _others(self, number: int, what: str) -> int:
        # Fewer than ours: Redis was emptied since.
        ours = self.ours[number][what] if number in self.ours else 0
        return max(0, int(self.all[number].get(what, 0)) - ours)


def forgotten_streaks(streaks: Mapping[str, str], now_ms: int) -> list[str]:
    """Name the streaks that nobody tells any more, nor will: their processes died."""
    return [
        key
        for key, text in streaks.items()
        if not key.endswith(PROOF)
        and now_ms - int(text.rpartition(" ")[2]) > STREAKS_KEPT_MS
    ]


def streaks_of_others(
    streaks: Mapping[str, str], process: str, now_ms: int
) -> dict[str, int]:
    """Sum up failures in a row by breaker; a good call since ends them, whoever's.

    Args:
        streaks: by breaker and process: how many, since when, and when that was told;
            and by breaker when the last good call began.
        process: whose do not count.
        now_ms: the time, as all of these by the clock of Redis.
    """
    found: Counter[str] = Counter()
    for key, text in streaks.items():
        name, _, whose = key.rpartition("|")
        if f"|{whose}" == PROOF or whose == process:
            continue
        streak, since_ms, at_ms = map(int, text.split())
        proof_ms = int(streaks.get(name + PROOF, 0))
        if now_ms - at_ms <= STREAK_FRESH_MS and since_ms > proof_ms:
            found[name] += streak
    return found
