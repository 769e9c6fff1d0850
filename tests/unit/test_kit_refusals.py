"""Every error that OpenAI-style APIs are known to answer with has its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from providers.kit import refusals
from providers.kit.contract import Billed, FailureKind, ProviderError

K = FailureKind
KEY = "sk-simulated-key-0123456789"


def body_of(code: object = None, message: str = "no", **more: object) -> object:
    return {"error": {"message": message, "type": "x", "code": code, **more}}


REFUSALS: list[tuple[int, object, FailureKind]] = [
    # by code, whatever the status
    (400, body_of("moderation_blocked"), K.CONTENT_POLICY),
    (400, body_of("content_policy_violation"), K.CONTENT_POLICY),
    (400, body_of("contentFilter"), K.CONTENT_POLICY),
    (
        400,
        body_of("bad", innererror={"code": "ResponsibleAIPolicyViolation"}),
        K.CONTENT_POLICY,
    ),
    (400, body_of("billing_hard_limit_reached"), K.INSUFFICIENT_FUNDS),
    (429, body_of("insufficient_quota"), K.INSUFFICIENT_FUNDS),
    (429, body_of("credit_balance_exhausted"), K.INSUFFICIENT_FUNDS),
    (429, body_of("organization_spend_limit_exceeded"), K.INSUFFICIENT_FUNDS),
    (429, body_of("project_spend_limit_exceeded"), K.INSUFFICIENT_FUNDS),
    (429, body_of("organization_usage_limit_exceeded"), K.INSUFFICIENT_FUNDS),
    (429, body_of(None, type="insufficient_quota"), K.INSUFFICIENT_FUNDS),
    (429, body_of("rate_limit_exceeded"), K.RATE_LIMITED),
    (503, body_of("slow_down"), K.RATE_LIMITED),
    (500, body_of("server_is_overloaded"), K.OVERLOADED),
    (400, body_of("unknown_parameter"), K.UNSUPPORTED),
    (400, body_of("unsupported_parameter"), K.UNSUPPORTED),
    (400, body_of("unsupported_value"), K.UNSUPPORTED),
    (404, body_of("model_not_found"), K.UNSUPPORTED),
    (400, body_of("OperationNotSupported"), K.UNSUPPORTED),
    (400, body_of("invalid_image_file"), K.INVALID_REQUEST),
    (401, body_of("invalid_api_key"), K.AUTH),
    # by words
    (400, body_of(None, "Rejected by the safety system."), K.CONTENT_POLICY),
    (403, body_of(None, "Your prompt was flagged"), K.CONTENT_POLICY),
    (403, body_of("Forbidden", "temporarily blocked, content policy"), K.AUTH),
    (400, body_of(None, "names are case-sensitive"), K.INVALID_REQUEST),
    (403, body_of(None, "User is locked: Exhausted balance"), K.INSUFFICIENT_FUNDS),
    (400, body_of(None, "Unknown parameter: 'background'."), K.UNSUPPORTED),
    (400, body_of("BadRequest", "API version not supported"), K.UNSUPPORTED),
    (500, body_of(None, "the moderation service is down"), K.BAD_GATEWAY),
    # by status
    (400, body_of(), K.INVALID_REQUEST),
    (401, body_of(), K.AUTH),
    (402, body_of(), K.INSUFFICIENT_FUNDS),
    (403, body_of(), K.AUTH),
    (404, body_of(), K.UNSUPPORTED),
    (408, body_of(), K.TIMEOUT),
    (409, body_of(), K.BAD_GATEWAY),
    (413, body_of(), K.INVALID_REQUEST),
    (422, body_of(), K.INVALID_REQUEST),
    (429, body_of(), K.RATE_LIMITED),
    (499, body_of(), K.TIMEOUT),
    (500, body_of(), K.BAD_GATEWAY),
    (502, body_of(), K.BAD_GATEWAY),
    (503, body_of(), K.OVERLOADED),
    (504, body_of(), K.TIMEOUT),
    (524, body_of(), K.TIMEOUT),
    (529, body_of(), K.OVERLOADED),
    (599, body_of(), K.BAD_GATEWAY),
    (302, body_of(), K.BAD_GATEWAY),
    # other shapes
    (400, {"error": "flagged by moderation"}, K.CONTENT_POLICY),
    (500, {"error": "out of memory"}, K.BAD_GATEWAY),
    (422, {"detail": "n must be 1"}, K.INVALID_REQUEST),
    (422, {"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, K.INVALID_REQUEST),
    (422, {"detail": [{"type": "extra_forbidden", "msg": "x"}]}, K.UNSUPPORTED),
    (429, {"message": "insufficient balance", "code": 1}, K.INSUFFICIENT_FUNDS),
    (429, {"error": True, "message": "insufficient quota"}, K.INSUFFICIENT_FUNDS),
    (503, "plain text", K.OVERLOADED),
    (400, ["list"], K.INVALID_REQUEST),
    (400, {"error": {"message": ["x"], "code": {"a": 1}}}, K.INVALID_REQUEST),
    (200, body_of(), K.BAD_GATEWAY),
    (200, body_of(429), K.RATE_LIMITED),
    (200, body_of("insufficient_quota"), K.INSUFFICIENT_FUNDS),
    (200, body_of(None, "flagged"), K.CONTENT_POLICY),
    (200, body_of(None, type="invalid_request_error"), K.INVALID_REQUEST),
]


def refusal(
    status: int, body: object, headers: Mapping[str, str] | None = None
) -> ProviderError:
    data = json.dumps(body).encode()
    return refusals.refusal(status, headers or {}, data, secret=KEY)


@pytest.mark.parametrize(("status", "body", "kind"), REFUSALS)
def test_an_error_is_classified(status: int, body: object, kind: FailureKind) -> None:
    error = refusal(status, body)
    assert error.kind is kind
    told = {K.INVALID_REQUEST, K.CONTENT_POLICY}
    assert error.client_message is None or kind in told


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 60_000, b"{"])
def test_a_body_that_is_no_json_is_classified_by_its_status(body: bytes) -> None:
    assert refusals.refusal(503, {}, body, secret=KEY).kind is K.OVERLOADED


def test_moderation_of_the_finished_picture_was_maybe_billed() -> None:
    for stage, billed in (("output", Billed.MAYBE), ("input", Billed.NO)):
        details = {"moderation_stage": stage}
        error = refusal(400, body_of("moderation_blocked", moderation_details=details))
        assert error.billed is billed


def test_an_error_within_a_success_was_maybe_billed() -> None:
    assert refusal(200, body_of()).billed is Billed.MAYBE
    assert refusal(502, body_of()).billed is Billed.NO


@pytest.mark.parametrize("status", [408, 499, 504, 524])
def test_an_upstream_that_gave_up_waiting_maybe_billed(status: int) -> None:
    assert refusal(status, None).billed is Billed.MAYBE


def test_the_client_is_told_why_without_secrets_and_in_bounds() -> None:
    error = refusal(400, body_of(None, f"'size' is wrong ({KEY})" + "x" * 9999))
    assert error.client_message is not None
    assert error.client_message.startswith("'size' is wrong ([secret])")
    assert len(error.client_message) == 500
    assert error.status == 400


def test_the_field_that_fastapi_names_reaches_the_client() -> None:
    body = {"detail": [{"loc": ["body", "n"], "msg": "too many", "type": "value"}]}
    assert refusal(422, body).client_message == "body.n: too many"


def test_the_upstreams_code_is_kept_as_it_came() -> None:
    assert refusal(400, body_of("DeploymentNotFound")).upstream_code == (
        "DeploymentNotFound"
    )


@pytest.mark.parametrize(
    ("headers", "message", "wait_s"),
    [
        ({"retry-after": "7"}, "", 7),
        ({"retry-after-ms": "1500"}, "", 1.5),
        ({}, "Please try again in 12s.", 12),
        ({}, "Please try again in 120ms.", 0.12),
        ({}, "Rate limit resets in ~9999s", 300),
        ({}, "no", None),
    ],
)
def test_a_rate_limit_says_how_long_to_stay_away(
    headers: dict[str, str], message: str, wait_s: float | None
) -> None:
    error = refusal(429, body_of("rate_limit_exceeded", message), headers)
    assert error.retry_after_s == wait_s


def test_a_refusal_that_the_upstream_wants_retried_is_not_the_clients_fault() -> None:
    assert refusal(400, body_of(), {"x-should-retry": "true"}).kind is K.BAD_GATEWAY
    assert refusal(400, body_of(), {"x-should-retry": "false"}).kind is (
        K.INVALID_REQUEST
    )
