"""Rows as CSV (RFC 4180), safe to open in a spreadsheet. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the start of a formula."""

Cell = str | int | None


def csv_text(
    columns: Sequence[str], rows: Iterable[Mapping[str, Cell]], *, head: bool = True
) -> str:
    """Write rows as CSV; a text that could be a formula gets a ``'`` in front.

    Decimals are no texts in that sense: they begin with a minus and go on in digits.
    """
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\r\n")
    if head:
        writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return written.getvalue()


def _cell(value: Cell) -> Cell:
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    digits = value[1:].replace(".", "", 1)
    is_number = value[0] == "-" and digits.isascii() and digits.isdigit()
    return value if is_number else f"'{value}"
