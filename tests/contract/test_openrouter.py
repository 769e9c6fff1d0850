"""OpenRouter: what is peculiar to it, on the wire, in its errors and in its costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from providers.kit.contract import (
    Billed,
    Capabilities,
    FailureKind,
    Operation,
    Usage,
)
from providers.kit.spool import SpoolFolder
from providers.openrouter import judged, nanousd_of, tokens_of
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.openrouter_upstream import (
    MODEL,
    openrouter_error,
    openrouter_upstream,
)
from tests.contract.sending import request_of
from tests.contract.upstreams import K, an_input, close, file_of, tools
from tests.simulators.openrouter_server import KEY
from tests.simulators.pictures import png
from tests.simulators.server import Fault

EDIT = Operation.EDIT
NO, MAYBE, YES = Billed.NO, Billed.MAYBE, Billed.YES
SEEDREAM = "bytedance-seed/seedream-4.5"
LARGE = png(64, 32, padding=4_000_000)


# --- the shape of what is sent ---


async def sent(
    folder: Path, *, options: Mapping[str, object] | None = None, **changes: Any
) -> httpx.Request:
    account = an_account(base_url="http://upstream.test/api/v1/", options=options or {})
    job = a_job(**{"model": MODEL, **changes})
    return await request_of("openrouter", account, job, folder)


async def test_a_plain_job_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    request = await sent(tmp_path)

    assert str(request.url) == "http://upstream.test/api/v1/images"
    assert request.headers["authorization"] == f"Bearer {an_account().secret}"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.content) == {
        "model": MODEL,
        "prompt": a_job().prompt,
        "n": 1,
        "size": "64x32",
        "quality": "low",
        "output_format": "png",
    }


@pytest.mark.parametrize("encoding", ["raw", "base64"])
async def test_an_edit_is_a_generation_with_data_uris(
    encoding: Any, tmp_path: Path
) -> None:
    spools = SpoolFolder(tmp_path)
    one = an_input(spools, b"first", encoding=encoding)
    two = an_input(spools, b"second!", media_type="image/webp", encoding=encoding)
    request = await sent(tmp_path, operation=EDIT, references=(one, two))

    assert str(request.url) == "http://upstream.test/api/v1/images"
    assert int(request.headers["content-length"]) == len(request.content)
    assert "transfer-encoding" not in request.headers
    assert request.headers["content-type"] == "application/json"
    body = json.loads(request.content)
    assert set(body) == {
        *("model", "prompt", "n", "size", "quality", "output_format"),
        "input_references",
    }
    assert body["input_references"] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,Zmlyc3Q="}},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/webp;base64,c2Vjb25kIQ=="},
        },
    ]


async def test_every_field_that_it_knows_is_passed_on(tmp_path: Path) -> None:
    request = await sent(
        tmp_path,
        n=3,
        background="opaque",
        output_format="webp",
        output_compression=0,
        moderation="low",
        user="u-1",
        safety_identifier="s-1",
        input_fidelity="high",
    )
    body = json.loads(request.content)
    assert body.items() >= {
        ("n", 3),
        ("background", "opaque"),
        ("output_format", "webp"),
        ("output_compression", 0),
        ("user", "u-1"),
    }
    assert body["provider"] == {"options": {"openai": {"moderation": "low"}}}
    assert not {"safety_identifier", "input_fidelity", "moderation"} & set(body)


async def test_whoever_is_only_told_for_safety_is_the_user(tmp_path: Path) -> None:
    body = json.loads((await sent(tmp_path, safety_identifier="s-1")).content)
    assert body["user"] == "s-1"


async def test_a_png_is_never_compressed(tmp_path: Path) -> None:
    request = await sent(tmp_path, output_compression=50)
    assert "output_compression" not in json.loads(request.content)


@pytest.mark.parametrize(
    ("width_px", "height_px", "told"),
    [(1536, 864, "16:9"), (1024, 1024, "1:1"), (None, None, "auto")],
)
async def test_a_size_can_be_told_as_an_aspect_ratio(
    width_px: int | None, height_px: int | None, told: str, tmp_path: Path
) -> None:
    options = {"dimensions": "aspect_ratio", "sizes": ["1536x864", "1024x1024"]}
    request = await sent(
        tmp_path, options=options, width_px=width_px, height_px=height_px
    )
    body = json.loads(request.content)
    assert body["aspect_ratio"] == told
    assert "size" not in body


async def test_a_size_that_is_left_to_the_model_is_not_told(tmp_path: Path) -> None:
    body = json.loads((await sent(tmp_path, width_px=None, height_px=None)).content)
    assert not {"size", "aspect_ratio"} & set(body)


async def test_options_say_where_to_route_and_what_to_leave_out(tmp_path: Path) -> None:
    options = {
        "strip_fields": ["size", "output_format"],
        "provider": {"only": ["openai"], "sort": "price", "allow_fallbacks": False},
    }
    body = json.loads((await sent(tmp_path, options=options)).content)
    assert set(body) == {"model", "prompt", "n", "quality", "provider"}
    assert body["provider"] == {
        "only": ["openai"],
        "sort": "price",
        "allow_fallbacks": False,
    }


async def test_a_plain_call_never_mentions_streams(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        close(await upstream.make(partial_images=2))
        looks, done = await upstream.watch(partial_images=2)
        close(done)
        for look in looks:
            look.image.payload.close()
        plain, streamed = (request.json() for request in simulator.requests)
    assert streamed == plain | {"stream": True}


# --- what it can do ---


async def test_options_say_what_the_models_can_do(tmp_path: Path) -> None:
    options = {
        "n_max": 1,
        "sizes": ["1024x1024"],
        "qualities": ["low"],
        "output_formats": ["png"],
        "backgrounds": ["opaque", "transparent"],
        "edits": False,
        "stream": False,
    }
    async with tools(tmp_path) as given:
        provider = PROVIDERS["openrouter"](an_account(options=options), given)
        assert provider.capabilities("any") == Capabilities(
            n_max=1,
            sizes=frozenset({(1024, 1024)}),
            qualities=frozenset({"low"}),
            output_formats=frozenset({"png"}),
        )


@pytest.mark.parametrize(
    ("options", "count", "masked"),
    [({"edits": False}, 1, False), ({"references_max": 1}, 2, False), ({}, 1, True)],
    ids=["edits", "several", "mask"],
)
async def test_what_it_cannot_do_is_not_asked_for(
    options: dict[str, object], count: int, masked: bool, tmp_path: Path
) -> None:
    async with openrouter_upstream(tmp_path, **options) as (upstream, simulator):
        one = an_input(upstream.spools, png(64, 32))
        error = await upstream.failure(
            operation=EDIT, references=(one,) * count, mask=one if masked else None
        )
        assert error.kind is K.UNSUPPORTED
        assert not simulator.requests


async def test_no_stream_is_asked_for_where_there_are_none(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path, stream=False) as (upstream, simulator):
        error = await upstream.stream_failure()
        assert error.kind is K.UNSUPPORTED
        assert not simulator.requests


# --- failures ---


def quoted(raw: object, status: int = 400, **metadata: Any) -> Fault:
    """Fail with what a provider is quoted to have answered."""
    return openrouter_error(
        status, "Provider returned error", raw=raw, provider_name="OpenAI", **metadata
    )


def openai_says(code: str | None, message: str = "no", **more: object) -> str:
    return json.dumps({"error": {"code": code, "message": message, **more}})


def told(code: int | str, message: str = "no", **metadata: Any) -> Fault:
    """Fail in the body of a success."""
    error = {"code": code, "message": message, "metadata": metadata}
    return Fault(answer="error", body=error)


FAULTS = [
    # OpenRouter's own.
    (openrouter_error(400), K.INVALID_REQUEST, NO),
    (openrouter_error(400, "x/y is not a valid model ID"), K.UNSUPPORTED, NO),
    (openrouter_error(400, "x does not support n > 1"), K.UNSUPPORTED, NO),
    (openrouter_error(401, "User not found."), K.AUTH, NO),
    (openrouter_error(402), K.INSUFFICIENT_FUNDS, NO),
    (
        openrouter_error(402, limit_source="openrouter_credits"),
        K.INSUFFICIENT_FUNDS,
        NO,
    ),
    (
        openrouter_error(402, limit_source="openrouter_key_limit"),
        K.INSUFFICIENT_FUNDS,
        NO,
    ),
    (
        openrouter_error(
            402,
            limit_source="openrouter_in_flight_budget",
            reason="in_flight_budget_exhausted",
        ),
        K.RATE_LIMITED,
        NO,
    ),
    (
        openrouter_error(
            402,
            limit_source="openrouter_in_flight_budget",
            reason="weight_exceeds_budget",
        ),
        K.INSUFFICIENT_FUNDS,
        NO,
    ),
    (openrouter_error(403, "Only admins may."), K.AUTH, NO),
    (openrouter_error(403, error_type="permission_denied"), K.AUTH, NO),
    (openrouter_error(403, reasons=["violence"]), K.CONTENT_POLICY, NO),
    (openrouter_error(403, flagged_input="blood"), K.CONTENT_POLICY, NO),
    # One tenant's prompt must not shut the account for all.
    (
        openrouter_error(403, "No: injection", patterns=["ignore all"]),
        K.CONTENT_POLICY,
        NO,
    ),
    (openrouter_error(403, "Request blocked: a secret"), K.CONTENT_POLICY, NO),
    (openrouter_error(404, "No endpoints found for x/y."), K.UNSUPPORTED, NO),
    (openrouter_error(404, error_type="not_found"), K.UNSUPPORTED, NO),
    (openrouter_error(404, error_type="image_not_found"), K.BAD_GATEWAY, NO),
    (openrouter_error(408), K.TIMEOUT, MAYBE),
    (openrouter_error(413), K.UNSUPPORTED, NO),
    (openrouter_error(413, error_type="payload_too_large"), K.UNSUPPORTED, NO),
    (openrouter_error(422, error_type="unprocessable"), K.INVALID_REQUEST, NO),
    (openrouter_error(429), K.RATE_LIMITED, NO),
    (openrouter_error(429, error_type="rate_limit_exceeded"), K.RATE_LIMITED, NO),
    (openrouter_error(500, error_type="server"), K.BAD_GATEWAY, NO),
    (openrouter_error(500, error_type="unmapped"), K.BAD_GATEWAY, NO),
    (openrouter_error(502, error_type="provider_unavailable"), K.BAD_GATEWAY, NO),
    (openrouter_error(503, "No available model provider"), K.OVERLOADED, NO),
    (openrouter_error(503, error_type="provider_overloaded"), K.OVERLOADED, NO),
    (openrouter_error(504, error_type="timeout"), K.TIMEOUT, MAYBE),
    (openrouter_error(524), K.TIMEOUT, MAYBE),
    (openrouter_error(529), K.OVERLOADED, NO),
    (openrouter_error(418, "never seen before"), K.BAD_GATEWAY, NO),
    (Fault(status=524, body="<html>a timeout</html>"), K.TIMEOUT, MAYBE),
    (Fault(status=502, body="<html>Bad gateway</html>"), K.BAD_GATEWAY, NO),
    (Fault(status=400, body=b'{"error":'), K.INVALID_REQUEST, NO),
    (Fault(status=503, body=[1]), K.OVERLOADED, NO),
    (Fault(status=302, headers={"Location": "/x"}), K.BAD_GATEWAY, NO),
    # Pictures and prompts.
    (
        openrouter_error(400, error_type="content_policy_violation"),
        K.CONTENT_POLICY,
        NO,
    ),
    (openrouter_error(400, error_type="refusal"), K.CONTENT_POLICY, NO),
    (openrouter_error(400, error_type="invalid_image"), K.INVALID_REQUEST, NO),
    (openrouter_error(400, error_type="image_too_large"), K.INVALID_REQUEST, NO),
    (openrouter_error(400, error_type="string_too_long"), K.INVALID_REQUEST, NO),
    (openrouter_error(400, error_type="image_download_failed"), K.BAD_GATEWAY, NO),
    # The provider's, quoted.
    (quoted(openai_says("moderation_blocked")), K.CONTENT_POLICY, NO),
    (
        quoted(
            openai_says(
                "moderation_blocked", moderation_details={"moderation_stage": "output"}
            )
        ),
        K.CONTENT_POLICY,
        MAYBE,
    ),
    (
        quoted({"error": {"message": "rejected by the safety system"}}),
        K.CONTENT_POLICY,
        NO,
    ),
    (quoted("flagged by our moderation"), K.CONTENT_POLICY, NO),
    (openrouter_error(400, provider_code="content_filter"), K.CONTENT_POLICY, NO),
    (quoted(openai_says("unknown_parameter")), K.UNSUPPORTED, NO),
    (quoted(openai_says("invalid_value")), K.INVALID_REQUEST, NO),
    # It is OpenRouter that owes them, not we.
    (quoted(openai_says("invalid_api_key"), 401), K.BAD_GATEWAY, NO),
    (quoted(openai_says("insufficient_quota"), 429), K.BAD_GATEWAY, NO),
    (quoted("nope", 403, error_type="authentication"), K.BAD_GATEWAY, NO),
    (
        quoted(
            openai_says("insufficient_quota"), 429, error_type="rate_limit_exceeded"
        ),
        K.RATE_LIMITED,
        NO,
    ),
    # In the body of a success.
    (Fault(answer="error"), K.BAD_GATEWAY, MAYBE),
    (told(502), K.BAD_GATEWAY, MAYBE),
    (told(500, error_type="server"), K.BAD_GATEWAY, MAYBE),
    (told("server_error"), K.BAD_GATEWAY, MAYBE),
    (told(429), K.RATE_LIMITED, NO),
    (told(529), K.OVERLOADED, NO),
    (told(524), K.TIMEOUT, MAYBE),
    (told(402), K.INSUFFICIENT_FUNDS, NO),
    (told(403, reasons=["violence"]), K.CONTENT_POLICY, NO),
    (told(400, error_type="content_policy_violation"), K.CONTENT_POLICY, NO),
    (told(400, error_type="invalid_request"), K.INVALID_REQUEST, NO),
    # Successes that are none.
    (Fault(answer="html"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="gzip"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="bad_base64"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="text"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="svg"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="empty"), K.NO_OUTPUT, MAYBE),
    (Fault(answer="null"), K.NO_OUTPUT, MAYBE),
    (Fault(answer="url"), K.RESULT_LOST, YES),
    # Connections.
    (Fault(close="before_reply"), K.TIMEOUT, MAYBE),
    (Fault(close="reset"), K.TIMEOUT, MAYBE),
    (Fault(close="mid_body"), K.TIMEOUT, MAYBE),
    (Fault(close="mid_body", answer="big"), K.TIMEOUT, MAYBE),
]


@pytest.mark.parametrize(("fault", "kind", "billed"), FAULTS, ids=str)
async def test_a_failure_is_what_it_is_called_by(
    fault: Fault, kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        if billed is NO:
            assert not simulator.purchases
        assert upstream.files() == 0


async def test_the_most_telling_code_is_kept(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(
            openrouter_error(503, error_type="provider_overloaded"),
            openrouter_error(418),
            told(502, f"the key {KEY}"),
        )
        codes = [(await upstream.failure()).upstream_code for _ in range(2)]
        error = await upstream.failure()
    assert codes == ["provider_overloaded", "418"]
    assert (error.status, error.upstream_code) == (502, "502")
    assert KEY not in error.detail


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [({"Retry-After": "7"}, 7.0), ({"retry-after-ms": "1500"}, 1.5), ({}, None)],
)
@pytest.mark.parametrize("status", [402, 429, 503])
async def test_it_is_left_alone_for_as_long_as_it_asks(
    status: int, headers: dict[str, str], wait_s: float | None, tmp_path: Path
) -> None:
    body = openrouter_error(status, limit_source="openrouter_in_flight_budget").body
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(status=status, body=body, headers=headers))
        error = await upstream.failure()
    assert error.retry_after_s == wait_s
    assert error.kind is K.RATE_LIMITED


@pytest.mark.parametrize(
    ("issues", "kind"),
    [
        ([{"path": ["prompt"], "message": "Too small"}], K.INVALID_REQUEST),
        ([{"path": ["quality"], "message": "Invalid option"}], K.UNSUPPORTED),
        ([{"path": []}], K.UNSUPPORTED),
        ("no JSON", K.INVALID_REQUEST),
        ([1, None], K.UNSUPPORTED),
    ],
)
def test_what_does_not_fit_the_schema_is_for_others_unless_it_is_the_prompt(
    issues: object, kind: FailureKind
) -> None:
    message = issues if isinstance(issues, str) else json.dumps(issues)
    body = {"success": False, "error": {"name": "ZodError", "message": message}}
    error = judged(400, {}, body, "")
    assert (error.kind, error.upstream_code) == (kind, "ZodError")


async def test_a_prompt_that_is_no_unicode_is_the_clients_fault(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        edit: dict[str, Any] = {"operation": EDIT, "references": (reference,)}
        for more in ({}, edit):
            error = await upstream.failure(prompt="\ud800", **more)
            assert error.kind is K.INVALID_REQUEST
        assert not simulator.requests
        reference.payload.close()


# --- pictures ---


async def test_references_arrive_byte_for_byte(tmp_path: Path) -> None:
    files = [LARGE, png(64, 32, padding=1), png(64, 32, padding=2)]
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        inputs = tuple(an_input(upstream.spools, file) for file in files)
        done = await upstream.make(operation=EDIT, references=inputs)
        (bought,) = simulator.purchases
        for one in inputs:
            one.payload.close()
    assert bought.references == tuple(hashlib.sha256(f).hexdigest() for f in files)
    close(done)


async def test_a_picture_is_what_its_header_says(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="other_size"))
        done = await upstream.make(width_px=1024, output_format="jpeg")
    (made,) = done.images
    assert (made.width_px, made.height_px) == (64, 32)
    assert made.media_type == "image/png"
    assert file_of(made) == png(64, 32)


async def test_fewer_pictures_than_asked_for_are_still_delivered(
    tmp_path: Path,
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="one_less"))
        done = await upstream.make(n=3)
        (bought,) = simulator.purchases
    assert len(done.images) == 2
    assert done.cost_nanousd == Decimal(bought.cost_usd) * 10**9
    close(done)


async def test_a_picture_has_the_name_of_its_generation(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, _):
        done = await upstream.make()
    assert done.upstream_request_id == "gen-img-simulated"
    close(done)


# --- what it costs ---


async def test_the_cost_is_what_was_charged_to_the_last_digit(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        done = await upstream.make(n=3)
        flat = await upstream.make(model=SEEDREAM)
        tokens, picture = simulator.purchases
    assert tokens.cost_usd == "0.006045"
    assert done.cost_nanousd == 6_045_000
    # Rounded up: an attempt never costs less than it did.
    assert picture.cost_usd == "0.0400000001"
    assert flat.cost_nanousd == 40_000_001
    close(done)
    close(flat)


async def test_with_a_key_of_ones_own_the_providers_bill_comes_on_top(
    tmp_path: Path,
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="byok"))
        done = await upstream.make()
        (bought,) = simulator.purchases
    assert done.cost_nanousd == (Decimal(bought.cost_usd) + Decimal("0.0001")) * 10**9
    close(done)


@pytest.mark.parametrize(
    ("reported", "nanousd"),
    [
        ({"cost": Decimal("0.04")}, 40_000_000),
        ({"cost": Decimal("1E-12")}, 1),
        ({"cost": 1}, 1_000_000_000),
        ({"cost": 0}, 0),
        ({"cost": 0.04}, None),
        ({"cost": "0.04"}, None),
        ({"cost": True}, None),
        ({"cost": Decimal("-0.04")}, None),
        ({"cost": Decimal("1E+30")}, None),
        ({"cost": None}, None),
        ({}, None),
        (None, None),
        ({"cost": 0, "is_byok": True}, None),
        ({"cost": 0, "is_byok": True, "cost_details": [1]}, None),
        (
            {
                "cost": 0,
                "is_byok": True,
                "cost_details": {"upstream_inference_cost": 1},
            },
            1_000_000_000,
        ),
    ],
)
def test_a_cost_that_cannot_be_true_is_none(
    reported: object, nanousd: int | None
) -> None:
    assert nanousd_of(reported) == nanousd


@pytest.mark.parametrize("answer", ["no_usage", "negative_usage", "zero_usage"])
async def test_a_usage_that_cannot_be_true_is_no_usage(
    answer: str, tmp_path: Path
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        done = await upstream.make()
    assert (done.usage, done.cost_nanousd) == (None, None)
    close(done)


async def test_the_cost_counts_also_where_the_tokens_are_not_believed(
    tmp_path: Path,
) -> None:
    async with openrouter_upstream(tmp_path, usage="ignore") as (upstream, _):
        done = await upstream.make()
    assert (done.usage, done.cost_nanousd) == (None, 2_015_000)
    close(done)


async def test_the_tokens_of_an_edit_are_split_as_the_gateway_expects(
    tmp_path: Path,
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, _):
        reference = an_input(upstream.spools, png(64, 32))
        done = await upstream.make(
            operation=EDIT,
            references=(reference,),
            n=2,
            expected=Usage(text_input=9, image_input=2, image_output=62),
        )
        reference.payload.close()
    assert done.usage == Usage(text_input=26, image_input=4, image_output=130)
    close(done)


@pytest.mark.parametrize(
    ("changes", "usage"),
    [
        ({}, Usage(text_input=15, image_input=5, image_output=62)),
        (
            {"prompt_tokens_details": {"cached_tokens": 16}},
            Usage(text_cached=15, image_input=4, image_cached=1, image_output=62),
        ),
        ({"prompt_tokens_details": None}, Usage(15, 0, 5, 0, 62)),
        (
            {"prompt_tokens": 3, "total_tokens": 65},
            Usage(image_input=3, image_output=62),
        ),
        ({"prompt_tokens": -3}, None),
        ({"prompt_tokens": "20"}, None),
        ({"completion_tokens": 0}, None),
        ({"total_tokens": 1}, None),
    ],
)
def test_tokens_are_believed_if_they_add_up(
    changes: dict[str, object], usage: Usage | None
) -> None:
    counts = {"prompt_tokens": 20, "completion_tokens": 62, "total_tokens": 82}
    job = a_job(expected=Usage(text_input=9, image_input=5, image_output=62))
    assert tokens_of(counts | changes, job) == usage


# --- streams ---


async def test_a_model_without_streams_answers_as_ever(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        looks, done = await upstream.watch(model=SEEDREAM, partial_images=2)
        assert simulator.requests[0].json()["stream"] is True
    assert not looks
    assert done.cost_nanousd == 40_000_001
    close(done)


async def test_a_streamed_picture_has_its_cost(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        looks, done = await upstream.watch(partial_images=1)
        (bought,) = simulator.purchases
    assert len(looks) == 1
    assert done.cost_nanousd == Decimal(bought.cost_usd) * 10**9
    looks[0].image.payload.close()
    close(done)


async def test_what_a_broken_stream_cost_is_left_to_the_estimate(
    tmp_path: Path,
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(close="mid_body", answer="one_less"))
        looks, done = await upstream.watch(n=3)
    assert not looks
    assert len(done.images) == 2
    assert (done.usage, done.cost_nanousd) == (None, None)
    close(done)
    assert not list(tmp_path.iterdir())


def in_mid_stream(**error: object) -> Fault:
    return Fault(answer="error_event", body=error)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (
            in_mid_stream(message="Generation failed", code="server_error"),
            K.BAD_GATEWAY,
        ),
        (in_mid_stream(message="no", code="moderation_blocked"), K.CONTENT_POLICY),
        (in_mid_stream(message="no", code=429), K.RATE_LIMITED),
        (
            in_mid_stream(
                message="no", metadata={"error_type": "content_policy_violation"}
            ),
            K.CONTENT_POLICY,
        ),
        (Fault(answer="no_completed"), K.NO_OUTPUT),
        (Fault(answer="svg"), K.BAD_GATEWAY),
        (Fault(answer="big", close="mid_body"), K.TIMEOUT),
    ],
    ids=str,
)
async def test_a_stream_that_breaks_after_a_look_was_maybe_billed(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.stream_failure(partial_images=1, looks=1)
        assert (error.kind, error.billed) == (kind, MAYBE)
        assert upstream.files() == 0


# --- the simulator refuses what OpenRouter refuses ---


async def test_the_simulator_rejects_what_openrouter_rejects(tmp_path: Path) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        refused: list[tuple[dict[str, Any], FailureKind, str]] = [
            ({"model": "openai/gpt-image-9"}, K.UNSUPPORTED, "400"),
            ({"quality": "best"}, K.UNSUPPORTED, "ZodError"),
            ({"quality": "max"}, K.INVALID_REQUEST, "invalid_request"),
            ({"prompt": ""}, K.INVALID_REQUEST, "ZodError"),
            ({"n": 11}, K.UNSUPPORTED, "ZodError"),
            ({"model": SEEDREAM, "n": 2}, K.UNSUPPORTED, "400"),
            ({"prompt": "[moderate] x"}, K.CONTENT_POLICY, "403"),
            ({"background": "transparent"}, K.INVALID_REQUEST, "invalid_request"),
        ]
        for changes, kind, code in refused:
            error = await upstream.failure(**changes)
            assert (error.kind, error.upstream_code) == (kind, code)
        assert not simulator.purchases

        headers = {"Authorization": f"Bearer {KEY}"}
        plain = {"model": MODEL, "prompt": "x", "quality": "low", "size": "64x32"}
        link = {"type": "image_url", "image_url": {"url": "https://x.test/1.png"}}
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"{simulator.base_url}/images"
            for more, status in (
                ({"aspect_ratio": "1:1"}, 400),
                ({"input_references": [link]}, 400),
                ({"input_references": [link] * 17}, 400),
                ({"nobody": "knows"}, 200),
            ):
                answer = await client.post(url, headers=headers, json=plain | more)
                assert answer.status_code == status, more
            # The schema comes before the key.
            assert (await client.post(url, json={})).status_code == 400
            assert (await client.post(url, json=plain)).status_code == 401
        assert len(simulator.purchases) == 1
