"""The official client before our simulated resource, and the example of the guide."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from tests.e2e.gateways import configured
from tests.e2e.guides import first_example
from tests.e2e.openai_upstreams import running_server
from tests.simulators.azure_server import (
    KEY,
    TOKEN,
    AzureSimulator,
)
from tests.simulators.pictures import png
from tests.simulators.server import served

VERSION = "2025-04-01-preview"
PICTURE = ("fox.png", png(64, 32), "image/png")
MASK = ("mask.png", png(64, 32, clear=True), "image/png")


def client_of(simulator: AzureSimulator, **credential: Any) -> openai.AzureOpenAI:
    return openai.AzureOpenAI(
        azure_endpoint=simulator.base_url,
        api_version=VERSION,
        max_retries=0,
        **credential or {"api_key": KEY},
    )


def size_of(answer: ImagesResponse) -> tuple[int, int]:
    checked = ImagesResponse.model_validate(answer.model_dump(), strict=True)
    assert checked.data is not None
    text = checked.data[0].b64_json
    assert text is not None
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        image.load()
        return image.size


@pytest.mark.parametrize(
    "credential", [{"api_key": KEY}, {"azure_ad_token": TOKEN}], ids=["key", "token"]
)
async def test_the_client_completes_a_generation_and_an_edit(
    credential: dict[str, str],
) -> None:
    async with served(AzureSimulator(lenient=True)) as simulator:
        with client_of(simulator, **credential) as client:
            made = await asyncio.to_thread(
                client.images.generate,
                model="prod-pictures",
                prompt="a fox",
                size="1024x1024",
                quality="low",
            )
            edited = await asyncio.to_thread(
                client.images.edit,
                model="prod-pictures",
                prompt="a fox",
                image=[PICTURE, PICTURE],
                mask=MASK,
                size="1024x1024",
                quality="low",
            )
        bought = simulator.purchases
    assert size_of(made) == size_of(edited) == (1024, 1024)
    assert made.usage is not None
    assert made.usage.output_tokens == 196
    assert [purchase.operation for purchase in bought] == ["generate", "edit"]
    assert len(bought[1].references) == 2
    assert bought[1].mask == hashlib.sha256(MASK[1]).hexdigest()


async def test_the_client_reads_a_stream() -> None:
    async with served(AzureSimulator(lenient=True)) as simulator:
        with client_of(simulator) as client:

            def watch() -> list[str]:
                with client.images.generate(
                    model="gpt-image-2", prompt="x", stream=True, partial_images=2
                ) as stream:
                    return [event.type for event in stream]

            kinds = await asyncio.to_thread(watch)
    partial = "image_generation.partial_image"
    assert kinds == [partial, partial, "image_generation.completed"]


async def test_the_client_for_openai_reaches_the_v1_form_with_a_token() -> None:
    async with served(AzureSimulator()) as simulator:
        with openai.OpenAI(
            base_url=f"{simulator.base_url}/openai/v1", api_key=TOKEN, max_retries=0
        ) as client:
            made = await asyncio.to_thread(
                client.images.generate, model="gpt-image-2", prompt="a fox"
            )
            edited = await asyncio.to_thread(
                client.images.edit, model="gpt-image-2", prompt="a", image=PICTURE
            )
    assert size_of(made) == size_of(edited) == (1024, 1024)


async def test_the_client_knows_the_refusals() -> None:
    async with served(AzureSimulator()) as simulator:
        with client_of(simulator) as client, client_of(simulator, api_key="x") as other:
            generate = client.images.generate

            # The client leaves the model in the body, which a strict resource minds.
            with pytest.raises(openai.NotFoundError) as missing:
                await asyncio.to_thread(generate, model="gpt-image-2", prompt="x")
            assert missing.value.code == "DeploymentNotFound"

            simulator.lenient = True
            with pytest.raises(openai.BadRequestError) as filtered:
                await asyncio.to_thread(
                    generate, model="gpt-image-2", prompt="[moderate]"
                )
            assert filtered.value.code == "contentFilter"

            with pytest.raises(openai.AuthenticationError):
                await asyncio.to_thread(
                    other.images.generate, model="gpt-image-2", prompt="x"
                )

            simulator.blocked = True
            with pytest.raises(openai.PermissionDeniedError):
                await asyncio.to_thread(generate, model="gpt-image-2", prompt="x")
    assert not simulator.purchases


# --- the example of the guide ---


@pytest.fixture(scope="module")
def resource() -> Iterator[str]:
    with running_server("tests.simulators.azure_server") as base_url:
        yield base_url


@pytest.mark.parametrize("source", ["credential", "token_file", "token_command"])
def test_the_example_of_the_guide_runs(
    source: str, resource: str, tmp_path: Path
) -> None:
    kept = tmp_path / "token"
    kept.write_text(TOKEN)
    given = {"token_file": str(kept), "token_command": ["cat", str(kept)]}
    told = "https://my-resource.openai.azure.com"
    written = first_example("azure", told=told, at=resource)
    if source in given:
        lines = [line for line in written.splitlines() if "credential" not in line]
        written = "\n".join(lines).replace(
            "options = {", f"options = {{ {source} = {json.dumps(given[source])},"
        )
    before = len(bought(resource))
    with configured(tmp_path, written, AZURE_OPENAI_API_KEY=KEY) as gateway:
        key = gateway.tenant("azure", "1000")
        with openai.OpenAI(
            base_url=f"{gateway.url}/v1", api_key=key, max_retries=0
        ) as client:
            made = client.images.generate(
                model="gpt-image-2", prompt="a fox", size="1024x1024", quality="low"
            )
            edited = client.images.edit(
                model="gpt-image-2",
                prompt="a fox",
                image=PICTURE,
                mask=MASK,
                size="1024x1024",
                quality="low",
            )
        logs = "".join(gateway.logs)
    assert size_of(made) == size_of(edited) == (1024, 1024)
    assert [one["operation"] for one in bought(resource)[before:]] == [
        "generate",
        "edit",
    ]
    assert TOKEN not in logs
    assert KEY not in logs


def bought(resource: str) -> list[dict[str, Any]]:
    found = httpx.get(resource + "/_purchases").json()
    assert isinstance(found, list)
    return found
