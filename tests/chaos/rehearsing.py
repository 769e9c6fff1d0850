"""An outage rehearsal: six providers as processes, clients that ask on, the books.

Providers are steered while the clients ask. What was bought is told by the providers,
what it should have cost is counted here anew, and both are held against the books.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.e2e.gateways import ROOT, LiveGateway
from tests.simulators.cast import CAST, Part, write_gateway
from tests.simulators.pictures import output_tokens, patches, png

TENANT = "acme"
CREDITS = "100000"
CLIENTS = 12
SLOTS = 8
"""Calls at once of each upstream."""
TASK_MAX_S = 600
STOP_MAX_S = 30
LOW = 16
SIZES = ("1024x1024", "1536x1024", "1024x1536")
"""What each of them can make."""
ODD_SIZE = "1600x800"
"""What replicate cannot make."""
REFERENCE, MASK = png(64, 32), png(64, 32, clear=True)
ESTIMATED = {"task_api", "replicate"}
"""They report no tokens: the tenant is charged by the formula."""
CREDITS_PER_1K = {
    "text": Decimal("0.306"),
    "image": Decimal("0.4896"),
    "output": Decimal("1.836"),
}


@dataclass
class Provider:
    """A simulated account, a process; may be ended and started again on its port."""

    part: Part
    folder: Path
    latency_s: float
    base_url: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """What was bought of processes that have ended."""
    _process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Start the process; ``wait`` says when it serves."""
        port = httpx.URL(self.base_url).port if self.base_url else 0
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", self.part.module, "--port", str(port)),
                *("--latency-s", str(self.latency_s), "--log", str(self._log)),
                *("--percent", str(self.part.percent)),
            ],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def wait(self) -> None:
        """Wait until it serves."""
        assert self._process is not None
        assert self._process.stdout is not None
        self.base_url = self._process.stdout.readline().strip()
        assert self.base_url

    def restart(self) -> None:
        """Start it again, where it was."""
        self.launch()
        self.wait()

    def end(self) -> None:
        """End the process; its calls break off, and its port is closed."""
        if self._process is None:
            return
        self._process.terminate()
        self._process.wait(STOP_MAX_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        self.earlier += json.loads(self._log.read_text())
        self._log.unlink()

    def always(self, **fault: Any) -> None:
        """Let all calls of a step go wrong."""
        self._told("_mode", fault)

    def next(self, *faults: dict[str, Any]) -> None:
        """Let the next calls go wrong."""
        self._told("_script", faults)

    def heal(self) -> None:
        """Let all be well."""
        self._told("_mode", None)

    def purchases(self) -> list[dict[str, Any]]:
        """Read what was bought here, oldest first."""
        if self._process is None:
            return self.earlier
        found = httpx.get(f"{self._origin}/_purchases").json()
        return self.earlier + list(found)

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.part.name}.log.json"

    @property
    def _origin(self) -> str:
        return self.base_url.removesuffix(self.part.kind.prefix)

    def _told(self, what: str, body: Any) -> None:
        told = json.dumps(body)  # httpx would send nothing for null
        httpx.post(f"{self._origin}/{what}", content=told).raise_for_status()


@dataclass(frozen=True)
class Asked:
    """A request of a client.

    ``plain`` is what each provider can do; ``now`` is one that is not made a task.
    """

    number: int
    outage: str
    plain: bool
    now: bool = False

    @property
    def edit(self) -> bool:
        return self.number % 2 == 1

    @property
    def later(self) -> bool:
        return not self.now and self.number % 5 == 2

    @property
    def special(self) -> bool:
        return not self.plain and self.number % 4 == 3

    @property
    def n(self) -> int:
        return 1 + self.number // 2 % 3

    @property
    def size(self) -> str:
        odd = self.special and self.number % 8 == 3
        return ODD_SIZE if odd else SIZES[self.number % 3]

    @property
    def prompt(self) -> str:
        return f"rehearsal {self.number} a lighthouse at dusk"

    @property
    def masked(self) -> bool:
        return self.edit and self.special


@dataclass(frozen=True)
class Answered:
    """What a client got: the sizes of its pictures, and what it was charged."""

    asked: Asked
    status: int
    task_id: str
    sizes: tuple[str, ...]
    usage: dict[str, Any]
    took_s: float
    text: str

    @property
    def served(self) -> bool:
        return self.sizes == (self.asked.size,) * self.asked.n


@dataclass
class Rehearsal:
    """A gateway, the providers behind it, and the clients before it."""

    gateway: LiveGateway
    providers: dict[str, Provider]
    key: str
    clients: int = CLIENTS
    answers: list[Answered] = field(default_factory=list)
    metrics: Counter[str] = field(default_factory=Counter)
    broken: list[BaseException] = field(default_factory=list)
    _numbers: int = 0
    _wanted: queue.Queue[Asked | None] = field(
        default_factory=lambda: queue.Queue(maxsize=1)
    )

    def ask(
        self,
        count: int,
        outage: str,
        *,
        plain: bool = False,
        now: bool = False,
        pause_s: float = 0.0,
    ) -> None:
        """Have so many requests made; returns when the last of them is out."""
        for _ in range(count):
            self._wanted.put(Asked(self._numbers, outage, plain, now))
            self._numbers += 1
            time.sleep(pause_s)

    @contextmanager
    def life(self) -> Iterator[None]:
        """One life of the gateway, clients asking all the while; nothing is left."""
        self.gateway.start()
        try:
            threads = [
                threading.Thread(target=self._client) for _ in range(self.clients)
            ]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                for _ in threads:
                    self._wanted.put(None)
                for thread in threads:
                    thread.join()
            self._note_metrics()
        finally:
            self.gateway.stop()

    def breaker(self, upstream: str) -> str:
        """Read the state of a breaker."""
        states = self.gateway.metric("imageway_circuit_state")
        (state,) = [
            labels.partition('state="')[2].partition('"')[0]
            for labels, value in states.items()
            if f'upstream="{upstream}"' in labels
            and 'operation="generate"' in labels
            and value == 1
        ]
        return state

    def openings(self, upstream: str) -> float:
        """Read how often a breaker opened in this life."""
        found = self.gateway.metric("imageway_circuit_transitions_total")
        return sum(
            count
            for labels, count in found.items()
            if f'upstream="{upstream}"' in labels and 'to="open"' in labels
        )

    def heal(self, *, but: str = "") -> None:
        """Let all be well at every provider but one."""
        for name, provider in self.providers.items():
            if name != but:
                provider.heal()

    def _note_metrics(self) -> None:
        for name in (
            "upstream_attempts",
            "requests_saved_by_fallback",
            "circuit_transitions",
        ):
            for labels, value in self.gateway.metric(f"imageway_{name}_total").items():
                self.metrics[f"{name}{labels}"] += int(value)

    def _client(self) -> None:
        with self.gateway.client(self.key) as client:
            client.timeout = httpx.Timeout(TASK_MAX_S)
            while (asked := self._wanted.get()) is not None:
                try:
                    self.answers.append(answered(client, asked))
                except Exception as error:  # noqa: BLE001 - looked at in the end
                    self.broken.append(error)


@contextmanager
def rehearsal(
    folder: Path, *names: str, latency_s: float = 0.05, slots: int = SLOTS
) -> Iterator[Rehearsal]:
    """Set up providers, all of them if none is named, and a gateway that is not run."""
    parts = [part for part in CAST if not names or part.name in names]
    with ExitStack() as stack:
        providers = {part.name: Provider(part, folder, latency_s) for part in parts}
        for provider in providers.values():
            stack.callback(provider.end)
            provider.launch()
        for provider in providers.values():
            provider.wait()
        urls = {name: provider.base_url for name, provider in providers.items()}
        config = write_gateway(folder, urls, slots=slots)
        gateway = LiveGateway(folder / "data", config=config)
        yield Rehearsal(gateway, providers, gateway.tenant(TENANT, CREDITS))


def answered(client: httpx.Client, asked: Asked) -> Answered:
    """Ask, wait for a task if it is one, and look at the pictures."""
    began_s = time.monotonic()
    fields: dict[str, Any] = {
        "model": "gpt-image-2",
        "prompt": asked.prompt,
        "n": asked.n,
        "size": asked.size,
        "quality": "low",
    }
    headers = {"prefer": "respond-async"} if asked.later else {}
    if asked.edit:
        files = [("image", ("a.png", REFERENCE, "image/png"))]
        files += [("mask", ("m.png", MASK, "image/png"))] if asked.masked else []
        texts = {name: str(value) for name, value in fields.items()}
        answer = client.post(
            "/v1/images/edits", data=texts, files=files, headers=headers
        )
    else:
        answer = client.post("/v1/images/generations", json=fields, headers=headers)
    task_id = answer.headers.get("x-task-id", "")
    body: dict[str, Any] = json.loads(answer.text, parse_float=Decimal)
    while asked.later and body.get("status") in {"pending", "processing"}:
        assert time.monotonic() < began_s + TASK_MAX_S, body
        time.sleep(0.1)
        text = client.get(f"/v1/tasks/{task_id}").text
        body = json.loads(text, parse_float=Decimal)
    sizes = tuple(picture_size(client, item) for item in body.get("data", []))
    took_s = time.monotonic() - began_s
    told = "" if sizes else str(body)
    status, usage = answer.status_code, body.get("usage", {})
    return Answered(asked, status, task_id, sizes, usage, took_s, told)


def picture_size(client: httpx.Client, item: dict[str, Any]) -> str:
    """Open a picture of an answer; returns its size."""
    if "b64_json" in item:
        content = base64.b64decode(item["b64_json"])
    else:
        content = client.get(item["url"]).content
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return f"{image.width}x{image.height}"


# --- the books ---


@dataclass(frozen=True)
class Attempt:
    """An attempt, and its row in the operator's cost book, if it has one."""

    task_id: str
    upstream: str
    billed: str
    outcome: str
    booked_as: str | None
    nanousd: int


@dataclass
class Match:
    """The cost book held against the log of one upstream, attempt by attempt.

    ``lost_nanousd`` is what was bought and lost, by the log; ``waste_nanousd`` what the
    book has for that, and for what was not bought though it might have been.
    """

    calls: int = 0
    purchases: int = 0
    won: int = 0
    lost_but_bought: Counter[str] = field(default_factory=Counter)
    lost_not_bought: Counter[str] = field(default_factory=Counter)
    booked_nanousd: int = 0
    lost_nanousd: int = 0
    waste_nanousd: int = 0
    bill_usd: Decimal = Decimal(0)
    wrong: list[str] = field(default_factory=list)


def attempts_in(data_dir: Path) -> list[Attempt]:
    """Read all attempts and what was booked for them."""
    with sqlite3.connect(f"file:{data_dir / 'imageway.db'}?mode=ro", uri=True) as books:
        rows = books.execute(
            """SELECT a.task_id, a.upstream, a.billed, COALESCE(a.kind, 'done'),
                c.kind, COALESCE(c.nanousd, 0)
            FROM attempts a LEFT JOIN cost_book c
            ON c.task_id = a.task_id AND c.seq = a.seq ORDER BY a.task_id, a.seq"""
        ).fetchall()
    books.close()
    return [Attempt(*row) for row in rows]


def settled_in(data_dir: Path) -> dict[str, int]:
    """Read what each task was charged, in nano-credits."""
    with sqlite3.connect(f"file:{data_dir / 'imageway.db'}?mode=ro", uri=True) as books:
        rows = books.execute("SELECT task_id, charged FROM settlements").fetchall()
    books.close()
    return dict(rows)


def matched(played: Rehearsal, attempts: Sequence[Attempt]) -> dict[str, Match]:
    """Hold the books against the logs.

    Of each task and upstream: what was won was bought, at the nano-dollar; what was
    bought besides belongs to an attempt that is booked as maybe or surely billed; and
    nothing was bought by an attempt that the book calls free.
    """
    task_of = {a.asked.prompt: a.task_id for a in played.answers}
    found = {name: Match() for name in played.providers}
    bought: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, provider in played.providers.items():
        for purchase in provider.purchases():
            found[name].bill_usd += Decimal(purchase["bill_usd"])
            if is_charged(name, purchase):
                found[name].purchases += 1
                key = (name, task_of[purchase["prompt"]])
                bought[key].append(cost_nanousd(purchase))
    rows: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        rows[attempt.upstream, attempt.task_id].append(attempt)
    for key in bought.keys() | rows.keys():
        match_one(found[key[0]], key, bought[key], rows[key])
    return found


def match_one(
    match: Match, key: tuple[str, str], bought: list[int], rows: list[Attempt]
) -> None:
    """Hold the attempts of one task at one upstream against what it bought there."""
    left = list(bought)
    lost = [row for row in rows if row.booked_as != "cost" and row.billed != "no"]
    match.calls += len(rows)
    for row in rows:
        if row.booked_as == "waste":
            match.waste_nanousd += row.nanousd
        if row.booked_as != "cost":
            continue
        match.booked_nanousd += row.nanousd
        if row.nanousd in left:
            left.remove(row.nanousd)
            match.won += 1
        else:
            match.wrong.append(f"{key}: {row} is not among the purchases {left}")
    for index, row in enumerate(lost):
        where = match.lost_but_bought if index < len(left) else match.lost_not_bought
        where[f"{row.outcome}, {row.billed}"] += 1
    match.lost_nanousd += sum(left)
    if len(left) > len(lost):
        match.wrong.append(f"{key}: bought {left}, and the book has only {rows}")


def is_charged(name: str, purchase: dict[str, Any]) -> bool:
    """Tell whether a purchase costs anything: some jobs are released when they fail."""
    if name == "task_api":
        return bool(purchase["charge"] == "charged")
    return bool(purchase.get("billed", True))


def cost_nanousd(purchase: dict[str, Any]) -> int:
    """Say what a purchase costs."""
    nano = Decimal(purchase["bill_usd"]) * 10**9
    return int(nano.to_integral_value(ROUND_CEILING))


def charge_of(answer: Answered, upstreams: set[str]) -> str | None:
    """Say what is wrong with the tokens and the charge of an answer; None: nothing."""
    asked, told = answer.asked, answer.usage
    width, height = map(int, asked.size.split("x"))
    details = told["input_tokens_details"]
    text, image = details["text_tokens"], details["image_tokens"]
    output = told["output_tokens"]
    due = sum(
        tokens * CREDITS_PER_1K[each] / 1000
        for each, tokens in (("text", text), ("image", image), ("output", output))
    )
    reported = not upstreams & ESTIMATED
    expected = {
        "output tokens": (output, output_tokens(LOW, width, height) * asked.n),
        "image tokens": (image, patches(64, 32) * asked.n if asked.edit else 0),
        "credits": (told["credits_used"], due),
        "estimated": (told["estimated"], not reported),
    }
    if reported:
        words = (len(asked.prompt.split()) + 6) * asked.n
        expected["text tokens"] = (text, words)
    wrong = {what: pair for what, pair in expected.items() if pair[0] != pair[1]}
    return f"{asked} by {upstreams}: {wrong}" if wrong else None
