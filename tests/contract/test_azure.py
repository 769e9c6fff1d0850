"""What is peculiar to azure: names, credentials, versions, and how it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx

from providers.kit.contract import (
    Billed,
    Done,
    FailureKind,
    Operation,
    ProviderError,
    Usage,
)
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.azure_upstream import azure_error, azure_upstream
from tests.contract.upstreams import K, an_input, file_of, tools
from tests.simulators.azure_server import KEY, TOKEN
from tests.simulators.pictures import png
from tests.simulators.server import Fault

GENERATE, EDIT = Operation.GENERATE, Operation.EDIT
FORMS = ["v1", "deployment"]
each_form = pytest.mark.parametrize("form", FORMS)
PRINTS_TOKEN = [sys.executable, "-c", f"print({TOKEN!r})"]


# --- the shape of what is sent ---


@each_form
async def test_a_generation_names_its_deployment_once(
    form: str, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, form=form) as (upstream, simulator):
        done = await upstream.make(model="prod-pictures")
        done.images[0].payload.close()
        (seen,) = simulator.requests
        (bought,) = simulator.purchases
    fields = {
        "prompt": a_job().prompt,
        "n": 1,
        "size": "64x32",
        "quality": "low",
        "output_format": "png",
    }
    if form == "v1":
        assert seen.path == "/openai/v1/images/generations"
        assert seen.json() == {"model": "prod-pictures", **fields}
    else:
        assert seen.path == (
            "/openai/deployments/prod-pictures/images/generations"
            "?api-version=2025-04-01-preview"
        )
        assert seen.json() == fields
    assert seen.headers["api-key"] == KEY
    assert "authorization" not in seen.headers
    assert bought.model == "gpt-image-2"


@each_form
async def test_an_edit_names_its_deployment_once(form: str, tmp_path: Path) -> None:
    pictures = [png(64, 32, padding=1), png(64, 32, padding=2)]
    clear = png(64, 32, clear=True)
    async with azure_upstream(tmp_path, form=form) as (upstream, simulator):
        references = tuple(an_input(upstream.spools, file) for file in pictures)
        done = await upstream.make(
            operation=EDIT, references=references, mask=an_input(upstream.spools, clear)
        )
        (seen,) = simulator.requests
        (bought,) = simulator.purchases
        # 64 x 32 is two patches.
        assert done.usage == Usage(text_input=13, image_input=4, image_output=65)
        done.images[0].payload.close()
    named = [part.head for part in seen.form if part.name == "model"]
    if form == "v1":
        assert seen.path == "/openai/v1/images/edits"
        assert named == [b"gpt-image-2"]
    else:
        assert seen.route == "/openai/deployments/gpt-image-2/images/edits"
        assert named == []
    assert [part.name for part in seen.form if part.filename] == [
        "image[]",
        "image[]",
        "mask",
    ]
    assert bought.references == tuple(map(sha256, pictures))
    assert bought.mask == sha256(clear)


def sha256(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


@each_form
async def test_streams_and_edits_that_stream_are_openais(
    form: str, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, form=form) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        for job in ({}, {"operation": EDIT, "references": (reference,)}):
            looks, done = await upstream.watch(partial_images=2, **job)
            assert [look.index for look in looks] == [0, 1]
            for made in (*(look.image for look in looks), *done.images):
                made.payload.close()
        assert [purchase.stream for purchase in simulator.purchases] == [True, True]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "/openai/v1/images/generations"),
        (
            {"api_version": "preview"},
            "/openai/v1/images/generations?api-version=preview",
        ),
        (
            {"form": "deployment", "api_version": "2026-02-01"},
            (
                "/openai/deployments/sharp%20pictures%2Feu/images/generations"
                "?api-version=2026-02-01"
            ),
        ),
    ],
)
async def test_a_version_goes_where_it_belongs(
    options: dict[str, Any], path: str, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, **options) as (upstream, simulator):
        done = await upstream.make(model="sharp pictures/eu")
        done.images[0].payload.close()
        assert [seen.path for seen in simulator.requests] == [path]
        assert simulator.purchases[0].model == "gpt-image-2.5-flare"


@pytest.mark.parametrize(
    ("model", "models", "told"),
    [
        ("gpt-image-2", {}, False),
        ("prod-pictures", {}, True),
        ("prod-pictures", {"prod-pictures": "gpt-image-2"}, False),
        ("gpt-image-2", {"gpt-image-2": "gpt-image-1-mini"}, True),
    ],
)
async def test_the_model_behind_a_deployment_decides_on_fidelity(
    model: str, models: dict[str, str], told: bool, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, models=models) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        job = {"operation": EDIT, "references": (reference,), "input_fidelity": "high"}
        if told:
            error = await upstream.failure(model=model, **job)
            # The resource says that it cannot; somebody else may.
            assert error.kind is K.UNSUPPORTED
        else:
            done = await upstream.make(model=model, **job)
            done.images[0].payload.close()
        names = {part.name for part in simulator.requests[0].form}
        assert ("input_fidelity" in names) is told


async def test_unwanted_fields_are_left_out(tmp_path: Path) -> None:
    unwanted = ["moderation", "safety_identifier"]
    async with azure_upstream(tmp_path, strip_fields=unwanted) as (upstream, simulator):
        done = await upstream.make(moderation="low", safety_identifier="s", user="u")
        done.images[0].payload.close()
        sent = simulator.requests[0].json()
    assert not set(unwanted) & set(sent)
    assert sent["user"] == "u"


async def test_a_proxy_may_stand_before_the_resource(tmp_path: Path) -> None:
    answer = {"data": [{"b64_json": base64.b64encode(png(64, 32)).decode()}]}
    with respx.mock() as router:
        url = "http://apim.test/eu/openai/v1/images/generations"
        route = router.post(url).respond(
            json=answer, headers={"apim-request-id": "apim-1"}
        )
        transport = httpx.MockTransport(router.async_handler)
        async with tools(tmp_path, transport) as given:
            account = an_account(base_url="http://apim.test/eu/")
            done = await PROVIDERS["azure"](account, given).start(a_job())
        assert route.call_count == 1
    assert isinstance(done, Done)
    assert done.upstream_request_id == "apim-1"
    done.images[0].payload.close()


# --- credentials ---


@each_form
@pytest.mark.parametrize("where", ["command", "file"])
async def test_an_entra_token_takes_the_place_of_the_key(
    where: str, form: str, tmp_path: Path
) -> None:
    kept = tmp_path / "token"
    kept.write_text(f"{TOKEN}\n")
    sources: dict[str, dict[str, Any]] = {
        "command": {"token_command": PRINTS_TOKEN},
        "file": {"token_file": str(kept)},
    }
    async with azure_upstream(
        tmp_path / "spool-folder", secret="", form=form, **sources[where]
    ) as (upstream, simulator):
        done = await upstream.make()
        done.images[0].payload.close()
        looks, done = await upstream.watch()
        done.images[0].payload.close()
        for seen in simulator.requests:
            assert seen.headers["authorization"] == f"Bearer {TOKEN}"
            assert "api-key" not in seen.headers
        assert len(simulator.purchases) == 2
    assert not looks


# Prints a line of a file after another, the last one again and again.
PRINTS_LINES = (
    "import pathlib, sys\n"
    "kept, times = map(pathlib.Path, sys.argv[1:])\n"
    "times.open('a').write('x')\n"
    "lines = kept.read_text().split()\n"
    "line = lines[min(len(times.read_text()), len(lines)) - 1]\n"
    "sys.exit(3) if line == 'fail' else print(line)"
)


def printing(folder: Path, *lines: str) -> list[str]:
    kept, times = folder / "token", folder / "times"
    kept.write_text("\n".join(lines))
    return [sys.executable, "-c", PRINTS_LINES, str(kept), str(times)]


@pytest.mark.parametrize("how", ["make", "watch", "edit", "probe"])
async def test_a_refused_token_is_replaced_at_once_and_not_used_again(
    how: str, tmp_path: Path
) -> None:
    command = printing(tmp_path, "withdrawn", TOKEN)
    folder = tmp_path / "spool-folder"
    async with azure_upstream(folder, secret="", token_command=command) as (
        upstream,
        simulator,
    ):
        reference = an_input(upstream.spools, png(64, 32))
        if how == "probe":
            await upstream.provider.probe("gpt-image-2", 5.0)
        elif how == "watch":
            _, done = await upstream.watch()
            done.images[0].payload.close()
        else:
            edit = {"operation": EDIT, "references": (reference,)}
            done = await upstream.make(**(edit if how == "edit" else {}))
            done.images[0].payload.close()
        told = [seen.headers["authorization"] for seen in simulator.requests]
        assert told == ["Bearer withdrawn", f"Bearer {TOKEN}"]
        # The new one is kept.
        (await upstream.make()).images[0].payload.close()
        assert (tmp_path / "times").read_text() == "xx"
        assert len(simulator.purchases) == (1 if how == "probe" else 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tokens", "asked", "kind"),
    [
        (["withdrawn", "as-bad", TOKEN], 2, K.AUTH),
        (["withdrawn", "withdrawn", TOKEN], 1, K.AUTH),
        (["withdrawn", "fail", TOKEN], 1, K.NETWORK),
    ],
    ids=["two bad", "the same again", "no other"],
)
async def test_a_refused_token_is_replaced_once(
    tokens: list[str], asked: int, kind: FailureKind, stream: bool, tmp_path: Path
) -> None:
    command = printing(tmp_path, *tokens)
    folder = tmp_path / "spool-folder"
    async with azure_upstream(folder, secret="", token_command=command) as (
        upstream,
        simulator,
    ):
        fail = upstream.stream_failure if stream else upstream.failure
        error = await fail()
        assert (error.kind, error.billed) == (kind, Billed.NO)
        assert len(simulator.requests) == asked
        # Neither is used again, whatever became of the call.
        if kind is K.NETWORK or asked == 2:
            (await upstream.make()).images[0].payload.close()
            assert len(simulator.requests) == asked + 1


async def test_a_refusal_after_a_look_is_not_asked_again(tmp_path: Path) -> None:
    command = printing(tmp_path, TOKEN, "another")
    folder = tmp_path / "spool-folder"
    async with azure_upstream(folder, secret="", token_command=command) as (
        upstream,
        simulator,
    ):
        body = {"code": 401, "message": "the token ran out"}
        simulator.script(Fault(answer="error_event", body=body))
        error = await upstream.stream_failure(partial_images=1, looks=1)
        assert (error.status, error.billed) == (401, Billed.MAYBE)
        assert len(simulator.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_token_is_kept_out_of_what_the_upstream_says(
    stream: bool, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, secret="", token_command=PRINTS_TOKEN) as (
        upstream,
        simulator,
    ):
        simulator.script(azure_error(400, "invalid_value", f"you sent '{TOKEN}'"))
        fail = upstream.stream_failure if stream else upstream.failure
        error = await fail()
    assert "you sent" in error.detail
    assert TOKEN not in f"{error!r} {error.detail} {error.client_message}"


async def test_without_a_token_nothing_is_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    async with azure_upstream(tmp_path, secret="", token_command=command) as (
        upstream,
        simulator,
    ):
        for fail in (upstream.failure, upstream.stream_failure):
            error = await fail()
            # It is not the credential that was refused: it is not shut off.
            assert (error.kind, error.billed) == (K.NETWORK, Billed.NO)
        assert not simulator.requests


async def test_nobody_waits_for_a_token_beyond_the_deadline(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    async with azure_upstream(tmp_path, secret="", token_command=command) as (
        upstream,
        simulator,
    ):
        job = upstream.job(deadline_s=0.05)
        with pytest.raises(ProviderError) as caught:
            await upstream.provider.start(job)
        error = caught.value
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.NO)
        assert not simulator.requests


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"secret": ""}, {}, "give one of credential, token_command and token_file"),
        ({}, {"token_command": ["az"]}, "give one of"),
        ({"secret": ""}, {"token_command": ["az"], "token_file": "/t"}, "give one of"),
        ({"secret": ""}, {"token_file": "token"}, "must be an absolute path"),
        ({"secret": ""}, {"token_command": "az token"}, "token_command"),
        ({"base_url": "https://r.openai.azure.com/openai/v1"}, {}, "without /openai"),
    ],
)
async def test_a_wrong_account_is_refused_by_name(
    changes: dict[str, str], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"base_url": "http://upstream.test", **changes}
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match=message):
            PROVIDERS["azure"](an_account(options=options, **fields), given)


# --- what it refuses, and what that means ---


def filtered(code: str, inner: str, results: str) -> Fault:
    told = {"violence": {"filtered": True, "severity": "high"}}
    more = {inner: {"code": "ResponsibleAIPolicyViolation", results: told}}
    return azure_error(400, code, "Your task failed.", **more)


BLOCKED = (
    "Your resource has been temporarily blocked because we detected behavior that may "
    "violate our content policy."
)
PICTURE_FILTERED = "Generated image was filtered as a result of our safety system."
NO, MAYBE, YES = Billed.NO, Billed.MAYBE, Billed.YES
FAULTS: list[tuple[str, Fault, FailureKind, Billed, int]] = [
    # what, fault, kind, billed, pictures that were bought
    ("wrong", azure_error(400, "invalid_value"), K.INVALID_REQUEST, NO, 0),
    (
        "filter",
        filtered("contentFilter", "inner_error", "content_filter_results"),
        K.CONTENT_POLICY,
        NO,
        0,
    ),
    (
        "inner only",
        filtered("BadRequest", "innererror", "content_filter_result"),
        K.CONTENT_POLICY,
        NO,
        0,
    ),
    ("content_filter", azure_error(400, "content_filter"), K.CONTENT_POLICY, NO, 0),
    ("older", azure_error(400, "content_policy_violation"), K.CONTENT_POLICY, NO, 0),
    ("moderation", azure_error(400, "moderation_blocked"), K.CONTENT_POLICY, NO, 0),
    (
        "picture filtered",
        azure_error(400, "contentFilter", PICTURE_FILTERED),
        K.CONTENT_POLICY,
        MAYBE,
        0,
    ),
    ("key", azure_error(401, "401"), K.AUTH, NO, 0),
    ("role", azure_error(401, "PermissionDenied"), K.AUTH, NO, 0),
    ("funds", azure_error(402, "402"), K.INSUFFICIENT_FUNDS, NO, 0),
    ("region", azure_error(403, "Forbidden", "Access denied."), K.AUTH, NO, 0),
    ("blocked", azure_error(403, "Forbidden", BLOCKED), K.AUTH, NO, 0),
    ("deployment", azure_error(404, "DeploymentNotFound"), K.UNSUPPORTED, NO, 0),
    ("path", azure_error(404, "404", "Resource not found"), K.UNSUPPORTED, NO, 0),
    (
        "not a picture model",
        azure_error(400, "OperationNotSupported"),
        K.UNSUPPORTED,
        NO,
        0,
    ),
    (
        "version",
        azure_error(400, "BadRequest", "API version not supported"),
        K.UNSUPPORTED,
        NO,
        0,
    ),
    ("slow client", azure_error(408, "Timeout"), K.TIMEOUT, MAYBE, 0),
    ("limit", azure_error(429, "429"), K.RATE_LIMITED, NO, 0),
    ("quota", azure_error(429, "insufficient_quota"), K.INSUFFICIENT_FUNDS, NO, 0),
    ("499", azure_error(499, "499"), K.TIMEOUT, MAYBE, 0),
    ("500", azure_error(500, "InternalServerError"), K.BAD_GATEWAY, NO, 0),
    ("502", Fault(status=502, body="<html>"), K.BAD_GATEWAY, NO, 0),
    ("503", azure_error(503, "503"), K.OVERLOADED, NO, 0),
    ("504", Fault(status=504, body="<html>"), K.TIMEOUT, MAYBE, 0),
    ("529", Fault(status=529, body=b""), K.OVERLOADED, NO, 0),
    ("unheard of", azure_error(418, "Teapot"), K.BAD_GATEWAY, NO, 0),
    ("no reply", Fault(close="before_reply"), K.TIMEOUT, MAYBE, 1),
    ("reset", Fault(close="reset"), K.TIMEOUT, MAYBE, 1),
    ("half", Fault(close="mid_body", answer="big"), K.TIMEOUT, MAYBE, 1),
    ("html", Fault(answer="html"), K.BAD_GATEWAY, MAYBE, 1),
    ("error in 200", Fault(answer="error"), K.BAD_GATEWAY, MAYBE, 1),
    ("nothing", Fault(answer="empty"), K.NO_OUTPUT, MAYBE, 1),
    ("null", Fault(answer="null"), K.NO_OUTPUT, MAYBE, 1),
    ("base64", Fault(answer="bad_base64"), K.BAD_GATEWAY, MAYBE, 1),
    ("no picture", Fault(answer="text"), K.BAD_GATEWAY, MAYBE, 1),
    ("gzip", Fault(answer="gzip"), K.BAD_GATEWAY, MAYBE, 1),
    ("dead link", Fault(answer="dead_url"), K.RESULT_LOST, YES, 1),
]


@pytest.mark.parametrize("operation", [GENERATE, EDIT], ids=lambda o: o.value)
@pytest.mark.parametrize(
    ("fault", "kind", "billed", "bought"),
    [row[1:] for row in FAULTS],
    ids=[row[0] for row in FAULTS],
)
async def test_each_fault_has_its_kind(
    fault: Fault,
    kind: FailureKind,
    billed: Billed,
    bought: int,
    operation: Operation,
    tmp_path: Path,
) -> None:
    async with azure_upstream(tmp_path, form="deployment") as (upstream, simulator):
        job: dict[str, Any] = {"operation": operation}
        if operation is EDIT:
            job["references"] = (an_input(upstream.spools, png(64, 32)),)
        simulator.script(fault)
        error = await upstream.failure(**job)
        assert (error.kind, error.billed) == (kind, billed)
        assert len(simulator.purchases) == bought
        if isinstance(fault.body, dict):
            assert error.upstream_code == fault.body["error"]["code"]
        assert upstream.files() == 0


@pytest.mark.parametrize(
    ("headers", "message", "wait_s"),
    [
        ({"retry-after": "7"}, "Please retry after 26 seconds.", 7),
        ({"retry-after-ms": "1500", "retry-after": "2"}, "no", 1.5),
        ({}, "exceeded call rate limit. Please retry after 26 seconds.", 26),
        ({}, "Please retry after 86400 seconds.", 300),
        ({}, "no", None),
    ],
)
async def test_a_full_resource_says_when_to_come_back(
    headers: dict[str, str], message: str, wait_s: float | None, tmp_path: Path
) -> None:
    body = {"error": {"code": "429", "message": message}}
    async with azure_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(status=429, body=body, headers=headers))
        error = await upstream.failure()
    assert (error.kind, error.retry_after_s) == (K.RATE_LIMITED, wait_s)


@pytest.mark.parametrize("answer", ["no_usage", "negative_usage", "zero_usage"])
async def test_a_usage_that_cannot_be_true_is_no_usage(
    answer: str, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        done = await upstream.make()
    assert done.usage is None
    done.images[0].payload.close()


async def test_a_picture_of_another_size_is_told_as_it_is(tmp_path: Path) -> None:
    async with azure_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        (made,) = (await upstream.make(width_px=592, height_px=176)).images
        assert (made.width_px, made.height_px) == (64, 32)
        assert made.payload.size_bytes > 12_000_000
        assert len(file_of(made)) > 9_000_000
        assert upstream.files() == 0


async def test_a_stream_that_is_filtered_is_a_matter_of_policy(tmp_path: Path) -> None:
    async with azure_upstream(tmp_path) as (upstream, simulator):
        body = {"code": "contentFilter", "message": PICTURE_FILTERED}
        simulator.script(Fault(answer="error_event", body=body))
        error = await upstream.stream_failure(partial_images=1, looks=1)
    assert (error.kind, error.billed) == (K.CONTENT_POLICY, Billed.MAYBE)


# --- the simulator refuses what Azure refuses ---


@pytest.mark.parametrize(
    ("prompt", "billed"), [("[moderate]", NO), ("[moderate-output]", MAYBE)]
)
async def test_the_simulator_filters_as_azure_does(
    prompt: str, billed: Billed, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path) as (upstream, simulator):
        error = await upstream.failure(prompt=prompt)
        assert (error.kind, error.billed) == (K.CONTENT_POLICY, billed)
        assert error.upstream_code == "contentFilter"
        assert not simulator.purchases


async def test_a_blocked_resource_is_no_matter_of_the_prompt(tmp_path: Path) -> None:
    async with azure_upstream(tmp_path) as (upstream, simulator):
        simulator.blocked = True
        for model in ("gpt-image-2", "prod-pictures"):
            error = await upstream.failure(model=model)
            assert (error.kind, error.billed) == (K.AUTH, Billed.NO)
            assert error.client_message is None
        assert not simulator.purchases


@pytest.mark.parametrize("lenient", [False, True])
async def test_the_simulator_rejects_what_azure_does(
    lenient: bool, tmp_path: Path
) -> None:
    key = {"api-key": KEY}
    dated = "?api-version=2025-04-01-preview"
    v1 = "/openai/v1/images/generations"
    deployed = "/openai/deployments/gpt-image-2/images/generations"
    elsewhere = "/openai/deployments/nowhere/images/generations"
    named = {"prompt": "x", "size": "64x32", "model": "gpt-image-2"}
    plain = {"prompt": "x", "size": "64x32"}
    bearer, token = f"Bearer {KEY}", f"Bearer {TOKEN}"
    calls: list[tuple[str, dict[str, str], dict[str, str], int, str | None]] = [
        (v1, key, named, 200, None),
        (v1, {"Authorization": token}, named, 200, None),
        (v1 + "?api-version=preview", key, named, 200, None),
        (deployed + dated, key, plain, 200, None),
        (v1, {"Authorization": bearer}, named, 401, "401"),
        (v1, key | {"Authorization": token}, named, 401, "401"),
        (v1, {"api-key": TOKEN}, named, 401, "401"),
        (v1, {}, named, 401, "401"),
        (v1 + dated, key, named, 400, "BadRequest"),
        (v1, key, plain, 404, "DeploymentNotFound"),
        (v1, key, named | {"model": "nowhere"}, 404, "DeploymentNotFound"),
        (deployed, key, plain, 404, "404"),
        (deployed + "?api-version=v9", key, plain, 404, "404"),
        (elsewhere + dated, key, plain, 404, "DeploymentNotFound"),
        ("/v1/images/generations", key, named, 404, "404"),
        (v1, key, named | {"response_format": "url"}, 400, "unknown_parameter"),
        (v1, key, named | {"output_format": "webp"}, 400, "invalid_value"),
    ]
    double = (200, None) if lenient else (404, "DeploymentNotFound")
    calls.append((deployed + dated, key, named, *double))
    async with azure_upstream(tmp_path) as (_, simulator):
        simulator.lenient = lenient
        async with httpx.AsyncClient(
            trust_env=False, base_url=simulator.base_url
        ) as client:
            for path, headers, body, status, code in calls:
                answer = await client.post(path, headers=headers, json=body)
                told = json.loads(answer.content).get("error", {}).get("code")
                assert (answer.status_code, told) == (status, code), (path, headers)
        sold = sum(status == 200 for *_, status, _ in calls)
        assert len(simulator.purchases) == sold
