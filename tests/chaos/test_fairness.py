"""A tenant with a long queue, and another that comes with one task."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import httpx
import pytest

from gateway.adapters.sql import tasks as sql_tasks
from gateway.core.tasks import QUEUE_MAX_TASKS
from tests.chaos.stages import opened
from tests.e2e.gateways import LiveGateway
from tests.e2e.test_tasks import ended, made

LATENCY_MS = 1_000
SANDBOX = f"""
[[upstream]]
name = "sandbox"
kind = "sandbox"
options = {{ latency_ms = {LATENCY_MS} }}
max_concurrent = 8

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = 0.01 }}
"""


def taken_s(client: httpx.Client, tries: int) -> list[float]:
    """Make tasks one after the other; returns how long each took."""
    took = []
    for _ in range(tries):
        begun_s = time.monotonic()
        assert ended(client, made(client)["id"])["status"] == "completed"
        took.append(time.monotonic() - begun_s)
    return took


def test_a_tenant_waits_at_most_twice_as_long_beside_a_long_queue_of_another(
    tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued, tries = 500, 3
    if whole:
        queued, tries = QUEUE_MAX_TASKS, 5
        # A tenant may queue a tenth of that; this is the worst that all may do to one.
        monkeypatch.setattr(sql_tasks, "QUEUE_MAX_TASKS_PER_TENANT", queued)
    config = tmp_path / "gateway.toml"
    config.write_text(SANDBOX)
    with LiveGateway(tmp_path / "data", config=config) as gateway:
        gateway.tenant("greedy", "100000")
        with gateway.client(gateway.tenant("modest")) as client:
            alone_s = statistics.mean(taken_s(client, tries))
            asyncio.run(opened(config, gateway.data_dir, "greedy", queued))
            beside_s = statistics.mean(taken_s(client, tries))
            left = gateway.cli("tasks", "list", "--tenant", "greedy", "--json").json
        gateway.kill()

    print(  # noqa: T201 - figures, where somebody asks for them
        f"{queued} queued: {alone_s:.2f} s alone, {beside_s:.2f} s beside"
    )
    assert any(line["status"] == "pending" for line in left)
    assert beside_s <= 2 * alone_s
