"""The health board of one process: breakers and slots, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from gateway.core import breaker, limits
from gateway.core.breaker import BreakerState, Effect, Flight, Health, Outcome, Record
from gateway.core.events import BreakerChanged
from gateway.core.limits import Slots
from gateway.core.ratios import believed
from gateway.ports import (
    AccountView,
    Chance,
    Clock,
    Events,
    LastFailure,
    Permit,
    RouteView,
)
from providers.kit.contract import Operation


@dataclass(slots=True)
class _Credential:
    """What one upstream account may carry, and whether it is trusted at all."""

    slots: Slots
    in_flight: int = 0
    probes: int = 0
    record: Record = field(default_factory=Record)
    reset_at_ms: int = 0
    """Refusals of calls that began before count no more."""


@dataclass(slots=True)
class _Route:
    """One offer and operation. ``flights`` are in the order of their start."""

    offer_id: str
    credential: _Credential
    record: Record = field(default_factory=Record)
    flights: dict[int, Flight] = field(default_factory=dict)
    probes: int = 0
    shown: BreakerState = BreakerState.CLOSED


@dataclass(slots=True)
class MemoryBoard:
    """Implements ``HealthBoard`` and ``Watch``.

    ``slots`` gives each upstream's calls at once.
    """

    clock: Clock
    chance: Chance
    events: Events
    slots: Mapping[str, int]
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
        route.flights[self._next_id] = Flight(now_ms, probe)
        route.probes += probe
        route.credential.probes += probe
        route.credential.in_flight += 1
        return Permit(self._next_id, offer_id, operation, probe)

    async def report(self, permit: Permit, outcome: Outcome) -> None:
        """Give the slot back, and note how the call went."""
        if outcome.kind is not None and not outcome.cancelled:
            self._last_failures[permit.offer_id, permit.operation] = LastFailure(
                outcome.kind, self.clock.now_ms()
            )
        route = self._route(permit.offer_id, permit.operation)
        credential = route.credential
        flight = route.flights.pop(permit.id)
        route.probes -= permit.probe
        credential.probes -= permit.probe
        credential.in_flight -= 1
        now_ms = self.clock.monotonic_ms()
        refused = outcome.effect is Effect.OPEN_CREDENTIAL
        is_news = flight.started_ms >= credential.reset_at_ms
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
        routes = [r for r in self._routes.items() if r[0][0].startswith(f"{upstream}/")]
        for (offer_id, operation), route in routes:
            route.record = breaker.closed_by_hand(route.record, now_ms)
            await self.read([offer_id], operation)  # tells of the change

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
        probing = route.probes > 0
        if account is BreakerState.HALF_OPEN:
            probing = probing or credential.probes > 0
        if state is BreakerState.HALF_OPEN and probing:
            state = BreakerState.OPEN
            shown = replace(shown, reason="a probe is under way")
        if state is not route.shown:
            route.shown = state
            self._tell(route.offer_id, state, shown.reason)
        return Health(
            state=state,
            reason=shown.reason,
            retry_at_ms=_retry_at_ms(state, shown),
            slots_free=_slots_free(route, now_ms),
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
            why = breaker.trouble(record, route.flights.values(), now_ms)
            if why is not None:
                record = breaker.opened(record, why, now_ms, self.chance.fraction())
                route.record = record
        return record

    def _tell(self, offer_id: str, state: BreakerState, reason: str) -> None:
        upstream = offer_id.partition("/")[0]
        self.events.emit(BreakerChanged(offer_id, upstream, state.value, reason))

    def _route(self, offer_id: str, operation: Operation) -> _Route:
        found = self._routes.get((offer_id, operation))
        if found is None:
            credential = self._credential(offer_id.partition("/")[0])
            found = _Route(offer_id, credential)
            self._routes[offer_id, operation] = found
        return found

    def _credential(self, upstream: str) -> _Credential:
        found = self._credentials.get(upstream)
        if found is None:
            slots = self.slots[upstream]
            found = self._credentials[upstream] = _Credential(Slots(slots, slots))
        return found


def _slots_free(route: _Route, now_ms: int) -> int:
    free = int(route.credential.slots.now) - route.credential.in_flight
    room = breaker.reentry_room(route.record, route.flights.values(), now_ms)
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
