"""What a statement and a usage report may be asked for, and how rows become CSV."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import InvalidRequestError
from gateway.core.statements import (
    ALWAYS,
    DAY_MS,
    LAST_MS,
    NEWEST,
    Cursor,
    Span,
    cursor_text,
    day_text,
    moment_text,
    parse_cursor,
    parse_span,
    parse_usage_by,
    parse_usage_span,
)
from gateway.core.tables import Cell, csv_text

NOV_25_MS = 1_795_564_800_000


@given(st.integers(0, LAST_MS), st.from_regex(r"[ -~é]{0,80}", fullmatch=True))
def test_a_place_is_read_as_it_was_written(created_ms: int, txn_id: str) -> None:
    cursor = Cursor(created_ms, txn_id)

    assert parse_cursor(cursor_text(cursor)) == cursor


def test_without_a_place_a_statement_begins_with_the_newest() -> None:
    assert parse_cursor(None) == NEWEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "=",
        "bm90aGluZw",
        "é",
        "A" * 2_000,
        "LTU6eA",
        "OTk5OTk5OTk5OTk5OTk5OTk6eA",
    ],
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_cursor(text)
    assert refused.value.param == "after"


def test_days_are_whole_and_both_included() -> None:
    assert parse_span("2026-11-25", "2026-11-25") == Span(NOV_25_MS, NOV_25_MS + DAY_MS)
    assert parse_span(None, None) == ALWAYS
    assert parse_span("0001-01-01", "9999-12-31") == ALWAYS
    assert moment_text(NOV_25_MS) == "2026-11-25T00:00:00Z"
    assert day_text(NOV_25_MS // DAY_MS) == "2026-11-25"


@pytest.mark.parametrize(
    ("first", "last", "param"),
    [
        ("2026-13-01", None, "from"),
        ("20261125", None, "from"),
        ("2026-W48-3", None, "from"),
        ("2026-11-25T00:00", None, "from"),
        ("", None, "from"),
        (None, "yesterday", "to"),
        ("2026-11-26", "2026-11-25", "from"),
        (None, "1969-12-31", "from"),
    ],
)
def test_what_are_no_days_is_refused(
    first: str | None, last: str | None, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_span(first, last)
    assert refused.value.param == param


def test_usage_is_that_of_the_last_thirty_days_unless_asked_otherwise() -> None:
    now_ms = NOV_25_MS + 5
    assert parse_usage_span(None, None, now_ms) == Span(
        NOV_25_MS - 29 * DAY_MS, NOV_25_MS + DAY_MS
    )
    whole_year = parse_usage_span("2025-11-25", "2026-11-25", now_ms)
    assert whole_year.to_ms - whole_year.from_ms == 366 * DAY_MS
    with pytest.raises(InvalidRequestError, match="366 days"):
        parse_usage_span("2025-11-24", "2026-11-25", now_ms)


def test_usage_is_broken_down_by_what_there_is() -> None:
    assert parse_usage_by(None) == ("day", "key", "model")
    assert parse_usage_by("model, day") == ("day", "model")
    assert parse_usage_by("") == ()
    for text in ("days", "day,day", "tenant"):
        with pytest.raises(InvalidRequestError):
            parse_usage_by(text)


def test_csv_is_read_back_as_it_was_written() -> None:
    rows: list[dict[str, Cell]] = [
        {"name": 'a "quoted", name', "credits": "-1.5", "n": 3, "none": None},
        {"name": "two\nlines", "credits": "0.000000001", "n": 0, "none": None},
    ]

    text = csv_text(("name", "credits", "n", "none"), rows)

    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert read == [
        {"name": 'a "quoted", name', "credits": "-1.5", "n": "3", "none": ""},
        {"name": "two\nlines", "credits": "0.000000001", "n": "0", "none": ""},
    ]


@pytest.mark.parametrize("text", ["=1+1", "+1", "@SUM(A1)", "-1+1", "-", "\t=1"])
def test_a_spreadsheet_finds_no_formula(text: str) -> None:
    written = csv_text(("note",), [{"note": text}], head=False)

    assert next(csv.reader(io.StringIO(written, newline=""))) == [f"'{text}"]
