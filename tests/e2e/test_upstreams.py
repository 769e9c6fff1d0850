"""An operator looks at the upstreams of a live gateway, and steers them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway, command

BODY = {"prompt": "a fox", "size": "1:1", "quality": "low"}
POST = "/v1/images/generations"
LIST, EXPLAIN = "/admin/v1/upstreams", "/admin/v1/routes/explain"
NAMES = ["sandbox-thrifty", "sandbox-fair", "sandbox-dear"]
OFFER = "sandbox-thrifty/gpt-image-2"
NOTICED_MAX_S = 20


def admin(gateway: LiveGateway) -> httpx.Client:
    return gateway.client(ADMIN_KEY)


def change(gateway: LiveGateway, name: str, what: str) -> dict[str, Any]:
    with admin(gateway) as client:
        answer = client.post(f"{LIST}/{name}/{what}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def look(gateway: LiveGateway, name: str = NAMES[0]) -> dict[str, Any]:
    with admin(gateway) as client:
        (found,) = [u for u in client.get(LIST).json()["data"] if u["upstream"] == name]
    return dict(found)


def offer_of(upstream: dict[str, Any], operation: str = "generate") -> dict[str, Any]:
    (found,) = [
        o
        for o in upstream["offers"]
        if (o["offer"], o["operation"]) == (OFFER, operation)
    ]
    return dict(found)


def buy(gateway: LiveGateway) -> str:
    """Buy one picture; returns the upstream that made it."""
    with gateway.client() as client:
        answer = client.post(POST, json=BODY)
    assert answer.status_code == 200, answer.text
    with admin(gateway) as client:
        task = client.get(f"/v1/tasks/{answer.headers['x-task-id']}").json()
    return str(task["attempts"][-1]["upstream"])


def test_a_call_under_way_and_a_failure_are_seen(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="overloaded")
    buy(gateway)
    gateway.sandbox(NAMES[0], failure_rate=0, latency_ms=3_000)
    with ThreadPoolExecutor(1) as pool:
        buying = pool.submit(buy, gateway)
        while not look(gateway)["in_flight"]:
            assert not buying.done()
        seen = look(gateway)
        buying.result()
    after = look(gateway)

    offer = offer_of(seen)
    assert (seen["in_flight"], offer["in_flight"]) == (1, 1)
    assert seen["slots"] == {"used": 1, "limit": 64, "max": 64}
    assert 0 <= offer["oldest_ms"] <= 3_000
    assert offer["last_failure"]["kind"] == "overloaded"
    assert (offer_of(after)["window"]["good"], offer_of(after)["window"]["bad"]) == (
        1,
        1,
    )
    assert (after["in_flight"], after["oldest_ms"]) == (0, None)


def test_a_drained_upstream_gets_nothing_new_even_after_a_restart(
    gateway: LiveGateway,
) -> None:
    assert buy(gateway) == NAMES[0]

    drained = change(gateway, NAMES[0], "drain")
    assert drained["drained"]
    assert buy(gateway) == NAMES[1]
    gateway.stop()
    gateway.start()
    assert look(gateway)["drained_since_ms"] == drained["drained_since_ms"]
    assert buy(gateway) == NAMES[1]
    assert gateway.metric("imageway_upstream_drained")[f'{{upstream="{NAMES[0]}"}}']

    assert not change(gateway, NAMES[0], "enable")["drained"]
    assert buy(gateway) == NAMES[0]
    gateway.stop()
    lines = [json.loads(line) for line in gateway.logs]
    told = [(e["upstream"], e["change"]) for e in lines if e["event"] == "upstream"]
    assert told == [
        (NAMES[0], "drained"),
        (NAMES[0], "drained"),  # found so at the second start
        (NAMES[0], "enabled"),
    ]


def test_a_command_drains_what_a_running_gateway_then_leaves_alone(
    gateway: LiveGateway,
) -> None:
    said = gateway.cli("upstreams", "drain", NAMES[0], "--json").json
    until_s = time.monotonic() + NOTICED_MAX_S
    while not look(gateway)["drained"]:
        assert time.monotonic() < until_s

    assert said == {"upstream": NAMES[0], "state": "drained"}
    assert buy(gateway) == NAMES[1]
    listed = gateway.cli("upstreams", "list", "--url", gateway.url, "--json").json
    assert [(u["upstream"], u["drained"]) for u in listed] == [
        (name, name == NAMES[0]) for name in NAMES
    ]


def test_a_reset_brings_back_what_was_shut(gateway: LiveGateway) -> None:
    gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="auth")
    assert buy(gateway) == NAMES[1]
    shut = look(gateway)
    gateway.sandbox(NAMES[0], failure_rate=0)
    assert buy(gateway) == NAMES[1]

    shown = gateway.cli("upstreams", "reset", NAMES[0], "--url", gateway.url)

    assert (shut["credential"]["state"], offer_of(shut)["state"]) == ("open", "open")
    assert shut["credential"]["next_probe_in_ms"] > 0
    assert f"{NAMES[0]}  closed" in shown.out
    assert buy(gateway) == NAMES[0]


def test_an_explanation_is_live_and_knows_the_key(gateway: LiveGateway) -> None:
    made = ("keys", "create", "--tenant", "first", "--json", "--routing")
    key_id = gateway.cli(*made, '{"ignore": ["sandbox-dear"]}').json["key_id"]
    gateway.sandbox(NAMES[0], failure_rate=1, failure_kind="overloaded")
    buy(gateway)
    change(gateway, NAMES[1], "drain")
    with admin(gateway) as client:
        told = client.post(
            EXPLAIN,
            params={"key_id": key_id},
            json=BODY | {"routing": {"max_credits": 0.000000001}},
            headers={"x-route-sort": "throughput"},
        ).json()

    assert told["routing"] == {
        "ignore": ["sandbox-dear"],
        "sort": "throughput",
        "max_credits": "0.000000001",
    }
    assert told["refusal"]["code"] == "max_credits_exceeded"
    route = {c["upstream"]: c for c in told["route"]}
    assert {name: c["reason"] for name, c in route.items()} == {
        NAMES[0]: None,
        NAMES[1]: "drained",
        NAMES[2]: "left out by routing.ignore",
    }
    assert route[NAMES[0]]["placed_by"] == "throughput"
    assert route[NAMES[0]]["health"]["window"]["bad"] == 1
    assert route[NAMES[1]]["health"]["usual_ms"] is not None
    assert float(route[NAMES[0]]["cost_usd"]) == route[NAMES[0]]["estimate_usd"]


def test_the_command_explains_what_the_running_gateway_would_do(
    gateway: LiveGateway,
) -> None:
    change(gateway, NAMES[0], "drain")
    explain = ("routes", "explain", "--size", "1:1", "--prompt", "a fox")
    live = (*explain, "--live", "--url", gateway.url)

    fresh = gateway.cli(*explain, "--json").json
    now = gateway.cli(*live, "--json").json["route"]
    shown = gateway.cli(*live).out

    assert [c["offer"].split("/")[0] for c in fresh] == NAMES
    assert [c["upstream"] for c in now] == [NAMES[1], NAMES[2], NAMES[0]]
    assert "drained" in shown


@pytest.mark.parametrize("what", ["drain", "enable", "reset"])
def test_an_upstream_that_is_not_there_is_404(
    shared_gateway: LiveGateway, what: str
) -> None:
    with admin(shared_gateway) as client:
        answer = client.post(f"{LIST}/nobody/{what}")
    where = ("--data-dir", str(shared_gateway.data_dir), "--url", shared_gateway.url)
    said = command("upstreams", what, "nobody", *where)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "upstream_not_found"
    assert said.code == 1
    assert "upstream_not_found" in said.err


def test_other_wrong_questions_have_their_codes(shared_gateway: LiveGateway) -> None:
    with admin(shared_gateway) as client:
        answers = [
            client.post(f"{LIST}/{NAMES[0]}/paint"),
            client.get(f"{LIST}/nobody"),
            client.post(EXPLAIN, params={"key_id": "key_none"}, json=BODY),
            client.post(EXPLAIN, json=BODY | {"n": 0}),
            client.post(EXPLAIN, json=BODY | {"routing": {"only": ["nobody"]}}),
        ]

    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [
        (404, "route_not_found"),
        (404, "upstream_not_found"),
        (404, "key_not_found"),
        (400, "invalid_value"),
        (400, "invalid_value"),
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", LIST),
        ("GET", f"{LIST}/{NAMES[0]}"),
        ("POST", f"{LIST}/{NAMES[0]}/drain"),
        ("POST", EXPLAIN),
    ],
)
def test_a_tenants_key_opens_none_of_it(
    shared_gateway: LiveGateway, method: str, path: str
) -> None:
    with shared_gateway.client() as client:
        answer = client.request(method, path, json=BODY)

    assert answer.status_code == 401
    assert not look(shared_gateway)["drained"]


def test_without_a_gateway_the_list_is_that_of_the_config(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path / "data"))
    command("tenants", "create", "app", *where)
    drained = command("upstreams", "drain", NAMES[2], *where)

    listed = command("upstreams", "list", "--json", *where, IMAGEWAY__SERVER__PORT="1")
    reset = command("upstreams", "reset", NAMES[2], *where, IMAGEWAY__SERVER__PORT="1")
    unknown = command("upstreams", "drain", "nobody", *where)

    assert (drained.code, listed.code) == (0, 0)
    assert {row["upstream"]: row["state"] for row in listed.json} == {
        NAMES[0]: "in use",
        NAMES[1]: "in use",
        NAMES[2]: "drained",
        "openai": "left out",
    }
    assert "no answer from the gateway" in listed.err
    assert (reset.code, unknown.code) == (1, 1)
    assert "sandbox-dear, sandbox-fair" in unknown.err
