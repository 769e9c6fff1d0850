"""Failover, told as stories: what the client gets, and who is blamed for what."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.core.breaker import BreakerState
from gateway.core.catalogue import Offer, PerImage
from gateway.core.events import AttemptFinished
from gateway.core.limits import REBUYS_ALWAYS, RetryBudget, RiskBook
from gateway.core.ratios import SAMPLES_MIN
from gateway.core.routing import NEXT_BY_KIND, Next
from gateway.core.tasks import AttemptState
from gateway.flows.calls import ANOTHER_MS, ANSWER_RESERVE_MS, ATTEMPT_MAX_MS
from gateway.flows.dispatch import Purchase
from gateway.ports import AttemptRecord
from providers.kit.contract import (
    Billed,
    Cancelled,
    Done,
    FailureKind,
    ImageJob,
    Operation,
    Pending,
    ProviderError,
    Usage,
)
from tests.fakes import ScriptedProvider, delivered
from tests.flows.stories import CENT, DEADLINE_MS, Shop, a_wish

TRIED_ELSEWHERE = [kind for kind in FailureKind if NEXT_BY_KIND[kind] is not Next.NEVER]
TRIED_NOWHERE_ELSE = [kind for kind in FailureKind if kind not in TRIED_ELSEWHERE]


def failing(kind: FailureKind) -> ScriptedProvider:
    return ScriptedProvider(ProviderError(kind, f"{kind.value} happened"))


def working() -> ScriptedProvider:
    return ScriptedProvider(delivered())


async def forever(job: ImageJob) -> Done:
    await asyncio.sleep(10_000_000)
    raise AssertionError(job)


def taking(seconds: float) -> ScriptedProvider:
    async def step(job: ImageJob) -> Done:
        await asyncio.sleep(seconds)
        return delivered(job.n)

    return ScriptedProvider(step)


async def test_the_cheapest_healthy_upstream_is_bought_from() -> None:
    shop = Shop({"cheap": working(), "dear": working()})

    purchase = await shop.buy()

    assert [lot.offer.upstream for lot in purchase.lots] == ["cheap"]
    assert shop.upstreams["cheap"].jobs[0].model == "model-at-cheap"
    assert shop.upstreams["dear"].jobs == []


@pytest.mark.parametrize("kind", TRIED_ELSEWHERE)
async def test_a_failure_costs_the_client_nothing_but_time(kind: FailureKind) -> None:
    shop = Shop({"cheap": failing(kind), "dear": working()})

    purchase = await shop.buy()

    assert [lot.offer.upstream for lot in purchase.lots] == ["dear"]
    assert [failure.error.kind for failure in purchase.failures] == [kind]
    assert purchase.missing == 0


@pytest.mark.parametrize("kind", TRIED_NOWHERE_ELSE)
async def test_a_refused_request_is_not_tried_elsewhere(kind: FailureKind) -> None:
    shop = Shop({"cheap": failing(kind), "dear": working()})

    purchase = await shop.buy()

    assert purchase.lots == []
    assert shop.upstreams["dear"].jobs == []


async def test_an_upstream_hears_how_long_a_job_is_wanted_beyond_the_attempt() -> None:
    shop = Shop({"cheap": ScriptedProvider(Pending("job-7"), delivered())})
    order = replace(
        shop.order(1), deadline_ms=shop.clock.monotonic_ms() + 4 * ATTEMPT_MAX_MS
    )

    await shop.dispatcher.buy(order)

    (job,) = shop.upstreams["cheap"].jobs
    assert job.deadline_s * 1000 == pytest.approx(ATTEMPT_MAX_MS)
    assert job.wanted_for_s == 4 * ATTEMPT_MAX_MS / 1000


async def test_an_attempt_is_written_down_before_it_is_sent() -> None:
    shop = Shop({"cheap": working()})
    seen: list[list[str]] = []

    async def look(job: ImageJob) -> Done:
        seen.append(list(shop.store.trail))
        return delivered()

    shop.upstreams["cheap"]._script[0] = look

    await shop.buy()

    assert seen == [["sending cheap/gpt-image-2"]]


async def test_at_most_three_upstreams_are_tried() -> None:
    names = ["a", "b", "c", "d"]
    shop = Shop({name: failing(FailureKind.BAD_GATEWAY) for name in names})

    purchase = await shop.buy()

    assert [f.offer.upstream for f in purchase.failures] == ["a", "b", "c"]


async def test_what_is_down_is_not_found_out_by_one_request_again() -> None:
    down = {name: failing(FailureKind.BAD_GATEWAY) for name in ("a", "b", "c")}
    shop = Shop({**down, "d": working()})

    unlucky = await shop.buy()
    next_one = await shop.buy()

    assert [f.offer.upstream for f in unlucky.failures] == ["a", "b", "c"]
    assert [f.offer.upstream for f in next_one.failures] == ["a"]
    assert [lot.offer.upstream for lot in next_one.lots] == ["d"]


async def test_a_lost_answer_is_bought_again_once() -> None:
    lost = FailureKind.TIMEOUT
    shop = Shop({"a": failing(lost), "b": failing(lost), "c": working()})

    purchase = await shop.buy()

    assert [f.offer.upstream for f in purchase.failures] == ["a", "b"]
    assert purchase.lots == []


async def test_lost_answers_are_bought_again_only_within_one_percent() -> None:
    shop = Shop({"cheap": failing(FailureKind.TIMEOUT), "dear": working()})
    spent = 100 * REBUYS_ALWAYS * CENT
    shop.store.risk = RiskBook(REBUYS_ALWAYS, REBUYS_ALWAYS * CENT, spent)

    purchase = await shop.buy()

    assert purchase.lots == []
    assert shop.upstreams["dear"].jobs == []


async def test_what_may_have_been_billed_is_booked_as_waste() -> None:
    shop = Shop({"cheap": failing(FailureKind.TIMEOUT), "dear": working()})

    await shop.buy()

    assert shop.store.waste_nanousd == CENT


async def test_an_upstream_that_hangs_is_left_at_its_limit() -> None:
    shop = Shop({"only": ScriptedProvider(forever)})

    await shop.buy()

    assert shop.clock.monotonic_ms() == ATTEMPT_MAX_MS


async def test_an_upstream_that_hangs_is_left_while_another_has_time_enough() -> None:
    shop = Shop({"cheap": ScriptedProvider(forever), "dear": working()})

    purchase = await shop.buy()

    left_ms = DEADLINE_MS - ANSWER_RESERVE_MS
    assert shop.clock.monotonic_ms() == left_ms - ANOTHER_MS
    assert [lot.offer.upstream for lot in purchase.lots] == ["dear"]


async def test_nothing_is_started_when_the_time_left_is_for_answering() -> None:
    shop = Shop({"cheap": ScriptedProvider(forever), "dear": ScriptedProvider(forever)})

    purchase = await shop.buy()

    assert shop.clock.monotonic_ms() == DEADLINE_MS - ANSWER_RESERVE_MS
    assert purchase.attempts == 2


async def test_five_failures_in_a_row_open_the_breaker() -> None:
    shop = Shop({"cheap": failing(FailureKind.BAD_GATEWAY), "dear": working()})

    for _ in range(8):
        await shop.buy()

    assert len(shop.upstreams["cheap"].jobs) == 5


async def test_a_refused_credential_is_left_alone_at_once() -> None:
    shop = Shop({"cheap": failing(FailureKind.AUTH), "dear": working()})

    await shop.buy()
    await shop.buy()

    assert len(shop.upstreams["cheap"].jobs) == 1


async def test_a_rate_limited_upstream_rests_as_long_as_it_asked() -> None:
    limited = ProviderError(FailureKind.RATE_LIMITED, "429", retry_after_s=20)
    shop = Shop({"cheap": ScriptedProvider(limited, delivered()), "dear": working()})

    await shop.buy()
    await shop.clock.sleep(19)
    await shop.buy()
    assert len(shop.upstreams["cheap"].jobs) == 1

    await shop.clock.sleep(2)
    await shop.buy()
    assert len(shop.upstreams["cheap"].jobs) == 2


async def test_with_every_breaker_open_one_try_in_five_seconds_is_forced() -> None:
    shop = Shop({"only": failing(FailureKind.OVERLOADED)})
    for _ in range(5):
        await shop.buy()

    forced = await shop.buy()
    refused = await shop.buy()

    assert forced.attempts == 1
    assert refused.attempts == 0
    assert refused.soonest_retry_ms is not None
    assert 0 < refused.soonest_retry_ms <= 30_000


async def test_an_upstream_comes_back_by_two_good_probes() -> None:
    dead = ProviderError(FailureKind.BAD_GATEWAY, "500")
    shop = Shop(
        {"cheap": ScriptedProvider(*[dead] * 5, delivered()), "dear": working()}
    )
    for _ in range(5):
        await shop.buy()

    await shop.clock.sleep(19)
    served = [(await shop.buy()).lots[0].offer.upstream for _ in range(3)]

    health = await shop.board.read(["cheap/gpt-image-2"], Operation.GENERATE)
    assert served == ["cheap", "cheap", "cheap"]
    assert health["cheap/gpt-image-2"].state is BreakerState.CLOSED


async def test_while_a_probe_is_under_way_nobody_else_is_sent_there() -> None:
    dead = ProviderError(FailureKind.BAD_GATEWAY, "500")

    async def slow(job: ImageJob) -> Done:
        await asyncio.sleep(10)
        return delivered()

    shop = Shop({"cheap": ScriptedProvider(*[dead] * 5, slow), "dear": working()})
    for _ in range(5):
        await shop.buy()
    await shop.clock.sleep(19)

    purchases = await asyncio.gather(*(shop.buy() for _ in range(10)))

    served = [purchase.lots[0].offer.upstream for purchase in purchases]
    assert served.count("cheap") == 1


async def test_a_job_with_an_id_is_polled_and_its_id_is_kept_first() -> None:
    shop = Shop(
        {"cheap": ScriptedProvider(Pending("job-7"), Pending("job-7"), delivered())}
    )

    purchase = await shop.buy()

    assert len(purchase.lots) == 1
    assert shop.upstreams["cheap"].polled == ["job-7", "job-7"]
    assert shop.store.trail == ["sending cheap/gpt-image-2", "accepted job-7"]


async def test_a_read_that_fails_is_read_again_and_the_job_not_resubmitted() -> None:
    broken = ProviderError(FailureKind.BAD_GATEWAY, "502")
    shop = Shop(
        {
            "cheap": ScriptedProvider(Pending("job-7"), broken, broken, delivered()),
            "dear": working(),
        }
    )

    purchase = await shop.buy()

    assert [lot.offer.upstream for lot in purchase.lots] == ["cheap"]
    assert len(shop.upstreams["cheap"].jobs) == 1


async def test_a_job_that_may_be_alive_is_never_bought_elsewhere() -> None:
    stuck = ScriptedProvider(Pending("job-7", poll_after_s=50))
    shop = Shop({"cheap": stuck, "dear": working()})

    purchase = await shop.buy()

    assert purchase.lots == []
    assert purchase.failures[0].accepted
    assert shop.upstreams["dear"].jobs == []


async def test_a_job_that_failed_is_bought_elsewhere_and_not_asked_for_again() -> None:
    over = ProviderError(FailureKind.BAD_GATEWAY, "it failed", ended=True)
    failed = ScriptedProvider(Pending("job-7"), over)
    shop = Shop({"cheap": failed, "dear": working()})

    purchase = await shop.buy()

    assert [lot.offer.upstream for lot in purchase.lots] == ["dear"]
    assert failed.polled == ["job-7"]
    assert shop.store.waste_nanousd == 0


async def taken_up(shop: Shop, *, job_id: str | None) -> Purchase:
    """Carry on what another worker began: two pictures, at the first upstream."""
    order = shop.order(2)
    begun = AttemptRecord(
        seq=3,
        offer_id=shop.offers[0].id,
        upstream=shop.offers[0].upstream,
        state=AttemptState.SENDING,
        estimate_nanousd=2 * CENT,
        started_ms=0,
        finished_ms=None,
        job_id=job_id,
        kind=None,
        upstream_status=None,
        upstream_code=None,
        detail=None,
        billed=None,
        cost_nanousd=0,
        n=2,
    )
    return await shop.dispatcher.buy(replace(order, history=(begun,)))


async def test_a_job_of_a_lost_worker_is_polled_and_not_handed_over_again() -> None:
    shop = Shop({"cheap": ScriptedProvider(delivered(2)), "dear": working()})

    purchase = await taken_up(shop, job_id="job-7")

    assert [lot.offer.upstream for lot in purchase.lots] == ["cheap"]
    assert purchase.missing == 0
    assert shop.upstreams["cheap"].jobs == []
    assert shop.upstreams["cheap"].polled == ["job-7"]


async def test_what_a_lost_worker_sent_is_sent_again_under_the_same_name() -> None:
    # Where the upstream knows it again by that; nowhere else.
    known = ScriptedProvider(Pending("job-7"), delivered(2))
    known.idempotent = frozenset(Operation)
    shop = Shop({"cheap": known, "dear": working()})

    purchase = await taken_up(shop, job_id=None)

    (job,) = known.jobs
    assert (job.seq, job.n) == (3, 2)
    assert [lot.offer.upstream for lot in purchase.lots] == ["cheap"]
    assert shop.store.trail == ["accepted job-7"]


async def test_what_a_lost_worker_sent_elsewhere_is_bought_anew_elsewhere() -> None:
    shop = Shop({"cheap": working(), "dear": ScriptedProvider(delivered(2))})

    purchase = await taken_up(shop, job_id=None)

    assert [lot.offer.upstream for lot in purchase.lots] == ["dear"]
    assert shop.upstreams["cheap"].jobs == []
    assert shop.store.waste_nanousd == 2 * CENT


async def test_a_job_has_all_the_time_there_is_and_is_stopped_then() -> None:
    stuck = ScriptedProvider(Pending("job-7", poll_after_s=50))
    stuck.can_stop = True
    stuck.stops = Cancelled(Billed.NO)
    shop = Shop({"cheap": stuck, "dear": working()})

    purchase = await shop.buy()

    assert shop.clock.monotonic_ms() == DEADLINE_MS - ANSWER_RESERVE_MS
    assert stuck.stopped == ["job-7"]
    assert purchase.failures[0].error.kind is FailureKind.TIMEOUT
    assert purchase.failures[0].error.billed is Billed.NO


async def test_only_the_missing_pictures_are_bought_elsewhere() -> None:
    shop = Shop({"cheap": ScriptedProvider(delivered(3)), "dear": taking(1)})

    purchase = await shop.buy(n=5)

    assert [(lot.offer.upstream, len(lot.done.images)) for lot in purchase.lots] == [
        ("cheap", 3),
        ("dear", 2),
    ]
    assert purchase.missing == 0


async def test_an_upstream_that_makes_one_at_a_time_is_called_at_once() -> None:
    one_by_one = taking(10)
    one_by_one._n_max = 1
    shop = Shop({"cheap": one_by_one})

    purchase = await shop.buy(n=4)

    assert len(purchase.images) == 4
    assert shop.clock.monotonic_ms() == 10_000


async def test_more_requests_than_slots_take_turns() -> None:
    shop = Shop({"only": taking(10)}, slots=2)

    purchases = await asyncio.gather(*(shop.buy() for _ in range(6)))

    assert [len(purchase.lots) for purchase in purchases] == [1] * 6
    assert shop.clock.monotonic_ms() == 30_000


async def test_an_empty_retry_budget_ends_the_request() -> None:
    shop = Shop({"cheap": failing(FailureKind.BAD_GATEWAY), "dear": working()})
    shop.dispatcher.budget = RetryBudget(tokens=0.0, at_ms=0)

    purchase = await shop.buy()

    assert purchase.lots == []
    assert purchase.attempts == 1


async def test_every_attempt_is_told_of() -> None:
    shop = Shop({"cheap": failing(FailureKind.OVERLOADED), "dear": working()})

    await shop.buy()

    told = [e for e in shop.events.seen if isinstance(e, AttemptFinished)]
    assert [(e.upstream, e.outcome, e.billed, e.cost_nanousd) for e in told] == [
        ("cheap", "overloaded", "no", 0),
        ("dear", "done", "yes", 2 * CENT),
    ]


async def test_the_cost_comes_from_what_the_upstream_says_if_it_says() -> None:
    said = Done(delivered().images, Usage(image_output=5), cost_nanousd=123)
    shop = Shop({"cheap": ScriptedProvider(said)})

    purchase = await shop.buy()

    end = purchase.lots[0].end
    assert (end.cost_nanousd, end.cost_source, end.billed) == (123, "usd", Billed.YES)


async def test_a_cancelled_attempt_gives_its_slot_back_and_blames_nobody() -> None:
    shop = Shop({"only": ScriptedProvider(forever)}, slots=1)
    running = asyncio.create_task(shop.buy())
    await asyncio.sleep(1)

    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    health = await shop.board.read(["only/gpt-image-2"], Operation.GENERATE)
    seen = health["only/gpt-image-2"]
    assert (seen.slots_free, seen.state) == (1, BreakerState.CLOSED)


def by_the_unit(offer: Offer) -> Offer:
    return replace(offer, cost=PerImage(flat=CENT, unit_nanousd=CENT // 10))


async def test_units_that_an_upstream_counts_are_booked_at_their_price() -> None:
    said = replace(delivered(), units_millionths=12_500_000)
    shop = Shop({"fal": ScriptedProvider(said)})
    shop.offers = tuple(map(by_the_unit, shop.offers))

    purchase = await shop.buy()

    end = purchase.lots[0].end
    assert (end.cost_nanousd, end.cost_source) == (CENT * 5 // 4, "units")


async def test_what_upstreams_really_charge_decides_who_is_cheapest() -> None:
    # Both cards say a cent; one upstream counts two cents' worth of units.
    greedy = ScriptedProvider(replace(delivered(), units_millionths=20_000_000))
    honest = ScriptedProvider(replace(delivered(), units_millionths=11_000_000))
    shop = Shop({"a-greedy": greedy, "b-honest": honest})
    shop.offers = tuple(map(by_the_unit, shop.offers))

    for _ in range(SAMPLES_MIN):
        bought = await shop.buy()
        assert bought.lots[0].offer.upstream == "a-greedy"
    bought = await shop.buy()

    assert bought.lots[0].offer.upstream == "b-honest"
    other_tier = replace(shop.order(), wish=replace(a_wish(), quality="high"))
    bought = await shop.dispatcher.buy(other_tier)
    assert bought.lots[0].offer.upstream == "a-greedy"


async def test_a_cost_that_only_the_card_says_teaches_nothing() -> None:
    shop = Shop({"only": working()})
    for _ in range(SAMPLES_MIN):
        await shop.buy()

    health = await shop.board.read(["only/gpt-image-2"], Operation.GENERATE)

    assert health["only/gpt-image-2"].cost_ratios == {}
