"""The official fal client before the simulator: what the simulator says is no fancy.

The client is pointed at another host by its environment, which it reads as it is
imported: it runs in a process of its own. It knows no other scheme than https, so that
one word of its address is changed; all the rest is as it comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.gateways import ROOT
from tests.e2e.openai_upstreams import running_server
from tests.simulators.fal_server import KEY
from tests.simulators.pictures import png

CLIENT_MAX_S = 60
OPENING = """
import json, sys
import fal_client
from fal_client import client
client.QUEUE_URL_FORMAT = client.QUEUE_URL_FORMAT.replace("https:", "http:")
given = json.loads(sys.argv[1])
"""
SUBSCRIBE = """
seen = []
result = fal_client.subscribe(
    given["endpoint"],
    arguments=given["arguments"],
    on_queue_update=lambda update: seen.append(type(update).__name__),
)
print(json.dumps({"result": result, "seen": seen}))
"""
EDIT = """
picture = fal_client.encode_file(given["file"])
handle = fal_client.submit(
    given["endpoint"],
    arguments={**given["arguments"], "image_urls": [picture]},
    start_timeout=30,
)
again = fal_client.SyncClient().get_handle(given["endpoint"], handle.request_id)
assert again.status_url == handle.status_url, (again.status_url, handle.status_url)
print(json.dumps({"result": fal_client.result(given["endpoint"], handle.request_id)}))
"""
FAIL = """
try:
    fal_client.subscribe(given["endpoint"], arguments=given["arguments"])
except fal_client.FalClientHTTPError as error:
    told = {"status": error.status_code, "type": error.error_type}
    told["message"] = error.message
    print(json.dumps(told))
"""
CANCEL = """
handle = fal_client.submit(given["endpoint"], arguments=given["arguments"])
handle.cancel()
for _ in handle.iter_events():
    pass
try:
    handle.cancel()
except fal_client.FalClientHTTPError as error:
    print(json.dumps({"status": error.status_code, "body": error.response.json()}))
"""


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    with running_server("tests.simulators.fal_server") as base_url:
        yield base_url


def run(
    simulator: str, script: str, endpoint: str, *, key: str = KEY, **given: Any
) -> Any:
    """Run a script with the client, and read what it prints."""
    env = {
        "PATH": os.environ["PATH"],
        "FAL_KEY": key,
        "FAL_QUEUE_RUN_HOST": urlsplit(simulator).netloc,
    }
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            OPENING + script,
            json.dumps({"endpoint": endpoint, **given}),
        ],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=CLIENT_MAX_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def purchases(simulator: str) -> list[dict[str, Any]]:
    found = httpx.get(f"{simulator}/_purchases").json()
    assert isinstance(found, list)
    return found


def test_the_official_client_makes_a_picture(simulator: str) -> None:
    size = {"width": 592, "height": 176}
    told = run(
        simulator,
        SUBSCRIBE,
        "openai/gpt-image-2",
        arguments={"prompt": "a red fox", "image_size": size, "quality": "low"},
    )
    assert told["seen"] == ["InProgress", "Completed"]
    (image,) = told["result"]["images"]
    assert (image["width"], image["height"]) == (592, 176)
    file = httpx.get(image["url"])
    assert file.headers["content-type"] == image["content_type"] == "image/png"
    assert file.content.startswith(b"\x89PNG")
    bought = purchases(simulator)[-1]
    assert (bought["operation"], bought["size"]) == ("generate", "592x176")


def test_the_official_client_edits_a_picture(simulator: str, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(png(64, 32))
    told = run(
        simulator,
        EDIT,
        "openai/gpt-image-2/edit",
        arguments={"prompt": "make it blue", "quality": "low"},
        file=str(file),
    )
    assert len(told["result"]["images"]) == 1
    bought = purchases(simulator)[-1]
    assert bought["operation"] == "edit"
    assert bought["references"] == [hashlib.sha256(png(64, 32)).hexdigest()]


def test_the_official_client_reads_the_errors(simulator: str) -> None:
    model = "openai/gpt-image-2"
    bought = len(purchases(simulator))
    refused = run(simulator, FAIL, model, arguments={"prompt": "[moderate] x"})
    assert (refused["status"], refused["type"]) == (422, None)
    assert refused["message"][0]["type"] == "content_policy_violation"
    fault = {
        "on": "run",
        "status": 500,
        "body": {"detail": "no", "error_type": "runner_server_error"},
    }
    httpx.post(f"{simulator}/_script", json=[fault]).raise_for_status()
    broken = run(simulator, FAIL, model, arguments={"prompt": "x"})
    assert broken == {"status": 500, "type": "runner_server_error", "message": "no"}
    stranger = run(simulator, FAIL, model, key="no:key", arguments={"prompt": "x"})
    assert stranger["status"] == 401
    assert len(purchases(simulator)) == bought


def test_the_official_client_cancels(simulator: str) -> None:
    told = run(simulator, CANCEL, "openai/gpt-image-2", arguments={"prompt": "x"})
    assert told == {"status": 400, "body": {"status": "ALREADY_COMPLETED"}}
