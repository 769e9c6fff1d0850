"""The schema, brought up to date by whoever comes first, and never backwards."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from gateway.adapters.sql.database import Database, Transaction
from gateway.adapters.sql.migrations import MIGRATIONS
from gateway.adapters.sql.postgres import PostgresDatabase
from gateway.adapters.sql.sqlite import SqliteDatabase
from tests.e2e.gateways import command
from tests.e2e.test_postgres import config_in

ENGINES = ("sqlite", "postgres")
AT_ONCE = 3


def options(engine: str, folder: Path) -> tuple[str, ...]:
    """Name a new database of that engine."""
    data = ("--data-dir", str(folder / "data"))
    if engine == "sqlite":
        return data
    return (*data, "--config", str(config_in(folder)))


@pytest.mark.parametrize("engine", ENGINES)
def test_of_several_that_migrate_at_once_one_does_it(
    engine: str, tmp_path: Path
) -> None:
    where = options(engine, tmp_path)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [
            pool.submit(command, "migrate", "--json", *where) for _ in range(AT_ONCE)
        ]
        answers = [run.result() for run in runs]

    assert [answer.code for answer in answers] == [0] * AT_ONCE, answers
    applied = sorted(answer.json["applied"] for answer in answers)
    assert applied == [0] * (AT_ONCE - 1) + [len(MIGRATIONS)]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_older_imageway_leaves_a_newer_database_alone(
    engine: str, tmp_path: Path
) -> None:
    where = options(engine, tmp_path)
    assert command("migrate", *where).code == 0

    async def made_newer() -> None:
        database: Database
        if engine == "sqlite":
            database = await SqliteDatabase.open(tmp_path / "data" / "imageway.db")
        else:
            url = (tmp_path / "database").read_text()
            database = await PostgresDatabase.open(url)
        newer = len(MIGRATIONS) + 1
        await database.write(
            lambda tx: tx.run("INSERT INTO schema_migrations VALUES ($1, 0)", newer)
        )
        await database.close()

    asyncio.run(made_newer())

    for asked in (("migrate",), ("serve", "--port", "0")):
        answer = command(*asked, *where)
        assert answer.code == 1
        assert "schema_too_new" in answer.err
        assert "upgrade imageway" in answer.err
        assert answer.err.count("\n") == 1


def test_who_may_not_change_the_schema_can_use_it_once_it_is_there(
    tmp_path: Path,
) -> None:
    where = options("postgres", tmp_path)
    url = (tmp_path / "database").read_text()
    name = "clerk_" + url.rpartition("/")[2]

    async def hired() -> None:
        database = await PostgresDatabase.open(url)
        for statement in (
            f"CREATE ROLE {name} LOGIN PASSWORD 'test-only'",
            f"""GRANT SELECT, INSERT, UPDATE, DELETE
            ON ALL TABLES IN SCHEMA public TO {name}""",
        ):
            await database.write(partial(run, statement))
        await database.close()

    async def run(statement: str, tx: Transaction) -> None:
        await tx.run(statement)

    assert command("migrate", *where).code == 0
    asyncio.run(hired())
    (tmp_path / "database").write_text(re.sub("//[^:]+:", f"//{name}:", url))

    answer = command("tenants", "create", "acme", "--credits", "1", *where)

    assert answer.code == 0, answer.err


def test_a_schema_that_cannot_be_changed_is_told_with_the_reason(
    tmp_path: Path,
) -> None:
    where = options("postgres", tmp_path)

    async def taken() -> None:
        database = await PostgresDatabase.open((tmp_path / "database").read_text())
        await database.write(lambda tx: tx.run("CREATE TABLE holds (x BIGINT)"))
        await database.close()

    asyncio.run(taken())

    answer = command("migrate", *where)

    assert answer.code == 1
    assert 'relation "holds" already exists' in answer.err
    assert "Nothing was changed" in answer.err
