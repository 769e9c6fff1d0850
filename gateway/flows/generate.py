"""A request from its hold to its settled answer, while the client waits.

The credits are held before anything is bought, and settled before anything is
answered. A client that hangs up changes nothing: the work is paid, so it is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

from gateway.core import pricing, tasks
from gateway.core.admission import Reason, retry_after_s
from gateway.core.catalogue import Catalogue, Operation
from gateway.core.errors import (
    ContentRefusedError,
    DeadlineExceededError,
    GatewayError,
    InsufficientCreditsError,
    InvalidRequestError,
    NothingWantedError,
    RateLimitedError,
    ServiceUnavailableError,
    StoreAwayError,
    UpstreamsExhaustedError,
    UpstreamsRestError,
    insufficient_credits,
    max_credits_exceeded,
)
from gateway.core.events import HoldRefused, RequestShed, TaskFinished
from gateway.core.ledger import Balance, Settled
from gateway.core.orders import class_of, order_json
from gateway.core.outcomes import RequestOutcome
from gateway.core.preferences import routing_facts
from gateway.core.requests import ImageRequest
from gateway.core.routing import Wish
from gateway.core.sizes import Size
from gateway.core.tasks import DeliveryMode, TaskState, cancelled_json
from gateway.core.tokens import (
    AUTO_SIZE,
    estimated_usage,
    reported_usage,
)
from gateway.flows.admission import shed_error
from gateway.flows.calls import Failure, Order
from gateway.flows.dispatch import Dispatcher, Purchase, decision_json
from gateway.flows.inputs import NO_INPUTS, Inputs
from gateway.flows.line import Place
from gateway.flows.results import Results
from gateway.flows.tasks import Facts, Picture, TaskView, ended_empty
from gateway.ports import (
    AttemptRecord,
    Chance,
    Claimed,
    Clock,
    Events,
    Key,
    Ledger,
    NewTask,
    StoredResult,
    Studio,
    TaskEnd,
    TaskStore,
)
from providers.kit.contract import (
    Billed,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    Usage,
)

SYNC_DEADLINE_MS = 300_000
ASYNC_DEADLINE_MS = 900_000
SETTLE_TRIES_MAX = 30
SETTLE_PAUSE_S = 1.0
STORE_AWAY_MAX_MS = 600_000
"""So long the pictures of an async task wait for a store that is away."""
STORE_PAUSE_S = 5.0
RETRY_AFTER_MAX_S = 60
MAY_TRY_AGAIN = frozenset({429, 500, 503})
"""Failures after which the same idempotency key buys anew: nothing was delivered."""
RETRY_AFTER_DEFAULT_S = 5


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task whose hold is committed: from here a crash loses nothing.

    ``fence`` is that of a worker's claim, ``history`` what another worker left;
    without ``buys`` nothing is bought beside that.
    """

    task: NewTask
    request: ImageRequest
    deadline_mono_ms: int
    inputs: Inputs = NO_INPUTS
    fence: int = 0
    history: tuple[AttemptRecord, ...] = ()
    buys: bool = True
    place: Place | None = None
    """Where it stands in line for a slot; given back when it is carried out."""
    since_mono_ms: int | None = None
    """When the gateway took it up."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """An earlier task that the request repeats."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Once:
    """What makes a request one of a kind.

    ``is_retry``: the client's library says that it tries again by itself.
    """

    fingerprint: str = ""
    idempotency_key: str | None = None
    is_retry: bool = False


NOT_ONCE = Once()


@dataclass(frozen=True, slots=True)
class Later:
    """Says that a task is async. ``origin`` is where its links begin."""

    origin: str


@dataclass(frozen=True, slots=True)
class Generate:
    """Makes pictures for one tenant: hold, buy, keep, settle."""

    catalogue: Catalogue
    store: TaskStore
    dispatcher: Dispatcher
    results: Results
    ledger: Ledger
    studio: Studio
    clock: Clock
    chance: Chance
    events: Events
    today: Callable[[], str]
    names_upstreams: bool = True
    """Whether tenants may read the names of upstreams."""
    process_id: str = "this"
    """The process that carries sync tasks out."""

    def new_task_id(self) -> str:
        """Draw the id of the next task."""
        suffix = self.chance.token(tasks.TASK_ID_ALPHABET, tasks.TASK_ID_CHARS)
        return tasks.task_id_for(self.clock.now_ms() // 1000, suffix)

    async def check_any_credits(self, key: Key) -> None:
        """Turn away who has nothing at all, before a large body is read.

        Raises:
            InsufficientCreditsError: nothing is available.
        """
        balance = await self.ledger.balance(key.tenant_id) or Balance()
        if balance.available <= 0:
            raise insufficient_credits(1, balance.available)

    async def check_credits(self, request: ImageRequest, key: Key) -> None:
        """Turn away who cannot pay before anything is fetched for the request.

        Raises:
            InsufficientCreditsError: less is available than the request may cost.
        """
        needed = pricing.hold_nanocredits(request)
        balance = await self.ledger.balance(key.tenant_id) or Balance()
        if balance.available < needed:
            self.events.emit(HoldRefused(request.variant.name))
            raise insufficient_credits(needed, balance.available)

    def check_route(self, request: ImageRequest) -> None:
        """See that there is somewhere to buy, for no more than may be paid.

        Raises:
            InvalidRequestError: it may cost more than ``max_credits``.
            ServiceUnavailableError: no upstream is configured for the variant, or the
                preferences leave none.
        """
        offers = self.catalogue.offers.get(request.variant.name)
        if not offers:
            raise UpstreamsExhaustedError(
                f"No upstream is configured for {request.variant.name}. "
                "Choose another model from GET /v1/models, or ask the operator.",
                code="no_available_channel",
                client_may_retry=False,
            )
        most, limit = pricing.hold_nanocredits(request), request.routing.max_nanocredits
        if limit is not None and most > limit:
            raise max_credits_exceeded(most, limit)
        left_out = [(o.upstream, request.routing.leaves_out(o)) for o in offers]
        if all(by for _, by in left_out):
            raise NothingWantedError(
                f"No upstream of {request.variant.name} is left to send this request "
                f"to: {self._left_out_text(left_out)}. Change the preferences.",
                code="no_available_channel",
                client_may_retry=False,
            )

    def _left_out_text(self, left_out: Sequence[tuple[str, str | None]]) -> str:
        # Which upstreams there are is told only to those who may choose among them.
        parts = []
        for name in sorted({by for _, by in left_out if by}):
            upstreams = sorted(upstream for upstream, by in left_out if by == name)
            what = ", ".join(upstreams) if self.names_upstreams else "some"
            parts.append(f"routing.{name} leaves out {what}")
        return "; ".join(parts)

    async def accept(
        self,
        task_id: str,
        request: ImageRequest,
        key: Key,
        inputs: Inputs = NO_INPUTS,
        once: Once = NOT_ONCE,
        later: Later | None = None,
    ) -> Accepted | Repeated:
        """Hold the most that the request can cost.

        With ``later`` the task is put into the queue for a worker; else it is the
        caller's to carry out.

        ``Repeated`` when its idempotency key stands for an earlier task: then nothing
        was held. The inputs stay with the caller, unless it is accepted: then
        ``carry_out`` closes them.

        Raises:
            GatewayError: as ``check_route``; nothing was held.
            InsufficientCreditsError: it is not there, or not in a budget of the key;
                nothing was held.
            RateLimitedError: as many tasks of the key are in flight as may.
            IdempotencyConflictError: the key stands for another request.
            QueueFullError: as many tasks wait as may wait.
            ServiceUnavailableError: the store cannot be written.
        """
        self.check_route(request)
        now_ms, since_mono_ms = self.clock.now_ms(), self.clock.monotonic_ms()
        lasts_ms = ASYNC_DEADLINE_MS if later is not None else SYNC_DEADLINE_MS
        task = NewTask(
            id=task_id,
            tenant_id=key.tenant_id,
            key_id=key.id,
            variant=request.variant.name,
            operation=request.operation.value,
            mode=DeliveryMode.SYNC if later is None else DeliveryMode.ASYNC,
            request_json=json.dumps(_facts_of(request)),
            hold_nanocredits=pricing.hold_nanocredits(request),
            created_ms=now_ms,
            deadline_ms=now_ms + lasts_ms,
            fingerprint=once.fingerprint,
            idempotency_key=once.idempotency_key,
            callback_url=request.callback_url,
            origin=later.origin if later is not None else "",
            task_class=class_of(request),
            order_json=_order_json(request) if later is not None else None,
            owner=self.process_id if later is None else None,
            keys_version=None if key.counted else key.keys_version,
        )
        try:
            earlier = await self.store.open(task)
        except InsufficientCreditsError:
            self.events.emit(HoldRefused(task.variant))
            raise
        if earlier is not None:
            return Repeated(earlier)
        deadline_ms = self.clock.monotonic_ms() + lasts_ms
        return Accepted(task, request, deadline_ms, inputs, since_mono_ms=since_mono_ms)

    async def carry_out(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None = None,
    ) -> TaskView:
        """Buy, keep and settle; the payloads of the pictures belong to the caller.

        ``links`` stores the pictures to be linked to; otherwise they are kept only
        until the answer is out. ``on_partial`` is handed partial pictures, and owns
        them.

        Raises:
            GatewayError: nothing was delivered; the hold is released.
        """
        try:
            return await self._carried_out(accepted, on_partial, links=links)
        finally:
            accepted.inputs.close()
            if accepted.place is not None:
                self.dispatcher.line.leave(accepted.place)

    async def _carried_out(
        self,
        accepted: Accepted,
        on_partial: Callable[[Partial], None] | None,
        *,
        links: bool,
    ) -> TaskView:
        order = replace(self._order(accepted), on_partial=on_partial)
        try:
            purchase = await self.dispatcher.buy(order)
        except ServiceUnavailableError as error:
            await self.give_up(accepted, error)
            raise
        if not purchase.lots:
            refusal = self._explained(_client_error(purchase), purchase)
            is_sync = accepted.task.mode is DeliveryMode.SYNC
            if is_sync and purchase.waited_out and not purchase.failures:
                refusal = self._waited_out(accepted)
            if isinstance(refusal, ServiceUnavailableError):
                refusal.extra = self._other_variant(accepted.request)
            await self.give_up(accepted, refusal, purchase)
            raise refusal
        _let_extras_go(accepted.request.n, purchase)
        try:
            await self._convert(accepted.request, purchase)
            kept = await self._kept(accepted, purchase, links=links)
            return await self._settled(accepted, purchase, kept)
        except BaseException:
            for image in purchase.images:
                image.payload.close()
            raise

    def _explained(self, refusal: GatewayError, purchase: Purchase) -> GatewayError:
        # Says so where the preferences had a part in there being nowhere (else) to go.
        decision = purchase.decision
        if decision is None or not isinstance(refusal, ServiceUnavailableError):
            return refusal
        left_out = [
            (c.offer.upstream, c.unwanted) for c in decision.left_out if c.unwanted
        ]
        notes = [self._left_out_text(left_out)] if left_out else []
        alone = decision.preferences.attempts_max == 1
        if alone and purchase.failures and len(decision.ranked) > 1:
            notes.append("routing.allow_fallbacks allows no second try")
        if not notes:
            return refusal
        return UpstreamsExhaustedError(
            f"{refusal} Your preferences: {'; '.join(notes)}.",
            code=refusal.code if purchase.failures else "no_available_channel",
            retry_after_s=refusal.retry_after_s,
            client_may_retry=refusal.client_may_retry,
        )

    def _waited_out(self, accepted: Accepted) -> GatewayError:
        task, reason = accepted.task, Reason.WAITED_OUT
        self.events.emit(RequestShed(task.variant, reason.value, task.tenant_id))
        return shed_error(reason, retry_after_s(None, self.chance.fraction()))

    def _other_variant(self, request: ImageRequest) -> dict[str, object]:
        # What else could be asked for, by the words of the task contract.
        others = [
            name
            for name, offers in self.catalogue.offers.items()
            if offers and name != request.variant.name
        ]
        return {"fallback_suggestion": others[0]} if others else {}

    async def give_up(
        self,
        accepted: Accepted,
        error: GatewayError,
        purchase: Purchase | None = None,
    ) -> None:
        """Release the hold and close the task as failed."""
        end = TaskEnd(
            task_id=accepted.task.id,
            tenant_id=accepted.task.tenant_id,
            state=TaskState.FAILED,
            finished_ms=self.clock.now_ms(),
            error_json=json.dumps(task_error(error)),
            route_json=_route_json(purchase),
            forget_key=error.status in MAY_TRY_AGAIN
            and not _maybe_bought(purchase, error),
            fence=accepted.fence,
            attempts=tuple(
                replace(lot.end, won=False)
                for lot in (purchase.lots if purchase else ())
            ),
        )
        settled = await self._finish(end)
        self._tell(accepted, end, settled, purchase, error)

    async def cancel(self, accepted: Accepted) -> Accepted | None:
        """Close a task that its owner cancelled, after the work on it was stopped.

        Its jobs are stopped where their upstreams can do that. The tenant is charged
        what these say was used. Any other call that was out may have been billed: it
        is booked as waste.

        Where it is too late, because a job has ended, what is left to be carried out
        is returned: the pictures that are there are delivered and charged.
        """
        left = await self._left_of(accepted)
        stop = await self.dispatcher.stop(self._order(left))
        if stop.too_late:
            return await self._left_of(accepted)
        usage = reduce(Usage.plus, stop.usages) if stop.usages else None
        variant = accepted.request.variant
        due = pricing.charge_nanocredits(usage, variant) if usage is not None else 0
        end = TaskEnd(
            task_id=accepted.task.id,
            tenant_id=accepted.task.tenant_id,
            state=TaskState.CANCELLED,
            finished_ms=self.clock.now_ms(),
            due_nanocredits=due,
            usage=usage,
            usage_source="none" if usage is None else "reported",
            price=None if usage is None else variant.tenant_price,
            error_json=cancelled_json(due),
            fence=accepted.fence,
        )
        settled = await self._finish(end)
        self._tell(accepted, end, settled, None, None)
        return None

    async def _left_of(self, accepted: Accepted) -> Accepted:
        record = await self.store.get(accepted.task.id)
        history = record.attempts if record is not None else ()
        return replace(accepted, history=history, buys=False)

    async def abandon(self, claimed: Claimed) -> None:
        """Close a task that nobody can carry out, for free."""
        error = ServiceUnavailableError(
            "The gateway could not carry this task out. You were not charged. Send the "
            "request again."
        )
        now_ms = self.clock.now_ms()
        await self._finish(
            TaskEnd(
                task_id=claimed.record.id,
                state=TaskState.FAILED,
                finished_ms=now_ms,
                error_json=json.dumps(task_error(error)),
                forget_key=True,
                fence=claimed.fence,
            )
        )
        self.events.emit(
            ended_empty(
                claimed.record, TaskState.FAILED, error.counts_as, now_ms, error.code
            )
        )

    async def _convert(self, request: ImageRequest, purchase: Purchase) -> None:
        # What an upstream gave in another format than was asked for. A picture that
        # cannot be converted is delivered as it is: it is paid, and the answer says
        # what it is.
        wanted = f"image/{request.output_format}"
        for place, lot in enumerate(purchase.lots):
            images = list(lot.done.images)
            for index, image in enumerate(images):
                if image.media_type == wanted:
                    continue
                converted = await self.studio.convert(
                    image, request.output_format, request.output_compression
                )
                if converted is not None:
                    image.payload.close()
                    images[index] = converted
            done = replace(lot.done, images=tuple(images))
            purchase.lots[place] = replace(lot, done=done)

    async def _kept(
        self, accepted: Accepted, purchase: Purchase, *, links: bool
    ) -> tuple[StoredResult, ...]:
        # A disk that takes no pictures ends a request for links: the pictures are the
        # operator's loss. An answer that carries them needs no disk.
        images = purchase.images[: accepted.request.n]
        try:
            return await self._stored(accepted, images, inline=not links)
        except ServiceUnavailableError as error:
            if not links:
                now_ms = self.clock.now_ms()
                return self.results.unkept(accepted.task.id, images, now_ms)
            error.client_may_retry = False  # it would be bought again
            await self.give_up(accepted, error, purchase)
            raise

    async def _stored(
        self, accepted: Accepted, images: Sequence[MadeImage], *, inline: bool
    ) -> tuple[StoredResult, ...]:
        # What was paid for an async task is worth a wait for a store that is away.
        waits = accepted.task.mode is DeliveryMode.ASYNC
        until_ms = self.clock.monotonic_ms() + STORE_AWAY_MAX_MS
        while True:
            try:
                return await self.results.keep(
                    accepted.task.id, images, self.clock.now_ms(), inline=inline
                )
            except StoreAwayError:
                if not waits or self.clock.monotonic_ms() >= until_ms:
                    raise
            await self.clock.sleep(STORE_PAUSE_S)

    async def _settled(
        self,
        accepted: Accepted,
        purchase: Purchase,
        kept: tuple[StoredResult, ...],
    ) -> TaskView:
        request, task = accepted.request, accepted.task
        images = purchase.images[: request.n]
        now_ms = self.clock.now_ms()
        usage, source = _usage_of(accepted, purchase)
        facts = _resolved(request, purchase, images)
        end = TaskEnd(
            task_id=task.id,
            tenant_id=task.tenant_id,
            state=TaskState.COMPLETED,
            finished_ms=now_ms,
            due_nanocredits=pricing.charge_nanocredits(usage, request.variant),
            usage=usage,
            usage_source=source,
            price=request.variant.tenant_price,
            answer_json=json.dumps(
                {
                    "background": facts.background,
                    "output_format": facts.output_format,
                    "quality": facts.quality,
                    "size": facts.size,
                }
            ),
            attempts=tuple(lot.end for lot in purchase.lots),
            results=kept,
            fence=accepted.fence,
        )
        settled = await self._finish(end)
        self._tell(accepted, end, settled, purchase, None)
        return TaskView(
            id=task.id,
            created_s=task.created_ms // 1000,
            variant=task.variant,
            mode=task.mode,
            state=end.state,
            reserved_nanocredits=task.hold_nanocredits,
            charged_nanocredits=settled.charged,
            usage=usage,
            usage_source=source,
            facts=facts,
            pictures=tuple(map(_picture, images, kept)),
        )

    async def _finish(self, end: TaskEnd) -> Settled:
        # What was bought must be booked: a store that is busy is asked again for as
        # long as a restart of it may take. After that, recovery closes the task.
        for attempt in range(1, SETTLE_TRIES_MAX + 1):
            try:
                return await self.store.finish(end)
            except ServiceUnavailableError:
                if attempt == SETTLE_TRIES_MAX:
                    raise
                await self.clock.sleep(SETTLE_PAUSE_S)
        raise AssertionError(end)

    def _order(self, accepted: Accepted) -> Order:
        request, variant = accepted.request, accepted.request.variant
        sizes = accepted.inputs.sizes or None
        return Order(
            job=_job(accepted, reported_usage(request, sizes)),
            wish=wish_of(request),
            variant=variant.name,
            offers=self.catalogue.offers[variant.name],
            cost_nanousd=pricing.cost_rule(request, sizes),
            deadline_ms=accepted.deadline_mono_ms,
            today=self.today(),
            fence=accepted.fence,
            history=accepted.history,
            patient=accepted.task.mode is DeliveryMode.ASYNC,
            buys=accepted.buys,
            order_json=partial(_order_json, request),
            preferences=request.routing,
            tenant_id=accepted.task.tenant_id,
            place=accepted.place,
        )

    def _tell(
        self,
        accepted: Accepted,
        end: TaskEnd,
        settled: Settled,
        purchase: Purchase | None,
        error: GatewayError | None,
    ) -> None:
        self.events.emit(
            TaskFinished(
                task_id=end.task_id,
                variant=accepted.task.variant,
                operation=accepted.task.operation,
                mode=accepted.task.mode.value,
                state=end.state.value,
                outcome=_outcome(end, error).value,
                error_code=error.code if error else None,
                attempts=purchase.attempts if purchase else 0,
                saved_by_fallback=bool(
                    purchase and purchase.lots and purchase.failures
                ),
                images=len(end.results),
                duration_ms=max(0, self.clock.now_ms() - accepted.task.created_ms),
                charged_nanocredits=settled.charged,
                absorbed_nanocredits=settled.absorbed,
                usage=end.usage,
                usage_source=end.usage_source,
                overhead_ms=self._overhead_ms(accepted, purchase),
            )
        )

    def _overhead_ms(self, accepted: Accepted, purchase: Purchase | None) -> int | None:
        # What was neither delivered nor refused elsewhere says nothing of the gateway.
        if purchase is None or not purchase.lots or accepted.since_mono_ms is None:
            return None
        took_ms = self.clock.monotonic_ms() - accepted.since_mono_ms
        return max(0, took_ms - purchase.away_ms)


def _outcome(end: TaskEnd, error: GatewayError | None) -> RequestOutcome:
    if error is not None:
        return error.counts_as
    if end.state is TaskState.CANCELLED:
        return RequestOutcome.CANCELLED
    return RequestOutcome.SUCCESS


def wish_of(request: ImageRequest) -> Wish:
    """Say what a request needs an offer to be able to do."""
    return Wish(
        operation=request.operation,
        size=request.size,
        quality=request.quality,
        n=request.n,
        background=request.background,
        references=len(request.references),
        mask=request.mask is not None,
    )


def _maybe_bought(purchase: Purchase | None, error: GatewayError) -> bool:
    # Then the same key must not buy again. Where nobody can tell what was bought, the
    # error says whether a call was made.
    if purchase is None:
        return error.client_may_retry is False
    return bool(purchase.lots) or any(
        failure.error.billed is not Billed.NO for failure in purchase.failures
    )


def task_error(error: GatewayError) -> dict[str, object]:
    """Say what went wrong with a task in the words of the task contract.

    ``http`` is what the client was answered with, for whoever repeats the request.
    """
    code = _TASK_CODE_BY_CODE.get(error.code, _TASK_CODE_BY_STATUS.get(error.status))
    return {
        "code": code or "unknown_error",
        "message": str(error),
        "type": "task_error",
        "http": {
            "status": error.status,
            "type": error.type,
            "code": error.code,
            "param": error.param,
        },
    }


_TASK_CODE_BY_CODE = {
    "moderation_blocked": "content_policy_violation",
    "generation_timeout": "generation_timeout",
    "generation_failed_no_content": "generation_failed_no_content",
}
_TASK_CODE_BY_STATUS = {
    400: "invalid_parameters",
    402: "quota_exceeded",
    429: "resource_exhausted",
    500: "service_error",
    503: "service_unavailable",
    504: "generation_timeout",
}


def _facts_of(request: ImageRequest) -> dict[str, object]:
    # What an operator may need later; never the prompt, nor who asked.
    return {
        "size": request.size.text if request.size else "auto",
        "quality": request.quality,
        "n": request.n,
        "output_format": request.output_format,
        "background": request.background,
        "references": len(request.references),
        "response_format": request.response_format,
        "prompt_chars": len(request.prompt),
        "routing": routing_facts(request.routing),
    }


def _order_json(request: ImageRequest) -> str:
    pictures = len(request.references)
    return order_json(request, pictures, has_mask=request.mask is not None)


def _job(accepted: Accepted, each: Usage) -> ImageJob:
    request = accepted.request
    return ImageJob(
        task_id=accepted.task.id,
        model="",
        operation=Operation(accepted.task.operation),
        prompt=request.prompt,
        width_px=request.size.width_px if request.size else None,
        height_px=request.size.height_px if request.size else None,
        quality=request.quality,
        n=request.n,
        output_format=request.output_format,
        expected=each,
        deadline_s=0.0,
        background=request.background,
        output_compression=request.output_compression,
        moderation=request.moderation,
        user=request.user,
        safety_identifier=request.safety_identifier,
        input_fidelity=request.input_fidelity,
        references=accepted.inputs.references,
        mask=accepted.inputs.mask,
        partial_images=request.partial_images if request.stream else 0,
    )


def _picture(image: MadeImage, stored: StoredResult) -> Picture:
    return Picture(
        index=stored.index,
        media_type=image.media_type,
        width_px=image.width_px,
        height_px=image.height_px,
        revised_prompt=image.revised_prompt,
        made=image,
        blob=stored.blob,
        expires_ms=stored.expires_ms,
    )


def _let_extras_go(n: int, purchase: Purchase) -> None:
    # An upstream may give more than it was asked for.
    left = n
    for place, lot in enumerate(purchase.lots):
        wanted, extras = lot.done.images[:left], lot.done.images[left:]
        left -= len(wanted)
        for extra in extras:
            extra.payload.close()
        if extras and wanted:
            done = replace(lot.done, images=wanted)
            purchase.lots[place] = replace(lot, done=done)


def _usage_of(accepted: Accepted, purchase: Purchase) -> tuple[Usage, str]:
    total, source = Usage(), "reported"
    request = accepted.request
    references = accepted.inputs.sizes or None
    for lot in purchase.lots:
        usage = lot.done.usage
        if usage is None:
            source = "estimated"
            sizes = [Size(i.width_px, i.height_px) for i in lot.done.images]
            usage = estimated_usage(
                request,
                sizes,
                quality=lot.done.quality,
                references=references,
                partials=lot.partials,
            )
        total = total.plus(usage)
    return total, source


def facts_of(request: ImageRequest) -> Facts:
    """Say of the pictures what is known before they are made; never ``auto``."""
    quality = request.quality
    if quality not in request.variant.tile_bases:
        quality = max(request.variant.tile_bases.items(), key=lambda q: q[1])[0]
    return Facts(
        background="transparent" if request.background == "transparent" else "opaque",
        output_format=request.output_format,
        quality=quality,
        size=(request.size or AUTO_SIZE).text,
    )


def _resolved(
    request: ImageRequest, purchase: Purchase, images: tuple[MadeImage, ...]
) -> Facts:
    done, first, known = purchase.lots[0].done, images[0], facts_of(request)
    said = done.quality in request.variant.tile_bases
    background = done.background or request.background
    return Facts(
        background="transparent" if background == "transparent" else "opaque",
        output_format=first.media_type.removeprefix("image/"),
        quality=done.quality if said and done.quality else known.quality,
        size=f"{first.width_px}x{first.height_px}",
    )


def _route_json(purchase: Purchase | None) -> str | None:
    # A task that never got an attempt still says why.
    if purchase is None or purchase.attempts or purchase.decision is None:
        return None
    return decision_json(purchase.decision)


def _client_error(purchase: Purchase) -> GatewayError:
    """Say what the client meets when nothing was delivered."""
    if not purchase.failures:
        if purchase.decision is not None and purchase.decision.resting:
            return _all_limited(purchase)
        return _unavailable(
            purchase, "No upstream can serve this request at the moment."
        )
    for failure in sorted(purchase.failures, key=_strictness):
        refusal = _refusal(failure)
        if refusal is not None:
            return refusal
    kinds = {failure.error.kind for failure in purchase.failures}
    if kinds == {FailureKind.RATE_LIMITED}:
        return _all_limited(purchase)
    if kinds == {FailureKind.UNSUPPORTED}:
        return InvalidRequestError(
            "No upstream supports this combination of parameters. You were not "
            "charged. Try another size, quality or output_format.",
            code="unsupported_by_upstreams",
        )
    return _unavailable(
        purchase, "Every upstream that could serve this request failed."
    )


_STRICTEST_FIRST = (
    FailureKind.CONTENT_POLICY,
    FailureKind.INVALID_REQUEST,
    FailureKind.TIMEOUT,
)


def _strictness(failure: Failure) -> int:
    # Of several calls at once the refusal tells the client most.
    kind = failure.error.kind
    known = kind in _STRICTEST_FIRST
    return _STRICTEST_FIRST.index(kind) if known else len(_STRICTEST_FIRST)


def _all_limited(purchase: Purchase) -> RateLimitedError:
    return UpstreamsRestError(
        "Every upstream is rate limited at the moment. You were not charged. "
        "Try again after the time in Retry-After.",
        retry_after_s=_retry_after_s(purchase),
    )


def _refusal(failure: Failure) -> GatewayError | None:
    # Failures that end a request at once, whatever other upstreams could do.
    error = failure.error
    if error.kind is FailureKind.CONTENT_POLICY:
        return ContentRefusedError(
            error.client_message
            or "The request was refused by moderation. You were not charged. "
            "Change the prompt or the pictures.",
        )
    if error.kind is FailureKind.INVALID_REQUEST:
        return InvalidRequestError(
            error.client_message
            or "The upstream refused the request as invalid. You were not charged.",
            code="invalid_request",
        )
    if error.kind is FailureKind.TIMEOUT or failure.accepted:
        return DeadlineExceededError(
            "The upstream did not answer in time. You were not charged. "
            "Large sizes and high quality take longest: try a smaller one."
        )
    return None


def _unavailable(purchase: Purchase, what: str) -> ServiceUnavailableError:
    # A client's library that repeats the call at once would multiply the attempts
    # made here; one that was turned away without an attempt may well come back.
    maybe_bought = any(f.error.billed is not Billed.NO for f in purchase.failures)
    return UpstreamsExhaustedError(
        f"{what} You were not charged. Try again after the time in Retry-After, "
        "or choose another model.",
        retry_after_s=_retry_after_s(purchase),
        client_may_retry=False if maybe_bought or purchase.failures else None,
    )


def _retry_after_s(purchase: Purchase) -> int:
    asked = [f.error.retry_after_s for f in purchase.failures if f.error.retry_after_s]
    soonest_s = min(asked, default=float(RETRY_AFTER_DEFAULT_S))
    if purchase.soonest_retry_ms is not None:
        soonest_s = min(soonest_s, purchase.soonest_retry_ms / 1000)
        if not asked and not purchase.failures:
            soonest_s = purchase.soonest_retry_ms / 1000
    return max(1, min(RETRY_AFTER_MAX_S, -int(-soonest_s // 1)))
