"""Lets sync requests into the room of their variant, or refuses them at once.

Nothing is held, fetched or stored for a request before it was let in. Reads,
settlements, webhooks, health and admin routes are never asked to wait or refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gateway.core import admission, pressure
from gateway.core.admission import Crowd, Reason, Refusal
from gateway.core.catalogue import Catalogue, Offer
from gateway.core.errors import (
    GatewayError,
    RateLimitedError,
    ServiceUnavailableError,
    UpstreamsExhaustedError,
)
from gateway.core.events import PressureChanged, RequestShed
from gateway.core.pressure import Bounds, Pressure
from gateway.core.routing import NO_PREFERENCES, Preferences, Wish, cannot
from gateway.flows.line import Line, Place
from gateway.ports import Chance, Clock, Events, HealthBoard
from providers.kit.contract import Operation

ANY_VARIANT = "any"
"""What is told of a request that was refused before its variant was known."""

_BOUNDS: dict[Reason, Bounds] = {
    Reason.EVENT_LOOP_LAG: pressure.LAG_BOUNDS_MS,
    Reason.MEMORY: pressure.MEMORY_BOUNDS,
}


@dataclass(slots=True)
class Admission:
    """The rooms of all variants in this process.

    ``in_flight`` tells how many sync requests are under way. ``memory_share`` tells
    how much of its memory the process uses, from 0 to 1.
    """

    board: HealthBoard
    line: Line
    catalogue: Catalogue
    clock: Clock
    chance: Chance
    events: Events
    in_flight: Callable[[], int]
    memory_share: Callable[[], float] = lambda: 0.0
    drained: Callable[[], frozenset[str]] = frozenset
    lag_ms: float = 0.0
    _rooms: dict[str, Counter[str]] = field(default_factory=dict)
    _pressures: dict[Reason, Pressure] = field(default_factory=dict)
    _looked_ms: int | None = None

    def waiting(self, variant: str) -> int:
        """Count the requests in a variant's room: those let in without a slot yet."""
        return self._rooms.get(variant, Counter()).total()

    def check_new(self, variant: str, tenant_id: str) -> None:
        """Refuse new work, of either delivery mode, while the process is overloaded.

        Raises:
            ServiceUnavailableError: it is.
        """
        for reason, state in self._pressures.items():
            if state.on:
                raise self._shed(variant, tenant_id, Refusal(reason))

    async def check_any(self, tenant_id: str, operation: Operation) -> None:
        """Refuse what no variant would let in, before its body is read.

        Raises:
            RateLimitedError: the tenant has as many waiting as it may.
            ServiceUnavailableError: as many wait as may, or the process is overloaded.
        """
        self._check_sync(ANY_VARIANT, tenant_id)
        refusal = None
        for variant, offers in self.catalogue.offers.items():
            able = [o for o in offers if operation in o.capabilities.operations]
            if not able:
                continue
            refusal = await self._refusal(tenant_id, variant, operation, able)
            if refusal is None:
                return
        if refusal is not None:
            raise self._shed(ANY_VARIANT, tenant_id, refusal)

    async def enter(
        self,
        tenant_id: str,
        variant: str,
        wish: Wish,
        preferences: Preferences = NO_PREFERENCES,
    ) -> Place:
        """Let a sync request in; its place is given back by ``line.leave``.

        Raises:
            RateLimitedError: the tenant has as many waiting as it may.
            ServiceUnavailableError: as many wait as may, or the process is overloaded.
        """
        self._check_sync(variant, tenant_id)
        able = [
            offer
            for offer in self.catalogue.offers.get(variant, ())
            if cannot(offer.capabilities, wish) is None
            and preferences.leaves_out(offer) is None
        ]
        refusal = await self._refusal(tenant_id, variant, wish.operation, able)
        if refusal is not None:
            raise self._shed(variant, tenant_id, refusal)
        room = self._rooms.setdefault(variant, Counter())
        room[tenant_id] += 1

        def left() -> None:
            room[tenant_id] -= 1
            if not room[tenant_id]:
                del room[tenant_id]

        until_ms = self.clock.monotonic_ms() + admission.WAIT_MAX_MS
        return self.line.place(tenant_id, until_ms=until_ms, left=left)

    async def watch(self) -> None:
        """Look at the process itself; to be called every ``LAG_EVERY_MS``."""
        now_ms = self.clock.monotonic_ms()
        if self._looked_ms is not None:
            late_ms = now_ms - self._looked_ms - pressure.LAG_EVERY_MS
            self.lag_ms = pressure.smoothed(self.lag_ms, late_ms)
        self._looked_ms = now_ms
        self._note(Reason.EVENT_LOOP_LAG, self.lag_ms, now_ms)
        self._note(Reason.MEMORY, self.memory_share(), now_ms)

    def _note(self, reason: Reason, value: float, now_ms: int) -> None:
        before = self._pressures.get(reason, Pressure())
        state = pressure.after(before, value, now_ms, _BOUNDS[reason])
        self._pressures[reason] = state
        if state.on is not before.on:
            self.events.emit(PressureChanged(reason.value, state.on, value))

    def _check_sync(self, variant: str, tenant_id: str) -> None:
        self.check_new(variant, tenant_id)
        if self.in_flight() >= admission.IN_FLIGHT_MAX_REQUESTS:
            raise self._shed(variant, tenant_id, Refusal(Reason.IN_FLIGHT))

    async def _refusal(
        self, tenant_id: str, variant: str, operation: Operation, able: Sequence[Offer]
    ) -> Refusal | None:
        # Slots that the request cannot use are none to it.
        drained = self.drained()
        offers = [offer for offer in able if offer.upstream not in drained]
        upstreams = {offer.upstream for offer in offers}
        healths = await self.board.read([offer.id for offer in offers], operation)
        crowd = Crowd(
            here=self._rooms.get(variant, {}),
            running=self.line.running,
            beside=self._beside(variant, upstreams),
            slots_free=sum(h.slots_free for h in healths.values() if h.callable),
            pace_per_ms=admission.pace_per_ms(healths.values()),
        )
        return admission.refusal(tenant_id, crowd, admission.WAIT_EXPECTED_MAX_MS)

    def _beside(self, variant: str, upstreams: Iterable[str]) -> Counter[str]:
        # Who waits for other variants at the same upstreams.
        beside: Counter[str] = Counter()
        wanted = frozenset(upstreams)
        for other, room in self._rooms.items():
            if not room or other == variant:
                continue
            offers = self.catalogue.offers.get(other, ())
            if any(offer.upstream in wanted for offer in offers):
                beside.update(room)
        return beside

    def _shed(self, variant: str, tenant_id: str, refusal: Refusal) -> GatewayError:
        wait_ms = None if refusal.wait_ms is None else round(refusal.wait_ms)
        reason = refusal.reason
        self.events.emit(RequestShed(variant, reason.value, tenant_id, wait_ms))
        soon_s = admission.retry_after_s(refusal.wait_ms, self.chance.fraction())
        return shed_error(reason, soon_s)


def shed_error(reason: Reason, retry_after_s: int) -> GatewayError:
    """Say that a request may not wait, and when to come back."""
    if reason.by_tenant:
        return RateLimitedError(
            "You have as many requests waiting as you may. You were not charged. Try "
            "again after the time in Retry-After, or send fewer at once: with "
            "'Prefer: respond-async' they are queued as tasks.",
            retry_after_s=retry_after_s,
        )
    if reason.by_process:
        return ServiceUnavailableError(
            "The gateway itself has too much to do. You were not charged. Try again "
            "after the time in Retry-After.",
            code="overloaded",
            retry_after_s=retry_after_s,
        )
    return UpstreamsExhaustedError(
        "More is asked of the gateway than its upstreams can make. You were not "
        "charged. Try again after the time in Retry-After; with "
        "'Prefer: respond-async' a request is queued as a task.",
        code="overloaded",
        retry_after_s=retry_after_s,
    )
