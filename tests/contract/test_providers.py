"""What the gateway may expect of every adapter, and what is peculiar to openai."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from PIL import Image

from providers.kit.contract import (
    Billed,
    Capabilities,
    Done,
    FailureKind,
    Operation,
    Pending,
    ProviderError,
    Usage,
)
from providers.kit.spool import MEMORY_MAX_BYTES
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.cases import (
    CASES,
    answers_with_pictures,
    each_failure,
    each_provider,
    remote,
    those,
)
from tests.contract.openai_upstream import openai_upstream
from tests.contract.sandbox_upstream import connect_sandbox
from tests.contract.sending import request_of
from tests.contract.upstreams import Case, K, file_of, nobody_at, tools
from tests.simulators.openai_server import KEY
from tests.simulators.pictures import png
from tests.simulators.server import Fault

HOUR_S = 3600.0


def test_every_adapter_has_a_case() -> None:
    assert {case.name for case in CASES} == set(PROVIDERS)


@each_provider
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_pictures_have_the_size_and_type_that_were_asked_for(
    case: Case, output_format: str, tmp_path: Path
) -> None:
    if output_format not in case.capable.output_formats:
        pytest.skip(f"{case.name} makes no {output_format}")
    width_px, height_px = case.size_px
    n = min(2, case.capable.n_max)
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(
            width_px=width_px, height_px=height_px, n=n, output_format=output_format
        )
        assert upstream.purchases() == n

    assert len(done.images) == n
    for made in done.images:
        assert (made.width_px, made.height_px) == case.size_px
        assert made.media_type == f"image/{output_format}"
        with Image.open(io.BytesIO(file_of(made))) as image:
            image.load()
            assert image.size == case.size_px
            assert image.format == output_format.upper()
    assert not list(tmp_path.iterdir())


@each_provider
async def test_the_size_may_be_left_to_the_model(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(width_px=None, height_px=None)
    (made,) = done.images
    assert (made.width_px, made.height_px) == case.auto_px
    made.payload.close()


@those(lambda case: "transparent" in case.capable.backgrounds)
@pytest.mark.parametrize("output_format", ["png", "webp"])
async def test_a_transparent_background_is_transparent(
    case: Case, output_format: str, tmp_path: Path
) -> None:
    if output_format not in case.capable.output_formats:
        pytest.skip(f"{case.name} makes no {output_format}")
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(
            background="transparent", output_format=output_format
        )
    assert done.background == "transparent"
    with Image.open(io.BytesIO(file_of(done.images[0]))) as image:
        alpha = image.convert("RGBA").getchannel("A")
        assert alpha.getextrema()[0] == 0


@those(lambda case: case.counts_tokens)
async def test_the_usage_is_the_total_over_all_pictures(
    case: Case, tmp_path: Path
) -> None:
    # 592x1776 low is 62 tokens by OpenAI's own table; the prompt is 7 words.
    n = min(3, case.capable.n_max)
    job: dict[str, Any] = {"width_px": 592, "height_px": 1776, "n": n}
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(**job)
    assert done.usage == Usage(text_input=13, image_output=62).times(n)
    for made in done.images:
        made.payload.close()


@each_failure
async def test_a_failure_has_its_kind_keeps_the_secret_and_leaves_no_file(
    case: Case, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.fail(kind)
        error = await upstream.failure()

    assert error.kind is kind
    assert error.billed is case.failures[kind]
    assert case.secret not in f"{error} {error.detail} {error.client_message}"
    assert bool(error.client_message) is (kind in {K.INVALID_REQUEST, K.CONTENT_POLICY})
    assert not list(tmp_path.iterdir())


@each_failure
async def test_what_is_said_to_be_unbilled_was_not_bought(
    case: Case, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.fail(kind)
        await upstream.failure()
        if case.failures[kind] is Billed.NO:
            assert upstream.purchases() == 0
        if kind in {K.TIMEOUT, K.RESULT_LOST}:
            assert upstream.purchases() == 1


@each_provider
async def test_cancelling_passes_through_and_leaves_no_file(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.hang()
        call = asyncio.create_task(upstream.make())
        while upstream.purchases() == 0:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert upstream.files() == 0


@each_provider
async def test_an_upstream_that_hangs_is_left_at_the_deadline(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.hang()
        error = await upstream.failure(deadline_s=0.05)
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.MAYBE)
        assert upstream.purchases() == 1


@each_provider
async def test_no_job_is_ever_asked_for_that_was_not_left_pending(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        with pytest.raises(ProviderError):
            await upstream.provider.poll(upstream.job(), "job-1")
        await upstream.provider.close()


@those(remote)
async def test_a_dead_upstream_was_certainly_not_asked(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        account = replace(upstream.account, base_url=nobody_at())
        provider = PROVIDERS[case.name](account, upstream.tools)
        with pytest.raises(ProviderError) as caught:
            await provider.start(upstream.job())
    assert (caught.value.kind, caught.value.billed) == (K.NETWORK, Billed.NO)


@those(lambda case: bool(case.look_step))
async def test_a_look_that_hangs_is_left_long_before_the_deadline(
    case: Case, tmp_path: Path
) -> None:
    async with (
        case.connect(tmp_path) as upstream,
        tools(tmp_path, read_max_s=0.05) as impatient,
    ):
        assert upstream.simulator is not None
        job = upstream.job(deadline_s=HOUR_S)
        step = await upstream.provider.start(job)
        assert isinstance(step, Pending)
        upstream.simulator.script(Fault(case.look_step, hang=True))
        provider = PROVIDERS[case.name](upstream.account, impatient)
        with pytest.raises(ProviderError) as caught:
            await provider.poll(job, step.job_id)
        error = caught.value
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.MAYBE)
        assert not error.ended


@pytest.mark.parametrize(
    ("case", "options", "named"),
    [(case, *wrong) for case in CASES for wrong in case.wrong_options],
    ids=lambda value: getattr(value, "name", str(value)),
)
async def test_a_wrong_option_is_named_at_construction(
    case: Case, options: dict[str, object], named: str, tmp_path: Path
) -> None:
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match=named):
            PROVIDERS[case.name](an_account(options=options), given)


@those(remote)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_url": "upstream.test/v1"}, "base_url"),
        ({"base_url": "ftp://upstream.test/v1"}, "base_url"),
        ({"base_url": "https://u:p@upstream.test/v1"}, "base_url"),
        ({"base_url": "https://upstream.test/v1?x=1"}, "base_url"),
        ({"base_url": "https://upstream.test:no/v1"}, "base_url"),
        ({"base_url": "https://upstream.test:0/v1"}, "base_url"),
        ({"secret": ""}, "credential"),
        ({"secret": "two\nlines"}, "credential"),
    ],
)
async def test_an_account_that_cannot_work_is_refused_at_construction(
    case: Case, changes: dict[str, str], named: str, tmp_path: Path
) -> None:
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match=named):
            PROVIDERS[case.name](an_account(**changes), given)


@each_provider
async def test_it_only_says_it_can_do_what_it_does(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.provider.capabilities(case.model) == case.capable
        error = await upstream.failure(operation=Operation.EDIT)
        assert error.kind is K.UNSUPPORTED
        assert upstream.purchases() == 0


@each_provider
async def test_a_prompt_in_any_script_is_taken(case: Case, tmp_path: Path) -> None:
    prompt = "日本 \N{GRINNING FACE} \u202e\x00\n" + "w" * 3000 + " é" * 3000
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(prompt=prompt)
    done.images[0].payload.close()


# --- openai: failures of the network ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(close="before_reply"),
        Fault(close="reset"),
        Fault(close="mid_body"),
        Fault(close="mid_body", answer="big"),
    ],
    ids=lambda fault: f"{fault.close} {fault.answer}",
)
async def test_an_answer_that_breaks_off_was_maybe_bought(
    fault: Fault, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.MAYBE)
        assert len(simulator.purchases) == 1
        assert upstream.files() == 0


# --- openai: successes that are none ---


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("html", K.BAD_GATEWAY),
        ("error", K.BAD_GATEWAY),
        ("gzip", K.BAD_GATEWAY),
        ("bad_base64", K.BAD_GATEWAY),
        ("text", K.BAD_GATEWAY),
        ("empty", K.NO_OUTPUT),
        ("null", K.NO_OUTPUT),
    ],
)
async def test_a_success_without_a_usable_picture_was_maybe_billed(
    answer: str, kind: FailureKind, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, Billed.MAYBE)
        assert upstream.files() == 0


@pytest.mark.parametrize("answer", ["no_usage", "negative_usage", "zero_usage"])
async def test_a_usage_that_cannot_be_true_is_no_usage(
    answer: str, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        done = await upstream.make()
    assert done.usage is None
    done.images[0].payload.close()


async def test_fewer_pictures_than_asked_for_are_still_delivered(
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="one_less"))
        done = await upstream.make(n=3)
    assert len(done.images) == 2
    for made in done.images:
        made.payload.close()


@those(answers_with_pictures)
async def test_a_large_picture_waits_in_a_file(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        upstream.simulator.script(Fault(answer="big"))
        done = await upstream.make()
        (made,) = done.images
        assert made.payload.size_bytes > 12_000_000 > MEMORY_MAX_BYTES
        assert upstream.files() == 1
        assert len(file_of(made)) > 9_000_000
        assert upstream.files() == 0


async def test_a_picture_that_our_disk_cannot_take_is_a_lost_result(
    tmp_path: Path,
) -> None:
    no_disk = tmp_path / "gone"
    async with openai_upstream(no_disk) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        error = await upstream.failure()
    assert (error.kind, error.billed) == (K.RESULT_LOST, Billed.YES)
    async with connect_sandbox(no_disk) as upstream:
        error = await upstream.failure(
            width_px=3840, height_px=2160, output_format="jpeg", output_compression=100
        )
    assert (error.kind, error.billed) == (K.RESULT_LOST, Billed.YES)


@pytest.mark.parametrize(
    ("answer", "encoding"), [("url", "raw"), ("data_prefix", "base64")]
)
async def test_links_and_data_uris_are_pictures_too(
    answer: str, encoding: str, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        done = await upstream.make()
    (made,) = done.images
    assert (made.width_px, made.height_px) == (64, 32)
    assert made.payload.encoding == encoding
    assert file_of(made) == png(64, 32)


# --- openai: the shape of what is sent ---


async def sent(
    folder: Path, *, options: Mapping[str, object] | None = None, **changes: Any
) -> httpx.Request:
    account = an_account(options=options or {})
    return await request_of("openai", account, a_job(**changes), folder)


async def test_a_plain_job_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    request = await sent(tmp_path)

    assert str(request.url) == "http://upstream.test/v1/images/generations"
    assert request.headers["authorization"] == f"Bearer {an_account().secret}"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"
    assert "openai-organization" not in request.headers
    assert json.loads(request.content) == {
        "model": "gpt-image-2",
        "prompt": a_job().prompt,
        "n": 1,
        "size": "64x32",
        "quality": "low",
        "output_format": "png",
    }


async def test_every_field_that_was_given_is_passed_on(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "background": "opaque",
        "output_format": "webp",
        "output_compression": 0,
        "moderation": "low",
        "user": "u-1",
        "safety_identifier": "s-1",
    }
    request = await sent(tmp_path, width_px=None, height_px=None, n=3, **given)
    body = json.loads(request.content)
    assert {name: body[name] for name in given} == given
    assert (body["size"], body["n"]) == ("auto", 3)


async def test_a_png_is_never_compressed(tmp_path: Path) -> None:
    request = await sent(tmp_path, output_compression=50)
    assert "output_compression" not in json.loads(request.content)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("gpt-image-2", None),
        ("openai/gpt-image-2.5-flare", None),
        ("chatgpt-image-latest", None),
        ("sdxl", "b64_json"),
    ],
)
async def test_gpt_image_models_are_never_told_a_response_format(
    model: str, told: str | None, tmp_path: Path
) -> None:
    options = {"response_format": "b64_json"}
    body = json.loads((await sent(tmp_path, options=options, model=model)).content)
    assert body.get("response_format") == told


async def test_quirks_bend_the_request(tmp_path: Path) -> None:
    request = await sent(
        tmp_path,
        options={
            "path_prefix": "/v3/",
            "generations_path": "images/make",
            "auth_header": "api-key",
            "organization": "org-1",
            "project": "proj-1",
            "strip_fields": ["quality", "output_format"],
        },
    )
    assert str(request.url) == "http://upstream.test/v1/v3/images/make"
    assert request.headers["api-key"] == an_account().secret
    assert "authorization" not in request.headers
    assert request.headers["openai-organization"] == "org-1"
    assert request.headers["openai-project"] == "proj-1"
    assert set(json.loads(request.content)) == {"model", "prompt", "n", "size"}


async def test_an_open_server_is_sent_no_credential(tmp_path: Path) -> None:
    request = await sent(tmp_path, options={"auth_header": "none"})
    assert an_account().secret not in str(request.headers.raw)


async def test_options_say_what_the_server_can_do(tmp_path: Path) -> None:
    options = {
        "n_max": 4,
        "sizes": ["1024x1024", "1536x1024"],
        "qualities": ["low"],
        "output_formats": ["png"],
        "backgrounds": ["opaque"],
        "edits": False,
        "stream": False,
    }
    async with tools(tmp_path) as given:
        provider = PROVIDERS["openai"](an_account(options=options), given)
        assert provider.capabilities("any") == Capabilities(
            n_max=4,
            sizes=frozenset({(1024, 1024), (1536, 1024)}),
            qualities=frozenset({"low"}),
            output_formats=frozenset({"png"}),
            backgrounds=frozenset({"opaque"}),
            stream=False,
        )
        plain = PROVIDERS["openai"](an_account(), given)
        assert plain.capabilities("any") == Capabilities(
            operations=frozenset(Operation), references_max=16, mask=True, stream=True
        )


# --- openai: usage ---


async def test_a_server_that_makes_its_usage_up_can_be_ignored(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path, usage="ignore") as (upstream, _):
        done = await upstream.make()
    assert done.usage is None
    done.images[0].payload.close()


GOOD = base64.b64encode(png(64, 32)).decode()


@pytest.mark.parametrize(
    ("n", "texts"),
    [(2, [GOOD, "%%%%"]), (1, [GOOD, GOOD])],
    ids=["one is broken", "one too many"],
)
async def test_a_usage_of_other_pictures_than_are_delivered_is_left_to_the_estimate(
    n: int, texts: list[str], tmp_path: Path
) -> None:
    body = {
        "data": [{"b64_json": text} for text in texts],
        "usage": {"input_tokens": 13, "output_tokens": 124},
    }
    with respx.mock() as router:
        router.route(method="POST").respond(json=body)
        transport = httpx.MockTransport(router.async_handler)
        async with tools(tmp_path, transport) as given:
            done = await PROVIDERS["openai"](an_account(), given).start(a_job(n=n))
    assert isinstance(done, Done)
    assert len(done.images) == 1
    assert done.usage is None
    done.images[0].payload.close()
    assert not list(tmp_path.iterdir())


async def test_the_simulator_itself_rejects_what_openai_rejects(
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        refused: list[tuple[dict[str, Any], FailureKind, str]] = [
            ({"model": "gpt-image-9"}, K.UNSUPPORTED, "model_not_found"),
            ({"quality": "best"}, K.INVALID_REQUEST, "invalid_value"),
            ({"n": 11}, K.INVALID_REQUEST, "invalid_value"),
            ({"prompt": "[moderate] x"}, K.CONTENT_POLICY, "moderation_blocked"),
        ]
        for changes, kind, code in refused:
            error = await upstream.failure(**changes)
            assert (error.kind, error.upstream_code) == (kind, code)
        assert not simulator.purchases
        url = f"{simulator.base_url}/images/generations"
        async with httpx.AsyncClient(trust_env=False) as client:
            headers = {"Authorization": f"Bearer {KEY}"}
            body = {"model": "gpt-image-2", "prompt": "x"}
            told = body | {"response_format": "b64_json"}
            answer = await client.post(url, headers=headers, json=told)
            assert answer.json()["error"]["code"] == "unknown_parameter"
            assert (await client.post(url, json=body)).status_code == 401
