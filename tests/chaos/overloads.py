"""The stage of overload: an upstream with a few slots, and tenants who ask for more.

Each call takes a fixed time, so that it is known how much can be made.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.processes import Process
from gateway.books import open_books, read_settings
from gateway.core.money import NANO
from tests.chaos.crowds import Asker, ask
from tests.e2e.gateways import LiveGateway
from tests.e2e.openai_upstreams import running_server
from tests.simulators.openai_server import KEY

CREDITS = 1_000_000 * NANO
TIMES_TOO_MUCH = 10
TIMES_AS_MUCH = 100
GREEDY, QUIET = 5, 4
READS_PER_S = 5
REFUSED = (429, 503)
CONFIG = """
[[upstream]]
name = "slow"
kind = "openai"
base_url = "{base_url}"
credential = "env:SIMULATED_KEY"
failure_domain = "slow"
max_concurrent = {slots}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = 0.01 }}
"""


@dataclass(frozen=True)
class Size:
    """How large an experiment is. The ``room`` is small where the time is short.

    ``quiet_per_s`` is what each tenant asks for that another asks 100 times as much as.
    """

    slots: int
    latency_s: float
    for_s: float
    room: int
    quiet_per_s: float

    @property
    def capacity_per_s(self) -> float:
        return self.slots / self.latency_s


SMALL = Size(slots=4, latency_s=0.4, for_s=3, room=16, quiet_per_s=0.75)
WHOLE = Size(slots=20, latency_s=2.0, for_s=180, room=500, quiet_per_s=1.0)


@dataclass(frozen=True)
class Overload:
    """What came of asking for ten times as much as can be made."""

    askers: list[Asker]
    reader: Asker
    goodput: float
    shed: dict[str, float]
    resident_bytes: list[int]
    """Before, every tenth of the time, and at the end."""

    def refused_ms(self, share: float) -> float:
        took_s = sorted(s for asker in self.askers for s in asker.took_s(*REFUSED))
        return quantile(took_s, share) * 1000

    @property
    def grown_bytes(self) -> int:
        """From a fifth of the time on, when the room is full, to the end."""
        return self.resident_bytes[-1] - self.resident_bytes[2]


@contextmanager
def overloaded(folder: Path, size: Size, *switches: str) -> Iterator[LiveGateway]:
    """Run a gateway before a slow upstream; ``switches`` are those of the door."""
    folder.mkdir(exist_ok=True)
    config = folder / "gateway.toml"
    latency = ("--latency-s", str(size.latency_s))
    with running_server("tests.simulators.openai_server", *latency) as base_url:
        config.write_text(CONFIG.format(base_url=base_url, slots=size.slots))
        gateway = LiveGateway(
            folder / "data",
            config=config,
            env={
                "SIMULATED_KEY": KEY,
                "DOOR": ",".join([f"room={size.room}", *switches]),
            },
            log_file=folder / "gateway.log",
            module="tests.chaos.door",
        )
        with gateway:
            yield gateway
            gateway.kill()  # what still waits would be waited for


def keys_of(gateway: LiveGateway, *names: str) -> list[str]:
    """Make tenants; returns a key of each."""

    async def made() -> list[str]:
        settings = read_settings(None, {"storage.data_dir": str(gateway.data_dir)})
        async with open_books(settings) as books:
            tenants = [
                await books.tenants.create(name, nanocredits=CREDITS) for name in names
            ]
            return [(await books.keys.create(tenant)).secret for tenant in tenants]

    return asyncio.run(made())


def ten_times_too_much(folder: Path, size: Size, *switches: str) -> Overload:
    """Let greedy tenants ask, while one of them reads its balance."""
    with overloaded(folder, size, *switches) as gateway:
        keys = keys_of(gateway, *(f"greedy-{n}" for n in range(GREEDY)))
        each_per_s = TIMES_TOO_MUCH * size.capacity_per_s / GREEDY
        askers = [Asker(key, each_per_s) for key in keys]
        reader = Asker(keys[0], READS_PER_S, "/v1/credits")
        first = Asker(keys[0], size.capacity_per_s)
        asyncio.run(ask(gateway.url, [first], size.latency_s))  # imports, first calls
        resident = [Process(gateway.pid).resident_bytes()]

        async def both() -> float:
            # The slots are taken one after another, and so come free one after
            # another: calls to a model do not all end at the same moment.
            taking = asyncio.create_task(ask(gateway.url, [first], size.latency_s))
            await asyncio.sleep(size.latency_s)
            looking = asyncio.create_task(looked())
            stopped_s = await ask(gateway.url, [*askers, reader], size.for_s)
            await asyncio.gather(looking, taking)
            return stopped_s

        async def looked() -> None:
            for _ in range(10):
                await asyncio.sleep(size.for_s / 10)
                resident.append(Process(gateway.pid).resident_bytes())

        stopped_s = asyncio.run(both())
        shed = gateway.metric("imageway_shed_total")
    made = sum(
        each.status == 200 and each.ended_s <= stopped_s
        for asker in askers
        for each in asker.seen
    )
    goodput = made / (size.capacity_per_s * size.for_s)
    return Overload(askers, reader, goodput, shed, resident)


def a_hundred_times_as_much(
    folder: Path, size: Size, *switches: str
) -> tuple[Asker, list[Asker]]:
    """Let one tenant ask for a hundred times as much as each of some others."""
    with overloaded(folder, size, *switches) as gateway:
        first, *others = keys_of(gateway, "loud", *(f"quiet-{n}" for n in range(QUIET)))
        loud = Asker(first, TIMES_AS_MUCH * size.quiet_per_s)
        quiet = [Asker(key, size.quiet_per_s) for key in others]

        async def both() -> None:
            asking = asyncio.create_task(ask(gateway.url, [loud], size.for_s + 1))
            await asyncio.sleep(1)  # by then the room has filled
            await ask(gateway.url, quiet, size.for_s)
            await asking

        asyncio.run(both())
    return loud, quiet


def success(askers: Sequence[Asker]) -> float:
    """The share of these tenants' requests that got their picture."""
    seen = [each for asker in askers for each in asker.seen]
    return sum(each.status == 200 for each in seen) / len(seen)


def waited_s(askers: Sequence[Asker], share: float) -> float:
    """How long those who got their picture were on the way to it."""
    return quantile(sorted(s for a in askers for s in a.took_s(200)), share)


def quantile(values: Sequence[float], share: float) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    cut: float = statistics.quantiles(values, n=1000)[round(share * 1000) - 1]
    return cut
