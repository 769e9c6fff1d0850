"""A month of requests, and every book of it beside the witnesses: to the nano-credit.

The gateway is the real one from ``Generate`` inwards, over the real SQL stores (an
SQLite file). Clients add up what their answers say, upstreams keep a log of what was
bought, and each charge is worked out again by fractions. Statement, usage, margin book,
balances and audit must say the same. Time is simulated.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random

from bench.simulation.world import CAPABILITIES, Dice, NoBlobs, NoPicture, NoStudio
from gateway.adapters.hot_memory import MemoryBoard
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import Operation, StoreFailedError, T
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.reports import SqlReports
from gateway.adapters.sql.sqlite import (
    SQLITE,
    _connect,
    _drive,
    _SqliteTransaction,
)
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.catalogue import (
    Catalogue,
    CostCard,
    Offer,
    PerImage,
    PerToken,
    TokenPrice,
    Variant,
)
from gateway.core.errors import GatewayError
from gateway.core.events import Event
from gateway.core.requests import ImageRequest
from gateway.core.sizes import Size
from gateway.core.statements import ALWAYS, DAY_MS, NEWEST, USAGE_BY
from gateway.core.terms import TOKEN_CLASSES, USUAL, Terms, priced
from gateway.flows.dispatch import Dispatcher
from gateway.flows.generate import Accepted, Generate
from gateway.flows.results import Results
from gateway.flows.statements import ReadCredits
from gateway.ports import Key, Mark, NewGrant, NewRefund, Tenant
from providers.kit.contract import (
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    Pending,
    ProviderError,
    Usage,
)
from tests.virtual_time import LoopClock, VirtualTimeLoop

REQUESTS = 100_000
DAYS = 30
TENANTS = 20
KEYS = 3
CREDITS = 10**18
CARD = TokenPrice(306_000, 76_500, 489_600, 122_400, 1_836_000)
COST = TokenPrice(5_000, 1_250, 8_000, 2_000, 30_000)
BASES = {"low": 16, "medium": 48, "high": 96}
VARIANTS = (
    Variant("gpt-image-2", CARD, BASES),
    Variant("gpt-image-2.5-flare", CARD, BASES),
)
OWN = Terms(1_250_001, {"gpt-image-2": TokenPrice(1, 2, 3, 4, 1_000_003)})
TERMS = (USUAL, USUAL, Terms(333_333), OWN)
FLAT_NANOUSD = 40_000_000
UNBILLED = (FailureKind.OVERLOADED, FailureKind.BAD_GATEWAY, FailureKind.NETWORK)
SIZES = (Size(1024, 1024), Size(1536, 1024), Size(2048, 2048))


class InlineSqlite:
    """A ``Database`` whose transactions run where they are asked for.

    On a loop whose time is simulated, a thread would let time run ahead of it.
    """

    dialect = SQLITE
    single_process = True

    def __init__(self, path: Path) -> None:
        self._connection = _connect(path)
        self._connection.execute("PRAGMA synchronous = OFF")

    async def write(self, op: Operation[T], lane: str | None = None) -> T:
        del lane
        return self._run("BEGIN IMMEDIATE", op)

    async def read(self, op: Operation[T]) -> T:
        return self._run("BEGIN", op)

    async def close(self) -> None:
        self._connection.close()

    def _run(self, begin: str, op: Operation[T]) -> T:
        self._connection.execute(begin)
        try:
            value = _drive(op(_SqliteTransaction(self._connection)))
        except sqlite3.Error as error:
            self._connection.execute("ROLLBACK")
            raise StoreFailedError(str(error)) from error
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return value


@dataclass
class Upstream:
    """A ``Provider`` with a log of what was bought, priced by itself.

    One that charges by token fails only where nothing is charged; one that charges by
    picture also loses pictures that it charges for.
    """

    name: str
    cost: CostCard
    dice: Random
    bought_nanousd: int = 0
    lost_nanousd: int = 0
    usages: dict[str, Usage] = field(default_factory=dict)

    def capabilities(self, model: str) -> Capabilities:
        del model
        return CAPABILITIES

    async def start(self, job: ImageJob) -> Done | Pending:
        await asyncio.sleep(self.dice.uniform(1, 30))
        luck = self.dice.random()
        if luck < 0.05:
            kind = self.dice.choice(UNBILLED)
            raise ProviderError(kind, "simulated", ended=True)
        usage = Usage(*(self.dice.randrange(2_000) for _ in range(5)))
        price = self._price(usage, job.n)
        if isinstance(self.cost, PerImage) and luck < 0.07:
            self.lost_nanousd += price
            raise ProviderError(FailureKind.RESULT_LOST, "simulated", ended=True)
        self.bought_nanousd += price
        self.usages[job.task_id] = usage.plus(self.usages.get(job.task_id, Usage()))
        image = MadeImage(NoPicture(), "image/png", 1024, 1024)
        return Done((image,) * job.n, usage)

    def _price(self, usage: Usage, n: int) -> int:
        if isinstance(self.cost, PerImage):
            return FLAT_NANOUSD * n
        return sum(getattr(usage, c) * getattr(COST, c) for c in TOKEN_CLASSES)

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        raise AssertionError(job, job_id)

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        raise AssertionError(job, job_id)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        raise AssertionError(job)
        yield

    async def probe(self, model: str, deadline_s: float) -> None:
        raise AssertionError(model, deadline_s)

    async def close(self) -> None:
        return


class Nobody:
    """Hears every event, and does nothing."""

    def emit(self, event: Event) -> None:
        del event


@dataclass
class Witnesses:
    """What was seen outside the books, in nano units."""

    told: Counter[str] = field(default_factory=Counter)
    """By tenant: what the answers said was charged."""
    by_key: Counter[tuple[str, str]] = field(default_factory=Counter)
    worked_out: int = 0
    refunded: Counter[str] = field(default_factory=Counter)
    served: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Month:
    """What came of a month: each line is (what, one book, another)."""

    served: int
    failed: int
    charged_nanocredits: int
    bought_nanousd: dict[str, int]
    lost_nanousd: int
    agreements: tuple[tuple[str, object, object], ...]

    @property
    def disagreements(self) -> list[str]:
        """Name the books that say something else."""
        return [name for name, one, other in self.agreements if one != other]


def play(requests: int, path: Path, seed: int = 1) -> Month:
    """Play a month of so many requests over a new SQLite file."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_Play(requests, path, seed).run())


class _Play:
    def __init__(self, requests: int, path: Path, seed: int) -> None:
        self.requests = requests
        self.dice = Random(f"{seed} month")
        self.clock = LoopClock()
        self.database = InlineSqlite(path)
        self.tasks = SqlTaskStore(self.database)
        self.ledger = SqlLedger(self.database)
        self.seen = Witnesses()
        self.tenants: dict[str, Terms] = {}
        self.upstreams = {
            name: Upstream(name, cost, Random(f"{seed} {name}"))
            for name, cost in (
                ("by-token", PerToken(COST)),
                ("by-picture", PerImage(flat=FLAT_NANOUSD)),
            )
        }
        board = MemoryBoard(
            self.clock,
            Dice(Random(f"{seed} jitter")),
            Nobody(),
            slots=dict.fromkeys(self.upstreams, 2_000),
        )
        offers = {
            variant.name: tuple(
                Offer(upstream.name, variant.name, "model", upstream.cost, CAPABILITIES)
                for upstream in self.upstreams.values()
            )
            for variant in VARIANTS
        }
        self.generate = Generate(
            catalogue=Catalogue({v.name: v for v in VARIANTS}, offers),
            store=self.tasks,
            dispatcher=Dispatcher(
                self.upstreams, board, self.tasks, self.clock, Nobody(), _broke
            ),
            results=Results(NoBlobs(), self.clock),
            ledger=self.ledger,
            studio=NoStudio(),
            clock=self.clock,
            chance=Dice(Random(f"{seed} chance")),
            events=Nobody(),
            today=lambda: "2026-11-25",
        )

    async def run(self) -> Month:
        await migrate(self.database, now_ms=self.clock.now_ms())
        await self._open_tenants()
        clients: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        rate_per_s = self.requests / (DAYS * DAY_MS / 1000)
        for number in range(self.requests):
            await asyncio.sleep(self.dice.expovariate(rate_per_s))
            client = loop.create_task(self._client(number))
            clients.add(client)
            client.add_done_callback(clients.discard)
            if number % 1_000 == 999:
                await self.ledger.expire(self.clock.now_ms(), 100)
        while clients:
            await asyncio.wait(clients)
        month = await self._compared()
        await self.database.close()
        return month

    async def _open_tenants(self) -> None:
        accounts, now_ms = SqlAccounts(self.database), self.clock.now_ms()
        for number in range(TENANTS):
            name = f"ten_{number:02}"
            await accounts.add_tenant(Tenant(name, name), now_ms=now_ms)
            await self.ledger.grant(name, CREDITS, reference="start", now_ms=now_ms)
            self.tenants[name] = TERMS[number % len(TERMS)]
            # Some have a promotion that ends within the month.
            if number % 3 == 0:
                end_ms = now_ms + (number + 1) * DAY_MS
                promotion = NewGrant(name, 10**15, "promotion", end_ms)
                await self.ledger.give(promotion, Mark(f"chg_{name}", "bench", now_ms))

    async def _client(self, number: int) -> None:
        dice, task_id = self.dice, f"task-unified-1-{number:08}"
        tenant_id = f"ten_{dice.randrange(TENANTS):02}"
        terms = self.tenants[tenant_id]
        key_id = f"key_{dice.randrange(KEYS)}"
        key = Key(key_id, tenant_id, b"", "iwk", "auto", 0, terms=terms)
        variant = dice.choice(VARIANTS)
        request = ImageRequest(
            priced(variant, terms),
            "a sunset",
            dice.choice(SIZES),
            dice.choice(tuple(BASES)),
            n=dice.choice((1, 1, 1, 2, 3)),
        )
        try:
            accepted = await self.generate.accept(task_id, request, key)
            assert isinstance(accepted, Accepted)
            view = await self.generate.carry_out(accepted, links=False)
        except GatewayError:
            self.seen.failed += 1
            return
        charged = view.charged_nanocredits or 0
        self.seen.served += 1
        self.seen.told[tenant_id] += charged
        self.seen.by_key[tenant_id, key_id] += charged
        self.seen.worked_out += self._worked_out(task_id, variant, terms)
        if dice.random() < 0.01:
            await self._refund(tenant_id, task_id, charged)

    def _worked_out(self, task_id: str, variant: Variant, terms: Terms) -> int:
        # From what the upstreams logged, by fractions, apart from the gateway's rule.
        card = terms.cards.get(variant.name, CARD)
        exact = Fraction(0)
        for upstream in self.upstreams.values():
            usage = upstream.usages.pop(task_id, Usage())
            for name in TOKEN_CLASSES:
                exact += Fraction(getattr(usage, name)) * getattr(card, name)
        exact *= Fraction(terms.multiplier_millionths, 10**6)
        return int(exact + Fraction(1, 2))

    async def _refund(self, tenant_id: str, task_id: str, charged: int) -> None:
        part = self.dice.randint(1, charged)
        mark = Mark(f"chg_{task_id}", "bench", self.clock.now_ms())
        asked = NewRefund(tenant_id, task_id, f"refund of {task_id}", part)
        await self.ledger.refund(asked, mark)
        self.seen.refunded[tenant_id] += part

    async def _compared(self) -> Month:
        reports, seen = SqlReports(self.database), self.seen
        read = ReadCredits(reports, self.clock)
        stated, used = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        spent, left, posted = Counter[str](), Counter[str](), Counter[str]()
        for tenant_id in self.tenants:
            async for entry in read.all_entries(tenant_id, ALWAYS, NEWEST):
                left[tenant_id] += entry.nanocredits
                if entry.kind == "charge":
                    stated[tenant_id, entry.key_id or ""] -= entry.nanocredits
            for row in await reports.usage(tenant_id, ALWAYS, USAGE_BY, limit=10**6):
                used[tenant_id, row.key_id or ""] += row.charged_nanocredits
            balance = await self.ledger.balance(tenant_id)
            assert balance is not None
            spent[tenant_id], posted[tenant_id] = balance.spent, balance.posted
        margin = await reports.margin(ALWAYS)
        audit = await self.ledger.audit()
        bought = {u.name: u.bought_nanousd for u in self.upstreams.values()}
        lost = {u.name: u.lost_nanousd for u in self.upstreams.values()}
        costs, waste = Counter[str](), Counter[str]()
        for each in margin:
            costs[each.upstream or ""] += each.cost_nanousd
            waste[each.upstream or ""] += each.waste_nanousd
        charged = sum(seen.told.values())
        return Month(
            served=seen.served,
            failed=seen.failed,
            charged_nanocredits=charged,
            bought_nanousd=bought,
            lost_nanousd=sum(lost.values()),
            agreements=(
                ("statements and answers", dict(stated), dict(seen.by_key)),
                ("usage and answers", dict(used), dict(seen.by_key)),
                ("answers and fractions", charged, seen.worked_out),
                ("balances and statements", dict(posted), dict(left)),
                ("spent and answers less refunds", spent, seen.told - seen.refunded),
                ("charged", sum(m.charged_nanocredits for m in margin), charged),
                (
                    "refunded",
                    sum(m.refunded_nanocredits for m in margin),
                    sum(seen.refunded.values()),
                ),
                ("cost and purchase logs", dict(costs), bought),
                ("waste and purchase logs", dict(waste), lost),
                ("audit", audit.drifts, ()),
                ("open holds", audit.holds_open, 0),
            ),
        )


def _broke(error: BaseException, where: str) -> None:
    raise AssertionError(where) from error


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--requests", type=int, default=REQUESTS)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        month = play(chosen.requests, Path(directory) / "month.db", chosen.seed)
    took_s = time.perf_counter() - begun_s
    print(
        f"{chosen.requests:,} requests in {DAYS} days: {month.served:,} served, "
        f"{month.failed:,} failed, {month.charged_nanocredits:,} nano-credits charged; "
        f"took {took_s:,.0f} s"
    )
    for name, one, other in month.agreements:
        print(f"  {name:<34} {'agree' if one == other else 'DISAGREE'}")


if __name__ == "__main__":
    main()
