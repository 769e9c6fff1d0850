"""An operator watches the upstreams, takes one out and brings it back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.core.errors import GatewayError, NotFoundError
from gateway.core.events import UpstreamChanged
from gateway.core.requests import ImageRequest
from gateway.flows.dispatch import Purchase
from gateway.flows.upstreams import Upstreams
from providers.kit.contract import Done, FailureKind, ImageJob, ProviderError
from tests.fakes import MemoryDrains, ScriptedProvider, delivered
from tests.flows.test_generate import Counter


class Office:
    """The flow under test over a counter of two upstreams."""

    def __init__(self, cheap: ScriptedProvider | None = None) -> None:
        working = ScriptedProvider(delivered())
        self.counter = Counter(cheap=cheap or working, dear=working)
        self.shop, self.drains = self.counter.shop, MemoryDrains()
        self.upstreams = self.restarted()

    def restarted(self) -> Upstreams:
        upstreams = Upstreams(
            self.counter.catalogue,
            self.drains,
            self.shop.board,
            self.shop.clock,
            self.shop.events,
            lambda: "2026-11-24",
        )
        self.shop.dispatcher.drained = upstreams.drained
        return upstreams

    @property
    def told(self) -> list[tuple[str, str]]:
        seen = self.shop.events.seen
        changes = [e for e in seen if isinstance(e, UpstreamChanged)]
        return [(event.upstream, event.change) for event in changes]


def served(purchase: Purchase) -> list[str]:
    return [lot.offer.upstream for lot in purchase.lots]


async def test_nothing_new_goes_to_a_drained_upstream_until_it_is_enabled() -> None:
    office = Office()

    view = await office.upstreams.drain("cheap")
    drained = await office.shop.buy()
    await office.upstreams.enable("cheap")
    enabled = await office.shop.buy()

    assert view.drained_since_ms is not None
    assert (served(drained), served(enabled)) == (["dear"], ["cheap"])
    assert office.told == [("cheap", "drained"), ("cheap", "enabled")]


async def test_work_by_an_older_configuration_heeds_a_drain_that_is_told_once() -> None:
    office = Office()  # the shop buys by these upstreams
    newer = replace(office.upstreams, catalogue=office.counter.catalogue)

    await newer.drain("cheap")
    office.upstreams.follow(newer)

    assert served(await office.shop.buy()) == ["dear"]
    assert office.told == [("cheap", "drained")]


async def test_what_runs_at_a_drained_upstream_ends_there() -> None:
    begun = asyncio.Event()

    async def slow(job: ImageJob) -> Done:
        begun.set()
        await asyncio.sleep(30)
        return delivered()

    office = Office(ScriptedProvider(slow))
    running = asyncio.ensure_future(office.shop.buy())
    await begun.wait()

    view = await office.upstreams.drain("cheap")

    assert view.account.in_flight == 1
    assert served(await running) == ["cheap"]


async def test_a_restart_and_another_process_find_it_drained() -> None:
    office = Office()
    await office.upstreams.drain("cheap")

    again = office.restarted()
    await again.refresh()

    assert again.drained() == {"cheap"}


async def test_what_another_process_changed_is_noticed_and_told_once() -> None:
    office = Office()
    await office.drains.drain("cheap", now_ms=1)
    await office.drains.drain("gone-from-the-config", now_ms=1)

    await office.upstreams.refresh()
    await office.upstreams.refresh()

    assert office.upstreams.drained() == {"cheap"}
    assert office.told == [("cheap", "drained")]


async def test_a_task_that_can_wait_waits_until_an_upstream_is_enabled() -> None:
    office = Office()
    for name in ("cheap", "dear"):
        await office.upstreams.drain(name)
    order = replace(office.shop.order(), patient=True)
    waiting = asyncio.ensure_future(office.shop.dispatcher.buy(order))
    await asyncio.sleep(60)
    assert not waiting.done()

    await office.upstreams.enable("dear")

    assert served(await waiting) == ["dear"]


async def test_a_reset_brings_an_upstream_back_at_once() -> None:
    failure = ProviderError(FailureKind.AUTH, "refused")
    office = Office(ScriptedProvider(failure, delivered()))
    await office.shop.buy()
    assert served(await office.shop.buy()) == ["dear"]

    await office.upstreams.reset("cheap")

    assert served(await office.shop.buy()) == ["cheap"]
    assert office.told == [("cheap", "reset")]


@pytest.mark.parametrize("change", ["drain", "enable", "reset", "view"])
async def test_an_upstream_that_is_not_there_is_not_changed(change: str) -> None:
    office = Office()

    with pytest.raises(NotFoundError, match="cheap, dear") as caught:
        await getattr(office.upstreams, change)("nobody")

    assert caught.value.code == "upstream_not_found"
    assert office.drains.kept == {}


def anything(request: ImageRequest) -> None:
    return


async def test_an_explanation_is_the_decision_of_this_moment() -> None:
    office = Office()
    await office.upstreams.drain("cheap")
    request = office.counter.request(n=2, routing={"sort": "latency"})

    explained = await office.upstreams.explain(request, anything)

    shown = {c.offer.upstream: c.reason for c in explained.decision.all}
    assert shown == {"dear": "", "cheap": "drained"}
    assert explained.decision.preferences == request.routing
    bought = await office.shop.buy()
    assert served(bought) == [explained.decision.ranked[0].offer.upstream]
    assert explained.refusal is None


async def test_an_explanation_says_what_would_refuse_the_request() -> None:
    office = Office()
    request = office.counter.request(routing={"max_credits": "0.000000001"})
    check = office.counter.generate.check_route

    explained = await office.upstreams.explain(request, check)

    assert isinstance(explained.refusal, GatewayError)
    assert explained.refusal.code == "max_credits_exceeded"
