"""How fast credits are held and settled: open and finish of a task, on each engine.

One run prints the pairs per second of many workers at once, over many tenants and over
a single hot one, and the time that one pair takes alone. SQLite is a file on the disk
under test, see --directory; PostgreSQL is started for the run, and calls fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import uvloop

from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import Database
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.postgres import PostgresDatabase
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.tasks import DeliveryMode, TaskState
from gateway.ports import NewTask, TaskEnd, Tenant
from providers.kit.contract import Usage
from tests.servers import PostgresServer, installed

TENANTS = 64
HOLD_NANOCREDITS = 1_000
USAGE = Usage(text_input=5, image_output=196)


async def pair(tasks: SqlTaskStore, task_id: str, tenant: str) -> None:
    await tasks.open(
        NewTask(
            id=task_id,
            tenant_id=tenant,
            key_id="key",
            variant="gpt-image-2",
            operation="generate",
            mode=DeliveryMode.SYNC,
            request_json='{"n":1}',
            hold_nanocredits=HOLD_NANOCREDITS,
            created_ms=0,
            deadline_ms=300_000,
        )
    )
    await tasks.finish(
        TaskEnd(
            task_id=task_id,
            tenant_id=tenant,
            state=TaskState.COMPLETED,
            finished_ms=1,
            due_nanocredits=HOLD_NANOCREDITS - 1,
            usage=USAGE,
            usage_source="reported",
        )
    )


async def crowd(
    tasks: SqlTaskStore, name: str, workers: int, pairs: int, tenants: int
) -> list[float]:
    """Return the seconds of each pair, of so many workers at once."""
    numbers = iter(range(pairs))
    took_s: list[float] = []

    async def work() -> None:
        for number in numbers:
            begun_s = time.perf_counter()
            await pair(tasks, f"{name}-{number}", tenant_name(number % tenants))
            took_s.append(time.perf_counter() - begun_s)

    await asyncio.gather(*(work() for _ in range(workers)))
    return took_s


async def report_crowd(
    tasks: SqlTaskStore, name: str, workers: int, pairs: int, tenants: int
) -> None:
    cpu_s, begun_s = time.process_time(), time.perf_counter()
    took_s = await crowd(tasks, name, workers, pairs, tenants)
    spent_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    p99_s = sorted(took_s)[len(took_s) * 99 // 100]
    print(
        f"  {name:<4} {pairs / spent_s:>7,.0f} pairs/s, {workers} at once over "
        f"{tenants} tenant(s), p99 {p99_s * 1e3:,.0f} ms, "
        f"{cpu_s / pairs * 1e6:,.0f} us of our CPU per pair"
    )


def tenant_name(number: int) -> str:
    return f"bench-{number}"


async def measure(engine: str, database: Database, workers: int, pairs: int) -> None:
    await migrate(database, now_ms=0)
    ledger, tasks = SqlLedger(database), SqlTaskStore(database)
    for number in range(TENANTS):
        name = tenant_name(number)
        await SqlAccounts(database).add_tenant(Tenant(name, name), now_ms=0)
        await ledger.grant(name, 10**15, reference="bench", now_ms=0)

    print(engine)
    took_s = await crowd(tasks, "one", 1, max(1, pairs // 20), TENANTS)
    print(f"  alone p50 {statistics.median(took_s) * 1e6:,.0f} us per pair")
    await report_crowd(tasks, "many", workers, pairs, TENANTS)
    await report_crowd(tasks, "hot", workers, pairs, 1)
    begun_s = time.perf_counter()
    report = await ledger.audit()
    audit_s = time.perf_counter() - begun_s
    print(
        f"  audit {len(report.drifts)} drifts in {report.settlements:,} settlements, "
        f"{audit_s:.2f} s"
    )
    await database.close()


async def measure_all(directory: Path, workers: int, pairs: int) -> None:
    sqlite = await SqliteDatabase.open(directory / "bench.db")
    await measure("SQLite", sqlite, workers, pairs)
    if installed("postgres") is None:
        print("PostgreSQL is not installed (Debian: apt-get install postgresql)")
        return
    server = PostgresServer.make(durable=True)
    postgres = await PostgresDatabase.open(server.database())
    await measure("PostgreSQL", postgres, workers, pairs // 4)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=20_000)
    options.add_argument("--workers", type=int, default=64)
    options.add_argument("--directory", type=Path, help="default: a temporary one")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        uvloop.run(measure_all(Path(directory), chosen.workers, chosen.pairs))


if __name__ == "__main__":
    main()
