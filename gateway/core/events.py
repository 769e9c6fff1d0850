"""What happened, for whoever counts, logs or traces it. Frozen, without secrets."""

from __future__ import annotations

from dataclasses import dataclass

from providers.kit.contract import Usage


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request for pictures was about, as far as was known when it ended.

    ``variant`` is None for one that the catalogue does not name.
    """

    operation: str
    mode: str
    variant: str | None


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """One HTTP request was answered. ``route`` is the template, never the raw path.

    ``asked`` and ``outcome`` (of ``RequestOutcome``) are there for a request for
    pictures that came to no task: of all others their tasks tell.
    """

    request_id: str
    method: str
    route: str
    status: int
    duration_ms: int
    error_code: str | None = None
    task_id: str | None = None
    tenant_id: str | None = None
    key_id: str | None = None
    client_gone: bool = False
    repeats: bool = False
    """It asked again for ``task_id``, which an earlier request had begun."""
    asked: Asked | None = None
    outcome: str | None = None


@dataclass(frozen=True, slots=True)
class AttemptFinished:
    """One call of one task on one offer is over; ``outcome`` is done or a kind."""

    task_id: str
    seq: int
    offer_id: str
    upstream: str
    variant: str
    outcome: str
    billed: str
    duration_ms: int
    cost_nanousd: int
    estimate_nanousd: int = 0
    """What it was thought to cost; 0 where what it costs was not reported."""
    upstream_status: int | None = None
    upstream_code: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """One task is over, settled or voided.

    ``outcome`` is a value of ``RequestOutcome``. ``overhead_ms`` is the time the
    gateway itself took: without calls to upstreams and without waiting for slots.
    """

    task_id: str
    variant: str
    operation: str
    mode: str
    state: str
    outcome: str
    error_code: str | None
    attempts: int
    saved_by_fallback: bool
    images: int
    duration_ms: int
    charged_nanocredits: int
    absorbed_nanocredits: int
    usage: Usage | None
    usage_source: str
    overhead_ms: int | None = None


@dataclass(frozen=True, slots=True)
class FellOver:
    """A task goes on at another upstream; ``reason`` is the kind of the failure."""

    task_id: str
    variant: str
    from_upstream: str
    to_upstream: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseExpired:
    """A worker took over a task whose last one was not heard of any more."""

    task_id: str
    variant: str
    takeovers: int


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A breaker moved to another state."""

    offer_id: str
    upstream: str
    operation: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class UpstreamChanged:
    """An operator changed an upstream: it was drained, enabled or reset."""

    upstream: str
    change: str


@dataclass(frozen=True, slots=True)
class HoldRefused:
    """A request was turned away for want of credits."""

    variant: str


@dataclass(frozen=True, slots=True)
class WebhookTried:
    """One try of a webhook is over; ``outcome`` is delivered, retry or failed.

    ``host`` is all that is told of its URL, which may hold a secret.
    """

    delivery_id: str
    task_id: str
    tenant_id: str
    host: str
    outcome: str
    tries: int
    duration_ms: int
    status: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestShed:
    """A request for pictures was refused because too many wait already.

    ``reason`` is a value of ``admission.Reason``; ``wait_ms`` is what it would have
    waited, None if that is not known.
    """

    variant: str
    reason: str
    tenant_id: str
    wait_ms: int | None = None


@dataclass(frozen=True, slots=True)
class PressureChanged:
    """New work is refused from now on, or again let in, because of a ``signal``."""

    signal: str
    on: bool
    value: float


@dataclass(frozen=True, slots=True)
class StoreChanged:
    """The store of pictures is away or back; ``detail`` says why, to operators only."""

    state: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Journaled:
    """What the database could not take was kept on the disk, or came from there.

    ``outcome``: kept, booked, never_begun, taken_over (by another process, which books
    it), too_late (the task had been closed without it: a loss of the operator).
    """

    task_id: str
    what: str
    outcome: str


@dataclass(frozen=True, slots=True)
class ConfigRead:
    """The configuration was read again.

    ``outcome``: reloaded, unchanged, or refused: then the old one goes on. ``changed``
    names the sections that differ.
    """

    outcome: str
    changed: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SharedStateChanged:
    """What the processes share in Redis is out of reach from now on, or again there."""

    degraded: bool
    reason: str = ""


Event = (
    RequestFinished
    | AttemptFinished
    | TaskFinished
    | FellOver
    | LeaseExpired
    | BreakerChanged
    | UpstreamChanged
    | HoldRefused
    | WebhookTried
    | RequestShed
    | PressureChanged
    | StoreChanged
    | Journaled
    | SharedStateChanged
    | ConfigRead
)
