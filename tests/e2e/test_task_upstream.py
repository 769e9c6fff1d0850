"""A gateway before a simulated EvoLink: submitted once, looked at, and fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import LiveGateway, configured
from tests.e2e.openai_upstreams import running_server
from tests.simulators.pictures import png
from tests.simulators.task_server import KEY

CONFIG = """
[[upstream]]
name = "evolink"
kind = "task_api"
base_url = "{base_url}"
credential = "env:SIMULATED_KEY"
options = {{ poll_after_ms = 200 }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"

[upstream.offer.cost]
per = "1M tokens"
text_input = 4.5
text_cached = 1.125
image_input = 7.2
image_cached = 1.8
image_output = 27.0
"""
FOX = {"model": "gpt-image-2", "prompt": "a red fox", "size": "1024x1024"}


@pytest.fixture(scope="module")
def evolink() -> Iterator[str]:
    with running_server("tests.simulators.task_server") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def gateway(
    evolink: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("task")
    config = CONFIG.format(base_url=evolink)
    with configured(folder, config, SIMULATED_KEY=KEY) as gateway:
        yield gateway


def asked(gateway: LiveGateway, path: str, **request: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {gateway.first_key}"}
    answer = httpx.post(gateway.url + path, headers=headers, timeout=60, **request)
    assert answer.status_code == 200, answer.text
    return answer


def purchases(evolink: str) -> list[dict[str, Any]]:
    found = httpx.get(evolink.removesuffix("/v1") + "/_purchases").json()
    assert isinstance(found, list)
    return found


def test_a_picture_is_bought_once_with_a_key_of_its_own(
    gateway: LiveGateway, evolink: str
) -> None:
    before = len(purchases(evolink))
    answer = asked(
        gateway,
        "/v1/images/generations",
        json=FOX | {"n": 2, "response_format": "b64_json"},
    )

    files = [base64.b64decode(one["b64_json"]) for one in answer.json()["data"]]
    assert [file[:8] for file in files] == [b"\x89PNG\r\n\x1a\n"] * 2
    bought = purchases(evolink)[before:]
    task_id = answer.headers["x-task-id"]
    assert {one["idempotency_key"] for one in bought} == {
        f"imageway.{task_id}.1",
        f"imageway.{task_id}.2",
    }
    assert {one["charge"] for one in bought} == {"charged"}


def test_an_edit_hands_its_references_over(gateway: LiveGateway, evolink: str) -> None:
    before = len(purchases(evolink))
    asked(
        gateway,
        "/v1/images/edits",
        data=FOX,
        files=[
            ("image[]", ("a.png", png(64, 32), "image/png")),
            ("image[]", ("b.png", png(32, 64), "image/png")),
        ],
    )

    (bought,) = purchases(evolink)[before:]
    assert bought["operation"] == "edit"
    assert len(bought["references"]) == 2
