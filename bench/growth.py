"""What a sold picture leaves behind: rows, bytes, transactions, and processor time.

A real gateway sells pictures from a simulated upstream, on SQLite and on PostgreSQL.
Their files and tables are measured before and after. docs/scaling.md rests on it.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import asyncpg

from bench.figures import Table
from bench.processes import Process
from bench.speed import CROWD, Place, crowd
from bench.upstreams import gateway, upstream
from tests.e2e.gateways import LiveGateway
from tests.servers import PostgresServer, installed

CREDITS = "100000000"
SECRET = "a secret that all gateways share"
LARGEST = 6
STORAGE = """
[server]
secret = "env:BENCH_SECRET"

[storage]
database = "env:BENCH_DATABASE"
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Of one table: its rows, and its bytes with all indexes."""

    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a whole database; ``commits`` and ``log_bytes`` are counted since it began."""

    tables: Mapping[str, Size]
    commits: int = 0
    log_bytes: int = 0


class Store(Protocol):
    """A database that can be measured."""

    @property
    def name(self) -> str:
        """What the engine is called."""
        ...

    def sizes(self) -> Sizes:
        """Measure it."""
        ...


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """Measured by its own statistics of pages."""

    path: Path
    name: str = "SQLite"

    def sizes(self) -> Sizes:
        """Measure it."""
        with sqlite3.connect(f"file:{self.path}?mode=ro", uri=True) as database:
            names = database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table'"
            ).fetchall()
            pages = database.execute(
                """SELECT m.tbl_name, SUM(s.pgsize) FROM dbstat s
                JOIN sqlite_master m ON m.name = s.name GROUP BY m.tbl_name"""
            ).fetchall()
            rows = {
                name: database.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0]
                for (name,) in names
            }
        return Sizes({name: Size(rows[name], size) for name, size in pages})


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """Measured by its own functions."""

    url: str
    name: str = "PostgreSQL"

    def sizes(self) -> Sizes:
        """Measure it."""
        return asyncio.run(self._sizes())

    async def _sizes(self) -> Sizes:
        connection = await asyncpg.connect(self.url)
        try:
            found = await connection.fetch(
                """SELECT relname, pg_total_relation_size(oid) FROM pg_class
                WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"""
            )
            tables = {
                name: Size(
                    await connection.fetchval(f'SELECT COUNT(*) FROM "{name}"'), size
                )
                for name, size in found
            }
            await connection.execute("SELECT pg_stat_force_next_flush()")
            commits = await connection.fetchval(
                """SELECT xact_commit FROM pg_stat_database
                WHERE datname = current_database()"""
            )
            log_bytes = await connection.fetchval(
                "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
            )
        finally:
            await connection.close()
        return Sizes(tables, commits, log_bytes)


def sell(live: LiveGateway, store: Store, pictures: int) -> None:
    """Sell so many pictures, and print what is left of each."""
    table = Table(f"growth on {store.name}, {pictures:,} pictures, {CROWD} at once")
    place = Place(live.url, live.tenant("bench", CREDITS))
    process = Process(live.pid)
    asyncio.run(crowd(place, CROWD))  # warms up
    before, cpu_s, begun_s = store.sizes(), process.cpu_s(), time.monotonic()
    asyncio.run(crowd(place, pictures))
    took_s, cpu_s = time.monotonic() - begun_s, process.cpu_s() - cpu_s
    after = store.sizes()

    def grown(which: str) -> int:
        return sum(
            getattr(after.tables[name], which) - getattr(before.tables[name], which)
            for name in after.tables
        )

    table.line("rows per picture", f"{grown('rows') / pictures:.2f}")
    table.line(
        "bytes per picture, with indexes", f"{grown('size_bytes') / pictures:,.0f}"
    )
    for name in largest(before, after):
        old, new = before.tables[name], after.tables[name]
        rows = (new.rows - old.rows) / pictures
        size = (new.size_bytes - old.size_bytes) / pictures
        table.line(f"  {name}", f"{rows:.2f} rows, {size:,.0f} bytes")
    if after.commits:
        table.line(
            "transactions per picture",
            f"{(after.commits - before.commits) / pictures:.2f}",
        )
        table.line(
            "bytes of write-ahead log per picture",
            f"{(after.log_bytes - before.log_bytes) / pictures:,.0f}",
        )
    table.line(
        "gateway's processor time per picture", f"{cpu_s / pictures * 1e3:.2f} ms"
    )
    table.line("pictures per second, all on these cores", f"{pictures / took_s:,.0f}")
    table.end()


def largest(before: Sizes, after: Sizes) -> Sequence[str]:
    """Name the tables that grew most."""
    return sorted(
        after.tables,
        key=lambda name: before.tables[name].size_bytes - after.tables[name].size_bytes,
    )[:LARGEST]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pictures", type=int, default=5_000)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name, upstream("steady") as steady:
        folder = Path(name)
        with gateway(folder / "sqlite", steady) as live:
            sell(live, SqliteFile(live.data_dir / "imageway.db"), chosen.pictures)
        if installed("postgres") is None:
            print("PostgreSQL is not installed (Debian: apt-get install postgresql)")
            return
        url = PostgresServer.make(durable=True).database()
        env = {"BENCH_DATABASE": url, "BENCH_SECRET": SECRET}
        with gateway(folder / "pg", steady, more_config=STORAGE, env=env) as live:
            sell(live, PostgresUrl(url), chosen.pictures)


if __name__ == "__main__":
    main()
