"""The commands of finance: statements, usage. A part of the command line."""
# ruff: noqa: PLR0913, PLC0415 - options are arguments; heavy imports wait

from __future__ import annotations

import json
import sys
from contextlib import aclosing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.terminal import (
    EXIT_FAILED,
    Command,
    fail,
    listed,
    print_json,
    read_settings,
    shared,
    show,
    show_rows,
    with_books,
    with_settings,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gateway.books import Books
    from gateway.core.tables import Cell
    from gateway.flows.margin import Reconciled

CSV_ROWS_AT_ONCE = 1_000
YAML_MAX_CHARS = 4_000_000
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


def _amount(text: str | None) -> int | None:
    from gateway.core.terms import amount_nano

    return None if text is None else amount_nano(text, "credits")


@click.command("refund")
@listed
@_TENANT
@click.option("--credits", "amount", help="A part of the charge. Default: the rest.")
@click.option("--reference", help="The same reference again changes nothing.")
@click.option("--note", help="Why.")
@click.argument("task_id")
def refund(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    amount: str | None,
    reference: str | None,
    note: str | None,
    task_id: str,
) -> None:
    """Give back what a task was charged, or a part of it."""

    async def run(books: Books) -> dict[str, str]:
        from gateway.flows.credits import balance_texts

        after = await books.tenants.refund(
            await books.tenants.named(tenant),
            task_id,
            nanocredits=_amount(amount),
            reference=reference,
            note=note,
        )
        return balance_texts(after)

    balance = with_books(config, data_dir, run)
    show(balance, f"{tenant} now has {balance['available']} credits", as_json=as_json)


@click.command("grants")
@listed
@_TENANT
def grants(
    config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
) -> None:
    """List a tenant's grants, newest first, and what is left of those that end."""

    async def run(books: Books) -> None:
        from gateway.flows.credits import grant_facts

        owner = await books.tenants.named(tenant)
        columns = ("created_at", "reference", "credits", "expires_at", "left", "note")
        table = Table(columns, as_json=as_json, as_csv=False)
        offset = 0
        while found := await books.tenants.grants(owner.id, offset=offset, limit=1_000):
            for grant in found:
                table.add(grant_facts(grant))
            offset += len(found)
        table.end()

    with_books(config, data_dir, run)


@click.command("holds")
@listed
@_TENANT
@click.option("--limit", type=click.IntRange(1, 10_000), default=1_000)
def holds(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    limit: int,
) -> None:
    """List what is set aside for tasks that are not over."""

    async def run(books: Books) -> list[dict[str, str]]:
        from gateway.core.money import decimal_text
        from gateway.core.statements import moment_text

        owner = await books.tenants.named(tenant)
        return [
            {
                "task_id": each.task_id,
                "key_id": each.key_id,
                "model": each.variant,
                "credits": decimal_text(each.nanocredits),
                "created_at": moment_text(each.created_ms),
                "expires_at": moment_text(each.expires_ms),
            }
            for each in await books.read.open_holds(owner.id, offset=0, limit=limit)
        ]

    show_rows(with_books(config, data_dir, run), as_json=as_json)


def _tenant_command(name: str, text: str) -> click.Command:
    @click.command(name, help=text)
    @listed
    @click.argument("tenant")
    def run_it(
        config: Path | None, data_dir: Path | None, *, as_json: bool, tenant: str
    ) -> None:
        async def run(books: Books) -> dict[str, Any]:
            from gateway.flows.credits import tenant_facts

            record = await books.tenants.record(tenant)
            if name == "suspend":
                record = await books.tenants.suspend(record.id)
            elif name == "resume":
                record = await books.tenants.resume(record.id)
            return tenant_facts(record)

        _show_facts(with_books(config, data_dir, run), as_json=as_json)

    return run_it


show_tenant = _tenant_command("show", "Show a tenant: what it has, and what is set.")
suspend = _tenant_command("suspend", "Take nothing new for a tenant; what runs ends.")
resume = _tenant_command("resume", "Let a suspended tenant go on.")


@click.command("set")
@listed
@click.argument("tenant")
@click.option("--price-multiplier", help="What prices are multiplied by: 0.85.")
@click.option("--prices", help="Own prices as JSON; see docs/credits.md.")
@click.option("--low-balance", help="Tell when fewer credits are left.")
@click.option("--webhook-url", help="Where a low balance is told.")
@click.option("--webhook-key", help="The key whose secret signs that: key_….")
def set_tenant(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str,
    **options: str | None,
) -> None:
    """Change a tenant's prices, or its warning; "none" takes one away."""
    settings = read_settings(config, data_dir, {}, adapters=False)
    given = _settings_given(options)

    async def run(books: Books) -> dict[str, Any]:
        from gateway.flows.credits import tenant_facts

        record = await books.tenants.record(tenant)
        changed = await books.tenants.change(record.id, given, settings.variants)
        return tenant_facts(changed)

    _show_facts(with_settings(settings, run), as_json=as_json)


def _settings_given(options: dict[str, str | None]) -> dict[str, object]:
    given: dict[str, object] = {}
    if options["price_multiplier"] is not None:
        given["price_multiplier"] = _or_none(options["price_multiplier"])
    if options["prices"] is not None:
        given["prices"] = _json_or_none(options["prices"])
    if options["low_balance"] is not None:
        low: dict[str, object] = {
            "credits": options["low_balance"],
            "url": options["webhook_url"],
        }
        if options["webhook_key"] is not None:
            low["key_id"] = options["webhook_key"]
        given["low_balance"] = low if _or_none(options["low_balance"]) else None
    return given


def _or_none(text: str | None) -> str | None:
    return None if text == "none" else text


def _json_or_none(text: str) -> object:
    if _or_none(text) is None:
        return None
    try:
        # A figure is read as the text that it was given as, never through a float.
        return json.loads(text, parse_float=str)
    except ValueError as error:
        fail(f"--prices is not JSON: {error}")


def _show_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    lines = (f"{name:<18}{value}" for name, value in facts.items() if value)
    show(facts, "\n".join(lines), as_json=as_json)


@click.command("trail")
@listed
@click.option("--tenant", help="The tenant's name. Default: all.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
def trail(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    tenant: str | None,
    limit: int,
) -> None:
    """List who changed what of tenants and credits, newest first."""

    async def run(books: Books) -> list[dict[str, Any]]:
        from gateway.core.statements import NEWEST, moment_text

        owner = await books.tenants.record(tenant) if tenant else None
        found = await books.tenants.trail(
            owner.id if owner else None, after=NEWEST, limit=limit
        )
        return [
            {
                "at": moment_text(each.at_ms),
                "who": each.who,
                "what": each.what,
                "subject": each.subject,
                "before": _loaded(each.before_json),
                "after": _loaded(each.after_json),
            }
            for each in found
        ]

    rows = with_books(config, data_dir, run)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            _line(json.dumps(v) if isinstance(v, dict) else v for v in row.values())
        )


@click.command("margin")
@listed
@_days
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def margin(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    first: str | None,
    last: str | None,
    as_csv: bool,
) -> None:
    """Sum up what was earned and spent, by upstream and model; the last 30 days."""

    async def run(books: Books) -> None:
        from gateway.core.statements import parse_usage_span
        from gateway.flows.margin import MARGIN_COLUMNS

        span = parse_usage_span(first, last, books.read.clock.now_ms())
        table = Table(MARGIN_COLUMNS, as_json=as_json, as_csv=as_csv)
        for row in await books.margin(span):
            table.add(row)
        table.end()

    with_books(config, data_dir, run)


@click.command("reconcile")
@listed
@click.option("--upstream", required=True, help="Whose invoice it is.")
@click.option(
    "--from",
    "invoice",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The invoice as CSV, with a column of jobs or days and one of costs.",
)
@click.option("--name-column", help="The column of jobs or days. Default: found.")
@click.option("--cost-column", help="The column of costs (USD). Default: found.")
@click.option("--since", "first", help="Only calls from this day (UTC) on.")
@click.option("--until", "last", help="Only calls until this day (UTC).")
@click.option("--csv", "as_csv", is_flag=True, help="Print the differences as CSV.")
def reconcile(
    config: Path | None,
    data_dir: Path | None,
    *,
    as_json: bool,
    upstream: str,
    invoice: Path,
    name_column: str | None,
    cost_column: str | None,
    first: str | None,
    last: str | None,
    as_csv: bool,
) -> None:
    """Compare a provider's invoice with our cost book; exits 1 if they differ."""

    async def run(books: Books) -> Reconciled:
        from gateway.core.errors import upstream_not_found
        from gateway.core.invoices import parse_invoice
        from gateway.core.statements import parse_span
        from gateway.flows.margin import InvoiceLine, reconciled

        if upstream not in books.upstream_names:
            raise upstream_not_found(upstream, books.upstream_names)
        try:
            text = invoice.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{invoice} cannot be read: {error}")
        by, lines = parse_invoice(
            text, name_column=name_column, cost_column=cost_column
        )
        book = await books.margin.costs(upstream, parse_span(first, last))
        return reconciled((InvoiceLine(*line) for line in lines), book, by)

    found = with_books(config, data_dir, run)
    _show_reconciled(found, as_json=as_json, as_csv=as_csv)
    if found.differences:
        sys.exit(EXIT_FAILED)


def _show_reconciled(found: Reconciled, *, as_json: bool, as_csv: bool) -> None:
    from gateway.core.money import decimal_text
    from gateway.flows.margin import DIFFERENCE_COLUMNS, difference_row

    rows = [difference_row(each) for each in found.differences]
    total = {
        "invoice_usd": decimal_text(found.invoice_nanousd),
        "book_usd": decimal_text(found.book_nanousd),
        "lines": found.lines,
        "calls": found.calls,
        "unnamed_calls": found.unnamed,
    }
    if as_json:
        print_json({**total, "differences": rows})
        return
    table = Table(DIFFERENCE_COLUMNS, as_json=False, as_csv=as_csv)
    for row in rows:
        table.add(row)
    table.end()
    text = ", ".join(f"{name} {value}" for name, value in total.items())
    click.echo(f"{len(rows)} differences ({text})", err=as_csv)


@click.group("import")
def import_() -> None:
    """Take configurations of other gateways over."""


@import_.command("litellm")
@shared
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it, if nothing is there yet. Default: standard output.",
)
def import_litellm(
    config: Path | None, data_dir: Path | None, *, file: Path, out: Path | None
) -> None:
    """Turn a LiteLLM config into ours; says on stderr what it left behind.

    Models and price cards are those of the catalogue beside --config. Exits 1 if
    nothing could be carried over.
    """
    settings = read_settings(config, data_dir, {}, adapters=False)
    from gateway.core.litellm import from_litellm

    aliases = {
        alias: name
        for name, variant in settings.variants.items()
        for alias in variant.aliases
    }
    cards = {
        name: settings.cards.get(name, {})
        for name, variant in settings.variants.items()
        if not variant.retired
    }
    imported = from_litellm(_yaml(file), cards, aliases)
    for note in imported.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"{imported.offers} offers carried over", err=True)
    if not imported.offers:
        sys.exit(EXIT_FAILED)
    if out is None:
        click.echo(imported.text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as written:
            written.write(imported.text)
    except OSError as error:
        fail(f"{out} cannot be written: {error.strerror}")


def _yaml(file: Path) -> object:
    # All scalars stay the texts they are.
    yaml = import_module("yaml")
    try:
        text = file.read_text("utf-8")
        if len(text) > YAML_MAX_CHARS:
            fail(f"{file} has over {YAML_MAX_CHARS:,} characters")
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        fail(f"{file} cannot be read: {error}")


def _loaded(text: str | None) -> object:
    return None if text is None else json.loads(text)


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
