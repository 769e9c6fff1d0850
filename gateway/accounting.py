"""The commands of finance: statements, usage. A part of the command line."""
# ruff: noqa: PLR0913, PLC0415 - options are arguments; heavy imports wait

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.terminal import Command, listed, print_json, with_books

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gateway.books import Books
    from gateway.core.tables import Cell

CSV_ROWS_AT_ONCE = 1_000
_TENANT = click.option("--tenant", required=True, help="The tenant's name.")


def _days(command: Command) -> Command:
    for option in (
        click.option("--to", "last", help="The last day (UTC), 2026-11-30."),
        click.option("--from", "first", help="The first day (UTC), 2026-11-01."),
    ):
        command = option(command)
    return command


@click.command("statement")
@listed
@_TENANT
@_days
@click.option("--limit", type=click.IntRange(1), help="At most so many entries.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def statement(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    first: str | None,
    last: str | None,
    limit: int | None,
    as_csv: bool,
) -> None:
    """Show what came and went, newest first."""

    async def run(books: Books) -> None:
        from gateway.core.statements import NEWEST, parse_span
        from gateway.flows.statements import ENTRY_COLUMNS, entry_row

        span = parse_span(first, last)
        owner = await books.tenants.named(tenant)
        table = Table(ENTRY_COLUMNS, as_json=as_json, as_csv=as_csv)
        reading = books.read.all_entries(owner.id, span, NEWEST)
        async with aclosing(reading) as entries:
            left = limit
            async for entry in entries:
                table.add(entry_row(entry))
                left = None if left is None else left - 1
                if left == 0:
                    break
        table.end()

    with_books(config, data_dir, run)


@click.command("usage")
@listed
@_TENANT
@_days
@click.option("--by", help="Some of day, key, model. Default: all of them.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def usage(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    first: str | None,
    last: str | None,
    by: str | None,
    as_csv: bool,
) -> None:
    """Sum up what a tenant has used; by default in the last 30 days."""

    async def run(books: Books) -> None:
        from gateway.core.statements import parse_usage_by, parse_usage_span
        from gateway.flows.statements import usage_columns, usage_row

        span = parse_usage_span(first, last, books.read.clock.now_ms())
        groups = parse_usage_by(by)
        owner = await books.tenants.named(tenant)
        rows = await books.read.usage(owner.id, span, groups)
        table = Table(usage_columns(groups), as_json=as_json, as_csv=as_csv)
        for row in rows:
            table.add(usage_row(row))
        table.end()

    with_books(config, data_dir, run)


class Table:
    """Prints rows as they come: as CSV, as lines, or in the end as one JSON list."""

    def __init__(self, columns: Sequence[str], *, as_json: bool, as_csv: bool) -> None:
        if as_json and as_csv:
            raise click.UsageError("--json or --csv, not both")
        self.columns = columns
        self.as_json = as_json
        self.as_csv = as_csv
        self._rows: list[Mapping[str, Cell]] = []
        self._begun = False

    def add(self, row: Mapping[str, Cell]) -> None:
        """Add a row."""
        self._rows.append({name: row.get(name) for name in self.columns})
        if not self.as_json and len(self._rows) >= CSV_ROWS_AT_ONCE:
            self._print()

    def end(self) -> None:
        """Print what is left."""
        if self.as_json:
            print_json(self._rows)
        else:
            self._print()

    def _print(self) -> None:
        from gateway.core.tables import csv_text

        if self.as_csv:
            text = csv_text(self.columns, self._rows, head=not self._begun)
            click.echo(text, nl=False)
        else:
            for row in self._rows:
                click.echo(_line(row.values()))
        self._begun, self._rows = True, []


def _line(cells: Iterable[Any]) -> str:
    return "  ".join(str(cell) for cell in cells if cell is not None)
