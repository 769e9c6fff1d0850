"""The official JavaScript clients, unmodified, pointed at a live gateway.

``make test`` installs them from ``tests/clients/package-lock.json``. The scripts there
do what an app does and tell what they saw; the tests here look at that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gateways import ROOT, LiveGateway
from tests.e2e.openai_upstreams import gateway_before, simulated_upstream
from tests.e2e.pictures import (
    GREEN,
    PATCHES,
    RED,
    alike,
    file_of,
    mask_that_clears_the_left_half,
    opened,
)

CLIENTS = ROOT / "tests" / "clients"
SCRIPT_MAX_S = 60
PROVIDERS = ("openai", "compatible")


@pytest.fixture(scope="module")
def node() -> str:
    """The program that runs the scripts. In CI it has to be there."""
    found = shutil.which("node")
    installed = (CLIENTS / "node_modules" / "openai").is_dir()
    if found is not None and installed:
        return found
    why = "node is not installed" if found is None else "the clients are not installed"
    if os.environ.get("CI"):
        pytest.fail(f"{why}: CI needs Node 20 or newer and `make test`")
    pytest.skip(f"{why}: with Node 20 or newer, `make test` installs the clients")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the scripts send."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "red.png").write_bytes(file_of(RED))
    (folder / "green.webp").write_bytes(file_of(GREEN, "webp"))
    (folder / "mask.png").write_bytes(mask_that_clears_the_left_half())
    return folder


def seen_by(
    script: str, node: str, gateway: LiveGateway, key: str, pictures: Path
) -> Any:
    """Run a script to its end; returns what it saw."""
    env = os.environ | {
        "IMAGEWAY_URL": gateway.url,
        "IMAGEWAY_KEY": key,
        "IMAGEWAY_PICTURES": str(pictures),
    }
    done = subprocess.run(
        [node, str(CLIENTS / script)],
        capture_output=True,
        text=True,
        timeout=SCRIPT_MAX_S,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def openai_node(node: str, shared_gateway: LiveGateway, pictures: Path) -> Any:
    key = shared_gateway.tenant("openai-node", "100000")
    return seen_by("openai.mjs", node, shared_gateway, key, pictures)


@pytest.fixture(scope="module")
def ai_sdk(node: str, shared_gateway: LiveGateway, pictures: Path) -> Any:
    key = shared_gateway.tenant("ai-sdk", "100000")
    return seen_by("ai.mjs", node, shared_gateway, key, pictures)


# --- openai-node ---


def test_openai_node_gets_pictures_inside_and_as_links(openai_node: Any) -> None:
    inside, link = openai_node["inside"], openai_node["link"]

    assert opened(inside["data"][0]["b64_json"]).size == (1024, 1024)
    assert inside["usage"]["total_tokens"] > 0
    assert "b64_json" not in link["data"][0]
    with urllib.request.urlopen(link["data"][0]["url"], timeout=30) as picture:
        assert picture.read().startswith(b"\x89PNG")


def test_openai_node_edits_one_file_and_several_with_a_mask(openai_node: Any) -> None:
    one, several = openai_node["one"], openai_node["several"]

    plain = opened(one["data"][0]["b64_json"])
    masked = [opened(item["b64_json"]) for item in several["data"]]
    assert alike(plain, (100, 900), RED)
    assert one["usage"]["input_tokens_details"]["image_tokens"] == PATCHES
    assert [image.format for image in masked] == ["JPEG"] * 2
    for image in masked:
        assert not alike(image, (100, 500), RED)
        assert alike(image, (900, 900), RED)
        assert alike(image, (30, 990), GREEN)


def test_openai_node_streams_both_routes(openai_node: Any) -> None:
    for name, kind, looks in (
        ("generated", "image_generation", 2),
        ("edited", "image_edit", 3),
    ):
        events = openai_node[name]
        types = [f"{kind}.partial_image"] * looks + [f"{kind}.completed"]
        assert [event["type"] for event in events] == types
        indexes = [event.get("partial_image_index") for event in events]
        assert indexes == [*range(looks), None]
        assert events[-1]["usage"]["total_tokens"] > 0
        assert {opened(event["b64_json"]).size for event in events} == {(1024, 1024)}


@pytest.mark.parametrize(
    ("case", "name", "status", "code", "param"),
    [
        ("size", "BadRequestError", 400, "invalid_value", "size"),
        ("stream", "NotFoundError", 404, "model_not_found", "model"),
        ("key", "AuthenticationError", 401, "invalid_api_key", None),
        ("mask", "BadRequestError", 400, "invalid_image", "mask"),
    ],
)
def test_openai_node_throws_typed_errors(
    openai_node: Any, case: str, name: str, status: int, code: str, param: str | None
) -> None:
    failure = openai_node["failures"][case]

    told = tuple(failure[key] for key in ("name", "status", "code", "param"))
    assert told == (name, status, code, param)


def test_openai_node_throws_what_breaks_a_stream_off(
    node: str, pictures: Path, tmp_path: Path
) -> None:
    busy = {"message": "Busy.", "type": "server_error", "param": None, "code": None}
    with (
        simulated_upstream("simulated") as upstream,
        gateway_before(tmp_path, upstream) as gateway,
    ):
        upstream.script({"answer": "error_event", "body": busy})
        key = gateway.tenant("node")
        seen = seen_by("broken_stream.mjs", node, gateway, key, pictures)
        balance = gateway.balance("node")

    assert seen["events"] == ["image_generation.partial_image"] * 2
    assert seen["error"]["name"] == "APIError"
    assert seen["error"]["code"] == "service_unavailable"
    assert balance == {"available": "1000", "held": "0", "spent": "0"}


# --- Vercel AI SDK ---


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_generates(ai_sdk: Any, provider: str) -> None:
    plain, several = ai_sdk[provider]["plain"], ai_sdk[provider]["several"]

    assert (plain["warnings"], several["warnings"]) == ([], [])
    assert [p["media_type"] for p in plain["pictures"]] == ["image/png"]
    images = [opened(p["b64_json"]) for p in several["pictures"]]
    assert [image.size for image in images] == [(1024, 1024)] * 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_edits_files_with_a_mask(ai_sdk: Any, provider: str) -> None:
    one, masked = (
        opened(ai_sdk[provider][name]["pictures"][0]["b64_json"])
        for name in ("one", "masked")
    )

    assert alike(one, (100, 900), RED)
    assert not alike(masked, (100, 500), RED)
    assert alike(masked, (900, 900), RED)
    assert alike(masked, (30, 990), GREEN)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_ai_sdk_throws_a_call_error_that_says_what_is_wrong(
    ai_sdk: Any, provider: str
) -> None:
    failure = ai_sdk[provider]["failure"]

    assert (failure["name"], failure["status"]) == ("APICallError", 400)
    assert "multiple of 16" in failure["message"]
