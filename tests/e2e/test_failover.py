"""The cheapest upstream fails, in each way there is: the client sees only success."""

from __future__ import annotations

import json

import pytest

from gateway.core.routing import NEXT_BY_KIND, Next
from providers.kit.contract import FailureKind
from tests.e2e.gateways import ADMIN_KEY, LiveGateway

ALL = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
BODY = {"prompt": "a fox", "size": "1:1", "quality": "low"}
SURVIVED = [kind for kind in FailureKind if NEXT_BY_KIND[kind] is not Next.NEVER]


@pytest.mark.parametrize("kind", SURVIVED, ids=lambda kind: kind.value)
def test_the_next_cheapest_serves_at_the_same_price_and_it_is_explained(
    gateway: LiveGateway, kind: FailureKind
) -> None:
    key = gateway.tenant("app")
    with gateway.client(key) as client:
        healthy = client.post("/v1/images/generations", json=BODY)
        gateway.sandbox("sandbox-thrifty", failure_rate=1, failure_kind=kind.value)
        saved = client.post("/v1/images/generations", json=BODY)

    assert (healthy.status_code, saved.status_code) == (200, 200)
    assert healthy.json()["usage"] == saved.json()["usage"]
    task_id = saved.headers["x-task-id"]
    explained = gateway.explained(task_id)
    trail = [(a["upstream"], a["kind"]) for a in explained["attempts"]]
    assert trail == [("sandbox-thrifty", kind.value), ("sandbox-fair", None)]
    assert explained["route"][0]["offer"] == "sandbox-thrifty/gpt-image-2"
    assert gateway.audit()["clean"]


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("invalid_request", 400, "invalid_request"),
        ("content_policy", 400, "moderation_blocked"),
        ("result_lost", 503, "service_unavailable"),
    ],
)
def test_what_is_not_to_be_bought_twice_is_not_tried_elsewhere(
    gateway: LiveGateway, kind: str, status: int, code: str
) -> None:
    key = gateway.tenant("app")
    gateway.sandbox("sandbox-thrifty", failure_rate=1, failure_kind=kind)

    with gateway.client(key) as client:
        answer = client.post("/v1/images/generations", json=BODY)

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert gateway.bought("sandbox-fair") == 0
    assert gateway.balance("app") == {"available": "1000", "held": "0", "spent": "0"}


def test_with_all_upstreams_down_the_answer_is_503_and_nothing_is_held(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("app")
    for name in ALL:
        gateway.sandbox(name, failure_rate=1, failure_kind="overloaded")

    with gateway.client(key) as client:
        answers = [client.post("/v1/images/generations", json=BODY) for _ in range(9)]

    for answer in answers:
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-task-id"].startswith("task-unified-")
    assert gateway.balance("app") == {"available": "1000", "held": "0", "spent": "0"}
    assert gateway.audit()["clean"]


def test_an_admin_sees_route_and_attempts_and_the_tenant_does_not(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("app")
    with gateway.client(key) as client:
        answer = client.post("/v1/images/generations", json=BODY)
        path = f"/v1/tasks/{answer.headers['x-task-id']}"
        seen_by_tenant = client.get(path).json()
    with gateway.client(ADMIN_KEY) as admin:
        seen_by_admin = admin.get(path).json()

    assert "attempts" not in seen_by_tenant
    assert seen_by_admin["attempts"][0]["cost_usd"] > 0
    assert [c["eligible"] for c in seen_by_admin["route"]] == [True] * 3


def test_another_tenants_task_is_not_there(gateway: LiveGateway) -> None:
    with gateway.client(gateway.tenant("owner")) as client:
        answer = client.post("/v1/images/generations", json=BODY)
    with gateway.client(gateway.tenant("stranger")) as client:
        seen = client.get(f"/v1/tasks/{answer.headers['x-task-id']}")

    assert seen.status_code == 404
    assert seen.json()["error"]["code"] == "task_not_found"


def test_every_request_and_every_attempt_is_one_line_without_secrets(
    gateway: LiveGateway,
) -> None:
    key = gateway.tenant("app")
    gateway.sandbox("sandbox-thrifty", failure_rate=1, failure_kind="bad_gateway")
    with gateway.client(key) as client:
        client.post("/v1/images/generations", json=BODY | {"prompt": "a hidden valley"})
    gateway.stop()

    lines = [json.loads(line) for line in gateway.logs]
    attempts = [line for line in lines if line["event"] == "attempt"]
    requests = [
        line
        for line in lines
        if line["event"] == "request" and line["route"] == "/v1/images/generations"
    ]
    assert [a["outcome"] for a in attempts] == ["bad_gateway", "done"]
    assert [r["status"] for r in requests] == [200]
    assert requests[0]["task_id"] == attempts[0]["task_id"]
    everything = "".join(gateway.logs)
    assert "hidden valley" not in everything
    assert key not in everything


def test_the_metrics_tell_of_the_fallback(gateway: LiveGateway) -> None:
    gateway.sandbox("sandbox-thrifty", failure_rate=1, failure_kind="overloaded")
    with gateway.client() as client:
        client.post("/v1/images/generations", json=BODY)

    saved = gateway.metric("imageway_requests_saved_by_fallback_total")
    assert saved['{model="gpt-image-2"}'] == 1.0
    assert sum(gateway.metric("imageway_upstream_attempts_total").values()) == 2
