"""Supervised work: tasks that outlive their request, and loops that keep house."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.core.catalogue import Catalogue
from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    ServiceUnavailableError,
)
from gateway.core.events import LeaseExpired
from gateway.core.orders import request_from
from gateway.core.tasks import (
    TAKEOVERS_MAX,
    TAKEOVERS_WITH_JOB_MAX,
    DeliveryMode,
    FencedError,
)
from gateway.flows.generate import Accepted, Generate
from gateway.flows.inputs import NO_INPUTS, KeptInputs
from gateway.flows.tasks import TaskView
from gateway.ports import Claimed, Clock, NewTask, Queue, TaskRecord
from providers.kit.contract import Partial

LEASE_MS = 30_000
RENEW_EVERY_S = 3.0
POLL_EVERY_S = 1.0
HAND_OVER_EVERY_S = 2.0
WORKING_MAX_TASKS = 512
"""Of one process."""
PLACES_PER_SPARE = 32
"""Of so many places of a worker one is kept for variants with few tasks under way."""
TAKE_UP_MIN_MS = 60_000
"""Time to fetch pictures that are made, even if the task's own time is over."""

Crashed = Callable[[BaseException, str], None]
T = TypeVar("T")


class _CancelledByOwnerError(Exception):
    """The owner of a task has cancelled it; the work on it was stopped."""


@dataclass(slots=True)
class TaskRunner:
    """Carries tasks out to their end, whoever waits for them."""

    generate: Generate
    crashed: Crashed
    _running: set[asyncio.Task[TaskView]] = field(default_factory=set)

    def start(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None = None,
    ) -> asyncio.Task[TaskView]:
        """Start carrying a task out."""
        work = asyncio.create_task(
            self._guarded(accepted, on_partial=on_partial, links=links)
        )
        self._running.add(work)
        work.add_done_callback(self._over)
        return work

    @property
    def in_flight(self) -> int:
        """How many tasks are under way."""
        return len(self._running)

    async def drain(self) -> None:
        """Wait until nothing is under way."""
        while self._running:
            await asyncio.wait(self._running)

    def _over(self, work: asyncio.Task[TaskView]) -> None:
        self._running.discard(work)
        if not work.cancelled():
            work.exception()  # read here, since the client may be gone

    async def _guarded(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None,
    ) -> TaskView:
        try:
            return await self.generate.carry_out(
                accepted, links=links, on_partial=on_partial
            )
        except GatewayError:
            raise
        except Exception as error:
            internal = GatewayError(
                "Something went wrong in the gateway itself. You were not charged. "
                "Send the task id to the operator.",
                client_may_retry=False,
            )
            await self.generate.give_up(accepted, internal)
            self.crashed(error, accepted.task.id)
            raise internal from error


@dataclass(slots=True)
class Worker:
    """Carries async tasks out, as many at once as it may; one per process.

    ``places`` is how many of each variant: a slow upstream keeps its own tasks waiting,
    and no others.

    Both are for the whole fleet: ``share`` tells this process's part of them.
    ``tell_others`` wakes the workers of other processes. ``beside`` tells what those of
    this process work on that were stopped.

    A task is claimed for a short lease that is renewed while the work goes on. Whoever
    finds a lease ended takes the task over: what had a job id is polled on, what may
    have been bought is bought again at most once, what was never sent is routed anew.
    """

    queue: Queue
    generate: Generate
    catalogue: Catalogue
    kept_inputs: KeptInputs
    clock: Clock
    crashed: Callable[[BaseException, str], None]
    at_once: int
    places: Mapping[str, int] = field(default_factory=dict)
    share: Callable[[int], int] = int
    tell_others: Callable[[], None] = lambda: None
    beside: Callable[[], frozenset[str]] = frozenset
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _running: dict[str, _Held] = field(default_factory=dict)
    _stopped: bool = False

    def wake(self) -> None:
        """Say that there is something to do."""
        self._news.set()

    def wake_any(self) -> None:
        """Say so to the others too, if this one may not be able to do it."""
        self.wake()
        busy = len(self._running) >= self._most
        if self._stopped or busy or self._full():
            self.tell_others()

    @property
    def _most(self) -> int:
        return min(WORKING_MAX_TASKS, self.share(self.at_once))

    @property
    def working(self) -> frozenset[str]:
        """The ids of the tasks that are being worked on."""
        return frozenset(self._running)

    @property
    def in_flight(self) -> int:
        """How many tasks are being worked on."""
        return len(self._running)

    def stop(self) -> None:
        """Take no further task; what was taken goes on."""
        self._stopped = True
        self._news.set()

    async def run(self) -> None:
        """Take tasks until stopped or cancelled; what was taken then goes on."""
        while not self._stopped:
            claimed = None
            if len(self._running) < self._most:
                claimed = await self._claimed()
            if claimed is not None:
                self._start(claimed)
                continue
            self._news.clear()
            try:
                async with asyncio.timeout(POLL_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                continue

    async def leave(self) -> None:
        """Take no further task; end, or let go of, all that were taken."""
        self.stop()
        while self._running:
            # A call that becomes a job meanwhile is let go of then.
            await self.hand_over()
            await self.drain(HAND_OVER_EVERY_S)

    async def drain(self, at_most_s: float) -> int:
        """Wait for what was taken; returns how many did not end in time."""
        if not self._running:
            return 0
        doing = [held.work for held in self._running.values()]
        _, late = await asyncio.wait(doing, timeout=at_most_s)
        return len(late)

    async def hand_over(self) -> int:
        """Let go of tasks that only wait for jobs; returns how many.

        Whoever takes them up polls on: nothing is lost by it.
        """
        given = 0
        for task_id, held in list(self._running.items()):
            try:
                given += await self._let_go(task_id, held)
            except ServiceUnavailableError:
                continue
            except Exception as error:  # noqa: BLE001 - a supervisor: others may do
                self.crashed(error, task_id)
        if given:
            self.tell_others()
        return given

    async def _let_go(self, task_id: str, held: _Held) -> bool:
        record = await self.generate.store.get(task_id)
        if record is None or record.state.final or not _only_waits(record):
            return False
        held.work.cancel()
        await asyncio.wait({held.work})
        await self.queue.release(task_id, held.fence)
        return True

    async def _claimed(self) -> Claimed | None:
        try:
            claimed = await self.queue.claim(
                now_ms=self.clock.now_ms(),
                lease_ms=LEASE_MS,
                # The store reads it in its own time.
                held=self.working | self.beside(),
                full=self._full(),
            )
            if claimed is not None and self._stopped:
                await self.queue.release(claimed.record.id, claimed.fence)
                return None
        except Exception as error:  # noqa: BLE001 - a supervisor: the next try may do
            self.crashed(error, "claiming a task")
            await self._store_is_back()
            return None
        return claimed

    def _full(self) -> list[str]:
        # The last places of all are for variants with few tasks: a variant with a place
        # for every slot, where slots are more than places, would take the others' too.
        begun = Counter(held.variant for held in self._running.values())
        places = {variant: self.share(most) for variant, most in self.places.items()}
        spare = 0
        if len(places) > 1 and sum(places.values()) > self._most:
            spare = self._most // PLACES_PER_SPARE
        is_tight = self._most - len(self._running) <= spare
        few = max(1, spare // max(1, len(places)))
        return [
            variant
            for variant, most in places.items()
            if begun[variant] >= (min(most, few) if is_tight else most)
        ]

    async def _store_is_back(self) -> None:
        # Leases may have ended meanwhile whose owners are well: they renew them first.
        while True:
            await self.clock.sleep(POLL_EVERY_S)
            with suppress(ServiceUnavailableError):
                await self.generate.store.get("")
                break
        await self.clock.sleep(2 * RENEW_EVERY_S)

    def _start(self, claimed: Claimed) -> None:
        task_id = claimed.record.id
        if claimed.expired:
            lost = LeaseExpired(task_id, claimed.record.variant, claimed.takeovers)
            self.generate.events.emit(lost)
        work = asyncio.create_task(self.carry(claimed))
        self._running[task_id] = _Held(work, claimed.record.variant, claimed.fence)

        def over(_: asyncio.Task[None]) -> None:
            self._running.pop(task_id, None)
            self._news.set()

        work.add_done_callback(over)

    async def carry(self, claimed: Claimed) -> None:
        """Carry a claimed task out; never raises."""
        try:
            await self._carried_out(claimed)
        except FencedError:
            return  # somebody else has it now
        except GatewayError as error:
            await self._forget_if_over(claimed.record.id, error)
        except Exception as error:  # noqa: BLE001 - a supervisor
            # Left to be taken over when its lease ends, a bounded number of times.
            self.crashed(error, claimed.record.id)

    async def _forget_if_over(self, task_id: str, error: GatewayError) -> None:
        # What could not be closed is taken over, and needs its pictures then.
        with suppress(ServiceUnavailableError):
            record = await self.generate.store.get(task_id)
            if record is None or record.state.final:
                await self.kept_inputs.forget(task_id)
                return
        self.crashed(error, task_id)

    async def _carried_out(self, claimed: Claimed) -> None:
        accepted = await self._accepted(claimed)
        if accepted is None:
            await self.generate.abandon(claimed)
        else:
            try:
                await self._ended(claimed, accepted)
            finally:
                accepted.inputs.close()
        await self.kept_inputs.forget(claimed.record.id)

    async def _ended(self, claimed: Claimed, accepted: Accepted) -> None:
        if claimed.cancelled or not await self._worked_off(claimed, accepted):
            cancelling = self.generate.cancel(accepted)
            left = await self._held(claimed, cancelling, heeds=False)
            if left is not None:
                await self._worked_off(claimed, left)

    async def _worked_off(self, claimed: Claimed, accepted: Accepted) -> bool:
        # False: its owner cancelled it meanwhile, and the work on it was stopped.
        work = self.generate.carry_out(accepted, links=True)
        try:
            view = await self._held(claimed, work, heeds=accepted.buys)
        except _CancelledByOwnerError:
            return False
        for picture in view.pictures:
            if picture.made is not None:
                picture.made.payload.close()
        return True

    async def _held(
        self, claimed: Claimed, work: Coroutine[object, object, T], *, heeds: bool
    ) -> T:
        # Does some work on a task while its lease is renewed.
        doing = asyncio.ensure_future(work)
        try:
            await self._kept_alive(claimed, doing, heeds=heeds)
        finally:
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})
        if doing.cancelled():
            raise _CancelledByOwnerError
        return doing.result()

    async def _accepted(self, claimed: Claimed) -> Accepted | None:
        # None: nobody can carry it out, or too many tried.
        record = claimed.record
        request = request_from(claimed.order_json, self.catalogue)
        if request is None or claimed.takeovers > _takeovers_max(record):
            return None
        left_ms = record.deadline_ms - self.clock.now_ms()
        if _has_job(record):
            left_ms = max(left_ms, TAKE_UP_MIN_MS)
        # A sync task has kept nothing but what it takes to find its job again.
        is_async = record.mode is DeliveryMode.ASYNC
        inputs = NO_INPUTS
        if is_async:
            try:
                inputs = await self.kept_inputs.load(record.id, request)
            except InvalidRequestError:
                return None
        return Accepted(
            task=NewTask(
                id=record.id,
                tenant_id=record.tenant_id,
                key_id=record.key_id,
                variant=record.variant,
                operation=record.operation,
                mode=record.mode,
                request_json=record.request_json,
                hold_nanocredits=record.hold_nanocredits,
                created_ms=record.created_ms,
                deadline_ms=record.deadline_ms,
            ),
            request=request,
            deadline_mono_ms=self.clock.monotonic_ms() + left_ms,
            inputs=inputs,
            fence=claimed.fence,
            history=record.attempts,
            buys=is_async,
            since_mono_ms=self.clock.monotonic_ms(),
        )

    async def _kept_alive(
        self, claimed: Claimed, work: asyncio.Future[T], *, heeds: bool
    ) -> None:
        # Until the work is done or, if that is to be heeded, its owner cancels it.
        while True:
            await asyncio.wait({work}, timeout=RENEW_EVERY_S)
            if work.done():
                return
            try:
                lease = await self.queue.renew(
                    claimed.record.id,
                    claimed.fence,
                    now_ms=self.clock.now_ms(),
                    lease_ms=LEASE_MS,
                )
            except ServiceUnavailableError:
                continue  # nobody else can claim it then; what is paid is worth a wait
            if not lease.held:
                raise FencedError(claimed.record.id)
            if heeds and lease.cancelled:
                return


@dataclass(frozen=True, slots=True)
class _Held:
    work: asyncio.Task[None]
    variant: str
    fence: int


def _only_waits(record: TaskRecord) -> bool:
    open_ones = [a for a in record.attempts if a.finished_ms is None]
    return bool(open_ones) and all(a.job_id is not None for a in open_ones)


def _has_job(record: TaskRecord) -> bool:
    return any(
        attempt.job_id is not None and attempt.finished_ms is None
        for attempt in record.attempts
    )


def _takeovers_max(record: TaskRecord) -> int:
    return TAKEOVERS_WITH_JOB_MAX if _has_job(record) else TAKEOVERS_MAX


@dataclass(frozen=True, slots=True)
class Loops:
    """Runs chores again and again: each by its own period, none stops another."""

    clock: Clock
    crashed: Crashed
    chores: Mapping[str, tuple[float, Callable[[], Awaitable[object]]]]

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name, (period_s, chore) in self.chores.items():
                group.create_task(self._repeat(name, period_s, chore))

    async def _repeat(
        self, name: str, period_s: float, chore: Callable[[], Awaitable[object]]
    ) -> None:
        while True:
            await self.clock.sleep(period_s)
            try:
                await chore()
            except Exception as error:  # noqa: BLE001 - a supervisor: the next run may do
                self.crashed(error, name)
