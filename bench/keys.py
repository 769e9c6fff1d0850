"""What keys cost: authentication when warm, and budgets under a crowd.

Authentication is what the image routes do before they read a body: find the key, check
its limits, count the request. Redis is started for the run, as PostgreSQL is.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.figures import Table
from gateway.adapters.clock import SystemChance, SystemClock
from gateway.adapters.hot_redis.connection import Guard, opener
from gateway.adapters.hot_redis.rates import RedisRates
from gateway.adapters.rates import MemoryRates
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.database import Database
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import migrate
from gateway.adapters.sql.postgres import PostgresDatabase
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.core.errors import InsufficientCreditsError
from gateway.core.key_limits import KeyScope
from gateway.core.tasks import DeliveryMode
from gateway.flows.keys import Authenticate, ManageKeys, NewKey
from gateway.ports import NewTask, Rates, Tenant
from tests.fakes import FakeEvents
from tests.servers import PostgresServer, RedisServer

AUTHENTICATION_MAX_MS = 1.0
LIMITED: dict[str, object] = {
    "scopes": ["images"],
    "models": ["gpt-image-2"],
    "addresses": ["203.0.113.0/24", "2001:db8::/32"],
    "expires_at": "2099-01-01T00:00:00Z",
    "requests_per_minute": 1_000_000,
}
AT_ONCE = 64
RACERS, BUDGET_FOR = 500, 50
HOLD_NANOCREDITS = 1_000


@dataclass(frozen=True, slots=True)
class House:
    """A database with a tenant and its keys."""

    database: Database
    keys: ManageKeys
    tenant: Tenant

    def door(self, rates: Rates) -> Authenticate:
        clock = SystemClock()
        accounts, strangers = SqlAccounts(self.database), MemoryRates(clock)
        return Authenticate(accounts, clock, b"pepper", rates, strangers)


async def a_house(database: Database) -> House:
    await migrate(database, now_ms=0)
    tenant, accounts = Tenant("bench", "bench"), SqlAccounts(database)
    await accounts.add_tenant(tenant, now_ms=0)
    ledger = SqlLedger(database)
    await ledger.grant(tenant.id, 10**15, reference="bench", now_ms=0)
    keys = ManageKeys(accounts, SystemClock(), SystemChance(), b"pepper")
    return House(database, keys, tenant)


async def authentication_ms(
    door: Authenticate, made: NewKey, count: int, at_once: int
) -> list[float]:
    """Return the sorted milliseconds of each authentication."""
    header, took_ms = f"Bearer {made.secret}", list[float]()
    numbers = iter(range(count))

    async def work() -> None:
        for _ in numbers:
            begun_s = time.perf_counter()
            key = await door(header, KeyScope.IMAGES, "203.0.113.7")
            await door.rate_of(key)
            took_ms.append((time.perf_counter() - begun_s) * 1000)
            await asyncio.sleep(0)

    await door(header, KeyScope.IMAGES, "203.0.113.7")
    await asyncio.gather(*(work() for _ in range(at_once)))
    return sorted(took_ms)


async def round_trips_ms(guard: Guard, count: int) -> list[float]:
    """Return the sorted milliseconds of the least that Redis can be asked for."""
    took_ms = []
    for _ in range(count):
        begun_s = time.perf_counter()
        await guard.ask(("GET", "nothing"))
        took_ms.append((time.perf_counter() - begun_s) * 1000)
    return sorted(took_ms)


async def race(house: House, made: NewKey) -> tuple[Counter[str], float]:
    """Ask for ten times as much as the budget has; returns outcomes and seconds."""
    tasks = SqlTaskStore(house.database)

    async def ask(number: int) -> str:
        task = NewTask(
            id=f"race-{number}",
            tenant_id=house.tenant.id,
            key_id=made.key.id,
            variant="gpt-image-2",
            operation="generate",
            mode=DeliveryMode.SYNC,
            request_json='{"n":1}',
            hold_nanocredits=HOLD_NANOCREDITS,
            created_ms=0,
            deadline_ms=300_000,
            fingerprint=str(number),
            idempotency_key=f"once-{number}" if number % 2 else None,
            keys_version=None,
        )
        try:
            await tasks.open(task)
        except InsufficientCreditsError as error:
            return error.code
        return "held"

    begun_s = time.perf_counter()
    outcomes = Counter(await asyncio.gather(*map(ask, range(RACERS))))
    return outcomes, time.perf_counter() - begun_s


async def measure(folder: Path, redis: RedisServer, count: int) -> None:
    table = Table("keys")
    house = await a_house(await SqliteDatabase.open(folder / "bench.db"))
    guard = Guard(opener(redis.url), FakeEvents())
    memory = MemoryRates(SystemClock())
    await guard.try_again(("PING",))
    free, limited = (
        await house.keys.create(house.tenant),
        await house.keys.create(house.tenant, LIMITED),
    )
    for name, made, rates in (
        ("no limits", free, memory),
        ("all limits, memory", limited, memory),
        ("all limits, Redis", limited, RedisRates(guard, memory)),
    ):
        for at_once in (1, AT_ONCE):
            took_ms = await authentication_ms(house.door(rates), made, count, at_once)
            p50_ms, p99_ms = (took_ms[len(took_ms) * p // 100] for p in (50, 99))
            what = f"authentication, {name}, {at_once} at once"
            table.line(f"{what}: p50", f"{p50_ms * 1000:,.0f} us")
            if at_once == 1:
                table.at_most(
                    f"{what}: p99", p99_ms, AUTHENTICATION_MAX_MS, "ms", places=3
                )
            else:
                table.line(f"{what}: p99", f"{p99_ms * 1000:,.0f} us")
    bare_ms = await round_trips_ms(guard, count // 4)
    p50_ms, p99_ms = (bare_ms[len(bare_ms) * p // 100] for p in (50, 99))
    found = f"{p50_ms * 1000:,.0f} / {p99_ms * 1000:,.0f} us"
    table.line("for comparison, one GET from Redis: p50 / p99", found)
    await guard.close()
    await budgets(table, "SQLite", house)
    server = PostgresServer.make(durable=True)
    postgres = await PostgresDatabase.open(server.database())
    await budgets(table, "PostgreSQL", await a_house(postgres))
    table.end()


async def budgets(table: Table, engine: str, house: House) -> None:
    budget: dict[str, object] = {
        "total_credits": f"0.{HOLD_NANOCREDITS * BUDGET_FOR:09}"
    }
    outcomes, took_s = await race(house, await house.keys.create(house.tenant, budget))
    name = f"budget for {BUDGET_FOR}, {RACERS} at once, {engine}"
    table.all_of(f"{name}: held", outcomes["held"], BUDGET_FOR)
    table.line(f"{name}: took", f"{took_s * 1000:,.0f} ms")
    drifts = (await SqlLedger(house.database).audit()).drifts
    table.none_of(f"{name}: drifts", len(drifts))
    await house.database.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=20_000)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name, RedisServer(Path(name) / "r") as redis:
        uvloop.run(measure(Path(name), redis, chosen.count))


if __name__ == "__main__":
    main()
