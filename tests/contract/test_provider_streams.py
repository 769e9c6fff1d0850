"""Streams: first looks, then the whole, and what it means when they break off."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import respx
from PIL import Image

from providers.kit.contract import (
    Billed,
    Done,
    FailureKind,
    Operation,
    Partial,
    Usage,
)
from providers.kit.spool import MEMORY_MAX_BYTES
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.cases import failures_of, streams, those
from tests.contract.openai_upstream import openai_upstream
from tests.contract.sandbox_upstream import connect_sandbox
from tests.contract.upstreams import Case, K, Upstream, an_input, file_of, tools
from tests.simulators.openai_server import NO_EVENTS
from tests.simulators.pictures import png
from tests.simulators.server import Fault


def close(looks: list[Partial], done: Done | None = None) -> None:
    for made in (*(look.image for look in looks), *(done.images if done else ())):
        made.payload.close()


@those(streams)
async def test_looks_come_before_the_whole_picture(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        looks, done = await upstream.watch(partial_images=3, width_px=592)
        assert upstream.purchases() == 1

    assert [look.index for look in looks] == [0, 1, 2]
    images = [*(look.image for look in looks), *done.images]
    files = [file_of(made) for made in images]
    assert len(set(files)) == 4
    for file, made in zip(files, images, strict=True):
        assert made.media_type == "image/png"
        assert (made.width_px, made.height_px) == (592, 32)
        with Image.open(io.BytesIO(file)) as image:
            assert image.size == (592, 32)
    assert not list(tmp_path.iterdir())


@those(streams)
async def test_a_stream_may_show_nothing_but_the_whole_picture(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        looks, done = await upstream.watch(width_px=592, height_px=1776)
    assert not looks
    assert done.usage == Usage(text_input=13, image_output=62)
    close(looks, done)


@those(streams)
async def test_an_edit_streams_too(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, png(64, 32))
        looks, done = await upstream.watch(
            operation=Operation.EDIT, references=(reference,), partial_images=1
        )
        assert upstream.purchases() == 1
        reference.payload.close()
    assert len(looks) == 1
    close(looks, done)


@those(streams)
async def test_several_pictures_are_one_done(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        looks, done = await upstream.watch(n=3, partial_images=1)
        assert upstream.purchases() == 3
    assert 1 <= len(looks) <= 3
    assert len(done.images) == 3
    close(looks, done)


@failures_of(streams)
async def test_a_failing_stream_has_its_kind_and_leaves_no_file(
    case: Case, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.fail(kind)
        error = await upstream.stream_failure()
        # What an empty stream means is up to its end: see below.
        open_end = kind is K.NO_OUTPUT and case.name in {"azure", "openai"}
        told = K.TIMEOUT if open_end else kind
        assert error.kind is told
        assert error.billed is case.failures[told]
        assert upstream.files() == 0


@those(streams)
async def test_whoever_leaves_early_leaves_no_file(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        job = upstream.job(partial_images=3, width_px=1024, height_px=1024)
        async with aclosing(upstream.provider.stream(job)) as made:
            first = await anext(made)
            assert isinstance(first, Partial)
            close([first])
            # The rest is under way, or waits to be taken.
            await asyncio.sleep(0.02)
        assert upstream.files() == 0
        assert upstream.purchases() == 1


@those(streams)
async def test_cancelling_a_stream_passes_through(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.hang()
        call = asyncio.create_task(upstream.watch())
        while upstream.purchases() == 0:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert upstream.files() == 0


@those(streams)
async def test_a_stream_that_hangs_is_left_at_the_deadline(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        upstream.hang()
        error = await upstream.stream_failure(deadline_s=0.05)
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.MAYBE)


@those(streams)
async def test_a_slow_reader_is_not_interrupted_by_the_deadline(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        job = upstream.job(partial_images=2, deadline_s=1.0)
        seen: list[Partial | Done] = []
        async with aclosing(upstream.provider.stream(job)) as made:
            async for item in made:
                seen.append(item)
                await asyncio.sleep(0.6)
    assert isinstance(seen[-1], Done)
    close([item for item in seen if isinstance(item, Partial)], seen[-1])


# --- openai: what a stream can look like ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(answer="plain"),
        Fault(line_end="\r\n"),
        Fault(line_end="\r"),
        Fault(done=True),
        Fault(answer="url"),
        Fault(answer="data_prefix"),
        Fault(pause_s=0.01),
    ],
    ids=["plain", "crlf", "cr", "done", "url", "data_prefix", "slow"],
)
async def test_relays_stream_in_dialects(fault: Fault, tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        looks, done = await upstream.watch(partial_images=2)
        assert simulator.purchases[0].stream
    assert len(looks) == (0 if fault.answer == "plain" else 2)
    assert done.usage is not None
    assert done.upstream_request_id == "req_simulated"
    assert (done.quality, done.background) == ("low", "opaque")
    assert file_of(done.images[0]) == png(64, 32)
    close(looks)
    assert not list(tmp_path.iterdir())


async def test_a_frame_of_many_megabytes_waits_in_a_file(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        looks, done = await upstream.watch(partial_images=1)
        assert done.images[0].payload.size_bytes > 12_000_000 > MEMORY_MAX_BYTES
        assert upstream.files() == 1
        close(looks, done)


@asynccontextmanager
async def streaming(
    folder: Path, *frames: object, media_type: str = "text/event-stream"
) -> AsyncGenerator[Upstream, None]:
    """Connect to a server that always sends these frames."""
    lines = [f"data:{json.dumps(frame)}\n\n" for frame in frames]
    with respx.mock() as router:
        router.route(method="POST").respond(
            headers={"Content-Type": media_type}, content="".join(lines).encode()
        )
        transport = httpx.MockTransport(router.async_handler)
        async with tools(folder, transport) as given:
            account = an_account()
            provider = PROVIDERS["openai"](account, given)
            yield Upstream(provider, print, print, int, given, account)


def event(kind: str, **more: object) -> dict[str, object]:
    text = base64.b64encode(png(64, 32)).decode()
    return {"type": f"image_generation.{kind}", "b64_json": text, **more}


async def test_more_looks_than_were_asked_for_are_not_shown(tmp_path: Path) -> None:
    frames = [event("partial_image", partial_image_index=-1)] * 5
    async with streaming(tmp_path, *frames, event("completed")) as upstream:
        looks, done = await upstream.watch(partial_images=2)
        assert [look.index for look in looks] == [0, 1]
        close(looks, done)
        assert upstream.files() == 0


async def test_a_broken_look_does_not_spoil_the_picture(tmp_path: Path) -> None:
    broken = event("partial_image", b64_json="%%%%")
    async with streaming(tmp_path, broken, event("completed")) as upstream:
        looks, done = await upstream.watch(partial_images=2)
    assert not looks
    close(looks, done)


async def test_events_are_known_by_their_look_if_the_type_is_wrong(
    tmp_path: Path,
) -> None:
    kind = "application/json"
    async with streaming(tmp_path, event("completed"), media_type=kind) as upstream:
        close(*await upstream.watch())


async def test_a_whole_answer_in_one_event_is_understood(tmp_path: Path) -> None:
    item = {"b64_json": base64.b64encode(png(64, 32)).decode()}
    usage = {"input_tokens": 13, "output_tokens": 130}
    async with streaming(tmp_path, {"data": [item] * 2, "usage": usage}) as upstream:
        looks, done = await upstream.watch(n=2)
    assert len(done.images) == 2
    assert done.usage == Usage(text_input=13, image_output=130)
    close(looks, done)


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        ((False, True), Usage(text_input=26, image_output=130)),
        ((True, True), None),
        ((True, False), None),
        ((False, False), None),
    ],
)
async def test_a_usage_that_could_be_a_part_or_the_whole_is_no_usage(
    told: tuple[bool, ...], usage: Usage | None, tmp_path: Path
) -> None:
    counts = {"input_tokens": 26, "output_tokens": 130}
    frames = [event("completed", usage=counts if tells else None) for tells in told]
    async with streaming(tmp_path, *frames) as upstream:
        looks, done = await upstream.watch(n=2)
    assert done.usage == usage
    close(looks, done)


async def test_nobody_waits_for_a_stream_to_end_that_has_told_all(
    tmp_path: Path,
) -> None:
    frames = [event("completed"), {"error": {"message": "too late"}}]
    async with streaming(tmp_path, *frames) as upstream:
        close(*await upstream.watch())


# --- openai: how a stream can break ---


def an_error(code: str | None, message: str = "no") -> Fault:
    return Fault(answer="error_event", body={"message": message, "code": code})


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (an_error("moderation_blocked"), K.CONTENT_POLICY),
        (an_error("server_is_overloaded"), K.OVERLOADED),
        (an_error("rate_limit_exceeded"), K.RATE_LIMITED),
        (an_error(None), K.BAD_GATEWAY),
        (Fault(answer="no_completed"), K.TIMEOUT),
        (Fault(answer="empty"), K.TIMEOUT),
        (Fault(answer="no_completed", done=True), K.NO_OUTPUT),
        (Fault(close="mid_body"), K.TIMEOUT),
        (Fault(close="mid_body", answer="big"), K.TIMEOUT),
        (Fault(answer="bad_base64"), K.BAD_GATEWAY),
        (Fault(answer="text"), K.BAD_GATEWAY),
        (Fault(answer="dead_url"), K.RESULT_LOST),
        (Fault(answer="html"), K.BAD_GATEWAY),
        (Fault(answer="error"), K.BAD_GATEWAY),
        (Fault(answer="gzip"), K.BAD_GATEWAY),
    ],
    ids=str,
)
async def test_a_stream_that_breaks_after_a_look_was_maybe_billed(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        looks = 0 if fault.answer in NO_EVENTS else 1
        error = await upstream.stream_failure(partial_images=1, looks=looks)
        assert error.kind is kind
        assert error.billed is (Billed.YES if kind is K.RESULT_LOST else Billed.MAYBE)
        assert len(simulator.purchases) == 1
        assert upstream.files() == 0


async def test_an_error_before_any_look_was_billed_as_usual(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(an_error("rate_limit_exceeded"))
        error = await upstream.stream_failure(partial_images=0)
        assert (error.kind, error.billed) == (K.RATE_LIMITED, Billed.NO)


async def test_what_is_finished_when_a_stream_breaks_is_delivered(
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(close="mid_body"))
        looks, done = await upstream.watch(n=3)
    assert len(done.images) == 2
    assert done.usage is None
    close(looks, done)
    assert not list(tmp_path.iterdir())


async def test_the_usage_of_a_stream_that_broke_is_left_to_the_estimate(
    tmp_path: Path,
) -> None:
    counts = {"input_tokens": 26, "output_tokens": 130}
    frames = [event("completed", usage=counts), {"error": {"message": "no"}}]
    async with streaming(tmp_path, *frames) as upstream:
        looks, done = await upstream.watch(n=2)
    assert len(done.images) == 1
    assert done.usage is None
    close(looks, done)


async def test_a_server_without_streams_is_not_asked_for_one(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path, stream=False) as (upstream, simulator):
        assert not upstream.provider.capabilities("any").stream
        error = await upstream.stream_failure()
        assert error.kind is K.UNSUPPORTED
        assert not simulator.requests


async def test_a_plain_call_never_mentions_streams(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        close([], await upstream.make(partial_images=2))
        assert not {"stream", "partial_images"} & set(simulator.requests[0].json())
        close(*await upstream.watch(partial_images=2))
        told = simulator.requests[1].json()
        assert (told["stream"], told["partial_images"]) == (True, 2)


async def test_the_simulator_rejects_looks_without_a_stream(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (upstream, _):
        error = await upstream.stream_failure(partial_images=4)
        assert (error.kind, error.upstream_code) == (K.INVALID_REQUEST, "invalid_value")


# --- the sandbox ---


async def test_the_sandbox_gets_sharper(tmp_path: Path) -> None:
    async with connect_sandbox(tmp_path) as upstream:
        looks, done = await upstream.watch(
            partial_images=3, width_px=512, height_px=512, prompt="x" * 200
        )
    images = [*(look.image for look in looks), *done.images]
    sharpness = [edges(file_of(made)) for made in images]
    assert sharpness == sorted(sharpness)
    assert sharpness[0] < sharpness[-1] / 2


def edges(file: bytes) -> int:
    """Sum up how much neighbours differ."""
    with Image.open(io.BytesIO(file)) as image:
        grey = image.convert("L")
    data = grey.tobytes()
    return sum(abs(a - b) for a, b in pairwise(data))


async def test_each_look_of_the_sandbox_costs_what_openai_charges(
    tmp_path: Path,
) -> None:
    expected = Usage(text_input=1, image_output=300)
    async with connect_sandbox(tmp_path) as upstream:
        looks, done = await upstream.watch(partial_images=3, n=2, expected=expected)
    assert len(looks) == 3
    assert done.usage == Usage(text_input=2, image_output=2 * 300 + 3 * 100)
    close(looks, done)


async def test_the_sandbox_fails_in_mid_stream_as_told(tmp_path: Path) -> None:
    async with connect_sandbox(tmp_path) as upstream:
        upstream.fail(K.BAD_GATEWAY)
        error = await upstream.stream_failure(partial_images=2, looks=2)
    assert (error.kind, error.billed) == (K.BAD_GATEWAY, Billed.MAYBE)


async def test_the_sandbox_can_be_told_to_stream_nothing(tmp_path: Path) -> None:
    async with connect_sandbox(tmp_path) as upstream:
        settings = upstream.provider.settings  # type: ignore[attr-defined]  # a sandbox
        settings.change({"stream": False})
        assert not upstream.provider.capabilities("any").stream
        steps = [step async for step in upstream.provider.stream(a_job())]
        assert [type(step) for step in steps] == [Done]
