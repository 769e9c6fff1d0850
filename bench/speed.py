"""What a gateway adds to a call: time, and its own processor time.

Rounds straight to the upstream and through the gateway take turns, so that both meet
the same machine; of each figure the median is shown. The upstream is a simulator in
Python and shares two cores with gateway and clients: read ratios and CPU, not rates.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.clients import GENERATIONS, Connection, PictureCheck, generation
from bench.figures import MIB, Table
from bench.processes import Process
from bench.upstreams import Upstream, gateway, upstream
from tests.simulators.openai_server import KEY
from tests.simulators.pictures import big_picture

WARM_UP_REQUESTS = 50
CREDITS = "100000000"
CROWD = 16


@dataclass(frozen=True)
class Place:
    """Where requests are sent, and the key for it."""

    origin: str
    key: str


def measure(rounds: int, requests: int, big: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        upstream("steady") as steady,
        gateway(Path(folder), steady) as live,
    ):
        through = Place(live.url, live.tenant("bench", CREDITS))
        straight = Place(steady.origin, KEY)
        process = Process(live.pid)
        table = Table("speed")
        for place in (through, straight):
            asyncio.run(alone(place, WARM_UP_REQUESTS))
        small(table, (straight, through), process, rounds, requests)
        large(table, (straight, through), process, steady, rounds, big)
        table.end()


def small(
    table: Table,
    places: tuple[Place, Place],
    process: Process,
    rounds: int,
    requests: int,
) -> None:
    times_ms: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for place, kept in zip(places, times_ms, strict=True):
            kept.extend(asyncio.run(alone(place, requests // rounds)))
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        straight, through = (quantile(kept, share) for kept in times_ms)
        table.line(
            f"small answer, c=1, {name}: straight / through / added",
            f"{straight:.2f} / {through:.2f} / {through - straight:.2f} ms",
        )

    rates: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        straight = asyncio.run(crowd(places[0], requests))
        cpu_s = process.cpu_s()
        through = asyncio.run(crowd(places[1], requests))
        cpu_us = (process.cpu_s() - cpu_s) / requests * 1e6
        rates.append((straight, through, cpu_us))
    straight, through, cpu_us = (
        statistics.median(kind) for kind in zip(*rates, strict=True)
    )
    table.line(
        f"small answers, c={CROWD}: straight / through",
        f"{straight:,.0f} / {through:,.0f} req/s",
    )
    table.line(f"small answers, c={CROWD}: ratio", f"{through / straight:.2f}")
    table.line(f"small answers, c={CROWD}: CPU of the gateway", f"{cpu_us:,.0f} us/req")


def large(
    table: Table,
    places: tuple[Place, Place],
    process: Process,
    steady: Upstream,
    rounds: int,
    big: int,
) -> None:
    size_mib = len(big_picture()) / MIB
    found: list[tuple[float, float, float]] = []
    same = 0
    for _ in range(rounds):
        steady.script(*[{"answer": "big"}] * (2 * big))
        straight_s, _ = asyncio.run(big_alone(places[0], big))
        cpu_s = process.cpu_s()
        through_s, whole = asyncio.run(big_alone(places[1], big))
        cpu_s = process.cpu_s() - cpu_s
        same += whole
        found.append((straight_s / big, through_s / big, cpu_s * 1000 / big / size_mib))
    straight, through, cpu_ms = (
        statistics.median(kind) for kind in zip(*found, strict=True)
    )
    added_ms = (through - straight) * 1000
    about = f"answer of {size_mib:.0f} MiB, c=1"
    table.line(
        f"{about}: straight / through / added",
        f"{straight * 1000:.0f} / {through * 1000:.0f} / {added_ms:.0f} ms",
    )
    table.line(f"{about}: CPU of the gateway", f"{cpu_ms:.2f} ms/MiB")
    table.all_of(f"{about}: base64 unchanged", same, rounds * big)


async def alone(place: Place, requests: int) -> list[float]:
    """Return what each of some requests takes, one after the other, in ms."""
    connection = await Connection.to(place.origin, place.key)
    took_ms = []
    for _ in range(requests):
        begun_s = time.perf_counter()
        await ask(connection)
        took_ms.append((time.perf_counter() - begun_s) * 1000)
    connection.close()
    return took_ms


async def crowd(place: Place, requests: int) -> float:
    """Return how many requests per second are answered to ``CROWD`` clients."""
    left = iter(range(requests))
    connections = [await Connection.to(place.origin, place.key) for _ in range(CROWD)]

    async def work(connection: Connection) -> None:
        for _ in left:
            await ask(connection)
        connection.close()

    begun_s = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    return requests / (time.perf_counter() - begun_s)


async def ask(connection: Connection) -> None:
    status = await connection.send(GENERATIONS, generation())
    body = await connection.body()
    if status != 200:
        raise RuntimeError(f"{status}: {body[:500]!r}")


async def big_alone(place: Place, requests: int) -> tuple[float, int]:
    """Read some big answers; returns the seconds, and how many came unchanged."""
    text = big_picture().encode()
    digest = hashlib.sha256(text).digest()
    connection = await Connection.to(place.origin, place.key)
    checks = []
    begun_s = time.perf_counter()
    for _ in range(requests):
        check = PictureCheck(digest, len(text))
        assert await connection.send(GENERATIONS, generation()) == 200
        async for piece in connection.pieces():
            check.take(piece)
        checks.append(check)
    took_s = time.perf_counter() - begun_s
    connection.close()
    return took_s, sum(check.is_same for check in checks)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--requests", type=int, default=1000)
    options.add_argument("--big", type=int, default=4)
    chosen = options.parse_args()
    measure(chosen.rounds, chosen.requests, chosen.big)


if __name__ == "__main__":
    main()
