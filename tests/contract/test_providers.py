"""What the gateway may expect of every adapter. A new one adds itself to ``CASES``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import respx
from PIL import Image

from providers import openai
from providers.kit.contract import (
    Billed,
    Capabilities,
    Done,
    FailureKind,
    MadeImage,
    Operation,
    Provider,
    ProviderError,
    Usage,
)
from providers.kit.spool import MEMORY_MAX_BYTES, SpoolFolder
from providers.kit.wire import Tools, Wire
from providers.registry import PROVIDERS
from providers.sandbox import Sandbox, SandboxSettings
from tests.builders import a_job, an_account
from tests.simulators.openai_server import (
    KEY,
    Fault,
    OpenAISimulator,
    png,
    serve_openai_simulator,
)

K = FailureKind


@dataclass
class Upstream:
    """One adapter, connected to something that behaves like its upstream."""

    provider: Provider
    fail: Callable[[FailureKind], None]
    hang: Callable[[], None]
    purchases: Callable[[], int]
    spools: SpoolFolder

    async def make(self, **changes: Any) -> Done:
        """Run a job, and read the pictures as the gateway would."""
        done = await self.provider.start(a_job(**changes))
        assert isinstance(done, Done)
        return done

    async def failure(self, **changes: Any) -> ProviderError:
        with pytest.raises(ProviderError) as caught:
            await self.make(**changes)
        return caught.value

    def files(self) -> int:
        return len(list(self.spools.path.iterdir()))


@dataclass(frozen=True)
class Case:
    """How to connect an adapter, and which failures its upstream can show."""

    name: str
    connect: Callable[[Path], AbstractAsyncContextManager[Upstream]]
    failures: Mapping[FailureKind, Billed]


def file_of(image: MadeImage) -> bytes:
    text = b"".join(image.payload.chunks())
    assert len(text) == image.payload.size_bytes
    image.payload.close()
    return base64.b64decode(text) if image.payload.encoding == "base64" else text


@asynccontextmanager
async def tools(
    folder: Path, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncGenerator[Tools, None]:
    wire = Wire(8, transport=transport, download_pauses_s=(0, 0, 0))
    try:
        yield Tools(wire, SpoolFolder(folder), fraction=lambda: 0.5)
    finally:
        await wire.close()


@asynccontextmanager
async def openai_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, OpenAISimulator], None]:
    async with serve_openai_simulator() as simulator, tools(folder) as given:
        account = an_account(base_url=simulator.base_url, secret=KEY, options=options)

        def fail(kind: FailureKind) -> None:
            simulator.script(OPENAI_FAULTS[kind])

        yield (
            Upstream(
                PROVIDERS["openai"](account, given),
                fail,
                lambda: simulator.script(Fault(hang=True)),
                lambda: sum(purchase.n for purchase in simulator.purchases),
                given.spools,
            ),
            simulator,
        )


@asynccontextmanager
async def connect_openai(folder: Path) -> AsyncGenerator[Upstream, None]:
    async with openai_upstream(folder) as (upstream, _):
        yield upstream


@asynccontextmanager
async def connect_sandbox(folder: Path) -> AsyncGenerator[Upstream, None]:
    async with tools(folder) as given:
        account = an_account(options={"latency_ms": 0})
        provider = PROVIDERS["sandbox"](account, given)
        assert isinstance(provider, Sandbox)
        settings = provider.settings

        def fail(kind: FailureKind) -> None:
            settings.change({"failure_rate": 1, "failure_kind": kind.value})

        def purchases() -> int:
            bought = cast("dict[str, int]", settings.snapshot()["purchases"])
            return bought["images"]

        def hang() -> None:
            settings.change({"latency_ms": 600_000})

        yield Upstream(provider, fail, hang, purchases, given.spools)


def openai_error(status: int, code: str | None, message: str = "no") -> Fault:
    error = {"message": message, "type": "x", "param": None, "code": code}
    return Fault(status=status, body={"error": error})


OPENAI_FAULTS = {
    K.INVALID_REQUEST: openai_error(400, "invalid_value", f"wrong, {KEY}"),
    K.CONTENT_POLICY: openai_error(400, "moderation_blocked", f"refused, {KEY}"),
    K.UNSUPPORTED: openai_error(404, "model_not_found"),
    K.AUTH: openai_error(401, "invalid_api_key", f"Incorrect API key: {KEY}"),
    K.INSUFFICIENT_FUNDS: openai_error(429, "insufficient_quota"),
    K.RATE_LIMITED: openai_error(429, "rate_limit_exceeded"),
    K.OVERLOADED: openai_error(503, "server_is_overloaded"),
    K.BAD_GATEWAY: Fault(status=502, body=f"<html>{KEY}</html>"),
    K.TIMEOUT: Fault(close="before_reply"),
    K.NO_OUTPUT: Fault(answer="empty"),
    K.RESULT_LOST: Fault(answer="dead_url"),
}
USUALLY_BILLED = {
    K.INVALID_REQUEST: Billed.NO,
    K.CONTENT_POLICY: Billed.NO,
    K.UNSUPPORTED: Billed.NO,
    K.AUTH: Billed.NO,
    K.INSUFFICIENT_FUNDS: Billed.NO,
    K.RATE_LIMITED: Billed.NO,
    K.OVERLOADED: Billed.NO,
    K.BAD_GATEWAY: Billed.NO,
    K.TIMEOUT: Billed.MAYBE,
    K.NO_OUTPUT: Billed.MAYBE,
    K.RESULT_LOST: Billed.YES,
}
CASES = [
    Case("openai", connect_openai, USUALLY_BILLED),
    Case("sandbox", connect_sandbox, USUALLY_BILLED | {K.NETWORK: Billed.NO}),
]
each_provider = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_failure = pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in case.failures],
    ids=lambda value: getattr(value, "name", "").lower(),
)


def test_every_adapter_has_a_case() -> None:
    assert {case.name for case in CASES} == set(PROVIDERS)


@each_provider
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_pictures_have_the_size_and_type_that_were_asked_for(
    case: Case, output_format: str, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(
            width_px=592, height_px=176, n=2, output_format=output_format
        )
        assert upstream.purchases() == 2

    assert len(done.images) == 2
    for made in done.images:
        assert (made.width_px, made.height_px) == (592, 176)
        assert made.media_type == f"image/{output_format}"
        with Image.open(io.BytesIO(file_of(made))) as image:
            image.load()
            assert image.size == (592, 176)
            assert image.format == output_format.upper()
    assert not list(tmp_path.iterdir())


@each_provider
async def test_the_size_may_be_left_to_the_model(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(width_px=None, height_px=None)
    (made,) = done.images
    assert (made.width_px, made.height_px) == (1024, 1024)
    made.payload.close()


@each_provider
@pytest.mark.parametrize("output_format", ["png", "webp"])
async def test_a_transparent_background_is_transparent(
    case: Case, output_format: str, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(
            background="transparent", output_format=output_format
        )
    assert done.background == "transparent"
    with Image.open(io.BytesIO(file_of(done.images[0]))) as image:
        alpha = image.convert("RGBA").getchannel("A")
        assert alpha.getextrema()[0] == 0


@each_provider
async def test_the_usage_is_the_total_over_all_pictures(
    case: Case, tmp_path: Path
) -> None:
    # 592x1776 low is 62 tokens by OpenAI's own table; the prompt is 7 words.
    job: dict[str, Any] = {"width_px": 592, "height_px": 1776, "n": 3}
    async with case.connect(tmp_path) as upstream:
        done = await upstream.make(**job)
    assert done.usage == Usage(text_input=39, image_output=186)
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
    assert KEY not in f"{error} {error.detail} {error.client_message}"
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
            await upstream.provider.poll(a_job(), "job-1")
        await upstream.provider.close()


@each_provider
async def test_it_only_says_it_can_do_what_it_does(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        capable = upstream.provider.capabilities("gpt-image-2")
        assert Operation.EDIT not in capable.operations
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


async def test_a_dead_upstream_was_certainly_not_asked(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    async with tools(tmp_path) as given:
        provider = PROVIDERS["openai"](an_account(base_url=base_url), given)
        with pytest.raises(ProviderError) as caught:
            await provider.start(a_job())
    assert (caught.value.kind, caught.value.billed) == (K.NETWORK, Billed.NO)


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


async def test_a_large_picture_waits_in_a_file(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
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
    """Run a job against a router that answers anything, and return the request."""
    body = {"data": [{"b64_json": base64.b64encode(png(64, 32)).decode()}]}
    with respx.mock(assert_all_called=False) as router:
        route = router.route(method="POST").respond(json=body)
        transport = httpx.MockTransport(router.async_handler)
        async with tools(folder, transport) as given:
            account = an_account(options=options or {})
            done = await PROVIDERS["openai"](account, given).start(a_job(**changes))
        assert isinstance(done, Done)
        done.images[0].payload.close()
        assert route.call_count == 1
        request: httpx.Request = route.calls[0].request
        return request


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
    }
    async with tools(tmp_path) as given:
        provider = PROVIDERS["openai"](an_account(options=options), given)
        assert provider.capabilities("any") == Capabilities(
            n_max=4,
            sizes=frozenset({(1024, 1024), (1536, 1024)}),
            qualities=frozenset({"low"}),
            output_formats=frozenset({"png"}),
            backgrounds=frozenset({"opaque"}),
        )
        plain = PROVIDERS["openai"](an_account(), given)
        assert plain.capabilities("any") == Capabilities()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nope": 1}, "nope"),
        ({"auth_header": "basic"}, "auth_header"),
        ({"response_format": "png"}, "response_format"),
        ({"usage": True}, "usage"),
        ({"n_max": 0}, "n_max"),
        ({"n_max": "4"}, "n_max"),
        ({"strip_fields": "quality"}, "strip_fields"),
        ({"sizes": ["big"]}, "sizes"),
        ({"qualities": ["best"]}, "qualities"),
        ({"output_formats": ["gif"]}, "output_formats"),
        ({"backgrounds": ["auto"]}, "backgrounds"),
        ({"download_hosts": ["https://x.test/"]}, "download_hosts"),
        ({"organization": "a\r\nb: c"}, "organization"),
        ({"path_prefix": "a b"}, "path_prefix"),
    ],
)
async def test_a_wrong_option_is_named_at_construction(
    options: dict[str, object], named: str, tmp_path: Path
) -> None:
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match=named):
            PROVIDERS["openai"](an_account(options=options), given)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_url": "upstream.test/v1"}, "base_url"),
        ({"base_url": "ftp://upstream.test/v1"}, "base_url"),
        ({"base_url": "https://u:p@upstream.test/v1"}, "base_url"),
        ({"base_url": "https://upstream.test/v1?x=1"}, "base_url"),
        ({"base_url": "https://upstream.test:no/v1"}, "base_url"),
        ({"secret": ""}, "credential"),
        ({"secret": "two\nlines"}, "credential"),
    ],
)
async def test_an_account_that_cannot_work_is_refused_at_construction(
    changes: dict[str, str], named: str, tmp_path: Path
) -> None:
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match=named):
            PROVIDERS["openai"](an_account(**changes), given)


# --- openai: usage ---


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (None, None),
        ({}, None),
        ([1], None),
        ({"output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": 196}, Usage(13, 0, 0, 0, 196)),
        (
            {"input_tokens": 13, "output_tokens": 196, "total_tokens": 209},
            Usage(13, 0, 0, 0, 196),
        ),
        ({"input_tokens": 13, "output_tokens": 196, "total_tokens": 200}, None),
        ({"input_tokens": 13, "output_tokens": 0}, None),
        ({"input_tokens": -1, "output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": -196}, None),
        ({"input_tokens": 13.0, "output_tokens": 196}, None),
        ({"input_tokens": True, "output_tokens": 196}, None),
        ({"input_tokens": "13", "output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": 10**30}, None),
    ],
)
def test_totals_alone_are_text_in_and_image_out(
    reported: object, usage: Usage | None
) -> None:
    assert openai.read_usage(reported) == usage


@pytest.mark.parametrize(
    ("details", "usage"),
    [
        ({"text_tokens": 20, "image_tokens": 100}, Usage(20, 0, 100, 0, 196)),
        (
            {"text_tokens": 20, "image_tokens": 100, "cached_tokens": 50},
            Usage(0, 20, 70, 30, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_tokens": 65,
                "cached_tokens_details": {"text_tokens": 5, "image_tokens": 60},
            },
            Usage(15, 5, 40, 60, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_text_tokens": 5,
                "cached_image_tokens": 60,
            },
            Usage(15, 5, 40, 60, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_tokens": 9,
                "cached_text_tokens": 5,
            },
            None,
        ),
        ({"text_tokens": 20, "image_tokens": 100, "cached_tokens": 121}, None),
        ({"text_tokens": 20, "image_tokens": 100, "cached_image_tokens": 101}, None),
        ({"text_tokens": 20, "image_tokens": 99}, None),
        ({"text_tokens": 20, "image_tokens": -100}, None),
        ("20", Usage(120, 0, 0, 0, 196)),
    ],
)
def test_a_cached_token_is_counted_once(details: object, usage: Usage | None) -> None:
    reported = {
        "input_tokens": 120,
        "output_tokens": 196,
        "input_tokens_details": details,
    }
    assert openai.read_usage(reported) == usage


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


# --- openai: every error that is known ---


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
    (400, body_of("invalid_image_file"), K.INVALID_REQUEST),
    (401, body_of("invalid_api_key"), K.AUTH),
    # by words
    (400, body_of(None, "Rejected by the safety system."), K.CONTENT_POLICY),
    (403, body_of(None, "Your prompt was flagged"), K.CONTENT_POLICY),
    (403, body_of("Forbidden", "temporarily blocked, content policy"), K.AUTH),
    (400, body_of(None, "names are case-sensitive"), K.INVALID_REQUEST),
    (403, body_of(None, "User is locked: Exhausted balance"), K.INSUFFICIENT_FUNDS),
    (400, body_of(None, "Unknown parameter: 'background'."), K.UNSUPPORTED),
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
    return openai.refusal(status, headers or {}, data, secret=KEY)


@pytest.mark.parametrize(("status", "body", "kind"), REFUSALS)
def test_an_error_is_classified(status: int, body: object, kind: FailureKind) -> None:
    error = refusal(status, body)
    assert error.kind is kind
    told = {K.INVALID_REQUEST, K.CONTENT_POLICY}
    assert error.client_message is None or kind in told


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 60_000, b"{"])
def test_a_body_that_is_no_json_is_classified_by_its_status(body: bytes) -> None:
    assert openai.refusal(503, {}, body, secret=KEY).kind is K.OVERLOADED


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


# --- the sandbox's settings ---


def a_sandbox(folder: Path, fraction: float = 0.5, **options: object) -> Sandbox:
    settings = SandboxSettings({"latency_ms": 0} | options)
    return Sandbox("cheap", SpoolFolder(folder), lambda: fraction, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"latency_ms": -1},
        {"latency_ms": 600_001},
        {"latency_ms": 1.5},
        {"latency_ms": True},
        {"failure_rate": 1.1},
        {"failure_rate": "0.5"},
        {"failure_rate": float("nan")},
        {"failure_kind": "broken"},
        {"usage": "maybe"},
        {"images_short": -1},
        {"purchases": {}},
        {"nope": 1},
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(changes: dict[str, Any]) -> None:
    settings = SandboxSettings()
    before = settings.snapshot()
    with pytest.raises(ValueError, match=next(iter(changes))):
        settings.change({"usage": "missing"} | changes)
    assert settings.snapshot() == before


def test_settings_are_read_as_they_are_written() -> None:
    settings = SandboxSettings({"failure_kind": "none"})
    settings.change({"latency_ms": 5, "failure_rate": 1, "images_short": 2})
    assert settings.snapshot() == {
        "latency_ms": 5,
        "failure_rate": 1.0,
        "failure_kind": "none",
        "usage": "reported",
        "images_short": 2,
        "purchases": {"jobs": 0, "images": 0},
    }
    assert SandboxSettings().snapshot()["latency_ms"] == 200


async def test_a_wrong_sandbox_option_is_named_at_construction(tmp_path: Path) -> None:
    async with tools(tmp_path) as given:
        with pytest.raises(ValueError, match="latency_ms"):
            PROVIDERS["sandbox"](an_account(options={"latency_ms": "1"}), given)


async def test_the_failure_rate_is_a_share_of_the_jobs(tmp_path: Path) -> None:
    for drawn, fails in ((0.29, True), (0.3, False)):
        sandbox = a_sandbox(tmp_path, drawn, failure_rate=0.3)
        try:
            done = await sandbox.start(a_job())
        except ProviderError:
            assert fails
        else:
            assert not fails
            assert isinstance(done, Done)
            done.images[0].payload.close()


async def test_no_failure_is_a_kind_too(tmp_path: Path) -> None:
    sandbox = a_sandbox(tmp_path, 0, failure_rate=1, failure_kind="none")
    done = await sandbox.start(a_job())
    assert isinstance(done, Done)
    done.images[0].payload.close()


async def test_a_sandbox_can_keep_its_usage_and_some_pictures(tmp_path: Path) -> None:
    sandbox = a_sandbox(tmp_path, usage="missing", images_short=1)
    done = await sandbox.start(a_job(n=3))
    assert isinstance(done, Done)
    assert done.usage is None
    assert len(done.images) == 2
    for made in done.images:
        made.payload.close()
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job(n=1))
    assert caught.value.kind is K.NO_OUTPUT


async def test_a_rate_limit_of_the_sandbox_says_when_to_come_back(
    tmp_path: Path,
) -> None:
    sandbox = a_sandbox(tmp_path, failure_rate=1, failure_kind="rate_limited")
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job())
    assert caught.value.retry_after_s == 5


async def test_a_slow_sandbox_runs_into_the_deadline_and_has_sold(
    tmp_path: Path,
) -> None:
    sandbox = a_sandbox(tmp_path, latency_ms=60_000)
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job(deadline_s=0.02))
    assert (caught.value.kind, caught.value.billed) == (K.TIMEOUT, Billed.MAYBE)
    assert sandbox.settings.snapshot()["purchases"] == {"jobs": 1, "images": 1}


@pytest.mark.parametrize(
    ("width_px", "height_px"), [(16, 16), (3840, 1280), (1280, 3840), (2880, 2880)]
)
async def test_the_sandbox_paints_any_shape(
    width_px: int, height_px: int, tmp_path: Path
) -> None:
    done = await a_sandbox(tmp_path).start(
        a_job(width_px=width_px, height_px=height_px)
    )
    assert isinstance(done, Done)
    with Image.open(io.BytesIO(file_of(done.images[0]))) as image:
        image.load()
        assert image.size == (width_px, height_px)
        colours = image.convert("RGB").getcolors(300)
        assert colours is not None
        assert len(colours) > 8
