"""What is peculiar to replicate: predictions that are asked after until they end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from providers.kit.contract import (
    Billed,
    Cancelled,
    Done,
    FailureKind,
    Operation,
    Pending,
    Provider,
    ProviderError,
)
from providers.kit.replies import JSON_MAX_BYTES
from providers.kit.spool import MEMORY_MAX_BYTES
from providers.registry import PROVIDERS
from providers.replicate import INLINE_MAX_BYTES
from tests.builders import a_job, an_account
from tests.contract.replicate_upstream import (
    MODEL,
    failed,
    refused,
    replicate_upstream,
)
from tests.contract.upstreams import K, an_input, close, file_of, tools
from tests.simulators.pictures import png
from tests.simulators.replicate_server import KEY, ReplicateSimulator, throttled
from tests.simulators.server import Fault, Seen

EDIT = Operation.EDIT
SMALL = png(64, 32)
LARGE = png(64, 32, padding=INLINE_MAX_BYTES)


def sha256(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


def agree(error: ProviderError, simulator: ReplicateSimulator) -> bool:
    """Tell whether what is said of the bill is what the witness saw."""
    if error.billed is Billed.MAYBE:
        return True
    return (simulator.billed > 0) is (error.billed is Billed.YES)


def created(simulator: ReplicateSimulator) -> list[Seen]:
    """The calls that may have bought something."""
    return [
        seen
        for seen in simulator.requests
        if seen.method == "POST" and seen.path.endswith("/predictions")
    ]


def times(fault: Fault, reads: int = 1) -> list[Fault]:
    """Let so many reads fail: one that is dropped is tried again below HTTP, once."""
    dropped = fault.close in {"before_reply", "reset"}
    return [fault] * reads * (2 if dropped else 1)


@asynccontextmanager
async def again(
    simulator: ReplicateSimulator, folder: Path
) -> AsyncGenerator[Provider, None]:
    """The adapter of another process."""
    async with tools(folder) as given:
        account = an_account(base_url=simulator.base_url, secret=KEY)
        yield PROVIDERS["replicate"](account, given)


# --- what is sent ---


async def test_a_plain_job_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        close(await upstream.make(deadline_s=90.5))
        seen, look, *_ = simulator.requests

    assert (seen.method, seen.path) == ("POST", f"/v1/models/{MODEL}/predictions")
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["cancel-after"] == "90s"
    assert "prefer" not in seen.headers
    assert seen.json() == {
        "input": {
            "prompt": a_job().prompt,
            "quality": "low",
            "aspect_ratio": "1:1",
            "number_of_images": 1,
            "output_format": "png",
        }
    }
    (prediction,) = simulator.jobs
    assert (look.method, look.path) == ("GET", f"/v1/predictions/{prediction}")
    assert look.headers["authorization"] == f"Bearer {KEY}"


async def test_a_prediction_may_run_for_as_long_as_it_is_wanted(
    tmp_path: Path,
) -> None:
    # The attempt's own time only ends the call: what is pending is asked after.
    async with replicate_upstream(tmp_path, wait_s=60) as (upstream, simulator):
        close(await upstream.make(deadline_s=30.5, wanted_for_s=895.5))
        headers = created(simulator)[0].headers
    assert (headers["cancel-after"], headers["prefer"]) == ("895s", "wait=30")


async def test_every_field_that_was_given_is_passed_on(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        done = await upstream.make(
            width_px=None,
            height_px=None,
            n=3,
            quality="auto",
            background="opaque",
            output_format="webp",
            output_compression=0,
            moderation="low",
            user="u-1",
        )
        close(done)
        given = created(simulator)[0].json()["input"]
    assert len(done.images) == 3
    assert given == {
        "prompt": a_job().prompt,
        "quality": "auto",
        "aspect_ratio": "auto",
        "number_of_images": 3,
        "output_format": "webp",
        "output_compression": 0,
        "background": "opaque",
        "moderation": "low",
        "user_id": "u-1",
    }


async def test_a_png_is_never_compressed(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        close(await upstream.make(output_compression=50))
        assert "output_compression" not in created(simulator)[0].json()["input"]


@pytest.mark.parametrize(
    ("size", "word"),
    [
        ((1024, 1024), "1:1"),
        ((1536, 1024), "3:2"),
        ((1024, 1536), "2:3"),
        ((2048, 1152), "2048x1152"),
        ((2160, 3840), "2160x3840"),
    ],
)
async def test_a_size_is_told_as_replicate_calls_it(
    size: tuple[int, int], word: str, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        done = await upstream.make(width_px=size[0], height_px=size[1])
        assert simulator.purchases[0].aspect_ratio == word
        assert (done.images[0].width_px, done.images[0].height_px) == size
        close(done)


@pytest.mark.parametrize(
    "changes",
    [
        {"width_px": 1024, "height_px": 1025},
        {"model": "gpt-image-2"},
        {"model": "openai/../../files"},
        {"operation": EDIT},
        {"operation": EDIT, "references": 17},
        {"operation": EDIT, "references": 1, "mask": True},
    ],
    ids=str,
)
async def test_what_cannot_be_made_there_is_not_asked_for(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        one = an_input(upstream.spools, SMALL)
        if "references" in changes:
            changes = changes | {"references": (one,) * changes["references"]}
        if "mask" in changes:
            changes = changes | {"mask": one}
        error = await upstream.failure(**changes)
        assert (error.kind, error.billed) == (K.UNSUPPORTED, Billed.NO)
        assert not simulator.requests


async def test_a_call_that_is_held_open_brings_the_picture_at_once(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path, wait_s=60) as (upstream, simulator):
        done = await upstream.provider.start(upstream.job(deadline_s=30.5))
        assert isinstance(done, Done)
        close(done)
        assert simulator.requests[0].headers["prefer"] == "wait=30"
        assert [s.method for s in simulator.requests] == ["POST", "GET"]
    assert done.upstream_request_id in simulator.jobs


async def test_a_call_that_is_held_open_may_still_bring_no_end(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path, wait_s=1) as (upstream, simulator):
        simulator.script(Fault(answer="overrun"))
        close(await upstream.finished(await upstream.submitted()))
        assert len(created(simulator)) == 1


async def test_a_picture_that_cannot_be_fetched_yet_is_fetched_at_the_next_look(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path, wait_s=60) as (upstream, simulator):
        down = Fault(on="output", status=503)
        simulator.script(Fault(), down, down, down)
        pending = await upstream.submitted()
        assert upstream.files() == 0
        close(await upstream.finished(pending))
        assert simulator.billed == 1


async def test_a_prediction_that_has_failed_at_once_is_a_failure_at_once(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path, wait_s=60) as (upstream, _):
        with pytest.raises(ProviderError) as caught:
            await upstream.submitted(prompt="[moderate] x")
    assert caught.value.kind is K.CONTENT_POLICY


# --- references ---


@pytest.mark.parametrize("encoding", ["raw", "base64"])
async def test_small_references_travel_inside_and_large_ones_as_files(
    encoding: Any, tmp_path: Path
) -> None:
    files = [SMALL, LARGE, png(64, 32, padding=1)]
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        inputs = [an_input(upstream.spools, f, encoding=encoding) for f in files]
        done = await upstream.make(operation=EDIT, references=tuple(inputs), n=2)
        close(done)
        upload, create, *_ = simulator.requests
        (bought,) = simulator.purchases
        file_url = f"{simulator.base_url}/files/{next(iter(simulator.uploads))}"

    assert (upload.method, upload.path) == ("POST", "/v1/files")
    assert upload.headers["authorization"] == f"Bearer {KEY}"
    (part,) = upload.form
    assert (part.name, part.media_type) == ("content", "image/png")
    assert part.sha256 == sha256(LARGE)
    links = create.json()["input"]["input_images"]
    assert links[0] == f"data:image/png;base64,{base64.b64encode(SMALL).decode()}"
    assert links[1] == file_url
    assert links[2].startswith("data:image/png;base64,")
    assert (bought.operation, bought.n) == ("edit", 2)
    assert bought.references == tuple(map(sha256, files))


async def test_no_more_than_so_much_travels_inside_all_together(
    tmp_path: Path,
) -> None:
    half = png(64, 32, padding=INLINE_MAX_BYTES // 2)
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        one = an_input(upstream.spools, half)
        close(await upstream.make(operation=EDIT, references=(one,) * 3))
        assert len(simulator.uploads) == 2
        body = created(simulator)[0].body
    assert len(body) < 2 * INLINE_MAX_BYTES


UPLOADS = [
    (Fault(on="file", close="before_reply"), K.NETWORK),
    (Fault(on="file", close="reset"), K.NETWORK),
    (Fault(on="file", close="mid_upload"), K.NETWORK),
    (Fault(on="file", close="mid_body"), K.NETWORK),
    (Fault(on="file", status=401, body={"detail": "no"}), K.AUTH),
    (Fault(on="file", status=413, body={"detail": "too large"}), K.UNSUPPORTED),
    (Fault(on="file", status=429, body={"detail": "slowly"}), K.RATE_LIMITED),
    (Fault(on="file", status=500, body={"detail": "oops"}), K.BAD_GATEWAY),
    (Fault(on="file", status=503, body="<html>"), K.OVERLOADED),
    (Fault(on="file", status=504, body="<html>"), K.NETWORK),
    (Fault(on="file", answer="html"), K.BAD_GATEWAY),
    (Fault(on="file", answer="error"), K.BAD_GATEWAY),
    (Fault(on="file", answer="foreign_urls"), K.BAD_GATEWAY),
]


@pytest.mark.parametrize(("fault", "kind"), UPLOADS, ids=str)
async def test_an_upload_that_fails_has_bought_nothing(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        one = an_input(upstream.spools, LARGE * 8)
        simulator.script(fault)
        error = await upstream.failure(operation=EDIT, references=(one,))
        assert (error.kind, error.billed) == (kind, Billed.NO)
        assert error.client_message is None
        assert not created(simulator)


# --- the table of failures: when the prediction is created ---

NO, MAYBE, YES = Billed.NO, Billed.MAYBE, Billed.YES
AT_CREATION = [
    (refused(400, "Bad request", "The request is wrong."), K.INVALID_REQUEST, NO),
    (refused(401, "Unauthenticated", f"no token: {KEY}"), K.AUTH, NO),
    (refused(402, "Insufficient credit", "Buy some."), K.INSUFFICIENT_FUNDS, NO),
    (refused(402, "Monthly spend limit reached", ""), K.INSUFFICIENT_FUNDS, NO),
    (refused(403, "Forbidden", "This account is locked."), K.AUTH, NO),
    (refused(404, "Not found", "There is no such model."), K.UNSUPPORTED, NO),
    (refused(408, "Request timeout", ""), K.TIMEOUT, MAYBE),
    (refused(413, "Too large", ""), K.INVALID_REQUEST, NO),
    (refused(422, "Invalid", "- input: prompt is required"), K.INVALID_REQUEST, NO),
    (refused(422, "Invalid", "input was flagged as sensitive"), K.CONTENT_POLICY, NO),
    (throttled(30), K.RATE_LIMITED, NO),
    (refused(500, "Internal", "oops"), K.BAD_GATEWAY, NO),
    (Fault(status=502, body=f"<html>{KEY}</html>"), K.BAD_GATEWAY, NO),
    (refused(503, "Unavailable", "later"), K.OVERLOADED, NO),
    (Fault(status=504, body="<html>timeout</html>"), K.TIMEOUT, MAYBE),
    (Fault(status=529, body={"detail": "overloaded"}), K.OVERLOADED, NO),
    (Fault(status=302, headers={"Location": "/"}), K.BAD_GATEWAY, NO),
    (Fault(status=418, body={"code": "teapot"}), K.BAD_GATEWAY, NO),
    (Fault(close="before_reply"), K.TIMEOUT, MAYBE),
    (Fault(close="reset"), K.TIMEOUT, MAYBE),
    (Fault(close="mid_body"), K.TIMEOUT, MAYBE),
    (Fault(answer="html"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="error"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="no_id"), K.BAD_GATEWAY, MAYBE),
    (Fault(answer="long"), K.BAD_GATEWAY, MAYBE),
]


@pytest.mark.parametrize(("fault", "kind", "billed"), AT_CREATION, ids=str)
async def test_a_prediction_that_is_not_created_is_a_failure(
    fault: Fault, kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        assert KEY not in f"{error} {error.detail} {error.client_message}"
        assert agree(error, simulator)
        assert len(created(simulator)) == 1
        assert not simulator.faults


@pytest.mark.parametrize(
    ("fault", "wait_s"),
    [
        (throttled(30), 30.0),
        (throttled(99_999), 300.0),
        (replace(throttled(30), headers={"Retry-After": "7"}), 7.0),
        (Fault(status=429, body={"detail": "slowly"}), None),
    ],
    ids=str,
)
async def test_the_time_to_stay_away_is_read_from_header_or_text(
    fault: Fault, wait_s: float | None, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
    assert (error.kind, error.retry_after_s) == (K.RATE_LIMITED, wait_s)


async def test_a_value_that_a_models_schema_lacks_is_unsupported_there(
    tmp_path: Path,
) -> None:
    # The gateway has checked these: another upstream will take them.
    options = {"aspect_ratios": {"1024x1024": "4:5"}, "backgrounds": ["transparent"]}
    async with replicate_upstream(tmp_path, **options) as (upstream, simulator):
        for changes in ({}, {"background": "transparent"}, {"quality": "xhigh"}):
            error = await upstream.failure(**changes)
            assert (error.kind, error.status) == (K.UNSUPPORTED, 422)
            assert error.client_message is None
        assert not simulator.purchases


# --- the table of failures: how predictions end ---

OPENAI_SAID = (
    "Error code: 400 - {'error': {'message': 'Your request was rejected by the safety "
    "system.', 'type': 'image_generation_user_error', 'code': 'moderation_blocked'}}"
)
ENDS = [
    (Fault(answer="canceled"), K.TIMEOUT, YES),
    (Fault(answer="aborted"), K.TIMEOUT, NO),
    (Fault(answer="empty"), K.NO_OUTPUT, MAYBE),
    (Fault(answer="null"), K.NO_OUTPUT, MAYBE),
    (Fault(answer="objects"), K.NO_OUTPUT, MAYBE),
    (Fault(answer="dead_link"), K.RESULT_LOST, YES),
    (Fault(answer="foreign_link"), K.RESULT_LOST, YES),
    (Fault(answer="text"), K.RESULT_LOST, YES),
    (Fault(answer="bad_base64"), K.RESULT_LOST, YES),
    (failed("The input or output was flagged as sensitive."), K.CONTENT_POLICY, NO),
    (failed("Please try again with other inputs. (E005)"), K.CONTENT_POLICY, NO),
    (failed(OPENAI_SAID), K.CONTENT_POLICY, NO),
    (failed("code: moderation_blocked"), K.CONTENT_POLICY, NO),
    (failed("Too much demand. (E003) (1cah9wlWR9)"), K.OVERLOADED, NO),
    (failed("Service is temporarily unavailable. (E004)"), K.OVERLOADED, NO),
    (failed("The input was invalid (E006)"), K.INVALID_REQUEST, NO),
    (failed("Input validation error: no image"), K.INVALID_REQUEST, NO),
    (failed("type: image_generation_user_error"), K.INVALID_REQUEST, NO),
    (failed("Billing hard limit has been reached"), K.INSUFFICIENT_FUNDS, NO),
    (failed("Director: unexpected error (E9243)"), K.BAD_GATEWAY, MAYBE),
    (failed("CUDA error: unspecified"), K.BAD_GATEWAY, MAYBE),
    (failed(""), K.BAD_GATEWAY, MAYBE),
    (failed(f"the token {KEY} is gone"), K.BAD_GATEWAY, MAYBE),
]


@pytest.mark.parametrize(("fault", "kind", "billed"), ENDS, ids=str)
async def test_a_prediction_that_has_ended_is_over(
    fault: Fault, kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
        assert (error.kind, error.billed, error.ended) == (kind, billed, True)
        assert KEY not in f"{error} {error.detail} {error.client_message}"
        assert agree(error, simulator)
        assert upstream.files() == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Too much demand. (E003) (1cah9wlWR9)", "E003"),
        ("Director: unexpected error (E9243)", "E9243"),
        ("CUDA error", None),
    ],
)
async def test_a_code_in_the_text_is_kept_as_it_came(
    text: str, code: str | None, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(failed(text))
        error = await upstream.failure()
    assert error.upstream_code == code
    assert text in error.detail


async def test_pictures_vanish_after_an_hour(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        close(await upstream.finished(pending))
        simulator.let_an_hour_pass()
        error = await upstream.failed_look(pending.job_id)
        assert (error.kind, error.billed, error.ended) == (K.RESULT_LOST, YES, True)
        assert agree(error, simulator)


async def test_a_deadline_stops_what_is_waiting_for_nothing(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        for answer, billed in (("waiting", NO), ("stuck", YES)):
            simulator.script(Fault(answer=answer))
            pending = await upstream.submitted()
            job = list(simulator.jobs.values())[-1]
            assert isinstance(await upstream.look(pending.job_id), Pending)
            # As if the time that Cancel-After gives had passed.
            job.cancel_at_s = 0
            error = await upstream.failed_look(pending.job_id)
            assert (error.kind, error.billed) == (K.TIMEOUT, billed)
        assert simulator.billed == 1


# --- reads that fail, and the job that is well ---

READS = [
    (Fault(on="poll", status=408), K.TIMEOUT),
    (replace(throttled(30), on="poll"), K.RATE_LIMITED),
    (Fault(on="poll", status=500, body={"detail": "oops"}), K.BAD_GATEWAY),
    (Fault(on="poll", status=502, body=f"<html>{KEY}"), K.BAD_GATEWAY),
    (Fault(on="poll", status=503, body="<html>"), K.OVERLOADED),
    (Fault(on="poll", status=504, body="<html>"), K.TIMEOUT),
    (Fault(on="poll", status=529), K.OVERLOADED),
    (Fault(on="poll", close="before_reply"), K.TIMEOUT),
    (Fault(on="poll", close="reset"), K.TIMEOUT),
    (Fault(on="poll", close="mid_body"), K.TIMEOUT),
    (Fault(on="poll", answer="html"), K.BAD_GATEWAY),
    (Fault(on="poll", answer="error"), K.BAD_GATEWAY),
]


@pytest.mark.parametrize(("fault", "kind"), READS, ids=str)
async def test_a_read_that_fails_can_be_repeated(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        simulator.script(*times(fault))
        error = await upstream.failed_look(pending.job_id)
        assert (error.kind, error.billed, error.ended) == (kind, MAYBE, False)
        assert KEY not in str(error)
        close(await upstream.finished(pending))
        assert (len(created(simulator)), simulator.billed) == (1, 1)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(on="poll", status=401, body={"detail": "no"}), K.AUTH),
        (Fault(on="poll", status=402), K.INSUFFICIENT_FUNDS),
        (Fault(on="poll", status=403), K.AUTH),
        (Fault(on="poll", status=403, body={"detail": "flagged"}), K.BAD_GATEWAY),
        (Fault(on="poll", status=404, body={"detail": "no"}), K.BAD_GATEWAY),
        (Fault(on="poll", status=405, body={"detail": "no"}), K.BAD_GATEWAY),
        (Fault(on="poll", status=410, body={"detail": "no"}), K.BAD_GATEWAY),
        (Fault(on="poll", status=422, body={"detail": "no"}), K.BAD_GATEWAY),
    ],
    ids=str,
)
async def test_a_read_that_is_refused_says_nothing_of_the_prediction(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        simulator.script(fault)
        error = await upstream.failed_look(pending.job_id)
        assert (error.kind, error.billed, error.ended) == (kind, MAYBE, False)
        assert error.client_message is None
        close(await upstream.finished(pending))
        assert simulator.billed == 1


@pytest.mark.parametrize("answer", ["backwards", "unknown_state"])
async def test_states_may_go_backwards_or_be_new(answer: str, tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        pending = await upstream.submitted()
        if answer == "unknown_state":
            error = await upstream.failed_look(pending.job_id)
            assert (error.kind, error.billed, error.ended) == (
                K.BAD_GATEWAY,
                MAYBE,
                False,
            )
        close(await upstream.finished(pending))
        assert simulator.billed == 1


async def test_another_process_finds_the_prediction_again(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        assert KEY not in pending.job_id
        async with again(simulator, tmp_path) as provider:
            step: Done | Pending = pending
            while isinstance(step, Pending):
                step = await provider.poll(upstream.job(), pending.job_id)
        close(step)
        assert (len(created(simulator)), simulator.billed) == (1, 1)


# --- where the credential goes ---


@pytest.mark.parametrize("answer", ["foreign_urls", "no_urls"])
async def test_a_url_elsewhere_is_not_followed_and_the_picture_not_lost(
    answer: str, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        pending = await upstream.submitted()
        told = json.loads(pending.job_id)
        home = f"{simulator.base_url}/predictions/{told['id']}"
        assert (told["get"], told["cancel"]) == (home, f"{home}/cancel")
        close(await upstream.finished(pending))


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("http:", "https:"),
        lambda url: url.replace("127.0.0.1", "localhost"),
        lambda url: url.replace("127.0.0.1", "127.0.0.1@x.test"),
        lambda url: url.replace("127.0.0.1:", "127.0.0.1:1"),
        lambda url: url.replace("http://", "//"),
        lambda url: url + "\r\nx: y",
    ],
)
async def test_a_job_id_that_leads_elsewhere_is_refused(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        told = json.loads(pending.job_id)
        led = json.dumps(told | {"get": change(told["get"])})
        error = await upstream.failed_look(led)
        # It is out, and may be charged for.
        assert (error.kind, error.billed) == (K.UNSUPPORTED, MAYBE)
        assert (await upstream.failed_look("{}")).billed is MAYBE
        assert len(simulator.requests) == 1


async def test_a_picture_is_fetched_without_a_credential(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        close(await upstream.make())
        (fetched,) = [s for s in simulator.requests if s.path.startswith("/delivery")]
        assert "authorization" not in fetched.headers


# --- what comes back ---


async def test_a_large_picture_waits_in_a_file(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        (made,) = (await upstream.make()).images
        assert made.payload.size_bytes > 9_000_000 > MEMORY_MAX_BYTES
        assert upstream.files() == 1
        assert len(file_of(made)) > 9_000_000
        assert upstream.files() == 0


@pytest.mark.parametrize("answer", ["one_link", "data_uri", "negative_usage", "ok"])
async def test_the_output_may_be_a_list_or_one_link_and_tells_no_usage(
    answer: str, tmp_path: Path
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        done = await upstream.make()
    assert (done.usage, done.cost_nanousd, done.units_millionths) == (None, None, None)
    (made,) = done.images
    with Image.open(io.BytesIO(file_of(made))) as image:
        assert image.size == (1024, 1024)


async def test_a_picture_is_described_as_it_is_and_not_as_it_was_asked_for(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="other_size"))
        (made,) = (await upstream.make()).images
        assert (made.width_px, made.height_px) == (64, 32)
        made.payload.close()
        simulator.script(Fault(answer="other_type"))
        (made,) = (await upstream.make()).images
        assert made.media_type == "image/webp"
        made.payload.close()


async def test_fewer_pictures_are_delivered_and_more_are_not(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        for answer, count in (("one_less", 2), ("one_more", 3)):
            simulator.script(Fault(answer=answer))
            done = await upstream.make(n=3)
            close(done)
            assert len(done.images) == count
        gone = Fault(on="output", status=404)
        simulator.script(Fault(), gone, gone, gone)
        done = await upstream.make(n=3)
        close(done)
        assert len(done.images) == 2
        assert upstream.files() == 0


async def test_giving_up_between_two_pictures_leaves_no_file(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        hanging = Fault(on="output", hang=True)
        simulator.script(Fault(answer="big"), Fault(on="output"), hanging)
        call = asyncio.create_task(upstream.make(n=2))
        while upstream.files() < 1 or simulator.faults:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert upstream.files() == 0


async def test_a_picture_that_our_disk_cannot_take_is_a_lost_result(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path / "gone") as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        error = await upstream.failure()
    assert (error.kind, error.billed) == (K.RESULT_LOST, YES)


# --- stopping ---


@pytest.mark.parametrize(
    ("answer", "looks", "told", "bought"),
    [
        ("waiting", 1, Cancelled(Billed.NO), 0),
        ("stuck", 1, Cancelled(Billed.YES), 1),
        ("ok", 2, None, 1),
        ("failed", 2, None, 0),
    ],
)
async def test_what_is_stopped_is_charged_once_it_has_started(
    answer: str,
    looks: int,
    told: Cancelled | None,
    bought: int,
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        pending = await upstream.submitted()
        job = simulator.jobs[json.loads(pending.job_id)["id"]]
        for _ in range(looks):
            job.step(simulator.now_s())
        stopped = await upstream.provider.cancel(upstream.job(), pending.job_id)
        assert stopped == told
        assert simulator.billed == bought
        assert simulator.requests[-1].path.endswith(f"/predictions/{job.id}/cancel")


async def test_a_wish_to_stop_that_only_was_taken_is_maybe_charged(
    tmp_path: Path,
) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        job = simulator.jobs[json.loads(pending.job_id)["id"]]
        body = simulator.shown(job)
        simulator.script(Fault(on="cancel", status=200, body=body))
        stopped = await upstream.provider.cancel(upstream.job(), pending.job_id)
        assert stopped == Cancelled(Billed.MAYBE)


async def test_stopping_that_fails_says_nothing_of_the_bill(tmp_path: Path) -> None:
    async with replicate_upstream(tmp_path) as (upstream, simulator):
        pending = await upstream.submitted()
        simulator.script(Fault(on="cancel", close="reset"))
        with pytest.raises(ProviderError) as caught:
            await upstream.provider.cancel(upstream.job(), pending.job_id)
        assert (caught.value.kind, caught.value.billed) == (K.TIMEOUT, MAYBE)


# --- options ---


async def test_options_say_what_the_models_can_do(tmp_path: Path) -> None:
    options = {
        "aspect_ratios": {"1024x1024": "1:1"},
        "edits": False,
        "n_max": 1,
        "qualities": ["low"],
        "output_formats": ["png"],
        "backgrounds": ["opaque", "transparent"],
        "poll_ms": 2500,
    }
    async with replicate_upstream(tmp_path, **options) as (upstream, _):
        able = upstream.provider.capabilities("any/model")
        assert able.sizes == frozenset({(1024, 1024)})
        assert able.operations == frozenset({Operation.GENERATE})
        assert (able.n_max, able.references_max, able.mask) == (1, 0, False)
        assert able.qualities == frozenset({"low"})
        assert able.output_formats == frozenset({"png"})
        assert able.backgrounds == frozenset({"opaque", "transparent"})
        assert (await upstream.submitted()).poll_after_s == 2.5
        with pytest.raises(ProviderError, match="no streams"):
            upstream.provider.stream(upstream.job())


# --- the simulator refuses what Replicate refuses ---


async def test_the_simulator_rejects_what_replicate_rejects(tmp_path: Path) -> None:
    good = {"prompt": "x"}
    wrong: list[dict[str, Any]] = [
        {},
        {"input": "x"},
        {"input": {}},
        {"input": good, "version": "v"},
        {"input": good | {"size": "1024x1024"}},
        {"input": good | {"mask": "data:image/png;base64,AA=="}},
        {"input": good | {"aspect_ratio": "1024x1025"}},
        {"input": good | {"background": "transparent"}},
        {"input": good | {"number_of_images": 11}},
        {"input": good | {"output_compression": "90"}},
        {"input": good | {"input_images": ["/etc/passwd"]}},
        {"input": good | {"input_images": ["data:image/png;base64,!"]}},
        {"input": good | {"input_images": [f"data:x;base64,{'A' * 400_000}"]}},
    ]
    async with replicate_upstream(tmp_path) as (_, simulator):
        url = f"{simulator.base_url}/models/{MODEL}/predictions"
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(trust_env=False) as client:

            async def status(body: Any, **more: str) -> int:
                answer = await client.post(url, json=body, headers=headers | more)
                return answer.status_code

            assert [await status(body) for body in wrong] == [422] * len(wrong)
            assert await status({"input": good}, Prefer="wait=61") == 422
            assert await status({"input": good}, **{"Cancel-After": "soon"}) == 422
            assert (await client.post(url, json={"input": good})).status_code == 401
            assert not simulator.purchases
            answer = await client.post(url, json={"input": good}, headers=headers)
            assert answer.json()["status"] == "starting"
            assert len(simulator.purchases) == 1
            (job,) = simulator.jobs.values()
            delivered = f"{simulator.origin}/delivery/{job.id}/0.webp"
            leaked = await client.get(delivered, headers=headers)
            assert leaked.status_code == 400
            assert (await client.get(delivered)).status_code == 200


def test_an_answer_has_room_for_what_travelled_inside() -> None:
    # Replicate repeats the input in every answer.
    assert JSON_MAX_BYTES > 2 * INLINE_MAX_BYTES
