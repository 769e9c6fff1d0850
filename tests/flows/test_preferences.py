"""Requests that say where they want to go, told as stories."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.core.breaker import BreakerState
from gateway.core.errors import InvalidRequestError, ServiceUnavailableError
from gateway.core.pricing import hold_nanocredits
from gateway.core.routing import Preferences
from gateway.flows.dispatch import Purchase
from providers.kit.contract import (
    Done,
    FailureKind,
    ImageJob,
    Operation,
    ProviderError,
)
from tests.fakes import ScriptedProvider, delivered
from tests.flows.stories import Shop
from tests.flows.test_generate import KEY, RICH, Counter


def working() -> ScriptedProvider:
    return ScriptedProvider(delivered())


def failing(kind: FailureKind = FailureKind.OVERLOADED) -> ScriptedProvider:
    return ScriptedProvider(ProviderError(kind, f"{kind.value} happened"))


async def bought(shop: Shop, n: int = 1, **said: Any) -> Purchase:
    order = replace(shop.order(n), preferences=Preferences(**said))
    return await shop.dispatcher.buy(order)


def served(purchase: Purchase) -> list[str]:
    return [lot.offer.upstream for lot in purchase.lots]


async def test_only_the_wanted_upstream_is_called_though_it_is_dearer() -> None:
    shop = Shop({"cheap": working(), "dear": working()})

    purchase = await bought(shop, only=("dear",))

    assert served(purchase) == ["dear"]
    assert shop.upstreams["cheap"].jobs == []


async def test_what_is_ignored_is_no_fallback_either() -> None:
    shop = Shop({"cheap": failing(), "next": working(), "dear": working()})

    purchase = await bought(shop, ignore=("next",))

    assert served(purchase) == ["dear"]
    assert shop.upstreams["next"].jobs == []


async def test_the_order_is_followed_and_the_rest_comes_after_by_price() -> None:
    shop = Shop({"cheap": failing(), "next": failing(), "dear": failing()})

    purchase = await bought(shop, order=("dear",))

    tried = [failure.offer.upstream for failure in purchase.failures]
    assert tried == ["dear", "cheap", "next"]


async def test_without_fallbacks_there_is_exactly_one_attempt() -> None:
    shop = Shop({"cheap": failing(), "dear": working()})

    purchase = await bought(shop, allow_fallbacks=False)

    assert purchase.attempts == 1
    assert purchase.lots == []
    assert shop.upstreams["dear"].jobs == []


async def test_without_fallbacks_the_rest_of_several_calls_goes_nowhere_else() -> None:
    async def then_drained(job: ImageJob) -> Done:
        shop.dispatcher.drained = lambda: frozenset({"cheap"})
        return delivered()

    cheap = ScriptedProvider(then_drained, n_max=1)
    shop = Shop({"cheap": cheap, "dear": working()}, slots=1)

    purchase = await bought(shop, n=3, allow_fallbacks=False)

    assert served(purchase) == ["cheap"]
    assert purchase.missing == 2
    assert shop.upstreams["dear"].jobs == []


async def test_no_try_is_forced_at_an_upstream_that_is_not_wanted() -> None:
    shop = Shop({"cheap": failing()})
    for _ in range(5):
        await bought(shop)
    health = await shop.board.read(["cheap/gpt-image-2"], Operation.GENERATE)
    assert health["cheap/gpt-image-2"].state is BreakerState.OPEN

    purchase = await bought(shop, ignore=("cheap",))

    assert purchase.attempts == 0
    assert (await bought(shop)).attempts == 1


# --- with the money watched ---


async def refused(counter: Counter, **fields: Any) -> ServiceUnavailableError:
    with pytest.raises(ServiceUnavailableError) as caught:
        await counter.order(**fields)
    return caught.value


async def test_whichever_upstream_is_wanted_the_tenant_pays_the_same() -> None:
    charged = set()
    for upstream in ("cheap", "dear"):
        counter = Counter(cheap=working(), dear=working())
        view = await counter.order(routing={"only": [upstream]})
        charged.add(view.charged_nanocredits)

    assert len(charged) == 1


async def test_a_request_that_may_cost_more_than_its_limit_holds_nothing() -> None:
    counter = Counter(cheap=working())
    most = hold_nanocredits(counter.request())
    enough = {"max_credits": f"{most // 10**9}.{most % 10**9:09}"}
    short = {"max_credits": f"{(most - 1) // 10**9}.{(most - 1) % 10**9:09}"}

    with pytest.raises(InvalidRequestError) as refused:
        await counter.order(routing=short)

    assert refused.value.code == "max_credits_exceeded"
    assert refused.value.param == "routing.max_credits"
    assert counter.store.balance == RICH
    assert counter.store.tasks == {}
    await counter.order(routing=enough)


async def test_preferences_that_leave_nothing_hold_nothing_and_say_which() -> None:
    counter = Counter(cheap=working(), dear=working())
    routing = {"only": ["dear"], "ignore": ["dear"]}

    with pytest.raises(ServiceUnavailableError) as refused:
        await counter.order(routing=routing)

    assert refused.value.code == "no_available_channel"
    assert refused.value.client_may_retry is False
    assert "routing.only leaves out cheap" in str(refused.value)
    assert "routing.ignore leaves out dear" in str(refused.value)
    assert counter.store.tasks == {}


async def test_upstreams_are_not_named_where_tenants_may_not_know_them() -> None:
    counter = Counter(cheap=working())
    counter.generate = replace(counter.generate, names_upstreams=False)

    with pytest.raises(ServiceUnavailableError) as refused:
        await counter.order(routing={"ignore": ["cheap"]})

    assert "routing.ignore" in str(refused.value)
    assert "cheap" not in str(refused.value)


async def test_an_outage_of_what_is_left_says_what_the_preferences_left_out() -> None:
    counter = Counter(cheap=failing(), dear=working())
    routing = {"only": ["cheap"]}
    # Five open the breaker, and the sixth is the one try that is forced.
    *_, refusal = [await refused(counter, routing=routing) for _ in range(7)]

    assert refusal.code == "no_available_channel"
    assert refusal.retry_after_s is not None
    assert "routing.only leaves out dear" in str(refusal)
    last = list(counter.store.tasks.values())[-1]
    reasons = {c["offer"]: c["reason"] for c in json.loads(last.route_json or "[]")}
    assert reasons["dear/gpt-image-2"] == "left out by routing.only"


async def test_a_failure_without_fallbacks_says_so() -> None:
    counter = Counter(cheap=failing(), dear=working())

    with pytest.raises(ServiceUnavailableError, match="allow_fallbacks") as refused:
        await counter.order(routing={"allow_fallbacks": False})

    assert refused.value.code == "service_unavailable"


async def test_the_kept_decision_says_what_placed_each_offer() -> None:
    counter = Counter(cheap=working(), next=working(), dear=working())

    await counter.order(routing={"order": ["dear"], "sort": "throughput"})

    (task,) = counter.store.tasks.values()
    route = json.loads(task.route_json or "[]")
    assert [(c["offer"], c["placed_by"]) for c in route] == [
        ("dear/gpt-image-2", "routing.order[0]"),
        ("cheap/gpt-image-2", "throughput"),
        ("next/gpt-image-2", "throughput"),
    ]
    assert json.loads(task.request_json)["routing"] == {
        "order": ["dear"],
        "sort": "throughput",
    }


async def test_what_a_tenant_wants_is_not_part_of_what_it_holds() -> None:
    counter = Counter(cheap=working(), dear=working())
    plain, picky = counter.request(), counter.request(routing={"only": ["dear"]})

    await counter.generate.accept("task-unified-1-aaaaaaaa", picky, KEY)

    assert counter.store.balance.held == hold_nanocredits(plain)
