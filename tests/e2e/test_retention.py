"""What is kept of a task, and how long: links, files, facts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx

from gateway.adapters.clock import SystemClock
from gateway.adapters.logs import LogListener
from gateway.app import Gateway, build_gateway, read_settings
from gateway.books import first_run, open_books

HOUR_MS = 3_600_000
MINUTE_MS = 60_000
DAY_MS = 24 * HOUR_MS


@dataclass
class ShiftedClock:
    """The machine's clock, some time later."""

    later_ms: int = 0
    machine: SystemClock = field(default_factory=SystemClock)

    def now_ms(self) -> int:
        return self.machine.now_ms() + self.later_ms

    def monotonic_ms(self) -> int:
        return self.machine.monotonic_ms()

    async def sleep(self, seconds: float) -> None:
        await self.machine.sleep(seconds)


@asynccontextmanager
async def running(
    data_dir: Path, clock: ShiftedClock
) -> AsyncIterator[tuple[Gateway, httpx.AsyncClient]]:
    """Run the whole gateway in this process, by that clock."""
    settings = read_settings(None, {"storage.data_dir": str(data_dir)})
    async with open_books(settings, alone=True) as books:
        gateway = build_gateway(settings, books, LogListener(), clock)
        key = await first_run(books)
        assert key is not None
        worker = asyncio.create_task(gateway.worker.run())
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(cast("Any", gateway.app)),
            base_url="http://gateway.test",
            headers={"authorization": f"Bearer {key.secret}"},
        ) as client:
            yield gateway, client
        worker.cancel()
        await asyncio.wait({worker})
        await gateway.close()


async def a_finished_task(client: httpx.AsyncClient) -> dict[str, Any]:
    body = {"prompt": "a fox", "size": "3:1", "quality": "low"}
    headers = {"prefer": "respond-async"}
    made = await client.post("/v1/images/generations", json=body, headers=headers)
    task_id = made.json()["id"]
    while True:
        task = (await client.get(f"/v1/tasks/{task_id}")).json()
        if task["status"] == "completed":
            assert isinstance(task, dict)
            return task
        await asyncio.sleep(0.02)


async def chore(gateway: Gateway, name: str) -> None:
    _, work = gateway.loops.chores[name]
    await work()


def files(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "results").rglob("*") if path.is_file()]


async def test_a_link_ends_after_24_hours_and_its_file_within_another(
    tmp_path: Path,
) -> None:
    clock = ShiftedClock()
    async with running(tmp_path, clock) as (gateway, client):
        task = await a_finished_task(client)
        link = task["results"][0]

        clock.later_ms = DAY_MS - MINUTE_MS
        await chore(gateway, "expired results")
        before = await client.get(link)
        shown = (await client.get(f"/v1/tasks/{task['id']}")).json()

        clock.later_ms = DAY_MS + MINUTE_MS
        await chore(gateway, "expired results")
        after = await client.get(link)
        late = (await client.get(f"/v1/tasks/{task['id']}")).json()
        kept = len(files(tmp_path))

        clock.later_ms = DAY_MS + HOUR_MS
        await chore(gateway, "expired results")

    assert before.status_code == 200
    assert before.content.startswith(b"\x89PNG")
    assert len(shown["results"]) == 1
    assert after.status_code == 403
    assert after.json()["error"]["code"] == "link_expired"
    assert (late["status"], late["results"]) == ("completed", [])
    assert kept == 1
    assert files(tmp_path) == []


async def test_the_facts_of_a_task_are_kept_for_30_days(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with running(tmp_path, clock) as (gateway, client):
        task = await a_finished_task(client)

        clock.later_ms = 30 * DAY_MS - MINUTE_MS
        await chore(gateway, "tasks over 30 days")
        before = await client.get(f"/v1/tasks/{task['id']}")

        clock.later_ms = 30 * DAY_MS + MINUTE_MS
        await chore(gateway, "tasks over 30 days")
        after = await client.get(f"/v1/tasks/{task['id']}")
        balance = await client.get("/v1/credits")

    assert before.json()["status"] == "completed"
    assert after.status_code == 404
    assert balance.status_code == 200
