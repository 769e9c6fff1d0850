"""Async tasks: made, watched, cancelled, and carried out whatever happens."""

from __future__ import annotations

import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.gateways import LiveGateway, command

PATH = "/v1/images/generations"
BODY = {"prompt": "a fox", "size": "3:1", "quality": "low"}
LATER = {"prefer": "respond-async"}
NAMES = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
WAIT_MAX_S = 60


def made(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    answer = client.post(PATH, json=BODY | changes, headers=LATER)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert isinstance(body, dict)
    return body


def ended(client: httpx.Client, task_id: str) -> dict[str, Any]:
    until = time.monotonic() + WAIT_MAX_S
    while time.monotonic() < until:
        task = client.get(f"/v1/tasks/{task_id}").json()
        assert isinstance(task, dict)
        if task["status"] in {"completed", "failed", "cancelled"}:
            return task
        time.sleep(0.05)
    raise AssertionError(task_id)


def bought(gateway: LiveGateway) -> int:
    return sum(gateway.bought(name) for name in NAMES)


def test_a_task_is_answered_at_once_and_ends_with_links(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], latency_ms=800)
    with gateway.client(gateway.tenant("later")) as client:
        answer = client.post(PATH, json=BODY, headers=LATER)
        first = answer.json()
        seen = client.get(f"/v1/tasks/{first['id']}").json()
        task = ended(client, first["id"])
        picture = httpx.get(task["data"][0]["url"])

    assert answer.headers["x-gateway-mode"] == "async"
    assert answer.headers["x-task-id"] == first["id"]
    # A worker may have taken it before the answer was written.
    assert first["status"] in {"pending", "processing"}
    assert first["task_info"]["can_cancel"] is True
    assert first["task_info"]["estimated_time"] > 0
    assert first["usage"]["credits_reserved"] > 0
    assert "data" not in first
    assert seen["status"] in {"pending", "processing"}
    assert task["status"] == "completed"
    assert task["results"] == [item["url"] for item in task["data"]]
    assert task["usage"]["credits_used"] > 0
    assert picture.content.startswith(b"\x89PNG")
    assert gateway.balance("later")["held"] == "0"
    assert gateway.audit()["clean"]


def test_the_words_of_the_task_contract_make_a_task(gateway: LiveGateway) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    reference = f"data:image/png;base64,{data}"
    with gateway.client() as client:
        answer = client.post(PATH, json=BODY | {"image_urls": [reference]})
        task = ended(client, answer.json()["id"])

    assert answer.headers["x-gateway-mode"] == "async"
    assert task["status"] == "completed"
    assert task["usage"]["input_tokens_details"]["image_tokens"] == 2
    assert list((gateway.data_dir / "inputs").iterdir()) == []


def test_a_key_may_say_how_its_pictures_come(gateway: LiveGateway) -> None:
    gateway.cli("tenants", "create", "keys", "--credits", "100")
    keys = {
        mode: gateway.cli(
            *("keys", "create", "--tenant", "keys", "--delivery", mode, "--json")
        ).json["key"]
        for mode in ("auto", "sync", "async")
    }

    def mode_of(delivery: str, headers: dict[str, str] | None = None) -> str:
        with gateway.client(keys[delivery]) as client:
            answer = client.post(PATH, json=BODY, headers=headers)
        assert answer.status_code == 200
        return str(answer.headers["x-gateway-mode"])

    assert [mode_of(each) for each in keys] == ["sync", "sync", "async"]
    assert mode_of("sync", LATER) == "async"


def test_who_waits_gets_the_picture_if_it_is_quick_and_else_the_task(
    gateway: LiveGateway,
) -> None:
    with gateway.client() as client:
        quick = client.post(PATH, json=BODY, headers={"prefer": "wait=20"})
        gateway.sandbox(NAMES[0], latency_ms=3_000)
        slow = client.post(PATH, json=BODY, headers={"prefer": "wait=1"})
        task = ended(client, slow.json()["id"])

    assert quick.json()["data"][0]["b64_json"]
    assert slow.json()["status"] == "processing"
    assert slow.headers["preference-applied"] == "wait=1"
    assert task["status"] == "completed"


def test_a_task_that_fails_says_why_and_is_free(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="content_policy")
    with gateway.client(gateway.tenant("unlucky")) as client:
        task = ended(client, made(client)["id"])

    assert task["status"] == "failed"
    assert task["error"]["code"] == "content_policy_violation"
    assert task["error"]["type"] == "task_error"
    assert gateway.balance("unlucky") == {
        "available": "1000",
        "held": "0",
        "spent": "0",
    }


def test_with_every_upstream_down_a_task_waits_for_one_to_return(
    gateway: LiveGateway,
) -> None:
    for name in NAMES:
        gateway.sandbox(name, failure_rate=1, failure_kind="rate_limited")
    with gateway.client() as client:
        for _ in range(3):
            client.post(PATH, json=BODY)
        task_id = made(client)["id"]
        time.sleep(1)
        waiting = client.get(f"/v1/tasks/{task_id}").json()
        for name in NAMES:
            gateway.sandbox(name, failure_rate=0)
        task = ended(client, task_id)

    assert waiting["status"] == "processing"
    assert task["status"] == "completed"


def test_a_running_task_is_cancelled_for_free(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], latency_ms=60_000)
    key = gateway.tenant("fickle")
    with gateway.client(key) as client:
        task_id = made(client)["id"]
        time.sleep(0.5)
        asked = client.post(f"/v1/tasks/{task_id}/cancel")
        task = ended(client, task_id)
        again = client.post(f"/v1/tasks/{task_id}/cancel")

    assert asked.status_code == 200
    assert task["status"] == "cancelled"
    assert task["error"]["code"] == "request_cancelled"
    assert again.status_code == 200
    assert gateway.balance("fickle")["held"] == "0"


def test_who_waits_for_a_task_that_is_cancelled_is_told_so(
    gateway: LiveGateway,
) -> None:
    gateway.sandbox(NAMES[0], latency_ms=60_000)
    headers = {"idempotency-key": "fickle-1"}
    with gateway.client(gateway.tenant("fickle")) as client:
        with ThreadPoolExecutor(1) as pool:
            wait = headers | {"prefer": "wait=30"}
            waiting = pool.submit(client.post, PATH, json=BODY, headers=wait)
            until = time.monotonic() + WAIT_MAX_S
            running: list[dict[str, Any]] = []
            while not running and time.monotonic() < until:
                running = client.get("/v1/tasks?status=processing").json()["data"]
            client.post(f"/v1/tasks/{running[0]['id']}/cancel")
            answers = [waiting.result()]
        answers.append(client.post(PATH, json=BODY, headers=headers))
        later = client.post(PATH, json=BODY, headers=headers | LATER)

    for answer in answers:
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "request_cancelled"
        assert answer.headers["x-should-retry"] == "false"
    assert (later.status_code, later.json()["status"]) == (200, "cancelled")


def test_a_list_tells_the_progress_that_the_task_tells(gateway: LiveGateway) -> None:
    with gateway.client(gateway.tenant("lists")) as client:
        ended(client, made(client)["id"])  # so that it is known how long one takes
        gateway.sandbox(NAMES[0], latency_ms=20_000)
        task_id = made(client)["id"]
        until = time.monotonic() + WAIT_MAX_S
        task: dict[str, Any] = {"progress": 0}
        while task["progress"] < 95 and time.monotonic() < until:
            task = client.get(f"/v1/tasks/{task_id}").json()
        lines = client.get("/v1/tasks").json()["data"]
        client.post(f"/v1/tasks/{task_id}/cancel")

    assert [line["progress"] for line in lines] == [95, 100]


def test_the_lines_of_a_preference_are_read_together(
    shared_gateway: LiveGateway,
) -> None:
    with shared_gateway.client() as client:
        lines = [("prefer", "return=minimal"), ("prefer", "respond-async")]
        answer = client.post(PATH, json=BODY, headers=lines)

    assert answer.headers["x-gateway-mode"] == "async"


def test_numbers_of_any_length_are_read_without_harm(
    shared_gateway: LiveGateway,
) -> None:
    long = ("0" * 20 + "1", "00000000199999", "1" + "0" * 18, "9" * 5_000)
    with shared_gateway.client() as client:
        wrong = [
            client.get("/v1/tasks", params={name: text})
            for name in ("page", "page_size")
            for text in long
        ]
        retries = {"x-stainless-retry-count": "9" * 5_000}
        again = client.post(PATH, json=BODY, headers=retries)
        joined = client.post(PATH, json=BODY, headers=retries)

    assert {answer.status_code for answer in wrong} == {400}
    assert again.status_code == 200
    assert joined.headers["idempotency-replayed"] == "true"


def test_a_sync_task_cannot_be_cancelled(gateway: LiveGateway) -> None:
    with gateway.client() as client:
        task_id = client.post(PATH, json=BODY).headers["x-task-id"]
        answer = client.post(f"/v1/tasks/{task_id}/cancel")

    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "task_not_cancellable"


def test_tasks_are_listed_and_read_in_batches(gateway: LiveGateway) -> None:
    with gateway.client(gateway.tenant("lists")) as client:
        ids = [made(client)["id"] for _ in range(5)]
        for task_id in ids:
            ended(client, task_id)
        page = client.get("/v1/tasks", params={"page_size": 2, "status": "completed"})
        none = client.get("/v1/tasks", params={"model": "gpt-image-1.5"})
        batch = client.post(
            "/v1/tasks/batch",
            json={"task_ids": [*ids[:2], "task-unified-1-aaaaaaaa", "junk"]},
        )
        wrong = [
            client.get("/v1/tasks", params={"status": "lost"}),
            client.get("/v1/tasks", params={"page": "0"}),
            client.get("/v1/tasks", params={"page_size": "1000"}),
            client.post("/v1/tasks/batch", json={"task_ids": []}),
            client.post("/v1/tasks/batch", json={"task_ids": [1]}),
            client.post("/v1/tasks/batch", json={"task_ids": 1}),
            client.post("/v1/tasks/batch", json=["x"] * 51),
        ]
    with gateway.client(gateway.tenant("other")) as stranger:
        foreign = stranger.post("/v1/tasks/batch", json={"task_ids": ids})

    listed = page.json()
    assert (listed["total"], len(listed["data"])) == (5, 2)
    assert listed["data"][0]["credits_used"] > 0
    assert none.json()["total"] == 0
    assert [task["id"] for task in batch.json()["data"]] == ids[:2]
    assert [answer.status_code for answer in wrong] == [400] * 7
    assert foreign.json()["data"] == []


def test_the_command_lists_tasks_and_cancels_them(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], latency_ms=20_000)
    with gateway.client(gateway.tenant("commanded")) as client:
        task_id = made(client)["id"]
        time.sleep(0.5)  # so that a worker has taken it
        listed = gateway.cli("tasks", "list", "--tenant", "commanded", "--json").json
        gateway.cli("tasks", "cancel", task_id)
        task = ended(client, task_id)
    unknown = "task-unified-1795562712-aaaaaaaa"
    gone = command("tasks", "cancel", unknown, "--data-dir", str(gateway.data_dir))
    over = command("tasks", "cancel", task_id, "--data-dir", str(gateway.data_dir))
    wanted = ("--status", "cancelled", "--tenant", "commanded", "--json")

    assert [(line["id"], line["status"]) for line in listed] == [
        (task_id, "processing")
    ]
    assert task["status"] == "cancelled"
    assert (gone.code, over.code) == (1, 0)
    assert "no such task" in gone.err
    assert [line["id"] for line in gateway.cli("tasks", "list", *wanted).json] == [
        task_id
    ]
    assert gateway.audit()["clean"]


def test_equal_tasks_with_one_key_are_one(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], latency_ms=300)
    headers = LATER | {"idempotency-key": "task-1"}
    with gateway.client() as client:

        def one(_: int) -> httpx.Response:
            return client.post(PATH, json=BODY, headers=headers)

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(one, range(50)))
        ended(client, answers[0].json()["id"])
        late = one(0)

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert late.json()["status"] == "completed"
    assert bought(gateway) == 1


def test_kill_9_loses_no_task_and_charges_each_once(gateway: LiveGateway) -> None:
    # Ten calls may be out when it dies: so many unknown outcomes are bought again.
    key = gateway.tenant("crash")
    gateway.sandbox(NAMES[0], latency_ms=700)
    with gateway.client(key) as client:
        ids = [made(client)["id"] for _ in range(10)]
        time.sleep(0.4)
    gateway.kill()
    gateway.start()
    with gateway.client(key) as client:
        tasks = [ended(client, task_id) for task_id in ids]

    assert {task["status"] for task in tasks} == {"completed"}
    one = tasks[0]["usage"]["credits_used"]
    spent = float(gateway.balance("crash")["spent"])
    assert spent == pytest.approx(10 * one)
    assert gateway.balance("crash")["held"] == "0"
    assert gateway.audit()["clean"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "https://127.0.0.1/hook",
        "https://10.0.0.1/hook",
        "https://[::1]/hook",
        "https://user:pass@example.com/hook",
        "https://example.com/" + "a" * 2048,
        "https://localhost/hook",
        "ftp://example.com",
        "",
        7,
    ],
)
def test_a_callback_url_that_should_not_be_called_is_refused(
    shared_gateway: LiveGateway, url: Any
) -> None:
    with shared_gateway.client() as client:
        answer = client.post(PATH, json=BODY | {"callback_url": url})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "callback_url"
    assert answer.json()["error"]["code"] == "invalid_callback_url"


def test_a_callback_makes_a_task_and_a_delivery(gateway: LiveGateway) -> None:
    with gateway.client(gateway.tenant("hooked")) as client:
        body = BODY | {"callback_url": "https://nowhere.example.com/hook"}
        answer = client.post(PATH, json=body)
        ended(client, answer.json()["id"])
        listed = client.get("/v1/webhooks/deliveries").json()

    assert answer.headers["x-gateway-mode"] == "async"
    assert [each["task_id"] for each in listed["data"]] == [answer.json()["id"]]
    shown = gateway.cli("deliveries", "list", "--json").json
    assert len(shown["data"] if isinstance(shown, dict) else shown) == 1
