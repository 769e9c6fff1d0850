"""Several processes of one machine serve one port."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway, command
from tests.e2e.test_postgres import config_in
from tests.e2e.test_tasks import BODY, PATH
from tests.servers import RedisServer

WORKERS = 2
SEEN_MAX_S = 30.0
REQUESTS = "imageway_http_requests_total"
ASKED = 30
PRICE = "flat = 0.01"


def until(seen: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + SEEN_MAX_S
    while not seen():
        assert time.monotonic() < deadline_s, f"never seen: {what}"
        time.sleep(0.1)


def notes(gateway: LiveGateway, what: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in gateway.logs if line.startswith("{")]
    return [line for line in lines if line["event"] == what]


def children(gateway: LiveGateway) -> list[int]:
    """The processes that serve."""
    told = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text()
    return [int(pid) for pid in told.split()]


def answered(gateway: LiveGateway) -> float:
    """How many pictures were answered with 200, by any process."""
    found = gateway.metric(REQUESTS)
    return sum(n for labels, n in found.items() if PATH in labels and "200" in labels)


def living(gateway: LiveGateway) -> float:
    return gateway.metric("imageway_fleet_processes")[""]


def figures(gateway: LiveGateway) -> set[str]:
    """The files in which they keep their metrics."""
    return {path.name for path in (gateway.data_dir / "metrics").iterdir()}


@dataclass
class House:
    """A gateway of several processes, and a key to it."""

    gateway: LiveGateway
    key: str

    def buy(self) -> int:
        # A connection of its own: any process may take it.
        with self.gateway.client(self.key) as client:
            return client.post(PATH, json=BODY).status_code


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("workers")
    with RedisServer(folder / "redis") as redis:
        gateway = LiveGateway(
            folder / "data",
            config=config_in(folder, latency_ms=50),
            env={"IMAGEWAY__STORAGE__REDIS": redis.url},
            workers=WORKERS,
        )
        with gateway:
            assert gateway.first_key is not None
            yield House(gateway, gateway.first_key)


@pytest.mark.parametrize("shared", ["nothing", "the database"])
def test_without_postgresql_and_redis_it_says_what_is_missing(
    tmp_path: Path, shared: str
) -> None:
    config = ["--config", str(config_in(tmp_path))] if shared != "nothing" else []

    refused = command(
        "serve", "--workers", "2", "--port", "0", "--data-dir", str(tmp_path), *config
    )

    assert refused.code == 1
    assert "storage.redis" in refused.err
    assert ("storage.database" in refused.err) == (shared == "nothing")
    assert refused.err.count("\n") == 1


def test_they_answer_as_one_and_their_figures_are_sums(house: House) -> None:
    gateway = house.gateway
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: house.buy(), range(ASKED)))

    assert answers == [200] * ASKED
    assert len(children(gateway)) == WORKERS
    assert len(notes(gateway, "started")) == WORKERS
    # Whichever is asked tells the figures of all.
    assert {answered(gateway) for _ in range(8)} == {float(ASKED)}
    assert {living(gateway) for _ in range(4)} == {float(WORKERS)}
    assert gateway.metric("imageway_waiting")['{model="gpt-image-2"}'] == 0
    assert gateway.audit()["clean"]


def test_one_that_is_killed_is_started_again_and_no_counter_falls(house: House) -> None:
    gateway = house.gateway
    gateway.logs.clear()
    before = answered(gateway)
    for _ in range(ASKED):
        assert house.buy() == 200
    first, *_ = children(gateway)
    kept = figures(gateway)

    os.kill(first, signal.SIGKILL)
    for _ in range(ASKED):
        assert house.buy() == 200
        assert answered(gateway) >= before + ASKED
    until(lambda: len(children(gateway)) == WORKERS, "the new process")

    until(lambda: len(notes(gateway, "started")) == 1, "its start")
    assert first not in children(gateway)
    (ended,) = notes(gateway, "worker_ended")
    assert ended["code"] == -signal.SIGKILL
    assert answered(gateway) == before + 2 * ASKED
    assert figures(gateway) == kept, "files that grow in number with each restart"


def test_a_hang_up_signal_reloads_all_of_them(house: House) -> None:
    gateway = house.gateway
    assert gateway.config is not None
    gateway.config.write_text(gateway.config.read_text().replace(PRICE, "flat = 0.03"))

    gateway.signal(signal.SIGHUP)

    until(lambda: len(notes(gateway, "config_read")) == WORKERS, "both reloads")
    with gateway.client(ADMIN_KEY) as admin:
        asked = [admin.post("/admin/v1/routes/explain", json=BODY) for _ in range(6)]
    assert {answer.json()["route"][0]["estimate_usd"] for answer in asked} == {0.03}


def test_asked_to_stop_under_load_it_ends_every_request(house: House) -> None:
    gateway = house.gateway
    over = threading.Event()

    def client() -> list[int]:
        answers = []
        while not over.is_set():
            answers.append(house.buy())
        return answers

    def ready() -> bool:
        # As a balancer does: who is asked goes on for a while after it has said no.
        return httpx.get(f"{gateway.url}/health/ready").status_code == 200

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        for _ in range(10):
            assert ready()
            time.sleep(0.1)
        gateway.signal(signal.SIGTERM)
        until(lambda: not ready(), "the process says that it is about to stop")
        over.set()
        answers = [status for done in clients for status in done.result()]

    assert gateway.wait() == 0
    assert set(answers) == {200}
    assert len(answers) > WORKERS
    gateway.start()
    assert gateway.audit()["clean"]


def test_when_the_one_that_started_them_is_killed_they_leave(house: House) -> None:
    gateway = house.gateway
    address = (urlsplit(gateway.url).hostname, urlsplit(gateway.url).port)
    pids = children(gateway)

    gateway.kill()

    def gone() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    until(gone, "the end of all processes")
    with socket.socket() as probe:
        assert probe.connect_ex(address) != 0
    gateway.start()
    assert house.buy() == 200


def test_one_that_cannot_start_ends_the_whole_and_the_first_key_is_kept_for_later(
    tmp_path: Path, house: House
) -> None:
    data_dir, config = tmp_path / "data", config_in(tmp_path)
    (data_dir / "workers").mkdir(parents=True)
    in_the_way = data_dir / "workers" / "1"
    in_the_way.write_text("")
    env = house.gateway.env
    options = ["--config", str(config), "--data-dir", str(data_dir), "--port", "0"]

    refused = command("serve", "--workers", "2", *options, cwd=tmp_path, **env)

    assert refused.code == 1
    assert "worker 1 did not start" in refused.err

    in_the_way.unlink()
    with LiveGateway(data_dir, config, env, workers=WORKERS) as mended:
        assert mended.first_key is not None
