"""A probe tells whether a credential is good, and buys nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from providers.kit.contract import Billed, FailureKind, Provider, ProviderError
from providers.registry import PROVIDERS
from tests.contract.azure_upstream import azure_upstream
from tests.contract.cases import remote, those
from tests.contract.fal_upstream import fal_upstream
from tests.contract.openai_upstream import openai_error, openai_upstream
from tests.contract.openrouter_upstream import openrouter_upstream
from tests.contract.sandbox_upstream import connect_sandbox
from tests.contract.task_upstream import task_upstream
from tests.contract.upstreams import Case, K, Upstream, nobody_at
from tests.simulators.azure_server import TOKEN
from tests.simulators.server import Fault
from tests.simulators.task_server import (
    ApimartSimulator,
    NewApiSimulator,
    TaskSimulator,
)

LONG_S = 30.0
WRONG = "wr0ng-secret-of-nobody"


async def failure(
    provider: Provider, model: str = "gpt-image-2", deadline_s: float = LONG_S
) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await provider.probe(model, deadline_s)
    assert caught.value.billed is Billed.NO
    return caught.value


def other(upstream: Upstream, case: Case, **changes: str) -> Provider:
    """Connect the adapter with another account."""
    account = replace(upstream.account, **changes)  # type: ignore[arg-type]
    return PROVIDERS[case.name](account, upstream.tools)


@those(remote)
async def test_a_good_credential_passes_and_nothing_is_bought(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        await upstream.provider.probe(case.model, LONG_S)
        assert upstream.simulator.requests
        assert upstream.purchases() == 0
        assert upstream.files() == 0


@those(remote)
async def test_a_wrong_credential_is_told_and_not_shown(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        error = await failure(other(upstream, case, secret=WRONG), case.model)
        assert error.kind is K.AUTH
        assert WRONG not in f"{error.detail} {error.client_message}"


@those(remote)
async def test_a_dead_host_is_a_matter_of_the_network(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        error = await failure(other(upstream, case, base_url=nobody_at()), case.model)
        assert error.kind is K.NETWORK


@those(remote)
async def test_a_host_that_hangs_is_left_at_the_deadline(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        upstream.simulator.script(Fault(case.probe_step, hang=True))
        error = await failure(upstream.provider, case.model, 0.05)
        assert error.kind is K.TIMEOUT


@those(remote)
@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (402, {}, K.INSUFFICIENT_FUNDS),
        (403, {}, K.AUTH),
        (429, {}, K.RATE_LIMITED),
        (500, {}, K.BAD_GATEWAY),
        (503, {}, K.OVERLOADED),
        # Neither is an answer of what the adapter speaks to.
        (404, "<html>nginx</html>", K.UNSUPPORTED),
        (200, "<html>Welcome</html>", K.BAD_GATEWAY),
        (302, "", K.BAD_GATEWAY),
    ],
)
async def test_any_other_answer_is_no_proof(
    case: Case, status: int, body: Any, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        upstream.simulator.script(Fault(case.probe_step, status=status, body=body))
        assert (await failure(upstream.provider, case.model)).kind is kind


async def test_nothing_is_known_of_a_sandbox(tmp_path: Path) -> None:
    async with connect_sandbox(tmp_path) as upstream:
        assert (await failure(upstream.provider)).kind is K.UNSUPPORTED


# --- what is peculiar ---


async def test_a_relay_that_lists_its_models_to_anybody_proves_nothing(
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.lists_to_anybody = True
        error = await failure(upstream.provider)
        assert error.kind is K.UNSUPPORTED
        assert [s.path for s in simulator.requests] == ["/v1/models"] * 2
        assert "authorization" not in simulator.requests[1].headers


async def test_a_server_without_a_key_is_there(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path, auth_header="none") as (upstream, simulator):
        simulator.lists_to_anybody = True
        await upstream.provider.probe("any", LONG_S)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_for_pictures_alone_is_not_called_bad(
    status: int, tmp_path: Path
) -> None:
    told = "You have insufficient permissions. Missing scopes: api.model.read."
    async with openai_upstream(tmp_path) as (upstream, simulator):
        simulator.script(replace(openai_error(status, None, told), on="probe"))
        assert (await failure(upstream.provider)).kind is K.UNSUPPORTED


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "/openai/v1/models"),
        ({"api_version": "preview"}, "/openai/v1/models?api-version=preview"),
        ({"form": "deployment"}, "/openai/models?api-version=2025-04-01-preview"),
    ],
)
async def test_azure_is_asked_for_its_models_in_either_form(
    options: dict[str, Any], path: str, tmp_path: Path
) -> None:
    async with azure_upstream(tmp_path, **options) as (upstream, simulator):
        await upstream.provider.probe("prod-pictures", LONG_S)
        assert [seen.path for seen in simulator.requests] == [path]


async def test_an_entra_token_is_tested_and_let_go_when_refused(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "token"
    kept.write_text("withdrawn-token")
    command = [sys.executable, "-c", f"print(open({str(kept)!r}).read())"]
    async with azure_upstream(tmp_path, secret="", token_command=command) as (
        upstream,
        _,
    ):
        error = await failure(upstream.provider)
        assert error.kind is K.AUTH
        assert "withdrawn" not in error.detail
        kept.write_text(TOKEN)
        await upstream.provider.probe("any", LONG_S)


async def test_fal_is_asked_for_a_request_of_the_models_app(tmp_path: Path) -> None:
    async with fal_upstream(tmp_path) as (upstream, simulator):
        await upstream.provider.probe("openai/gpt-image-2.5/flare/edit", LONG_S)
        nobody = "00000000-0000-0000-0000-000000000000"
        assert [(seen.method, seen.path) for seen in simulator.requests] == [
            ("GET", f"/openai/gpt-image-2.5/requests/{nobody}/status")
        ]


@pytest.mark.parametrize("left", [0, -0.0001])
async def test_an_account_without_credits_is_out_of_money(
    left: float, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path) as (upstream, simulator):
        simulator.credits_left = left
        assert (await failure(upstream.provider)).kind is K.INSUFFICIENT_FUNDS


@pytest.mark.parametrize(
    ("kind", "dialect"), [(ApimartSimulator, "apimart"), (NewApiSimulator, "new-api")]
)
async def test_other_dialects_are_asked_for_a_task_that_cannot_be(
    kind: type[TaskSimulator], dialect: str, tmp_path: Path
) -> None:
    async with task_upstream(tmp_path, kind, dialect=dialect) as (upstream, simulator):
        await upstream.provider.probe("gpt-image-2", LONG_S)
        assert len(simulator.requests) == 1
        account = replace(upstream.account, secret=WRONG)
        error = await failure(PROVIDERS["task_api"](account, upstream.tools))
        assert error.kind is K.AUTH


@pytest.mark.parametrize(
    "told",
    [
        {"error": {"code": "invalid_api_key", "message": "no"}},
        {"code": "x", "message": "insufficient balance"},
    ],
)
async def test_a_success_may_say_that_the_key_is_bad(
    told: dict[str, object], tmp_path: Path
) -> None:
    async with task_upstream(tmp_path, NewApiSimulator, dialect="new-api") as (
        upstream,
        simulator,
    ):
        simulator.script(Fault("poll", status=200, body=told))
        error = await failure(upstream.provider)
        assert error.kind in {K.AUTH, K.INSUFFICIENT_FUNDS}


@pytest.mark.parametrize(("left", "is_good"), [(None, True), (0.01, True), (0, False)])
async def test_a_key_that_may_spend_nothing_more_is_out_of_money(
    left: float | None, is_good: bool, tmp_path: Path
) -> None:
    async with openrouter_upstream(tmp_path) as (upstream, simulator):
        simulator.limit_left_usd = left
        if is_good:
            await upstream.provider.probe("any", LONG_S)
        else:
            assert (await failure(upstream.provider)).kind is K.INSUFFICIENT_FUNDS
