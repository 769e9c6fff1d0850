"""The health board of one process: breakers and slots, in memory.

With a fleet it is still the one that decides, by its own records; it tells the others
what it saw, takes over where their breakers stand, and counts what they saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.core import breaker, fleet, limits
from gateway.core.breaker import (
    NOBODY,
    BreakerState,
    Effect,
    Flight,
    Health,
    Others,
    Outcome,
    Record,
)
from gateway.core.events import BreakerChanged
from gateway.core.fleet import Hearing, Size, Stance, Telling
from gateway.core.limits import Slots
from gateway.core.ratios import believed
from gateway.ports import (
    AccountView,
    Chance,
    Clock,
    Events,
    Fleet,
    HealthBoard,
    LastFailure,
    Permit,
    RouteView,
)
from providers.kit.contract import Operation

ASK_AGAIN_MS = 1_000
"""So long a probe that another process has is not asked for again."""


class Alone:
    """Implements ``Fleet`` for a process that has no others."""

    def stir(self) -> None:
        """Have nobody to tell."""

    async def may_probe(self, breaker: str) -> bool:
        """Take the probe."""
        del breaker
        return True

    async def may_force(self, breaker: str) -> bool:
        """Take the try."""
        del breaker
        return True


@dataclass(slots=True)
class _Credential:
    """What one upstream account may carry, and whether it is trusted at all.

    ``elsewhere_until_ms``: another process has its probe, as far as is known.
    """

    slots: Slots
    in_flight: int = 0
    probes: int = 0
    elsewhere_until_ms: int = 0
    record: Record = field(default_factory=Record)
    reset_at_ms: int = 0
    """Refusals of calls that began before count no more."""


@dataclass(slots=True)
class _Route:
    """One offer and operation. ``flights`` are in the order of their start.

    ``good`` and ``bad`` count calls since the last telling; ``proof_ms`` is when the
    last good one of them began.
    """

    name: str
    offer_id: str
    operation: Operation
    credential: _Credential
    record: Record = field(default_factory=Record)
    flights: dict[int, Flight] = field(default_factory=dict)
    probes: int = 0
    elsewhere_until_ms: int = 0
    others: Others = NOBODY
    good: int = 0
    bad: int = 0
    proof_ms: int | None = None
    shown: BreakerState = BreakerState.CLOSED


@dataclass(slots=True)
class _News:
    """What is to be told; ``pauses`` says whether it was ended by hand."""

    breakers: set[str] = field(default_factory=set)
    by_hand: set[str] = field(default_factory=set)
    pauses: dict[str, bool] = field(default_factory=dict)
    probed: set[str] = field(default_factory=set)


@dataclass(slots=True)
class MemoryBoard:
    """Implements ``HealthBoard``, ``Watch`` and ``Member``.

    ``slots`` gives each upstream's calls at once, for the whole fleet.
    """

    clock: Clock
    chance: Chance
    events: Events
    slots: Mapping[str, int]
    fleet: Fleet = field(default_factory=Alone)
    _size: Size = field(default_factory=Size)
    _news: _News = field(default_factory=_News)
    _probing: dict[int, str] = field(default_factory=dict)
    _routes: dict[tuple[str, Operation], _Route] = field(default_factory=dict)
    _credentials: dict[str, _Credential] = field(default_factory=dict)
    _next_id: int = 0
    _last_failures: dict[tuple[str, Operation], LastFailure] = field(
        default_factory=dict
    )

    async def read(
        self, offer_ids: Iterable[str], operation: Operation
    ) -> Mapping[str, Health]:
        """Tell the health of each offer."""
        now_ms = self.clock.monotonic_ms()
        return {i: self._health(self._route(i, operation), now_ms) for i in offer_ids}

    async def admit(
        self, offer_id: str, operation: Operation, *, forced: bool = False
    ) -> Permit | None:
        """Take a slot, and the probe where the breaker is half open."""
        now_ms = self.clock.monotonic_ms()
        route = self._route(offer_id, operation)
        health = self._health(route, now_ms)
        if forced:
            if not self._may_force(route, health, now_ms):
                return None
            route.record = replace(route.record, forced_at_ms=now_ms)
        elif not health.callable or health.slots_free < 1:
            return None
        probe = health.state is not BreakerState.CLOSED
        self._next_id += 1
        permit = Permit(self._next_id, offer_id, operation, probe)
        route.flights[permit.id] = Flight(now_ms, probe)
        route.probes += probe
        route.credential.probes += probe
        route.credential.in_flight += 1
        if probe and not await self._has_probe(route, permit, forced=forced):
            return None
        return permit

    async def report(self, permit: Permit, outcome: Outcome) -> None:
        """Give the slot back, and note how the call went."""
        if outcome.kind is not None and not outcome.cancelled:
            self._last_failures[permit.offer_id, permit.operation] = LastFailure(
                outcome.kind, self.clock.now_ms()
            )
        route = self._route(permit.offer_id, permit.operation)
        credential = route.credential
        flight = self._landed(route, permit)
        now_ms = self.clock.monotonic_ms()
        refused = outcome.effect is Effect.OPEN_CREDENTIAL
        is_news = flight.started_ms >= credential.reset_at_ms
        trusted, before = credential.record, route.record
        if refused and is_news and outcome.kind is not None:
            credential.record = breaker.credential_opened(
                credential.record, outcome.kind, now_ms
            )
        if outcome.effect is Effect.GOOD:
            credential.record = breaker.credential_after_good(credential.record, flight)
        effect = breaker.effect_of(route.record, flight, outcome, now_ms)
        credential.slots = limits.slots_after(
            credential.slots, flight, effect, now_ms, given_up=outcome.given_up
        )
        route.record = breaker.after_call(
            route.record, flight, outcome, now_ms, self.chance.fraction()
        )
        _count(route, flight, effect)
        if credential.record is not trusted and fleet.moved(trusted, credential.record):
            self._to_tell(permit.offer_id.partition("/")[0])
        if before.paused_until_ms != route.record.paused_until_ms:
            self._news.pauses.setdefault(route.name, False)
            self.fleet.stir()
        if fleet.moved(before, route.record):
            self._to_tell(route.name, route)
        self._health(route, now_ms)

    async def look(
        self, upstream: str, offers: Iterable[tuple[str, Operation]]
    ) -> AccountView:
        """Tell how an upstream and its offers are doing."""
        routes = [await self._looked_at(*offer) for offer in offers]
        credential, now_ms = self._credential(upstream), self.clock.monotonic_ms()
        state = breaker.state_of(credential.record, now_ms)
        return AccountView(
            state=state,
            reason=credential.record.reason,
            probe_in_ms=_probe_in_ms(state, credential.record.open_until_ms, now_ms),
            in_flight=credential.in_flight,
            slots=int(credential.slots.now),
            slots_max=credential.slots.most,
            routes=tuple(routes),
        )

    async def reset(self, upstream: str) -> None:
        """Close the breakers of an upstream, and end its pauses."""
        now_ms = self.clock.monotonic_ms()
        credential = self._credential(upstream)
        credential.record, credential.reset_at_ms = Record(), now_ms
        self._news.by_hand.add(upstream)
        self._to_tell(upstream)
        for route in self._routes_of(upstream):
            route.record = breaker.closed_by_hand(route.record, now_ms)
            self._news.pauses[route.name] = True
            self._news.by_hand.add(route.name)
            self._to_tell(route.name, route)  # it may be open elsewhere
            self._health(route, now_ms)  # tells of the change

    def refit(self, slots: Mapping[str, int]) -> None:
        """Take over what upstreams may carry by another configuration.

        Those that it does not name keep what they had, for calls under way.
        """
        self.slots = {**self.slots, **slots}
        for upstream, credential in self._credentials.items():
            most = self.share(self.slots[upstream])
            credential.slots = limits.resized(credential.slots, most)

    def tell(self) -> Telling:
        """Tell what is new since the last time."""
        now_ms = self.clock.monotonic_ms()
        news, self._news = self._news, _News()
        probing = frozenset(self._probing.values())
        return Telling(
            stances={
                n: fleet.stance_of(self._record(n), now_ms) for n in news.breakers
            },
            by_hand=frozenset(news.by_hand),
            pauses=self._pauses(news.pauses, now_ms),
            counts=self._counts(),
            streaks=self._streaks(now_ms),
            proofs=self._proofs(now_ms),
            probing=probing,
            probed=frozenset(news.probed) - probing,
        )

    def keep(self, telling: Telling) -> None:
        """Take back what could not be told: it is told again. Its counts are lost."""
        self._news.breakers |= telling.stances.keys()
        self._news.by_hand |= telling.by_hand
        self._news.probed |= telling.probed
        for name, pause_ms in telling.pauses.items():
            self._news.pauses.setdefault(name, pause_ms == 0)

    def hear(self, hearing: Hearing) -> None:
        """Take over what the others told."""
        now_ms = self.clock.monotonic_ms()
        if hearing.size != self._size:
            self._size = hearing.size
            for upstream, credential in self._credentials.items():
                most = self.share(self.slots[upstream])
                credential.slots = limits.resized(credential.slots, most)
        for name, stance in hearing.stances.items():
            if (kept := self._named(name)) is not None:
                _adopt(kept, stance, now_ms)
        for name, pause_ms in hearing.pauses.items():
            if (kept := self._named(name)) is not None:
                kept.record = fleet.rested(kept.record, pause_ms, now_ms)
        for route in self._routes.values():
            route.others = hearing.others.get(route.name, NOBODY)
            self._health(route, now_ms)  # tells of the change

    def share(self, most: int) -> int:
        """Tell this process's part of what the whole fleet may have of something."""
        return limits.share_of(most, self._size.processes, self._size.rank)

    @property
    def processes(self) -> int:
        """How many processes share the slots."""
        return self._size.processes

    async def _has_probe(self, route: _Route, permit: Permit, *, forced: bool) -> bool:
        # The call counts already while the others are asked: nobody here asks twice.
        credential, now_ms = route.credential, self.clock.monotonic_ms()
        account = breaker.state_of(credential.record, now_ms)
        whole = account is not BreakerState.CLOSED
        name = permit.offer_id.partition("/")[0] if whole else route.name
        self._probing[permit.id] = name
        granted = False
        try:
            may = self.fleet.may_force if forced else self.fleet.may_probe
            granted = await may(name)
        finally:
            if not granted:
                self._landed(route, permit)
                asked = credential if whole else route
                asked.elsewhere_until_ms = now_ms + ASK_AGAIN_MS
        return granted

    def _landed(self, route: _Route, permit: Permit) -> Flight:
        flight = route.flights.pop(permit.id)
        route.probes -= permit.probe
        route.credential.probes -= permit.probe
        route.credential.in_flight -= 1
        if permit.probe:
            self._news.probed.add(self._probing.pop(permit.id))
            self.fleet.stir()
        return flight

    def _to_tell(self, name: str, route: _Route | None = None) -> None:
        self._news.breakers.add(name)
        if route is not None:
            route.others = NOBODY  # what they saw was before this
        self.fleet.stir()

    def _pauses(self, by_hand: Mapping[str, bool], now_ms: int) -> dict[str, int]:
        rests = {n: self._record(n).paused_until_ms - now_ms for n in by_hand}
        return {n: max(0, ms) for n, ms in rests.items() if ms > 0 or by_hand[n]}

    def _counts(self) -> dict[str, tuple[int, int]]:
        counts = {
            route.name: (route.good, route.bad)
            for route in self._routes.values()
            if route.good or route.bad
        }
        for route in self._routes.values():
            route.good = route.bad = 0
        return counts

    def _proofs(self, now_ms: int) -> dict[str, int]:
        proofs = {}
        for route in self._routes.values():
            if route.proof_ms is not None:
                proofs[route.name] = now_ms - route.proof_ms
                route.proof_ms = None
        return proofs

    def _streaks(self, now_ms: int) -> dict[str, tuple[int, int]]:
        streaks = {}
        for route in self._routes.values():
            record, flights = route.record, route.flights.values()
            if record.open_until_ms is not None or not (flights or record.bad_streak):
                continue
            streak = breaker.proven_streak(record, flights, now_ms)
            if streak:
                first = next(iter(flights), None)
                hung_ms = now_ms if first is None else first.started_ms
                since_ms = record.bad_since_ms if record.bad_streak else hung_ms
                streaks[route.name] = (streak, now_ms - since_ms)
        return streaks

    def _record(self, name: str) -> Record:
        kept = self._named(name)
        assert kept is not None, name
        return kept.record

    def _named(self, name: str) -> _Credential | _Route | None:
        # None for what only the others' config has.
        found = fleet.route_named(name)
        offer_id = found[0] if found else name
        if offer_id.partition("/")[0] not in self.slots:
            return None
        return self._route(*found) if found else self._credential(name)

    def _routes_of(self, upstream: str) -> list[_Route]:
        start = f"{upstream}/"
        return [r for r in self._routes.values() if r.offer_id.startswith(start)]

    async def _looked_at(self, offer_id: str, operation: Operation) -> RouteView:
        health = (await self.read([offer_id], operation))[offer_id]
        route, now_ms = self._route(offer_id, operation), self.clock.monotonic_ms()
        flights, record = route.flights.values(), route.record
        rest_ms = record.paused_until_ms - now_ms
        started_ms = min((flight.started_ms for flight in flights), default=None)
        return RouteView(
            offer_id=offer_id,
            operation=operation,
            health=health,
            window=breaker.window_of(record, flights, now_ms),
            bad_streak=record.bad_streak,
            in_flight=len(flights),
            oldest_ms=None if started_ms is None else now_ms - started_ms,
            probe_in_ms=_probe_in_ms(health.state, health.retry_at_ms, now_ms),
            pause_ends_in_ms=rest_ms if rest_ms > 0 else None,
            last_failure=self._last_failures.get((offer_id, operation)),
        )

    def _may_force(self, route: _Route, health: Health, now_ms: int) -> bool:
        last_ms = route.record.forced_at_ms
        rested = last_ms is None or now_ms - last_ms >= breaker.FORCED_EVERY_MS
        free = health.slots_free > 0
        alone = not route.probes
        return health.state is BreakerState.OPEN and rested and free and alone

    def _health(self, route: _Route, now_ms: int) -> Health:
        credential = route.credential
        record = self._kept_honest(route, now_ms)
        state, shown = breaker.state_of(record, now_ms), record
        account = breaker.state_of(credential.record, now_ms)
        if account is BreakerState.OPEN or (
            account is BreakerState.HALF_OPEN and state is BreakerState.CLOSED
        ):
            state, shown = account, credential.record
        probing = route.probes > 0 or now_ms < route.elsewhere_until_ms
        if account is BreakerState.HALF_OPEN and not probing:
            probing = credential.probes > 0 or now_ms < credential.elsewhere_until_ms
        if state is BreakerState.HALF_OPEN and probing:
            state = BreakerState.OPEN
            shown = replace(shown, reason="a probe is under way")
        if state is not route.shown:
            route.shown = state
            self._tell(route, state, shown.reason)
        return Health(
            state=state,
            reason=shown.reason,
            retry_at_ms=_retry_at_ms(state, shown),
            slots_free=_slots_free(route, now_ms, self._size.processes),
            in_flight=credential.in_flight,
            usual_ms=record.usual_ms,
            usual_is_old=now_ms - record.usual_at_ms > breaker.USUAL_FRESH_MS,
            cost_ratios=believed(record.ratios, now_ms),
            doubtful=record.bad_streak > 0 or state is BreakerState.HALF_OPEN,
        )

    def _kept_honest(self, route: _Route, now_ms: int) -> Record:
        # A call that hangs tells nothing by itself: it is looked at whenever somebody
        # asks, so that a black hole is seen before its calls come back.
        record = route.record
        if record.open_until_ms is None:
            flights = route.flights.values()
            why = breaker.trouble(record, flights, now_ms, route.others)
            if why is not None:
                record = breaker.opened(record, why, now_ms, self.chance.fraction())
                route.record = record
                self._to_tell(route.name, route)
        return record

    def _tell(self, route: _Route, state: BreakerState, reason: str) -> None:
        upstream, operation = route.offer_id.partition("/")[0], route.operation.value
        self.events.emit(
            BreakerChanged(route.offer_id, upstream, operation, state.value, reason)
        )

    def _route(self, offer_id: str, operation: Operation) -> _Route:
        found = self._routes.get((offer_id, operation))
        if found is None:
            credential = self._credential(offer_id.partition("/")[0])
            name = fleet.route_name(offer_id, operation)
            found = _Route(name, offer_id, operation, credential)
            self._routes[offer_id, operation] = found
        return found

    def _credential(self, upstream: str) -> _Credential:
        found = self._credentials.get(upstream)
        if found is None:
            slots = self.share(self.slots[upstream])
            found = self._credentials[upstream] = _Credential(Slots(slots, slots))
        return found


@dataclass(frozen=True, slots=True)
class Bygone:
    """The board, for calls of accounts that others have taken the places of.

    They take slots like any others; how they go says nothing of who has the name now.
    """

    board: HealthBoard
    upstreams: frozenset[str]

    async def read(
        self, offer_ids: Iterable[str], operation: Operation
    ) -> Mapping[str, Health]:
        """See ``HealthBoard``."""
        return await self.board.read(offer_ids, operation)

    async def admit(
        self, offer_id: str, operation: Operation, *, forced: bool = False
    ) -> Permit | None:
        """See ``HealthBoard``."""
        return await self.board.admit(offer_id, operation, forced=forced)

    async def report(self, permit: Permit, outcome: Outcome) -> None:
        """Give the slot back; note nothing of a call of an account that is gone."""
        if permit.offer_id.partition("/")[0] in self.upstreams:
            outcome = Outcome(cancelled=True)
        await self.board.report(permit, outcome)


def _adopt(kept: _Credential | _Route, stance: Stance, now_ms: int) -> None:
    kept.record = fleet.adopted(kept.record, stance, now_ms)
    kept.elsewhere_until_ms = 0
    if isinstance(kept, _Credential) and stance.open_ms is None:
        kept.reset_at_ms = now_ms


def _count(route: _Route, flight: Flight, effect: Effect) -> None:
    if effect is Effect.GOOD:
        route.good += 1
        if route.record.last_good_started_ms >= flight.started_ms:
            route.proof_ms = max(route.proof_ms or 0, flight.started_ms)
    elif effect is Effect.BAD or effect is Effect.SOFT:
        route.bad += 1


def _slots_free(route: _Route, now_ms: int, processes: int) -> int:
    free = int(route.credential.slots.now) - route.credential.in_flight
    room = breaker.reentry_room(route.record, route.flights.values(), now_ms, processes)
    return max(0, free if room is None else min(free, room))


def _probe_in_ms(
    state: BreakerState, open_until_ms: int | None, now_ms: int
) -> int | None:
    if state in {BreakerState.CLOSED, BreakerState.PAUSED}:
        return None
    return max(0, (open_until_ms or now_ms) - now_ms)


def _retry_at_ms(state: BreakerState, record: Record) -> int | None:
    if state is BreakerState.OPEN:
        return record.open_until_ms
    return record.paused_until_ms if state is BreakerState.PAUSED else None
