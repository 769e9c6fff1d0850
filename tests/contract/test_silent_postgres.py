"""A PostgreSQL that stays connected and says nothing: frozen, or behind a dead wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from gateway.adapters.sql.database import (
    Operation,
    StoreFailedError,
    StoreUnknownError,
)
from gateway.adapters.sql.postgres import PostgresDatabase
from tests.servers import postgres_database

PIECE_BYTES = 65_536
STATEMENT_MAX_S = 3.0
"""Longer than a connection is waited for that was given up."""
MAX_S = 30


@dataclass
class Way:
    """A way to the server. What is sent after ``cut_at`` was said is never heard."""

    host: str
    port: int
    cut_at: bytes = b""
    _pumps: set[asyncio.Task[None]] = field(default_factory=set)
    _cut: set[asyncio.Task[None]] = field(default_factory=set)

    def cut(self) -> None:
        """Deliver nothing more of what is connected now; new ones are well."""
        self._cut |= self._pumps

    async def connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        there, back = await asyncio.open_connection(self.host, self.port)
        pumps = [
            asyncio.ensure_future(self._pump(reader, back)),
            asyncio.ensure_future(self._pump(there, writer)),
        ]
        self._pumps |= set(pumps)
        await asyncio.wait(pumps)
        self._pumps -= set(pumps)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while piece := await reader.read(PIECE_BYTES):
                if self.cut_at and self.cut_at in piece:
                    self.cut_at = b""
                    writer.write(piece)  # it is heard, and the answer is not
                    self.cut()
                if asyncio.current_task() not in self._cut:
                    writer.write(piece)
        finally:
            writer.close()


@asynccontextmanager
async def way_to(url: str) -> AsyncIterator[tuple[Way, str]]:
    """Make a way to a database; yields it, and the URL that leads over it."""
    parts = urlsplit(url)
    way = Way(parts.hostname or "", parts.port or 0)
    async with await asyncio.start_server(way.connected, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield way, url.replace(f":{way.port}/", f":{port}/")


def keep(number: int) -> Operation[int]:
    return lambda tx: tx.run("INSERT INTO kept (n) VALUES ($1)", number)


async def kept(database: PostgresDatabase) -> list[int]:
    rows = await database.read(lambda tx: tx.all("SELECT n FROM kept ORDER BY n"))
    return [row[0] for row in rows]


@pytest.fixture
async def at() -> AsyncIterator[tuple[Way, PostgresDatabase]]:
    async with way_to(postgres_database()) as (way, url):
        database = await PostgresDatabase.open(url, statement_max_s=STATEMENT_MAX_S)
        await database.write(lambda tx: tx.run("CREATE TABLE kept (n BIGINT)"))
        yield way, database
        await database.close()


async def test_what_is_not_answered_failed_and_the_next_one_is_well(
    at: tuple[Way, PostgresDatabase],
) -> None:
    way, database = at
    way.cut()

    async with asyncio.timeout(MAX_S):
        with pytest.raises(StoreFailedError):
            await database.write(keep(1))
        await database.write(keep(2))

    assert await kept(database) == [2]


async def test_a_commit_that_is_not_answered_may_have_been_done(
    at: tuple[Way, PostgresDatabase],
) -> None:
    way, database = at
    way.cut_at = b"COMMIT;"

    async with asyncio.timeout(MAX_S):
        with pytest.raises(StoreUnknownError):
            await database.write(keep(1))

    assert await kept(database) == [1]


async def test_closing_waits_for_no_answer_that_does_not_come() -> None:
    async with way_to(postgres_database()) as (way, url):
        database = await PostgresDatabase.open(url)
        await database.write(lambda tx: tx.run("CREATE TABLE kept (n BIGINT)"))
        way.cut()
        write = asyncio.ensure_future(database.write(keep(1), "tenant"))
        await asyncio.sleep(0)

        async with asyncio.timeout(MAX_S):
            await database.close()
            with pytest.raises(StoreFailedError):
                await write
