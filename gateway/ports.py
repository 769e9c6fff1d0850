"""What the flows need from the outside world, in the flows' own words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.core.breaker import BreakerState, Health, Outcome, Window
from gateway.core.catalogue import TenantPrice
from gateway.core.events import Event
from gateway.core.fleet import Hearing, Notice, Telling
from gateway.core.key_limits import NO_LIMITS, KeyLimits, KeyUse
from gateway.core.ledger import Balance, Settled
from gateway.core.limits import Rate
from gateway.core.money import decimal_text
from gateway.core.pricing import CostSource
from gateway.core.routing import NO_PREFERENCES, Preferences
from gateway.core.statements import Cursor, Span, moment_or_none
from gateway.core.tasks import AttemptState, DeliveryMode, TaskState
from gateway.core.terms import USUAL, Terms, card_facts, multiplier_text
from gateway.core.uptime import Slot
from gateway.core.webhooks import Answer, Delivery, Places, SigningKey
from providers.kit.contract import (
    Billed,
    FailureKind,
    MadeImage,
    Operation,
    Payload,
    Usage,
)

# --- records: what the store keeps, as the flows see it ---


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who owns credits."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Key:
    """A tenant's API key. The key itself is never stored, only ``digest`` of it."""

    id: str
    tenant_id: str
    digest: bytes
    display: str
    delivery: str
    created_ms: int
    revoked_ms: int | None = None
    routing: Preferences = NO_PREFERENCES
    """Where its requests go, unless they say otherwise."""
    limits: KeyLimits = NO_LIMITS
    meter_id: str = ""
    """The key that it goes back to by rotations: all of these are counted as one."""
    rotated_to: str | None = None
    """The key that took its place."""
    counted: bool = field(default=False, compare=False)
    """Whether what it uses was counted when it was read: it has budgets, or another key
    of its meter has."""
    keys_version: int = field(default=0, compare=False)
    """Its tenant's when it was read: it is raised when a key begins to be counted."""

    terms: Terms = USUAL
    """What its tenant pays."""
    suspended: bool = False
    """Whether its tenant is."""

    @property
    def meter(self) -> str:
        """Under which name it is counted."""
        return self.meter_id or self.id


@dataclass(frozen=True, slots=True)
class NewTask:
    """A task to be opened together with its hold. ``request_json`` has no prompt.

    ``fingerprint`` is what equal requests share; ``idempotency_key`` is the client's.
    ``callback_url`` is told of the end; ``origin`` is where its links begin.
    """

    id: str
    tenant_id: str
    key_id: str
    variant: str
    operation: str
    mode: DeliveryMode
    request_json: str
    hold_nanocredits: int
    created_ms: int
    deadline_ms: int
    fingerprint: str = ""
    idempotency_key: str | None = None
    callback_url: str | None = None
    origin: str = ""
    task_class: str = ""
    order_json: str | None = None
    """All that is needed to carry an async task out, prompt included; forgotten when
    the task is over. None for a sync one, until it has a job to be found again."""
    owner: str | None = None
    """The process that carries a sync task out."""
    keys_version: int | None = 0
    """That of the key, if it was not counted when it was read; None if it was."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """How to look for a task that a request repeats: by key, or by fingerprint.

    Without an ``idempotency_key``, the last task of the same API key with the same
    fingerprint is looked for that is not over, or was not yet at ``since_ms``.
    """

    tenant_id: str
    key_id: str
    fingerprint: str
    idempotency_key: str | None
    since_ms: int


@dataclass(frozen=True, slots=True)
class NewAttempt:
    """An attempt about to be sent. ``seq`` counts from 1 within its task."""

    task_id: str
    seq: int
    offer_id: str
    upstream: str
    estimate_nanousd: int
    started_ms: int
    fence: int = 0
    n: int = 1
    """How many pictures it asks for."""


@dataclass(frozen=True, slots=True)
class Rebuy:
    """A purchase after an attempt without a whole answer, which may have been paid.

    ``seq`` is that attempt, ``risked_nanousd`` what it may have cost.
    """

    task_id: str
    seq: int
    risked_nanousd: int
    created_ms: int


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended, and what it cost the operator.

    ``cost_nanousd`` is booked as waste unless ``won``; zero when nothing was billed.
    """

    task_id: str
    seq: int
    state: AttemptState
    finished_ms: int
    won: bool
    billed: Billed
    cost_nanousd: int
    cost_source: CostSource
    kind: str | None = None
    upstream_status: int | None = None
    upstream_code: str | None = None
    detail: str | None = None
    alive: bool = False
    """Given up with a job that may still be alive."""
    fence: int = 0


@dataclass(frozen=True, slots=True)
class StoredResult:
    """One picture kept for a task. ``blob`` names it in the blob store.

    ``inline`` pictures went out in the answer; their blob is gone once that answer
    was sent whole.
    """

    index: int
    blob: str
    media_type: str
    size_bytes: int
    width_px: int
    height_px: int
    inline: bool
    expires_ms: int
    revised_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class TaskEnd:
    """The end of a task: its settlement, and all that is committed with it.

    It is free unless it says what is due. ``attempts`` are the ends of those not ended
    yet; one that is not among them and still open is booked as maybe billed.
    ``route_json`` None leaves the decision that was kept with the first attempt.
    ``forget_key`` frees the idempotency key: the client may try again. ``fence`` is
    that of the claim; a stale one is refused. With ``tenant_id`` those of one tenant
    may be committed together.
    """

    task_id: str
    state: TaskState
    finished_ms: int
    due_nanocredits: int = 0
    usage: Usage | None = None
    usage_source: str = "none"
    answer_json: str | None = None
    error_json: str | None = None
    route_json: str | None = None
    attempts: tuple[AttemptEnd, ...] = ()
    results: tuple[StoredResult, ...] = ()
    forget_key: bool = False
    fence: int = 0
    tenant_id: str = ""
    price: TenantPrice | None = None
    """What ``due_nanocredits`` was worked out by."""


@dataclass(frozen=True, slots=True)
class JobAccepted:
    """An upstream's job id, and what it takes to find the job again."""

    task_id: str
    seq: int
    job_id: str
    order_json: str | None = None
    fence: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """An entry of the journal, under the name it has there."""

    name: str
    entry: JobAccepted | AttemptEnd | TaskEnd


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """An attempt as it is stored."""

    seq: int
    offer_id: str
    upstream: str
    state: AttemptState
    estimate_nanousd: int
    started_ms: int
    finished_ms: int | None
    job_id: str | None
    kind: str | None
    upstream_status: int | None
    upstream_code: str | None
    detail: str | None
    billed: str | None
    cost_nanousd: int
    n: int = 1
    alive: bool = False
    """Given up with a job that may still be alive."""


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as it is stored, with its attempts and results in order."""

    id: str
    tenant_id: str
    key_id: str
    variant: str
    operation: str
    mode: DeliveryMode
    state: TaskState
    request_json: str
    route_json: str | None
    answer_json: str | None
    error_json: str | None
    usage: Usage | None
    usage_source: str | None
    hold_nanocredits: int
    charged_nanocredits: int | None
    absorbed_nanocredits: int | None
    created_ms: int
    deadline_ms: int
    finished_ms: int | None
    attempts: tuple[AttemptRecord, ...]
    results: tuple[StoredResult, ...]
    started_ms: int | None = None
    callback_url: str | None = None
    origin: str = ""
    task_class: str = ""


@dataclass(frozen=True, slots=True)
class Claimed:
    """An async task taken by a worker, until its lease ends.

    Writes carry ``fence``: once somebody else has claimed the task, they are refused.
    ``takeovers`` counts how often a lease ended before its task. ``cancelled``: its
    owner has cancelled it meanwhile. ``expired``: nobody let go of it, its lease ended.
    """

    record: TaskRecord
    order_json: str
    fence: int
    takeovers: int
    cancelled: bool = False
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is open, by the books. ``oldest_queued_ms`` is when the task was made."""

    pending: int
    processing: int
    oldest_queued_ms: int | None
    held_nanocredits: int


@dataclass(frozen=True, slots=True)
class Cancelling:
    """The state of a task that was cancelled; ``ended`` by this call, not before."""

    state: TaskState
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """What renewing a lease tells: whether it still holds, and whether to stop."""

    held: bool
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which of a tenant's tasks to list; None takes all."""

    states: tuple[TaskState, ...] = ()
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class TaskLine:
    """A task in a list."""

    id: str
    variant: str
    state: TaskState
    created_ms: int
    started_ms: int | None
    finished_ms: int | None
    results: int
    has_error: bool
    charged_nanocredits: int | None
    task_class: str = ""


@dataclass(frozen=True, slots=True)
class Drift:
    """One broken invariant found by the audit. ``rule`` is its number, such as I2."""

    invariant: str
    subject: str
    detail: str
    drift_nanocredits: int
    rule: str = ""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit looked at and what it found; clean means no drift."""

    tenants: int
    entries: int
    holds_open: int
    settlements: int
    drifts: tuple[Drift, ...]


@dataclass(frozen=True, slots=True)
class Succession:
    """A key that ends, and the one that takes its place."""

    before: Key
    after: Key


@dataclass(frozen=True, slots=True)
class Mark:
    """Who changes something, and when: what the audit trail says of it."""

    id: str
    who: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class KeyMark:
    """What the audit trail says of a change of keys; ``facts`` writes a key down."""

    mark: Mark
    what: str
    facts: Callable[[Key], Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class NewGrant:
    """Credits to be given. The same ``reference`` again changes nothing.

    What is left at ``expires_ms`` is taken back; None never ends.
    """

    tenant_id: str
    nanocredits: int
    reference: str
    expires_ms: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class GrantRecord:
    """A grant as it is kept; ``left_nanocredits`` is None for one that never ends."""

    reference: str
    nanocredits: int
    created_ms: int
    expires_ms: int | None
    note: str | None
    left_nanocredits: int | None


@dataclass(frozen=True, slots=True)
class NewRefund:
    """A part of a task's charge to be given back; None is all that is left of it."""

    tenant_id: str
    task_id: str
    reference: str
    nanocredits: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Expired:
    """What was taken back of a grant that is over."""

    tenant_id: str
    reference: str
    nanocredits: int


@dataclass(frozen=True, slots=True)
class LowBalance:
    """Below what a tenant is told, where to, and by which API key it is signed."""

    nanocredits: int
    url: str
    key_id: str


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """All that is kept of a tenant."""

    id: str
    name: str
    created_ms: int
    balance: Balance
    suspended_ms: int | None = None
    terms: Terms = USUAL
    low: LowBalance | None = None

    @property
    def facts(self) -> dict[str, object]:
        """What an operator has set, as JSON has it; credits as decimal texts."""
        low = self.low
        return {
            "suspended_at": moment_or_none(self.suspended_ms),
            "price_multiplier": multiplier_text(self.terms.multiplier_millionths),
            "prices": card_facts(self.terms.cards),
            "low_balance": None
            if low is None
            else {
                "credits": decimal_text(low.nanocredits),
                "url": low.url,
                "key_id": low.key_id,
            },
        }


@dataclass(frozen=True, slots=True)
class Trace:
    """A change in the audit trail; ``before`` and ``after`` are JSON."""

    id: str
    at_ms: int
    who: str
    what: str
    tenant_id: str | None
    subject: str
    before_json: str | None
    after_json: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a tenant's statement. ``nanocredits`` is below 0 for what was taken.

    ``reference`` is the task of a charge; else that of the grant or refund. ``note`` is
    theirs; ``key_id``, ``variant`` and ``images`` are those of a charge.
    """

    txn_id: str
    kind: str
    nanocredits: int
    created_ms: int
    reference: str
    task_id: str | None = None
    note: str | None = None
    key_id: str | None = None
    variant: str | None = None
    images: int | None = None


@dataclass(frozen=True, slots=True)
class OpenHold:
    """Credits set aside for a task that is not over."""

    task_id: str
    key_id: str
    variant: str
    nanocredits: int
    created_ms: int
    expires_ms: int


@dataclass(frozen=True, slots=True)
class MarginRow:
    """What an upstream earned and cost with a variant, each in its own currency.

    A charge is that of the upstream whose pictures came last; ``upstream`` is None
    where nothing was bought. What was absorbed was not charged.
    """

    upstream: str | None
    variant: str | None
    tasks: int
    images: int
    charged_nanocredits: int
    absorbed_nanocredits: int
    refunded_nanocredits: int
    cost_nanousd: int
    waste_nanousd: int


@dataclass(frozen=True, slots=True)
class CostLine:
    """A call in the cost book. ``job_id`` is what the upstream calls it, if it said."""

    task_id: str
    seq: int
    variant: str
    kind: str
    source: str
    nanousd: int
    created_ms: int
    job_id: str | None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What was used and charged on a day, by a key, of a variant.

    Days are counted from the epoch. None: the report is not broken down by it, or what
    it sums up is older than the books remember.
    """

    day: int | None
    key_id: str | None
    variant: str | None
    requests: int
    images: int
    charged_nanocredits: int
    tokens: Usage


# --- ports ---


class Clock(Protocol):
    """Time, so that tests can hold it still."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        ...

    def monotonic_ms(self) -> int:
        """Milliseconds that never go back, for durations."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class Chance(Protocol):
    """Randomness, so that tests can repeat it."""

    def token(self, alphabet: str, length: int) -> str:
        """Draw unguessable characters."""
        ...

    def fraction(self) -> float:
        """Draw evenly from 0 (inclusive) to 1 (exclusive)."""
        ...


class Events(Protocol):
    """Where flows say what happened. Never fails, never waits."""

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        ...


class Outbox(Protocol):
    """Webhooks to be sent. Rows are written by ``TaskStore.finish``."""

    async def claim(
        self, *, now_ms: int, lease_ms: int, limit: int, places: Places
    ) -> Sequence[Delivery]:
        """Take deliveries that are due, for ``lease_ms``; nobody else gets them.

        The tenant with the fewest under way comes first, and of its own the longest
        due; but nobody gets more than ``places``: who has many that are due, or
        receivers that hang, stands in nobody's way.
        """
        ...

    async def note(self, delivery: Delivery) -> bool:
        """Write how a try went: state, tries, next_ms, status, error.

        False, and nothing written, if another try was noted or it was made due anew
        meanwhile.
        """
        ...

    async def list(
        self, *, tenant_id: str | None, state: str | None, offset: int, limit: int
    ) -> tuple[int, Sequence[Delivery]]:
        """List deliveries, newest first, with their number."""
        ...

    async def get(self, delivery_id: str) -> Delivery | None:
        """Read one."""
        ...

    async def redeliver(self, delivery_id: str, *, now_ms: int) -> bool:
        """Make a delivery due now, with all its tries; False if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Post:
    """One try of a webhook. Each of ``secrets`` signs it; ``now_ms`` is its time."""

    id: str
    url: str
    body: bytes
    secrets: tuple[str, ...] = field(repr=False)
    now_ms: int


class Sender(Protocol):
    """Sends webhooks, to public addresses only."""

    async def send(self, post: Post) -> Answer:
        """Make one try, within 10 s; whatever happens is an answer."""
        ...


class SigningKeys(Protocol):
    """What webhooks are signed with: the version of each API key's secret."""

    async def signing_key(self, key_id: str) -> SigningKey | None:
        """Find the version that counts now; of revoked keys too."""
        ...

    async def rotate_signing_key(
        self, key_id: str, *, now_ms: int
    ) -> SigningKey | None:
        """Start the next version; None if there is no such key.

        Raises:
            RotatedTooOftenError: as many secrets sign already as may at once.
        """
        ...


class TaskStore(Protocol):
    """Tasks, holds, attempts and settlements: each call is one transaction."""

    async def open(self, task: NewTask) -> str | None:
        """Write the task and its hold, or neither.

        None when it was opened; the id of the earlier task when its idempotency key
        stands for one: then nothing was written.

        Raises:
            InsufficientCreditsError: the tenant has less available than the hold, or
                a budget of the key has less left.
            RateLimitedError: as many tasks of the key are in flight as may.
            IdempotencyConflictError: the key stands for another request.
        """
        ...

    async def earlier(self, wanted: Earlier) -> str | None:
        """Find the task that a request repeats, if there is one.

        Raises:
            IdempotencyConflictError: the key stands for another request.
        """
        ...

    async def forget_keys(self, before_ms: int) -> int:
        """Forget idempotency keys used before a time; returns how many."""
        ...

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        """Write that an attempt is about to be sent; durable on return."""
        ...

    async def accept_attempt(
        self,
        task_id: str,
        seq: int,
        job_id: str,
        order_json: str | None = None,
        *,
        fence: int = 0,
    ) -> None:
        """Write the upstream's job id; durable on return.

        ``order_json`` is kept if none is: a sync task can be taken up again then.
        """
        ...

    async def end_attempt(self, end: AttemptEnd) -> None:
        """Write how a lost attempt ended, and book its waste."""
        ...

    async def finish(self, end: TaskEnd) -> Settled:
        """Settle the hold and close the task, once.

        A second call for the same task changes nothing and returns what the first
        one did, as ``again``.
        """
        ...

    async def get(self, task_id: str) -> TaskRecord | None:
        """Read a task."""
        ...

    async def unfinished(self, limit: int) -> Sequence[TaskRecord]:
        """Read sync tasks that are not final and have no job, oldest first."""
        ...

    async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
        """Read those of them whose process is gone."""
        ...

    async def take_up_overdue(self, before_ms: int) -> int:
        """Let sync tasks be claimed that have a job, and a deadline before that.

        Returns how many: their own process could not settle them.
        """
        ...

    async def rebuy(self, rebuy: Rebuy, since_ms: int) -> bool:
        """Note a second purchase if the spend since a time can bear it.

        True for one that was noted before. See ``limits.may_rebuy``.
        """
        ...


class Journal(Protocol):
    """Keeps on the local disk what the store could not take."""

    @property
    def waiting(self) -> int:
        """How many entries are kept."""
        ...

    def knows(self, task_id: str) -> bool:
        """Tell whether an entry is about this task: then others wait behind it."""
        ...

    async def keep(self, entry: JobAccepted | AttemptEnd | TaskEnd) -> None:
        """Keep an entry; durable on return.

        Raises:
            ServiceUnavailableError: the disk does not take it.
        """
        ...

    async def kept(self) -> Sequence[Kept]:
        """Read all entries, oldest first."""
        ...

    async def drop(self, kept: Kept) -> None:
        """Forget an entry: the store has it."""
        ...


class Processes(Protocol):
    """The gateway processes over one database, as far as they are alive."""

    async def beat(self, process_id: str, *, now_ms: int) -> None:
        """Say that a process is alive."""
        ...

    async def leave(self, process_id: str) -> None:
        """Take a process off the list: it ends."""
        ...

    async def clear(self) -> None:
        """Take all off: whoever calls this knows that nobody else is alive."""
        ...

    async def forget_lost(self, *, before_ms: int, but: str) -> int:
        """Take those off that were not heard of since, ``but`` the one that asks.

        Their sync tasks that have a job can be claimed from then on; returns how many.
        """
        ...


class Queue(Protocol):
    """Async tasks that wait for a worker: the tasks table itself."""

    async def claim(
        self,
        *,
        now_ms: int,
        lease_ms: int,
        held: Collection[str] = (),
        full: Collection[str] = (),
    ) -> Claimed | None:
        """Take a task whose lease ended, or the next one of the tenant served least.

        Args:
            now_ms: the time.
            lease_ms: how long it is taken for.
            held: tasks that the caller works on: a clock that jumps ends no lease of
                one's own.
            full: variants of which no further task is to be begun.
        """
        ...

    async def renew(
        self, task_id: str, fence: int, *, now_ms: int, lease_ms: int
    ) -> Lease:
        """Keep a claimed task."""
        ...

    async def reclaim(self) -> int:
        """End every lease: nobody else is alive. Returns how many there were.

        Sync tasks that have a job to be found again can be claimed from then on.
        """
        ...

    async def release(self, task_id: str, fence: int) -> None:
        """Give a claimed task back, to be claimed again at once."""
        ...

    async def cancel(
        self, task_id: str, tenant_id: str, *, now_ms: int
    ) -> Cancelling | None:
        """Cancel a pending task, or ask the worker of a running one to stop.

        Returns what came of it; None if the tenant has no such task.
        """
        ...

    async def tasks(
        self, tenant_id: str, wanted: TaskFilter, *, offset: int, limit: int
    ) -> tuple[int, Sequence[TaskLine]]:
        """List a tenant's tasks, newest first, with their number."""
        ...

    async def usual_ms(self, task_class: str) -> int | None:
        """Tell how long the last completed tasks of a class took, on average."""
        ...

    async def forget_tasks(self, before_ms: int, limit: int) -> Sequence[str]:
        """Delete tasks finished before a time, oldest first; returns their ids."""
        ...


class Ledger(Protocol):
    """Credits of tenants."""

    async def grant(
        self, tenant_id: str, nanocredits: int, *, reference: str, now_ms: int
    ) -> Balance:
        """Add credits; the same reference again changes nothing."""
        ...

    async def balance(self, tenant_id: str) -> Balance | None:
        """Read a tenant's balance."""
        ...

    async def audit(self) -> AuditReport:
        """Recompute every invariant from the rows."""
        ...


class Treasury(Ledger, Protocol):
    """Gives credits, and takes them back."""

    async def give(self, grant: NewGrant, mark: Mark) -> Balance:
        """Add credits, once.

        Raises:
            NotFoundError: there is no such tenant.
            ConflictError: the reference stands for another grant, or the tenant has as
                many grants that end as it may.
            InvalidRequestError: an account cannot hold that much.
        """
        ...

    async def refund(self, refund: NewRefund, mark: Mark) -> Balance:
        """Give a part of a charge back, once.

        Raises:
            NotFoundError: the tenant has no such task that was charged.
            ConflictError: it is more than is left of the charge, or the reference
                stands for another refund.
        """
        ...

    async def knows_grant(self, tenant_id: str, reference: str) -> bool:
        """Tell whether a grant of that reference was given."""
        ...

    async def grants(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[GrantRecord]:
        """List a tenant's grants, newest first."""
        ...

    async def expire(self, now_ms: int, limit: int) -> Sequence[Expired]:
        """Take back what is left of grants that are over, as far as no hold has it."""
        ...


class Tenants(Protocol):
    """Tenants, as an operator sees and changes them."""

    async def add(self, tenant: Tenant, mark: Mark) -> None:
        """Write a tenant.

        Raises:
            ConflictError: the name is taken.
        """
        ...

    async def record(self, tenant: str) -> TenantRecord | None:
        """Find a tenant by its id or its name."""
        ...

    async def page(
        self, *, offset: int, limit: int
    ) -> tuple[int, Sequence[TenantRecord]]:
        """List tenants by name, with their number."""
        ...

    async def change(
        self,
        tenant_id: str,
        what: str,
        change: Callable[[TenantRecord], TenantRecord],
        mark: Mark,
    ) -> TenantRecord | None:
        """Change a tenant; None if there is none. A change of nothing leaves no trace.

        ``change`` is pure, and may be called several times.
        """
        ...

    async def trail(
        self, tenant_id: str | None, *, after: Cursor, limit: int
    ) -> Sequence[Trace]:
        """Read who changed what, newest first; of one tenant, or of all."""
        ...

    async def tell_low(self, now_ms: int) -> int:
        """Write webhooks for balances that fell below what their tenants wish to know.

        Once for each fall; returns how many.
        """
        ...


class Reports(Protocol):
    """What became of credits, to be read."""

    async def entries(
        self, tenant_id: str, span: Span, *, after: Cursor, limit: int
    ) -> Sequence[Entry]:
        """Read a tenant's entries, newest first, from behind a place on."""
        ...

    async def open_holds(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[OpenHold]:
        """Read a tenant's open holds, newest first."""
        ...

    async def margin(self, span: Span) -> Sequence[MarginRow]:
        """Sum up the books of all tenants, by upstream and variant."""
        ...

    async def costs(
        self, upstream: str, span: Span, *, after: tuple[str, int], limit: int
    ) -> Sequence[CostLine]:
        """Read the cost book of an upstream, by task and call, from behind one on."""
        ...

    async def usage(
        self, tenant_id: str, span: Span, by: Sequence[str], *, limit: int
    ) -> Sequence[UsageRow]:
        """Sum up what a tenant has used, by some of day, key, model; in that order."""
        ...


class Accounts(Protocol):
    """Tenants and their keys."""

    async def add_tenant(self, tenant: Tenant, *, now_ms: int) -> None:
        """Write a tenant.

        Raises:
            ConflictError: the name is taken.
        """
        ...

    async def tenant_named(self, name: str) -> Tenant | None:
        """Find a tenant by name."""
        ...

    async def tenants(self) -> Sequence[tuple[Tenant, Balance]]:
        """List all tenants with their balances, by name."""
        ...

    async def add_key(self, key: Key, mark: KeyMark | None = None) -> None:
        """Write a key, and who made it."""
        ...

    async def key_by_digest(self, digest: bytes) -> Key | None:
        """Find a key by the digest of it, revoked ones too."""
        ...

    async def key(self, key_id: str) -> Key | None:
        """Find a key by its id, revoked ones too."""
        ...

    async def keys(self, tenant_id: str) -> Sequence[Key]:
        """List a tenant's keys, oldest first."""
        ...

    async def keys_page(
        self, tenant_id: str | None, *, offset: int, limit: int
    ) -> tuple[int, Sequence[Key]]:
        """List keys of a tenant or of all, newest first, with their number."""
        ...

    async def change_key(
        self, key_id: str, change: Callable[[Key], Key], mark: KeyMark | None = None
    ) -> Key | None:
        """Change delivery, routing, limits or end of a key; None if there is none.

        ``change`` is pure, may be called several times, and undoes all by raising.
        What the key has used before counts towards budgets that it gets.
        """
        ...

    async def rotate_key(
        self,
        key_id: str,
        rotate: Callable[[Key, Sequence[Key]], Succession],
        mark: KeyMark | None = None,
    ) -> Succession | None:
        """Write a key's successor and its own end, or neither; None if there is none.

        ``rotate`` is given the key and all keys of its meter; as for ``change_key``.
        """
        ...

    async def key_use(self, key_id: str) -> KeyUse | None:
        """Tell what a key, and all others of its meter, have used; None if none is."""
        ...

    async def revoke_key(
        self, key_id: str, *, now_ms: int, mark: KeyMark | None = None
    ) -> bool:
        """Revoke a key; False if there is none of that id."""
        ...


class Rates(Protocol):
    """Counts the requests of the last minute, by meter; soft, and never fails."""

    async def take(self, meter: str, limit: int) -> Rate:
        """Let one request more through, or not; over all processes if it can be."""
        ...


class OpenBlob(Protocol):
    """A stored picture, open for reading. Whoever opened it closes it."""

    @property
    def size_bytes(self) -> int:
        """Length of the picture's file, decoded."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Read a part of the file; short only at its end.

        Raises:
            ServiceUnavailableError: the store does not give it.
        """
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


class BlobStore(Protocol):
    """Keeps pictures until they expire."""

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        """Store a picture under a name; returns the length of the file, in bytes.

        ``as_it_came`` spares decoding: ``open`` decodes if it ever comes to that.
        """
        ...

    async def keep_file(self, blob: str, content: Payload) -> int:
        """Store a file's raw bytes under a name, durably; returns its length."""
        ...

    async def open(self, blob: str) -> OpenBlob | None:
        """Open a stored picture; None if it is not there."""
        ...

    async def delete(self, blob: str) -> None:
        """Forget a picture; one that is not there is no error."""
        ...

    async def exists(self, blob: str) -> bool:
        """Tell whether a picture is there."""
        ...

    async def expire(self, before_ms: int) -> int:
        """Delete pictures stored before a time; returns how many tasks' were."""
        ...


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to one call, from ``admit`` to ``report``."""

    id: int
    offer_id: str
    operation: Operation
    probe: bool = False


class HealthBoard(Protocol):
    """The memory of how each offer has been doing, shared by all requests."""

    async def read(
        self, offer_ids: Iterable[str], operation: Operation
    ) -> Mapping[str, Health]:
        """Tell the health of each offer."""
        ...

    async def admit(
        self, offer_id: str, operation: Operation, *, forced: bool = False
    ) -> Permit | None:
        """Take a slot (and the probe, if the breaker is half open).

        ``forced`` asks for the one try per 5 s that an open breaker allows when there
        is nothing else. None when the call is not allowed now. Whoever gets a permit
        must ``report`` it, whatever happens.
        """
        ...

    async def report(self, permit: Permit, outcome: Outcome) -> None:
        """Give the slot back and note how the call went."""
        ...


class Fleet(Protocol):
    """The other processes, as a health board needs them. Never fails.

    Where they cannot be reached each process decides alone.
    """

    def stir(self) -> None:
        """Say that the board has something to tell; returns at once."""
        ...

    async def may_probe(self, breaker: str) -> bool:
        """Take the only probe of a half open breaker in the whole fleet.

        It is kept while ``Member.tell`` names it, and given back after that.
        """
        ...

    async def may_force(self, breaker: str) -> bool:
        """Take the one try in 5 s that an open breaker allows in the whole fleet."""
        ...


class Member(Protocol):
    """A health board, as the fleet sees it."""

    def tell(self) -> Telling:
        """Tell what is new since the last time."""
        ...

    def keep(self, telling: Telling) -> None:
        """Take back what could not be told: it is told again. Its counts are lost."""
        ...

    def hear(self, hearing: Hearing) -> None:
        """Take over what the others told."""
        ...


class Notices(Protocol):
    """Short notices from process to process. They may be lost; sending never fails."""

    def send(self, notice: Notice) -> None:
        """Send it soon; returns at once."""
        ...


@dataclass(frozen=True, slots=True)
class LastFailure:
    """The last call that failed: how, and when (since the epoch)."""

    kind: FailureKind
    at_ms: int


@dataclass(frozen=True, slots=True)
class RouteView:
    """An offer and operation as the board sees it at this moment.

    ``probe_in_ms`` is how long until a call may find out whether it is well again, 0
    when one may now; None while its breaker is closed. ``oldest_ms`` is the age of the
    oldest call under way.
    """

    offer_id: str
    operation: Operation
    health: Health
    window: Window
    bad_streak: int
    in_flight: int
    oldest_ms: int | None
    probe_in_ms: int | None
    pause_ends_in_ms: int | None
    last_failure: LastFailure | None


@dataclass(frozen=True, slots=True)
class AccountView:
    """An upstream's credential, and how many calls it may carry at once.

    ``slots`` is what it may carry now, ``slots_max`` what the operator allows.
    """

    state: BreakerState
    reason: str
    probe_in_ms: int | None
    in_flight: int
    slots: int
    slots_max: int
    routes: tuple[RouteView, ...]


class Watch(Protocol):
    """What an operator sees of the health board, and may do to it."""

    async def look(
        self, upstream: str, offers: Iterable[tuple[str, Operation]]
    ) -> AccountView:
        """Tell how an upstream and its offers (by id and operation) are doing."""
        ...

    async def reset(self, upstream: str) -> None:
        """Close the breakers of an upstream, and end its pauses.

        Traffic comes back in steps. What was learned of times and costs stays.
        """
        ...


class Drains(Protocol):
    """Upstreams to which an operator lets nothing new go; kept over restarts."""

    async def drained(self) -> Mapping[str, int]:
        """Read them, with the time since when, in milliseconds since the epoch."""
        ...

    async def drain(self, upstream: str, *, now_ms: int) -> None:
        """Add one; one that is there keeps its time."""
        ...

    async def enable(self, upstream: str) -> None:
        """Take one away; one that is not there is no error."""
        ...


@dataclass(frozen=True, slots=True)
class ReloadNote:
    """How far a process is: which asking it has heeded, and what kept it from it."""

    process_id: str
    heeded: int | None
    problem: str | None


class Reloads(Protocol):
    """Who asked for the configuration to be read again; kept over restarts.

    Askings are numbered from 1.
    """

    async def ask(self) -> int:
        """Ask all processes; returns the number of the asking."""
        ...

    async def asked(self) -> int:
        """Read the number of the last asking; 0 before the first."""
        ...

    async def note(self, process_id: str, number: int, problem: str | None) -> None:
        """Say that a process has heeded an asking, and what was wrong if it failed."""
        ...

    async def notes(self, *, alive_since_ms: int) -> Sequence[ReloadNote]:
        """Read the notes of the processes seen alive since then."""
        ...


class WritableSpool(Payload, Protocol):
    """A spool being filled; the first read ends the writing."""

    def append(self, data: bytes) -> None:
        """Add to the end.

        Raises:
            SpoolLimitError: it would grow over its limit.
        """
        ...


class Spools(Protocol):
    """Makes spools for files under way."""

    def open(
        self, encoding: Literal["base64", "raw"], *, limit_bytes: int
    ) -> WritableSpool:
        """Make an empty spool that may grow to ``limit_bytes``."""
        ...


class Studio(Protocol):
    """Re-encodes pictures."""

    async def convert(
        self, image: MadeImage, output_format: str, compression: int | None
    ) -> MadeImage | None:
        """Make a copy in another format (png, jpeg, webp), in a payload of its own.

        ``compression`` is 0 to 100 for jpeg and webp. None when the picture cannot be
        decoded.
        """
        ...


class FetchRefusedError(Exception):
    """A URL may not be, or could not be, fetched. The message may be shown.

    It never tells a private address from one that does not answer: that would let
    callers map the network that the gateway stands in.
    """


class FetcherBusyError(FetchRefusedError):
    """No turn to fetch came free in time; nothing was asked of the URL's host."""


class Fetcher(Protocol):
    """Fetches what callers point at, and nothing that they should not reach."""

    async def fetch(
        self, url: str, into: WritableSpool, *, deadline_s: float, caller: str = ""
    ) -> None:
        """Stream the file at ``url`` into a spool.

        ``deadline_s`` is the time for all of it, in seconds, once its turn has come.
        Of those that name the same ``caller`` (a tenant), only some have a turn.

        Raises:
            FetcherBusyError: too many are being fetched.
            FetchRefusedError: the address is not public, or the file did not come
                whole, in time and within the spool's limit.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a tenant uploaded, to be used in its requests for 72 h."""

    id: str
    tenant_id: str
    name: str
    original_name: str
    upload_path: str
    media_type: str
    size_bytes: int
    width_px: int
    height_px: int
    created_ms: int
    expires_ms: int

    @property
    def blob(self) -> str:
        """Its name in the blob store."""
        return self.id


@dataclass(frozen=True, slots=True)
class FileUse:
    """How many unexpired files a tenant has, or may have, and their bytes."""

    files: int
    size_bytes: int


class FileStore(Protocol):
    """What tenants uploaded."""

    async def add_file(
        self, file: StoredFile, *, at_most: FileUse, now_ms: int
    ) -> bool:
        """Write a file down; False if the tenant would have more than it may."""
        ...

    async def file_use(self, tenant_id: str, *, now_ms: int) -> FileUse:
        """Count a tenant's unexpired files and their bytes."""
        ...

    async def file(self, file_id: str, *, now_ms: int) -> StoredFile | None:
        """Find a file that has not expired."""
        ...

    async def files(
        self, tenant_id: str, *, now_ms: int, offset: int, limit: int
    ) -> tuple[int, Sequence[StoredFile]]:
        """List a tenant's unexpired files, newest first, with their number."""
        ...

    async def remove_file(self, file_id: str) -> None:
        """Forget a file; one that is not there is no error."""
        ...

    async def expired_files(self, *, now_ms: int, limit: int) -> Sequence[StoredFile]:
        """List files whose time is over."""
        ...


class UptimeBook(Protocol):
    """Counts of what was served and failed, by five minutes and by day (UTC)."""

    async def add(self, slots: Iterable[Slot]) -> None:
        """Add counts to those of their slots, and of the days of these."""
        ...

    async def slots(self, since_ms: int) -> Sequence[Slot]:
        """Return the slots that began at a moment or later."""
        ...

    async def days(self, since_ms: int) -> Sequence[Slot]:
        """Return the days that began at a moment or later."""
        ...

    async def troubled(self, since_ms: int, limit: int) -> Sequence[Slot]:
        """Return the latest slots whose count is ``troubled``."""
        ...

    async def forget(self, before_ms: int) -> int:
        """Forget what began before a moment; returns how many rows that were."""
        ...


class Tunable(Protocol):
    """An upstream whose behaviour can be changed while it runs: a sandbox."""

    def snapshot(self) -> dict[str, object]:
        """Tell the settings and what was bought so far."""
        ...

    def change(self, changes: Mapping[str, object]) -> None:
        """Change settings, all or none.

        Raises:
            ValueError: a setting is unknown or out of range; the message names it.
        """
        ...
