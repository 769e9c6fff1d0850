"""What a key may do, and how much: scopes, lists, an end, rates and budgets. Pure.

Amounts are nano-credits. Days and months are those of UTC, by the clock of the
database, as ``2026-11-25`` and ``2026-11``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from ipaddress import ip_network
from typing import Any

from gateway.core.addresses import Network, plain_address
from gateway.core.errors import (
    ForbiddenError,
    GatewayError,
    InsufficientCreditsError,
    InvalidRequestError,
    RateLimitedError,
    UnauthorizedError,
)
from gateway.core.money import NANO_MAX, decimal_text, parse_nano
from gateway.core.sizes import shown

REQUESTS_PER_MIN_MAX = 1_000_000
CONCURRENT_TASKS_MAX = 1_000_000
LIST_MAX = 64
"""Models, and networks, that a key may be bound to."""
TEXT_MAX_CHARS = 128
EXPIRES_MAX_MS = 253_402_300_799_000
"""The end of the year 9999, the last one that dates are written in."""
BUSY_RETRY_AFTER_S = 5
TOTAL = "total"


class KeyScope(Enum):
    """A part of the API that a key opens."""

    IMAGES = "images"
    TASKS = "tasks"
    BILLING = "billing"
    ADMIN = "admin"


USUAL_SCOPES = frozenset({KeyScope.IMAGES, KeyScope.TASKS, KeyScope.BILLING})


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The limits of a key; None is no limit.

    ``models`` are names of variants, no aliases. ``concurrent_tasks`` are tasks with an
    open hold, sync and async ones. A budget counts those holds and what was charged.
    """

    scopes: frozenset[KeyScope] = USUAL_SCOPES
    models: tuple[str, ...] | None = None
    networks: tuple[Network, ...] | None = None
    expires_ms: int | None = None
    requests_per_min: int | None = None
    concurrent_tasks: int | None = None
    total_nanocredits: int | None = None
    daily_nanocredits: int | None = None
    monthly_nanocredits: int | None = None

    @property
    def counted(self) -> bool:
        """Whether what the key uses has to be counted with each hold."""
        return not (
            self.concurrent_tasks is None
            and self.total_nanocredits is None
            and self.daily_nanocredits is None
            and self.monthly_nanocredits is None
        )


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What a key has used: its tasks in flight, and holds in flight plus charges.

    ``day`` is today, by the clock of the database.
    """

    day: str
    open_tasks: int = 0
    total_nanocredits: int = 0
    daily_nanocredits: int = 0
    monthly_nanocredits: int = 0

    @property
    def month(self) -> str:
        """This month."""
        return month_of(self.day)


def month_of(day: str) -> str:
    """Tell the month of a day."""
    return day[:7]


def left_nanocredits(limits: KeyLimits, use: KeyUse) -> int | None:
    """Tell how much the tightest budget leaves, at least 0; None without budgets."""
    rooms = [most - used for _, most, used in _budgets(limits, use) if most is not None]
    return max(0, min(rooms)) if rooms else None


# --- what turns a request away ---


def check_use(
    limits: KeyLimits, needs: KeyScope | None, address: str, now_ms: int
) -> None:
    """See that a key may be used now, from there and for that.

    Raises:
        UnauthorizedError: its time is over.
        ForbiddenError: not from that address, or not for that.
    """
    if limits.expires_ms is not None and now_ms >= limits.expires_ms:
        raise UnauthorizedError(
            f"The API key expired at {moment_text(limits.expires_ms)}. "
            "Use another one.",
            code="key_expired",
        )
    if limits.networks is not None and not _is_within(address, limits.networks):
        raise ForbiddenError(
            "The API key may not be used from this address. Use it from where it was "
            "made for, or ask for one that allows this address.",
            code="key_address_not_allowed",
        )
    if needs is not None and needs not in limits.scopes:
        raise ForbiddenError(
            f"The API key does not have the scope '{needs.value}' that this route "
            "needs. Use one that has it.",
            code="key_scope_missing",
            extra={
                "needed_scope": needs.value,
                "scopes": sorted(scope.value for scope in limits.scopes),
            },
        )


def check_model(limits: KeyLimits, model: str) -> None:
    """See that a key may ask for a variant.

    Raises:
        ForbiddenError: it may not.
    """
    if limits.models is not None and model not in limits.models:
        raise ForbiddenError(
            f"The API key may not ask for {model}. It may ask for: "
            f"{', '.join(limits.models)}.",
            param="model",
            code="model_access_denied",
            extra={"allowed_models": list(limits.models)},
        )


def check_hold(limits: KeyLimits, use: KeyUse, nanocredits: int) -> None:
    """See that a key may hold so much more for one more task.

    Raises:
        InsufficientCreditsError: it would be more than a budget.
        RateLimitedError: as many of its tasks are in flight as may.
    """
    for name, most, used in _budgets(limits, use):
        if most is not None and used + nanocredits > most:
            raise _over_budget(name, most, used, nanocredits, use.day)
    most_tasks = limits.concurrent_tasks
    if most_tasks is not None and use.open_tasks >= most_tasks:
        raise RateLimitedError(
            f"The API key may have {most_tasks} tasks in flight, and has "
            f"{use.open_tasks}. Wait until one of them is over.",
            retry_after_s=BUSY_RETRY_AFTER_S,
            extra={"limit_scope": "concurrent_tasks"},
        )


def _budgets(limits: KeyLimits, use: KeyUse) -> tuple[tuple[str, int | None, int], ...]:
    return (
        (TOTAL, limits.total_nanocredits, use.total_nanocredits),
        ("daily", limits.daily_nanocredits, use.daily_nanocredits),
        ("monthly", limits.monthly_nanocredits, use.monthly_nanocredits),
    )


_BUDGET_CODES = {
    TOTAL: "insufficient_token_quota",
    "daily": "token_daily_quota_exceeded",
    "monthly": "token_monthly_quota_exceeded",
}
_BUDGET_TEXTS = {TOTAL: "in total", "daily": "a day", "monthly": "a month"}


def _over_budget(
    name: str, most: int, used: int, nanocredits: int, day: str
) -> InsufficientCreditsError:
    until = resets_at(name, day)
    prefix = "" if name == TOTAL else f"{name}_"
    needed, room = decimal_text(nanocredits), decimal_text(max(0, most - used))
    again = f"It begins anew at {until}." if until else "It does not begin anew."
    return InsufficientCreditsError(
        f"This request may cost up to {needed} credits, and the API key's {name} "
        f"budget of {decimal_text(most)} credits {_BUDGET_TEXTS[name]} has {room} "
        f"left. {again} Ask for less, or for a larger budget.",
        code=_BUDGET_CODES[name],
        extra={
            "limit_scope": name,
            "estimated_credits": needed,
            f"{prefix}limit_credits" if prefix else "total_limit_credits": decimal_text(
                most
            ),
            f"{prefix}used_credits": decimal_text(used),
            "remaining_credits": room,
            "reset_timezone": "UTC",
            "resets_at": until,
        },
    )


def resets_at(name: str, day: str) -> str | None:
    """Tell when a daily or monthly budget begins anew; None for a total one."""
    today = date.fromisoformat(day)
    if name == "daily":
        return f"{today + timedelta(days=1)}T00:00:00Z"
    if name == "monthly":
        first = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
        return f"{first}T00:00:00Z"
    return None


def _is_within(address: str, networks: Sequence[Network]) -> bool:
    found = plain_address(address)
    return found is not None and any(found in network for network in networks)


def address_group(address: str) -> str:
    """Tell under which name an address is counted: whoever has an IPv6 has a /64."""
    found = plain_address(address)
    if found is None or found.version == 4:  # noqa: PLR2004
        return address if found is None else str(found)
    return str(ip_network((found, 64), strict=False))


# --- reading and writing them ---

ModelNamer = Callable[[str], str | None]
"""Finds the variant's name for a name or alias; None for one that is unknown."""


def parse_limits(
    given: Mapping[str, object], limits: KeyLimits, model_named: ModelNamer
) -> KeyLimits:
    """Change limits by what is given; null takes one away, the others stay.

    Amounts must come as text or whole numbers: a float would not be exact.

    Raises:
        InvalidRequestError: a field is not known, or breaks a rule; ``param`` names it.
    """
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _FIELDS:
            known = ", ".join(("delivery", "routing", *_FIELDS))
            raise _wrong(shown(name)[1:-1], f"does not exist; there are {known}")
        field, parse = _FIELDS[name]
        if value is None:
            changed[field] = getattr(NO_LIMITS, field)
        elif name == "models":
            changed[field] = _models(value, model_named)
        else:
            changed[field] = parse(value, name)
    return replace(limits, **changed)


def limit_facts(limits: KeyLimits) -> dict[str, object]:
    """Write limits as ``parse_limits`` reads them; amounts as decimal strings."""
    amounts = {
        "total_credits": limits.total_nanocredits,
        "daily_credits": limits.daily_nanocredits,
        "monthly_credits": limits.monthly_nanocredits,
    }
    expires_ms, networks = limits.expires_ms, limits.networks
    return {
        "scopes": sorted(scope.value for scope in limits.scopes),
        "models": None if limits.models is None else list(limits.models),
        "addresses": None if networks is None else [str(each) for each in networks],
        "expires_at": None if expires_ms is None else moment_text(expires_ms),
        "requests_per_minute": limits.requests_per_min,
        "concurrent_tasks": limits.concurrent_tasks,
        **{n: None if v is None else decimal_text(v) for n, v in amounts.items()},
    }


def moment_text(at_ms: int) -> str:
    """Write a moment as ``2026-11-25T14:00:00Z``."""
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def parse_nanocredits(value: object, name: str) -> int:
    """Read an amount of credits: a plain decimal as text, or a whole number.

    Raises:
        InvalidRequestError: it is none, negative, too long or too large.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong(name, 'must be a decimal such as "12.5"')
    # A whole number of thousands of digits is not written out.
    fits = isinstance(value, str) or 0 <= value <= NANO_MAX
    try:
        return parse_nano(str(value) if fits else "")
    except ValueError as error:
        raise _wrong(name, str(error)) from error


def _scopes(value: object, name: str) -> frozenset[KeyScope]:
    known = {scope.value: scope for scope in KeyScope}
    texts = _texts(value, name)
    for place, text in enumerate(texts):
        if text not in known:
            raise _wrong(f"{name}[{place}]", f"must be one of {', '.join(known)}")
    return frozenset(known[text] for text in texts)


def _models(value: object, model_named: ModelNamer) -> tuple[str, ...]:
    found = []
    for place, text in enumerate(_texts(value, "models")):
        model = model_named(text)
        if model is None:
            raise _wrong(
                f"models[{place}]", f"names no model of this gateway: {shown(text)}"
            )
        found.append(model)
    return tuple(dict.fromkeys(found))


def _networks(value: object, name: str) -> tuple[Network, ...]:
    found = []
    for place, text in enumerate(_texts(value, name)):
        try:
            found.append(ip_network(text))
        except ValueError as error:
            raise _wrong(
                f"{name}[{place}]",
                "must be an address or a network such as 203.0.113.0/24 or "
                "2001:db8::/32",
            ) from error
    return tuple(dict.fromkeys(found))


def _texts(value: object, name: str) -> list[str]:
    listed = value if isinstance(value, list | tuple) else []
    texts = [each for each in listed if isinstance(each, str)]
    fits = all(1 <= len(text) <= TEXT_MAX_CHARS for text in texts)
    if not fits or not 1 <= len(texts) == len(listed) <= LIST_MAX:
        raise _wrong(
            name,
            f"must be an array of 1 to {LIST_MAX} texts; null takes the limit away",
        )
    return texts


def _expires_ms(value: object, name: str) -> int:
    rule = "must be a moment such as 2027-01-31T12:00:00Z, or seconds since 1970"
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value * 1000 <= EXPIRES_MAX_MS:
            raise _wrong(name, rule)
        return value * 1000
    if not isinstance(value, str) or len(value) > TEXT_MAX_CHARS:
        raise _wrong(name, rule)
    try:
        moment = datetime.fromisoformat(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        at_ms = int(moment.timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        raise _wrong(name, rule) from error
    if not 0 <= at_ms <= EXPIRES_MAX_MS:
        raise _wrong(name, rule)
    return at_ms


def _count_up_to(most: int) -> Callable[[object, str], int]:
    def parse(value: object, name: str) -> int:
        number = isinstance(value, int) and not isinstance(value, bool)
        if not number or not isinstance(value, int) or not 1 <= value <= most:
            raise _wrong(name, f"must be a whole number from 1 to {most:,}, or null")
        return value

    return parse


_FIELDS: Mapping[str, tuple[str, Callable[[object, str], object]]] = {
    "scopes": ("scopes", _scopes),
    "models": ("models", _texts),
    "addresses": ("networks", _networks),
    "expires_at": ("expires_ms", _expires_ms),
    "requests_per_minute": ("requests_per_min", _count_up_to(REQUESTS_PER_MIN_MAX)),
    "concurrent_tasks": ("concurrent_tasks", _count_up_to(CONCURRENT_TASKS_MAX)),
    "total_credits": ("total_nanocredits", parse_nanocredits),
    "daily_credits": ("daily_nanocredits", parse_nanocredits),
    "monthly_credits": ("monthly_nanocredits", parse_nanocredits),
}


def _wrong(param: str, rule: str) -> GatewayError:
    return InvalidRequestError(f"{param} {rule}.", param=param)
