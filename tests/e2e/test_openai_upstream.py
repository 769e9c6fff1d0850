"""A gateway before two simulated OpenAIs: what it buys there, and at what price."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import LiveGateway
from tests.e2e.openai_upstreams import (
    SimulatedUpstream,
    gateway_before,
    simulated_upstream,
)
from tests.e2e.pictures import (
    GREEN,
    RED,
    file_of,
    mask_that_clears_the_left_half,
    opened,
)
from tests.e2e.test_tasks import ended
from tests.simulators.pictures import big_picture

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
FOX = {"model": "gpt-image-2", "prompt": "a red fox", "size": "1024x1024"}
BIG_BASE64_CHARS = 12 * 1024 * 1024
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def cheap() -> Iterator[SimulatedUpstream]:
    with simulated_upstream("cheap") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def dear() -> Iterator[SimulatedUpstream]:
    with simulated_upstream("dear") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def gateway(
    cheap: SimulatedUpstream,
    dear: SimulatedUpstream,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveGateway]:
    with gateway_before(tmp_path_factory.mktemp("openai"), cheap, dear) as gateway:
        yield gateway


@pytest.fixture
def tenant() -> str:
    return f"tenant-{next(NUMBERS)}"


@pytest.fixture
def client(gateway: LiveGateway, tenant: str) -> Iterator[httpx.Client]:
    """A client of a tenant of its own."""
    with gateway.client(gateway.tenant(tenant)) as client:
        yield client


@pytest.fixture(autouse=True)
def the_books_are_clean(gateway: LiveGateway) -> Iterator[None]:
    yield
    assert gateway.audit()["clean"]
    assert list((gateway.data_dir / "spool").iterdir()) == []


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def answered(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()


def attempts_of(gateway: LiveGateway, answer: httpx.Response) -> list[dict[str, Any]]:
    task_id = answer.headers["x-task-id"]
    explained = gateway.explained(task_id)
    attempts = explained["attempts"]
    assert isinstance(attempts, list)
    return attempts


def test_a_generation_is_charged_by_the_reported_usage_which_is_less_than_the_hold(
    gateway: LiveGateway, client: httpx.Client, cheap: SimulatedUpstream, tenant: str
) -> None:
    body = answered(client.post(GENERATIONS, json=FOX | {"quality": "low"}))

    bought = cheap.purchases()[-1]
    usage, reported = body["usage"], bought["usage"]
    assert (bought["operation"], bought["n"]) == ("generate", 1)
    assert usage["total_tokens"] == reported["total_tokens"]
    assert usage["estimated"] is False
    per_1k = {"text": Decimal("0.306"), "output": Decimal("1.836")}
    price = (
        reported["input_tokens"] * per_1k["text"]
        + reported["output_tokens"] * per_1k["output"]
    ) / 1000
    assert Decimal(str(usage["credits_used"])) == price
    assert usage["credits_used"] < usage["credits_reserved"]
    balance = gateway.balance(tenant)
    assert (Decimal(balance["spent"]), balance["held"]) == (price, "0")
    assert Decimal(balance["available"]) == 1000 - price


def test_references_and_mask_arrive_byte_for_byte(
    client: httpx.Client, cheap: SimulatedUpstream
) -> None:
    images = [file_of(RED), file_of(GREEN, "jpeg"), file_of(GREEN, "webp")]
    mask = mask_that_clears_the_left_half()
    files = [("image[]", (f"{i}.bin", image)) for i, image in enumerate(images)]

    body = answered(
        client.post(EDITS, data=FOX, files=[*files, ("mask", ("m.png", mask))])
    )

    bought = cheap.purchases()[-1]
    assert bought["operation"] == "edit"
    assert bought["references"] == [sha256(image) for image in images]
    assert bought["mask"] == sha256(mask)
    details = body["usage"]["input_tokens_details"]
    assert details == bought["usage"]["input_tokens_details"]


def test_data_urls_arrive_as_the_files_that_they_hold(
    client: httpx.Client, cheap: SimulatedUpstream
) -> None:
    red, mask = file_of(RED), mask_that_clears_the_left_half()
    urls = [
        "data:image/png;base64," + base64.b64encode(content).decode()
        for content in (red, mask)
    ]

    answered(
        client.post(
            EDITS,
            json=FOX
            | {"images": [{"image_url": urls[0]}], "mask": {"image_url": urls[1]}},
        )
    )
    later = answered(
        client.post(
            GENERATIONS, json=FOX | {"image_urls": urls[:1], "mask_url": urls[1]}
        )
    )

    assert ended(client, later["id"])["status"] == "completed"
    for bought in cheap.purchases()[-2:]:
        assert bought["operation"] == "edit"
        assert (bought["references"], bought["mask"]) == ([sha256(red)], sha256(mask))


def test_the_base64_of_an_answer_passes_through_unchanged(
    client: httpx.Client, cheap: SimulatedUpstream
) -> None:
    cheap.script({"answer": "big"})

    body = answered(client.post(GENERATIONS, json=FOX))

    sent = big_picture()
    assert len(sent) >= BIG_BASE64_CHARS
    assert body["data"][0]["b64_json"] == sent


@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_a_12_mb_answer_that_breaks_off_is_bought_elsewhere_unseen(
    gateway: LiveGateway,
    client: httpx.Client,
    cheap: SimulatedUpstream,
    dear: SimulatedUpstream,
    tenant: str,
    *,
    edits: bool,
) -> None:
    before = len(cheap.purchases()), len(dear.purchases())
    cheap.script({"answer": "big", "close": "mid_body"})
    dear.script({"answer": "big"})
    red = file_of(RED)

    if edits:
        answer = client.post(EDITS, data=FOX, files={"image": ("red.png", red)})
    else:
        answer = client.post(GENERATIONS, json=FOX)

    body = answered(answer)
    assert [item["b64_json"] for item in body["data"]] == [big_picture()]
    bought = cheap.purchases()[before[0] :], dear.purchases()[before[1] :]
    assert [len(purchases) for purchases in bought] == [1, 1]
    references = [sha256(red)] if edits else []
    assert [each[0]["references"] for each in bought] == [references] * 2
    first, second = attempts_of(gateway, answer)
    assert (first["upstream"], first["kind"]) == ("cheap", "timeout")
    assert (first["billed"], first["cost_usd"] > 0) == ("maybe", True)
    assert (second["upstream"], second["kind"]) == ("dear", None)
    balance = gateway.balance(tenant)
    assert balance["held"] == "0"
    assert float(balance["spent"]) == body["usage"]["credits_used"]


def test_a_refused_upload_is_sent_again_whole_to_the_next(
    gateway: LiveGateway,
    client: httpx.Client,
    cheap: SimulatedUpstream,
    dear: SimulatedUpstream,
) -> None:
    before = len(cheap.purchases())
    cheap.script({"status": 503, "body": {"error": {"message": "busy"}}})
    images = [file_of(RED), file_of(GREEN)]
    files = [("image[]", (f"{i}.png", image)) for i, image in enumerate(images)]

    answer = client.post(EDITS, data=FOX, files=files)

    answered(answer)
    assert len(cheap.purchases()) == before
    assert dear.purchases()[-1]["references"] == [sha256(image) for image in images]
    first, second = attempts_of(gateway, answer)
    assert (first["kind"], first["cost_usd"]) == ("overloaded", 0)
    assert second["upstream"] == "dear"


def test_a_stream_is_charged_with_its_partial_pictures(
    client: httpx.Client, cheap: SimulatedUpstream
) -> None:
    fields = FOX | {"stream": True, "partial_images": 2, "quality": "low"}
    plain = answered(client.post(GENERATIONS, json=FOX | {"quality": "low"}))

    answer = client.post(GENERATIONS, json=fields)

    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: ")
    ]
    names = re.findall(r"(?m)^event: (.*)$", answer.text)
    assert names == [event["type"] for event in events]
    assert names[-1] == "image_generation.completed"
    assert opened(events[-1]["b64_json"]).size == (1024, 1024)
    assert cheap.purchases()[-1]["stream"] is True
    extra = events[-1]["usage"]["output_tokens"] - plain["usage"]["output_tokens"]
    assert extra == 2 * 100


def test_a_stream_that_breaks_off_before_a_picture_is_whole_is_bought_elsewhere(
    gateway: LiveGateway,
    client: httpx.Client,
    cheap: SimulatedUpstream,
    dear: SimulatedUpstream,
) -> None:
    before = len(cheap.purchases()), len(dear.purchases())
    cheap.script({"close": "mid_body"})

    answer = client.post(GENERATIONS, json=FOX | {"stream": True})

    assert answer.status_code == 200
    assert answer.text.count("event: image_generation.completed") == 1
    assert "event: error" not in answer.text
    assert len(cheap.purchases()) - before[0] == 1
    assert len(dear.purchases()) - before[1] == 1
    assert [a["upstream"] for a in attempts_of(gateway, answer)] == ["cheap", "dear"]
