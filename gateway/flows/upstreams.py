"""What an operator sees of the upstreams, and does to them while they run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.core import pricing, routing
from gateway.core.breaker import BreakerState
from gateway.core.catalogue import Catalogue, Offer
from gateway.core.errors import GatewayError, upstream_not_found
from gateway.core.events import UpstreamChanged
from gateway.core.requests import ImageRequest
from gateway.core.routing import Decision, Moment
from gateway.flows.calls import ANSWER_RESERVE_MS
from gateway.flows.generate import SYNC_DEADLINE_MS, wish_of
from gateway.ports import AccountView, Clock, Drains, Events, RouteView, Watch
from providers.kit.contract import Operation


@dataclass(frozen=True, slots=True)
class UpstreamView:
    """An upstream at this moment. ``drained_since_ms`` counts from the epoch."""

    name: str
    failure_domains: tuple[str, ...]
    drained_since_ms: int | None
    account: AccountView

    @property
    def up(self) -> bool:
        """Whether calls may go there as far as its circuits say."""
        states = [route.health.state for route in self.account.routes]
        return self.account.state is not BreakerState.OPEN and any(
            state is not BreakerState.OPEN for state in states
        )


@dataclass(frozen=True, slots=True)
class Explained:
    """Where a request would go now, and why; ``refusal`` is why it would not at all.

    ``estimates_nanousd`` and ``routes`` are by offer id; an estimate is what the card
    says, before what was learned.
    """

    request: ImageRequest
    decision: Decision
    estimates_nanousd: Mapping[str, int | None]
    routes: Mapping[str, RouteView]
    refusal: GatewayError | None


@dataclass(slots=True)
class Upstreams:
    """Watches the upstreams, and takes them out of service and back.

    ``drained`` is what was read of the store last: ``refresh`` reads it again.
    """

    catalogue: Catalogue
    drains: Drains
    watch: Watch
    clock: Clock
    events: Events
    today: Callable[[], str]
    _since_ms: Mapping[str, int] = field(default_factory=dict)
    _drained: frozenset[str] = frozenset()
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    def drained(self) -> frozenset[str]:
        """Name the upstreams to which nothing new may go."""
        return self._drained

    async def refresh(self) -> None:
        """Read which are drained: other processes may have changed it."""
        async with self._one_at_a_time:
            await self._read()

    def follow(self, other: Upstreams) -> None:
        """Take over what another has read, for work that goes on by an older config."""
        self._since_ms, self._drained = other._since_ms, other._drained

    async def drain(self, name: str) -> UpstreamView:
        """Let nothing new go to an upstream; what runs there ends by itself.

        Raises:
            NotFoundError: there is no such upstream.
        """
        self._check(name)
        async with self._one_at_a_time:
            await self.drains.drain(name, now_ms=self.clock.now_ms())
            await self._read()
        return await self.view(name)

    async def enable(self, name: str) -> UpstreamView:
        """Let new calls go to an upstream again.

        Raises:
            NotFoundError: there is no such upstream.
        """
        self._check(name)
        async with self._one_at_a_time:
            await self.drains.enable(name)
            await self._read()
        return await self.view(name)

    async def reset(self, name: str) -> UpstreamView:
        """Close the breakers of an upstream and end its pauses.

        Raises:
            NotFoundError: there is no such upstream.
        """
        self._check(name)
        await self.watch.reset(name)
        self.events.emit(UpstreamChanged(name, "reset"))
        return await self.view(name)

    async def view(self, name: str) -> UpstreamView:
        """Look at one upstream and all its offers.

        Raises:
            NotFoundError: there is no such upstream.
        """
        offers = self._offers()[self._check(name)]
        routes = [
            (offer.id, operation)
            for offer in offers
            for operation in Operation
            if operation in offer.capabilities.operations
        ]
        return UpstreamView(
            name=name,
            failure_domains=tuple(sorted({o.failure_domain or name for o in offers})),
            drained_since_ms=self._since_ms.get(name),
            account=await self.watch.look(name, routes),
        )

    async def views(self) -> list[UpstreamView]:
        """Look at every upstream."""
        return [await self.view(name) for name in self._offers()]

    async def explain(
        self, request: ImageRequest, check: Callable[[ImageRequest], None]
    ) -> Explained:
        """Decide as for a request of this moment, without buying anything.

        ``check`` raises what refuses a request before it is routed.
        """
        offers = self.catalogue.offers.get(request.variant.name, ())
        routes: dict[str, RouteView] = {}
        for offer in offers:
            asked = [(offer.id, request.operation)]
            looked = await self.watch.look(offer.upstream, asked)
            routes[offer.id] = looked.routes[0]
        cost_nanousd = pricing.cost_rule(request)
        priced = [(offer, cost_nanousd(offer, request.n)) for offer in offers]
        left_ms = SYNC_DEADLINE_MS - ANSWER_RESERVE_MS
        refusal = None
        try:
            check(request)
        except GatewayError as error:
            refusal = error
        return Explained(
            request=request,
            decision=routing.decide(
                wish_of(request),
                priced,
                {offer_id: view.health for offer_id, view in routes.items()},
                Moment(self.today(), left_ms, self._drained),
                preferences=request.routing,
            ),
            estimates_nanousd={offer.id: cost for offer, cost in priced},
            routes=routes,
            refusal=refusal,
        )

    async def _read(self) -> None:
        known = self._offers()
        found = await self.drains.drained()
        self._since_ms = {name: at for name, at in found.items() if name in known}
        before, self._drained = self._drained, frozenset(self._since_ms)
        for name in sorted(self._drained ^ before):
            change = "drained" if name in self._drained else "enabled"
            self.events.emit(UpstreamChanged(name, change))

    def _offers(self) -> dict[str, list[Offer]]:
        found: dict[str, list[Offer]] = {}
        for offers in self.catalogue.offers.values():
            for offer in offers:
                found.setdefault(offer.upstream, []).append(offer)
        return found

    def _check(self, name: str) -> str:
        known = self._offers()
        if name not in known:
            raise upstream_not_found(name, known)
        return name
