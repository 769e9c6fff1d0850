"""Webhooks: their names, their secrets, and when one is tried again. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from gateway.core.addresses import (
    CheckedUrl,
    ForbiddenUrlError,
    Network,
    UrlRules,
    checked_url,
    may_reach,
)
from gateway.core.errors import InvalidRequestError

CALLBACK_URL_MAX_CHARS = 2_048
TRIES_AFTER_S = (5, 60, 600)
"""How long after a failed try the next one follows; the first one is made at once."""
JITTER_PERCENT = 20
RETRY_AFTER_MAX_S = 3_600
SECRET_PREFIX = "whsec_"  # noqa: S105 - how a secret starts is none
ROTATION_OVERLAP_MS = 24 * 3_600_000
"""So long both secrets sign after a rotation, for receivers that still know the old."""
GONE = 410
ASK_TO_WAIT = frozenset({429, 503})

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
    rotated_ms: int | None = None


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
    """Return what to sign with at a time: the newest first, the old while it counts."""
    newest = secret_for(pepper, key.key_id, key.version)
    if key.rotated_ms is None or now_ms >= key.rotated_ms + ROTATION_OVERLAP_MS:
        return (newest,)
    return (newest, secret_for(pepper, key.key_id, key.version - 1))


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
