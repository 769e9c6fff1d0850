"""Two gateways over one Redis under a steady stream of requests, while it is lost.

Each has a database of its own, unless ``databases`` names one that they may share.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.e2e.gateways import LiveGateway
from tests.servers import RedisServer

RATE_PER_S = 20
BODY = {"prompt": "a fox", "size": "1:1", "quality": "low"}
SANDBOXES = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")


@dataclass
class Phase:
    """A time of the stream, and what came of its requests."""

    name: str
    for_s: float
    begins: Callable[[], None] = lambda: None
    statuses: list[int] = field(default_factory=list)
    took_ms: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(status != 200 for status in self.statuses)

    def within_ms(self, share: float) -> float:
        ordered = sorted(self.took_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def outages(server: RedisServer, each_s: float, calm_s: float) -> list[Phase]:
    """Every way to lose Redis, and the times between; ``calm_s`` if it answers."""
    return [
        Phase("all is well", calm_s),
        Phase("killed", each_s, server.kill),
        Phase("back", each_s, server.start),
        Phase("frozen", each_s, server.freeze),
        Phase("thawed", each_s, server.thaw),
        Phase("emptied", calm_s, server.empty),
    ]


def stream(
    folder: Path,
    server: RedisServer,
    phases: Sequence[Phase],
    databases: Sequence[str] = ("sqlite", "sqlite"),
    *,
    shared: bool = True,
) -> list[LiveGateway]:
    """Ask the gateways in turn, 20 times a second, through all phases.

    One upstream is dead all the while, so that breakers open and are probed. Returns
    the gateways, stopped, with their logs.
    """
    redis = {"IMAGEWAY__STORAGE__REDIS": server.url} if shared else {}
    gateways = [
        LiveGateway(
            folder / f"gateway-{n}", env=redis | {"IMAGEWAY__STORAGE__DATABASE": name}
        )
        for n, name in enumerate(databases)
    ]
    with ExitStack() as stack:
        for gateway in gateways:
            stack.enter_context(gateway)
            for name in SANDBOXES:
                gateway.sandbox(name, latency_ms=5)
            dead = {"failure_rate": 1, "failure_kind": "overloaded"}
            gateway.sandbox("sandbox-thrifty", **dead)
        asyncio.run(_ask(gateways, phases))
    return gateways


async def _ask(gateways: Sequence[LiveGateway], phases: Sequence[Phase]) -> None:
    number = 0
    async with httpx.AsyncClient(timeout=30) as client, asyncio.TaskGroup() as group:
        for phase in phases:
            await asyncio.to_thread(phase.begins)
            due = time.monotonic()  # what took time to begin is not made up for
            for _ in range(round(phase.for_s * RATE_PER_S)):
                gateway = gateways[number % len(gateways)]
                group.create_task(_once(client, gateway, phase))
                number, due = number + 1, due + 1 / RATE_PER_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _once(client: httpx.AsyncClient, gateway: LiveGateway, phase: Phase) -> None:
    started = time.monotonic()
    headers = {"authorization": f"Bearer {gateway.first_key}"}
    url = f"{gateway.url}/v1/images/generations"
    try:
        answer = await client.post(url, json=BODY, headers=headers)
        status = answer.status_code
    except httpx.HTTPError:
        status = 0
    phase.statuses.append(status)
    phase.took_ms.append((time.monotonic() - started) * 1000)
