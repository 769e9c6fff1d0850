"""What clients meet when every slot is taken and the room has no place for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.gateways import LiveGateway

LATENCY_MS = 4_000
CONFIG = f"""
[[upstream]]
name = "sandbox"
kind = "sandbox"
options = {{ latency_ms = {LATENCY_MS} }}
max_concurrent = 1

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = 0.01 }}
"""
BODY = {"model": "gpt-image-2", "prompt": "a queue", "size": "3:1", "quality": "low"}
PATH = "/v1/images/generations"
ONE_WAITS = "room=2"
"""Of a tenant that is alone: half of the room."""


@pytest.fixture
def full(tmp_path: Path) -> Iterator[LiveGateway]:
    """A gateway whose only slot is taken, and for which one more request waits."""
    config = tmp_path / "gateway.toml"
    config.write_text(CONFIG)
    gateway = LiveGateway(
        tmp_path / "data",
        config=config,
        env={"DOOR": ONE_WAITS},
        module="tests.chaos.door",
    )
    with gateway, ThreadPoolExecutor(2) as pool:
        for place in range(2):
            pool.submit(generated, gateway, f"place-{place}")
        waiting = 'model="gpt-image-2"'
        while not gateway.metric("imageway_waiting").get(f"{{{waiting}}}"):
            time.sleep(0.02)
        yield gateway


def generated(gateway: LiveGateway, once: str) -> httpx.Response:
    with gateway.client() as client:
        return client.post(PATH, json=BODY, headers={"idempotency-key": once})


def test_one_more_is_refused_and_everything_else_goes_on(full: LiveGateway) -> None:
    with full.client() as client:
        refused = client.post(PATH, json=BODY)
        unread = large_upload(full)
        task = client.post(PATH, json=BODY, headers={"prefer": "respond-async"})
        balance = client.get("/v1/credits")
        read = client.get(f"/v1/tasks/{task.json()['id']}")
        live = client.get("/health/live")
        known = client.post(PATH, json=BODY, headers={"idempotency-key": "place-1"})

    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert "x-should-retry" not in refused.headers
    # Its 50 MB were announced, and not one byte of them was waited for.
    assert unread.startswith("HTTP/1.1 429")
    assert "retry-after:" in unread
    assert task.json()["status"] == "pending"
    assert [r.status_code for r in (balance, read, live, known)] == [200] * 4
    assert known.headers["idempotency-replayed"] == "true"
    shed = full.metric("imageway_shed_total")
    assert {labels: count for labels, count in shed.items() if count} == {
        '{model="gpt-image-2",reason="tenant_share"}': 1.0,
        '{model="any",reason="tenant_share"}': 1.0,
    }


def large_upload(gateway: LiveGateway) -> str:
    """Announce a large edit, send none of it, and read the head of the answer."""
    parts = urlsplit(gateway.url)
    assert parts.hostname is not None
    assert parts.port is not None
    head = (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Authorization: Bearer {gateway.first_key}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: 50000000\r\n\r\n"
    )
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as sock:
        sock.sendall(head.encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += sock.recv(65536)
    return answer.decode().lower().replace("http/1.1", "HTTP/1.1", 1)
