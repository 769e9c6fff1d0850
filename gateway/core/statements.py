"""What a statement and a usage report may be asked for. Pure.

Days are those of UTC, as ``2026-11-25``.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from gateway.core.errors import InvalidRequestError

DAY_MS = 24 * 3600 * 1000
ENTRIES_MAX = 1_000
"""Entries of one page."""
ENTRIES_USUAL = 100
USAGE_DAYS_USUAL = 30
USAGE_DAYS_MAX = 366
USAGE_ROWS_MAX = 50_000
CURSOR_MAX_CHARS = 1_024
DATE_CHARS_MAX = 11
"""One more than a day has: what is longer is none."""
MOMENT_MAX = 40
LAST_MS = 253_402_300_799_999
"""The end of the year 9999, the last one that dates are written in."""
USAGE_BY = ("day", "key", "model")


@dataclass(frozen=True, slots=True)
class Span:
    """From a time, inclusive, to another, exclusive; milliseconds since the epoch."""

    from_ms: int = 0
    to_ms: int = LAST_MS + 1


ALWAYS = Span()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The place of an entry in its statement: what is older comes after it."""

    created_ms: int
    txn_id: str


NEWEST = Cursor(LAST_MS + 1, "")


def cursor_text(cursor: Cursor) -> str:
    """Write a place down for a client, who gives it back as it is."""
    text = f"{cursor.created_ms}:{cursor.txn_id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def parse_cursor(text: str | None) -> Cursor:
    """Read a place that ``cursor_text`` wrote; None is before the newest entry.

    Raises:
        InvalidRequestError: it is none.
    """
    if text is None:
        return NEWEST
    cursor = _cursor(text)
    if cursor is None:
        raise InvalidRequestError(
            "after must be the 'next' of an earlier page, as it was given.",
            param="after",
        )
    return cursor


def _cursor(text: str) -> Cursor | None:
    if len(text) > CURSOR_MAX_CHARS or not text.isascii():
        return None
    padded = text.encode() + b"=" * (-len(text) % 4)
    try:
        decoded = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        return None
    created, _, txn_id = decoded.partition(":")
    short = (
        created.isascii() and created.isdigit() and len(created) <= len(str(LAST_MS))
    )
    if not short or not txn_id.isprintable():
        return None
    return Cursor(int(created), txn_id)


def parse_day(text: str, name: str) -> date:
    """Read a day.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        # Other forms of ISO 8601 are not written back as they came.
        return (
            datetime.strptime(text[:DATE_CHARS_MAX], "%Y-%m-%d")
            .replace(tzinfo=UTC)
            .date()
        )
    except ValueError as error:
        raise InvalidRequestError(
            f"{name} must be a day such as 2026-11-25.", param=name
        ) from error


def parse_span(first: str | None, last: str | None) -> Span:
    """Read the days of a statement, both included; what is not given has no end.

    Raises:
        InvalidRequestError: they are no days, or in the wrong order.
    """
    from_ms = 0 if first is None else _start_ms(parse_day(first, "from"))
    to_ms = ALWAYS.to_ms if last is None else _start_ms(parse_day(last, "to")) + DAY_MS
    if from_ms >= to_ms:
        raise InvalidRequestError("from must not be after to.", param="from")
    return Span(max(0, from_ms), to_ms)


def parse_usage_span(first: str | None, last: str | None, now_ms: int) -> Span:
    """Read the days of a usage report, both included; usually the last 30.

    Raises:
        InvalidRequestError: they are no days, in the wrong order, or over 366.
    """
    today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
    end = today if last is None else parse_day(last, "to")
    usual = timedelta(days=min(USAGE_DAYS_USUAL, end.toordinal()) - 1)
    begin = end - usual if first is None else parse_day(first, "from")
    span = parse_span(begin.isoformat(), end.isoformat())
    if (end - begin).days >= USAGE_DAYS_MAX:
        raise InvalidRequestError(
            f"from and to may span {USAGE_DAYS_MAX} days at most.", param="from"
        )
    return span


def parse_usage_by(text: str | None) -> tuple[str, ...]:
    """Read what a usage report is broken down by: some of day, key, model.

    Raises:
        InvalidRequestError: something else, or something twice.
    """
    if text is None:
        return USAGE_BY
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not set(names) <= set(USAGE_BY) or len(set(names)) < len(names):
        raise InvalidRequestError(
            f"group_by may have {', '.join(USAGE_BY)}, each once, with commas between.",
            param="group_by",
        )
    return tuple(name for name in USAGE_BY if name in names)


def parse_end(value: object, name: str) -> int:
    """Read when something ends: a moment such as ``2027-01-31T12:00:00Z``, or a day.

    A day ends with it: at midnight (UTC).

    Raises:
        InvalidRequestError: it is neither.
    """
    wrong = InvalidRequestError(
        f"{name} must be a moment such as 2027-01-31T12:00:00Z, or a day such as "
        "2027-01-31, at whose end it is over.",
        param=name,
    )
    if not isinstance(value, str) or not value.isascii() or len(value) > MOMENT_MAX:
        raise wrong
    if len(value) < DATE_CHARS_MAX:
        return _start_ms(parse_day(value, name)) + DAY_MS
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise wrong from error
    if moment.tzinfo is None:
        raise wrong
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return since // timedelta(milliseconds=1)


def day_text(day: int) -> str:
    """Write a day that is counted from the epoch."""
    return (date(1970, 1, 1) + timedelta(days=day)).isoformat()


def moment_text(at_ms: int) -> str:
    """Write a time as ``2026-11-25T12:00:00Z``."""
    moment = datetime.fromtimestamp(at_ms // 1000, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def moment_or_none(at_ms: int | None) -> str | None:
    """Write a time, if there is one."""
    return None if at_ms is None else moment_text(at_ms)


def _start_ms(day: date) -> int:
    return (day - date(1970, 1, 1)).days * DAY_MS
