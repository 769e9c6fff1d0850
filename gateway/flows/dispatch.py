"""Buys pictures at the cheapest healthy offer, and goes to the next when one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from gateway.core import limits, routing
from gateway.core.breaker import Outcome
from gateway.core.catalogue import Offer, PerImage
from gateway.core.errors import GatewayError, ServiceUnavailableError
from gateway.core.events import AttemptFinished
from gateway.core.money import decimal_text
from gateway.core.pricing import REPORTED, real_cost
from gateway.core.ratios import Sample, tier_of
from gateway.core.routing import (
    NO_PREFERENCES,
    Candidate,
    Decision,
    Moment,
    Next,
    Preferences,
    Wish,
)
from gateway.core.tasks import STOPPED, AttemptState, FencedError
from gateway.flows.line import Line, Place
from gateway.ports import (
    AttemptEnd,
    AttemptRecord,
    Clock,
    Events,
    HealthBoard,
    NewAttempt,
    Permit,
    Rebuy,
    TaskStore,
)
from providers.kit.contract import (
    Billed,
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    Pending,
    Provider,
    ProviderError,
    Usage,
)

ATTEMPT_MAX_MS = 240_000
ANOTHER_MS = 90_000
"""What a call leaves of the deadline where another offer could be tried after it."""
ANSWER_RESERVE_MS = 5_000
"""Kept back from the deadline for storing, settling and answering."""
POLL_MIN_S = 0.2
PATIENT_LOOK_S = 3.0
PATIENT_PAUSE_S = 2.0
PATIENT_PAUSE_MAX_S = 60.0
PATIENT_DOUBLINGS_MAX = 5
PATIENT_ATTEMPTS_MAX = 30
OUTAGES = frozenset(
    {
        FailureKind.AUTH,
        FailureKind.INSUFFICIENT_FUNDS,
        FailureKind.RATE_LIMITED,
        FailureKind.OVERLOADED,
        FailureKind.BAD_GATEWAY,
        FailureKind.NETWORK,
    }
)
"""Failures that say nothing of the request, and may be over in a while."""
LOOK_AGAIN_S = 1.0
LOOK_AGAIN_MAX_S = 15.0
"""Between two looks at a job that fail: doubling, from the one to the other."""
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


@dataclass(frozen=True, slots=True)
class Stop:
    """What came of stopping the jobs of an order.

    ``usages`` is what upstreams report as used by those they stopped. ``too_late``: a
    job had ended already, and its pictures are there.
    """

    usages: tuple[Usage, ...]
    too_late: bool


@dataclass(slots=True)
class Purchase:
    """What came of an order; grows while it is being carried out.

    ``missing`` pictures were not delivered; ``decision`` is the first one taken.
    ``soonest_retry_ms`` counts from now, in milliseconds.
    """

    missing: int
    lots: list[Lot] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    decision: Decision | None = None
    soonest_retry_ms: int | None = None
    attempts: int = 0
    waited_out: bool = False
    """No slot came free in time."""
    unknown: list[Failure] = field(default_factory=list)
    """Of the last round: what may have been bought, so that the next buys it again."""
    stands_by: bool = False
    """Whether another offer could be tried if the present round fails."""

    @property
    def images(self) -> tuple[MadeImage, ...]:
        """Every picture delivered, in the order of the lots."""
        return tuple(image for lot in self.lots for image in lot.done.images)


@dataclass(slots=True)
class Dispatcher:
    """Spends attempts on offers until an order is filled.

    ``providers`` is keyed by upstream. The retry budget is shared by all orders, and
    so is the line in which they wait for slots.
    """

    providers: Mapping[str, Provider]
    board: HealthBoard
    store: TaskStore
    clock: Clock
    events: Events
    crashed: Callable[[BaseException, str], None]
    budget: limits.RetryBudget = field(default_factory=limits.RetryBudget)
    drained: Callable[[], frozenset[str]] = frozenset
    """Tells the upstreams to which nothing new may go."""
    line: Line = field(default_factory=Line)

    async def buy(self, order: Order) -> Purchase:
        """Carry an order out as far as it goes; never raises ``ProviderError``.

        At most ``routing.ATTEMPTS_MAX`` rounds may fail, each at another offer; one,
        where the order allows no fallbacks: then no other offer is ever turned to. A
        round at an offer that makes fewer pictures per call than are wanted is several
        calls at once. What is missing after a round is bought in the next: never the
        whole again. A patient order whose rounds failed by outages alone, with nothing
        bought, starts over after a pause for as long as it has time.

        Raises:
            ServiceUnavailableError: the store failed before anything was delivered.
        """
        purchase = Purchase(missing=order.job.n)
        self.budget = limits.earned(self.budget, self.clock.monotonic_ms())
        tried: set[str] = set()
        place = order.place or self.line.place(order.tenant_id)
        order = replace(order, place=place)
        try:
            if await self._resumed(order, purchase, tried) and order.buys:
                await self._fill(order, purchase, tried)
        except ServiceUnavailableError as error:
            # A library's own retry could buy again what an attempt has bought.
            error.client_may_retry = False if purchase.attempts else None
            if not purchase.lots:
                raise
        finally:
            self.line.leave(place)
        return purchase

    async def _fill(self, order: Order, purchase: Purchase, tried: set[str]) -> None:
        while purchase.missing:
            chosen, goes_on = None, False
            if len(tried) < order.preferences.attempts_max:
                chosen = await self._choose(order, purchase, frozenset(tried))
            if chosen is not None and purchase.unknown:
                chosen = await self._afforded(order, purchase, *chosen)
            if chosen is not None:
                order = order.settled_on(chosen[0])
                failed, short = await self._round(order, purchase, *chosen)
                if failed or short:
                    tried.add(chosen[0].id)
                goes_on = await self._goes_on(purchase, failed)
            if not goes_on and not await self._rested(order, purchase, tried):
                return

    async def stop(self, order: Order) -> Stop:
        """Ask the upstreams to stop the jobs that ``history`` holds, all at once.

        Each that is stopped is written down as ended.
        """
        offers = {offer.id: offer for offer in order.offers}
        jobs = [
            (self._call_of(order, offers[attempt.offer_id], attempt), attempt.job_id)
            for attempt in order.history
            if attempt.finished_ms is None
            and attempt.job_id is not None
            and attempt.offer_id in offers
            and offers[attempt.offer_id].capabilities.cancel
        ]
        told = await asyncio.gather(
            *(self._told_to_stop(call, job_id, STOP_MAX_S) for call, job_id in jobs)
        )
        usages = []
        for (call, _), answer in zip(jobs, told, strict=True):
            if answer is None:
                continue
            end = call.stopped(answer, self.clock.now_ms())
            await self.store.end_attempt(end)
            self._tell(call, end)
            usages.append(answer.usage)
        return Stop(
            usages=tuple(usage for usage in usages if usage is not None),
            too_late=None in told,
        )

    async def _told_to_stop(
        self, call: _Call, job_id: str, at_most_s: float
    ) -> Cancelled | None:
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

    async def _resumed(self, order: Order, purchase: Purchase, tried: set[str]) -> bool:
        # Takes up what a lost worker left, all at once as that one did; tells whether
        # there is more to buy. What had ended by then counts as if it ended here.
        offers = {offer.id: offer for offer in order.offers}
        left: list[Coroutine[object, object, Lot | Failure]] = []
        last: str | None = None
        for attempt in order.history:
            purchase.attempts = max(purchase.attempts, attempt.seq)
            tried.add(attempt.offer_id)
            offer = offers.get(attempt.offer_id) or _gone(order, attempt)
            last = offer.id
            if attempt.finished_ms is None:
                left.append(self._taken_up(order, offer, attempt))
            elif (failure := _failure_of(offer, attempt)) is not None:
                purchase.failures.append(failure)
        results = await _all_of(left)
        purchase.lots.extend(r for r in results if isinstance(r, Lot))
        purchase.failures.extend(r for r in results if isinstance(r, Failure))
        made = sum(len(lot.done.images) for lot in purchase.lots)
        purchase.missing = max(0, purchase.missing - made)
        if any(_rule(failure) is Next.NEVER for failure in purchase.failures):
            return False
        latest = [f for f in purchase.failures if f.offer.id == last]
        return await self._goes_on(purchase, latest)

    async def _taken_up(
        self, order: Order, offer: Offer, attempt: AttemptRecord
    ) -> Lot | Failure:
        call = self._call_of(order, offer, attempt)
        lost = None
        if offer.upstream not in self.providers:
            lost = "its upstream is not configured any more"
        elif attempt.job_id is None and not call.known_by_name:
            lost = "the worker was lost while the call was out"
        if lost is not None:
            error = ProviderError(FailureKind.TIMEOUT, lost)
            return await self._failed(call, error, _Progress(attempt.job_id))
        # What is polled has its slot at the upstream already, with or without ours.
        permit = await self.board.admit(offer.id, order.wish.operation)
        if permit is not None:
            assert order.place is not None
            self.line.took(order.place, offer.upstream)
        outcome = Outcome(cancelled=True)
        try:
            result = await self._carried(call, _Progress(attempt.job_id))
            outcome = _outcome_of(result, call)
        finally:
            if permit is not None:
                await self.board.report(permit, outcome)
                self.line.gave_back(order.tenant_id, offer.upstream)
        return result

    def _call_of(self, order: Order, offer: Offer, attempt: AttemptRecord) -> _Call:
        return _Call(
            order=order,
            offer=offer,
            seq=attempt.seq,
            job=_job_at(offer, order.job, attempt.n, attempt.seq),
            estimate_nanousd=attempt.estimate_nanousd,
            started_ms=attempt.started_ms,
            started_mono_ms=self.clock.monotonic_ms(),
            is_second=True,
        )

    async def _choose(
        self, order: Order, purchase: Purchase, tried: frozenset[str]
    ) -> tuple[Offer, Permit] | None:
        # Waits while there are offers that only lack a slot.
        while True:
            now_ms = self.clock.monotonic_ms()
            left_ms = order.deadline_ms - ANSWER_RESERVE_MS - now_ms
            decision = await self._decide(order, purchase.missing, left_ms, tried)
            purchase.decision = purchase.decision or decision
            soonest_ms = decision.soonest_retry_ms
            if soonest_ms is not None:
                purchase.soonest_retry_ms = max(0, soonest_ms - now_ms)
            if left_ms <= 0:
                return None
            chosen = await self._admitted(order, decision, first=not tried)
            if chosen is not None:
                purchase.stands_by = _stands_by(purchase, decision, chosen[0], tried)
                return chosen
            full = {c.offer.upstream for c in decision.left_out if c.waits}
            full |= {c.offer.upstream for c in decision.ranked}
            if full:
                if not await self._stood(order, purchase, full, left_ms):
                    return None
            elif order.patient and decision.may_return:
                await self.clock.sleep(min(PATIENT_LOOK_S, left_ms / 1000))
            else:
                return None

    async def _stood(
        self, order: Order, purchase: Purchase, upstreams: set[str], left_ms: int
    ) -> bool:
        # What was tried already has waited for its turn: only its deadline counts.
        place = order.place
        assert place is not None
        if place.until_ms is not None and not purchase.attempts:
            left_ms = min(left_ms, place.until_ms - self.clock.monotonic_ms())
        called = await self.line.stand(place, upstreams, max(0, left_ms) / 1000)
        purchase.waited_out = not called
        return called

    async def _admitted(
        self, order: Order, decision: Decision, *, first: bool
    ) -> tuple[Offer, Permit] | None:
        operation, place = order.wish.operation, order.place
        assert place is not None
        for candidate in decision.ranked:
            upstream = candidate.offer.upstream
            if place.called_to is None and self.line.wanted(upstream):
                continue  # others have waited for it
            permit = await self.board.admit(candidate.offer.id, operation)
            if permit is not None:
                self.line.took(place, upstream)
                return candidate.offer, permit
        if decision.ranked or not first or any(c.waits for c in decision.left_out):
            return None
        # Every breaker is open: the cheapest gets the one try that is allowed.
        shut = [c for c in decision.left_out if c.shut]
        for candidate in sorted(shut, key=lambda c: c.cost_nanousd or 0):
            permit = await self.board.admit(candidate.offer.id, operation, forced=True)
            if permit is not None:
                self.line.took(place, candidate.offer.upstream)
                return candidate.offer, permit
        return None

    async def _decide(
        self, order: Order, n: int, left_ms: int, tried: frozenset[str]
    ) -> Decision:
        health = await self.board.read(
            [offer.id for offer in order.offers], order.wish.operation
        )
        priced = [(offer, order.cost_nanousd(offer, n)) for offer in order.offers]
        return routing.decide(
            order.wish,
            priced,
            health,
            Moment(order.today, left_ms, self.drained()),
            tried=tried,
            preferences=order.preferences,
        )

    async def _goes_on(self, purchase: Purchase, failed: list[Failure]) -> bool:
        # A round may fail in several ways at once; the strictest decides.
        for failure in failed:
            kind, rule = failure.error.kind, _rule(failure)
            seen = sum(f.error.kind is kind for f in purchase.failures)
            repeated = rule in {Next.ONCE, Next.IF_AFFORDABLE} and seen > len(
                [f for f in failed if f.error.kind is kind]
            )
            if rule is Next.NEVER or repeated:
                return False
            if rule is Next.IF_AFFORDABLE:
                purchase.unknown.append(failure)
        if any(failure.error.kind in routing.NEEDS_BUDGET for failure in failed):
            left = limits.spent(self.budget, self.clock.monotonic_ms())
            if left is None:
                return False
            self.budget = left
        return True

    async def _rested(self, order: Order, purchase: Purchase, tried: set[str]) -> bool:
        # Tells whether to start over, after a pause.
        failures = purchase.failures
        waits = order.patient and failures and not purchase.lots
        waits = waits and order.preferences.attempts_max > 1
        if not waits or purchase.attempts >= PATIENT_ATTEMPTS_MAX:
            return False
        if not all(f.error.kind in OUTAGES for f in failures):
            return False
        if not all(f.error.billed is Billed.NO for f in failures):
            return False
        doublings = min(len(failures) - 1, PATIENT_DOUBLINGS_MAX)
        pause_s = min(PATIENT_PAUSE_MAX_S, PATIENT_PAUSE_S * 2**doublings)
        now_ms = self.clock.monotonic_ms()
        if order.deadline_ms - ANSWER_RESERVE_MS - now_ms <= pause_s * 1000:
            return False
        await self.clock.sleep(pause_s)
        tried.clear()
        return True

    async def _afforded(
        self, order: Order, purchase: Purchase, offer: Offer, permit: Permit
    ) -> tuple[Offer, Permit] | None:
        # What has no whole answer may be bought and paid already.
        now_ms, unknown, allowed = self.clock.now_ms(), purchase.unknown, False
        rebuy = Rebuy(
            order.job.task_id,
            seq=max(failure.seq for failure in unknown),
            risked_nanousd=sum(failure.cost_nanousd for failure in unknown),
            created_ms=now_ms,
        )
        try:
            since_ms = now_ms - limits.REBUY_WINDOW_MS
            allowed = await self.store.rebuy(rebuy, since_ms)
        finally:
            if not allowed:
                await self.board.report(permit, Outcome(cancelled=True))
                self.line.gave_back(order.tenant_id, offer.upstream)
        unknown.clear()
        return (offer, permit) if allowed else None

    async def _round(
        self, order: Order, purchase: Purchase, offer: Offer, permit: Permit
    ) -> tuple[list[Failure], bool]:
        # Tells what failed, and whether a call delivered fewer than it was asked for.
        per_call = offer.capabilities.n_max
        wanted = purchase.missing
        first = self._attempt(order, purchase, offer, min(per_call, wanted), permit)
        if wanted <= per_call:
            results = [await first]
        else:
            results = await self._at_once(order, purchase, offer, first)
        lots = [result for result in results if isinstance(result, Lot)]
        failed = [result for result in results if isinstance(result, Failure)]
        purchase.lots.extend(lots)
        purchase.failures.extend(failed)
        made = sum(len(lot.done.images) for lot in lots)
        purchase.missing = max(0, wanted - made)
        return failed, any(lot.short for lot in lots)

    async def _at_once(
        self,
        order: Order,
        purchase: Purchase,
        offer: Offer,
        first: Coroutine[object, object, Lot | Failure],
    ) -> list[Lot | Failure]:
        # As many calls beside the first as there are slots; the rest stays missing and
        # is bought in the next round, here again if nothing went wrong.
        per_call = offer.capabilities.n_max
        calls = [first]
        assert order.place is not None
        for done in range(per_call, purchase.missing, per_call):
            if self.line.wanted(offer.upstream):
                break  # the rest stands in line like everybody else
            permit = await self.board.admit(offer.id, order.wish.operation)
            if permit is None:
                break
            self.line.took(order.place, offer.upstream)
            n = min(per_call, purchase.missing - done)
            calls.append(self._attempt(order, purchase, offer, n, permit))
        return await _all_of(calls)

    async def _attempt(
        self,
        order: Order,
        purchase: Purchase,
        offer: Offer,
        n: int,
        permit: Permit,
    ) -> Lot | Failure:
        purchase.attempts += 1
        call = _Call(
            order=order,
            offer=offer,
            seq=purchase.attempts,
            job=_job_at(offer, order.job, n, purchase.attempts),
            estimate_nanousd=order.cost_nanousd(offer, n) or 0,
            started_ms=self.clock.now_ms(),
            started_mono_ms=self.clock.monotonic_ms(),
            stands_by=purchase.stands_by,
        )
        outcome = Outcome(cancelled=True)
        try:
            result = await self._call(call, purchase.decision)
            outcome = _outcome_of(result, call)
        finally:
            await self.board.report(permit, outcome)
            self.line.gave_back(order.tenant_id, offer.upstream)
        return result

    async def _call(self, call: _Call, decision: Decision | None) -> Lot | Failure:
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
            decision_json(decision) if call.seq == 1 and decision else None,
        )
        return await self._carried(call, _Progress())

    async def _carried(self, call: _Call, progress: _Progress) -> Lot | Failure:
        try:
            done = await self._deliver(call, progress)
        except ProviderError as error:
            return await self._failed(call, error, progress)
        end = call.won(done, self.clock.now_ms())
        self._tell(call, end)
        return Lot(call.offer, done, end, call.job.n, progress.partials)

    async def _failed(
        self, call: _Call, error: ProviderError, progress: _Progress
    ) -> Failure:
        alive = progress.job_id is not None and not error.ended
        end = call.failed(error, self.clock.now_ms(), alive=alive)
        await self.store.end_attempt(end)
        self._tell(call, end)
        return Failure(
            call.offer, error, alive, progress.given_up, call.seq, end.cost_nanousd
        )

    async def _deliver(self, call: _Call, progress: _Progress) -> Done:
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

    async def _in_time(self, call: _Call, progress: _Progress) -> Done:
        # The deadline is kept here, outside any HTTP client: a server that drips
        # satisfies every timeout of a client for ever.
        try:
            async with asyncio.timeout_at(self._limit_s(call, progress)) as limit:
                return await self._worked_off(call, progress, limit)
        except TimeoutError:
            progress.given_up = True
            error = ProviderError(FailureKind.TIMEOUT, "no answer in time")
        except ProviderError as failed:
            if progress.job_id is None or failed.ended:
                raise
            error = failed
        return await self._given_up(call, error, progress.job_id)

    def _limit_s(self, call: _Call, progress: _Progress) -> float:
        # Nothing else is tried while a job may be alive: it has all the time there is.
        now_ms = self.clock.monotonic_ms()
        left_ms = max(0, call.order.deadline_ms - ANSWER_RESERVE_MS - now_ms)
        if progress.job_id is None:
            if call.stands_by:
                left_ms = max(left_ms // 2, left_ms - ANOTHER_MS)
            left_ms = min(left_ms, ATTEMPT_MAX_MS)
        return asyncio.get_running_loop().time() + left_ms / 1000

    async def _worked_off(
        self, call: _Call, progress: _Progress, limit: asyncio.Timeout
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
                await self.clock.sleep(error.retry_after_s or pause_s)
                pause_s = min(LOOK_AGAIN_MAX_S, 2 * pause_s)

    async def _accept(self, call: _Call, step: Pending, progress: _Progress) -> None:
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
        self, call: _Call, error: ProviderError, job_id: str | None
    ) -> Done:
        # Nobody waits for the job any more: an upstream that can is told to stop it.
        if job_id is None or not call.offer.capabilities.cancel:
            raise error
        told = await self._told_to_stop(call, job_id, STOP_AT_END_MAX_S)
        if told is None:
            return await self._last_look(call, error, job_id)
        error.detail += "; the job was told to stop"
        if error.billed is not Billed.YES:
            error.billed, error.cost_nanousd = told.billed, told.cost_nanousd
        raise error

    async def _last_look(self, call: _Call, error: ProviderError, job_id: str) -> Done:
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
                pause_s = error.retry_after_s or min(LOOK_AGAIN_MAX_S, doubled_s)
                continue
            if isinstance(polled, Done):
                return polled
            failures = 0
            step, pause_s = polled, polled.poll_after_s

    def _tell(self, call: _Call, end: AttemptEnd) -> None:
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
                upstream_status=end.upstream_status,
                upstream_code=end.upstream_code,
                detail=end.detail,
            )
        )


@dataclass(slots=True)
class _Progress:
    job_id: str | None = None
    partials: int = 0
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class _Call:
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


async def _all_of(
    calls: Sequence[Coroutine[object, object, Lot | Failure]],
) -> list[Lot | Failure]:
    # Waits for all of them: what one delivered is not lost because another one broke.
    results = await asyncio.gather(*calls, return_exceptions=True)
    delivered = [r for r in results if isinstance(r, Lot | Failure)]
    broken = [r for r in results if isinstance(r, BaseException)]
    if broken and not any(isinstance(r, Lot) for r in delivered):
        raise broken[0]
    return delivered


async def _streamed(
    provider: Provider,
    job: ImageJob,
    on_partial: Callable[[Partial], None],
    progress: _Progress,
) -> Done:
    async with aclosing(provider.stream(job)) as steps:
        async for step in steps:
            if isinstance(step, Done):
                return step
            progress.partials += 1
            on_partial(step)
    raise ProviderError(FailureKind.TIMEOUT, "the stream ended without a picture")


def _stands_by(
    purchase: Purchase, decision: Decision, chosen: Offer, tried: frozenset[str]
) -> bool:
    # After a second call without an answer nothing more is bought.
    lost = any(f.error.kind is FailureKind.TIMEOUT for f in purchase.failures)
    last = len(tried) + 1 >= decision.preferences.attempts_max
    others = any(c.offer.id != chosen.id for c in decision.ranked)
    return others and not lost and not last


def _rule(failure: Failure) -> Next:
    return Next.NEVER if failure.accepted else routing.NEXT_BY_KIND[failure.error.kind]


def _gone(order: Order, attempt: AttemptRecord) -> Offer:
    # Stands for an offer that was taken out of the config while its job went on.
    return Offer(
        upstream=attempt.upstream,
        variant=order.variant,
        model="",
        cost=PerImage(),
        capabilities=Capabilities(),
    )


def _failure_of(offer: Offer, attempt: AttemptRecord) -> Failure | None:
    # A stopped job says nothing about where the next one should go.
    if attempt.state is not AttemptState.FAILED or attempt.kind in {None, STOPPED}:
        return None
    error = ProviderError(
        FailureKind(attempt.kind),
        attempt.detail or "",
        status=attempt.upstream_status,
        upstream_code=attempt.upstream_code,
        billed=Billed(attempt.billed) if attempt.billed else None,
    )
    return Failure(
        offer,
        error,
        accepted=attempt.alive,
        seq=attempt.seq,
        cost_nanousd=attempt.cost_nanousd,
    )


def _job_at(offer: Offer, job: ImageJob, n: int, seq: int) -> ImageJob:
    # An offer that cannot make the format makes another; the gateway converts it.
    job = replace(job, model=offer.model, n=n, seq=seq)
    formats = offer.capabilities.output_formats
    if job.output_format in formats:
        return job
    made = "png" if "png" in formats else min(formats)
    return replace(job, output_format=made, output_compression=None)


def _outcome_of(result: Lot | Failure, call: _Call) -> Outcome:
    if isinstance(result, Failure):
        error = result.error
        return Outcome(
            kind=error.kind,
            given_up=result.given_up,
            retry_after_s=error.retry_after_s,
        )
    # Fewer pictures than asked for say nothing about the price of one, nor does a cost
    # that was taken from the card.
    if result.short or result.end.cost_source not in REPORTED:
        return Outcome()
    if not call.estimate_nanousd:
        return Outcome()
    wish = call.order.wish
    tier = tier_of(wish.quality, wish.size)
    return Outcome(sample=Sample(tier, call.estimate_nanousd, result.end.cost_nanousd))


def decision_json(decision: Decision) -> str:
    """Write a decision down as it is kept with its task."""
    return json.dumps([candidate_facts(c, decision) for c in decision.all])


def candidate_facts(candidate: Candidate, decision: Decision) -> dict[str, object]:
    """Describe an offer as a decision saw it."""
    cost = candidate.cost_nanousd
    return {
        "offer": candidate.offer.id,
        "model": candidate.offer.model,
        "cost_usd": None if cost is None else decimal_text(cost),
        "breaker": candidate.state.value,
        "eligible": not candidate.reason,
        "reason": candidate.reason or None,
        "placed_by": None
        if candidate.reason
        else decision.preferences.placed_by(candidate.offer),
    }
