"""Whatever is sent: a clear 4xx with its four keys, never a 500, nothing held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(shared_gateway: LiveGateway) -> Iterator[httpx.Client]:
    with shared_gateway.client(shared_gateway.tenant("hostile")) as client:
        yield client


def body(**fields: Any) -> bytes:
    return json.dumps({"prompt": "a fox", **fields}).encode()


HOSTILE: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "broken json": (b'{"prompt": "a', 400, None),
    "not an object": (b"[1,2,3]", 400, None),
    "null": (b"null", 400, None),
    "not utf-8": (b'{"prompt": "\xff\xfe"}', 400, None),
    "NaN": (b'{"prompt": "a", "n": NaN}', 400, None),
    "a huge number": (b'{"prompt": "a", "n": 1e999}', 400, None),
    "a long number": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", 400, None),
    "deep nesting": (b'{"prompt": ' + b"[" * 100_000, 400, None),
    "deep but whole": (b'{"p":' + b"[" * 500 + b"]" * 500 + b"}", 400, "prompt"),
    "10 MB of JSON": (body(prompt="x" * 10_000_000), 413, None),
    "a lone surrogate": (b'{"prompt": "\\ud800 fox"}', 400, "prompt"),
    "32,001 code points": (body(prompt="狐" * 32_001), 400, "prompt"),
    "no prompt": (b"{}", 400, "prompt"),
    "a blank prompt": (body(prompt="   "), 400, "prompt"),
    "a prompt of numbers": (body(prompt=7), 400, "prompt"),
    "n: 0": (body(n=0), 400, "n"),
    "n: 11": (body(n=11), 400, "n"),
    "n as text": (body(n="2"), 400, "n"),
    "n: true": (body(n=True), 400, "n"),
    "n: 1.5": (body(n=1.5), 400, "n"),
    "17:3": (body(size="17:3"), 400, "size"),
    "4096x4096": (body(size="4096x4096"), 400, "size"),
    "1000x1000": (body(size="1000x1000"), 400, "size"),
    "a size of numbers": (body(size=1024), 400, "size"),
    "8K": (body(size="1:1", resolution="8K"), 400, "resolution"),
    "quality best": (body(quality="best"), 400, "quality"),
    "model as list": (body(model=["gpt-image-2"]), 400, "model"),
    "gif": (body(output_format="gif"), 400, "output_format"),
    "compression 101": (
        body(output_format="jpeg", output_compression=101),
        400,
        "output_compression",
    ),
    "a transparent jpeg": (
        body(output_format="jpeg", background="transparent"),
        400,
        "background",
    ),
    "moderation off": (body(moderation="off"), 400, "moderation"),
    "response_format png": (body(response_format="png"), 400, "response_format"),
    "stream as text": (body(stream="yes"), 400, "stream"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_refused_clearly(client: httpx.Client, name: str) -> None:
    sent, status, param = HOSTILE[name]

    answer = client.post(PATH, content=sent)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["code"], str)
    assert error["message"]
    assert answer.headers["x-request-id"] == error["request_id"]


def test_nothing_of_all_that_was_held_or_bought(
    client: httpx.Client, shared_gateway: LiveGateway
) -> None:
    for sent, _, _ in HOSTILE.values():
        assert 400 <= client.post(PATH, content=sent).status_code < 500

    untouched = {"available": "1000", "held": "0", "spent": "0"}
    assert shared_gateway.balance("hostile") == untouched


def test_exactly_32_000_code_points_are_fine(client: httpx.Client) -> None:
    sent = body(prompt="🦊" * 32_000, size="3:1", quality="low")

    assert client.post("/v1/estimate", content=sent).status_code == 200
    assert client.post(PATH, content=sent).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Basic abc",
        "Bearer sk-x",
        "Bearer \xe9",
        "a" * 4000,
    ],
)
def test_without_a_valid_key_there_is_nothing(
    shared_gateway: LiveGateway, authorization: str | None
) -> None:
    headers = {}
    if authorization is not None:
        headers[b"authorization"] = authorization.encode("latin-1")

    answer = httpx.post(shared_gateway.url + PATH, content=body(), headers=headers)

    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_a_revoked_key_stops_within_seconds(shared_gateway: LiveGateway) -> None:
    shared_gateway.cli("tenants", "create", "leaver", "--credits", "1")
    made = shared_gateway.cli("keys", "create", "--tenant", "leaver", "--json").json
    with shared_gateway.client(made["key"]) as client:
        assert client.get("/v1/credits").status_code == 200
        shared_gateway.cli("keys", "revoke", made["key_id"])
        answers = [client.get("/v1/credits")]
        while answers[-1].status_code == 200 and len(answers) < 5_000:
            answers.append(client.get("/v1/credits"))

    assert answers[-1].status_code == 401
    assert answers[-1].json()["error"]["code"] == "key_disabled"


def test_a_link_opens_for_nobody_once_it_is_changed(
    shared_gateway: LiveGateway, client: httpx.Client
) -> None:
    made = client.post(PATH, content=body(size="3:1", response_format="url")).json()
    link = made["data"][0]["url"]

    assert httpx.get(link).status_code == 200
    assert httpx.get(link, headers={"authorization": "Bearer junk"}).status_code == 200
    for changed in (link[:-1], link.replace("/0.png", "/1.png"), link.split("?")[0]):
        answer = httpx.get(changed)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "link_invalid"


def test_the_sandbox_refuses_settings_that_make_no_sense(
    shared_gateway: LiveGateway,
) -> None:
    path = "/admin/v1/sandbox/sandbox-fair"
    with shared_gateway.client(ADMIN_KEY) as admin:
        before = admin.get(path).json()
        for wrong in (
            {"latency_ms": -1},
            {"failure_rate": 2},
            {"failure_kind": "gremlins"},
            {"typo": 1},
            [1],
        ):
            answer = admin.patch(path, json=wrong)
            assert answer.status_code == 400, wrong
        assert admin.get(path).json() == before
        assert admin.get("/admin/v1/sandbox/nobody").status_code == 404


def test_admin_routes_need_the_admin_key(
    shared_gateway: LiveGateway, client: httpx.Client
) -> None:
    assert client.get("/admin/v1/sandbox/sandbox-fair").status_code == 401


def test_unknown_paths_and_methods_are_errors_of_the_same_shape(
    client: httpx.Client,
) -> None:
    unknown = client.get("/v1/nothing/here")
    wrong = client.get(PATH)

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (
        404,
        "route_not_found",
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (
        405,
        "method_not_allowed",
    )
