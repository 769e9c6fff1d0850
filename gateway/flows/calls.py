"""The life of one call to an upstream: begun, carried out or given up, written down.

Its deadline is kept here, and an adapter that breaks its contract is caught here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from gateway.core.catalogue import Offer
from gateway.core.errors import GatewayError, ServiceUnavailableError
from gateway.core.events import AttemptFinished
from gateway.core.pricing import REPORTED, real_cost
from gateway.core.routing import NO_PREFERENCES, Preferences, Wish
from gateway.core.tasks import STOPPED, AttemptState, FencedError
from gateway.flows.line import Place
from gateway.ports import (
    AttemptEnd,
    AttemptRecord,
    Clock,
    Events,
    NewAttempt,
    TaskStore,
)
from providers.kit.contract import (
    Billed,
    Cancelled,
    Done,
    FailureKind,
    ImageJob,
    Partial,
    Pending,
    Provider,
    ProviderError,
)

ATTEMPT_MAX_MS = 240_000
ANOTHER_MS = 90_000
"""What a call leaves of the deadline where another offer could be tried after it."""
ANSWER_RESERVE_MS = 5_000
"""Kept back from the deadline for storing, settling and answering."""
POLL_MIN_S = 0.2
LOOK_AGAIN_S = 1.0
LOOK_AGAIN_MAX_S = 15.0
"""Between two looks at a job that fail: doubling, from the one to the other."""
ASKED_MAX_S = 60.0
"""So long an upstream may ask to be left alone by looks at a job: what is made and paid
must not be missed for it."""
LOOK_DOUBLINGS_MAX = 4
ACCEPT_PAUSE_S = 1.0
STOP_MAX_S = 10.0
STOP_AT_END_MAX_S = 2.0
"""Out of ``ANSWER_RESERVE_MS``: to stop a job, and to look at it a last time."""
REREADABLE = frozenset(
    {
        FailureKind.NETWORK,
        FailureKind.TIMEOUT,
        FailureKind.BAD_GATEWAY,
        FailureKind.OVERLOADED,
        FailureKind.RATE_LIMITED,
    }
)
"""Failures of a call after which the same one may go well."""
LOOKED_AT_AGAIN = REREADABLE | {FailureKind.AUTH, FailureKind.INSUFFICIENT_FUNDS}
"""Failures of a look after which the job itself may be well."""
THE_CLIENTS = frozenset({FailureKind.INVALID_REQUEST, FailureKind.CONTENT_POLICY})
"""What a job that was refused before is refused for again."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be bought for one task.

    ``job`` lacks only the upstream's model id and how many of ``n`` to make.
    ``cost_nanousd(offer, n)`` estimates what n pictures cost there, None if unknown.
    ``deadline_ms`` is on the monotonic clock. ``on_partial``, where given, is handed
    partial pictures as they come, and owns them.
    """

    job: ImageJob
    wish: Wish
    variant: str
    offers: tuple[Offer, ...]
    cost_nanousd: Callable[[Offer, int], int | None]
    deadline_ms: int
    today: str
    on_partial: Callable[[Partial], None] | None = None
    fence: int = 0
    history: tuple[AttemptRecord, ...] = ()
    """Attempts that another worker made before it was lost."""
    patient: bool = False
    """Whether to wait, up to the deadline, while every offer is shut or resting."""
    buys: bool = True
    """Whether to buy what is missing, or only to take up what ``history`` holds."""
    order_json: Callable[[], str] | None = None
    """Writes the request down, to be kept with a job id if nothing else keeps it."""
    preferences: Preferences = NO_PREFERENCES
    tenant_id: str = ""
    place: Place | None = None
    """Where it stands in line, if it was given a place already."""

    def settled_on(self, offer: Offer) -> Order:
        """Return what is left to order once an offer was chosen for a part of it."""
        if self.preferences.attempts_max > 1:
            return self
        return replace(self, offers=(offer,))


@dataclass(frozen=True, slots=True)
class Lot:
    """Pictures that one attempt delivered, and the end of that attempt."""

    offer: Offer
    done: Done
    end: AttemptEnd
    asked: int
    partials: int = 0
    """Partial pictures that were shown on the way."""
    took_ms: int = 0
    """From when the upstream was called until it had answered."""

    @property
    def short(self) -> bool:
        """Whether it holds fewer pictures than were asked for."""
        return len(self.done.images) < self.asked


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that did not deliver."""

    offer: Offer
    error: ProviderError
    accepted: bool = False
    """A job that may still be alive is known by its id: it is not bought again."""
    given_up: bool = False
    """It was our time that was over."""
    seq: int = 0
    cost_nanousd: int = 0
    """What it may have cost."""
    took_ms: int = 0


@dataclass(slots=True)
class Progress:
    """What is known of a call that is out."""

    job_id: str | None = None
    partials: int = 0
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call to one offer, for some of what an order is about."""

    order: Order
    offer: Offer
    seq: int
    job: ImageJob
    estimate_nanousd: int
    started_ms: int
    started_mono_ms: int
    is_second: bool = False
    """It was handed over before, by a worker that was lost."""
    stands_by: bool = False
    """Whether another offer could be tried if it fails."""

    @property
    def known_by_name(self) -> bool:
        """Whether the upstream knows it again when it is handed over twice.

        It must be the same call: with all its pictures, which a sync task has not kept.
        """
        whole = len(self.job.references) == self.order.wish.references
        return whole and self.job.operation in self.offer.capabilities.idempotent

    def won(self, done: Done, now_ms: int) -> AttemptEnd:
        """Book what the pictures cost, from the best source there is."""
        cost_nanousd, source = real_cost(
            self.offer,
            done,
            card_nanousd=self.order.cost_nanousd(self.offer, len(done.images)),
            estimate_nanousd=self.estimate_nanousd,
        )
        return AttemptEnd(
            task_id=self.job.task_id,
            seq=self.seq,
            state=AttemptState.DONE,
            finished_ms=now_ms,
            won=True,
            billed=Billed.YES,
            cost_nanousd=cost_nanousd,
            cost_source=source,
            fence=self.order.fence,
        )

    def stopped(self, told: Cancelled, now_ms: int) -> AttemptEnd:
        """Book what a stopped job costs: what is told, else what it may be at most."""
        wasted = self._wasted(told.billed, told.cost_nanousd)
        return replace(wasted, finished_ms=now_ms, kind=STOPPED)

    def failed(
        self, error: ProviderError, now_ms: int, *, alive: bool = False
    ) -> AttemptEnd:
        """Book possible waste: what was maybe billed counts in full."""
        return replace(
            self._wasted(error.billed, error.cost_nanousd),
            finished_ms=now_ms,
            kind=error.kind.value,
            upstream_status=error.status,
            upstream_code=error.upstream_code,
            detail=error.detail,
            alive=alive,
        )

    def _wasted(self, billed: Billed, cost_nanousd: int | None) -> AttemptEnd:
        at_most = 0 if billed is Billed.NO else self.estimate_nanousd
        return AttemptEnd(
            task_id=self.job.task_id,
            seq=self.seq,
            state=AttemptState.FAILED,
            finished_ms=0,
            won=False,
            billed=billed,
            cost_nanousd=at_most if cost_nanousd is None else cost_nanousd,
            cost_source="estimate" if cost_nanousd is None else "usd",
            fence=self.order.fence,
        )


@dataclass(frozen=True, slots=True)
class Calls:
    """Makes calls, and writes each down before it is sent and when it has ended.

    ``providers`` is keyed by upstream. ``crashed`` hears of adapters that break.
    """

    providers: Mapping[str, Provider]
    store: TaskStore
    clock: Clock
    events: Events
    crashed: Callable[[BaseException, str], None]

    async def make(self, call: Call, route_json: str | None) -> Lot | Failure:
        """Hand a call over, having written that it is; see ``carry``.

        Raises:
            ServiceUnavailableError: the store failed.
            FencedError: somebody else has claimed the task.
        """
        await self.store.begin_attempt(
            NewAttempt(
                task_id=call.job.task_id,
                seq=call.seq,
                offer_id=call.offer.id,
                upstream=call.offer.upstream,
                estimate_nanousd=call.estimate_nanousd,
                started_ms=call.started_ms,
                fence=call.order.fence,
                n=call.job.n,
            ),
            route_json,
        )
        return await self.carry(call, Progress())

    async def carry(self, call: Call, progress: Progress) -> Lot | Failure:
        """Bring a call to its end: one just begun, or a job that goes on."""
        began_ms = self.clock.monotonic_ms()
        try:
            done = await self._deliver(call, progress)
        except ProviderError as error:
            took_ms = self.clock.monotonic_ms() - began_ms
            failure = await self.fail(call, error, progress)
            return replace(failure, took_ms=took_ms)
        took_ms = self.clock.monotonic_ms() - began_ms
        end = call.won(done, self.clock.now_ms())
        self._tell(call, end)
        return Lot(call.offer, done, end, call.job.n, progress.partials, took_ms)

    async def fail(
        self, call: Call, error: ProviderError, progress: Progress
    ) -> Failure:
        """Write down that a call failed."""
        alive = progress.job_id is not None and not error.ended
        end = call.failed(error, self.clock.now_ms(), alive=alive)
        await self.store.end_attempt(end)
        self._tell(call, end)
        return Failure(
            call.offer, error, alive, progress.given_up, call.seq, end.cost_nanousd
        )

    async def stop(
        self, call: Call, job_id: str, at_most_s: float = STOP_MAX_S
    ) -> Cancelled | None:
        """Tell an upstream to stop a job; None if that came too late."""
        # An upstream that does not answer may go on, and charge.
        provider = self.providers[call.offer.upstream]
        try:
            async with asyncio.timeout(at_most_s):
                job = replace(call.job, deadline_s=at_most_s)
                return await provider.cancel(job, job_id)
        except (ProviderError, TimeoutError):
            return Cancelled(Billed.MAYBE)
        except Exception as error:  # noqa: BLE001 - the supervisor of adapters
            self.crashed(error, f"stopping {call.offer.id} for {call.job.task_id}")
            return Cancelled(Billed.MAYBE)

    async def note_stopped(self, call: Call, told: Cancelled) -> None:
        """Write down that a job was stopped."""
        end = call.stopped(told, self.clock.now_ms())
        await self.store.end_attempt(end)
        self._tell(call, end)

    async def _deliver(self, call: Call, progress: Progress) -> Done:
        # The supervisor of adapters: one that breaks its contract fails its own
        # attempt, and the next upstream is tried.
        try:
            return await self._in_time(call, progress)
        except (ProviderError, GatewayError, FencedError):
            raise
        except Exception as bug:
            self.crashed(bug, f"{call.offer.id} for {call.job.task_id}")
            raise ProviderError(
                FailureKind.BAD_GATEWAY,
                f"the adapter failed: {type(bug).__name__}",
                billed=Billed.MAYBE,
            ) from bug

    async def _in_time(self, call: Call, progress: Progress) -> Done:
        # The deadline is kept here, outside any HTTP client: a server that drips
        # satisfies every timeout of a client for ever.
        limit = asyncio.timeout_at(self._limit_s(call, progress))
        try:
            async with limit:
                return await self._worked_off(call, progress, limit)
        except TimeoutError:
            if not limit.expired():
                raise  # of the adapter's own making
            progress.given_up = True
            error = ProviderError(FailureKind.TIMEOUT, "no answer in time")
        except ProviderError as failed:
            if progress.job_id is None or failed.ended:
                raise
            error = failed
        return await self._given_up(call, error, progress.job_id)

    def _limit_s(self, call: Call, progress: Progress) -> float:
        # Nothing else is tried while a job may be alive: it has all the time there is.
        now_ms = self.clock.monotonic_ms()
        left_ms = max(0, call.order.deadline_ms - ANSWER_RESERVE_MS - now_ms)
        if progress.job_id is None:
            if call.stands_by:
                left_ms = max(left_ms // 2, left_ms - ANOTHER_MS)
            left_ms = min(left_ms, ATTEMPT_MAX_MS)
        return asyncio.get_running_loop().time() + left_ms / 1000

    async def _worked_off(
        self, call: Call, progress: Progress, limit: asyncio.Timeout
    ) -> Done:
        provider = self.providers[call.offer.upstream]
        now_s = asyncio.get_running_loop().time()
        end_s = limit.when() or now_s
        wanted_for_s = (call.order.deadline_ms - self.clock.monotonic_ms()) / 1000
        job = replace(
            call.job, deadline_s=end_s - now_s, wanted_for_s=max(0.0, wanted_for_s)
        )
        on_partial = call.order.on_partial
        if progress.job_id is not None:
            step: Done | Pending = Pending(progress.job_id, 0.0)
        elif call.is_second:
            step = await self._handed_over_again(provider, job)
        elif on_partial is not None and call.offer.capabilities.stream:
            return await _streamed(provider, job, on_partial, progress)
        else:
            step = await provider.start(job)
        if isinstance(step, Done):
            return step
        if progress.job_id is None:
            await self._accept(call, step, progress)
            limit.reschedule(self._limit_s(call, progress))
        return await self._finished(provider, job, step)

    async def _handed_over_again(
        self, provider: Provider, job: ImageJob
    ) -> Done | Pending:
        # That this one is refused says nothing of the first one, which may be bought.
        pause_s = LOOK_AGAIN_S
        while True:
            try:
                return await provider.start(job)
            except ProviderError as error:
                if error.kind in THE_CLIENTS:
                    raise
                if error.kind not in REREADABLE:
                    raise ProviderError(
                        FailureKind.TIMEOUT,
                        f"the call was lost, and handed over again: {error.detail}",
                    ) from error
                wait_s = error.retry_after_s or pause_s
                await self.clock.sleep(min(ASKED_MAX_S, wait_s))
                pause_s = min(LOOK_AGAIN_MAX_S, 2 * pause_s)

    async def _accept(self, call: Call, step: Pending, progress: Progress) -> None:
        # Whatever becomes of the write: from here on the job is known to be there.
        progress.job_id = step.job_id
        write = call.order.order_json
        order_json = write() if write else None
        while True:
            writing = asyncio.ensure_future(
                self.store.accept_attempt(
                    call.job.task_id,
                    call.seq,
                    step.job_id,
                    order_json,
                    fence=call.order.fence,
                )
            )
            try:
                return await asyncio.shield(writing)
            except asyncio.CancelledError:
                # Whoever cancels reads next which jobs there are.
                await asyncio.wait({writing})
                with suppress(Exception):
                    writing.result()  # nobody else looks at how it went
                raise
            except ServiceUnavailableError:
                await self.clock.sleep(ACCEPT_PAUSE_S)

    async def _given_up(
        self, call: Call, error: ProviderError, job_id: str | None
    ) -> Done:
        # Nobody waits for the job any more: an upstream that can is told to stop it.
        if job_id is None or not call.offer.capabilities.cancel:
            raise error
        told = await self.stop(call, job_id, STOP_AT_END_MAX_S)
        if told is None:
            return await self._last_look(call, error, job_id)
        error.detail += "; the job was told to stop"
        if error.billed is not Billed.YES:
            error.billed, error.cost_nanousd = told.billed, told.cost_nanousd
        raise error

    async def _last_look(self, call: Call, error: ProviderError, job_id: str) -> Done:
        provider = self.providers[call.offer.upstream]
        try:
            async with asyncio.timeout(STOP_AT_END_MAX_S):
                job = replace(call.job, deadline_s=STOP_AT_END_MAX_S)
                step = await provider.poll(job, job_id)
        except TimeoutError:
            raise error from None
        except ProviderError as seen:
            if seen.ended:
                raise  # it tells how the job ended
            raise error from seen
        if isinstance(step, Done):
            return step
        raise error

    async def _finished(self, provider: Provider, job: ImageJob, step: Pending) -> Done:
        # The deadline alone ends it: what is made and paid is worth every look.
        failures = 0
        pause_s = step.poll_after_s
        while True:
            await self.clock.sleep(max(POLL_MIN_S, pause_s))
            try:
                polled = await provider.poll(job, step.job_id)
            except ProviderError as error:
                if error.ended or error.kind not in LOOKED_AT_AGAIN:
                    raise
                failures += 1
                doubled_s = LOOK_AGAIN_S * 2 ** min(failures - 1, LOOK_DOUBLINGS_MAX)
                asked_s = error.retry_after_s
                pause_s = min(LOOK_AGAIN_MAX_S, doubled_s)
                if asked_s is not None:
                    pause_s = min(ASKED_MAX_S, asked_s)
                continue
            if isinstance(polled, Done):
                return polled
            failures = 0
            step, pause_s = polled, polled.poll_after_s

    def _tell(self, call: Call, end: AttemptEnd) -> None:
        self.events.emit(
            AttemptFinished(
                task_id=end.task_id,
                seq=end.seq,
                offer_id=call.offer.id,
                upstream=call.offer.upstream,
                variant=call.order.variant,
                outcome=end.kind or "done",
                billed=end.billed.value,
                duration_ms=self.clock.monotonic_ms() - call.started_mono_ms,
                cost_nanousd=end.cost_nanousd,
                estimate_nanousd=(
                    call.estimate_nanousd
                    if end.won and end.cost_source in REPORTED
                    else 0
                ),
                upstream_status=end.upstream_status,
                upstream_code=end.upstream_code,
                detail=end.detail,
            )
        )


def job_at(offer: Offer, job: ImageJob, n: int, seq: int) -> ImageJob:
    """Fit a job to an offer.

    One that cannot make the format makes another; the gateway converts it.
    """
    job = replace(job, model=offer.model, n=n, seq=seq)
    formats = offer.capabilities.output_formats
    if job.output_format in formats:
        return job
    made = "png" if "png" in formats else min(formats)
    return replace(job, output_format=made, output_compression=None)


async def _streamed(
    provider: Provider,
    job: ImageJob,
    on_partial: Callable[[Partial], None],
    progress: Progress,
) -> Done:
    async with aclosing(provider.stream(job)) as steps:
        async for step in steps:
            if isinstance(step, Done):
                return step
            progress.partials += 1
            on_partial(step)
    raise ProviderError(FailureKind.TIMEOUT, "the stream ended without a picture")
