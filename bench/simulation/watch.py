"""What is heard and seen of a simulation: the log of events, and a few figures."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from bench.simulation.weather import Outage
from gateway.core.events import (
    AttemptFinished,
    BreakerChanged,
    Event,
    FellOver,
    TaskFinished,
)
from gateway.ports import Clock
from providers.kit.contract import FailureKind

BACK_LOOK = 20
BACK_ENOUGH = 19
"""Traffic is back when 19 of 20 requests in a row begin at the cheapest again."""


class Log:
    """Hears every event; keeps a digest of them and a few counts."""

    def __init__(self, clock: Clock, watch: Watch) -> None:
        self.hash = hashlib.sha256()
        self.count = 0
        self.attempts = 0
        self.rebuys = 0
        self.saved = 0
        self.bought_twice = 0
        self.write: Callable[[str], object] | None = None
        self._clock = clock
        self._watch = watch
        self._buys: dict[str, int] = {}
        self._unknown: set[str] = set()

    def emit(self, event: Event) -> None:
        """Take an event. The line of it is what must be the same in every run."""
        if isinstance(event, FellOver):
            return  # the attempts tell it too
        now_ms = self._clock.monotonic_ms()
        if isinstance(event, AttemptFinished):
            line = (
                f"{now_ms} attempt {event.task_id} {event.seq} {event.upstream} "
                f"{event.outcome} {event.billed} {event.cost_nanousd}\n"
            )
            self._count_attempt(event)
        elif isinstance(event, TaskFinished):
            line = (
                f"{now_ms} task {event.task_id} {event.state} {event.error_code} "
                f"{event.charged_nanocredits}\n"
            )
            self.saved += event.saved_by_fallback
            self._unknown.discard(event.task_id)
            self.bought_twice += self._buys.pop(event.task_id, 0) > 1
        elif isinstance(event, BreakerChanged):
            line = f"{now_ms} breaker {event.upstream} {event.state} {event.reason}\n"
            self._watch.breaker_changed(event.upstream, event.state, now_ms / 1000)
        else:
            line = f"{now_ms} {event}\n"
        self.count += 1
        self.hash.update(line.encode())
        if self.write is not None:
            self.write(line)

    def bought(self, task_id: str) -> None:
        """Note that an upstream charges for a task."""
        self._buys[task_id] = self._buys.get(task_id, 0) + 1

    def _count_attempt(self, event: AttemptFinished) -> None:
        self.attempts += 1
        self.rebuys += event.task_id in self._unknown
        if event.outcome == FailureKind.TIMEOUT.value:
            self._unknown.add(event.task_id)


@dataclass(slots=True)
class Call:
    """A call as an upstream saw it. ``seq`` counts within its task."""

    upstream: str
    seq: int
    begin_s: float
    end_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Change:
    """A breaker that moved."""

    upstream: str
    state: str
    at_s: float


class Watch:
    """Watches the cheapest upstream: how soon it is left, and how soon it is back."""

    def __init__(self, cheapest: str, *, traced: bool) -> None:
        self.detected_s: list[float] = []
        self.returned_s: list[float] = []
        self.calls: list[Call] = []
        self.states: list[Change] = []
        self._traced = traced
        self._cheapest = cheapest
        self._outage: Outage | None = None
        self._met_s = 0.0
        self._seen = False
        self._recent: deque[tuple[float, bool]] = deque(maxlen=BACK_LOOK)

    def call_begins(
        self, upstream: str, seq: int, now_s: float, outage: Outage | None
    ) -> Call:
        """Note a call, and the trouble that it meets."""
        call = Call(upstream, seq, now_s)
        if self._traced:
            self.calls.append(call)
        is_cheapest = upstream == self._cheapest
        if is_cheapest and outage is not None and outage is not self._outage:
            self._outage, self._met_s, self._seen = outage, now_s, False
            self._recent.clear()
        if seq == 1 and self._outage is not None and now_s >= self._outage.end_s:
            self._after_outage(self._outage, now_s, is_cheapest=is_cheapest)
        return call

    def call_ends(self, call: Call, now_s: float) -> None:
        """Note the end of a call."""
        call.end_s = now_s

    def breaker_changed(self, upstream: str, state: str, now_s: float) -> None:
        """Note that a breaker moved."""
        if self._traced:
            self.states.append(Change(upstream, state, now_s))
        left = state in {"open", "paused"} and upstream == self._cheapest
        if left and self._outage is not None and not self._seen:
            self._seen = True
            self.detected_s.append(now_s - self._met_s)

    def _after_outage(self, outage: Outage, now_s: float, *, is_cheapest: bool) -> None:
        self._recent.append((now_s, is_cheapest))
        full = len(self._recent) == BACK_LOOK
        if full and sum(cheap for _, cheap in self._recent) >= BACK_ENOUGH:
            if self._seen:
                self.returned_s.append(self._recent[0][0] - outage.end_s)
            self._outage = None
