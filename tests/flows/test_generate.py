"""A request from its hold to its settlement, with the money watched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.core.catalogue import Catalogue, TokenPrice, Variant
from gateway.core.errors import (
    ContentRefusedError,
    DeadlineExceededError,
    GatewayError,
    InsufficientCreditsError,
    InvalidRequestError,
    RateLimitedError,
    ServiceUnavailableError,
    StoreAwayError,
    store_away,
)
from gateway.core.events import HoldRefused, TaskFinished
from gateway.core.ledger import Balance
from gateway.core.pricing import hold_nanocredits
from gateway.core.requests import ImageRequest, parse_generation
from gateway.core.tasks import HOLD_KEPT_MS, AttemptState, TaskState
from gateway.flows.generate import STORE_AWAY_MAX_MS, Accepted, Generate, Later
from gateway.flows.recovery import BEATS_BEFORE_JUDGING, LEAVE_MAX_S, Recovery
from gateway.flows.results import Results
from gateway.flows.tasks import TaskView
from gateway.ports import Key, NewAttempt, TaskRecord
from providers.kit.contract import (
    Billed,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    ProviderError,
    Usage,
)
from tests.fakes import (
    FakeChance,
    FakePayload,
    FakeProcesses,
    MemoryBlobs,
    MemoryStore,
    OneBalance,
    RelabellingStudio,
    ScriptedProvider,
    delivered,
)
from tests.flows.stories import CENT, Shop
from tests.virtual_time import LoopClock

PRICE = TokenPrice(306_000, 76_500, 489_600, 122_400, 1_836_000)
VARIANT = Variant("gpt-image-2", PRICE, {"low": 16, "medium": 48, "high": 96})
KEY = Key("key_1", "ten_1", b"", "iwk_live_…", "auto", 0)
USAGE = Usage(text_input=10, image_output=196)
CHARGE = PRICE.total(USAGE)
RICH = Balance(posted=10**12)


class Counter:
    """The flow under test over a shop, with one tenant's balance."""

    def __init__(self, balance: Balance = RICH, **upstreams: ScriptedProvider) -> None:
        self.shop = Shop(upstreams)
        self.store = self.shop.store
        self.store.balance = balance
        self.blobs = MemoryBlobs()
        self.studio = RelabellingStudio()
        self.catalogue = Catalogue(
            {"gpt-image-2": VARIANT}, {"gpt-image-2": self.shop.offers}
        )
        self.generate = Generate(
            catalogue=self.catalogue,
            store=self.store,
            dispatcher=self.shop.dispatcher,
            results=Results(self.blobs, self.shop.clock),
            ledger=OneBalance(self.store),
            studio=self.studio,
            clock=self.shop.clock,
            chance=FakeChance(),
            events=self.shop.events,
            today=lambda: "2026-11-24",
        )

    def request(self, **fields: object) -> ImageRequest:
        body = {"prompt": "a sunset", "size": "1:1", "quality": "low", **fields}
        return parse_generation(body, self.catalogue)

    async def order(self, *, links: bool = False, **fields: object) -> TaskView:
        task_id = self.generate.new_task_id()
        accepted = await self.generate.accept(task_id, self.request(**fields), KEY)
        assert isinstance(accepted, Accepted)
        return await self.generate.carry_out(accepted, links=links)

    @property
    def finished(self) -> TaskFinished:
        (told,) = [e for e in self.shop.events.seen if isinstance(e, TaskFinished)]
        return told


def failing(kind: FailureKind, **more: object) -> ScriptedProvider:
    return ScriptedProvider(ProviderError(kind, "detail for logs", **more))  # type: ignore[arg-type]


async def test_the_tenant_pays_what_was_reported_and_gets_the_rest_back() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))

    view = await counter.order()

    assert view.state is TaskState.COMPLETED
    assert view.charged_nanocredits == CHARGE
    assert counter.store.balance == Balance(RICH.posted - CHARGE, held=0, spent=CHARGE)


async def test_the_hold_covers_the_most_that_it_can_cost() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    request = counter.request(n=3)

    await counter.generate.accept("task-unified-1-aaaaaaaa", request, KEY)

    assert counter.store.balance.held == hold_nanocredits(request)
    assert hold_nanocredits(request) == 3 * PRICE.total(
        Usage(text_input=len("a sunset") + 6, image_output=196)
    )


async def test_without_the_credits_nothing_is_bought() -> None:
    cheap = ScriptedProvider(delivered())
    counter = Counter(balance=Balance(posted=1), cheap=cheap)

    with pytest.raises(InsufficientCreditsError):
        await counter.order()

    assert cheap.jobs == []
    assert counter.shop.events.seen == [HoldRefused("gpt-image-2")]


async def test_whichever_upstream_serves_the_tenant_pays_the_same() -> None:
    first = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    second = Counter(
        cheap=failing(FailureKind.OVERLOADED),
        dear=ScriptedProvider(delivered(usage=USAGE)),
    )

    assert (await first.order()).charged_nanocredits == CHARGE
    assert (await second.order()).charged_nanocredits == CHARGE
    assert second.finished.saved_by_fallback
    assert not first.finished.saved_by_fallback


async def test_without_reported_usage_the_formula_decides_and_it_is_flagged() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))

    view = await counter.order()

    assert view.usage_source == "estimated"
    assert view.usage is not None
    assert view.usage.image_output == 196


async def test_of_five_pictures_three_are_paid_if_three_came() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(3, USAGE.times(3))))

    view = await counter.order(n=5)

    assert len(view.pictures) == 3
    assert view.charged_nanocredits == 3 * CHARGE
    assert counter.store.balance.held == 0


async def test_what_costs_more_than_hold_and_balance_is_absorbed() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE.times(100))))
    held = hold_nanocredits(counter.request())
    counter.store.balance = Balance(posted=held)

    view = await counter.order()

    assert view.charged_nanocredits == held
    assert counter.store.balance == Balance(posted=0, held=0, spent=held)
    assert counter.finished.absorbed_nanocredits == CHARGE * 100 - held


@pytest.mark.parametrize(
    ("kind", "error", "code", "retry"),
    [
        (FailureKind.INVALID_REQUEST, InvalidRequestError, "invalid_request", None),
        (FailureKind.CONTENT_POLICY, ContentRefusedError, "moderation_blocked", False),
        (
            FailureKind.UNSUPPORTED,
            InvalidRequestError,
            "unsupported_by_upstreams",
            None,
        ),
        (FailureKind.AUTH, ServiceUnavailableError, "service_unavailable", False),
        (
            FailureKind.INSUFFICIENT_FUNDS,
            ServiceUnavailableError,
            "service_unavailable",
            False,
        ),
        (FailureKind.RATE_LIMITED, RateLimitedError, "rate_limit_exceeded", None),
        (FailureKind.OVERLOADED, ServiceUnavailableError, "service_unavailable", False),
        (
            FailureKind.BAD_GATEWAY,
            ServiceUnavailableError,
            "service_unavailable",
            False,
        ),
        (FailureKind.NETWORK, ServiceUnavailableError, "service_unavailable", False),
        (FailureKind.TIMEOUT, DeadlineExceededError, "generation_timeout", False),
        (FailureKind.NO_OUTPUT, ServiceUnavailableError, "service_unavailable", False),
        (
            FailureKind.RESULT_LOST,
            ServiceUnavailableError,
            "service_unavailable",
            False,
        ),
    ],
)
async def test_a_failed_request_is_free_and_says_what_to_do(
    kind: FailureKind, error: type[GatewayError], code: str, retry: bool | None
) -> None:
    counter = Counter(only=failing(kind))

    with pytest.raises(error) as caught:
        await counter.order()

    assert (caught.value.code, caught.value.client_may_retry) == (code, retry)
    assert "not charged" in str(caught.value)
    assert "detail for logs" not in str(caught.value)
    assert counter.store.balance == RICH
    if caught.value.status in {429, 503}:
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60


async def test_every_kind_has_a_row_above() -> None:
    rows = test_a_failed_request_is_free_and_says_what_to_do.pytestmark[0].args[1]  # type: ignore[attr-defined]

    assert {row[0] for row in rows} == set(FailureKind)


async def test_moderation_counts_as_served_and_an_outage_does_not() -> None:
    refused = Counter(only=failing(FailureKind.CONTENT_POLICY))
    down = Counter(only=failing(FailureKind.BAD_GATEWAY))
    for counter in (refused, down):
        with pytest.raises(GatewayError):
            await counter.order()

    assert (refused.finished.outcome, down.finished.outcome) == (
        "refused",
        "upstream_exhausted",
    )


async def test_pictures_are_kept_before_the_task_is_settled() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    seen: list[int] = []
    real = counter.store.finish

    async def finish(end: object) -> object:
        seen.append(len(counter.blobs.kept))
        return await real(end)  # type: ignore[arg-type]

    counter.store.finish = finish  # type: ignore[method-assign,assignment]

    await counter.order(links=True)

    assert seen == [1]


async def test_a_full_disk_fails_links_for_free_and_books_the_loss() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    counter.blobs.full = ServiceUnavailableError("full", code="storage_unavailable")

    with pytest.raises(ServiceUnavailableError, match="full"):
        await counter.order(links=True)

    assert counter.store.balance == RICH
    assert counter.store.waste_nanousd == CENT


async def test_a_full_disk_does_not_stop_an_answer_that_carries_its_pictures() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    counter.blobs.full = ServiceUnavailableError("full")

    view = await counter.order()

    assert view.charged_nanocredits == CHARGE
    assert len(view.pictures) == 1


@pytest.mark.parametrize("billed", list(Billed))
async def test_a_key_is_let_go_only_when_surely_nothing_was_bought(
    billed: Billed,
) -> None:
    counter = Counter(only=failing(FailureKind.OVERLOADED, billed=billed))

    with pytest.raises(ServiceUnavailableError):
        await counter.order()

    assert bool(counter.store.keys_forgotten) == (billed is Billed.NO)


async def test_a_key_is_kept_when_the_disk_was_full_after_the_purchase() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    counter.blobs.full = ServiceUnavailableError("full")

    with pytest.raises(ServiceUnavailableError):
        await counter.order(links=True)

    assert counter.store.keys_forgotten == []


@dataclass
class AwayBlobs(MemoryBlobs):
    """A store that is away for so many seconds from the start."""

    clock: LoopClock = field(default_factory=LoopClock)
    away_s: int = 0

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        if self.clock.monotonic_ms() < self.away_s * 1_000:
            raise store_away()
        return await MemoryBlobs.keep(self, blob, image, as_it_came=as_it_came)


async def order_later(counter: Counter) -> TaskView:
    task_id = counter.generate.new_task_id()
    accepted = await counter.generate.accept(
        task_id, counter.request(), KEY, later=Later("https://gateway.test")
    )
    assert isinstance(accepted, Accepted)
    return await counter.generate.carry_out(accepted, links=True)


def with_store_away(seconds: int) -> Counter:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    results = Results(AwayBlobs(away_s=seconds), counter.shop.clock)
    counter.generate = replace(counter.generate, results=results)
    return counter


async def test_what_an_async_task_bought_waits_for_a_store_that_is_away() -> None:
    counter = with_store_away(seconds=590)

    view = await order_later(counter)

    assert view.charged_nanocredits == CHARGE
    assert len(view.pictures) == 1
    assert counter.shop.clock.monotonic_ms() == 590_000


async def test_it_waits_ten_minutes_and_then_costs_nothing() -> None:
    counter = with_store_away(seconds=900)

    with pytest.raises(StoreAwayError) as refused:
        await order_later(counter)

    assert refused.value.code == "storage_unavailable"
    assert counter.store.balance == RICH
    assert counter.store.waste_nanousd == CENT
    assert counter.shop.clock.monotonic_ms() == STORE_AWAY_MAX_MS


async def test_who_waits_for_links_in_the_answer_is_told_at_once() -> None:
    counter = with_store_away(seconds=1)

    with pytest.raises(StoreAwayError):
        await counter.order(links=True)

    assert counter.store.balance == RICH
    assert counter.shop.clock.monotonic_ms() == 0


async def test_a_busy_store_is_asked_again_to_settle_what_was_bought() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))
    counter.store.refuse_to_finish = [ServiceUnavailableError("busy")] * 3

    view = await counter.order()

    assert view.charged_nanocredits == CHARGE


async def test_pictures_nobody_asked_for_are_let_go() -> None:
    done = delivered(3, USAGE.times(3))
    counter = Counter(cheap=ScriptedProvider(done))

    view = await counter.order(n=2)

    payloads = [i.payload for i in done.images if isinstance(i.payload, FakePayload)]
    assert len(view.pictures) == 2
    assert [p.closed for p in payloads] == [False, False, True]


async def test_what_is_kept_of_a_request_has_no_prompt() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))

    view = await counter.order(prompt="a secret garden", user="alice")

    kept = counter.store.tasks[view.id].request_json
    assert "garden" not in kept
    assert "alice" not in kept
    assert json.loads(kept)["size"] == "1024x1024"


async def test_the_decision_is_kept_with_the_task() -> None:
    counter = Counter(
        cheap=ScriptedProvider(delivered(usage=USAGE)),
        dear=ScriptedProvider(delivered(usage=USAGE)),
    )

    view = await counter.order()

    route = json.loads(counter.store.tasks[view.id].route_json or "[]")
    assert [(c["offer"], c["cost_usd"], c["eligible"]) for c in route] == [
        ("cheap/gpt-image-2", "0.01", True),
        ("dear/gpt-image-2", "0.02", True),
    ]


async def test_a_task_that_never_got_an_attempt_says_why() -> None:
    counter = Counter(only=failing(FailureKind.AUTH))
    for _ in range(3):
        with pytest.raises(GatewayError):
            await counter.order()

    *_, last = counter.store.tasks.values()
    assert last.attempts == ()
    assert json.loads(last.route_json or "[]")[0]["reason"] == "open: auth"


async def test_a_variant_that_nobody_sells_is_said_to_be_so() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    bare = replace(counter.generate, catalogue=Catalogue({"gpt-image-2": VARIANT}, {}))

    with pytest.raises(ServiceUnavailableError, match="No upstream is configured"):
        await bare.accept("task-unified-1-aaaaaaaa", counter.request(), KEY)

    assert counter.store.tasks == {}


# --- when the store fails in the middle ---


async def test_what_was_delivered_before_the_store_failed_is_delivered() -> None:
    counter = Counter(
        cheap=ScriptedProvider(delivered(3, USAGE.times(3))),
        dear=ScriptedProvider(delivered(2, USAGE.times(2))),
    )
    counter.store.refuse_to_begin = [False, True]

    view = await counter.order(n=5)

    assert len(view.pictures) == 3
    assert view.charged_nanocredits == 3 * CHARGE
    assert counter.store.balance.held == 0


async def test_an_attempt_that_could_not_be_ended_is_booked_as_maybe_billed() -> None:
    counter = Counter(only=failing(FailureKind.TIMEOUT))
    counter.store.refuse_to_end = [ServiceUnavailableError("busy")]

    with pytest.raises(ServiceUnavailableError) as caught:
        await counter.order()

    (task,) = counter.store.tasks.values()
    assert task.attempts[0].state is AttemptState.FAILED
    assert counter.store.waste_nanousd == CENT
    assert counter.store.balance == RICH
    assert caught.value.client_may_retry is False


async def test_both_lots_are_settled_in_one_go() -> None:
    counter = Counter(
        cheap=ScriptedProvider(delivered(3, USAGE.times(3))),
        dear=ScriptedProvider(delivered(2, USAGE.times(2))),
    )
    counter.store.refuse_to_finish = [ServiceUnavailableError("busy")] * 2

    view = await counter.order(n=5)

    (task,) = counter.store.tasks.values()
    assert [a.state for a in task.attempts] == [AttemptState.DONE] * 2
    assert view.charged_nanocredits == 5 * CHARGE


async def test_an_adapter_with_a_bug_fails_its_attempt_and_the_next_one_serves() -> (
    None
):
    async def bug(job: ImageJob) -> Done:
        raise KeyError(job.task_id)

    counter = Counter(
        cheap=ScriptedProvider(bug), dear=ScriptedProvider(delivered(usage=USAGE))
    )

    view = await counter.order()

    assert view.charged_nanocredits == CHARGE
    assert [type(error) for error, _ in counter.shop.crashes] == [KeyError]
    assert counter.store.waste_nanousd == CENT


# --- formats and partial pictures ---


async def test_what_comes_in_another_format_is_converted() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered(usage=USAGE)))

    view = await counter.order(output_format="webp", output_compression=70)

    assert counter.studio.asked == [("webp", 70)]
    assert view.facts is not None
    assert view.facts.output_format == "webp"
    assert view.pictures[0].media_type == "image/webp"


async def test_an_offer_without_the_format_is_asked_for_one_that_it_has() -> None:
    cheap = ScriptedProvider(delivered(usage=USAGE))
    counter = Counter(cheap=cheap)
    only_png = replace(
        counter.shop.offers[0],
        capabilities=Capabilities(output_formats=frozenset({"png"})),
    )
    counter.catalogue.offers["gpt-image-2"] = (only_png,)  # type: ignore[index]

    view = await counter.order(output_format="jpeg", output_compression=70)

    assert cheap.jobs[0].output_format == "png"
    assert cheap.jobs[0].output_compression is None
    assert view.pictures[0].media_type == "image/jpeg"


async def test_partial_pictures_are_shown_where_the_upstream_has_them() -> None:
    cheap = ScriptedProvider(delivered(usage=USAGE))
    cheap.streams = True
    counter = Counter(cheap=cheap)
    shown: list[Partial] = []
    request = counter.request(stream=True, partial_images=2)

    accepted = await counter.generate.accept("task-unified-1-aaaaaaaa", request, KEY)
    assert isinstance(accepted, Accepted)
    view = await counter.generate.carry_out(
        accepted, links=False, on_partial=shown.append
    )

    assert [partial.index for partial in shown] == [0, 1]
    assert len(view.pictures) == 1


# --- recovery ---


def recovery_of(counter: Counter) -> Recovery:
    clock, events = counter.shop.clock, counter.shop.events
    return Recovery(counter.store, FakeProcesses(), "this", clock, events)


async def test_who_leaves_waits_for_no_store_that_does_not_answer() -> None:
    class Silent(FakeProcesses):
        async def leave(self, process_id: str) -> None:
            await asyncio.Event().wait()

    counter = Counter(cheap=ScriptedProvider(delivered()))
    recovery = replace(recovery_of(counter), processes=Silent())

    async with asyncio.timeout(2 * LEAVE_MAX_S):
        with pytest.raises(TimeoutError):
            await recovery.leave()


async def test_what_a_dead_process_left_is_failed_for_free_and_booked() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    await counter.generate.accept("task-unified-1-aaaaaaaa", counter.request(), KEY)
    await counter.store.begin_attempt(
        NewAttempt("task-unified-1-aaaaaaaa", 1, "cheap/gpt-image-2", "cheap", CENT, 0)
    )

    closed = await recovery_of(counter).after_start(alone=True)

    task = counter.store.tasks["task-unified-1-aaaaaaaa"]
    assert closed == 1
    assert task.state is TaskState.FAILED
    assert task.attempts[0].state is AttemptState.FAILED
    assert counter.store.balance == RICH
    assert counter.store.waste_nanousd == CENT


async def test_of_a_task_that_two_processes_find_left_one_tells() -> None:
    class Both:
        """Shows each of two what is open before either closes it."""

        def __init__(self, store: MemoryStore) -> None:
            self.finish = store.finish
            self.store, self.read = store, asyncio.Barrier(2)

        async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
            found = await self.store.orphaned(limit)
            await self.read.wait()
            return found

    counter = Counter(cheap=ScriptedProvider(delivered()))
    await counter.generate.accept("task-unified-1-aaaaaaaa", counter.request(), KEY)
    store: Any = Both(counter.store)
    first, second = (replace(recovery_of(counter), store=store) for _ in range(2))

    await asyncio.gather(first.after_start(alone=True), second.after_start(alone=True))

    told = [e for e in counter.shop.events.seen if isinstance(e, TaskFinished)]
    assert [event.outcome for event in told] == ["gateway_error"]


async def test_recovery_closes_more_tasks_than_one_batch_holds() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    for i in range(450):
        task_id = f"task-unified-1-{i:08}"
        await counter.generate.accept(task_id, counter.request(), KEY)

    assert await recovery_of(counter).after_start(alone=True) == 450
    assert counter.store.balance == RICH


async def test_a_process_whose_clock_is_set_forward_is_not_lost_to_itself() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    recovery = recovery_of(counter)
    there = FakeProcesses()
    recovery.processes = there
    for _ in range(BEATS_BEFORE_JUDGING):
        await recovery.beat()
    there.seen = dict.fromkeys(("this", "gone"), 0)

    await recovery.lost()

    assert set(there.seen) == {"this"}
    assert there.seen["this"] == counter.shop.clock.now_ms()


async def test_while_serving_only_what_is_long_overdue_is_closed() -> None:
    counter = Counter(cheap=ScriptedProvider(delivered()))
    await counter.generate.accept("task-unified-1-aaaaaaaa", counter.request(), KEY)
    recovery = recovery_of(counter)

    await counter.shop.clock.sleep(300 + HOLD_KEPT_MS / 1000)
    assert await recovery.overdue() == 0

    await counter.shop.clock.sleep(1)
    assert await recovery.overdue() == 1
