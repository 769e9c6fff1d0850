"""How fast credits are held and settled: open and finish of a task on SQLite.

One run prints the pairs per second of many workers at once, and the time that one
pair takes alone. The database is a file on the disk under test: see --directory.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.tasks import DeliveryMode, TaskState
from gateway.ports import NewTask, TaskEnd, Tenant
from providers.kit.contract import Usage

TENANT = "bench"
HOLD_NANOCREDITS = 1_000
USAGE = Usage(text_input=5, image_output=196)


async def pair(tasks: SqlTaskStore, task_id: str) -> None:
    await tasks.open(
        NewTask(
            id=task_id,
            tenant_id=TENANT,
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
            state=TaskState.COMPLETED,
            finished_ms=1,
            due_nanocredits=HOLD_NANOCREDITS - 1,
            usage=USAGE,
            usage_source="reported",
        )
    )


async def crowd(tasks: SqlTaskStore, workers: int, pairs: int) -> float:
    """Return the seconds that so many workers need for so many pairs together."""
    numbers = iter(range(pairs))

    async def work() -> None:
        for number in numbers:
            await pair(tasks, f"crowd-{number}")

    begun_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(workers)))
    return time.perf_counter() - begun_s


async def alone(tasks: SqlTaskStore, pairs: int) -> float:
    """Return the median seconds of a pair that has the database to itself."""
    took_s = []
    for number in range(pairs):
        begun_s = time.perf_counter()
        await pair(tasks, f"alone-{number}")
        took_s.append(time.perf_counter() - begun_s)
    return statistics.median(took_s)


async def measure(directory: Path, workers: int, pairs: int) -> None:
    database = await SqliteDatabase.open(directory / "bench.db")
    await migrate(database, now_ms=0)
    await SqlAccounts(database).add_tenant(Tenant(TENANT, TENANT), now_ms=0)
    ledger, tasks = SqlLedger(database), SqlTaskStore(database)
    await ledger.grant(TENANT, 10**15, reference="bench", now_ms=0)

    alone_s = await alone(tasks, max(1, pairs // 20))
    commits, cpu_s = database.commits, time.process_time()
    crowd_s = await crowd(tasks, workers, pairs)
    commits, cpu_s = database.commits - commits, time.process_time() - cpu_s
    begun_s = time.perf_counter()
    report = await ledger.audit()
    audit_s = time.perf_counter() - begun_s
    await database.close()

    print(f"c=1   p50 {alone_s * 1e6:,.0f} us per pair")
    print(
        f"c={workers:<3} {pairs / crowd_s:,.0f} pairs/s, "
        f"{cpu_s / pairs * 1e6:,.0f} us of CPU per pair, "
        f"{2 * pairs / commits:,.1f} writes per commit"
    )
    print(
        f"audit {len(report.drifts)} drifts in {report.settlements:,} settlements, "
        f"{audit_s:.2f} s"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=20_000)
    options.add_argument("--workers", type=int, default=64)
    options.add_argument("--directory", type=Path, help="default: a temporary one")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as directory:
        asyncio.run(measure(Path(directory), chosen.workers, chosen.pairs))


if __name__ == "__main__":
    main()
