"""The requests of the last minute, in the memory of one process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.core.limits import Minute, Rate, taken
from gateway.ports import Clock

NAMES_MAX = 10_000
"""Whoever is counted beyond that takes the place of who came longest ago."""


def _all_of_it(limit: int) -> int:
    return limit


@dataclass(slots=True)
class MemoryRates:
    """Implements ``Rates``; with other processes each lets its ``share`` through."""

    clock: Clock
    share: Callable[[int], int] = _all_of_it
    _minutes: OrderedDict[str, Minute] = field(default_factory=OrderedDict)

    async def take(self, meter: str, limit: int) -> Rate:
        """Let one request more through, or not."""
        before = self._minutes.get(meter, Minute())
        after, rate = taken(before, self.share(limit), self.clock.monotonic_ms())
        self._minutes[meter] = after
        self._minutes.move_to_end(meter)
        if len(self._minutes) > NAMES_MAX:
            self._minutes.popitem(last=False)
        return rate

    async def note(self, meter: str, limit: int) -> None:
        """Note a request that was let through elsewhere: it counts here as well."""
        await self.take(meter, limit)
