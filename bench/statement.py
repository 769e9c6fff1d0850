"""How long a page of a statement takes where there are a million entries.

Fills the tables of a database, as a year of sales would, and reads pages from the
newest to the oldest entries, over the same store that the routes use.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from bench.figures import Table
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import Database, Operation, Transaction
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.postgres import PostgresDatabase
from gateway.adapters.sql.reports import SqlReports
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.core.statements import (
    ALWAYS,
    DAY_MS,
    ENTRIES_MAX,
    ENTRIES_USUAL,
    NEWEST,
    USAGE_BY,
    Cursor,
    Span,
)
from gateway.ports import Tenant
from tests.servers import PostgresServer, installed

ENTRIES = 1_000_000
AT_ONCE = 10_000
PAGES = 200
PAGE_MAX_MS = 20.0
START_MS = 1_790_000_000_000
EVERY_MS = 2_592
"""A million in thirty days."""
TENANT = "ten_1"


async def fill(database: Database, entries: int) -> None:
    """Write charges of one tenant, and a tenth as many of another."""
    await migrate(database, now_ms=START_MS)
    for name in (TENANT, "ten_2"):
        tenant = Tenant(name, name)
        await SqlAccounts(database).add_tenant(tenant, now_ms=START_MS)
    for begin in range(0, entries, AT_ONCE):
        end = min(entries, begin + AT_ONCE)
        for sql in (_HOLDS, _SETTLEMENTS, _ENTRIES, _REVENUE):
            await database.write(_run(sql, begin, end))


def _run(sql: str, begin: int, end: int) -> Operation[None]:
    async def run(tx: Transaction) -> None:
        await tx.run(sql, begin, end, START_MS, EVERY_MS)

    return run


_OWNER = "CASE WHEN x.n % 11 = 10 THEN 'ten_2' ELSE 'ten_1' END"
_TASK = "'task-unified-' || x.n"
_AT = "CAST($3 AS BIGINT) + x.n * CAST($4 AS BIGINT)"
_FROM = """FROM (WITH RECURSIVE r(n) AS (SELECT CAST($1 AS BIGINT) UNION ALL
    SELECT n + 1 FROM r WHERE n + 1 < CAST($2 AS BIGINT)) SELECT n FROM r) x"""
_HOLDS = f"""INSERT INTO holds (task_id, tenant_id, nanocredits, created_ms, expires_ms)
SELECT {_TASK}, {_OWNER}, 1000, {_AT}, {_AT} {_FROM}"""
_SETTLEMENTS = f"""INSERT INTO settlements (task_id, due, charged, absorbed,
    usage_source, created_ms, tenant_id, key_id, variant, images, text_input,
    text_cached, image_input, image_cached, image_output)
SELECT {_TASK}, 999, 999, 0, 'reported', {_AT}, {_OWNER}, 'key_' || x.n % 5,
    'gpt-image-2', 1, 5, 0, 0, 0, 196 {_FROM}"""
_ENTRIES = f"""INSERT INTO entries
    (txn_id, account, nanocredits, kind, reference, created_ms)
SELECT 'charge:' || {_TASK}, 'tenant:' || {_OWNER}, -999, 'charge', {_TASK}, {_AT}
{_FROM}"""
_REVENUE = f"""INSERT INTO entries
    (txn_id, account, nanocredits, kind, reference, created_ms)
SELECT 'charge:' || {_TASK}, 'revenue', 999, 'charge', {_TASK}, {_AT} {_FROM}"""


async def measure(engine: str, database: Database, entries: int) -> None:
    """Measure one engine."""
    begun_s = time.perf_counter()
    await fill(database, entries)
    table = Table(f"a statement of {entries * 10 // 11:,} entries, {engine}")
    table.line("filled in", f"{time.perf_counter() - begun_s:,.0f} s")
    reports = SqlReports(database)
    for limit in (ENTRIES_USUAL, ENTRIES_MAX):
        took_ms = await _pages(reports, entries, limit)
        p99_ms = took_ms[len(took_ms) * 99 // 100]
        name = f"page of {limit:,}"
        table.line(f"{name}, median", f"{took_ms[len(took_ms) // 2]:.1f} ms")
        if limit == ENTRIES_USUAL:
            table.at_most(f"{name}, p99", p99_ms, PAGE_MAX_MS, "ms")
        else:
            table.line(f"{name}, p99", f"{p99_ms:.1f} ms")
    for days in (1, 30):
        span = Span(START_MS, START_MS + days * DAY_MS)
        begun_s = time.perf_counter()
        await reports.usage(TENANT, span, USAGE_BY, limit=10_000)
        table.line(
            f"usage of {days} days", f"{(time.perf_counter() - begun_s) * 1e3:,.0f} ms"
        )
    begun_s = time.perf_counter()
    await reports.margin(ALWAYS)
    table.line("margin of 30 days", f"{time.perf_counter() - begun_s:,.1f} s")
    await database.close()


async def _pages(reports: SqlReports, entries: int, limit: int) -> list[float]:
    """Read pages one after another, and others from places all over; in order."""
    took_ms, after = list[float](), NEWEST
    for number in range(PAGES):
        if number >= PAGES // 2:
            at = entries * (number - PAGES // 2) // (PAGES // 2)
            after = Cursor(START_MS + at * EVERY_MS, "")
        begun_s = time.perf_counter()
        page = await reports.entries(TENANT, ALWAYS, after=after, limit=limit)
        took_ms.append((time.perf_counter() - begun_s) * 1e3)
        if page:
            after = Cursor(page[-1].created_ms, page[-1].txn_id)
    return sorted(took_ms)


async def measure_all(directory: Path, entries: int) -> None:
    """Measure each engine that there is."""
    sqlite = await SqliteDatabase.open(directory / "bench.db")
    await measure("SQLite", sqlite, entries)
    if installed("postgres") is None:
        print("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        return
    server = PostgresServer.make(durable=True)
    await measure("PostgreSQL", await PostgresDatabase.open(server.database()), entries)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--entries", type=int, default=ENTRIES * 11 // 10)
    options.add_argument("--directory", type=Path, help="default: a temporary one")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        asyncio.run(measure_all(Path(directory), chosen.entries))


if __name__ == "__main__":
    main()
