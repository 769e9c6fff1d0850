"""Keeps account of what was up, and reads it for the status page.

Counts are kept in the process and added to the books now and then: what a process that
is killed had counted since is lost, and no request waits for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.core import uptime
from gateway.core.errors import OutcomeUnknownError
from gateway.core.events import AttemptFinished, Event, RequestFinished, TaskFinished
from gateway.core.uptime import Count, Incident, Kind, Slot, Subject, Uptime
from gateway.ports import Clock, UptimeBook

ADD_EVERY_S = 15.0
WAITING_MAX_SLOTS = 10_000
"""So many slots are kept while the database is away; then the oldest go."""
READ_EVERY_MS = 10_000
"""The page is public: however often it is asked for, the books are read so often."""
INCIDENTS_MAX_SLOTS = 5_000


@dataclass(slots=True)
class KeepUptime:
    """Listens to what ends, and adds it to the books."""

    book: UptimeBook
    clock: Clock
    _served: Counter[tuple[Subject, int]] = field(default_factory=Counter)
    _failed: Counter[tuple[Subject, int]] = field(default_factory=Counter)
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    def on_event(self, event: Event) -> None:
        """Count one event."""
        match event:
            case TaskFinished():
                self._count(
                    (Kind.MODEL, event.variant), uptime.of_request(event.outcome)
                )
            case AttemptFinished():
                self._count(
                    (Kind.UPSTREAM, event.upstream), uptime.of_attempt(event.outcome)
                )
            case RequestFinished(asked=asked, outcome=outcome):
                if asked is not None and asked.variant is not None and outcome:
                    subject = Kind.MODEL, asked.variant
                    self._count(subject, uptime.of_request(outcome))
            case _:
                pass

    async def add(self) -> None:
        """Add to the books what was counted; it stays where that fails.

        What may be in the books all the same is not added again. Who is cancelled
        meanwhile does not stop it: the next call waits for its end.
        """
        await asyncio.shield(asyncio.ensure_future(self._add()))

    async def _add(self) -> None:
        async with self._one_at_a_time:
            await self._add_counted()

    async def _add_counted(self) -> None:
        served, self._served = self._served, Counter()
        failed, self._failed = self._failed, Counter()
        if not served and not failed:
            return
        slots = [
            Slot(subject, since_ms, Count(served[subject, since_ms], failed[key]))
            for key in served.keys() | failed.keys()
            for subject, since_ms in [key]
        ]
        try:
            await self.book.add(slots)
        except OutcomeUnknownError:
            raise  # a few that are lost say less that is wrong than some told twice
        except BaseException:
            self._served.update(served)
            self._failed.update(failed)
            raise

    def _count(self, subject: Subject, count: Count | None) -> None:
        if count is None:
            return
        key = subject, uptime.slot_of(self.clock.now_ms())
        counts = self._served if count.served else self._failed
        counts[key] += 1
        if len(counts) > WAITING_MAX_SLOTS:
            del counts[min(counts, key=lambda each: each[1])]


@dataclass(frozen=True, slots=True)
class Report:
    """How everything is and was. ``incidents`` are of 90 days, the latest first."""

    at_ms: int
    models: tuple[Uptime, ...]
    upstreams: tuple[Uptime, ...]
    incidents: tuple[Incident, ...]


@dataclass(slots=True)
class ReadUptime:
    """Reads the report; what it names are the subjects there are now.

    ``upstreams`` names none where tenants may not know of them.
    """

    book: UptimeBook
    clock: Clock
    models: Sequence[str]
    upstreams: Sequence[str]
    _last: Report | None = None
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __call__(self) -> Report:
        """Return how things are; up to ten seconds old."""
        async with self._one_at_a_time:
            now_ms = self.clock.now_ms()
            if self._last is None or not (
                0 <= now_ms - self._last.at_ms < READ_EVERY_MS
            ):
                self._last = await self._read(now_ms)
            return self._last

    async def _read(self, now_ms: int) -> Report:
        week_ms = now_ms - uptime.WINDOWS_MS["7d"] - uptime.SLOT_MS
        oldest_ms = uptime.day_of(now_ms) - uptime.KEPT_DAYS * uptime.DAY_MS
        slots = await self.book.slots(week_ms)
        days = await self.book.days(oldest_ms)
        troubled = await self.book.troubled(oldest_ms, INCIDENTS_MAX_SLOTS)

        def of(subject: Subject) -> Uptime:
            return uptime.uptime_of(
                subject,
                [slot for slot in slots if slot.subject == subject],
                [day for day in days if day.subject == subject],
                now_ms,
            )

        models = [(Kind.MODEL, name) for name in self.models]
        upstreams = [(Kind.UPSTREAM, name) for name in self.upstreams]
        shown = {*models, *upstreams}
        return Report(
            at_ms=now_ms,
            models=tuple(map(of, models)),
            upstreams=tuple(map(of, upstreams)),
            incidents=tuple(
                incident
                for incident in uptime.incidents_of(troubled, now_ms)
                if incident.subject in shown
            ),
        )
