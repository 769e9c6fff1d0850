"""One canonical JSON line per request and per attempt; nothing secret in any of them.

A listener of events: it writes their fields, and events carry no prompt, picture or
key. What upstreams said is cut and scrubbed all the same.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any, TextIO, cast

import msgspec
import structlog

from gateway.core.errors import ServiceUnavailableError
from gateway.core.events import (
    AttemptFinished,
    BreakerChanged,
    ConfigRead,
    Event,
    FellOver,
    HoldRefused,
    Journaled,
    LeaseExpired,
    PressureChanged,
    RequestFinished,
    RequestShed,
    SharedStateChanged,
    StoreChanged,
    TaskFinished,
    UpstreamChanged,
    WebhookTried,
)
from gateway.core.outcomes import FAILED, RequestOutcome
from gateway.core.traces import trace_id_of

TEXT_MAX_CHARS = 500
LEVELS = ("info", "warning", "error")
_EXPECTED = frozenset({"done", "invalid_request", "content_policy", "cancelled"})
_SECRET = re.compile(
    r"(iwk_live_[0-9A-Za-z]{2})[0-9A-Za-z]+|\bsk-[\w-]{8,}|(?i:bearer)\s+\S+"
    r"|eyJ[\w-]+\.[\w-]+\.[\w-]*|data:[^,\s]{0,64},[A-Za-z0-9+/=]{64,}"
    r"|(?i:(?<=signature=)|(?<=[?&]sig=)|(?<=security-token=))[\w%.~+/=-]+"
    r"|whsec_[\w+/=]+|\br8_\w{8,}|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)"
    r"|\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}:[0-9a-f]{16,}"
)
_SECRET_NAME = re.compile(
    r"prompt|authorization|password|(\w+_)?(secret|token|api_key|credential)"
)
NAMES = {
    RequestFinished: "request",
    AttemptFinished: "attempt",
    TaskFinished: "task",
    FellOver: "fallback",
    LeaseExpired: "lease_expired",
    BreakerChanged: "breaker",
    UpstreamChanged: "upstream",
    HoldRefused: "hold_refused",
    WebhookTried: "webhook",
    RequestShed: "shed",
    PressureChanged: "pressure",
    StoreChanged: "store",
    Journaled: "journal",
    SharedStateChanged: "shared_state",
    ConfigRead: "config_read",
}


class LogListener:
    """Writes events as lines. A sink that fails costs lines, never a request."""

    level: str = "info"
    """The least that a line must be to be written; may be changed at any time."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = _Unfailing(out)
        self._log = make_logger(self._out)

    @property
    def dropped_lines(self) -> int:
        """How many lines the sink did not take."""
        return self._out.dropped

    def on_event(self, event: Event) -> None:
        """Write one event."""
        level = level_of(event)
        if LEVELS.index(level) < LEVELS.index(self.level):
            return
        told = ((name, getattr(event, name)) for name in event.__slots__)
        fields = {name: value for name, value in told if value is not None}
        task_id = fields.get("task_id")
        if isinstance(task_id, str):
            fields["trace_id"] = trace_id_of(task_id)
        getattr(self._log, level)(NAMES[type(event)], **fields)

    def on_crash(self, error: BaseException, where: str) -> None:
        """Write down an error; with its traceback, unless it was foreseen."""
        if isinstance(error, ServiceUnavailableError):
            # Comes from every loop, each second, while the database is away.
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__} {cause}".strip()
            if self.level != "error":
                self._log.warning("unavailable", where=where, reason=reason)
            return
        self._log.error("crash", where=where, exc_info=error)

    def note(self, what: str, **fields: object) -> None:
        """Write a line about the process itself."""
        if self.level == "info":
            self._log.info(what, **fields)


def level_of(event: Event) -> str:
    """Tell how much an event matters: info, warning or error."""
    match event:
        case RequestFinished(status=status):
            matters = status >= 500  # noqa: PLR2004
        case AttemptFinished(outcome=outcome):
            matters = outcome not in _EXPECTED
        case TaskFinished(outcome=outcome):
            matters = RequestOutcome(outcome) in FAILED
        case (
            ConfigRead(outcome="refused")
            | StoreChanged(state="away")
            | Journaled(outcome="too_late")
        ):
            return "error"
        case _:
            matters = _is_trouble(event)
    return "warning" if matters else "info"


def _is_trouble(event: Event) -> bool:
    match event:
        case BreakerChanged(state="open") | WebhookTried(outcome="failed"):
            return True
        case PressureChanged(on=True) | SharedStateChanged(degraded=True):
            return True
        case FellOver() | LeaseExpired() | RequestShed():
            return True
        case _:
            return False


class _Unfailing:
    """A text file that swallows what cannot be written, and counts it."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.dropped = 0

    def write(self, text: str) -> int:
        try:
            return self._out.write(text)
        except (OSError, ValueError):  # a pipe without reader, a full disk, closed
            self.dropped += 1
            return len(text)

    def flush(self) -> None:
        try:
            self._out.flush()
        except (OSError, ValueError):
            self.dropped += 1


def make_logger(out: _Unfailing) -> Any:  # noqa: ANN401 - structlog's own type
    """Make a logger that writes JSON lines."""
    return structlog.wrap_logger(
        structlog.WriteLogger(cast("TextIO", out)),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            _scrub,
            _ordered,
            structlog.processors.JSONRenderer(_encode),
        ],
        wrapper_class=structlog.BoundLogger,
        cache_logger_on_first_use=True,
    )


def scrubbed(text: str) -> str:
    """Take out whatever looks like a secret, and cut the rest to a bound."""
    clean = _SECRET.sub(lambda m: f"{m[1] or ''}[secret]", text)
    return clean if len(clean) <= TEXT_MAX_CHARS else clean[:TEXT_MAX_CHARS] + "…"


def _scrub(
    _logger: Any,  # noqa: ANN401 - structlog's signature
    _method: str,
    fields: MutableMapping[str, Any],
) -> Mapping[str, Any]:
    for name, value in fields.items():
        if _names_a_secret(name):
            fields[name] = "[secret]"
        elif isinstance(value, str):
            whole = name == "exception"
            clean = _SECRET.sub("[secret]", value) if whole else scrubbed(value)
            # JSON takes no half of a surrogate pair; a line must never be refused.
            fields[name] = clean.encode(errors="backslashreplace").decode()
    return fields


@lru_cache(maxsize=512)
def _names_a_secret(name: str) -> bool:
    return _SECRET_NAME.fullmatch(name) is not None


def _ordered(
    _logger: Any,  # noqa: ANN401 - structlog's signature
    _method: str,
    fields: MutableMapping[str, Any],
) -> Mapping[str, Any]:
    # When and what first: a person reads the start of a line.
    first = {name: fields.pop(name) for name in ("at", "level", "event")}
    return {**first, **fields}


def _encode(fields: object, **_: object) -> str:
    return msgspec.json.encode(fields, enc_hook=str).decode()
