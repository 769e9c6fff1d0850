"""What is peculiar to fal: its queue, its two kinds of errors, its units."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from providers.kit.contract import (
    Billed,
    Cancelled,
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
from tests.contract.fal_upstream import (
    MODEL,
    broken,
    fal_upstream,
    faulted,
    refused,
)
from tests.contract.upstreams import K, Upstream, an_input, close, file_of, tools
from tests.simulators.fal_server import KEY, FalSimulator
from tests.simulators.pictures import BIG_BYTES, picture, png
from tests.simulators.server import Fault

EDIT = Operation.EDIT
NO, MAYBE, YES = Billed.NO, Billed.MAYBE, Billed.YES
FIRST = "fal-ai/gpt-image-1.5"


def body_of(simulator: FalSimulator) -> Any:
    return simulator.requests[0].json()


# --- the shape of what is sent ---


async def test_a_plain_job_says_all_that_fal_would_choose_otherwise(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        await upstream.submitted(n=2, deadline_s=240.0)
        (seen,) = simulator.requests
    assert (seen.method, seen.path) == ("POST", "/openai/gpt-image-2")
    assert seen.headers["authorization"] == f"Key {KEY}"
    assert seen.headers["content-type"] == "application/json"
    assert seen.headers["x-fal-no-retry"] == "1"
    assert seen.headers["x-fal-request-timeout"] == "120"
    assert "x-fal-queue-priority" not in seen.headers
    assert seen.json() == {
        "prompt": a_job().prompt,
        "image_size": {"width": 64, "height": 32},
        "quality": "low",
        "num_images": 2,
        "output_format": "png",
    }


async def test_an_edit_sends_its_pictures_as_data_uris(tmp_path: Path) -> None:
    files = [png(64, 32, padding=4_000_000), picture(64, 32, "webp", "opaque")]
    mask = png(64, 32, clear=True)
    async with fal_upstream(tmp_path) as (upstream, simulator):
        inputs = (
            an_input(upstream.spools, files[0]),
            an_input(
                upstream.spools, files[1], media_type="image/webp", encoding="base64"
            ),
        )
        drawn = an_input(upstream.spools, mask)
        edit = {"operation": EDIT, "references": inputs, "mask": drawn}
        done = await upstream.make(**edit, width_px=None, height_px=None)
        seen, (bought,) = simulator.requests[0], simulator.purchases
        for one in (*inputs, drawn):
            one.payload.close()
    close(done)
    # 64 x 32 is two patches: two references of two.
    assert done.usage is not None
    assert done.usage.image_input == 4
    assert seen.path == "/openai/gpt-image-2/edit"
    assert "transfer-encoding" not in seen.headers
    kinds = ["image/png", "image/webp"]
    assert seen.json() == {
        "prompt": a_job().prompt,
        "image_size": "auto",
        "quality": "low",
        "num_images": 1,
        "output_format": "png",
        "image_urls": [data_uri(*one) for one in zip(kinds, files, strict=True)],
        "mask_url": data_uri("image/png", mask),
    }
    assert bought.operation == "edit"
    assert bought.references == tuple(hashlib.sha256(f).hexdigest() for f in files)
    assert bought.mask == hashlib.sha256(mask).hexdigest()
    assert not list(tmp_path.iterdir())


async def test_a_job_may_start_in_the_first_half_of_the_time_it_is_wanted(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        await upstream.submitted(deadline_s=240.0, wanted_for_s=895.0)
        headers = simulator.requests[0].headers
    assert headers["x-fal-request-timeout"] == "447"


def data_uri(kind: str, file: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


async def test_the_first_family_takes_other_fields(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        mask = an_input(upstream.spools, png(64, 32, clear=True))
        done = await upstream.make(
            model=FIRST,
            operation=EDIT,
            references=(reference,),
            mask=mask,
            width_px=1536,
            height_px=1024,
            background="transparent",
            input_fidelity="low",
        )
        told = body_of(simulator)
        assert simulator.requests[0].path == "/fal-ai/gpt-image-1.5/edit"
    close(done)
    assert (told["image_size"], told["background"]) == ("1536x1024", "transparent")
    assert told["input_fidelity"] == "low"
    assert "mask_image_url" in told


async def test_what_fal_has_no_field_for_is_not_sent(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        done = await upstream.make(
            operation=EDIT,
            references=(reference,),
            background="opaque",
            output_format="webp",
            output_compression=50,
            moderation="low",
            user="u-1",
            safety_identifier="s-1",
            input_fidelity="high",
        )
        assert set(body_of(simulator)) == {
            "prompt",
            "image_size",
            "quality",
            "num_images",
            "output_format",
            "image_urls",
        }
    close(done)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("openai/gpt-image-2", "/openai/gpt-image-2/edit"),
        (
            "openai/gpt-image-2.5/flare/text-to-image",
            "/openai/gpt-image-2.5/flare/edit",
        ),
        ("fal-ai/gpt-image-1/text-to-image", "/fal-ai/gpt-image-1/edit-image"),
    ],
)
async def test_the_endpoint_that_edits_is_found(
    model: str, path: str, tmp_path: Path
) -> None:
    edits = {"fal-ai/gpt-image-1/text-to-image": "fal-ai/gpt-image-1/edit-image"}
    async with fal_upstream(tmp_path, edit_models=edits) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        size = {"width_px": 1024, "height_px": 1024}
        done = await upstream.make(
            model=model, operation=EDIT, references=(reference,), **size
        )
        paths = [seen.route for seen in simulator.requests]
    close(done)
    assert paths[0] == path
    # Of a request only owner and app are asked.
    app = "/".join(path.split("/")[:3])
    assert all(asked.startswith(f"{app}/requests/") for asked in paths[1:])


async def test_a_low_priority_is_told(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path, priority="low") as (upstream, simulator):
        await upstream.submitted(deadline_s=1.0)
        headers = simulator.requests[0].headers
    assert headers["x-fal-queue-priority"] == "low"
    assert headers["x-fal-request-timeout"] == "2"


async def test_a_prompt_that_is_no_unicode_is_the_clients_fault(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        error = await upstream.failure(prompt="\ud800")
        assert (error.kind, error.billed) == (K.INVALID_REQUEST, NO)
        assert not simulator.requests


# --- the life of a job ---


async def test_a_job_is_found_again_by_another_process(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        step = await upstream.submitted()
        account = an_account(base_url=simulator.base_url, secret=KEY)
        async with tools(tmp_path) as given:
            upstream.provider = PROVIDERS["fal"](account, given)
            done = await upstream.finished(step)
        (bought,) = simulator.purchases
    assert done.upstream_request_id == bought.request_id
    close(done)


async def test_a_job_that_waits_is_not_begun(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.busy = True
        job_id = (await upstream.submitted()).job_id
        waits = await upstream.look(job_id)
        assert waits == Pending(job_id, 2.0, progress=0)
        assert not simulator.purchases
        simulator.busy = False
        assert await upstream.look(job_id) == waits
        works = await upstream.look(job_id)
        assert works == Pending(job_id, 1.0)
        close(await upstream.finished(works))
        assert len(simulator.purchases) == 1


async def test_a_job_may_go_back(tmp_path: Path) -> None:
    states = ["IN_PROGRESS", "IN_QUEUE", "COMPLETED", "IN_PROGRESS"]
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer="states", body=states))
        step: Done | Pending = await upstream.submitted()
        seen = []
        while isinstance(step, Pending):
            step = await upstream.look(step.job_id)
            seen.append(type(step).__name__)
        close(step)
        assert seen == ["Pending"] * 4 + ["Done"]
        assert len(simulator.purchases) == 1


@pytest.mark.parametrize("on", ["status", "result"])
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 408, "body": "slow"}, K.TIMEOUT),
        ({"status": 429, "body": {"detail": "slow down"}}, K.RATE_LIMITED),
        ({"status": 500, "body": "oops"}, K.BAD_GATEWAY),
        ({"status": 502, "body": "<html>nginx</html>"}, K.BAD_GATEWAY),
        ({"status": 503, "body": "<html>nginx</html>"}, K.OVERLOADED),
        ({"status": 504, "body": "<html>nginx</html>"}, K.TIMEOUT),
        ({"close": "before_reply"}, K.TIMEOUT),
        ({"close": "reset"}, K.TIMEOUT),
        ({"close": "mid_body"}, K.TIMEOUT),
        ({"answer": "html"}, K.BAD_GATEWAY),
        ({"answer": "big"}, K.BAD_GATEWAY),
        ({"status": 200, "body": {"status": "PAUSED"}}, K.BAD_GATEWAY),
    ],
    ids=str,
)
async def test_a_read_that_fails_can_be_repeated(
    on: str, fault: dict[str, Any], kind: FailureKind, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        # The HTTP engine itself reads once more when a kept connection was lost.
        lost = fault.get("close") in {"before_reply", "reset"}
        simulator.script(*[Fault(on, **fault)] * (2 if lost else 1))
        error = None
        step: Done | Pending = await upstream.submitted()
        while isinstance(step, Pending):
            try:
                step = await upstream.look(step.job_id)
            except ProviderError as caught:
                assert error is None
                error = caught
        close(step)
        assert error is not None
        assert (error.kind, error.billed, error.ended) == (kind, MAYBE, False)
        assert len(simulator.purchases) == 1
        assert upstream.files() == 0


async def test_a_result_that_fal_has_forgotten_is_lost(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("result", status=404, body={"status": "NOT_FOUND"}))
        error = await upstream.failure()
    assert (error.kind, error.billed, error.ended) == (K.RESULT_LOST, YES, True)


SENSITIVE = {"detail": "flagged by moderation as sensitive"}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("status", status=401, body={"detail": "no"}), K.AUTH),
        (Fault("status", status=403, body={"detail": "no"}), K.AUTH),
        (Fault("status", status=402, body={"detail": "no"}), K.INSUFFICIENT_FUNDS),
        (Fault("status", status=400, body={"detail": "bad"}), K.BAD_GATEWAY),
        (Fault("status", status=403, body=SENSITIVE), K.BAD_GATEWAY),
        (Fault("status", status=404, body={"status": "NOT_FOUND"}), K.BAD_GATEWAY),
        (Fault("status", status=410, body={}), K.BAD_GATEWAY),
        (Fault("status", status=422, body={"detail": "bad"}), K.BAD_GATEWAY),
        (Fault("result", status=401, body={"detail": "no"}), K.AUTH),
        (Fault("result", status=403, body=SENSITIVE), K.BAD_GATEWAY),
        (Fault("result", status=405, body={"detail": "no"}), K.BAD_GATEWAY),
    ],
    ids=str,
)
async def test_a_look_that_is_refused_says_nothing_of_the_job(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        step: Done | Pending = await upstream.submitted()
        simulator.script(fault)
        error = await first_failure(upstream, step)
        assert (error.kind, error.billed, error.ended) == (kind, MAYBE, False)
        assert error.client_message is None
        close(await upstream.finished(step))
        assert len(simulator.purchases) == 1


async def first_failure(upstream: Upstream, step: Done | Pending) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await upstream.finished(step)
    return caught.value


async def test_a_secret_in_a_status_is_not_told(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        told = {"status": f"{KEY} is waiting"}
        simulator.script(Fault("status", status=200, body=told))
        error = await upstream.failure()
    assert "is waiting" in error.detail
    assert KEY[:20] not in error.detail


@pytest.mark.parametrize("answer", ["foreign", "no_links"])
async def test_a_link_elsewhere_is_not_followed_and_the_job_not_lost(
    answer: str, tmp_path: Path
) -> None:
    model = "openai/gpt-image-2.5/flare/text-to-image"
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        step = await upstream.submitted(model=model)
        done = await upstream.finished(step)
        close(done)
        asked = [seen.path for seen in simulator.requests[1:]]
        home = f"/openai/gpt-image-2.5/requests/{done.upstream_request_id}"
        assert set(asked) == {f"{home}/status", home}
        await upstream.provider.cancel(upstream.job(), step.job_id)
        assert simulator.requests[-1].path == f"{home}/cancel"
        assert len(simulator.purchases) == 1


async def test_a_job_behind_a_path_is_asked_for_there(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        told = {"request_id": "r-1", "status_url": "https://queue.fal.run/x"}
        return httpx.Response(
            200, json=told if request.method == "POST" else {"status": "IN_QUEUE"}
        )

    async with tools(tmp_path, httpx.MockTransport(answer)) as given:
        account = an_account(base_url="http://proxy.test/fal/")
        provider = PROVIDERS["fal"](account, given)
        step = await provider.start(a_job(model=MODEL))
        assert isinstance(step, Pending)
        await provider.poll(a_job(model=MODEL), step.job_id)
    assert seen == [f"/fal/{MODEL}", f"/fal/{MODEL}/requests/r-1/status"]


async def test_a_submit_that_hangs_is_left_long_before_the_deadline(
    tmp_path: Path,
) -> None:
    async with (
        fal_upstream(tmp_path) as (upstream, simulator),
        tools(tmp_path, read_max_s=0.5) as impatient,
    ):
        simulator.script(Fault(delay_s=2.0))
        provider = PROVIDERS["fal"](upstream.account, impatient)
        with pytest.raises(ProviderError) as caught:
            await provider.start(upstream.job(deadline_s=60.0))
    error = caught.value
    assert (error.kind, error.billed, error.ended) == (K.TIMEOUT, MAYBE, False)


# --- what comes of it ---


def tried(fault: Fault, kind: FailureKind, billed: Billed, bought: int = 0) -> Any:
    name = f"{fault.on or 'submit'} {fault.status or ''} {fault.answer} {fault.close}"
    return pytest.param(fault, kind, billed, bought, id=f"{name} {kind.value}")


LOCKED = "User is locked. Reason: Exhausted balance. Top up at fal.ai/dashboard."
TIMED_OUT = {"X_Fal_Request_Timeout_Type": "user"}


@pytest.mark.parametrize(
    ("fault", "kind", "billed", "bought"),
    [
        # The queue does not take it.
        tried(refused(400, "bad"), K.INVALID_REQUEST, NO),
        tried(refused(401, "Invalid key"), K.AUTH, NO),
        tried(refused(402, "Payment required"), K.INSUFFICIENT_FUNDS, NO),
        tried(refused(403, "Forbidden"), K.AUTH, NO),
        tried(refused(403, LOCKED), K.INSUFFICIENT_FUNDS, NO),
        tried(refused(403, "TOP_UP"), K.INSUFFICIENT_FUNDS, NO),
        tried(refused(403, "User is locked."), K.INSUFFICIENT_FUNDS, NO),
        tried(refused(403, "User is locked. Reason: Admin lock"), K.AUTH, NO),
        tried(refused(404, "Application 'x' not found"), K.UNSUPPORTED, NO),
        tried(refused(408, "slow"), K.TIMEOUT, MAYBE),
        tried(refused(429, "slow down"), K.RATE_LIMITED, NO),
        tried(refused(500, "oops"), K.BAD_GATEWAY, NO),
        tried(refused(502, "oops"), K.BAD_GATEWAY, NO),
        tried(refused(503, "oops"), K.OVERLOADED, NO),
        tried(Fault(status=504, body="<html>nginx</html>"), K.TIMEOUT, MAYBE),
        tried(
            Fault(status=504, body={"detail": "no", "error_type": "request_timeout"}),
            K.TIMEOUT,
            NO,
        ),
        tried(refused(529, "oops"), K.OVERLOADED, NO),
        tried(refused(418, "teapot"), K.BAD_GATEWAY, NO),
        tried(Fault(close="before_reply"), K.TIMEOUT, MAYBE, 1),
        tried(Fault(close="reset"), K.TIMEOUT, MAYBE, 1),
        tried(Fault(close="mid_body"), K.TIMEOUT, MAYBE, 1),
        tried(Fault(answer="html"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault(answer="error"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault(answer="nothing"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault(answer="foreign_id"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault(answer="big"), K.BAD_GATEWAY, MAYBE, 1),
        # The job completes, and is an error.
        tried(broken(400, "bad_request"), K.INVALID_REQUEST, NO),
        tried(broken(499, "client_cancelled"), K.TIMEOUT, MAYBE),
        tried(broken(499, "client_disconnected"), K.TIMEOUT, MAYBE),
        tried(broken(500, "internal_error"), K.BAD_GATEWAY, NO),
        tried(broken(500, "runner_server_error"), K.BAD_GATEWAY, NO),
        tried(broken(502, "runner_incomplete_response"), K.BAD_GATEWAY, NO),
        tried(broken(503, "runner_disconnected"), K.BAD_GATEWAY, NO),
        tried(broken(503, "runner_connection_error"), K.BAD_GATEWAY, NO),
        tried(broken(503, "runner_connection_refused"), K.OVERLOADED, NO),
        tried(broken(503, "runner_connection_timeout"), K.OVERLOADED, NO),
        tried(broken(503, "runner_scheduling_failure"), K.OVERLOADED, NO),
        tried(broken(504, "startup_timeout"), K.OVERLOADED, NO),
        tried(broken(504, "request_timeout"), K.TIMEOUT, NO),
        tried(broken(504, "request_timeout", **TIMED_OUT), K.OVERLOADED, NO),
        tried(broken(500, "never_heard_of"), K.BAD_GATEWAY, NO),
        tried(faulted("content_policy_violation"), K.CONTENT_POLICY, MAYBE),
        tried(faulted("image_too_large"), K.INVALID_REQUEST, MAYBE),
        tried(faulted("file_download_error"), K.INVALID_REQUEST, MAYBE),
        tried(faulted("greater_than"), K.INVALID_REQUEST, MAYBE),
        tried(faulted("one_of"), K.UNSUPPORTED, MAYBE),
        tried(faulted("feature_not_supported"), K.UNSUPPORTED, MAYBE),
        tried(faulted("extra_forbidden"), K.UNSUPPORTED, MAYBE),
        tried(faulted("no_media_generated"), K.NO_OUTPUT, MAYBE),
        tried(faulted("never_heard_of", status=500), K.BAD_GATEWAY, NO),
        tried(faulted("internal_server_error", status=500), K.BAD_GATEWAY, NO),
        tried(faulted("downstream_service_error", status=500), K.BAD_GATEWAY, NO),
        tried(faulted("downstream_service_unavailable", status=500), K.OVERLOADED, NO),
        tried(faulted("generation_timeout", status=504), K.TIMEOUT, NO),
        # It completes, and is no picture.
        tried(Fault("run", answer="empty"), K.NO_OUTPUT, MAYBE, 1),
        tried(Fault("run", answer="null"), K.NO_OUTPUT, MAYBE, 1),
        tried(Fault("run", answer="error"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault("run", answer="bad_base64"), K.BAD_GATEWAY, MAYBE, 1),
        tried(Fault("run", answer="text"), K.RESULT_LOST, YES, 1),
        tried(Fault("run", answer="dead_url"), K.RESULT_LOST, YES, 1),
        tried(Fault("run", answer="foreign_url"), K.RESULT_LOST, YES, 1),
        tried(Fault("run", answer="file_url"), K.RESULT_LOST, YES, 1),
    ],
)
async def test_a_failure_is_what_the_table_says(
    fault: Fault, kind: FailureKind, billed: Billed, bought: int, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        assert error.ended is (fault.on == "run")
        assert sum(purchase.n for purchase in simulator.purchases) == bought
        # Whatever happens, it is handed over once.
        assert [seen.method for seen in simulator.requests].count("POST") == 1
        assert upstream.files() == 0


async def test_a_code_nobody_knows_is_kept_and_is_no_refusal(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(broken(500, "gremlins", "they flagged it"))
        error = await upstream.failure()
    assert (error.kind, error.upstream_code) == (K.BAD_GATEWAY, "gremlins")
    assert "they flagged it" in error.detail


async def test_an_input_that_fal_itself_would_take_again_is_not_wrong(
    tmp_path: Path,
) -> None:
    fault = faulted("never_heard_of")
    again = Fault(
        "run", status=422, body=fault.body, headers={"X-Fal-Retryable": "true"}
    )
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(again)
        error = await upstream.failure()
    assert (error.kind, error.ended) == (K.BAD_GATEWAY, True)


@pytest.mark.parametrize(
    ("headers", "wait_s"), [({"retry_after": "7"}, 7.0), ({}, None)], ids=str
)
async def test_the_wait_that_is_asked_for_is_told(
    headers: dict[str, str], wait_s: float | None, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(refused(429, "slow down", **headers))
        error = await upstream.failure()
    assert (error.kind, error.retry_after_s) == (K.RATE_LIMITED, wait_s)


@pytest.mark.parametrize(
    ("units", "billed"), [("0", NO), ("0.02", YES), ("many", MAYBE)]
)
async def test_units_on_a_failed_job_tell_whether_it_is_charged(
    units: str, billed: Billed, tmp_path: Path
) -> None:
    fault = faulted("content_policy_violation")
    headers = {**fault.headers, "x-fal-billable-units": units}
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", status=422, body=fault.body, headers=headers))
        error = await upstream.failure()
    assert (error.kind, error.billed) == (K.CONTENT_POLICY, billed)


async def test_the_status_tells_why_where_the_result_does_not(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(
            broken(503, "runner_scheduling_failure"),
            Fault("result", status=404, body={"status": "NOT_FOUND"}),
        )
        error = await upstream.failure()
    assert (error.kind, error.billed, error.ended) == (K.OVERLOADED, NO, True)
    assert error.upstream_code == "runner_scheduling_failure"


async def test_an_upload_that_breaks_off_was_certainly_not_bought(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        large = png(64, 32, padding=30_000_000)
        reference = an_input(upstream.spools, large)
        simulator.script(Fault(close="mid_upload"))
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (K.NETWORK, NO)
        assert not simulator.purchases


# --- pictures and their price ---


async def test_a_large_picture_waits_in_a_file(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer="big"))
        done = await upstream.make()
        (made,) = done.images
        assert made.payload.encoding == "raw"
        assert made.payload.size_bytes > BIG_BYTES > MEMORY_MAX_BYTES
        assert upstream.files() == 1
        assert file_of(made) == png(64, 32, padding=BIG_BYTES)
        assert upstream.files() == 0


async def test_a_data_uri_is_a_picture_too(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer="inline"))
        done = await upstream.make()
    (made,) = done.images
    assert made.payload.encoding == "base64"
    assert file_of(made) == png(64, 32)


@pytest.mark.parametrize(
    ("answer", "size_px", "media_type"),
    [("wrong_size", (128, 32), "image/png"), ("wrong_type", (64, 32), "image/webp")],
)
async def test_a_picture_is_told_as_it_is_not_as_fal_says(
    answer: str, size_px: tuple[int, int], media_type: str, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer=answer))
        done = await upstream.make()
    (made,) = done.images
    assert (made.width_px, made.height_px) == size_px
    assert made.media_type == media_type
    close(done)


@pytest.mark.parametrize(
    ("answer", "made", "counted"), [("one_less", 2, True), ("one_more", 3, False)]
)
async def test_no_more_than_asked_for_is_delivered_and_fewer_are(
    answer: str, made: int, counted: bool, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer=answer))
        done = await upstream.make(n=3)
    assert len(done.images) == made
    assert (done.usage is not None) is counted
    close(done)


async def test_the_rest_is_delivered_when_one_is_lost(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer="dead_url"))
        done = await upstream.make(n=3)
        assert len(done.images) == 2
        assert done.usage is None
        close(done)
        assert upstream.files() == 0


async def test_pictures_that_are_there_are_let_go_when_the_rest_is_given_up(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(
            Fault("run", answer="big"), Fault("file"), Fault("file", hang=True)
        )
        call = asyncio.create_task(upstream.make(n=2))
        while simulator.faults:  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
        assert upstream.files() > 0
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert upstream.files() == 0


@pytest.mark.parametrize(
    ("link", "asked"),
    [
        ("https://fal.media/1.png", True),
        ("https://v3b.fal.media/1.png", True),
        ("https://v4.fal.media/1.png", True),
        ("https://eu.pictures.test/1.png", True),
        ("https://upstream.test/1.png", True),
        ("https://notfal.media/1.png", False),
        ("https://fal.media.elsewhere.test/1.png", False),
    ],
)
async def test_pictures_are_only_fetched_from_known_domains(
    link: str, asked: bool, tmp_path: Path
) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/status"):
            return httpx.Response(200, json={"status": "COMPLETED"})
        if "/requests/" in request.url.path:
            return httpx.Response(200, json={"images": [{"url": link}]})
        seen.append(request)
        return httpx.Response(200, content=png(64, 32))

    job_id = '["r", "/a/b/requests/r/status", "/a/b/requests/r", "/c"]'
    async with tools(tmp_path, httpx.MockTransport(answer)) as given:
        account = an_account(options={"download_hosts": ["pictures.test"]})
        provider = PROVIDERS["fal"](account, given)
        if asked:
            done = await provider.poll(a_job(), job_id)
            assert isinstance(done, Done)
            close(done)
        else:
            with pytest.raises(ProviderError) as caught:
                await provider.poll(a_job(), job_id)
            assert (caught.value.kind, caught.value.ended) == (K.RESULT_LOST, True)
    assert bool(seen) is asked
    assert all("authorization" not in request.headers for request in seen)


async def test_units_and_tokens_are_told_as_they_were_counted(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        done = await upstream.make(width_px=1024, height_px=1024, quality="high")
        (bought,) = simulator.purchases
    # 7024 tokens by OpenAI's own table: $0.21 and a little, up to the next cent.
    assert done.usage == Usage(text_input=13, image_output=7024)
    assert (bought.units, done.units_millionths) == ("0.22", 220_000)
    assert done.cost_nanousd is None
    close(done)


@pytest.mark.parametrize(
    ("told", "units_millionths"),
    [
        ("1", 1_000_000),
        ("0.0000005", 1),
        ("2e-3", 2_000),
        ("-1", None),
        ("NaN", None),
        ("1e999999", None),
        ("", None),
        ("a lot", None),
    ],
)
async def test_units_that_cannot_be_true_are_no_units(
    told: str, units_millionths: int | None, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        headers = {"x-fal-billable-units": told}
        simulator.script(Fault("run", headers=headers))
        done = await upstream.make()
    assert done.units_millionths == units_millionths
    close(done)


@pytest.mark.parametrize("answer", ["no_usage", "negative_usage"])
async def test_a_usage_that_cannot_be_true_is_no_usage(
    answer: str, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", answer=answer))
        done = await upstream.make()
    assert done.usage is None
    assert done.units_millionths is not None
    close(done)


async def test_a_usage_can_be_ignored(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path, usage="ignore") as (upstream, _):
        done = await upstream.make()
    assert done.usage is None
    close(done)


# --- cancelling ---


async def test_a_job_that_waited_is_stopped_and_nobody_knows_whether_it_ran(
    tmp_path: Path,
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.busy = True
        job_id = (await upstream.submitted()).job_id
        await upstream.look(job_id)
        # A runner is free just now, for all that we know.
        stopped = await upstream.provider.cancel(upstream.job(), job_id)
        assert stopped == Cancelled(MAYBE)
        assert not simulator.purchases
        assert await upstream.provider.cancel(upstream.job(), job_id) is None


@pytest.mark.parametrize(("units", "billed"), [("0", NO), ("0.02", YES)])
async def test_units_on_a_cancel_tell_whether_it_is_charged(
    units: str, billed: Billed, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        job_id = (await upstream.submitted()).job_id
        headers = {"x-fal-billable-units": units}
        simulator.script(Fault("cancel", status=202, body={}, headers=headers))
        stopped = await upstream.provider.cancel(upstream.job(), job_id)
        assert stopped == Cancelled(billed)


async def test_a_job_that_runs_may_be_charged_though_cancelled(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault("run", hang=True))
        job_id = (await upstream.submitted()).job_id
        stopped = await upstream.provider.cancel(upstream.job(), job_id)
        assert stopped == Cancelled(MAYBE)
        with pytest.raises(ProviderError) as caught:
            await upstream.look(job_id)
        error = caught.value
        assert (error.kind, error.billed, error.ended) == (K.TIMEOUT, MAYBE, True)
        assert len(simulator.purchases) == 1


async def test_a_job_that_has_ended_is_not_cancelled(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, _):
        job_id = (await upstream.submitted()).job_id
        await upstream.look(job_id)
        assert await upstream.provider.cancel(upstream.job(), job_id) is None
        close(await upstream.finished(Pending(job_id)))


@pytest.mark.parametrize("status", [400, 404])
async def test_a_cancel_may_come_too_late(status: int, tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        job_id = (await upstream.submitted()).job_id
        simulator.script(Fault("cancel", status=status, body={"status": "X"}))
        assert await upstream.provider.cancel(upstream.job(), job_id) is None


async def test_a_cancel_that_fails_leaves_the_bill_open(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        job_id = (await upstream.submitted()).job_id
        simulator.script(Fault("cancel", status=503, body="<html>nginx</html>"))
        with pytest.raises(ProviderError) as caught:
            await upstream.provider.cancel(upstream.job(), job_id)
    assert (caught.value.kind, caught.value.billed) == (K.OVERLOADED, MAYBE)


# --- nothing leaves for another host ---


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "job-1",
        "{}",
        '["id", "/s", "/r"]',
        '["id", "http://elsewhere.test/s", "/r", "/c"]',
        '["id", "@elsewhere.test/s", "/r", "/c"]',
        '["id", "/s\\r\\nx: y", "/r", "/c"]',
    ],
)
async def test_only_paths_at_the_keys_own_host_are_ever_asked(
    job_id: str, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        for ask in (upstream.provider.poll, upstream.provider.cancel):
            with pytest.raises(ProviderError) as caught:
                await ask(upstream.job(), job_id)
            error = caught.value
            # The job is out, wherever it is.
            assert (error.kind, error.billed) == (K.UNSUPPORTED, MAYBE)
        assert not simulator.requests


async def test_a_picture_where_none_belongs_is_let_go(tmp_path: Path) -> None:
    stray = {"url": data_uri("image/png", png(64, 32, padding=1_000_000))}
    async with fal_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(status=200, body=stray))
        assert (await upstream.failure()).kind is K.BAD_GATEWAY
        simulator.script(Fault("status", status=200, body=stray))
        assert (await upstream.failure()).kind is K.BAD_GATEWAY
        assert upstream.files() == 0


async def test_nothing_is_streamed(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        with pytest.raises(ProviderError) as caught:
            upstream.provider.stream(upstream.job())
        assert caught.value.kind is K.UNSUPPORTED
        assert not simulator.requests


# --- what can be done, and how that is said ---


@pytest.mark.parametrize(
    ("model", "options", "capable"),
    [
        (
            "openai/gpt-image-2.5/flare/text-to-image",
            {"background": True, "references_max": 4},
            Capabilities(
                frozenset(Operation),
                n_max=4,
                mask=True,
                references_max=4,
                cancel=True,
            ),
        ),
        (
            "fal-ai/gpt-image-1-mini",
            {"mask": False},
            Capabilities(
                frozenset(Operation),
                n_max=4,
                sizes=frozenset({(1024, 1024), (1536, 1024), (1024, 1536)}),
                qualities=frozenset({"low", "medium", "high"}),
                references_max=16,
                cancel=True,
            ),
        ),
        (
            MODEL,
            {
                "edits": False,
                "n_max": 1,
                "sizes": ["1024x1024"],
                "qualities": ["low"],
            },
            Capabilities(
                n_max=1,
                sizes=frozenset({(1024, 1024)}),
                qualities=frozenset({"low"}),
                backgrounds=frozenset({"opaque"}),
                cancel=True,
            ),
        ),
    ],
)
async def test_it_is_said_what_a_model_can_do(
    model: str, options: dict[str, object], capable: Capabilities, tmp_path: Path
) -> None:
    async with fal_upstream(tmp_path, **options) as (upstream, simulator):
        assert upstream.provider.capabilities(model) == capable
        one = an_input(upstream.spools, png(64, 32))
        error = await upstream.failure(
            model=model, operation=EDIT, references=(one,) * 5, mask=one
        )
        if capable.references_max < 16 or not capable.mask:
            assert error.kind is K.UNSUPPORTED
            assert not simulator.requests


# --- the simulator refuses what fal refuses ---


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"prompt": ""}, "string_too_short"),
        ({"prompt": "x" * 32_001}, "string_too_long"),
        ({"num_images": 0}, "greater_than_equal"),
        ({"num_images": 5}, "less_than_equal"),
        ({"quality": "best"}, "literal_error"),
        ({"image_size": "auto"}, "literal_error"),
        ({"image_size": {"width": 64}}, "literal_error"),
        ({"output_format": "gif"}, "literal_error"),
        ({"background": "opaque"}, "extra_forbidden"),
        ({"image_urls": []}, "extra_forbidden"),
        ({"prompt": "[moderate] x"}, "content_policy_violation"),
    ],
    ids=str,
)
async def test_the_simulator_rejects_a_wrong_input_in_the_result_alone(
    changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    async with (
        fal_upstream(tmp_path) as (_, simulator),
        httpx.AsyncClient(
            base_url=simulator.base_url,
            headers={"Authorization": f"Key {KEY}"},
            trust_env=False,
        ) as client,
    ):
        accepted = await client.post(f"/{MODEL}", json={"prompt": "x", **changes})
        assert accepted.status_code == 200
        links = accepted.json()
        early = await client.get(links["response_url"])
        assert early.status_code == 400
        states = [await client.get(links["status_url"]) for _ in range(2)]
        assert [state.status_code for state in states] == [202, 200]
        assert "error" not in states[1].json()
        result = await client.get(links["response_url"])
        assert result.status_code == 422
        assert result.json()["detail"][0]["type"] == kind
        assert not simulator.purchases


async def test_the_simulator_counts_units_on_the_result_alone(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (_, simulator):
        url = f"{simulator.base_url}/{MODEL}"
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.post(url, json={"prompt": "x"})).status_code == 401
            client.headers["Authorization"] = f"Key {KEY}"
            submit = await client.post(url, json={"prompt": "x"})
            links = submit.json()
            assert links["status_url"].endswith("/status")
            looks = [await client.get(links["status_url"]) for _ in range(2)]
            result = await client.get(links["response_url"])
            headers = [set(reply.headers) for reply in (submit, *looks)]
        assert not any("x-fal-billable-units" in names for names in headers)
        assert result.headers["x-fal-billable-units"] == simulator.purchases[0].units
        # fal's own choices: the dearest quality, 1024 x 768.
        assert simulator.purchases[0].quality == "high"
        assert simulator.purchases[0].size == "1024x768"
