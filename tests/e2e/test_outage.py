"""A database that goes away and comes back: what was paid is booked, once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import LiveGateway
from tests.e2e.test_postgres import CONFIG, SECRET
from tests.e2e.test_tasks import BODY, PATH, ended, made
from tests.servers import PostgresServer

LATENCY_MS = 4_000
CALLS = 6
WAIT_MAX_S = 60
LOAD = 6
LOAD_S = 4.0


class House:
    """One gateway over a PostgreSQL of its own, and one tenant."""

    def __init__(self, folder: Path, latency_ms: int) -> None:
        self.postgres = PostgresServer.make(durable=True)
        (folder / "secret").write_text(SECRET)
        (folder / "database").write_text(self.postgres.database())
        config = folder / "gateway.toml"
        config.write_text(CONFIG.format(latency_ms=latency_ms))
        self.gateway = LiveGateway(folder / "data", config=config)
        self.gateway.start()
        self.key = self.gateway.tenant("acme")

    def close(self) -> None:
        self.gateway.stop()
        self.postgres.kill()

    def buy(self, _: int = 0) -> httpx.Response:
        with self.gateway.client(self.key) as client:
            return client.post(PATH, json=BODY)

    def waiting(self) -> float:
        return self.gateway.metric("imageway_journal_waiting")[""]

    def settled(self) -> dict[str, str]:
        """Wait until all is booked and no credits are held; returns the balance."""
        until = time.monotonic() + WAIT_MAX_S
        while time.monotonic() < until:
            balance = self.gateway.balance("acme")
            if balance["held"] == "0" and self.waiting() == 0:
                return balance
            time.sleep(0.2)
        raise AssertionError((self.gateway.balance("acme"), self.waiting()))

    def sent(self, calls: int) -> None:
        """Wait until so many calls have been sent to the upstream."""
        wait_until(lambda: self.gateway.bought("sandbox") >= calls)


def wait_until(true: Any) -> None:
    until = time.monotonic() + WAIT_MAX_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def used(answer: httpx.Response) -> Decimal:
    body = json.loads(answer.text, parse_float=Decimal)
    return Decimal(body["usage"]["credits_used"])


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, LATENCY_MS)
    yield made
    made.close()


@pytest.fixture
def fast_house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, 50)
    yield made
    made.close()


def test_calls_that_are_out_are_answered_and_booked_when_the_database_is_back(
    house: House,
) -> None:
    with ThreadPoolExecutor(CALLS) as pool:
        calls = [pool.submit(house.buy) for _ in range(CALLS)]
        house.sent(CALLS)
        house.postgres.stop()
        refused = house.buy()
        answers = [call.result() for call in calls]
    kept = house.waiting()
    with house.gateway.client() as client:
        ready = client.get("/health/ready")
    house.postgres.start()
    balance = house.settled()

    assert [answer.status_code for answer in answers] == [200] * CALLS
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "storage_unavailable"
    assert int(refused.headers["retry-after"]) > 0
    assert ready.status_code == 503
    assert kept == CALLS
    assert Decimal(balance["spent"]) == sum(map(used, answers))
    assert house.gateway.bought("sandbox") == CALLS
    assert house.buy().status_code == 200
    assert house.gateway.audit()["clean"]


def test_what_was_answered_is_booked_even_if_the_gateway_is_killed_first(
    house: House,
) -> None:
    with ThreadPoolExecutor(CALLS) as pool:
        calls = [pool.submit(house.buy) for _ in range(CALLS)]
        house.sent(CALLS)
        house.postgres.stop()
        answers = [call.result() for call in calls]
    house.gateway.kill()
    house.postgres.start()
    wait_until(lambda: started(house.gateway))
    balance = house.settled()
    with house.gateway.client(house.key) as client:
        tasks = [
            client.get(f"/v1/tasks/{answer.headers['x-task-id']}").json()
            for answer in answers
        ]

    assert [answer.status_code for answer in answers] == [200] * CALLS
    assert Decimal(balance["spent"]) == sum(map(used, answers))
    assert {task["status"] for task in tasks} == {"completed"}
    assert house.gateway.audit()["clean"]


def started(gateway: LiveGateway) -> bool:
    with suppress(AssertionError):
        gateway.start()
        return True
    return False


def test_async_tasks_that_are_out_end_once(house: House) -> None:
    with house.gateway.client(house.key) as client:
        ids = [made(client)["id"] for _ in range(CALLS)]
        house.sent(CALLS)
        house.postgres.stop()
        wait_until(lambda: house.waiting() == CALLS)
        house.postgres.start()
        house.settled()
        tasks = [ended(client, task_id) for task_id in ids]

    assert {task["status"] for task in tasks} == {"completed"}
    assert house.gateway.bought("sandbox") == CALLS
    assert house.gateway.audit()["clean"]


def test_a_restart_under_load_loses_nothing_that_was_acknowledged(
    fast_house: House,
) -> None:
    answers: list[tuple[float, httpx.Response]] = []
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            answer = fast_house.buy()
            answers.append((time.monotonic(), answer))
            if answer.status_code != 200:
                time.sleep(0.1)

    with ThreadPoolExecutor(LOAD) as pool:
        loads: list[Future[None]] = [pool.submit(load) for _ in range(LOAD)]
        wait_until(lambda: len(answers) > LOAD)
        fast_house.postgres.stop()
        fast_house.postgres.start()
        back_s = time.monotonic()
        wait_until(lambda: answers[-1][0] > back_s + LOAD_S)
        over.set()
    for done in loads:
        done.result()
    balance = fast_house.settled()
    bought = [answer for _, answer in answers if answer.status_code == 200]
    refused = [(at_s, a) for at_s, a in answers if a.status_code != 200]
    with fast_house.gateway.client(fast_house.key) as client:
        seen = [
            client.get(f"/v1/tasks/{a.headers['x-task-id']}").json() for a in bought
        ]

    assert {answer.status_code for _, answer in refused} <= {503}
    codes = {answer.json()["error"]["code"] for _, answer in refused}
    assert codes <= {"storage_unavailable", "overloaded"}
    assert {task["status"] for task in seen} == {"completed"}
    assert Decimal(balance["spent"]) == sum(map(used, bought))
    assert fast_house.buy().status_code == 200
    assert fast_house.gateway.audit()["clean"]
    window_s = max((at_s for at_s, _ in refused), default=back_s) - min(
        (at_s for at_s, _ in refused), default=back_s
    )
    print(f"{len(bought)} bought, {len(refused)} refused for {window_s:.1f} s")  # noqa: T201
