"""What a lost worker left, taken up by the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.adapters.sql.database import StoreBusyError
from gateway.core.breaker import Outcome
from gateway.core.routing import Preferences
from gateway.core.tasks import AttemptState, FencedError
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
)
from tests.fakes import MemoryStore, ScriptedProvider, Step, delivered
from tests.flows.stories import CENT, DEADLINE_MS, Shop, a_wish
from tests.flows.test_dispatch import failing, forever, working

K = FailureKind


def an_attempt(shop: Shop, seq: int = 1, **changes: Any) -> AttemptRecord:
    fields: dict[str, Any] = {
        "seq": seq,
        "offer_id": shop.offers[0].id,
        "upstream": shop.offers[0].upstream,
        "state": AttemptState.SENDING,
        "estimate_nanousd": CENT,
        "started_ms": 0,
        "finished_ms": None,
        "job_id": None,
        "kind": None,
        "upstream_status": None,
        "upstream_code": None,
        "detail": None,
        "billed": None,
        "cost_nanousd": 0,
    }
    return AttemptRecord(**(fields | changes))


def an_ended(shop: Shop, kind: str, seq: int = 1, **changes: Any) -> AttemptRecord:
    ended = {"state": AttemptState.FAILED, "finished_ms": 1, "billed": "no"}
    return an_attempt(shop, seq, kind=kind, **(ended | changes))


async def carried_on(shop: Shop, *history: AttemptRecord, n: int = 1) -> Purchase:
    return await shop.dispatcher.buy(replace(shop.order(n), history=history))


def served(purchase: Purchase) -> list[str]:
    return [lot.offer.upstream for lot in purchase.lots]


@dataclass
class Polled(ScriptedProvider):
    """Answers each look by the job's id."""

    answer: Callable[[str], Done | Pending]
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(Pending("job-1"), n_max=1)

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        assert job.model
        self.seen.append(job_id)
        return self.answer(job_id)


# --- handed over again ---


@pytest.mark.parametrize("kind", [K.RATE_LIMITED, K.NETWORK, K.OVERLOADED])
async def test_a_call_that_is_refused_the_second_time_is_made_again(
    kind: FailureKind,
) -> None:
    known = ScriptedProvider(
        ProviderError(kind, "not now"), ProviderError(kind, "not now"), delivered()
    )
    known.idempotent = frozenset(Operation)
    shop = Shop({"cheap": known, "dear": working()})

    purchase = await carried_on(shop, an_attempt(shop))

    assert served(purchase) == ["cheap"]
    assert [job.seq for job in known.jobs] == [1, 1, 1]


@pytest.mark.parametrize("kind", [K.RATE_LIMITED, K.AUTH, K.UNSUPPORTED])
async def test_a_refusal_does_not_make_the_first_call_unbought(
    kind: FailureKind,
) -> None:
    known = failing(kind)
    known.idempotent = frozenset(Operation)
    shop = Shop({"cheap": known, "dear": working()})

    purchase = await carried_on(shop, an_attempt(shop))

    assert purchase.failures[0].error.kind is K.TIMEOUT
    assert purchase.failures[0].error.billed is Billed.MAYBE
    assert shop.store.waste_nanousd == CENT


async def test_what_the_client_did_wrong_was_wrong_the_first_time_too() -> None:
    known = failing(K.CONTENT_POLICY)
    known.idempotent = frozenset(Operation)
    shop = Shop({"cheap": known, "dear": working()})

    purchase = await carried_on(shop, an_attempt(shop))

    assert purchase.failures[0].error.kind is K.CONTENT_POLICY
    assert shop.upstreams["dear"].jobs == []
    assert shop.store.waste_nanousd == 0


# --- looked at again ---


async def test_jobs_are_taken_up_at_once_so_that_one_that_hangs_costs_no_other() -> (
    None
):
    cheap = Polled(lambda job: Pending(job, 3) if job == "stuck" else delivered())
    shop = Shop({"cheap": cheap, "dear": working()})

    purchase = await carried_on(
        shop,
        *(
            an_attempt(shop, seq, job_id=job_id)
            for seq, job_id in enumerate(("stuck", "b", "c"), 1)
        ),
        n=3,
    )

    assert served(purchase) == ["cheap", "cheap"]
    assert (purchase.missing, shop.store.waste_nanousd) == (1, CENT)


async def test_an_upstream_that_is_away_for_minutes_loses_no_job() -> None:
    def answer(job_id: str) -> Done:
        if shop.clock.monotonic_ms() < DEADLINE_MS - 60_000:
            raise ProviderError(K.NETWORK, "refused", billed=Billed.MAYBE)
        assert job_id == "job-1"
        return delivered()

    cheap = Polled(answer)
    shop = Shop({"cheap": cheap, "dear": working()})

    purchase = await shop.buy()

    assert served(purchase) == ["cheap"]
    assert len(cheap.seen) < 30  # it is not pestered either


async def test_a_look_waits_as_long_as_the_upstream_asks() -> None:
    asked = ProviderError(K.RATE_LIMITED, "later", retry_after_s=40)
    shop = Shop({"cheap": ScriptedProvider(Pending("job-1", 1), asked, delivered())})

    await shop.buy()

    assert shop.clock.monotonic_ms() == 41_000


async def test_a_job_that_ended_while_it_was_to_be_stopped_is_looked_at_once_more() -> (
    None
):
    def answer(job_id: str) -> Done | Pending:
        if shop.clock.monotonic_ms() < DEADLINE_MS - 5_000:
            return Pending(job_id, 50)
        return delivered()

    cheap = Polled(answer)
    cheap.can_stop = True  # and says that it is too late
    shop = Shop({"cheap": cheap})

    purchase = await shop.buy()

    assert served(purchase) == ["cheap"]
    assert cheap.stopped == ["job-1"]


async def test_what_a_stopped_job_cost_is_booked_as_it_is_told() -> None:
    stuck = ScriptedProvider(Pending("job-1", 50))
    stuck.can_stop = True
    stuck.stops = Cancelled(Billed.YES, cost_nanousd=CENT // 4)
    shop = Shop({"cheap": stuck})

    await shop.buy()

    assert shop.store.waste_nanousd == CENT // 4


async def test_an_adapter_with_a_bug_in_its_poll_fails_its_own_attempt() -> None:
    def answer(_: str) -> Done:
        raise KeyError("status")

    shop = Shop({"cheap": Polled(answer), "dear": working()})

    purchase = await carried_on(shop, an_attempt(shop, job_id="job-1"))

    assert purchase.failures[0].accepted
    assert shop.upstreams["dear"].jobs == []
    assert len(shop.crashes) == 1


async def test_a_job_is_known_from_the_moment_that_its_id_is() -> None:
    # The store is slow to write the id down, and the time for the attempt runs out.
    cheap = ScriptedProvider(Pending("job-1", 1))
    cheap.can_stop = True
    cheap.stops = Cancelled()
    shop = Shop({"cheap": cheap, "dear": working()})

    async def slow(*_: object, **__: object) -> None:
        await asyncio.sleep(400)

    shop.store.accept_attempt = slow  # type: ignore[method-assign]

    purchase = await shop.buy()

    assert cheap.stopped == ["job-1"]
    assert purchase.failures[0].accepted
    assert shop.upstreams["dear"].jobs == []


async def test_a_store_that_is_away_when_a_job_is_accepted_is_waited_for() -> None:
    cheap = ScriptedProvider(Pending("job-1", 1), delivered())
    shop = Shop({"cheap": cheap, "dear": working()})
    refusals = [True, True]
    write = shop.store.accept_attempt

    async def busy(*args: Any, **more: Any) -> None:
        if refusals:
            refusals.pop()
            raise StoreBusyError("busy")
        await write(*args, **more)

    shop.store.accept_attempt = busy  # type: ignore[method-assign]

    purchase = await shop.buy()

    assert served(purchase) == ["cheap"]
    assert shop.store.trail[-1] == "accepted job-1"


# --- what had ended ---


@pytest.mark.parametrize("kind", ["content_policy", "invalid_request", "result_lost"])
async def test_what_ends_a_request_ends_it_after_a_restart_too(kind: str) -> None:
    shop = Shop({"cheap": working(), "dear": working()})

    purchase = await carried_on(shop, an_ended(shop, kind))

    assert purchase.lots == []
    assert purchase.failures[0].error.kind.value == kind


async def test_a_job_that_was_given_up_alive_is_not_bought_after_a_restart() -> None:
    shop = Shop({"cheap": working(), "dear": working()})
    ended = an_ended(shop, "timeout", billed="maybe", job_id="job-1", alive=True)

    assert (await carried_on(shop, ended)).lots == []


async def test_once_more_is_not_once_more_after_every_restart() -> None:
    shop = Shop({"cheap": working(), "dear": working(), "dearest": working()})
    other = {"offer_id": shop.offers[1].id, "upstream": shop.offers[1].upstream}
    first = an_ended(shop, "timeout", billed="maybe")
    second = an_ended(shop, "timeout", 2, billed="maybe", **other)

    assert served(await carried_on(shop, first)) == ["dear"]
    assert served(await carried_on(shop, first, second)) == []


async def test_a_failure_that_lets_the_next_one_try_still_does() -> None:
    shop = Shop({"cheap": working(), "dear": working()})

    purchase = await carried_on(shop, an_ended(shop, "overloaded"))

    assert served(purchase) == ["dear"]


async def test_a_job_whose_upstream_left_the_config_is_not_bought_again() -> None:
    shop = Shop({"cheap": working(), "dear": working()})
    gone: dict[str, Any] = {"offer_id": "gone/gpt-image-2", "upstream": "gone"}

    purchase = await carried_on(shop, an_attempt(shop, job_id="job-1", **gone))

    assert purchase.lots == []
    assert shop.store.waste_nanousd == CENT


async def test_an_edit_without_its_pictures_is_not_handed_over_again() -> None:
    known = working()
    known.idempotent = frozenset(Operation)
    shop = Shop({"cheap": known, "dear": working()})
    order = shop.order()
    wish = replace(order.wish, references=1)

    purchase = await shop.dispatcher.buy(
        replace(order, wish=wish, history=(an_attempt(shop),), buys=False)
    )

    assert purchase.lots == []
    assert known.jobs == []
    assert purchase.failures[0].error.billed is Billed.MAYBE


# --- outages, and time ---


async def test_an_order_with_time_starts_over_after_an_outage() -> None:
    away = ProviderError(K.NETWORK, "refused")
    shop = Shop({"cheap": ScriptedProvider(away, away, away, delivered())})

    purchase = await shop.dispatcher.buy(replace(shop.order(), patient=True))

    assert served(purchase) == ["cheap"]
    assert len(shop.upstreams["cheap"].jobs) == 4
    assert shop.clock.monotonic_ms() == 14_000  # 2, 4 and 8 s


async def test_an_order_without_time_does_not() -> None:
    away = ProviderError(K.NETWORK, "refused")
    shop = Shop({"cheap": ScriptedProvider(away, delivered())})

    assert (await shop.buy()).lots == []


@pytest.mark.parametrize("kind", [K.TIMEOUT, K.NO_OUTPUT, K.UNSUPPORTED])
async def test_what_may_be_bought_or_can_never_be_is_not_started_over(
    kind: FailureKind,
) -> None:
    shop = Shop({"cheap": ScriptedProvider(ProviderError(kind, "no"), delivered())})

    purchase = await shop.dispatcher.buy(replace(shop.order(), patient=True))

    assert purchase.lots == []
    assert len(shop.upstreams["cheap"].jobs) == 1


async def test_an_outage_that_lasts_ends_the_order_at_its_deadline() -> None:
    shop = Shop({"cheap": failing(K.OVERLOADED), "dear": failing(K.OVERLOADED)})

    purchase = await shop.dispatcher.buy(replace(shop.order(), patient=True))

    assert purchase.lots == []
    assert shop.clock.monotonic_ms() < DEADLINE_MS
    assert purchase.attempts < 30


# --- the end of a job that nobody waits for any more ---


async def ended_by(last: Step, stops: Cancelled | None) -> tuple[Shop, Purchase]:
    """Give a job up at its deadline; ``last`` is what a last look at it sees."""
    stuck = ScriptedProvider(*4 * [Pending("job-7", poll_after_s=90)], last)
    stuck.can_stop, stuck.stops = True, stops
    shop = Shop({"cheap": stuck, "dear": working()})
    return shop, await shop.buy()


async def test_a_job_that_ended_just_then_is_looked_at_once_more() -> None:
    _, purchase = await ended_by(delivered(), None)

    assert served(purchase) == ["cheap"]


async def test_an_adapter_that_breaks_in_the_last_look_fails_its_attempt_alone() -> (
    None
):
    async def broken(job: ImageJob) -> Done:
        raise KeyError(job.task_id)

    shop, purchase = await ended_by(broken, None)

    (failure,) = purchase.failures
    assert failure.accepted
    assert "KeyError" in failure.error.detail
    assert [type(crash) for crash, _ in shop.crashes] == [KeyError]


async def test_a_last_look_tells_how_the_job_ended() -> None:
    refused = ProviderError(K.CONTENT_POLICY, "no", ended=True, client_message="No.")

    _, purchase = await ended_by(refused, None)

    assert purchase.failures[0].error is refused


async def test_a_last_look_that_fails_tells_nothing_of_the_job() -> None:
    _, purchase = await ended_by(ProviderError(K.NETWORK, "gone"), None)

    assert purchase.failures[0].error.kind is K.TIMEOUT
    assert purchase.failures[0].accepted


async def test_a_job_told_to_stop_keeps_what_is_known_of_its_failure() -> None:
    rude = ProviderError(
        K.INVALID_REQUEST,
        "what?",
        status=418,
        upstream_code="teapot",
        billed=Billed.YES,
        client_message="Not here.",
        cost_nanousd=7,
    )
    stuck = ScriptedProvider(Pending("job-7"), rude)
    stuck.can_stop, stuck.stops = True, Cancelled(Billed.NO)
    shop = Shop({"cheap": stuck})

    purchase = await shop.buy()

    error = purchase.failures[0].error
    assert (error.status, error.upstream_code, error.client_message) == (
        418,
        "teapot",
        "Not here.",
    )
    assert (error.billed, error.cost_nanousd) == (Billed.YES, 7)
    assert stuck.stopped == ["job-7"]


async def test_whoever_is_fenced_off_blames_no_adapter() -> None:
    class Fenced(MemoryStore):
        async def accept_attempt(self, *args: object, **kwargs: object) -> None:
            raise FencedError("task-1")

    shop = Shop({"cheap": ScriptedProvider(Pending("job-7"))}, store=Fenced())

    with pytest.raises(FencedError):
        await shop.buy()

    assert shop.crashes == []


async def test_an_order_without_fallbacks_is_tried_once_however_patient() -> None:
    shop = Shop({"cheap": failing(K.OVERLOADED), "dear": working()})
    alone = Preferences(allow_fallbacks=False)

    purchase = await shop.dispatcher.buy(
        replace(shop.order(), patient=True, preferences=alone)
    )

    assert len(purchase.failures) == 1
    assert len(shop.upstreams["cheap"].jobs) == 1


async def test_nothing_is_bought_after_a_call_whose_end_could_not_be_written() -> None:
    # One of two calls delivers; nobody knows what became of the other.
    shop = Shop(
        {
            "cheap": ScriptedProvider(
                delivered(), ProviderError(K.TIMEOUT, "cut off"), delivered(), n_max=1
            ),
            "dear": working(),
        }
    )
    shop.store.refuse_to_end = [StoreBusyError("busy")]

    purchase = await shop.buy(2)

    assert (len(purchase.lots), purchase.missing) == (1, 1)
    assert sum(len(each.jobs) for each in shop.upstreams.values()) == 2


async def test_a_timeout_of_an_adapters_own_is_a_broken_adapter() -> None:
    async def early(job: ImageJob) -> Done:
        raise TimeoutError(job.task_id)

    shop = Shop({"cheap": ScriptedProvider(early)})

    purchase = await shop.buy()

    assert purchase.failures[0].error.kind is K.BAD_GATEWAY
    assert [type(crash) for crash, _ in shop.crashes] == [TimeoutError]


async def test_tasks_that_can_wait_take_no_forced_tries_from_those_that_cannot() -> (
    None
):
    shop = Shop({"only": failing(K.OVERLOADED)})
    for _ in range(5):
        await shop.buy()
    assert len(shop.upstreams["only"].jobs) == 5
    waits = asyncio.create_task(
        shop.dispatcher.buy(replace(shop.order(), patient=True))
    )
    await shop.clock.sleep(6)
    assert len(shop.upstreams["only"].jobs) == 5

    await shop.buy()

    assert len(shop.upstreams["only"].jobs) == 6
    waits.cancel()
    await asyncio.wait({waits})


@pytest.mark.parametrize("kind", [K.RATE_LIMITED, K.OVERLOADED])
async def test_a_job_is_looked_at_however_long_its_upstream_wants_to_be_left_alone(
    kind: FailureKind,
) -> None:
    rude = ProviderError(kind, "later", retry_after_s=300)
    shop = Shop({"cheap": ScriptedProvider(Pending("job-7"), rude, delivered())})

    purchase = await shop.buy()

    assert served(purchase) == ["cheap"]
    assert shop.clock.monotonic_ms() < 100_000


async def test_nobody_waits_for_what_an_offer_could_not_do_anyway() -> None:
    shop = Shop({"only": failing(K.AUTH)})
    await shop.buy()
    begun_ms = shop.clock.monotonic_ms()
    masked = replace(shop.order(), patient=True, wish=replace(a_wish(), mask=True))

    open_ = await shop.dispatcher.buy(masked)
    shop.dispatcher.drained = lambda: frozenset({"only"})
    drained = await shop.dispatcher.buy(masked)

    assert open_.lots == drained.lots == []
    assert shop.clock.monotonic_ms() == begun_ms


async def test_a_forced_try_is_not_made_beside_a_probe() -> None:
    down = ProviderError(K.OVERLOADED, "down")
    shop = Shop({"only": ScriptedProvider(down, down, down, down, down, forever)})
    for _ in range(5):
        await shop.buy()
    out = [asyncio.create_task(shop.buy()) for _ in range(1)]
    for _ in range(20):
        await shop.clock.sleep(6)
        out.append(asyncio.create_task(shop.buy()))
    await shop.clock.sleep(1)

    assert len(shop.upstreams["only"].jobs) == 6
    for each in out:
        each.cancel()
    await asyncio.wait(out)


async def test_a_refusal_from_before_a_reset_does_not_undo_it() -> None:
    board = Shop({"only": working()}).board
    offer = "only/gpt-image-2"
    old = await board.admit(offer, Operation.GENERATE)
    other = await board.admit(offer, Operation.GENERATE)
    assert old is not None
    assert other is not None
    await board.report(other, Outcome(kind=K.AUTH))
    await asyncio.sleep(1)
    await board.reset("only")

    await board.report(old, Outcome(kind=K.AUTH))

    assert (await board.read([offer], Operation.GENERATE))[offer].callable
