"""Webhooks: their names, their secrets, and when one is tried again. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from ipaddress import ip_address

from gateway.core.addresses import (
    CheckedUrl,
    ForbiddenUrlError,
    Network,
    UrlRules,
    checked_url,
    may_reach,
)
from gateway.core.errors import InvalidRequestError, RateLimitedError
from gateway.core.money import decimal_text

CALLBACK_URL_MAX_CHARS = 2_048
TRIES_AFTER_S = (5, 60, 600)
"""How long after a failed try the next one follows; the first one is made at once."""
JITTER_PERCENT = 20
RETRY_AFTER_MAX_S = 3_600
SECRET_PREFIX = "whsec_"  # noqa: S105 - how a secret starts is none
ROTATION_OVERLAP_MS = 24 * 3_600_000
"""So long a secret still signs after a rotation, for receivers that know no other."""
SECRETS_MAX = 5
"""As many sign one webhook: each adds 48 characters to its header."""
GONE = 410
ASK_TO_WAIT = frozenset({429, 503})

LOW = "credits.low"
"""The event of a balance below its tenant's threshold."""

PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
STATES = (PENDING, DELIVERED, FAILED)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One webhook to be sent: an event of a task for a callback URL.

    ``id`` is the event's, the same at each try. ``state`` is pending, delivered or
    failed; ``tries`` counts those made. ``status`` and ``error`` tell of the last one.
    """

    id: str
    task_id: str
    tenant_id: str
    key_id: str
    event: str
    url: str
    state: str
    tries: int
    next_ms: int
    created_ms: int
    status: int | None = None
    error: str | None = None
    delivered_ms: int | None = None
    round: int = 0
    """Counts redeliveries, so that a try made before one is not taken for its own."""
    body: str | None = None
    """What is sent, if it is of no task; else the task as it is then."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How one try went. ``status`` None: there was no whole answer in time.

    ``error`` says why a try failed, None that it did not; the tenant may see it.
    ``final``: another try could do no better.
    """

    status: int | None
    error: str | None = None
    retry_after_s: float | None = None
    final: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the receiver has it."""
        return self.error is None


@dataclass(frozen=True, slots=True)
class SigningKey:
    """What the secrets of an API key follow from. ``version`` counts from 1."""

    key_id: str
    tenant_id: str
    version: int
    rotated_ms: tuple[int, ...] = ()
    """When the last versions began, the newest first; version 1 began with the key."""


class RotatedTooOftenError(RateLimitedError):
    """A secret cannot be rotated again before an older one has stopped to sign."""

    code = "secret_rotated_too_often"
    client_may_retry = False


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery that may be sent now."""

    id: str
    host: str
    tenant_id: str
    next_ms: int


@dataclass(frozen=True, slots=True)
class Places:
    """How many deliveries may be sent at once, and what is under way already.

    Fields:
        each: to one host.
        tenant_each: of one tenant.
        taken: under way, per host.
        tenant_taken: under way, per tenant.
        failing: hosts whose last answer was a failure.
        failing_left: how many more may be sent to these, together.
    """

    each: int
    tenant_each: int
    taken: Mapping[str, int] = field(default_factory=dict)
    tenant_taken: Mapping[str, int] = field(default_factory=dict)
    failing: frozenset[str] = frozenset()
    failing_left: int = 0


def chosen(due: Iterable[Due], limit: int, places: Places) -> list[str]:
    """Choose what to send next, at most ``limit``; returns ids.

    The tenant with the fewest under way has the next turn, and of its own the longest
    due goes first that has a place.
    """
    queues: dict[str, deque[Due]] = {}
    for each in sorted(due, key=lambda each: (each.next_ms, each.id)):
        queues.setdefault(each.tenant_id, deque()).append(each)
    hosts, tenants = Counter(places.taken), Counter(places.tenant_taken)
    failing_left = places.failing_left
    turns = [(tenants[name], queue[0].next_ms, name) for name, queue in queues.items()]
    heapify(turns)
    ids: list[str] = []
    while turns and len(ids) < limit:
        *_, tenant = heappop(turns)
        if tenants[tenant] >= places.tenant_each:
            continue
        queue = queues[tenant]
        while queue:
            each = queue.popleft()
            failing = each.host in places.failing
            if hosts[each.host] >= places.each or (failing and failing_left <= 0):
                continue
            ids.append(each.id)
            hosts[each.host] += 1
            tenants[tenant] += 1
            failing_left -= failing
            break
        if queue:
            heappush(turns, (tenants[tenant], queue[0].next_ms, tenant))
    return ids


@dataclass(frozen=True, slots=True)
class CallbackRules:
    """Which callback URLs are taken; ``allow`` are networks of the operator's own."""

    ports: tuple[int, ...] = (443,)
    allow: tuple[Network, ...] = field(default=())

    @property
    def urls(self) -> UrlRules:
        """The form that they must have."""
        return UrlRules(("https",), self.ports)


def event_name(state: str) -> str:
    """Name the event of a task that ended in a state."""
    return f"task.{state}"


def event_id(task_id: str, state: str) -> str:
    """Name the one event of its kind that a task has: equal at each try."""
    return f"evt_{task_id}_{state}"


def low_event_id(tenant_id: str, at_ms: int) -> str:
    """Name the event of a balance that fell below its threshold."""
    return f"evt_{tenant_id}_low_{at_ms}"


def low_body(
    tenant_id: str, at_ms: int, left_nanocredits: int, threshold_nanocredits: int
) -> str:
    """Write what the receiver is told of a low balance; credits are exact numbers."""
    head = {
        "id": low_event_id(tenant_id, at_ms),
        "object": "event",
        "type": LOW,
        "created": at_ms // 1000,
    }
    left, below = decimal_text(left_nanocredits), decimal_text(threshold_nanocredits)
    data = f'{{"remaining_credits": {left}, "threshold_credits": {below}}}'
    return f'{json.dumps(head)[:-1]}, "data": {data}}}'


def host_of(url: str) -> str:
    """Tell which host and port a callback URL goes to; the URL itself if unclear."""
    site = url.partition("://")[2].partition("/")[0].partition("?")[0]
    return (site or url).lower()


def check_callback_url(url: str, rules: CallbackRules) -> CheckedUrl:
    """Look at a callback URL when it is given; its name is looked up at each send.

    Raises:
        InvalidRequestError: nothing could or should be sent there.
    """
    try:
        return callback_url(url, rules)
    except ForbiddenUrlError as error:
        raise InvalidRequestError(
            f"callback_url is not accepted. {error}",
            param="callback_url",
            code="invalid_callback_url",
        ) from error


def callback_url(url: str, rules: CallbackRules) -> CheckedUrl:
    """Take a callback URL apart.

    Raises:
        ForbiddenUrlError: it breaks a rule; the message says which.
    """
    if len(url) > CALLBACK_URL_MAX_CHARS:
        raise ForbiddenUrlError(
            f"The URL must be at most {CALLBACK_URL_MAX_CHARS:,} characters long."
        )
    checked = checked_url(url, rules.urls)
    try:
        address = ip_address(checked.host)
    except ValueError:
        return checked
    if not may_reach(address, rules.allow):
        raise ForbiddenUrlError("The URL's host must have a public address.")
    return checked


def secret_for(pepper: bytes, key_id: str, version: int) -> str:
    """Derive the secret that an API key's webhooks are signed with.

    It follows from the gateway's own secret, so that it is stored nowhere.
    """
    text = f"webhook:{key_id}:{version}".encode()
    return (
        SECRET_PREFIX
        + base64.b64encode(hmac.digest(pepper, text, hashlib.sha256)).decode()
    )


def secrets_at(pepper: bytes, key: SigningKey, now_ms: int) -> tuple[str, ...]:
    """Return what to sign with at a time, the newest first.

    Each that was current within the last ``ROTATION_OVERLAP_MS``: a receiver has that
    long to learn the next one, however often a secret is rotated meanwhile.
    """
    older = [
        key.version - back
        for back, at_ms in enumerate(key.rotated_ms, start=1)
        if now_ms < at_ms + ROTATION_OVERLAP_MS  # it was current until then
    ]
    versions = (key.version, *older)
    return tuple(secret_for(pepper, key.key_id, version) for version in versions)


def check_rotation(key: SigningKey, now_ms: int) -> None:
    """Let a key have another secret, unless too many sign already.

    Raises:
        RotatedTooOftenError: ``SECRETS_MAX`` secrets sign.
    """
    ends_ms = [at_ms + ROTATION_OVERLAP_MS for at_ms in key.rotated_ms]
    counting_ms = [end_ms for end_ms in ends_ms if now_ms < end_ms]
    if 1 + len(counting_ms) < SECRETS_MAX:
        return
    left_ms = min(counting_ms) - now_ms
    raise RotatedTooOftenError(
        f"{SECRETS_MAX} secrets of this key sign already: each does so for 24 hours "
        "after the next one was made. Rotate again after the time in Retry-After; if "
        "a secret got out, make another API key and revoke this one.",
        retry_after_s=max(1, -(-left_ms // 1000)),
    )


def after_try(
    delivery: Delivery,
    answer: Answer,
    now_ms: int,
    *,
    fraction: float,
    tries_after_s: Sequence[int] = TRIES_AFTER_S,
) -> Delivery:
    """Tell what becomes of a delivery after a try.

    Args:
        delivery: as it was before the try.
        answer: how the try went.
        now_ms: when it was over.
        fraction: a draw from 0 to 1; spreads the next try by a fifth either way.
        tries_after_s: the waits between tries, in seconds.
    """
    tried = replace(
        delivery,
        tries=delivery.tries + 1,
        next_ms=now_ms,
        status=answer.status,
        error=answer.error,
    )
    if answer.accepted:
        return replace(tried, state=DELIVERED, delivered_ms=now_ms)
    last = delivery.tries >= len(tries_after_s)
    if last or answer.final or answer.status == GONE:
        return replace(tried, state=FAILED)
    wait_ms = _spread_ms(tries_after_s[delivery.tries], fraction)
    if answer.status in ASK_TO_WAIT and answer.retry_after_s is not None:
        asked_s = min(answer.retry_after_s, RETRY_AFTER_MAX_S)
        wait_ms = max(wait_ms, round(asked_s * 1000))
    return replace(tried, next_ms=now_ms + wait_ms)


def _spread_ms(wait_s: int, fraction: float) -> int:
    assert 0 <= fraction <= 1
    percent = 100 - JITTER_PERCENT + 2 * JITTER_PERCENT * fraction
    return round(wait_s * 10 * percent)
