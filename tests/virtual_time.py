"""An event loop on which no time passes: every wait is over as soon as it is asked for.

Timeouts, sleeps and deadlines keep their order and their length on the loop's clock.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time

ALLOWANCE_S = time.get_clock_info("monotonic").resolution


class _SkippingSelector(selectors.DefaultSelector):
    """Moves the clock forward instead of waiting."""

    now_s = 0.0

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout == 0:
            return []  # there is work: whatever comes from outside can wait for it
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if ready:
            return ready
        if timeout is None:
            msg = "everything waits, and nothing will ever wake it"
            raise RuntimeError(msg)
        self.now_s += timeout
        if math.ulp(self.now_s) > ALLOWANCE_S:
            # After half a year the loop's own allowance is lost in rounding: it would
            # wait for a moment that has come for ever.
            self.now_s = math.nextafter(self.now_s, math.inf)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose time is its own."""

    def __init__(self) -> None:
        self._skipping = _SkippingSelector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now_s


class LoopClock:
    """The ``Clock`` of a virtual loop; the epoch is a fixed day."""

    EPOCH_MS = 1_790_000_000_000

    def now_ms(self) -> int:
        return self.EPOCH_MS + self.monotonic_ms()

    def monotonic_ms(self) -> int:
        return round(asyncio.get_running_loop().time() * 1000)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
