"""What is peculiar to task_api: keys, uploads, tasks that fail, and look-alikes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

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
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.task_upstream import task_error, task_upstream
from tests.contract.upstreams import K, Upstream, an_input, close, file_of, tools
from tests.simulators.pictures import png
from tests.simulators.server import Fault
from tests.simulators.task_server import (
    KEY,
    ApimartSimulator,
    NewApiSimulator,
    TaskSimulator,
)

EDIT = Operation.EDIT
NO, MAYBE, YES = Billed.NO, Billed.MAYBE, Billed.YES
MASK = png(64, 32, clear=True)


async def submitted(upstream: Upstream, **changes: Any) -> str:
    return (await upstream.submitted(**changes)).job_id


# --- what is sent ---


async def test_a_plain_job_says_what_is_known_and_nothing_else(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        await submitted(upstream, moderation="low", user="u", output_compression=5)
    (request,) = simulator.requests
    assert (request.method, request.path) == ("POST", "/v1/images/generations")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["idempotency-key"] == "imageway.task-unified-1-abcdefgh.1"
    assert request.json() == {
        "model": "gpt-image-2",
        "prompt": a_job().prompt,
        "size": "1024x1024",
        "quality": "low",
        "n": 1,
    }


async def test_what_is_not_usual_is_said(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        await submitted(
            upstream,
            width_px=None,
            height_px=None,
            background="transparent",
            output_format="webp",
        )
    body = simulator.requests[0].json()
    assert (body["size"], body["background"]) == ("auto", "transparent")
    assert body["output_format"] == "webp"


async def test_an_edit_uploads_its_files_first_and_names_their_urls(
    tmp_path: Path,
) -> None:
    files = [png(64, 32, padding=4_000_000), png(64, 32, padding=1)]
    async with task_upstream(tmp_path) as (upstream, simulator):
        inputs = [an_input(upstream.spools, file) for file in files]
        mask = an_input(upstream.spools, MASK)
        edit: dict[str, Any] = {"operation": EDIT, "references": tuple(inputs)}
        close(await upstream.make(mask=mask, **edit))
        for one in (*inputs, mask):
            one.payload.close()
    *uploads, request, _ = simulator.requests
    assert [upload.path for upload in uploads] == ["/api/v1/files/upload/stream"] * 3
    for upload in uploads:
        assert upload.headers["authorization"] == f"Bearer {KEY}"
        assert [part.name for part in upload.form] == ["file"]
    body, urls = request.json(), list(simulator.files)
    assert body["image_urls"] == urls[:2]
    assert body["mask_url"] == urls[2]
    (bought,) = simulator.purchases
    assert bought.references == tuple(hashlib.sha256(f).hexdigest() for f in files)
    assert bought.mask == hashlib.sha256(MASK).hexdigest()


async def test_smaller_models_are_told_only_what_they_know(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        beta = upstream.provider.capabilities("gpt-image-2-beta")
        assert (1360, 768) in beta.sizes
        assert (1024, 1536) not in beta.sizes
        wide: dict[str, Any] = {"width_px": 1360, "height_px": 768}
        close(await upstream.make(model="gpt-image-2-beta", **wide))
        error = await upstream.failure(model="gpt-image-2-beta", width_px=1040)
        assert error.kind is K.UNSUPPORTED
        older = upstream.provider.capabilities("gpt-image-1.5")
        assert older == Capabilities(
            operations=frozenset(Operation),
            n_max=1,
            sizes=frozenset({(1024, 1024), (1024, 1536), (1536, 1024)}),
            output_formats=frozenset({"png"}),
            backgrounds=frozenset({"opaque"}),
            references_max=16,
            idempotent=frozenset({Operation.GENERATE}),
        )
        auto: dict[str, Any] = {"width_px": None, "height_px": None}
        close(await upstream.make(model="gpt-image-1.5", seq=2, **auto))
    bodies = [seen.json() for seen in simulator.requests if seen.method == "POST"]
    assert "size" not in bodies[1]
    body = bodies[0]
    assert body["size"] == "16:9"
    assert "quality" not in body


async def test_a_text_that_is_no_unicode_is_the_clients_fault(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        assert (await upstream.failure(prompt="\ud800")).kind is K.INVALID_REQUEST
        assert not simulator.requests


# --- a lost reply ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(close="before_reply"),
        Fault(close="reset"),
        Fault(close="mid_body"),
        Fault(answer="html"),
        Fault(answer="huge"),
        Fault(status=504, body="<html></html>"),
    ],
    ids=lambda fault: f"{fault.close}{fault.answer}{fault.status}",
)
async def test_a_lost_reply_is_asked_for_again_with_the_same_key(
    fault: Fault, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault)
        close(await upstream.make())
    first, again, _ = simulator.requests
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
    assert first.body == again.body
    (bought,) = simulator.purchases
    assert bought.idempotency_key == first.headers["idempotency-key"]


@pytest.mark.parametrize(
    ("second", "kind", "billed"),
    [
        ([Fault(close="reset")], K.TIMEOUT, MAYBE),
        (task_error(429, "rate_limit_exceeded"), K.TIMEOUT, MAYBE),
        (task_error(503, "no_available_channel"), K.TIMEOUT, MAYBE),
        (task_error(402, "insufficient_quota"), K.TIMEOUT, MAYBE),
        (task_error(409, "paid_outcome_unknown"), K.TIMEOUT, MAYBE),
        (task_error(400, "content_policy_violation"), K.CONTENT_POLICY, NO),
        (task_error(400, "invalid_request"), K.INVALID_REQUEST, NO),
    ],
    ids=["lost", "fast", "full", "broke", "unknown", "policy", "invalid"],
)
async def test_a_reply_that_is_lost_twice_leaves_the_outcome_open(
    second: list[Fault], kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(close="before_reply"), *second)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        assert len(simulator.requests) == 2


async def test_each_call_has_a_key_of_its_own(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        for seq in (1, 2):
            await submitted(upstream, seq=seq)
    keys = {bought.idempotency_key for bought in simulator.purchases}
    assert len(keys) == 2


async def test_a_refusal_is_not_repeated(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(*task_error(500, "internal_error"))
        await upstream.failure()
        assert len(simulator.requests) == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("status", "code", "kind", "billed"),
    [
        (400, "invalid_request", K.INVALID_REQUEST, NO),
        (400, "invalid_parameter", K.INVALID_REQUEST, NO),
        (400, "no_available_channel", K.OVERLOADED, NO),
        (400, "content_policy_violation", K.CONTENT_POLICY, NO),
        (400, "sensitive_content", K.CONTENT_POLICY, NO),
        (401, "unauthorized", K.AUTH, NO),
        (401, "key_expired", K.AUTH, NO),
        (402, "insufficient_quota", K.INSUFFICIENT_FUNDS, NO),
        (402, "quota_exceeded", K.INSUFFICIENT_FUNDS, NO),
        (403, "insufficient_token_quota", K.INSUFFICIENT_FUNDS, NO),
        (403, "token_daily_quota_exceeded", K.INSUFFICIENT_FUNDS, NO),
        (403, "key_disabled", K.AUTH, NO),
        (403, "key_model_not_allowed", K.UNSUPPORTED, NO),
        (403, "model_access_denied", K.UNSUPPORTED, NO),
        (403, "never_seen", K.AUTH, NO),
        (404, "model_not_found", K.UNSUPPORTED, NO),
        (408, "never_seen", K.TIMEOUT, MAYBE),
        (409, "idempotency_conflict", K.TIMEOUT, MAYBE),
        (409, "paid_outcome_unknown", K.TIMEOUT, MAYBE),
        (413, "too_large", K.INVALID_REQUEST, NO),
        (429, "rate_limit_exceeded", K.RATE_LIMITED, NO),
        (500, "internal_error", K.BAD_GATEWAY, NO),
        (502, "upstream_error", K.BAD_GATEWAY, NO),
        (503, "model_unavailable", K.OVERLOADED, NO),
        (503, "channel_selection_failed", K.OVERLOADED, NO),
        (504, "never_seen", K.TIMEOUT, MAYBE),
        (529, "never_seen", K.OVERLOADED, NO),
        (418, "never_seen", K.BAD_GATEWAY, NO),
    ],
)
async def test_a_refused_submission_is_classified_by_its_code(
    status: int, code: str, kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(*task_error(status, code, f"told {KEY}") * 2)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        assert (error.status, error.upstream_code) == (status, code)
        assert KEY not in f"{error} {error.client_message}"
        assert not simulator.purchases


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [({}, None), ({"Retry-After": "7"}, 7.0), ({"Retry-After": "9999"}, 300.0)],
)
async def test_the_wait_that_is_asked_for_is_told(
    headers: dict[str, str], wait_s: float | None, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(status=429, body={}, headers=headers))
        error = await upstream.failure()
        assert (error.kind, error.retry_after_s) == (K.RATE_LIMITED, wait_s)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(answer="error"), K.BAD_GATEWAY),
        (Fault(answer="no_id"), K.BAD_GATEWAY),
        (Fault(answer="html"), K.BAD_GATEWAY),
        (Fault(answer="huge"), K.BAD_GATEWAY),
    ],
    ids=lambda value: getattr(value, "answer", ""),
)
async def test_a_success_without_a_task_was_maybe_bought(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(fault, fault)
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, MAYBE)
        assert len(simulator.purchases) == 1


# --- an upload that fails ---


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("upload", status=400, body={"success": False}), K.UNSUPPORTED),
        (Fault("upload", status=200, body={"code": 400}), K.UNSUPPORTED),
        (Fault("upload", status=401, body={"msg": KEY}), K.AUTH),
        (Fault("upload", status=403, body={"msg": "no"}), K.AUTH),
        (Fault("upload", status=413, body="<html></html>"), K.UNSUPPORTED),
        (Fault("upload", status=415, body={"msg": "no"}), K.UNSUPPORTED),
        (Fault("upload", status=451, body={"msg": "no"}), K.CONTENT_POLICY),
        (Fault("upload", status=429, body={"msg": "quota"}), K.RATE_LIMITED),
        (Fault("upload", status=500, body={"msg": "oops"}), K.BAD_GATEWAY),
        (Fault("upload", status=503, body={"msg": "oops"}), K.OVERLOADED),
        (Fault("upload", status=504, body="<html></html>"), K.NETWORK),
        (Fault("upload", status=200, body={"data": {}}), K.BAD_GATEWAY),
        (Fault("upload", answer="html"), K.BAD_GATEWAY),
        (Fault("upload", close="before_reply"), K.NETWORK),
        (Fault("upload", close="mid_body"), K.NETWORK),
        (Fault(close="mid_upload"), K.NETWORK),
    ],
    ids=lambda value: (
        f"{value.status}{value.answer}{value.close}" if isinstance(value, Fault) else ""
    ),
)
async def test_an_upload_that_fails_has_bought_nothing(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32, padding=4_000_000))
        simulator.script(fault)
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (kind, NO)
        assert bool(error.client_message) is (kind is K.CONTENT_POLICY)
        assert KEY not in str(error)
        assert not simulator.purchases
        assert all("/images/" not in seen.path for seen in simulator.requests)
        reference.payload.close()
        assert upstream.files() == 0


# --- a look that fails ---


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("poll", status=400, body={}), K.BAD_GATEWAY),
        (Fault("poll", status=401, body={}), K.AUTH),
        (Fault("poll", status=402, body={}), K.INSUFFICIENT_FUNDS),
        (Fault("poll", status=404, body={}), K.BAD_GATEWAY),
        (Fault("poll", status=408, body={}), K.TIMEOUT),
        (Fault("poll", status=429, body={}), K.RATE_LIMITED),
        (Fault("poll", status=500, body={}), K.BAD_GATEWAY),
        (Fault("poll", status=502, body="<html></html>"), K.BAD_GATEWAY),
        (Fault("poll", status=503, body={}), K.OVERLOADED),
        (Fault("poll", status=504, body={}), K.TIMEOUT),
        (Fault("poll", close="mid_body"), K.TIMEOUT),
        (Fault("poll", answer="html"), K.BAD_GATEWAY),
        (Fault("poll", answer="error"), K.BAD_GATEWAY),
        (Fault("poll", answer="huge"), K.BAD_GATEWAY),
        (Fault("poll", answer="state", body="paused"), K.BAD_GATEWAY),
    ],
    ids=lambda value: (
        f"{value.status}{value.answer}{value.close}" if isinstance(value, Fault) else ""
    ),
)
async def test_a_look_that_fails_says_nothing_of_the_task(
    fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        job_id = await submitted(upstream)
        simulator.script(fault)
        error = await upstream.failed_look(job_id)
        assert (error.kind, error.billed) == (kind, MAYBE)
        assert not error.ended
        assert error.client_message is None
        done = await upstream.look(job_id)
        assert isinstance(done, Done)
        close(done)
        assert len(simulator.purchases) == 1


async def test_a_look_whose_connection_breaks_is_a_failed_read(
    tmp_path: Path,
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        job_id = await submitted(upstream)
        # A kept connection that breaks is opened again below: only reads are.
        simulator.script(*[Fault("poll", close="reset")] * 2)
        error = await upstream.failed_look(job_id)
        assert (error.kind, error.billed, error.ended) == (K.TIMEOUT, MAYBE, False)
        assert len(simulator.purchases) == 1


async def test_states_may_go_backwards_and_have_other_words(tmp_path: Path) -> None:
    words = ["processing", "pending", "QUEUED", "In_Progress", "submitted"]
    async with task_upstream(tmp_path, poll_after_ms=1500) as (upstream, simulator):
        job_id = await submitted(upstream)
        for word in words:
            simulator.script(Fault("poll", answer="state", body=word))
            assert await upstream.look(job_id) == Pending(job_id, 1.5, 50)
        done = await upstream.look(job_id)
        assert isinstance(done, Done)
        close(done)


async def test_a_task_is_found_again_by_another_adapter(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        job_id = await submitted(upstream)
        async with tools(tmp_path) as given:
            account = an_account(base_url=simulator.base_url, secret=KEY)
            other = PROVIDERS["task_api"](account, given)
            done = await other.poll(upstream.job(), job_id)
            assert isinstance(done, Done)
            close(done)
        assert len(simulator.purchases) == 1


@pytest.mark.parametrize("job_id", ["", "../credits", "a/b", "a?b", "a b", "x" * 129])
async def test_an_id_that_is_none_is_never_asked_for(
    job_id: str, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        error = await upstream.failed_look(job_id)
        assert (error.kind, error.billed) == (K.UNSUPPORTED, MAYBE)
        assert not simulator.requests


# --- a task that fails ---


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("content_policy_violation", K.CONTENT_POLICY),
        ("invalid_parameters", K.INVALID_REQUEST),
        ("image_processing_error", K.INVALID_REQUEST),
        ("image_dimension_mismatch", K.INVALID_REQUEST),
        ("request_cancelled", K.BAD_GATEWAY),
        ("generation_failed_no_content", K.NO_OUTPUT),
        ("service_error", K.BAD_GATEWAY),
        ("generation_timeout", K.TIMEOUT),
        ("resource_exhausted", K.OVERLOADED),
        ("quota_exceeded", K.RATE_LIMITED),
        ("service_unavailable", K.OVERLOADED),
        ("resource_not_found", K.BAD_GATEWAY),
        ("unknown_error", K.BAD_GATEWAY),
        ("never_seen_before", K.BAD_GATEWAY),
    ],
)
async def test_a_failed_task_is_over_and_costs_nothing(
    code: str, kind: FailureKind, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        told = {"code": code, "message": f"so it is, {KEY}", "type": "task_error"}
        simulator.script(Fault(answer="failed", body={"error": told}))
        error = await upstream.failure()
        assert (error.kind, error.billed, error.ended) == (kind, NO, True)
        assert error.upstream_code == code
        assert KEY not in f"{error} {error.client_message}"
        assert bool(error.client_message) is (
            kind in {K.CONTENT_POLICY, K.INVALID_REQUEST}
        )
        assert upstream.purchases() == 0


@pytest.mark.parametrize(
    ("state", "billing", "billed"),
    [
        ("failed", {"charge_status": "reserved"}, NO),
        ("failed", {"charge_status": "released"}, NO),
        ("failed", {"charge_status": "charged"}, YES),
        ("failed", {"charge_status": "charged", "refund_status": "pending"}, YES),
        ("failed", {"charge_status": "charged", "refund_status": "completed"}, NO),
        ("failed", {"charge_status": "unknown"}, MAYBE),
        ("failed", {}, NO),
        ("cancelled", {}, MAYBE),
        ("cancelled", {"charge_status": "released"}, NO),
    ],
)
async def test_the_ledger_tells_what_a_failed_task_costs(
    state: str, billing: dict[str, str], billed: Billed, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=state, body={"billing": billing}))
        error = await upstream.failure()
        assert (error.kind, error.billed) == (K.BAD_GATEWAY, billed)
        assert error.ended


# --- pictures and what they cost ---


@pytest.mark.parametrize(
    ("answer", "kind", "billed"),
    [
        ("empty", K.NO_OUTPUT, MAYBE),
        ("dead_url", K.RESULT_LOST, YES),
        ("expired", K.RESULT_LOST, YES),
        ("foreign_url", K.RESULT_LOST, YES),
        ("text", K.RESULT_LOST, YES),
    ],
)
async def test_a_completed_task_without_a_usable_picture(
    answer: str, kind: FailureKind, billed: Billed, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer=answer))
        error = await upstream.failure()
        assert (error.kind, error.billed) == (kind, billed)
        assert upstream.purchases() == 1
        assert upstream.files() == 0


@pytest.mark.parametrize(
    ("link", "asked"),
    [
        ("https://media.evolink.ai/1.png", True),
        ("https://Files.EvoLink.ai/1.png", True),
        ("https://upstream.test/1.png", True),
        ("https://pictures.test/1.png", True),
        ("https://notevolink.ai/1.png", False),
        ("https://eu.pictures.test/1.png", True),
        ("https://evolink.ai.elsewhere.test/1.png", False),
        ("https://169.254.169.254/1.png", False),
        ("https://media.evolink.ai@pictures.test/1.png", False),
        ("https://[media/1.png", False),
        ("ftp://media.evolink.ai/1.png", False),
        ("media.evolink.ai/1.png", False),
    ],
)
async def test_pictures_are_only_fetched_from_known_hosts(
    link: str, asked: bool, tmp_path: Path
) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/v1/tasks/"):
            return httpx.Response(200, json={"status": "completed", "results": [link]})
        seen.append(request)
        return httpx.Response(200, content=png(64, 32))

    async with tools(tmp_path, httpx.MockTransport(answer)) as given:
        account = an_account(options={"download_hosts": ["pictures.test"]})
        provider = PROVIDERS["task_api"](account, given)
        if asked:
            done = await provider.poll(a_job(), "task-unified-1-abcdefgh")
            assert isinstance(done, Done)
            close(done)
        else:
            with pytest.raises(ProviderError) as caught:
                await provider.poll(a_job(), "task-unified-1-abcdefgh")
            assert caught.value.kind is K.RESULT_LOST
    assert bool(seen) is asked
    assert all("authorization" not in request.headers for request in seen)


async def test_a_picture_is_what_it_is_not_what_was_asked_for(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="other_picture"))
        done = await upstream.make()
    (made,) = done.images
    assert (made.width_px, made.height_px) == (64, 32)
    assert made.media_type == "image/webp"
    close(done)


async def test_a_large_picture_waits_in_a_file(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.script(Fault(answer="big"))
        done = await upstream.make()
        (made,) = done.images
        assert made.payload.size_bytes > 9_000_000
        assert upstream.files() == 1
        assert len(file_of(made)) > 9_000_000
        assert upstream.files() == 0


async def test_fewer_pictures_than_asked_for_are_still_delivered(
    tmp_path: Path,
) -> None:
    async with task_upstream(tmp_path, n_max=4) as (upstream, simulator):
        assert upstream.provider.capabilities("gpt-image-2").n_max == 4
        simulator.script(Fault(answer="one_less"))
        done = await upstream.make(n=3)
    assert len(done.images) == 2
    close(done)


async def test_the_cost_is_what_the_ledger_says_to_the_last_unit(
    tmp_path: Path,
) -> None:
    # 196 tokens at 18,360 and 13 at 3,060 uc per thousand, each rounded up: 3,639 uc.
    async with task_upstream(tmp_path) as (upstream, simulator):
        done = await upstream.make()
        (bought,) = simulator.purchases
    assert bought.credits == "0.3639"
    # Its credits are no units: another account's prices would be put on them.
    assert done.units_millionths is None
    # 0.3639 / 68 USD, rounded up; the price in USD that is told is 0.0054.
    assert done.cost_nanousd == 5_351_471
    assert done.usage is None
    close(done)


@pytest.mark.parametrize(
    ("told", "cost_nanousd"),
    [
        ({"billing": {}}, 5_351_471),
        ({"billing": {}, "usage": {"cost": {"usd": 0.0054}}}, 5_400_000),
        ({"billing": {}, "usage": {"cost": {"usd": 1e-7}}}, 100),
        ({"billing": {}, "usage": {}}, None),
        ({"billing": None, "usage": None}, None),
        ({"billing": {}, "usage": {"credits_used": -1}}, None),
        ({"billing": {}, "usage": {"credits_used": 0}}, None),
        ({"billing": {}, "usage": {"credits_used": "1"}}, None),
        ({"billing": {}, "usage": {"credits_used": True}}, None),
        ({"billing": {}, "usage": {"credits_used": 1e30}}, None),
    ],
)
async def test_a_cost_that_cannot_be_true_is_none(
    told: dict[str, Any],
    cost_nanousd: int | None,
    tmp_path: Path,
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        job_id = await submitted(upstream)
        simulator.tasks[job_id].more = told
        done = await upstream.look(job_id)
        assert isinstance(done, Done)
    assert done.cost_nanousd == cost_nanousd
    close(done)


# --- look-alikes ---


async def test_apimart_is_read_in_its_own_words(tmp_path: Path) -> None:
    async with task_upstream(tmp_path, ApimartSimulator, dialect="apimart") as (
        upstream,
        simulator,
    ):
        simulator.latency_s = 0.01
        done = await upstream.make()
        (bought,) = simulator.purchases
    submit, *looks = simulator.requests
    assert "idempotency-key" not in submit.headers
    assert looks[0].path == f"/v1/tasks/{bought.task_id}?language=en"
    assert done.cost_nanousd == 5_350_000
    close(done)


async def test_apimart_takes_references_as_data_uris(tmp_path: Path) -> None:
    files = [png(64, 32, padding=1_000_000), png(64, 32)]
    async with task_upstream(tmp_path, ApimartSimulator, dialect="apimart") as (
        upstream,
        simulator,
    ):
        inputs = (
            an_input(upstream.spools, files[0]),
            an_input(upstream.spools, files[1], encoding="base64"),
        )
        done = await upstream.make(operation=EDIT, references=inputs, prompt='"é"')
        for one in inputs:
            one.payload.close()
        (bought,) = simulator.purchases
    assert bought.references == tuple(hashlib.sha256(f).hexdigest() for f in files)
    assert simulator.requests[0].json()["prompt"] == '"é"'
    close(done)


@pytest.mark.parametrize("kind", [ApimartSimulator, NewApiSimulator])
async def test_a_lost_reply_is_not_repeated_where_no_key_is_honoured(
    kind: type[TaskSimulator], tmp_path: Path
) -> None:
    dialect = {ApimartSimulator: "apimart", NewApiSimulator: "new-api"}[kind]
    async with task_upstream(tmp_path, kind, dialect=dialect) as (upstream, simulator):
        simulator.script(Fault(close="before_reply"))
        error = await upstream.failure()
        assert (error.kind, error.billed) == (K.TIMEOUT, MAYBE)
        assert len(simulator.requests) == len(simulator.purchases) == 1


async def test_an_apimart_task_that_fails_is_refunded(tmp_path: Path) -> None:
    async with task_upstream(tmp_path, ApimartSimulator, dialect="apimart") as (
        upstream,
        simulator,
    ):
        told = {"code": 400, "message": "Blocked by the safety system", "type": "x"}
        simulator.script(Fault(answer="failed", body={"error": told}))
        error = await upstream.failure()
        assert (error.kind, error.billed, error.ended) == (K.CONTENT_POLICY, NO, True)
        assert upstream.purchases() == 0


@pytest.mark.parametrize("inline", [False, True])
async def test_new_api_is_read_in_its_own_words(inline: bool, tmp_path: Path) -> None:
    async with task_upstream(tmp_path, NewApiSimulator, dialect="new-api") as (
        upstream,
        simulator,
    ):
        assert isinstance(simulator, NewApiSimulator)
        simulator.inline = inline
        simulator.latency_s = 0.01
        done = await upstream.make(n=2)
        (bought,) = simulator.purchases
    submit, *looks = simulator.requests
    assert submit.path == "/v1/images/generations?async=true"
    # The poll_url that it gives is on another host, and is not used.
    assert looks[0].path == f"/v1/images/tasks/{bought.task_id}"
    assert done.usage == Usage(text_input=26, image_output=392)
    assert len(done.images) == 2
    close(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"fail_reason": "flagged by moderation"}, K.CONTENT_POLICY),
        ({"fail_reason": "insufficient balance"}, K.INSUFFICIENT_FUNDS),
        ({"fail_reason": "oops"}, K.BAD_GATEWAY),
        (
            {"http_status": 429, "error": {"type": "rate_limit_error", "message": "x"}},
            K.RATE_LIMITED,
        ),
    ],
)
async def test_a_new_api_task_that_fails_says_why_in_words(
    told: dict[str, Any], kind: FailureKind, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path, NewApiSimulator, dialect="new-api") as (
        upstream,
        simulator,
    ):
        simulator.script(Fault(answer="failed", body=told))
        error = await upstream.failure()
        assert (error.kind, error.billed, error.ended) == (kind, NO, True)


# What the forks answer, by their documents: the first to a submission, then a task.
FORKS: list[tuple[dict[str, object], dict[str, object]]] = [
    (
        {"id": "imgtask_0123", "task_id": "imgtask_0123", "status": "processing"},
        {"status": "completed", "result": {"data": [{"url": "{link}"}]}},
    ),
    ({"task_id": "imgtask_0123"}, {"status": "completed", "result_url": "{link}"}),
    (
        {"code": "success", "data": "imgtask_0123"},
        {"data": {"status": "SUCCESS", "data": {"data": [{"url": "{link}"}]}}},
    ),
]


@pytest.mark.parametrize(("submission", "task"), FORKS)
async def test_forks_of_new_api_are_understood(
    submission: dict[str, object], task: dict[str, object], tmp_path: Path
) -> None:
    async with task_upstream(tmp_path, NewApiSimulator, dialect="new-api") as (
        upstream,
        simulator,
    ):
        job_id = await submitted(upstream)
        link = f"{simulator.origin}/results/{job_id}/0.png"
        told = json.loads(json.dumps(task).replace("{link}", link))
        simulator.script(Fault(status=202, body=submission))
        assert await submitted(upstream) == "imgtask_0123"
        simulator.script(Fault("poll", status=200, body=told))
        done = await upstream.look("imgtask_0123")
        assert isinstance(done, Done)
        close(done)


# --- options ---


async def test_paths_are_options(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "dialect": "new-api",
        "submit_path": "/images/generations/async",
        "task_path": "/image-tasks/{id}/state",
    }
    async with task_upstream(tmp_path, NewApiSimulator, **options) as (
        upstream,
        simulator,
    ):
        assert (await upstream.failure()).kind is K.UNSUPPORTED
        await upstream.failed_look("task-1")
    assert [seen.path for seen in simulator.requests] == [
        "/v1/images/generations/async",
        "/v1/image-tasks/task-1/state",
    ]


@pytest.mark.parametrize(
    ("options", "capable"),
    [
        (
            {"dialect": "apimart"},
            Capabilities(
                operations=frozenset(Operation),
                n_max=1,
                output_formats=frozenset({"png"}),
                backgrounds=frozenset({"opaque"}),
                references_max=16,
            ),
        ),
        ({"dialect": "new-api"}, Capabilities(n_max=1)),
        (
            {
                "dialect": "new-api",
                "references": "data_uri",
                "references_max": 4,
                "mask": True,
                "n_max": 10,
                "sizes": ["1024x1024"],
                "qualities": ["low"],
                "output_formats": ["webp"],
                "backgrounds": ["opaque"],
            },
            Capabilities(
                operations=frozenset(Operation),
                n_max=10,
                sizes=frozenset({(1024, 1024)}),
                qualities=frozenset({"low"}),
                output_formats=frozenset({"webp"}),
                backgrounds=frozenset({"opaque"}),
                mask=True,
                references_max=4,
            ),
        ),
        (
            {"references": "none"},
            Capabilities(n_max=1, idempotent=frozenset(Operation)),
        ),
    ],
    ids=["apimart", "new-api", "given", "none"],
)
async def test_options_say_what_the_server_can_do(
    options: dict[str, Any], capable: Capabilities, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path, **options) as (upstream, simulator):
        assert upstream.provider.capabilities("gpt-image-2") == capable
        one = an_input(upstream.spools, png(64, 32))
        edit: dict[str, Any] = {"operation": EDIT, "mask": one}
        for references in ((one,) * (capable.references_max + 1), ()):
            error = await upstream.failure(references=references, **edit)
            assert error.kind is K.UNSUPPORTED
        assert not simulator.requests


# --- the simulator is strict, and honest ---


async def test_the_simulator_rejects_what_evolink_rejects(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        refused: Sequence[tuple[dict[str, Any], FailureKind]] = [
            ({"model": "gpt-image-9"}, K.UNSUPPORTED),
            ({"quality": "best"}, K.INVALID_REQUEST),
            ({"n": 11}, K.INVALID_REQUEST),
            ({"width_px": 1000}, K.INVALID_REQUEST),
            ({"width_px": 512, "height_px": 512}, K.INVALID_REQUEST),
            ({"width_px": 3840, "height_px": 1024}, K.INVALID_REQUEST),
            ({"prompt": "[moderate] x"}, K.CONTENT_POLICY),
            ({"task_id": "a b"}, K.INVALID_REQUEST),
        ]
        for changes, kind in refused:
            assert (await upstream.failure(**changes)).kind is kind
        assert not simulator.purchases


async def test_the_simulator_sells_once_per_key(tmp_path: Path) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        first = await submitted(upstream)
        assert await submitted(upstream) == first
        assert len(simulator.purchases) == 1
        error = await upstream.failure(prompt="another")
        assert error.upstream_code == "idempotency_conflict"
        assert simulator.purchases[0].charge == "reserved"
        done = await upstream.look(first)
        assert isinstance(done, Done)
        close(done)
        assert simulator.purchases[0].charge == "charged"
