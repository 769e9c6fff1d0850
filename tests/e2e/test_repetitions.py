"""A request that is sent again is not bought again."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.gateways import LiveGateway

PATH = "/v1/images/generations"
EDITS = "/v1/images/edits"
BODY = {"prompt": "a fox", "size": "3:1", "quality": "low"}
NAMES = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")


def bought(gateway: LiveGateway) -> int:
    return sum(gateway.bought(name) for name in NAMES)


def post(client: httpx.Client, key: str = "order-7", **changes: Any) -> httpx.Response:
    return client.post(PATH, json=BODY | changes, headers={"idempotency-key": key})


def test_two_hundred_equal_posts_buy_once_and_get_equal_answers(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("eager")
    gateway.sandbox("sandbox-thrifty", latency_ms=500)
    with gateway.client(key, limits=httpx.Limits(max_connections=200)) as client:
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(lambda _: post(client), range(200)))
        other = post(client, n=2)

    assert {answer.status_code for answer in answers} == {200}
    bodies = {answer.text for answer in answers}
    pictures = {answer.json()["data"][0]["b64_json"] for answer in answers}
    assert len(pictures) == 1
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(bodies) == 1
    replayed = [a.headers.get("idempotency-replayed") for a in answers]
    assert replayed.count("true") == 199
    assert bought(gateway) == 1
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_conflict"
    one = answers[0].json()["usage"]["credits_used"]
    assert float(gateway.balance("eager")["spent"]) == pytest.approx(one, abs=1e-12)
    assert gateway.audit()["clean"]


def test_a_repetition_is_answered_after_a_restart_too(gateway: LiveGateway) -> None:
    key = gateway.tenant("patient")
    with gateway.client(key) as client:
        first = post(client)
    gateway.kill()
    gateway.start()
    with gateway.client(key) as client:
        again = post(client)
        as_link = post(client, key="order-8", response_format="url")
        link_again = post(client, key="order-8", response_format="url")

    assert again.text == first.text
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["x-task-id"] == first.headers["x-task-id"]
    assert link_again.json()["id"] == as_link.json()["id"]
    assert httpx.get(link_again.json()["data"][0]["url"]).status_code == 200


def test_a_refusal_is_repeated_and_an_outage_is_tried_again(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("unlucky")
    with gateway.client(key) as client:
        gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="content_policy")
        refused = [post(client, key="sinful") for _ in range(2)]
        for name in NAMES:
            gateway.sandbox(name, failure_rate=1, failure_kind="overloaded")
        down = post(client, key="unlucky")
        for name in NAMES:
            gateway.sandbox(name, failure_rate=0)
        up = post(client, key="unlucky")

    assert [answer.status_code for answer in refused] == [400, 400]
    assert {a.json()["error"]["code"] for a in refused} == {"moderation_blocked"}
    assert refused[1].headers["idempotency-replayed"] == "true"
    assert (down.status_code, up.status_code) == (503, 200)
    assert "idempotency-replayed" not in up.headers


def test_the_same_key_of_two_tenants_is_two_requests(gateway: LiveGateway) -> None:
    for name in ("one", "two"):
        with gateway.client(gateway.tenant(name)) as client:
            assert "idempotency-replayed" not in post(client).headers

    assert bought(gateway) == 2


def test_a_stream_is_repeated_as_a_stream(gateway: LiveGateway) -> None:
    with gateway.client() as client:
        first = post(client, stream=True)
        again = post(client, stream=True)

    assert "image_generation.completed" in first.text
    assert (
        again.text.split("\ndata: ")[-1].split('"b64_json":"')[1][:200]
        == (first.text.split("\ndata: ")[-1].split('"b64_json":"')[1][:200])
    )
    assert bought(gateway) == 1


def test_a_key_that_is_none_is_refused(gateway: LiveGateway) -> None:
    with gateway.client() as client:
        answer = post(client, key="k" * 256)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_an_sdk_that_times_out_and_tries_again_joins_its_first_request(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("hasty")
    gateway.sandbox(NAMES[0], latency_ms=2_500)
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1", api_key=key, timeout=1.0, max_retries=4
    ) as sdk:
        answer = sdk.images.with_raw_response.generate(
            model="gpt-image-2", prompt="a fox", quality="low"
        )

    assert answer.headers["idempotency-replayed"] == "true"
    assert bought(gateway) == 1


def test_two_equal_requests_that_are_no_retries_are_two(gateway: LiveGateway) -> None:
    with gateway.client() as client:
        first, second = (client.post(PATH, json=BODY) for _ in range(2))

    assert first.json()["id"] != second.json()["id"]
    assert bought(gateway) == 2


def test_a_retry_of_something_that_never_arrived_is_a_new_request(
    gateway: LiveGateway,
) -> None:
    with gateway.client() as client:
        answer = client.post(PATH, json=BODY, headers={"x-stainless-retry-count": "1"})

    assert answer.status_code == 200
    assert "idempotency-replayed" not in answer.headers


def test_two_edits_with_other_files_are_not_the_same(gateway: LiveGateway) -> None:
    def edit(client: httpx.Client, colour: str) -> httpx.Response:
        return client.post(
            "/v1/images/edits",
            data={"prompt": "a fox", "quality": "low", "size": "1024x1024"},
            files={"image": ("a.png", picture(colour), "image/png")},
            headers={"idempotency-key": "edit-1"},
        )

    with gateway.client() as client:
        first, again = edit(client, "red"), edit(client, "red")
        other = edit(client, "blue")

    assert (first.status_code, again.status_code, other.status_code) == (200, 200, 422)
    assert again.text == first.text


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def test_uploads_of_requests_that_were_not_carried_out_leave_no_spool(
    gateway: LiveGateway,
) -> None:
    """Replayed, joined, refused, queued, cut off: each ends with an empty folder."""
    file = io.BytesIO()
    Image.new("RGB", (640, 320), "red").save(file, "PNG")
    content = file.getvalue() + bytes(2_000_000)  # too much to stay in memory
    uploads = {"image": ("fox.png", content, "image/png")}
    poor = gateway.tenant("poor", "0.000001")

    def edit(key: str | None = None, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with gateway.client(key) as client:
            return client.post(EDITS, data=BODY, files=uploads, headers=sent)

    first = edit(idempotency_key="upload-1")
    ends = [
        edit(idempotency_key="upload-1"),
        edit(x_stainless_retry_count="1"),
        edit(idempotency_key="upload-1", prefer="respond-async"),
        edit(idempotency_key="upload-1", prefer="wait=5"),
        edit(idempotency_key="k" * 256),
        edit(poor),
    ]
    with gateway.client() as client:
        form = BODY | {"prompt": "another fox"}
        conflict = client.post(
            EDITS, data=form, files=uploads, headers={"idempotency-key": "upload-1"}
        )
        no_mask = client.post(EDITS, data=BODY, files=uploads | {"other": content})

    assert first.status_code == 200, first.text
    assert [answer.status_code for answer in ends] == [200, 200, 200, 200, 400, 402]
    assert {a.headers["idempotency-replayed"] for a in ends[:4]} == {"true"}
    assert (conflict.status_code, no_mask.status_code) == (422, 400)
    assert list((gateway.data_dir / "spool").iterdir()) == []
    assert bought(gateway) == 1


def test_uploads_that_join_a_running_task_leave_no_spool_when_it_is_over(
    gateway: LiveGateway,
) -> None:
    gateway.sandbox("sandbox-thrifty", latency_ms=2_000)
    file = io.BytesIO()
    Image.new("RGB", (640, 320), "red").save(file, "PNG")
    uploads = {"image": ("fox.png", file.getvalue() + bytes(2_000_000), "image/png")}

    def edit(place: int) -> httpx.Response:
        headers = {"idempotency-key": "upload-2"}
        with gateway.client() as client:
            if place % 4 == 3:  # hangs up in the middle of its wait
                client.timeout = httpx.Timeout(1)
            try:
                return client.post(EDITS, data=BODY, files=uploads, headers=headers)
            except httpx.TimeoutException:
                return httpx.Response(499)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(edit, range(8)))

    assert [answer.status_code for answer in answers] == [200, 200, 200, 499] * 2
    assert list((gateway.data_dir / "spool").iterdir()) == []
    assert bought(gateway) == 1
