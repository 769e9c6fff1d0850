"""The simulated OpenAI with a clock: a process that tells when each call began.

``GET /_times`` lists when the first bytes of each call for pictures came in, in
seconds of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.gateways import LiveGateway
from tests.e2e.openai_upstreams import OFFER, running_server
from tests.simulators.openai_server import KEY, OPERATIONS, OpenAISimulator
from tests.simulators.server import (
    HEAD_MAX_BYTES,
    Reply,
    Seen,
    read_body,
    read_head,
)

KEPT_MAX = 1000


@dataclass
class ClockedSimulator(OpenAISimulator):
    """Notes when calls come in, and forgets old ones: a load is many of them."""

    times_s: list[float] = field(default_factory=list)

    async def read(self, reader: asyncio.StreamReader) -> Seen | None:
        head = await read_head(reader)
        if head is None:
            return None
        if head.path in OPERATIONS:
            self.times_s.append(time.monotonic())
        for kept in (self.times_s, self.purchases, self.requests):
            del kept[:-KEPT_MAX]
        return await read_body(reader, head)

    def steer(self, seen: Seen) -> Reply:
        if seen.path == "/_times":
            return Reply.of_json(200, self.times_s)
        return super().steer(seen)


@dataclass(frozen=True)
class Upstream:
    """A simulator in a process of its own, steered over HTTP."""

    name: str
    base_url: str

    @property
    def origin(self) -> str:
        return self.base_url.removesuffix("/v1")

    def script(self, *faults: dict[str, Any]) -> None:
        httpx.post(self.origin + "/_script", json=faults).raise_for_status()

    def purchases(self) -> list[dict[str, Any]]:
        found = httpx.get(self.origin + "/_purchases", timeout=60).json()
        assert isinstance(found, list)
        return found

    def times_s(self) -> list[float]:
        found = httpx.get(self.origin + "/_times").json()
        assert isinstance(found, list)
        return found


@contextmanager
def upstream(name: str) -> Iterator[Upstream]:
    """Run one on a free port."""
    with running_server("bench.upstreams") as base_url:
        yield Upstream(name, base_url)


@contextmanager
def gateway(
    folder: Path,
    *upstreams: Upstream,
    more_config: str = "",
    env: dict[str, str] | None = None,
) -> Iterator[LiveGateway]:
    """Run a gateway that buys there: the first is the cheapest, and so on."""
    folder.mkdir(exist_ok=True)
    config = folder / "gateway.toml"
    offers = [
        OFFER.format(name=u.name, base_url=u.base_url, options="", dollars=place)
        for place, u in enumerate(upstreams, start=1)
    ]
    config.write_text(more_config + "".join(offers))
    with LiveGateway(
        folder / "data",
        config=config,
        env={"SIMULATED_KEY": KEY} | (env or {}),
        log_file=folder / "gateway.log",
    ) as running:
        yield running


async def run() -> None:
    simulator = ClockedSimulator(KEY)
    server = await asyncio.start_server(
        simulator.serve, "127.0.0.1", 0, limit=HEAD_MAX_BYTES
    )
    simulator.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    print(simulator.base_url, flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(run())
