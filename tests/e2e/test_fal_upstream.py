"""A gateway before a simulated fal, set up as the documentation says."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.gateways import LiveGateway, configured
from tests.e2e.guides import first_example
from tests.e2e.openai_upstreams import running_server
from tests.simulators.fal_server import KEY
from tests.simulators.pictures import png

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
FOX = {"prompt": "a red fox", "size": "1024x1024", "quality": "low"}


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    with running_server("tests.simulators.fal_server") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def gateway(
    simulator: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("fal")
    config = first_example("fal", told="https://queue.fal.run", at=simulator)
    with configured(folder, config, FAL_KEY=KEY) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with gateway.client(gateway.tenant("tenant")) as client:
        yield client


def purchases(simulator: str) -> list[dict[str, object]]:
    found = httpx.get(f"{simulator}/_purchases").json()
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize(
    ("variant", "endpoint"),
    [
        ("gpt-image-2", "openai/gpt-image-2"),
        ("gpt-image-2.5-flare", "openai/gpt-image-2.5/flare/text-to-image"),
    ],
)
def test_a_picture_is_made_and_charged_by_its_tokens(
    simulator: str,
    client: httpx.Client,
    gateway: LiveGateway,
    variant: str,
    endpoint: str,
) -> None:
    answer = client.post(GENERATIONS, json=FOX | {"model": variant})
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    assert base64.b64decode(item["b64_json"]).startswith(b"\x89PNG")
    bought = purchases(simulator)[-1]
    assert bought["endpoint"] == endpoint
    assert isinstance(bought["usage"], dict)
    told = answer.json()["usage"]
    assert told["total_tokens"] == bought["usage"]["total_tokens"]
    assert told["estimated"] is False
    assert gateway.audit()["clean"]


def test_an_edit_is_made(simulator: str, client: httpx.Client) -> None:
    file = ("fox.png", png(64, 32), "image/png")
    fields = FOX | {"model": "gpt-image-2"}
    answer = client.post(EDITS, data=fields, files={"image": file})
    assert answer.status_code == 200, answer.text
    assert purchases(simulator)[-1]["endpoint"] == "openai/gpt-image-2/edit"


def test_a_refused_prompt_is_told_and_not_bought(
    simulator: str, client: httpx.Client
) -> None:
    before = len(purchases(simulator))
    prompt = {"model": "gpt-image-2", "prompt": "[moderate] x"}
    answer = client.post(GENERATIONS, json=FOX | prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "moderation_blocked"
    assert len(purchases(simulator)) == before
