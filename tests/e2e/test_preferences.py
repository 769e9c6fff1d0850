"""Clients that say where their requests go, against a live gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.gateways import LiveGateway, command
from tests.e2e.pictures import RED, file_of

BODY = {"prompt": "a fox", "size": "1:1", "quality": "low"}
POST = "/v1/images/generations"


def client_of(gateway: LiveGateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def sdk(shared_gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    with client_of(shared_gateway, shared_gateway.tenant("sdk")) as client:
        yield client


def went_to(gateway: LiveGateway, task_id: str) -> list[str]:
    explained = gateway.explained(task_id)
    return [attempt["upstream"] for attempt in explained["attempts"]]


def test_the_openai_library_says_it_in_extra_body(
    shared_gateway: LiveGateway, sdk: openai.OpenAI
) -> None:
    plain = sdk.images.generate(model="gpt-image-2", prompt="a fox", size="1024x1024")
    answer = sdk.images.with_raw_response.generate(
        model="gpt-image-2",
        prompt="a fox",
        size="1024x1024",
        extra_body={"routing": {"only": ["sandbox-dear"], "max_credits": 100.5}},
    )

    assert went_to(shared_gateway, answer.headers["x-task-id"]) == ["sandbox-dear"]
    assert answer.parse().usage == plain.usage


def test_the_openai_library_says_it_in_extra_headers_and_they_count_first(
    shared_gateway: LiveGateway, sdk: openai.OpenAI
) -> None:
    answer = sdk.images.with_raw_response.generate(
        model="gpt-image-2",
        prompt="a fox",
        extra_body={"routing": {"order": ["sandbox-dear"]}},
        extra_headers={"X-Route-Order": "sandbox-fair/gpt-image-2, sandbox-dear"},
    )

    assert went_to(shared_gateway, answer.headers["x-task-id"]) == ["sandbox-fair"]


def test_an_edit_by_form_says_it_in_a_text_field(
    shared_gateway: LiveGateway, sdk: openai.OpenAI
) -> None:
    answer = sdk.images.with_raw_response.edit(
        model="gpt-image-2",
        image=file_of(RED),
        prompt="a hat",
        extra_body={"routing": json.dumps({"ignore": ["sandbox-thrifty"]})},
    )

    assert went_to(shared_gateway, answer.headers["x-task-id"]) == ["sandbox-fair"]


@pytest.mark.parametrize(
    ("routing", "status", "code", "param"),
    [
        ({"only": ["nobody"]}, 400, "invalid_value", "routing.only[0]"),
        ({"sort": "best"}, 400, "invalid_value", "routing.sort"),
        (
            {"max_credits": 0.000000001},
            400,
            "max_credits_exceeded",
            "routing.max_credits",
        ),
        ({"max_credits": 0.1234567891}, 400, "invalid_value", "routing.max_credits"),
        (
            {"only": ["sandbox-fair"], "ignore": ["sandbox-fair"]},
            503,
            "no_available_channel",
            None,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_held(
    shared_gateway: LiveGateway,
    sdk: openai.OpenAI,
    routing: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        sdk.images.generate(
            model="gpt-image-2", prompt="a fox", extra_body={"routing": routing}
        )

    refused = caught.value
    assert (refused.status_code, refused.code, refused.param) == (status, code, param)
    with shared_gateway.client(sdk.api_key) as client:
        task = client.get(f"/v1/tasks/{refused.response.headers['x-task-id']}")
    assert task.status_code == 404  # nothing was accepted
    assert shared_gateway.balance("sdk")["held"] == "0"


def test_a_key_goes_where_its_operator_said_unless_the_request_says_otherwise(
    shared_gateway: LiveGateway,
) -> None:
    shared_gateway.cli("tenants", "create", "keyed", "--credits", "100")
    routing = '{"only": ["sandbox-dear"], "allow_fallbacks": false}'
    create = ("keys", "create", "--tenant", "keyed", "--routing", routing, "--json")
    key = shared_gateway.cli(*create).json["key"]
    listed = shared_gateway.cli("keys", "list", "--tenant", "keyed", "--json").json

    with shared_gateway.client(key) as client:
        usual = client.post(POST, json=BODY)
        said = client.post(POST, json=BODY, headers={"x-route-only": "sandbox-fair"})

    assert listed[0]["routing"] == json.loads(routing)
    assert went_to(shared_gateway, usual.headers["x-task-id"]) == ["sandbox-dear"]
    assert went_to(shared_gateway, said.headers["x-task-id"]) == ["sandbox-fair"]


def test_a_key_cannot_be_made_for_an_upstream_that_is_not_there(
    shared_gateway: LiveGateway,
) -> None:
    shared_gateway.cli("tenants", "create", "typo")
    where = ("--data-dir", str(shared_gateway.data_dir))
    create = ("keys", "create", "--tenant", "typo", *where, "--routing")

    unknown = command(*create, '{"only": ["sandbox-dare"]}')
    wrong = command(*create, '{"sort": "best"}')

    assert (unknown.code, wrong.code) == (1, 1)
    assert "there is no upstream sandbox-dare" in unknown.err
    assert "routing.sort must be one of" in wrong.err


def test_an_async_task_keeps_its_preferences(shared_gateway: LiveGateway) -> None:
    key = shared_gateway.tenant("later")
    with shared_gateway.client(key) as client:
        answer = client.post(
            POST,
            json=BODY | {"routing": {"only": ["sandbox-fair"]}},
            headers={"prefer": "wait=60"},
        )

    assert answer.json()["status"] == "completed"
    assert went_to(shared_gateway, answer.json()["id"]) == ["sandbox-fair"]


def test_the_same_idempotency_key_with_other_preferences_is_another_request(
    shared_gateway: LiveGateway,
) -> None:
    headers = {"idempotency-key": "one"}
    with shared_gateway.client(shared_gateway.tenant("once")) as client:
        first = client.post(POST, json=BODY, headers=headers)
        same = client.post(POST, json=BODY | {"routing": {}}, headers=headers)
        other = client.post(
            POST, json=BODY, headers=headers | {"x-route-only": "sandbox-fair"}
        )

    assert same.headers["x-task-id"] == first.headers["x-task-id"]
    assert (other.status_code, other.json()["error"]["code"]) == (
        422,
        "idempotency_conflict",
    )


def test_a_misspelt_header_is_told_to_have_had_no_effect(
    shared_gateway: LiveGateway, sdk: openai.OpenAI
) -> None:
    answer = sdk.images.with_raw_response.generate(
        model="gpt-image-2", prompt="a fox", extra_headers={"X-Route-Onyl": "x"}
    )

    assert answer.headers["x-gateway-ignored-params"] == "x-route-onyl"


def test_where_tenants_may_not_choose_they_learn_no_upstreams_name(
    tmp_path: Path,
) -> None:
    closed = {"IMAGEWAY__ROUTING__TENANTS_MAY_CHOOSE": "false"}
    with (
        LiveGateway(tmp_path / "data", env=closed) as gateway,
        gateway.client() as client,
    ):
        plain = client.post(POST, json=BODY)
        refused = [
            client.post(POST, json=BODY | {"routing": {"only": ["nobody"]}}),
            client.post(POST, json=BODY, headers={"x-route-sort": "latency"}),
        ]
        limited = client.post(POST, json=BODY | {"routing": {"max_credits": 99}})

    assert (plain.status_code, limited.status_code) == (200, 200)
    assert [answer.status_code for answer in refused] == [403, 403]
    for answer, param in zip(refused, ("routing.only", "X-Route-Sort"), strict=True):
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("routing_not_allowed", param)
        assert "sandbox" not in answer.text
