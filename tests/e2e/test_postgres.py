"""Gateways that share a PostgreSQL: one truth, whichever is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.gateways import LiveGateway, command
from tests.e2e.test_tasks import BODY, LATER, PATH, ended, made
from tests.servers import postgres_database

SECRET = "one secret for all the gateways of this test"
CONFIG = """
[server]
secret = "file:secret"
admin_key = "env:IMAGEWAY_ADMIN_KEY"

[storage]
database = "file:database"

[[upstream]]
name = "sandbox"
kind = "sandbox"
options = {{ latency_ms = {latency_ms} }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = 0.01 }}
"""


def config_in(folder: Path, latency_ms: int = 0) -> Path:
    """Write the config of gateways over a new database."""
    (folder / "secret").write_text(SECRET)
    (folder / "database").write_text(postgres_database())
    path = folder / "gateway.toml"
    path.write_text(CONFIG.format(latency_ms=latency_ms))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[LiveGateway, LiveGateway]]:
    config = config_in(tmp_path, latency_ms=300)
    first = LiveGateway(tmp_path / "one", config=config)
    second = LiveGateway(tmp_path / "two", config=config)
    with first, second:
        yield first, second


def test_a_gateway_on_postgresql_does_what_one_on_sqlite_does(tmp_path: Path) -> None:
    with LiveGateway(tmp_path / "data", config=config_in(tmp_path)) as gateway:
        key = gateway.tenant("acme")
        with gateway.client(key) as client:
            answer = client.post(PATH, json=BODY)
            task = ended(client, made(client)["id"])
            picture = httpx.get(task["data"][0]["url"])
        gateway.kill()
        gateway.start()
        with gateway.client(key) as client:
            again = client.get(f"/v1/tasks/{task['id']}").json()
            same = httpx.get(again["results"][0])

        assert answer.status_code == 200
        assert picture.content.startswith(b"\x89PNG")
        assert same.content == picture.content
        assert float(gateway.balance("acme")["spent"]) > 0
        assert gateway.audit()["clean"]


def test_one_key_buys_once_whichever_gateway_it_is_sent_to(
    pair: tuple[LiveGateway, LiveGateway],
) -> None:
    key = pair[0].tenant("once")
    headers = LATER | {"idempotency-key": "the-same-for-all-of-them"}
    with pair[0].client(key) as one, pair[1].client(key) as two:

        def order(number: int) -> str:
            client = (one, two)[number % 2]
            answer = client.post(PATH, json=BODY, headers=headers)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["id"])

        with ThreadPoolExecutor(16) as pool:
            ids = set(pool.map(order, range(60)))
        ended(one, *ids)

    assert len(ids) == 1
    assert sum(gateway.bought("sandbox") for gateway in pair) == 1
    assert pair[0].audit()["clean"]


def test_without_a_secret_of_their_own_they_do_not_start(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    config.write_text(config.read_text().replace('secret = "file:secret"', ""))

    for asked in ("serve", "check"):
        done = command(
            asked, "--config", str(config), "--data-dir", str(tmp_path / "d")
        )

        assert done.code != 0
        assert "server.secret" in done.err
        assert "postgresql://" not in done.err + done.out


@pytest.mark.parametrize("password", ["s3cret/0f#xq", "s3cret:0f/xq", "s3cret?0f@xq"])
def test_a_url_that_cannot_be_read_is_told_and_not_repeated(
    tmp_path: Path, password: str
) -> None:
    config = config_in(tmp_path)
    (tmp_path / "database").write_text(f"postgresql://me:{password}@127.0.0.1:1/x")

    done = command("migrate", "--config", str(config), "--data-dir", str(tmp_path))

    assert done.code != 0
    assert "cannot open the database" in done.err
    assert not re.search("s3cret|0f|xq", done.err.partition("database:")[2])
