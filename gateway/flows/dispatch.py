"""Buys pictures at the cheapest healthy offer, and goes to the next when one fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.core import limits, routing
from gateway.core.breaker import Outcome
from gateway.core.catalogue import Offer, PerImage
from gateway.core.errors import GatewayError, ServiceUnavailableError
from gateway.core.events import FellOver
from gateway.core.money import decimal_text
from gateway.core.pricing import REPORTED
from gateway.core.ratios import Sample, tier_of
from gateway.core.routing import (
    Candidate,
    Decision,
    Moment,
    Next,
)
from gateway.core.tasks import STOPPED, AttemptState, FencedError
from gateway.flows.calls import (
    ANSWER_RESERVE_MS,
    Call,
    Calls,
    Failure,
    Lot,
    Order,
    Progress,
    job_at,
)
from gateway.flows.line import Line
from gateway.ports import (
    AttemptRecord,
    Clock,
    Events,
    HealthBoard,
    Permit,
    Rebuy,
    TaskStore,
)
from providers.kit.contract import (
    Billed,
    Capabilities,
    FailureKind,
    MadeImage,
    Provider,
    ProviderError,
    Usage,
)

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
UNUSED = Outcome(cancelled=True)


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
    away_ms: int = 0
    """Time in which upstreams worked, or a slot was waited for."""
    broken: bool = False
    """The store failed for a call beside one that delivered: nothing more is bought."""

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
    calls: Calls = field(init=False)

    def __post_init__(self) -> None:
        self.calls = Calls(
            self.providers, self.store, self.clock, self.events, self.crashed
        )

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
        while purchase.missing and not purchase.broken:
            chosen, goes_on = None, False
            if len(tried) < order.preferences.attempts_max:
                chosen = await self._choose(order, purchase, frozenset(tried))
            if chosen is not None and purchase.unknown:
                chosen = await self._afforded(order, purchase, *chosen)
            if chosen is not None:
                self._tell_of_fallback(order, purchase, chosen[0])
                order = order.settled_on(chosen[0])
                failed, short = await self._round(order, purchase, *chosen)
                if failed or short:
                    tried.add(chosen[0].id)
                goes_on = await self._goes_on(purchase, failed)
            if not goes_on and not await self._rested(order, purchase, tried):
                return

    def _tell_of_fallback(self, order: Order, purchase: Purchase, offer: Offer) -> None:
        if not purchase.failures:
            return
        last = purchase.failures[-1]
        if last.offer.upstream != offer.upstream:
            self.events.emit(
                FellOver(
                    order.job.task_id,
                    order.variant,
                    last.offer.upstream,
                    offer.upstream,
                    last.error.kind.value,
                )
            )

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
            *(self.calls.stop(call, job_id) for call, job_id in jobs)
        )
        usages = []
        for (call, _), answer in zip(jobs, told, strict=True):
            if answer is None:
                continue
            await self.calls.note_stopped(call, answer)
            usages.append(answer.usage)
        return Stop(
            usages=tuple(usage for usage in usages if usage is not None),
            too_late=None in told,
        )

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
        results = await self._all_of(purchase, left)
        purchase.away_ms += max((result.took_ms for result in results), default=0)
        purchase.lots.extend(r for r in results if isinstance(r, Lot))
        purchase.failures.extend(r for r in results if isinstance(r, Failure))
        made = sum(len(lot.done.images) for lot in purchase.lots)
        purchase.missing = max(0, purchase.missing - made)
        never = any(_rule(failure) is Next.NEVER for failure in purchase.failures)
        if never or purchase.broken:
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
            return await self.calls.fail(call, error, Progress(attempt.job_id))
        # What is polled has its slot at the upstream already, with or without ours.
        permit = await self.board.admit(offer.id, order.wish.operation)
        if permit is not None:
            assert order.place is not None
            self.line.took(order.place, offer.upstream)
        outcome = UNUSED
        try:
            result = await self.calls.carry(call, Progress(attempt.job_id))
            outcome = _outcome_of(result, call)
        finally:
            if permit is not None:
                await self._give_back(order, offer, permit, outcome)
        return result

    async def _give_back(
        self, order: Order, offer: Offer, permit: Permit, outcome: Outcome
    ) -> None:
        try:
            await self.board.report(permit, outcome)
        finally:
            self.line.gave_back(order.tenant_id, offer.upstream)

    def _call_of(self, order: Order, offer: Offer, attempt: AttemptRecord) -> Call:
        return Call(
            order=order,
            offer=offer,
            seq=attempt.seq,
            job=job_at(offer, order.job, attempt.n, attempt.seq),
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
            full = {c.offer.id for c in decision.left_out if c.waits}
            full |= {c.offer.id for c in decision.ranked}
            if full:
                if not await self._stood(order, purchase, full, left_ms):
                    return None
            elif order.patient and decision.may_return:
                assert order.place is not None
                self.line.pass_on(order.place)
                pause_s = min(PATIENT_LOOK_S, left_ms / 1000)
                await self.clock.sleep(pause_s)
                purchase.away_ms += round(pause_s * 1000)
            else:
                return None

    async def _stood(
        self, order: Order, purchase: Purchase, offer_ids: set[str], left_ms: int
    ) -> bool:
        # What was tried already has waited for its turn: only its deadline counts.
        place = order.place
        assert place is not None
        if place.until_ms is not None and not purchase.attempts:
            left_ms = min(left_ms, place.until_ms - self.clock.monotonic_ms())
        wants = [(offer_id, order.wish.operation) for offer_id in offer_ids]
        began_ms = self.clock.monotonic_ms()
        called = await self.line.stand(place, wants, max(0, left_ms) / 1000)
        purchase.away_ms += self.clock.monotonic_ms() - began_ms
        purchase.waited_out = not called
        return called

    async def _admitted(
        self, order: Order, decision: Decision, *, first: bool
    ) -> tuple[Offer, Permit] | None:
        operation, place = order.wish.operation, order.place
        assert place is not None
        for candidate in decision.ranked:
            upstream = candidate.offer.upstream
            want = candidate.offer.id, operation
            if place.called_to != upstream and self.line.wanted(want):
                continue  # others have waited for it
            permit = await self.board.admit(*want)
            if permit is not None:
                self.line.took(place, upstream)
                return candidate.offer, permit
        waits = decision.ranked or any(c.waits for c in decision.left_out)
        if waits or not first or order.patient:
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
        purchase.away_ms += round(pause_s * 1000)
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
                await self._give_back(order, offer, permit, UNUSED)
        unknown.clear()
        return (offer, permit) if allowed else None

    async def _round(
        self, order: Order, purchase: Purchase, offer: Offer, permit: Permit
    ) -> tuple[list[Failure], bool]:
        # Tells what failed, and whether a call delivered fewer than it was asked for.
        per_call = offer.capabilities.n_max
        wanted = purchase.missing
        if wanted <= per_call:
            results = [await self._attempt(order, purchase, offer, wanted, permit, {})]
        else:
            results = await self._at_once(order, purchase, offer, permit)
        purchase.away_ms += max((result.took_ms for result in results), default=0)
        lots = [result for result in results if isinstance(result, Lot)]
        failed = [result for result in results if isinstance(result, Failure)]
        purchase.lots.extend(lots)
        purchase.failures.extend(failed)
        made = sum(len(lot.done.images) for lot in lots)
        purchase.missing = max(0, wanted - made)
        return failed, any(lot.short for lot in lots)

    async def _at_once(
        self, order: Order, purchase: Purchase, offer: Offer, permit: Permit
    ) -> list[Lot | Failure]:
        # As many calls beside the first as there are slots; the rest stays missing and
        # is bought in the next round, here again if nothing went wrong.
        per_call, want = offer.capabilities.n_max, (offer.id, order.wish.operation)
        assert order.place is not None
        shares = [(permit, min(per_call, purchase.missing))]
        held = {permit.id: permit}
        try:
            for done in range(per_call, purchase.missing, per_call):
                if self.line.wanted(want):
                    break  # the rest stands in line like everybody else
                more = await self.board.admit(*want)
                if more is None:
                    break
                self.line.took(order.place, offer.upstream)
                held[more.id] = more
                shares.append((more, min(per_call, purchase.missing - done)))
            calls = [
                self._attempt(order, purchase, offer, n, each, held)
                for each, n in shares
            ]
            return await self._all_of(purchase, calls)
        finally:
            for unused in held.values():
                await self._give_back(order, offer, unused, UNUSED)

    async def _all_of(
        self,
        purchase: Purchase,
        calls: Sequence[Coroutine[object, object, Lot | Failure]],
    ) -> list[Lot | Failure]:
        # Waits for all: what one delivered is not lost because another one broke. That
        # one may have been bought, so that nothing is bought after it.
        results = await asyncio.gather(*calls, return_exceptions=True)
        delivered = [r for r in results if isinstance(r, Lot | Failure)]
        broken = [r for r in results if isinstance(r, BaseException)]
        if broken and not any(isinstance(r, Lot) for r in delivered):
            raise broken[0]
        purchase.broken = purchase.broken or bool(broken)
        for error in broken:
            if not isinstance(error, GatewayError | FencedError):
                self.crashed(error, "a call beside one that delivered")
        return delivered

    async def _attempt(
        self,
        order: Order,
        purchase: Purchase,
        offer: Offer,
        n: int,
        permit: Permit,
        held: dict[int, Permit],
    ) -> Lot | Failure:
        # ``held`` are permits of calls that have not begun: whoever made them keeps
        # account of these.
        held.pop(permit.id, None)
        purchase.attempts += 1
        outcome = UNUSED
        try:
            call = Call(
                order=order,
                offer=offer,
                seq=purchase.attempts,
                job=job_at(offer, order.job, n, purchase.attempts),
                estimate_nanousd=order.cost_nanousd(offer, n) or 0,
                started_ms=self.clock.now_ms(),
                started_mono_ms=self.clock.monotonic_ms(),
                stands_by=purchase.stands_by,
            )
            result = await self.calls.make(call, _route_json(call, purchase.decision))
            outcome = _outcome_of(result, call)
        finally:
            await self._give_back(order, offer, permit, outcome)
        return result


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


def _outcome_of(result: Lot | Failure, call: Call) -> Outcome:
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


def _route_json(call: Call, decision: Decision | None) -> str | None:
    return decision_json(decision) if call.seq == 1 and decision else None


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
