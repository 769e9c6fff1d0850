"""A gateway before a simulated Replicate, configured as its guide says."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.gateways import LiveGateway, configured
from tests.e2e.guides import first_example
from tests.e2e.openai_upstreams import SimulatedUpstream, running_server
from tests.simulators.pictures import png
from tests.simulators.replicate_server import KEY

FOX = {"model": "gpt-image-2", "prompt": "a red fox", "size": "1536x1024", "n": 2}


@pytest.fixture(scope="module")
def upstream() -> Iterator[SimulatedUpstream]:
    with running_server("tests.simulators.replicate_server") as base_url:
        yield SimulatedUpstream("replicate", base_url)


@pytest.fixture(scope="module")
def gateway(
    upstream: SimulatedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("replicate")
    told = "https://api.replicate.com/v1"
    config = first_example("replicate", told=told, at=upstream.base_url)
    with configured(folder, config, REPLICATE_API_TOKEN=KEY) as gateway:
        yield gateway


def picture(item: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def test_pictures_are_bought_once_and_charged_by_the_formula(
    gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    with gateway.client(gateway.tenant("generating")) as client:
        answer = client.post("/v1/images/generations", json=FOX)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert [picture(item).size for item in made["data"]] == [(1536, 1024)] * 2
    assert made["usage"]["output_tokens"] > 0
    bought = upstream.purchases()[-1]
    assert (bought["n"], bought["aspect_ratio"], bought["billed"]) == (2, "3:2", True)
    assert gateway.audit()["clean"]


def test_an_edit_is_bought_there_too(
    gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    with gateway.client(gateway.tenant("editing")) as client:
        answer = client.post(
            "/v1/images/edits",
            data={"model": "gpt-image-2", "prompt": "snow", "size": "1024x1024"},
            files={"image": ("a.png", png(640, 320), "image/png")},
        )
    assert answer.status_code == 200, answer.text
    assert upstream.purchases()[-1]["operation"] == "edit"


def test_what_cannot_be_made_there_is_not_bought(
    gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    before = len(upstream.purchases())
    with gateway.client(gateway.tenant("asking")) as client:
        body = FOX | {"size": "1600x1600"}
        answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code >= 400
    assert len(upstream.purchases()) == before


def test_a_refused_prompt_costs_nothing(
    gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    with gateway.client(gateway.tenant("refused", "100")) as client:
        body = FOX | {"prompt": "[moderate] a fox"}
        answer: httpx.Response = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert KEY not in answer.text
    assert not upstream.purchases()[-1]["billed"]
    assert gateway.balance("refused")["spent"] in {"0", "0.000000000"}
