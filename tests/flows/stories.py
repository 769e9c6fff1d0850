"""What stories about buying have in common: a shop of scripted upstreams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.adapters.hot_memory import MemoryBoard
from gateway.core.catalogue import Offer, PerImage
from gateway.core.routing import Wish
from gateway.flows.calls import Order
from gateway.flows.dispatch import Dispatcher, Purchase
from providers.kit.contract import Capabilities, ImageJob, Operation, Usage
from tests.fakes import FakeChance, FakeEvents, MemoryStore, ScriptedProvider
from tests.virtual_time import LoopClock

CENT = 10_000_000
DEADLINE_MS = 300_000


def an_offer(upstream: str, cents: int, capabilities: Capabilities) -> Offer:
    return Offer(
        upstream=upstream,
        variant="gpt-image-2",
        model=f"model-at-{upstream}",
        cost=PerImage(flat=cents * CENT),
        capabilities=capabilities,
    )


def a_wish(n: int = 1) -> Wish:
    return Wish(Operation.GENERATE, (1024, 1024), "low", n)


def a_job(n: int = 1) -> ImageJob:
    return ImageJob(
        task_id="task-unified-1-abcdefgh",
        model="",
        operation=Operation.GENERATE,
        prompt="a sunset",
        width_px=1024,
        height_px=1024,
        quality="low",
        n=n,
        output_format="png",
        expected=Usage(image_output=196),
        deadline_s=0.0,
    )


@dataclass
class Shop:
    """Scripted upstreams behind the real dispatcher and the real board.

    The first upstream costs 1 cent a picture, the second 2, and so on.
    """

    upstreams: Mapping[str, ScriptedProvider]
    slots: int = 64
    store: MemoryStore = field(default_factory=MemoryStore)
    events: FakeEvents = field(default_factory=FakeEvents)
    clock: LoopClock = field(default_factory=LoopClock)
    crashes: list[tuple[BaseException, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board = MemoryBoard(
            self.clock,
            FakeChance(),
            self.events,
            slots=dict.fromkeys(self.upstreams, self.slots),
        )
        self.dispatcher = Dispatcher(
            self.upstreams,
            self.board,
            self.store,
            self.clock,
            self.events,
            lambda error, where: self.crashes.append((error, where)),
        )
        self.offers = tuple(
            an_offer(name, cents, provider.capabilities(""))
            for cents, (name, provider) in enumerate(self.upstreams.items(), 1)
        )

    async def buy(self, n: int = 1) -> Purchase:
        return await self.dispatcher.buy(self.order(n))

    def order(self, n: int = 1) -> Order:
        return Order(
            job=a_job(n),
            wish=a_wish(n),
            variant="gpt-image-2",
            offers=self.offers,
            cost_nanousd=_flat,
            deadline_ms=self.clock.monotonic_ms() + DEADLINE_MS,
            today="2026-11-24",
        )


def _flat(offer: Offer, n: int) -> int:
    assert isinstance(offer.cost, PerImage)
    assert offer.cost.flat is not None
    return offer.cost.flat * n
