"""The disk for pictures fills up while a task is under way."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.gateways import LiveGateway
from tests.e2e.test_tasks import BODY, LATER, NAMES, PATH, ended, made

SIZE_MIB = 300
"""A little more than the gateway wants to see free."""


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    """A small disk, where pictures are stored."""
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder))
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(("umount", str(folder)), check=True)


def test_a_task_whose_pictures_cannot_be_stored_is_free_and_everyone_is_told(
    results: Path,
) -> None:
    with LiveGateway(results.parent) as gateway:
        gateway.sandbox(NAMES[0], latency_ms=1_500)
        with gateway.client(gateway.tenant("unlucky")) as client:
            ready = f"{gateway.url}/health/ready"
            before = httpx.get(ready)
            task_id = made(client)["id"]
            time.sleep(0.5)  # so that it is under way
            fill(results / "filling")
            task = ended(client, task_id)
            during = httpx.get(ready)
            refused = client.post(PATH, json=BODY, headers=LATER)
            (results / "filling").unlink()
            after = httpx.get(ready)
            later = ended(client, made(client)["id"])

        assert (before.status_code, after.status_code) == (200, 200)
        assert task["status"] == "failed"
        assert task["error"]["code"] == "service_unavailable"
        assert task["usage"]["credits_used"] == 0
        assert during.status_code == 503
        assert "MiB free" in during.json()["checks"]["disk"]
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "storage_unavailable"
        assert later["status"] == "completed"
        assert gateway.balance("unlucky")["held"] == "0"
        assert gateway.audit()["clean"]


def fill(path: Path) -> None:
    """Write until nothing more can be written."""
    with path.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024 * 1024))
