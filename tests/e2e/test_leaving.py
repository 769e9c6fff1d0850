"""A gateway that is told to stop, and those who do not know it yet."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from gateway.adapters.hot_redis.connection import PREFIX
from gateway.serving import WATCHED_MS, Leaving
from tests.e2e.gateways import LiveGateway
from tests.e2e.test_tasks import NAMES
from tests.servers import RedisServer

PATH = "/v1/images/generations"
BODY = {"prompt": "a fox", "size": "1024x1024", "quality": "low"}
LEAVING_S = 2


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[LiveGateway]:
    env = {"IMAGEWAY__SERVER__LEAVING_S": str(LEAVING_S)}
    with LiveGateway(tmp_path / "data", env=env) as started:
        yield started


def readiness(gateway: LiveGateway) -> tuple[int, str]:
    answer = httpx.get(f"{gateway.url}/health/ready")
    return answer.status_code, answer.json()["checks"]["process"]


def told_to_stop(gateway: LiveGateway) -> None:
    """Send SIGTERM, and see that readiness ends."""
    assert readiness(gateway) == (200, "ok")
    gateway.signal()
    while readiness(gateway)[0] == 200:
        time.sleep(0.01)


def test_requests_are_served_until_the_balancer_has_seen_that_it_stops(
    gateway: LiveGateway,
) -> None:
    with gateway.client() as kept:
        assert kept.post(PATH, json=BODY).status_code == 200
        told_to_stop(gateway)
        on_a_kept_connection = kept.post(PATH, json=BODY)
    with gateway.client() as new:
        on_a_new_one = new.post(PATH, json=BODY)
    seen = readiness(gateway)

    assert seen == (503, "the process is about to stop")
    assert on_a_kept_connection.status_code == on_a_new_one.status_code == 200
    # Whoever keeps connections must not send the next request into one that closes.
    assert on_a_kept_connection.headers["connection"] == "close"
    assert gateway.wait() == 0
    with pytest.raises(httpx.ConnectError):
        readiness(gateway)


def test_clients_that_go_on_all_the_while_see_no_error_but_a_closed_port(
    gateway: LiveGateway,
) -> None:
    def asks(_: int) -> list[int]:
        seen = []
        with gateway.client() as client:
            while True:
                try:
                    seen.append(client.post(PATH, json=BODY).status_code)
                except httpx.ConnectError:
                    return seen

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(asks, n) for n in range(4)]
        time.sleep(0.5)
        told_to_stop(gateway)
        seen = [client.result() for client in clients]

    assert {status for statuses in seen for status in statuses} == {200}
    assert gateway.wait() == 0


def test_a_task_that_comes_meanwhile_waits_for_the_next_process(
    gateway: LiveGateway,
) -> None:
    told_to_stop(gateway)
    with gateway.client() as client:
        made = client.post(PATH, json=BODY, headers={"prefer": "respond-async"})
    assert made.status_code == 200
    assert gateway.wait() == 0

    gateway.start()

    with gateway.client() as client:
        while (task := client.get(f"/v1/tasks/{made.json()['id']}").json()) and (
            task["status"] not in {"completed", "failed"}
        ):
            time.sleep(0.05)
    assert task["status"] == "completed"


def test_ctrl_c_and_a_second_signal_do_not_wait(gateway: LiveGateway) -> None:
    told_to_stop(gateway)
    gateway.signal(signal.SIGINT)
    assert gateway.wait() == 0
    with pytest.raises(httpx.ConnectError):
        readiness(gateway)


def test_a_second_signal_ends_the_wait_for_work_whose_client_is_gone(
    gateway: LiveGateway,
) -> None:
    for name in NAMES:
        gateway.sandbox(name, latency_ms=60_000)
    with gateway.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(PATH, json=BODY, timeout=2)
    gateway.signal(signal.SIGINT)
    with contextlib.suppress(httpx.HTTPError):
        while readiness(gateway):
            time.sleep(0.01)
    time.sleep(1)  # the server has ended; the task goes on

    gateway.signal()

    assert gateway.wait() == 0
    said = [json.loads(line)["event"] for line in gateway.logs]
    assert said[-2:] == ["drain_timeout", "stopped"]


def test_who_has_ended_everything_is_no_process_any_more(gateway: LiveGateway) -> None:
    def processes() -> int:
        with closing(sqlite3.connect(database)) as books:
            found = books.execute("SELECT COUNT(*) FROM processes").fetchone()[0]
        return int(found)

    (database,) = gateway.data_dir.glob("*.db")
    assert processes() == 1

    assert gateway.stop() == 0

    assert processes() == 0


def test_who_still_works_is_seen_by_its_fleet_until_the_end(
    tmp_path: Path, redis: RedisServer
) -> None:
    def last_sign_of_life() -> float | None:
        with redis.client() as client:
            live = client.zrange(f"{PREFIX}live", 0, -1, withscores=True)
        return max((at_ms for _, at_ms in live), default=None)

    env = {"IMAGEWAY__STORAGE__REDIS": redis.url, "IMAGEWAY__SERVER__LEAVING_S": "0"}
    with LiveGateway(tmp_path / "data", env=env) as gateway, ThreadPoolExecutor() as at:
        for name in NAMES:
            gateway.sandbox(name, latency_ms=4_000)
        with gateway.client() as client:
            call = at.submit(client.post, PATH, json=BODY)
            time.sleep(1)
            gateway.signal()
            with contextlib.suppress(httpx.HTTPError):
                while readiness(gateway):
                    time.sleep(0.01)
            before_ms = last_sign_of_life()
            assert before_ms is not None
            while last_sign_of_life() == before_ms:
                assert not call.done()
                time.sleep(0.05)
            assert call.result().status_code == 200
        assert gateway.wait() == 0
        assert last_sign_of_life() is None


async def test_nobody_is_waited_for_who_has_not_asked_lately() -> None:
    now_ms = 0
    leaving = Leaving(lambda: now_ms)
    assert not leaving.watched

    assert await leaving.check() is None
    assert leaving.watched

    now_ms = WATCHED_MS + 1
    assert not leaving.watched
