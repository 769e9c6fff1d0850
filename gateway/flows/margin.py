"""What the operator earns, and whether providers' invoices say the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.core.invoices import By
from gateway.core.money import decimal_text, usd_from_credits
from gateway.core.statements import DAY_MS, Span, day_text
from gateway.core.tables import Cell
from gateway.ports import CostLine, MarginRow, Reports

COSTS_AT_ONCE = 5_000
MARGIN_COLUMNS = (
    "upstream",
    "model",
    "tasks",
    "images",
    "charged_credits",
    "charged_usd",
    "refunded_credits",
    "absorbed_credits",
    "cost_usd",
    "waste_usd",
    "margin_usd",
)


@dataclass(frozen=True, slots=True)
class ReadMargin:
    """Reads the operator's books."""

    reports: Reports
    nanocredits_per_usd: int

    async def __call__(self, span: Span) -> list[dict[str, Cell]]:
        """Sum up by upstream and model, by ``MARGIN_COLUMNS``; amounts are decimals.

        Dollars of credits are rounded to 1e-9; the margin is what was charged, less
        refunds, cost and waste.
        """
        return [self.row(each) for each in await self.reports.margin(span)]

    def row(self, each: MarginRow) -> dict[str, Cell]:
        """Write one row."""
        kept = each.charged_nanocredits - each.refunded_nanocredits
        spent_nanousd = each.cost_nanousd + each.waste_nanousd
        margin_nanousd = self._usd(kept) - spent_nanousd
        return {
            "upstream": each.upstream,
            "model": each.variant,
            "tasks": each.tasks,
            "images": each.images,
            "charged_credits": decimal_text(each.charged_nanocredits),
            "charged_usd": decimal_text(self._usd(each.charged_nanocredits)),
            "refunded_credits": decimal_text(each.refunded_nanocredits),
            "absorbed_credits": decimal_text(each.absorbed_nanocredits),
            "cost_usd": decimal_text(each.cost_nanousd),
            "waste_usd": decimal_text(each.waste_nanousd),
            "margin_usd": decimal_text(margin_nanousd),
        }

    def _usd(self, nanocredits: int) -> int:
        return usd_from_credits(nanocredits, self.nanocredits_per_usd)

    async def costs(self, upstream: str, span: Span) -> list[CostLine]:
        """Read the whole cost book of an upstream."""
        lines, after = list[CostLine](), ("", 0)
        while True:
            found = await self.reports.costs(
                upstream, span, after=after, limit=COSTS_AT_ONCE
            )
            lines += found
            if len(found) < COSTS_AT_ONCE:
                return lines
            after = (found[-1].task_id, found[-1].seq)


# --- invoices ---


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    """A line of a provider's invoice: a job, or a day, and what it cost."""

    name: str
    nanousd: int


Why = Literal["only on the invoice", "only in our book", "another amount"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an invoice and our cost book say something else."""

    name: str
    why: Why
    invoice_nanousd: int
    book_nanousd: int
    task_id: str | None = None


@dataclass(frozen=True, slots=True)
class Reconciled:
    """An invoice beside our cost book.

    ``unnamed`` counts calls in our book that the upstream gave no name to: an invoice
    by job cannot be compared with them.
    """

    invoice_nanousd: int
    book_nanousd: int
    lines: int
    calls: int
    unnamed: int
    differences: Sequence[Difference]


def reconciled(
    invoice: Iterable[InvoiceLine], book: Sequence[CostLine], by: By
) -> Reconciled:
    """Compare an invoice with our cost book, job by job or day by day.

    Lines of one job or day are added up. Pure.
    """
    billed: dict[str, int] = defaultdict(int)
    count = 0
    for line in invoice:
        billed[line.name] += line.nanousd
        count += 1
    ours: dict[str, int] = defaultdict(int)
    tasks: dict[str, str] = {}
    unnamed = 0
    for call in book:
        name = call.job_id if by == "job" else day_text(call.created_ms // DAY_MS)
        if name is None:
            unnamed += 1
            continue
        ours[name] += call.nanousd
        if by == "job":
            tasks[name] = call.task_id
    return Reconciled(
        invoice_nanousd=sum(billed.values()),
        book_nanousd=sum(call.nanousd for call in book),
        lines=count,
        calls=len(book),
        unnamed=unnamed,
        differences=_differences(billed, ours, tasks),
    )


def _differences(
    billed: Mapping[str, int], ours: Mapping[str, int], tasks: Mapping[str, str]
) -> list[Difference]:
    found = []
    for name in sorted({*billed, *ours}):
        invoice, book = billed.get(name, 0), ours.get(name, 0)
        why: Why = "another amount"
        if name not in ours:
            why = "only on the invoice"
        elif name not in billed:
            why = "only in our book"
        # What is free may be left off an invoice.
        if invoice != book:
            found.append(Difference(name, why, invoice, book, tasks.get(name)))
    return found


def difference_row(each: Difference) -> dict[str, Cell]:
    """Write a difference; amounts are decimals of dollars."""
    return {
        "name": each.name,
        "why": each.why,
        "invoice_usd": decimal_text(each.invoice_nanousd),
        "book_usd": decimal_text(each.book_nanousd),
        "difference_usd": decimal_text(each.invoice_nanousd - each.book_nanousd),
        "task_id": each.task_id,
    }


DIFFERENCE_COLUMNS = (
    "name",
    "why",
    "invoice_usd",
    "book_usd",
    "difference_usd",
    "task_id",
)
