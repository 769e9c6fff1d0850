"""A gateway before a simulated OpenRouter: what it books is what was charged."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import LiveGateway, configured
from tests.e2e.openai_upstreams import running_server
from tests.e2e.pictures import RED, file_of, opened
from tests.simulators.openrouter_server import KEY

FOX = {"model": "gpt-image-2", "prompt": "a red fox", "size": "1024x1024"}
CONFIG = """
[[upstream]]
name = "openrouter"
kind = "openrouter"
base_url = "{base_url}"
credential = "env:OPENROUTER_API_KEY"
failure_domain = "openai"

[[upstream.offer]]
variant = "gpt-image-2"
model = "openai/gpt-image-2"
cost = {{ per = "image", flat = 0.5 }}
"""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with running_server("tests.simulators.openrouter_server") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def gateway(
    base_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("openrouter")
    config = CONFIG.format(base_url=base_url)
    with configured(folder, config, OPENROUTER_API_KEY=KEY) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with gateway.client(gateway.tenant("tenant")) as client:
        yield client


def last_purchase(base_url: str) -> dict[str, Any]:
    origin = base_url.removesuffix("/api/v1")
    bought = httpx.get(f"{origin}/_purchases").json()[-1]
    assert isinstance(bought, dict)
    return bought


@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_the_books_have_the_dollars_that_were_charged(
    gateway: LiveGateway, client: httpx.Client, base_url: str, *, edits: bool
) -> None:
    if edits:
        files = {"image": ("red.png", file_of(RED))}
        answer = client.post("/v1/images/edits", data=FOX, files=files)
    else:
        answer = client.post("/v1/images/generations", json=FOX)
    assert answer.status_code == 200, answer.text

    body, bought = answer.json(), last_purchase(base_url)
    assert opened(body["data"][0]["b64_json"]).size == (1024, 1024)
    assert bool(bought["references"]) is edits
    explained = gateway.cli("routes", "explain", answer.headers["x-task-id"], "--json")
    (attempt,) = explained.json["attempts"]
    assert Decimal(str(attempt["cost_usd"])) == Decimal(bought["cost_usd"])
    # At OpenAI's list prices the tokens, split as expected, come to the very same.
    details = body["usage"]["input_tokens_details"]
    tokens = (
        details["text_tokens"] * 5
        + details["image_tokens"] * 8
        + body["usage"]["output_tokens"] * 30
    )
    assert Decimal(tokens) / 10**6 == Decimal(bought["cost_usd"])
    assert body["usage"]["estimated"] is False
    assert gateway.audit()["clean"]
