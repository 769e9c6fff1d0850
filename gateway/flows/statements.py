"""What a tenant reads of its credits: statement, open holds, usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from gateway.core.errors import InvalidRequestError
from gateway.core.money import decimal_text
from gateway.core.statements import (
    ENTRIES_MAX,
    USAGE_ROWS_MAX,
    Cursor,
    Span,
    cursor_text,
    day_text,
    moment_text,
)
from gateway.core.tables import Cell
from gateway.ports import Clock, Entry, OpenHold, Reports, UsageRow

ENTRY_COLUMNS = (
    "created_at",
    "id",
    "kind",
    "credits",
    "task_id",
    "reference",
    "model",
    "key_id",
    "images",
    "note",
)
USAGE_COLUMNS = (
    "day",
    "key_id",
    "model",
    "requests",
    "images",
    "credits",
    "text_input",
    "text_cached",
    "image_input",
    "image_cached",
    "image_output",
)
_COLUMN_OF = {"day": "day", "key": "key_id", "model": "model"}


@dataclass(frozen=True, slots=True)
class Page:
    """Entries, newest first; ``next`` is where older ones follow, None at the end."""

    entries: Sequence[Entry]
    next: str | None


@dataclass(frozen=True, slots=True)
class ReadCredits:
    """Reads what became of a tenant's credits. Whose they are is checked before."""

    reports: Reports
    clock: Clock

    async def page(
        self, tenant_id: str, span: Span, *, after: Cursor, limit: int
    ) -> Page:
        """Read a page of the statement."""
        found = await self.reports.entries(
            tenant_id, span, after=after, limit=limit + 1
        )
        entries = found[:limit]
        more = len(found) > limit
        return Page(entries, _next(entries[-1]) if more else None)

    async def all_entries(
        self, tenant_id: str, span: Span, after: Cursor
    ) -> AsyncGenerator[Entry, None]:
        """Read a statement to its end."""
        while True:
            found = await self.reports.entries(
                tenant_id, span, after=after, limit=ENTRIES_MAX
            )
            for entry in found:
                yield entry
            if len(found) < ENTRIES_MAX:
                return
            after = Cursor(found[-1].created_ms, found[-1].txn_id)

    async def open_holds(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[OpenHold]:
        """Read what is set aside for tasks that are not over."""
        return await self.reports.open_holds(tenant_id, offset=offset, limit=limit)

    async def usage(
        self, tenant_id: str, span: Span, by: Sequence[str]
    ) -> Sequence[UsageRow]:
        """Sum up what was used.

        Raises:
            InvalidRequestError: that would be too many rows.
        """
        rows = await self.reports.usage(tenant_id, span, by, limit=USAGE_ROWS_MAX + 1)
        if len(rows) > USAGE_ROWS_MAX:
            raise InvalidRequestError(
                f"The report would have over {USAGE_ROWS_MAX:,} rows. Ask for fewer "
                "days, or leave something out of group_by.",
                param="group_by",
            )
        return rows


def _next(entry: Entry) -> str:
    return cursor_text(Cursor(entry.created_ms, entry.txn_id))


def entry_row(entry: Entry) -> dict[str, Cell]:
    """Write an entry by ``ENTRY_COLUMNS``; credits are an exact decimal."""
    is_charge = entry.kind == "charge"
    return {
        "created_at": moment_text(entry.created_ms),
        "id": entry.txn_id,
        "kind": entry.kind,
        "credits": decimal_text(entry.nanocredits),
        "task_id": entry.task_id,
        "reference": None if is_charge else entry.reference,
        "model": entry.variant,
        "key_id": entry.key_id,
        "images": entry.images,
        "note": entry.note,
    }


def usage_columns(by: Sequence[str]) -> tuple[str, ...]:
    """Name the columns of a usage report that is broken down like that."""
    left_out = {column for name, column in _COLUMN_OF.items() if name not in by}
    return tuple(name for name in USAGE_COLUMNS if name not in left_out)


def usage_row(row: UsageRow) -> dict[str, Cell]:
    """Write a row of usage by ``USAGE_COLUMNS``; credits are an exact decimal."""
    return {
        "day": None if row.day is None else day_text(row.day),
        "key_id": row.key_id,
        "model": row.variant,
        "requests": row.requests,
        "images": row.images,
        "credits": decimal_text(row.charged_nanocredits),
        "text_input": row.tokens.text_input,
        "text_cached": row.tokens.text_cached,
        "image_input": row.tokens.image_input,
        "image_cached": row.tokens.image_cached,
        "image_output": row.tokens.image_output,
    }
