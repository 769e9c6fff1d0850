"""The gateway dies between settling a task and telling of it, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.receivers import receiving
from tests.e2e.gateways import LiveGateway, new_tenant
from tests.e2e.test_tasks import BODY, LATER, PATH

HOOKS = """
[webhooks]
allow_networks = ["127.0.0.2/32"]
ports = ["{port}"]
tries_after_s = [1, 1, 1]

[[upstream]]
name = "sandbox"
kind = "sandbox"
options = {{ latency_ms = 0 }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = 0.01 }}
"""
SETTLED_MAX_S = 20


def test_every_end_is_told_though_the_gateway_dies_before_it_could(
    tmp_path: Path, whole: bool
) -> None:
    rounds = 100 if whole else 6
    data_dir = tmp_path / "data"
    config = tmp_path / "gateway.toml"
    with receiving(data_dir / "imageway.db", tmp_path) as receiver:
        config.write_text(HOOKS.format(port=receiver.port))
        env = {"SSL_CERT_FILE": str(receiver.certificate)}
        gateway = LiveGateway(data_dir, config=config, env=env)
        with gateway:
            key, receiver.secret = gateway.in_books(
                lambda books: new_tenant(books, "hooks", "1000")
            )
            body = BODY | {"callback_url": receiver.url}
            ids, untold = [], 0
            for _ in range(rounds):
                with gateway.client(key) as client:
                    ids.append(client.post(PATH, json=body, headers=LATER).json()["id"])
                settled(receiver.rows, ids[-1])
                gateway.kill()
                untold += ids[-1] not in {got.task["id"] for got in receiver.got}
                gateway.start()
            until_s = time.monotonic() + SETTLED_MAX_S
            while len({got.task["id"] for got in receiver.got}) < rounds:
                assert time.monotonic() < until_s
                time.sleep(0.05)
            audit = gateway.audit()
            spent = gateway.balance("hooks")["spent"]
            one = receiver.rows("SELECT MIN(charged), COUNT(*) FROM settlements")[0]

    print(f"{untold} of {rounds} deaths came before the webhook")  # noqa: T201 - a figure
    assert untold > 0
    assert {got.task["id"] for got in receiver.got} == set(ids)
    assert {got.event_id for got in receiver.got} == {
        f"evt_{task_id}_completed" for task_id in ids
    }
    assert all(got.task["status"] == "completed" for got in receiver.got)
    assert all(got.settled for got in receiver.got)
    assert receiver.unsigned == []
    assert one[1] == rounds
    assert float(spent) > 0
    assert audit["clean"]


def settled(rows: Callable[..., list[Any]], task_id: str) -> None:
    """Wait, without a pause, until a settlement is to be seen from outside."""
    until_s = time.monotonic() + SETTLED_MAX_S
    while not rows("SELECT 1 FROM settlements WHERE task_id = ?", task_id):
        assert time.monotonic() < until_s
