"""Keys with limits on a running gateway: what they open, and what they turn away."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.core.keys import key_from
from tests.e2e.gateways import ADMIN_KEY, LiveGateway
from tests.e2e.test_postgres import config_in
from tests.servers import RedisServer

KEYS = "/admin/v1/keys"
POST = "/v1/images/generations"
BODY = {"model": "gpt-image-2", "prompt": "a fox", "size": "1:1", "quality": "low"}
LATER = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway behind a proxy on this machine, which says who is asking."""
    env = {
        "IMAGEWAY__SERVER__TRUSTED_PROXIES": '["127.0.0.0/8"]',
        "IMAGEWAY__ROUTING__TENANTS_MAY_CHOOSE": "false",
    }
    folder = tmp_path_factory.mktemp("gateway")
    with LiveGateway(folder / "data", env=env) as gateway:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=0)
        for tenant in ("acme", "rival"):
            gateway.cli("tenants", "create", tenant, "--credits", "100000")
        yield gateway
        assert gateway.audit()["clean"]


@pytest.fixture(scope="module")
def admin(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with gateway.client(ADMIN_KEY) as client:
        yield client


def made(admin: httpx.Client, tenant: str = "acme", **given: Any) -> dict[str, Any]:
    answer = admin.post(KEYS, json={"tenant": tenant, **given})
    assert answer.status_code == 201, answer.text
    found = answer.json()
    assert isinstance(found, dict)
    return found


def code_of(answer: httpx.Response) -> str | None:
    code = answer.json().get("error", {}).get("code")
    assert code is None or isinstance(code, str)
    return code


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# --- budgets ---


def test_of_500_at_once_a_budget_for_50_pays_for_exactly_50(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    free = made(admin)
    with gateway.client(free["key"]) as client:
        estimate = client.post("/v1/estimate", json=BODY).json()
        price = estimate["credits_reserved"]
    key = made(admin, total_credits=f"{50 * price:.9f}")

    def ask(client: httpx.Client) -> tuple[int, str | None]:
        answer = client.post(POST, json=BODY, headers=LATER)
        return answer.status_code, code_of(answer)

    with gateway.client(key["key"]) as client, ThreadPoolExecutor(32) as crowd:
        # Nothing is settled, so that nothing is given back, before all have asked.
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=20_000)
        outcomes = Counter(crowd.map(ask, [client] * 500))
    shown = admin.get(f"{KEYS}/{key['key_id']}").json()
    with gateway.client(key["key"]) as client:
        token = client.get("/v1/credits").json()["data"]["token"]
    for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
        gateway.sandbox(name, latency_ms=0)

    assert outcomes == {(200, None): 50, (402, "insufficient_token_quota"): 450}
    assert shown["used"]["tasks_in_flight"] == 50
    assert float(shown["used"]["remaining_credits"]) < price
    assert float(token["remaining_credits"]) < price
    assert token["unlimited_credits"] is False


def test_a_daily_budget_says_until_when(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, daily_credits="0.5", monthly_credits="1000")

    with gateway.client(key["key"]) as client:
        refused = client.post(POST, json={**BODY, "quality": "high"})

    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (402, "token_daily_quota_exceeded")
    assert error["type"] == "insufficient_quota"
    assert error["daily_limit_credits"] == "0.5"
    assert error["daily_used_credits"] == "0"
    assert error["reset_timezone"] == "UTC"
    assert error["resets_at"] in error["message"]
    assert refused.headers["x-should-retry"] == "false"


def test_a_budget_is_raised_while_the_gateway_runs(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, total_credits="0")
    with gateway.client(key["key"]) as client:
        assert client.post(POST, json=BODY).status_code == 402
        changed = admin.patch(f"{KEYS}/{key['key_id']}", json={"total_credits": 12.5})
        assert client.post(POST, json=BODY).status_code == 200

    assert changed.json()["total_credits"] == "12.5"


# --- rates ---


def test_requests_for_pictures_are_counted_by_the_minute(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, requests_per_minute=3)

    with gateway.client(key["key"]) as client:
        answers = [client.post(POST, json=BODY) for _ in range(5)]
        others = client.get("/v1/tasks")

    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    left = [a.headers["x-ratelimit-remaining-requests"] for a in answers]
    assert left == ["2", "1", "0", "0", "0"]
    refused = answers[-1]
    assert code_of(refused) == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert others.status_code == 200


def test_tasks_in_flight_are_as_many_as_may(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, concurrent_tasks=2)
    for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
        gateway.sandbox(name, latency_ms=20_000)

    with gateway.client(key["key"]) as client:
        tasks = [client.post(POST, json=BODY, headers=LATER) for _ in range(2)]
        refused = client.post(POST, json=BODY)
        client.post(f"/v1/tasks/{tasks[0].json()['id']}/cancel")
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=0)
        while client.get(f"/v1/tasks/{tasks[0].json()['id']}").json()["status"] in {
            "pending",
            "processing",
        }:
            pass
        later = client.post(POST, json=BODY)

    assert (refused.status_code, code_of(refused)) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["limit_scope"] == "concurrent_tasks"
    assert refused.headers["retry-after"]
    assert later.status_code == 200


# --- who, from where, for what ---


SCOPED = {
    "images": [
        ("POST", POST),
        ("POST", "/v1/images/edits"),
        ("GET", "/api/v1/files/list"),
    ],
    "tasks": [("GET", "/v1/tasks"), ("GET", "/v1/webhooks/deliveries")],
    "billing": [("GET", "/v1/credits")],
    "admin": [("GET", KEYS), ("GET", KEYS + "/key_nowhere")],
}


@pytest.mark.parametrize("scope", SCOPED)
def test_a_key_opens_its_scope_and_no_other(
    gateway: LiveGateway, admin: httpx.Client, scope: str
) -> None:
    key = made(admin, scopes=[scope])

    with gateway.client(key["key"]) as client:
        codes = {
            (each, route): code_of(client.request(*route, json={}))
            for each, routes in SCOPED.items()
            for route in routes
        }
        assert client.get("/v1/models").status_code == 200

    refused = {each for (each, _), code in codes.items() if code == "key_scope_missing"}
    opened = {each for (each, _), code in codes.items() if code != "key_scope_missing"}
    assert opened == {scope}
    assert refused == SCOPED.keys() - {scope}


def test_a_key_asks_for_and_sees_its_models_only(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, models=["gpt-image-1.5"])

    with gateway.client(key["key"]) as client:
        listed = client.get("/v1/models").json()["data"]
        refused = [
            client.post(POST, json=BODY),
            client.post("/v1/images/edits", files={"image": b"x"}, data=BODY),
            client.get("/v1/models/gpt-image-2"),
        ]

    assert [model["id"] for model in listed] == ["gpt-image-1.5"]
    assert {(a.status_code, code_of(a)) for a in refused} == {
        (403, "model_access_denied")
    }


def test_a_key_is_used_from_its_addresses_only_as_the_proxy_tells(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, addresses=["203.0.113.0/24"])

    def asked(forwarded: str) -> int:
        headers = {"x-forwarded-for": forwarded}
        return client.get("/v1/credits", headers=headers).status_code

    with gateway.client(key["key"]) as client:
        assert asked("203.0.113.9") == 200
        assert asked("198.51.100.1") == 403
        assert asked("203.0.113.9, 198.51.100.1") == 403
        assert code_of(client.get("/v1/credits")) == "key_address_not_allowed"


def test_unknown_keys_are_told_to_wait_and_a_valid_one_is_served(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin)
    here = {"x-forwarded-for": "198.51.100.77"}

    with httpx.Client(base_url=gateway.url, headers=here) as client:
        unknown = (bearing(key_from(f"{n:030}")) for n in range(22))
        answers = [client.get("/v1/credits", headers=each) for each in unknown]
        good = bearing(key["key"])
        served = [client.get("/v1/credits", headers=good) for _ in range(5)]

    assert [a.status_code for a in answers] == [401] * 20 + [429] * 2
    assert answers[-1].headers["retry-after"]
    assert {a.status_code for a in served} == {200}
    with gateway.client("iwk_live_wrong") as elsewhere:
        assert elsewhere.get("/v1/credits").status_code == 401


# --- the admin API ---


def test_a_key_is_shown_once_and_nowhere_kept(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    key = made(admin, requests_per_minute=60, scopes=["images"])
    secret = key["key"]

    shown = admin.get(f"{KEYS}/{key['key_id']}")
    listed = admin.get(KEYS, params={"tenant": "acme", "page_size": 100})

    assert secret not in shown.text + listed.text + "".join(gateway.logs)
    assert shown.json()["requests_per_minute"] == 60
    assert key["key_id"] in {each["key_id"] for each in listed.json()["data"]}
    with sqlite3.connect(gateway.data_dir / "imageway.db") as database:
        assert secret not in "\n".join(database.iterdump())


def test_a_rotated_key_keeps_its_limits_and_both_are_valid(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    old = made(admin, requests_per_minute=4, scopes=["images", "billing"])

    new = admin.post(f"{KEYS}/{old['key_id']}/rotate", json={"overlap_s": 3600})
    again = admin.post(f"{KEYS}/{old['key_id']}/rotate")

    assert new.status_code == 201
    after = new.json()
    assert after["previous"]["key_id"] == old["key_id"]
    assert after["previous"]["rotated_to"] == after["key_id"]
    assert (after["scopes"], after["requests_per_minute"]) == (["billing", "images"], 4)
    assert (again.status_code, code_of(again)) == (409, "key_already_rotated")
    for secret in (old["key"], after["key"]):
        with gateway.client(secret) as client:
            assert client.get("/v1/credits").status_code == 200
    with gateway.client(old["key"]) as one, gateway.client(after["key"]) as other:
        answers = [c.post(POST, json=BODY) for _ in range(3) for c in (one, other)]
    assert [a.status_code for a in answers] == [200] * 4 + [429] * 2
    admin.post(f"{KEYS}/{old['key_id']}/revoke")
    with gateway.client(old["key"]) as client:
        assert code_of(client.get("/v1/credits")) == "key_disabled"


def test_a_key_without_overlap_ends_at_once(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    old = made(admin)
    with gateway.client(old["key"]) as client:
        assert client.get("/v1/credits").status_code == 200
        admin.post(f"{KEYS}/{old['key_id']}/rotate", json={"overlap_s": 0})
        assert code_of(client.get("/v1/credits")) == "key_expired"


def test_a_tenants_own_admin_sees_its_keys_and_nothing_else(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    boss, foreign = made(admin, scopes=["admin"]), made(admin, "rival")
    path = f"{KEYS}/{foreign['key_id']}"

    with gateway.client(boss["key"]) as client:
        own = client.post(KEYS, json={"requests_per_minute": 5})
        listed = client.get(KEYS, params={"page_size": 100}).json()
        strange = [
            client.get(path),
            client.patch(path, json={"requests_per_minute": 1}),
            client.post(f"{path}/rotate", json={}),
            client.post(f"{path}/revoke"),
            client.delete(path),
            client.get(KEYS, params={"tenant": "rival"}),
            client.post(KEYS, json={"tenant": "rival"}),
            client.get(KEYS + "/key_nowhere"),
        ]
        routing = client.post(KEYS, json={"routing": {"only": ["sandbox-dear"]}})
        beyond = client.get("/admin/v1/upstreams")
        ended = client.delete(f"{KEYS}/{own.json()['key_id']}").json()

    assert own.status_code == 201
    assert {each["tenant_id"] for each in listed["data"]} == {own.json()["tenant_id"]}
    assert {answer.status_code for answer in strange} == {404}
    assert (routing.status_code, code_of(routing)) == (403, "routing_not_allowed")
    assert beyond.status_code == 401
    assert ended["state"] == "revoked"
    assert admin.get(path).json()["state"] == "active"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"tenant": "acme", "total_credits": 1e3}', "total_credits"),
        (b'{"tenant": "acme", "total_credits": 1.5e1}', "total_credits"),
        (b'{"tenant": "acme", "total_credits": -1}', "total_credits"),
        (b'{"tenant": "acme", "total_credits": 1e999}', "total_credits"),
        (b'{"tenant": "acme", "daily_credits": 0.1234567891}', "daily_credits"),
        (b'{"tenant": "acme", "daily_credits": "NaN"}', "daily_credits"),
        (b'{"tenant": "acme", "daily_credits": 9999999999999999999}', "daily_credits"),
        (b'{"tenant": "acme", "daily_credits": NaN}', None),
        (b'{"tenant": "acme", "color": 1}', "color"),
        (b'{"tenant": 7}', "tenant"),
        (b"{}", "tenant"),
        (b"[]", None),
        (b"", "tenant"),
        (b'{"tenant": "acme", "requests_per_minute": 1.0}', "requests_per_minute"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    admin: httpx.Client, body: bytes, param: str | None
) -> None:
    answer = admin.post(KEYS, content=body)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


# --- commands ---


def test_the_commands_speak_of_the_same_keys(
    gateway: LiveGateway, admin: httpx.Client
) -> None:
    options = ("--scopes", "images,tasks", "--models", "gpt-image-2")
    limits = ("--daily-credits", "2.5", "--requests-per-minute", "9")
    where = ("--addresses", "127.0.0.1,203.0.113.0/24")
    create = ("keys", "create", "--tenant", "acme", *options, *limits, *where)
    key = gateway.cli(*create, "--json").json
    key_id = key["key_id"]

    assert admin.get(f"{KEYS}/{key_id}").json()["daily_credits"] == "2.5"
    update = ("keys", "update", key_id, "--daily-credits", "none", "--models", "none")
    gateway.cli(*update, "--expires-at", "2099-01-31T00:00:00Z")
    shown = gateway.cli("keys", "show", key_id, "--json").json
    seen = admin.get(f"{KEYS}/{key_id}").json()
    assert shown == {name: seen[name] for name in shown}
    assert (shown["daily_credits"], shown["models"]) == (None, None)
    assert shown["expires_at"] == "2099-01-31T00:00:00Z"
    assert "requests_per_minute  9" in gateway.cli("keys", "show", key_id).out
    rotated = gateway.cli("keys", "rotate", key_id, "--overlap-s", "60", "--json").json
    with gateway.client(rotated["key"]) as client:
        assert client.post(POST, json=BODY).status_code == 200
    gateway.cli("keys", "revoke", key_id)
    listed = gateway.cli("keys", "list", "--tenant", "acme", "--json").json
    states = {each["key_id"]: each["state"] for each in listed}
    assert (states[key_id], states[rotated["key_id"]]) == ("revoked", "active")
    assert key["key"] not in str(listed)


def test_without_an_admin_key_admin_routes_are_off_and_the_log_says_so(
    tmp_path: Path,
) -> None:
    with LiveGateway(tmp_path / "data", env={"IMAGEWAY_ADMIN_KEY": ""}) as gateway:
        create = ("keys", "create", "--tenant", "first", "--scopes", "admin", "--json")
        key = gateway.cli(*create).json["key"]
        with gateway.client(key) as client:
            refused = client.get(KEYS)

    assert (refused.status_code, code_of(refused)) == (404, "admin_disabled")
    assert any("admin_routes_off" in line for line in gateway.logs)


def test_gateways_over_one_database_and_one_redis_count_together(
    tmp_path: Path, redis: RedisServer
) -> None:
    env = {"IMAGEWAY__STORAGE__REDIS": redis.url}
    config = config_in(tmp_path)
    one = LiveGateway(tmp_path / "one", config=config, env=env)
    two = LiveGateway(tmp_path / "two", config=config, env=env)
    with one, two, one.client(ADMIN_KEY) as admin, ThreadPoolExecutor(16) as crowd:
        one.cli("tenants", "create", "acme", "--credits", "1000")
        often, rich = made(admin, requests_per_minute=30), made(admin)
        with one.client(rich["key"]) as client:
            price = client.post("/v1/estimate", json=BODY).json()["credits_reserved"]
        poor = made(admin, total_credits=f"{7 * price:.9f}")

        def ask(secret: str, number: int) -> tuple[int, str | None]:
            with (one, two)[number % 2].client(secret) as client:
                answer = client.post(POST, json=BODY, headers=LATER)
                return answer.status_code, code_of(answer)

        rated = Counter(crowd.map(ask, [often["key"]] * 80, range(80)))
        for gateway in (one, two):
            # Nothing is settled, so that nothing is given back, before all have asked.
            gateway.sandbox("sandbox", latency_ms=20_000)
        paid = Counter(crowd.map(ask, [poor["key"]] * 60, range(60)))
        admin.post(f"{KEYS}/{rich['key_id']}/revoke")
        while ask(rich["key"], 1) != (401, "key_disabled"):
            pass
        drifts = one.audit()["drifts"]
        for gateway in (one, two):
            gateway.kill()

    # Apart they would let 60 through. A Redis that does not answer within 50 ms, on a
    # machine this busy, leaves a request to its process.
    assert 20 <= rated[200, None] <= 45
    assert rated.keys() == {(200, None), (429, "rate_limit_exceeded")}
    assert paid == {(200, None): 7, (402, "insufficient_token_quota"): 53}
    assert not drifts
