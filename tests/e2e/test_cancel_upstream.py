"""A job is stopped at its upstream, had ended by then, or outlives the gateway."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import LiveGateway
from tests.e2e.openai_upstreams import running_server
from tests.simulators.cast import write_gateway

PATH = "/v1/images/generations"
BODY = {
    "model": "gpt-image-2",
    "prompt": "a fox",
    "size": "1024x1024",
    "quality": "low",
}
LATER = {"prefer": "respond-async"}
TENANT = "acme"
FREE = {"available": "1000", "held": "0", "spent": "0"}
WAIT_MAX_S = 60
LATENCY_S = 4.0
"""Of a job: time enough to be stopped, or to kill a gateway."""


class Fal:
    """A simulated fal, steered and asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def set(self, **changes: Any) -> None:
        httpx.post(f"{self.url}/_set", json=changes).raise_for_status()

    def jobs(self) -> list[dict[str, Any]]:
        """Read each job: its state, and the calls that were made for it."""
        return list(httpx.get(f"{self.url}/_jobs").json())

    def purchases(self) -> list[dict[str, Any]]:
        return list(httpx.get(f"{self.url}/_purchases").json())

    def calls(self, step: str) -> int:
        """Count the calls of a step: ``submit``, ``status``, ``result``, ``cancel``."""
        return sum(job["calls"].get(step, 0) for job in self.jobs())


@contextmanager
def before_fal(folder: Path) -> Iterator[tuple[LiveGateway, Fal]]:
    module = ("tests.simulators.fal_server", "--latency-s", str(LATENCY_S))
    with running_server(*module) as url:
        config = write_gateway(folder, {"fal": url})
        with LiveGateway(folder / "data", config=config) as gateway:
            yield gateway, Fal(url)


@pytest.fixture
def played(tmp_path: Path) -> Iterator[tuple[LiveGateway, Fal]]:
    with before_fal(tmp_path) as played:
        yield played


def until(true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_MAX_S
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def submitted(client: httpx.Client, fal: Fal) -> str:
    """Make a task; returns its id when its job is in fal's queue and asked for."""
    answer = client.post(PATH, json=BODY, headers=LATER)
    assert answer.status_code == 200, answer.text
    until(lambda: fal.calls("status") > 0)
    return str(answer.json()["id"])


def state(client: httpx.Client, task_id: str) -> str:
    return str(client.get(f"/v1/tasks/{task_id}").json()["status"])


def over(client: httpx.Client, task_id: str) -> str:
    until(lambda: state(client, task_id) not in {"pending", "processing"})
    return state(client, task_id)


def book(gateway: LiveGateway) -> list[tuple[str, int]]:
    """Read the operator's cost book: kind and nano-dollars."""
    path = gateway.data_dir / "imageway.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as books:
        rows = books.execute("SELECT kind, nanousd FROM cost_book").fetchall()
    books.close()
    return rows


def test_a_job_that_waits_is_taken_out_of_the_queue_for_free(
    played: tuple[LiveGateway, Fal],
) -> None:
    gateway, fal = played
    fal.set(busy=True)
    with gateway.client(gateway.tenant(TENANT)) as client:
        task_id = submitted(client, fal)
        answer = client.post(f"/v1/tasks/{task_id}/cancel")
        ended = over(client, task_id)

    assert answer.status_code == 200
    assert ended == "cancelled"
    assert [job["state"] for job in fal.jobs()] == ["GONE"]
    assert fal.calls("cancel") == 1
    assert fal.purchases() == []
    assert gateway.balance(TENANT) == FREE
    # fal does not tell whether it had begun meanwhile: the operator's book assumes so.
    assert [kind for kind, _ in book(gateway)] == ["waste"]
    assert gateway.audit()["clean"]


def test_a_job_that_runs_is_stopped_and_what_it_may_cost_is_the_operators(
    played: tuple[LiveGateway, Fal],
) -> None:
    gateway, fal = played
    with gateway.client(gateway.tenant(TENANT)) as client:
        task_id = submitted(client, fal)
        client.post(f"/v1/tasks/{task_id}/cancel")
        ended = over(client, task_id)
        time.sleep(LATENCY_S)
        after = state(client, task_id)

    assert (ended, after) == ("cancelled", "cancelled")
    assert [job["error"]["error_type"] for job in fal.jobs()] == ["client_cancelled"]
    assert fal.calls("cancel") == 1
    assert fal.calls("result") == 0
    # fal may bill what it had begun: here it does.
    assert len(fal.purchases()) == 1
    assert gateway.balance(TENANT) == FREE
    ((kind, nanousd),) = book(gateway)
    assert kind == "waste"
    assert nanousd > 0
    assert gateway.audit()["clean"]


def test_a_job_that_has_ended_is_delivered_and_charged(
    played: tuple[LiveGateway, Fal],
) -> None:
    gateway, fal = played
    # It has ended; that it still runs is all that the gateway was told.
    fal.set(shy=True)
    with gateway.client(gateway.tenant(TENANT)) as client:
        task_id = submitted(client, fal)
        until(lambda: fal.jobs()[0]["state"] == "COMPLETED")
        client.post(f"/v1/tasks/{task_id}/cancel")
        until(lambda: fal.calls("cancel") > 0)
        fal.set(shy=False)
        ended = over(client, task_id)
        task = client.get(f"/v1/tasks/{task_id}").json()
        picture = httpx.get(task["results"][0]).content

    assert ended == "completed"
    assert picture.startswith(b"\x89PNG")
    assert fal.calls("submit") == len(fal.purchases()) == 1
    spent = Decimal(gateway.balance(TENANT)["spent"])
    assert spent == Decimal(str(task["usage"]["credits_used"])) > 0
    ((kind, _),) = book(gateway)
    assert kind == "cost"
    assert gateway.audit()["clean"]


def test_a_sync_request_whose_gateway_is_killed_is_finished_after_the_restart(
    played: tuple[LiveGateway, Fal],
) -> None:
    gateway, fal = played
    key = gateway.tenant(TENANT)
    once = {"idempotency-key": "order-7"}
    broken: list[str] = []

    def ask() -> None:
        with gateway.client(key) as client:
            try:
                client.post(PATH, json=BODY, headers=once)
            except httpx.TransportError as error:
                broken.append(type(error).__name__)

    client_of_old = threading.Thread(target=ask)
    client_of_old.start()
    until(lambda: fal.calls("status") > 0)
    gateway.kill()
    client_of_old.join()
    gateway.start()
    with gateway.client(key) as client:
        listed = client.get("/v1/tasks").json()
        (task_id,) = [task["id"] for task in listed["data"]]
        ended = over(client, task_id)
        again = client.post(PATH, json=BODY, headers=once)
        spent = Decimal(gateway.balance(TENANT)["spent"])
        third = client.post(PATH, json=BODY, headers=once)

    assert len(broken) == 1
    assert ended == "completed"
    assert again.status_code == 200, again.text
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-task-id"] == task_id
    assert again.json()["data"][0]["b64_json"]
    assert third.text == again.text
    assert fal.calls("submit") == len(fal.purchases()) == 1
    assert spent == Decimal(str(again.json()["usage"]["credits_used"])) > 0
    assert Decimal(gateway.balance(TENANT)["spent"]) == spent
    assert gateway.balance(TENANT)["held"] == "0"
    assert [kind for kind, _ in book(gateway)] == ["cost"]
    assert gateway.audit()["clean"]
