"""A worker: what it takes, what it lets go of, and who gets in its way."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from gateway.adapters.sql.database import StoreBusyError
from gateway.core.catalogue import Catalogue
from gateway.core.errors import InvalidRequestError
from gateway.core.orders import order_json
from gateway.core.tasks import TAKEOVERS_MAX, DeliveryMode, TaskState
from gateway.flows.generate import Accepted, Later
from gateway.flows.inputs import NO_INPUTS, Inputs, KeptInputs
from gateway.ports import AttemptRecord, Claimed, Lease, Queue, TaskRecord
from gateway.workers import RENEW_EVERY_S, Worker
from providers.kit.contract import (
    Billed,
    Cancelled,
    Done,
    FailureKind,
    ImageJob,
    InputFile,
    Pending,
    ProviderError,
)
from tests.fakes import FakePayload, ScriptedProvider, delivered
from tests.flows.test_dispatch import taking, working
from tests.flows.test_generate import KEY, VARIANT, Counter
from tests.flows.test_taking_up import an_attempt

IMAGE, OTHER = "gpt-image-2", "other-image"
FENCE = 3


@dataclass
class Kept:
    """Inputs that were kept for a task."""

    inputs: Inputs = NO_INPUTS
    is_gone: bool = False
    forgotten: list[str] = field(default_factory=list)

    async def load(self, task_id: str, request: object) -> Inputs:
        assert task_id
        assert request
        if self.is_gone:
            raise InvalidRequestError("A picture of this task is not kept any more.")
        return self.inputs

    async def forget(self, task_id: str) -> None:
        self.forgotten.append(task_id)


@dataclass
class Line:
    """A queue: hands out what waits, first come, first served.

    It answers each renewal with the next of its answers; the last one repeats.
    """

    answers: list[Lease | Exception] = field(default_factory=lambda: [Lease(held=True)])
    waiting: list[Claimed] = field(default_factory=list)
    held: list[Collection[str]] = field(default_factory=list)
    """What was held at each claim."""
    released: list[tuple[str, int]] = field(default_factory=list)
    takes_s: float = 0.0
    """How long each claim takes."""
    troubles: list[Exception] = field(default_factory=list)
    """What the next claims end with."""
    times_ms: list[int] = field(default_factory=list)

    async def claim(
        self, *, now_ms: int, lease_ms: int, held: Collection[str], full: list[str]
    ) -> Claimed | None:
        self.held.append(held)
        await asyncio.sleep(self.takes_s)
        if self.troubles:
            raise self.troubles.pop(0)
        for claimed in self.waiting:
            if claimed.record.variant not in full:
                self.waiting.remove(claimed)
                return claimed
        return None

    async def renew(self, *_: object, now_ms: int, lease_ms: int) -> Lease:
        assert lease_ms
        self.times_ms.append(now_ms)
        last = len(self.answers) == 1
        answer = self.answers[0] if last else self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def release(self, task_id: str, fence: int) -> None:
        self.released.append((task_id, fence))


@dataclass
class Office:
    """A worker's surroundings: a counter that sells two variants, and a queue."""

    counter: Counter
    line: Line = field(default_factory=Line)
    kept: Kept = field(default_factory=Kept)
    crashes: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        offers = self.counter.shop.offers
        self.catalogue = Catalogue(
            {IMAGE: VARIANT, OTHER: replace(VARIANT, name=OTHER)},
            {IMAGE: offers, OTHER: tuple(replace(o, variant=OTHER) for o in offers)},
        )
        self.generate = replace(self.counter.generate, catalogue=self.catalogue)

    def worker(
        self, at_once: int = 1, places: Mapping[str, int] | None = None
    ) -> Worker:
        return Worker(
            queue=cast("Queue", self.line),
            generate=self.generate,
            catalogue=self.catalogue,
            kept_inputs=cast("KeptInputs", self.kept),
            clock=self.counter.shop.clock,
            crashed=lambda error, _: self.crashes.append(error),
            at_once=at_once,
            places=places or {},
        )

    async def claimed(
        self, *history: AttemptRecord, variant: str = IMAGE, cancelled: bool = False
    ) -> Claimed:
        """Accept a task, and take it from the queue."""
        request = replace(
            self.counter.request(), variant=self.catalogue.variants[variant]
        )
        task_id = self.generate.new_task_id()
        later = Later("http://gateway.test")
        opened = await self.generate.accept(task_id, request, KEY, later=later)
        assert isinstance(opened, Accepted)
        record = replace(
            self.task(task_id),
            mode=DeliveryMode.ASYNC,
            state=TaskState.PROCESSING,
            attempts=history,
            deadline_ms=self.counter.shop.clock.now_ms() + 900_000,
        )
        self.counter.store.tasks[task_id] = record
        order = order_json(request, 0, has_mask=False)
        return Claimed(record, order, FENCE, 1, cancelled)

    async def work(
        self, *history: AttemptRecord, cancelled: bool = False
    ) -> TaskRecord:
        """Carry one task out."""
        claimed = await self.claimed(*history, cancelled=cancelled)
        await self.worker().carry(claimed)
        return self.task(claimed.record.id)

    def task(self, task_id: str) -> TaskRecord:
        return self.counter.store.tasks[task_id]


async def carrying(worker: Worker, seconds: float = 1) -> asyncio.Task[None]:
    """Let a worker run for a while; what it took then goes on."""
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(seconds)
    return running


def under_way(worker: Worker) -> Tally[str]:
    return Tally(held.variant for held in worker._running.values())


# --- one task ---


async def test_a_store_that_is_busy_for_a_moment_costs_no_paid_work() -> None:
    counter = Counter(cheap=taking(20))
    office = Office(counter, Line([StoreBusyError("busy"), Lease(held=True)]))

    task = await office.work()

    assert task.state is TaskState.COMPLETED
    assert len(counter.shop.upstreams["cheap"].jobs) == 1
    assert office.kept.forgotten == [task.id]


async def test_inputs_are_kept_for_whoever_takes_up_what_could_not_be_closed() -> None:
    counter = Counter(cheap=working())
    counter.store.refuse_to_finish = [StoreBusyError("busy")] * 100
    office = Office(counter)

    task = await office.work()

    assert not task.state.final
    assert office.kept.forgotten == []
    assert len(office.crashes) == 1


async def test_what_is_kept_for_a_task_that_nobody_can_carry_out_is_forgotten() -> None:
    office = Office(Counter(cheap=working()))
    tried = replace(await office.claimed(), takeovers=TAKEOVERS_MAX + 1)
    alien = replace(await office.claimed(), order_json='{"variant": "gone"}')
    lost = await office.claimed()
    worker = office.worker()

    await worker.carry(tried)
    await worker.carry(alien)
    office.kept.is_gone = True
    await worker.carry(lost)

    ids = [claimed.record.id for claimed in (tried, alien, lost)]
    assert office.kept.forgotten == ids
    assert {office.task(task_id).state for task_id in ids} == {TaskState.FAILED}
    assert office.crashes == []


async def test_who_takes_a_cancelled_task_over_buys_nothing_for_it() -> None:
    stopped = ProviderError(
        FailureKind.TIMEOUT, "canceled", billed=Billed.YES, ended=True
    )
    dear = working()
    counter = Counter(cheap=ScriptedProvider(stopped), dear=dear)
    office = Office(counter, Line([Lease(held=True, cancelled=True)]))
    begun = an_attempt(counter.shop, job_id="job-1")

    task = await office.work(begun, cancelled=True)

    assert task.state is TaskState.CANCELLED
    assert dear.jobs == []


async def test_who_takes_a_cancelled_task_over_gives_its_spools_back() -> None:
    spool = FakePayload(b"a photo")
    inputs = Inputs((InputFile(spool, "image/png", 64, 64),))
    office = Office(Counter(cheap=working()), kept=Kept(inputs))

    task = await office.work(cancelled=True)

    assert task.state is TaskState.CANCELLED
    assert spool.closed
    assert office.kept.forgotten == [task.id]


async def test_the_lease_is_renewed_while_upstreams_are_told_to_stop() -> None:
    class Slow(ScriptedProvider):
        async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
            await asyncio.sleep(9)
            return await super().cancel(job, job_id)

    cheap = Slow(Pending("job-1", 50))
    cheap.can_stop = True
    cheap.stops = Cancelled()
    line = Line([Lease(held=True), Lease(held=True, cancelled=True)])

    task = await Office(Counter(cheap=cheap), line).work()

    assert task.state is TaskState.CANCELLED
    assert cheap.stopped == ["job-1"]
    pauses = [b - a for a, b in zip(line.times_ms, line.times_ms[1:], strict=False)]
    assert len(pauses) >= 4
    assert set(pauses) == {round(RENEW_EVERY_S * 1000)}


# --- many tasks ---


async def test_who_is_stopped_takes_nothing_more_and_ends_what_was_taken() -> None:
    office = Office(Counter(cheap=taking(20)))
    first, second = await office.claimed(), await office.claimed()
    office.line.waiting = [first, second]
    worker = office.worker(at_once=1)
    running = await carrying(worker)

    worker.stop()
    await asyncio.wait_for(running, 5)

    assert worker.in_flight == 1
    assert await worker.drain(5) == 1
    assert await worker.drain(60) == 0
    assert office.task(first.record.id).state is TaskState.COMPLETED
    assert office.line.waiting == [second]


async def test_what_is_claimed_while_a_worker_is_stopped_is_let_go_of() -> None:
    cheap = working()
    office = Office(Counter(cheap=cheap), Line(takes_s=2))
    task = await office.claimed()
    office.line.waiting = [task]
    worker = office.worker()
    running = await carrying(worker)

    worker.stop()
    await asyncio.wait_for(running, 5)

    assert worker.in_flight == 0
    assert office.line.released == [(task.record.id, FENCE)]
    assert cheap.jobs == []


async def test_a_claim_that_goes_wrong_is_told_and_tried_again() -> None:
    office = Office(Counter(cheap=taking(60)))
    office.line.troubles = [StoreBusyError("busy"), ValueError("a row nobody expected")]
    office.line.waiting = [await office.claimed()]
    worker = office.worker()

    await carrying(worker, 20)

    assert [type(error) for error in office.crashes] == [StoreBusyError, ValueError]
    assert worker.in_flight == 1


async def test_what_only_waits_for_a_job_is_handed_over_and_polled_on() -> None:
    async def slow(job: ImageJob) -> Done:
        await asyncio.sleep(100)
        return delivered(job.n)

    cheap = ScriptedProvider(Pending("job-1", 50), slow, delivered())
    cheap.can_stop = True
    office = Office(Counter(cheap=cheap))
    waits, calls = await office.claimed(), await office.claimed()
    office.line.waiting = [waits, calls]
    worker = office.worker(at_once=2)
    running = await carrying(worker)
    worker.stop()
    await asyncio.wait_for(running, 5)

    assert await worker.hand_over() == 1

    assert office.line.released == [(waits.record.id, FENCE)]
    assert worker.in_flight == 1
    assert cheap.stopped == []
    left = replace(waits, record=office.task(waits.record.id), fence=FENCE + 1)
    assert not left.record.state.final
    assert office.kept.forgotten == []
    await office.worker().carry(left)
    assert await worker.drain(200) == 0
    ended = [office.task(claimed.record.id).state for claimed in (waits, calls)]
    assert ended == [TaskState.COMPLETED] * 2
    assert len(cheap.jobs) == 2


async def test_who_leaves_lets_go_of_a_call_as_soon_as_it_is_a_job() -> None:
    async def slow(_: ImageJob) -> Pending:
        await asyncio.sleep(5)
        return Pending("job-2", 50_000)

    office = Office(Counter(cheap=ScriptedProvider(Pending("job-1", 50_000), slow)))
    waits, calls = await office.claimed(), await office.claimed()
    office.line.waiting = [waits, calls]
    worker = office.worker(at_once=2)
    await carrying(worker)

    await asyncio.wait_for(worker.leave(), 10)

    let_go = [(task.record.id, FENCE) for task in (waits, calls)]
    assert office.line.released == let_go
    assert worker.in_flight == 0


async def test_a_store_that_is_away_while_tasks_are_handed_over_loses_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    office = Office(Counter(cheap=ScriptedProvider(Pending("job-1", 50), delivered())))
    task = await office.claimed()
    office.line.waiting = [task]
    worker = office.worker()
    await carrying(worker)

    async def away(_: str) -> TaskRecord | None:
        raise StoreBusyError("busy")

    async def broken(_: str) -> TaskRecord | None:
        raise ValueError("a row nobody expected")

    for trouble in (away, broken):
        with monkeypatch.context() as patch:
            patch.setattr(office.counter.store, "get", trouble)
            assert await worker.hand_over() == 0

    assert [type(error) for error in office.crashes] == [ValueError]
    assert await worker.drain(100) == 0
    assert office.task(task.record.id).state is TaskState.COMPLETED


async def test_a_variant_without_a_free_place_keeps_no_other_waiting() -> None:
    office = Office(Counter(cheap=taking(20)))
    wanted = [IMAGE, IMAGE, IMAGE, OTHER]
    office.line.waiting = [await office.claimed(variant=each) for each in wanted]
    worker = office.worker(at_once=4, places={IMAGE: 1, OTHER: 2})

    await carrying(worker)

    assert under_way(worker) == {IMAGE: 1, OTHER: 1}


async def test_a_variant_with_a_place_for_all_that_a_worker_may_do_leaves_some() -> (
    None
):
    office = Office(Counter(cheap=taking(20)))
    wanted = [*[IMAGE] * 64, OTHER]
    office.line.waiting = [await office.claimed(variant=each) for each in wanted]
    worker = office.worker(at_once=64, places={IMAGE: 64, OTHER: 10})

    await carrying(worker)

    assert under_way(worker) == {IMAGE: 62, OTHER: 1}


async def test_an_only_variant_has_all_places() -> None:
    office = Office(Counter(cheap=taking(20)))
    office.line.waiting = [await office.claimed() for _ in range(33)]
    worker = office.worker(at_once=32, places={IMAGE: 40})

    await carrying(worker)

    assert worker.in_flight == 32


async def test_a_worker_of_two_takes_its_half_and_tells_the_other_of_what_is_left() -> (
    None
):
    office = Office(Counter(cheap=taking(20)))
    wanted = [*[IMAGE] * 5, *[OTHER] * 5]
    office.line.waiting = [await office.claimed(variant=each) for each in wanted]
    worker = office.worker(at_once=8, places={IMAGE: 6, OTHER: 6})
    worker.share = lambda most: most // 2
    told: list[str] = []
    worker.tell_others = lambda: told.append("look")

    worker.wake_any()
    assert told == []

    await carrying(worker)
    worker.wake_any()

    assert under_way(worker) == {IMAGE: 3, OTHER: 1}
    assert told == ["look"]


async def test_what_a_store_is_told_to_be_held_does_not_change_in_its_hands() -> None:
    office = Office(Counter(cheap=taking(20)))
    office.line.waiting = [await office.claimed() for _ in range(2)]

    await carrying(office.worker(at_once=3))

    assert [len(held) for held in office.line.held[:3]] == [0, 1, 2]
