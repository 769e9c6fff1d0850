"""A provider's invoice export, read from CSV. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal

from gateway.core.errors import InvalidRequestError
from gateway.core.money import NANO, NANO_MAX

ROWS_MAX = 2_000_000
TEXT_MAX_CHARS = 512
JOB_COLUMNS = ("job_id", "request_id", "generation_id", "prediction_id", "id")
DAY_COLUMNS = ("day", "date", "created_at", "timestamp")
COST_COLUMNS = ("cost_usd", "cost", "amount_usd", "amount", "total_usd", "total")
"""Names that columns are known by, the first one first; any case."""
DAY_CHARS = len("2026-11-25")

By = Literal["job", "day"]


def parse_invoice(
    text: str, *, name_column: str | None = None, cost_column: str | None = None
) -> tuple[By, list[tuple[str, int]]]:
    """Read an invoice: by what it names its lines ("job" or "day"), and the lines.

    Each line is (job id or day, nano-dollars). A cost may have a currency sign,
    thousands' commas and an exponent; it is rounded to 1e-9, half up. Rows without a
    name are sums, and are left out.

    Raises:
        InvalidRequestError: there is no such column, or a row cannot be read.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    try:
        head = [name.strip().lower() for name in next(reader)]
        names = (name_column.lower(),) if name_column else JOB_COLUMNS + DAY_COLUMNS
        name_at = _column(head, names, "a job or a day", "--name-column")
        costs = (cost_column.lower(),) if cost_column else COST_COLUMNS
        cost_at = _column(head, costs, "a cost", "--cost-column")
        by: By = "day" if head[name_at] in DAY_COLUMNS else "job"
        lines = []
        for number, row in enumerate(reader, start=2):
            if number > ROWS_MAX:
                raise _wrong(f"it has more than {ROWS_MAX:,} rows")
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= max(name_at, cost_at):
                raise _wrong(f"row {number} has too few columns")
            name = row[name_at].strip()[:TEXT_MAX_CHARS]
            if name:
                lines.append(
                    (
                        name[:DAY_CHARS] if by == "day" else name,
                        _nanousd(row[cost_at], number),
                    )
                )
    except StopIteration:
        raise _wrong("it is empty") from None
    except csv.Error as error:
        raise _wrong(f"row {reader.line_num}: {error}") from error
    return by, lines


def _column(head: Sequence[str], names: Sequence[str], what: str, option: str) -> int:
    for name in names:
        if name in head:
            return head.index(name)
    raise _wrong(
        f"no column has {what}: looked for {', '.join(names)}; there are "
        f"{', '.join(head)[:TEXT_MAX_CHARS]}. Name it with {option}"
    )


def _nanousd(text: str, number: int) -> int:
    plain = text.strip().replace("$", "").replace(",", "") or "0"
    try:
        amount = Decimal(plain)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or abs(amount) * NANO > NANO_MAX:
        raise _wrong(f"row {number}: {text[:64]!r} is no amount")
    nano = amount * NANO
    return int(nano + Decimal("0.5")) if nano >= 0 else -int(Decimal("0.5") - nano)


def _wrong(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The invoice cannot be read: {what}.", param="from")
