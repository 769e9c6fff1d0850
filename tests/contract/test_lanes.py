"""What one tenant waits for is committed together; what goes wrong stays its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.adapters.sql.database import Operation, StoreUnknownError, Transaction
from gateway.adapters.sql.postgres import PostgresDatabase
from tests.servers import postgres_database

LANE = "tenant"
MAX_S = 10


@pytest.fixture
async def database() -> AsyncIterator[PostgresDatabase]:
    database = await PostgresDatabase.open(postgres_database())
    await database.write(lambda tx: tx.run("CREATE TABLE kept (n BIGINT)"))
    yield database
    await database.close()


def keep(number: int) -> Operation[int]:
    return lambda tx: tx.run("INSERT INTO kept (n) VALUES ($1)", number)


def failing(error: BaseException) -> Operation[int]:
    async def fail(tx: Transaction) -> int:
        await tx.run("INSERT INTO kept (n) VALUES (1000)")
        raise error

    return fail


async def together(
    database: PostgresDatabase, *operations: Operation[int]
) -> list[int | BaseException]:
    """Run operations of a lane in one transaction; returns what came of each."""
    queued = asyncio.Event()

    async def hold(tx: Transaction) -> int:
        await queued.wait()
        return await tx.run("SELECT 1")

    writes = [
        asyncio.ensure_future(database.write(op, LANE)) for op in (hold, *operations)
    ]
    await asyncio.sleep(0)  # each of them is in the lane then
    queued.set()
    async with asyncio.timeout(MAX_S):
        return (await asyncio.gather(*writes, return_exceptions=True))[1:]


async def kept(database: PostgresDatabase) -> list[int]:
    rows = await database.read(lambda tx: tx.all("SELECT n FROM kept ORDER BY n"))
    return [row[0] for row in rows]


async def test_one_that_fails_costs_the_others_nothing(
    database: PostgresDatabase,
) -> None:
    broken = KeyError("a row nobody expected")

    outcomes = await together(database, keep(1), failing(broken), keep(2))

    assert outcomes == [1, broken, 1]
    assert await kept(database) == [1, 2]


async def test_a_lane_that_is_cut_off_tells_all_and_is_there_for_the_next(
    database: PostgresDatabase,
) -> None:
    cut_off = failing(asyncio.CancelledError())

    outcomes = await together(database, keep(1), cut_off, keep(2))
    async with asyncio.timeout(MAX_S):
        await database.write(keep(3), LANE)

    assert {type(outcome) for outcome in outcomes} == {StoreUnknownError}
    assert await kept(database) == [3]
