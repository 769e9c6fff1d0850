"""A provider's invoice beside our cost book."""

from __future__ import annotations

import pytest

from gateway.core.errors import InvalidRequestError
from gateway.core.invoices import parse_invoice
from gateway.core.statements import DAY_MS
from gateway.flows.margin import (
    Difference,
    InvoiceLine,
    difference_row,
    reconciled,
)
from gateway.ports import CostLine

DAY = 20_782
"""2026-11-25."""


def call(task_id: str, nanousd: int, job_id: str | None, day: int = DAY) -> CostLine:
    at_ms = day * DAY_MS + 5
    return CostLine(task_id, 1, "gpt-image-2", "cost", "usage", nanousd, at_ms, job_id)


def test_an_invoice_is_read_by_columns_that_are_known() -> None:
    text = "\ufeffDate,Request_ID,Cost\r\n2026-11-25,job-1,$0.0060000005\r\n,,\r\n"
    text += (
        '2026-11-25,job-2,"1,000.5"\r\n2026-11-25,,2000\r\n2026-11-25,job-3,1E-7\r\n'
    )

    assert parse_invoice(text) == (
        "job",
        [("job-1", 6_000_001), ("job-2", 1_000_500_000_000), ("job-3", 100)],
    )


def test_days_are_read_from_moments_too() -> None:
    text = "timestamp,amount\n2026-11-25T10:00:00Z,0.5\n2026-11-25 11:00,-0.25\n"

    by, lines = parse_invoice(text)

    assert (by, lines) == (
        "day",
        [("2026-11-25", 500_000_000), ("2026-11-25", -250_000_000)],
    )


def test_columns_can_be_named() -> None:
    text = "a,Ref,Net\nx,job-1,3\n"

    by, lines = parse_invoice(text, name_column="ref", cost_column="net")

    assert (by, lines) == ("job", [("job-1", 3_000_000_000)])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "a job or a day"),
        ("id,b\n1,2\n", "a cost"),
        ("id,cost\n1,NaN\n", "no amount"),
        ("id,cost\n1,much\n", "no amount"),
        ("id,cost\n1,1e30\n", "no amount"),
        ("id,x,cost\n1\n", "too few columns"),
        ('id,cost\n"' + "x" * 200_000, "field larger"),
    ],
)
def test_what_is_no_invoice_is_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        parse_invoice(text)


def test_differences_are_found_job_by_job() -> None:
    book = [
        call("t-1", 10, "same"),
        call("t-2", 10, "more"),
        call("t-3", 10, "ours"),
        call("t-4", 10, None),
        call("t-5", 0, "free"),
    ]
    invoice = [
        InvoiceLine("same", 4),
        InvoiceLine("same", 6),
        InvoiceLine("more", 11),
        InvoiceLine("theirs", 7),
    ]

    found = reconciled(invoice, book, "job")

    assert found.differences == [
        Difference("more", "another amount", 11, 10, "t-2"),
        Difference("ours", "only in our book", 0, 10, "t-3"),
        Difference("theirs", "only on the invoice", 7, 0),
    ]
    assert (found.invoice_nanousd, found.book_nanousd) == (28, 40)
    assert (found.lines, found.calls, found.unnamed) == (4, 5, 1)
    assert difference_row(found.differences[0])["difference_usd"] == "0.000000001"


def test_differences_are_found_day_by_day() -> None:
    book = [call("t-1", 10, None), call("t-2", 5, "x"), call("t-3", 5, None, DAY + 1)]
    invoice = [InvoiceLine("2026-11-25", 15), InvoiceLine("2026-11-26", 4)]

    found = reconciled(invoice, book, "day")

    assert found.differences == [Difference("2026-11-26", "another amount", 4, 5)]
    assert found.unnamed == 0
