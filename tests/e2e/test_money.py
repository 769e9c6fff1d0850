"""Many at once, crashes, clients that hang up: the books stay right."""

from __future__ import annotations

import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from urllib.parse import urlsplit

import httpx

from tests.e2e.gateways import LiveGateway

BODY = {"prompt": "a fox", "size": "3:1", "quality": "low"}
PATH = "/v1/images/generations"
WAIT_MAX_S = 30


def price_of_one(gateway: LiveGateway) -> Decimal:
    with gateway.client() as client:
        estimate = client.post("/v1/estimate", json=BODY)
    return Decimal(str(estimate.json()["high"]["credits"]))


def test_credits_for_100_buy_exactly_100_of_200_at_once(gateway: LiveGateway) -> None:
    key = gateway.tenant("race", str(price_of_one(gateway) * 100))

    with gateway.client(key, limits=httpx.Limits(max_connections=200)) as client:

        def one(_: int) -> httpx.Response:
            return client.post(PATH, json=BODY)

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(one, range(200)))

    assert Counter(a.status_code for a in answers) == {200: 100, 402: 100}
    served = [a.json() for a in answers if a.is_success]
    assert len({each["id"] for each in served}) == 100
    assert all(each["data"][0]["b64_json"] for each in served)
    names = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
    assert sum(gateway.bought(name) for name in names) == 100
    spent = str((price_of_one(gateway) * 100).normalize())
    assert gateway.balance("race") == {"available": "0", "held": "0", "spent": spent}
    assert gateway.audit()["clean"]


def test_kill_9_in_the_middle_leaves_no_hold_and_charges_nobody_twice(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("crash")
    for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
        gateway.sandbox(name, latency_ms=400)
    outcomes: list[int] = []

    def one(place: int) -> None:
        time.sleep(place * 0.02)
        try:
            with gateway.client(key) as client:
                outcomes.append(client.post(PATH, json=BODY).status_code)
        except httpx.TransportError:
            outcomes.append(0)

    with ThreadPoolExecutor(50) as pool:
        running = [pool.submit(one, place) for place in range(50)]
        time.sleep(0.7)
        until = time.monotonic() + WAIT_MAX_S
        while not gateway.audit()["holds_open"]:
            assert time.monotonic() < until
        gateway.kill()
        for each in running:
            each.result()
    assert gateway.audit()["holds_open"] > 0

    gateway.start()

    report = gateway.audit()
    balance = gateway.balance("crash")
    assert (report["clean"], report["holds_open"]) == (True, 0)
    assert balance["held"] == "0"
    charged = Decimal(balance["spent"]) / price_of_one(gateway)
    assert outcomes.count(0) > 0
    assert outcomes.count(200) <= charged <= 50
    assert charged == int(charged)
    with gateway.client(key) as client:
        assert client.post(PATH, json=BODY).status_code == 200


def test_a_client_that_hangs_up_is_settled_and_its_picture_is_kept(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("impatient")
    gateway.sandbox("sandbox-thrifty", latency_ms=500)
    raw = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: 55\r\n\r\n"
    )
    body = '{"prompt": "a fox", "size": "3:1", "quality": "low"}   '
    assert len(body) == 55
    address = urlsplit(gateway.url)
    with socket.create_connection((address.hostname, address.port)) as hasty:
        hasty.sendall((raw + body).encode())
        time.sleep(0.2)

    def finished() -> str | None:
        done = [line for line in gateway.logs if '"event":"task"' in line]
        return done[0].split('"task_id":"')[1].split('"')[0] if done else None

    until = time.monotonic() + WAIT_MAX_S
    while finished() is None and time.monotonic() < until:
        time.sleep(0.05)
    task_id = finished()
    with gateway.client(key) as client:
        task = client.get(f"/v1/tasks/{task_id}").json()
        picture = client.get(task["data"][0]["url"])

    assert task["status"] == "completed"
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    assert gateway.balance("impatient")["held"] == "0"
    assert Decimal(gateway.balance("impatient")["spent"]) == price_of_one(gateway)


def test_an_answer_that_was_sent_leaves_no_spool_and_is_kept_a_while(
    gateway: LiveGateway,
) -> None:
    with gateway.client() as client:
        task_id = client.post(PATH, json=BODY).headers["x-task-id"]
        task = client.get(f"/v1/tasks/{task_id}").json()

    assert task["status"] == "completed"
    assert len(task["data"]) == 1
    assert list((gateway.data_dir / "spool").iterdir()) == []


def test_credits_and_cli_agree_to_the_nano_credit(gateway: LiveGateway) -> None:
    key = gateway.tenant("precise", "10.000000001")
    with gateway.client(key) as client:
        client.post(PATH, json=BODY)
        shown = client.get("/v1/credits")

    told = ("credits", "balance", "--tenant", "precise", "--json")
    balance = gateway.cli(*told).json
    raw = shown.text
    assert f'"remaining_credits":{balance["available"]}' in raw
    assert f'"used_credits":{balance["spent"]}' in raw
    total = Decimal(balance["available"]) + Decimal(balance["spent"])
    assert total == Decimal("10.000000001")
    assert balance == gateway.balance("precise")
    assert gateway.cli("audit", "--json").json["clean"]


def test_a_client_that_hangs_up_in_its_answer_finds_it_under_its_task(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("torn")
    with (
        gateway.client(key) as client,
        client.stream("POST", PATH, json=BODY | {"size": "1:1"}) as answer,
    ):
        task_id = answer.headers["x-task-id"]
        next(answer.iter_raw(100))

    with gateway.client(key) as client:
        task = client.get(f"/v1/tasks/{task_id}").json()
        link = task["data"][0]["url"]
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(lambda _: httpx.get(link), range(8)))

    assert {each.status_code for each in opened} == {200}
    assert len({each.content for each in opened}) == 1


def test_without_a_place_to_store_nothing_is_bought(gateway: LiveGateway) -> None:
    key = gateway.tenant("shelfless")
    results = gateway.data_dir / "results"
    results.rmdir()
    results.write_text("in the way")

    with gateway.client(key) as client:
        answers = [client.post(PATH, json=BODY) for _ in range(3)]
        ready = client.get("/health/ready")

    assert {answer.status_code for answer in answers} == {503}
    assert {a.json()["error"]["code"] for a in answers} == {"storage_unavailable"}
    assert ready.status_code == 503
    assert gateway.bought("sandbox-thrifty") == 0
    results.unlink()
    with gateway.client(key) as client:
        assert client.post(PATH, json=BODY).status_code == 200


def test_folders_that_somebody_removed_are_made_again(gateway: LiveGateway) -> None:
    (gateway.data_dir / "spool").rmdir()
    (gateway.data_dir / "results").rmdir()

    with gateway.client() as client:
        answer = client.post(PATH, json=BODY | {"response_format": "url"})

    assert answer.status_code == 200


def test_a_second_signal_ends_it_at_once(gateway: LiveGateway) -> None:
    gateway.sandbox("sandbox-thrifty", latency_ms=60_000)
    address = urlsplit(gateway.url)
    body = b'{"prompt": "a fox"}'
    with socket.create_connection((address.hostname, address.port)) as waiting:
        waiting.sendall(
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {gateway.first_key}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        time.sleep(0.3)
        gateway.signal()
        time.sleep(0.3)
        assert gateway.running
        gateway.signal()
        assert gateway.wait() == 0
