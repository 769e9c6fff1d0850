"""The commands around webhooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.gateways import Answer, command


def test_a_keys_webhook_secret_is_shown_when_made_and_when_rotated(
    tmp_path: Path,
) -> None:
    def run(*args: str) -> Answer:
        return command(*args, "--data-dir", str(tmp_path), "--json")

    run("tenants", "create", "acme")
    made: dict[str, Any] = run("keys", "create", "--tenant", "acme").json
    rotated = run("keys", "rotate-webhook-secret", made["key_id"]).json
    assert made["webhook_secret"].startswith("whsec_")
    assert rotated["webhook_secret"].startswith("whsec_")
    assert rotated["webhook_secret"] != made["webhook_secret"]
    assert run("keys", "rotate-webhook-secret", "key_x").code == 1

    assert run("deliveries", "list", "--tenant", "acme").json == []
    unknown = run("deliveries", "redeliver", "evt_x")
    assert unknown.code == 1
    assert "no such delivery" in unknown.err
