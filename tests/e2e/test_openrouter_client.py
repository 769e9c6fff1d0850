"""OpenRouter's own library, unmodified, pointed at our simulator of OpenRouter.

Runs where the library is installed (``openrouter``): it is no dependency of ours.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.simulators.openrouter_server import (
    KEY,
    OpenRouterSimulator,
)
from tests.simulators.pictures import png
from tests.simulators.server import Fault, served

openrouter: Any = pytest.importorskip("openrouter")

FOX = {
    "model": "openai/gpt-image-2",
    "prompt": "a red fox",
    "quality": "low",
    "size": "64x32",
}


@pytest.fixture
async def simulator() -> AsyncIterator[OpenRouterSimulator]:
    async with served(OpenRouterSimulator()) as simulator:
        yield simulator


async def generate(simulator: OpenRouterSimulator, **more: Any) -> Any:
    url = simulator.base_url
    async with openrouter.OpenRouter(api_key=KEY, server_url=url) as client:
        answer = await client.images.generate_async(**FOX, **more, retries=None)
        return [one async for one in answer] if more.get("stream") else answer


async def test_it_generates(simulator: OpenRouterSimulator) -> None:
    answer = await generate(simulator, n=2)
    files = [base64.b64decode(one.b64_json) for one in answer.data]
    assert files == [png(64, 32)] * 2
    assert answer.data[0].media_type == "image/png"
    assert str(answer.usage.cost) == simulator.purchases[0].cost_usd.rstrip("0")


async def test_it_edits(simulator: OpenRouterSimulator) -> None:
    file = png(64, 32, padding=1)
    url = "data:image/png;base64," + base64.b64encode(file).decode()
    reference = {"type": "image_url", "image_url": {"url": url}}
    answer = await generate(simulator, input_references=[reference])
    assert base64.b64decode(answer.data[0].b64_json) == png(64, 32)
    (bought,) = simulator.purchases
    assert bought.references == (hashlib.sha256(file).hexdigest(),)


async def test_it_streams(simulator: OpenRouterSimulator) -> None:
    events = await generate(simulator, stream=True)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 3 + ["text_chunk", "completed"]
    assert base64.b64decode(events[-1].b64_json) == png(64, 32)
    assert events[-1].usage.cost > 0


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (402, "PaymentRequiredResponseError"),
        (524, "EdgeNetworkTimeoutResponseError"),
        (529, "ProviderOverloadedResponseError"),
    ],
)
async def test_it_knows_our_errors(
    simulator: OpenRouterSimulator, status: int, name: str
) -> None:
    body = {"error": {"code": status, "message": "no"}}
    simulator.script(Fault(status=status, body=body))
    with pytest.raises(getattr(openrouter.errors, name)):
        await generate(simulator)
