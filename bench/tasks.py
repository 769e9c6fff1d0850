"""What it takes to make async tasks, and how the API answers while they run.

Tasks are made one after the other; each is worked on from then on, by the same process.
Beside it, another client reads a task again and again, until the last one has ended.
The upstream takes two seconds for a picture, as a model would, only less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from bench.clients import GENERATIONS, Connection, generation
from bench.figures import Table
from bench.processes import Process
from bench.speed import CREDITS, quantile
from bench.upstreams import gateway, upstream
from tests.e2e.gateways import LiveGateway

BATCH = "/v1/tasks/batch"
UPSTREAM_TAKES_S = 2.0
CREATE_MAX_MS = 5.0
READ_MAX_MS = 50.0
READ_EVERY_S = 0.02
WARM_UP_TASKS = 20
END_MAX_S = 300


def measure(tasks: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        upstream("slow") as slow,
        gateway(Path(folder), slow) as live,
    ):
        slow.script(*[{"delay_s": UPSTREAM_TAKES_S}] * (tasks + WARM_UP_TASKS))
        key = async_key(live)
        table = Table("tasks")
        asyncio.run(made(live.url, key, WARM_UP_TASKS))
        process = Process(live.pid)
        cpu_s = process.cpu_s()
        created_ms, read_ms, took_s = asyncio.run(crowded(live.url, key, tasks))
        cpu_ms = (process.cpu_s() - cpu_s) / tasks * 1000
        median = quantile(created_ms, 0.5)
        table.at_most(f"making {tasks:,} tasks, p50", median, CREATE_MAX_MS, "ms")
        tails = " / ".join(f"{quantile(created_ms, q):.1f}" for q in (0.95, 0.99))
        table.line("making tasks, p95 / p99", f"{tails} ms")
        worst = quantile(read_ms, 0.99)
        table.at_most("reading a task meanwhile, p99", worst, READ_MAX_MS, "ms")
        table.line(
            "reading a task meanwhile, p50 / worst",
            f"{quantile(read_ms, 0.5):.1f} / {max(read_ms):.1f} ms",
        )
        table.line("from the first made to the last ended", f"{took_s:.1f} s")
        table.line("CPU of the gateway, reads included", f"{cpu_ms:.1f} ms/task")
        table.end()


def async_key(live: LiveGateway) -> str:
    """Make a tenant, and a key whose requests are tasks."""
    live.cli("tenants", "create", "bench", "--credits", CREDITS)
    options = ("--tenant", "bench", "--delivery", "async", "--json")
    return str(live.cli("keys", "create", *options).json["key"])


async def made(origin: str, key: str, tasks: int) -> tuple[list[str], list[float]]:
    """Make tasks one after the other; returns their ids, and the ms for each."""
    connection = await Connection.to(origin, key)
    ids, took_ms = [], []
    for _ in range(tasks):
        begun_s = time.perf_counter()
        status = await connection.send(GENERATIONS, generation())
        task = json.loads(await connection.body())
        took_ms.append((time.perf_counter() - begun_s) * 1000)
        assert status == 200, task
        ids.append(task["id"])
    connection.close()
    return ids, took_ms


async def crowded(
    origin: str, key: str, tasks: int
) -> tuple[list[float], list[float], float]:
    """Make tasks while one is read all the time; ends when the last one has ended."""
    begun_s = time.perf_counter()
    (first,), _ = await made(origin, key, 1)
    done = asyncio.Event()
    reader = asyncio.create_task(reading(origin, key, first, done))
    ids, created_ms = await made(origin, key, tasks)
    connection = await Connection.to(origin, key)
    while not await ended(connection, ids[-50:]):
        assert time.perf_counter() < begun_s + END_MAX_S
        await asyncio.sleep(0.1)
    took_s = time.perf_counter() - begun_s
    connection.close()
    done.set()
    return created_ms, await reader, took_s


async def reading(origin: str, key: str, task: str, done: asyncio.Event) -> list[float]:
    """Read a task until told to stop; returns the ms for each time."""
    connection = await Connection.to(origin, key)
    took_ms = []
    while not done.is_set():
        begun_s = time.perf_counter()
        await ended(connection, [task])
        took_ms.append((time.perf_counter() - begun_s) * 1000)
        await asyncio.sleep(READ_EVERY_S)
    connection.close()
    return took_ms


async def ended(connection: Connection, ids: list[str]) -> bool:
    """Read some tasks; tells whether all of them are completed."""
    assert await connection.send(BATCH, json.dumps({"task_ids": ids}).encode()) == 200
    found = json.loads(await connection.body())["data"]
    return all(task["status"] == "completed" for task in found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tasks", type=int, default=1_000)
    measure(options.parse_args().tasks)


if __name__ == "__main__":
    main()
