"""One simulated stretch of time: clients, upstreams in their weather, and the gateway.

The gateway is the real one from ``Generate`` inwards: hold, routing, breakers, retry
budget, settlement. Only the edges are simulated: time, chance, upstreams and the books.
"""

from __future__ import annotations

import asyncio
import gc
import math
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from bench.simulation.books import Books
from bench.simulation.watch import Call, Change, Log, Watch
from bench.simulation.weather import Fate, Outage, Weather, failure, fate
from gateway.adapters.hot_memory import MemoryBoard
from gateway.core.catalogue import Catalogue, Offer, PerImage, TokenPrice, Variant
from gateway.core.errors import GatewayError
from gateway.core.requests import ImageRequest
from gateway.core.sizes import Size
from gateway.flows.calls import ANSWER_RESERVE_MS
from gateway.flows.dispatch import Dispatcher
from gateway.flows.generate import (
    ASYNC_DEADLINE_MS,
    SYNC_DEADLINE_MS,
    Accepted,
    Generate,
    Later,
)
from gateway.flows.results import Results
from gateway.ports import Drift, Key, OpenBlob
from providers.kit.contract import (
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    Payload,
    Pending,
    ProviderError,
    Usage,
)
from tests.virtual_time import LoopClock, VirtualTimeLoop

VARIANT = Variant(
    "gpt-image-2",
    TokenPrice(306_000, 76_500, 489_600, 122_400, 1_836_000),
    {"low": 16, "medium": 48, "high": 96},
)
REQUEST = ImageRequest(VARIANT, "a sunset", Size(1024, 1024), "low")
USAGE = Usage(text_input=10, image_output=196)
CREDITS = 10**18
GC_THRESHOLD = 100_000
"""Next to nothing here is freed by the collector: it need not look so often."""
KEY = Key("key_1", "ten_1", b"", "igw_live_…", "auto", 0)
WORK_MEDIAN_S = 25.0
WORK_SIGMA = 0.65
WORK_LEAST_S = 2.0
BASE_FAILURES = (
    (FailureKind.BAD_GATEWAY, 0.0012),
    (FailureKind.OVERLOADED, 0.0006),
    (FailureKind.TIMEOUT, 0.0006),
    (FailureKind.NETWORK, 0.0003),
    (FailureKind.NO_OUTPUT, 0.0003),
)
"""Share of calls that fail though the upstream is well."""
CAPABILITIES = Capabilities()


@dataclass(frozen=True, slots=True)
class Place:
    """An upstream: what a picture costs there, and its troubles."""

    name: str
    cost_nanousd: int
    outages: tuple[Outage, ...] = ()
    slots: int = 2_000
    failures: tuple[tuple[FailureKind, float], ...] = BASE_FAILURES


@dataclass(frozen=True, slots=True)
class Scene:
    """What is simulated. Clients come at random, ``rate_per_s`` of them on average.

    ``spent_nanousd`` was spent in the 24 h before. ``traced`` keeps every call.
    """

    seed: int
    length_s: float
    rate_per_s: float
    places: tuple[Place, ...]
    patient: bool = False
    """Whether tasks are async: they have 900 s, and wait while nobody can serve."""
    work_most_s: float = math.inf
    spent_nanousd: int = 0
    traced: bool = False


@dataclass(slots=True)
class Report:
    """What was seen. All sums are over the whole stretch."""

    requests: int = 0
    served: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    saved: int = 0
    """Served, though an attempt failed."""
    rebuys: int = 0
    """Attempts after an unknown outcome of the same task."""
    bought_twice: int = 0
    """Tasks that upstreams charged more than once, by the upstreams' own count."""
    billed_by_upstreams_nanousd: int = 0
    cost_nanousd: int = 0
    cheapest_nanousd: int = 0
    """What the served requests cost at the cheapest, were it always well."""
    oracle_served: int = 0
    oracle_nanousd: int = 0
    answered_nanocredits: int = 0
    """What the answers say that they cost, by the clients' own count."""
    billed_twice: int = 0
    holds_open: int = 0
    detected_s: list[float] = field(default_factory=list)
    returned_s: list[float] = field(default_factory=list)
    share_down: list[float] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    states: list[Change] = field(default_factory=list)
    events: int = 0
    digest: str = ""
    drifts: tuple[Drift, ...] = ()

    @property
    def availability(self) -> float:
        """Share of requests that got a picture."""
        return self.served / self.requests

    @property
    def oracle(self) -> float:
        """Share that whoever knows the outages could have served."""
        return self.oracle_served / self.requests


def simulate(scene: Scene, log: Path | None = None) -> Report:
    """Play a scene from beginning to end; its events go to ``log``, a line each."""
    gc.set_threshold(GC_THRESHOLD, 50, 50)
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner(loop_factory=VirtualTimeLoop))
        world = World(scene)
        if log is not None:
            world.log.write = stack.enter_context(log.open("w")).write
        return runner.run(world.play())


class World:
    """Everything that takes part."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.clock = LoopClock()
        self.report = Report()
        self.watch = Watch(scene.places[0].name, traced=scene.traced)
        self.log = Log(self.clock, self.watch)
        self.books = Books(KEY.tenant_id)
        self.upstreams = {
            place.name: SimulatedUpstream(place, scene, self.log, self.watch)
            for place in scene.places
        }
        self.board = MemoryBoard(
            self.clock,
            Dice(Random(f"{scene.seed} jitter")),
            self.log,
            slots={place.name: place.slots for place in scene.places},
        )
        self.offers = tuple(
            Offer(
                upstream=place.name,
                variant=VARIANT.name,
                model="model",
                cost=PerImage(flat=place.cost_nanousd),
                capabilities=CAPABILITIES,
            )
            for place in scene.places
        )
        self.generate = Generate(
            catalogue=Catalogue({VARIANT.name: VARIANT}, {VARIANT.name: self.offers}),
            store=self.books,
            dispatcher=Dispatcher(
                self.upstreams,
                self.board,
                self.books,
                self.clock,
                self.log,
                _broke,
            ),
            results=Results(NoBlobs(), self.clock),
            ledger=self.books,
            studio=NoStudio(),
            clock=self.clock,
            chance=Dice(Random(f"{scene.seed} chance")),
            events=self.log,
            today=lambda: "2026-11-25",
        )
        self.oracle = Oracle(scene, [up.weather for up in self.upstreams.values()])

    async def play(self) -> Report:
        """Let clients come until the time is over, and wait for the last answer."""
        report, books = self.report, self.books
        await books.grant(KEY.tenant_id, CREDITS, reference="start", now_ms=0)
        books.remember_spend(self.scene.spent_nanousd, self.clock.now_ms())
        loop = asyncio.get_running_loop()
        clients: set[asyncio.Task[None]] = set()
        for number, at_s in enumerate(self._arrivals()):
            await asyncio.sleep(at_s - loop.time())
            client = loop.create_task(self._client(number))
            clients.add(client)
            client.add_done_callback(clients.discard)
        while clients:
            await asyncio.wait(clients)
        await self._close()
        return report

    def _arrivals(self) -> Iterator[float]:
        dice = Random(f"{self.scene.seed} arrivals")
        at_s = dice.expovariate(self.scene.rate_per_s)
        while at_s < self.scene.length_s:
            yield at_s
            at_s += dice.expovariate(self.scene.rate_per_s)

    async def _client(self, number: int) -> None:
        report = self.report
        task_id = f"task-unified-1-{number:08}"
        report.requests += 1
        possible, cost_nanousd = self.oracle.best(asyncio.get_running_loop().time())
        report.oracle_served += possible
        report.oracle_nanousd += cost_nanousd
        later = Later("") if self.scene.patient else None
        try:
            accepted = await self.generate.accept(task_id, REQUEST, KEY, later=later)
            assert isinstance(accepted, Accepted)
            view = await self.generate.carry_out(accepted, links=False)
        except GatewayError as error:
            report.errors[error.code or str(error.status)] += 1
        else:
            report.served += 1
            report.answered_nanocredits += view.charged_nanocredits or 0
            report.cheapest_nanousd += self.scene.places[0].cost_nanousd

    async def _close(self) -> None:
        report, books = self.report, self.books
        audit = await books.audit()
        report.drifts = audit.drifts
        report.holds_open = audit.holds_open
        said, charged = report.answered_nanocredits, books.charged_nanocredits
        if said != charged:
            claim = "clients were told what they were charged"
            report.drifts += (Drift(claim, "", f"{said} {charged}", charged - said),)
        report.billed_twice += books.settled_again
        report.cost_nanousd = books.cost_nanousd
        for upstream in self.upstreams.values():
            report.billed_by_upstreams_nanousd += upstream.billed_nanousd
            report.share_down.append(upstream.weather.share_down(self.scene.length_s))
        report.calls = self.watch.calls
        report.states = self.watch.states
        report.detected_s = self.watch.detected_s
        report.returned_s = self.watch.returned_s
        report.attempts = self.log.attempts
        report.saved = self.log.saved
        report.rebuys = self.log.rebuys
        report.bought_twice = self.log.bought_twice
        report.events = self.log.count
        report.digest = self.log.hash.hexdigest()


class SimulatedUpstream:
    """A ``Provider`` whose answers follow from the weather."""

    def __init__(self, place: Place, scene: Scene, log: Log, watch: Watch) -> None:
        self.place = place
        self.weather = Weather(place.outages)
        self.dice = Random(f"{scene.seed} {place.name} calls")
        self.log = log
        self.billed_nanousd = 0
        self.watch = watch
        self._most_s = scene.work_most_s

    def capabilities(self, model: str) -> Capabilities:
        return CAPABILITIES

    async def start(self, job: ImageJob) -> Done | Pending:
        now_s = asyncio.get_running_loop().time()
        outage = self.weather.at(now_s)
        seen = self.watch.call_begins(self.place.name, job.seq, now_s, outage)
        end = self._drawn(now_s, outage)
        try:
            await asyncio.sleep(end.after_s if end.after_s < math.inf else 10**9)
        except asyncio.CancelledError:
            self._charge(job, bought=end.bought_if_left)
            raise
        finally:
            self.watch.call_ends(seen, asyncio.get_running_loop().time())
        self._charge(job, bought=end.bought)
        if end.kind is not None:
            raise ProviderError(
                end.kind, "simulated", retry_after_s=end.retry_after_s, ended=True
            )
        return DELIVERED

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        raise AssertionError(job_id)

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        raise AssertionError(job_id)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        raise AssertionError(job)
        yield

    async def probe(self, model: str, deadline_s: float) -> None:
        raise AssertionError(model)

    async def close(self) -> None:
        return

    def _drawn(self, now_s: float, outage: Outage | None) -> Fate:
        dice = self.dice
        work_s = min(self._most_s, work(dice))
        chance, luck = dice.random(), dice.random()
        if outage is None:
            for kind, share in self.place.failures:
                if luck < share:
                    return failure(work_s * chance, kind, chance)
                luck -= share
        return fate(self.weather, now_s, work_s, chance)

    def _charge(self, job: ImageJob, *, bought: bool) -> None:
        if bought:
            self.billed_nanousd += self.place.cost_nanousd
            self.log.bought(job.task_id)


def work(dice: Random) -> float:
    """Draw how long a picture takes, in seconds: lognormal."""
    return max(WORK_LEAST_S, dice.lognormvariate(math.log(WORK_MEDIAN_S), WORK_SIGMA))


class Oracle:
    """Serves whatever can be served by one who knows every outage before it comes.

    It meets no failures but outages, and knows how long each call will take. It calls
    the cheapest upstream that will deliver in time. If none will, it waits for the end
    of an outage where tasks are patient; a sync request waits for nobody.
    """

    def __init__(self, scene: Scene, weathers: list[Weather]) -> None:
        self._places = list(zip(scene.places, weathers, strict=True))
        self._dice = Random(f"{scene.seed} oracle")
        self._most_s = scene.work_most_s
        self._waits = scene.patient
        lasts_ms = ASYNC_DEADLINE_MS if scene.patient else SYNC_DEADLINE_MS
        self._time_s = (lasts_ms - ANSWER_RESERVE_MS) / 1000

    def best(self, now_s: float) -> tuple[bool, int]:
        """Tell whether a request can be served, and at what cost in nano-dollars."""
        work_s = min(self._most_s, work(self._dice))
        last_s = now_s + self._time_s
        for place, weather in self._places:
            if _delivers(weather, now_s, work_s, last_s):
                return True, place.cost_nanousd
        for place, weather in self._places if self._waits else ():
            for outage in weather.outages:
                if now_s < outage.end_s < last_s and _delivers(
                    weather, outage.end_s, work_s, last_s
                ):
                    return True, place.cost_nanousd
        return False, 0


def _delivers(weather: Weather, at_s: float, work_s: float, last_s: float) -> bool:
    end = fate(weather, at_s, work_s, 0.5)
    return end.kind is None and at_s + end.after_s <= last_s


@dataclass(frozen=True, slots=True)
class Dice:
    """A ``Chance`` that can be repeated."""

    random: Random

    def token(self, alphabet: str, length: int) -> str:
        return "".join(self.random.choices(alphabet, k=length))

    def fraction(self) -> float:
        return self.random.random()


class NoPicture:
    """The ``Payload`` of every picture: nobody looks at it."""

    encoding: Literal["base64", "raw"] = "raw"
    size_bytes = 0

    def chunks(self) -> Iterator[bytes]:
        return iter(())

    def persist(self, path: str) -> None:
        raise AssertionError(path)

    def close(self) -> None:
        return


DELIVERED = Done((MadeImage(NoPicture(), "image/png", 1024, 1024),), USAGE)


class NoBlobs:
    """A ``BlobStore`` that says it kept everything."""

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        return 0

    async def keep_file(self, blob: str, content: Payload) -> int:
        raise AssertionError(blob)

    async def open(self, blob: str) -> OpenBlob | None:
        raise AssertionError(blob)

    async def delete(self, blob: str) -> None:
        raise AssertionError(blob)

    async def exists(self, blob: str) -> bool:
        raise AssertionError(blob)

    async def expire(self, before_ms: int) -> int:
        raise AssertionError(before_ms)


class NoStudio:
    """A ``Studio`` with nothing to do: pictures come in the format asked for."""

    async def convert(
        self, image: MadeImage, output_format: str, compression: int | None
    ) -> MadeImage | None:
        raise AssertionError(output_format)


def _broke(error: BaseException, where: str) -> None:
    raise AssertionError(where) from error
