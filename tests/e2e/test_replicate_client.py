"""The official Replicate library, unmodified, before the simulated Replicate."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError

from tests.e2e.openai_upstreams import running_server
from tests.simulators.pictures import png
from tests.simulators.replicate_server import KEY

MODEL = "openai/gpt-image-2"
SIZE = {"3:2": (1536, 1024), "2:3": (1024, 1536)}


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with running_server("tests.simulators.replicate_server") as base_url:
        yield base_url.removesuffix("/v1")


@pytest.fixture
def client(base_url: str) -> Iterator[Client]:
    client = Client(api_token=KEY, base_url=base_url, trust_env=False)
    client.poll_interval = 0.01
    yield client
    client._client.close()


def picture(link: str) -> Image.Image:
    with urllib.request.urlopen(link, timeout=30) as opened:
        image = Image.open(io.BytesIO(opened.read()))
    image.load()
    return image


def purchases(base_url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{base_url}/_purchases", timeout=30) as opened:
        found: list[dict[str, Any]] = json.load(opened)
    return found


def test_it_generates(client: Client, base_url: str) -> None:
    asked = {"prompt": "a red fox", "aspect_ratio": "3:2", "number_of_images": 2}
    links = client.run(MODEL, input=asked)
    assert isinstance(links, list)
    assert [picture(link).size for link in links] == [SIZE["3:2"]] * 2
    assert picture(links[0]).format == "WEBP"
    assert purchases(base_url)[-1]["n"] == 2
    assert purchases(base_url)[-1]["billed"]


def test_it_generates_without_holding_the_call_open(client: Client) -> None:
    asked = {"prompt": "a red fox", "aspect_ratio": "2:3", "output_format": "png"}
    made = client.predictions.create(model=MODEL, input=asked)
    seen = [made.status]
    made.wait()
    seen.append(made.status)
    assert seen == ["starting", "succeeded"]
    assert made.output is not None
    assert picture(made.output[0]).size == SIZE["2:3"]


@pytest.mark.parametrize("strategy", ["url", "base64"])
def test_it_edits(strategy: Any, client: Client, base_url: str, tmp_path: Path) -> None:
    file = tmp_path / "reference.png"
    file.write_bytes(png(64, 32))
    with file.open("rb") as opened:
        links = client.run(
            MODEL,
            input={"prompt": "in snow", "input_images": [opened]},
            file_encoding_strategy=strategy,
        )
    assert isinstance(links, list)
    assert picture(links[0]).size == (1024, 1024)
    bought = purchases(base_url)[-1]
    assert bought["operation"] == "edit"
    assert bought["references"] == [hashlib.sha256(png(64, 32)).hexdigest()]


def test_it_keeps_files(client: Client) -> None:
    kept = client.files.create(io.BytesIO(b"a file"), filename="a.png")
    assert (kept.size, kept.content_type) == (6, "image/png")
    assert client.files.get(kept.id).urls == kept.urls


def test_it_stops_a_prediction(client: Client) -> None:
    made = client.predictions.create(model=MODEL, input={"prompt": "x"})
    made.reload()
    seen = [made.status]
    made.cancel()
    seen.append(made.status)
    assert seen == ["processing", "canceled"]


def test_it_understands_why_not(client: Client, base_url: str) -> None:
    with pytest.raises(ModelError, match="flagged as sensitive"):
        client.run(MODEL, input={"prompt": "[moderate]"})
    assert not purchases(base_url)[-1]["billed"]
    data_uri = f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"
    with pytest.raises(ModelError, match="E006"):
        client.run(MODEL, input={"prompt": "x", "input_images": [data_uri]})
    with pytest.raises(ReplicateError) as wrong:
        client.run(MODEL, input={"prompt": "x", "aspect_ratio": "5:4"})
    assert wrong.value.status == 422
    assert "aspect_ratio" in str(wrong.value.detail)
    stranger = Client(api_token="r8_no", base_url=base_url, trust_env=False)
    with pytest.raises(ReplicateError) as unknown:
        stranger.run(MODEL, input={"prompt": "x"})
    assert unknown.value.status == 401
    stranger._client.close()
