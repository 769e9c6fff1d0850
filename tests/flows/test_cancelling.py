"""A task that its owner cancels while an upstream works on it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.core.errors import GatewayError
from gateway.core.ledger import Balance
from gateway.core.tasks import AttemptState, TaskState
from gateway.flows.generate import Accepted
from providers.kit.contract import (
    Billed,
    Cancelled,
    FailureKind,
    Pending,
    ProviderError,
    Usage,
)
from tests.fakes import ScriptedProvider, delivered
from tests.flows.stories import CENT
from tests.flows.test_generate import CHARGE, KEY, PRICE, RICH, USAGE, Counter

BEGUN = Pending("job-7", poll_after_s=50)


def working_at(stops: Cancelled | None, *later: object) -> ScriptedProvider:
    """Start a job that goes on, until it is stopped as told."""
    provider = ScriptedProvider(BEGUN, *later or (BEGUN,))  # type: ignore[arg-type]
    provider.stops = stops
    provider.can_stop = True
    return provider


async def cancelled(counter: Counter) -> Accepted | None:
    """Start a task, and cancel it when its job is known."""
    task_id = counter.generate.new_task_id()
    accepted = await counter.generate.accept(task_id, counter.request(), KEY)
    assert isinstance(accepted, Accepted)
    work = asyncio.create_task(counter.generate.carry_out(accepted, links=True))
    await asyncio.sleep(10)
    work.cancel()
    await asyncio.wait({work})
    return await counter.generate.cancel(accepted)


async def test_a_job_that_is_stopped_unbilled_costs_nobody_anything() -> None:
    cheap = working_at(Cancelled())
    counter = Counter(cheap=cheap)

    assert await cancelled(counter) is None

    (task,) = counter.store.tasks.values()
    assert cheap.stopped == ["job-7"]
    assert task.state is TaskState.CANCELLED
    assert task.attempts[0].state is AttemptState.FAILED
    assert task.attempts[0].kind == "cancelled"
    assert counter.store.balance == RICH
    assert counter.store.waste_nanousd == 0


async def test_only_what_the_upstream_says_was_used_is_charged() -> None:
    used = Usage(text_input=10, image_output=50)
    counter = Counter(cheap=working_at(Cancelled(Billed.YES, used, CENT // 4)))

    await cancelled(counter)

    charge = PRICE.total(used)
    (task,) = counter.store.tasks.values()
    assert (task.usage, task.usage_source) == (used, "reported")
    assert task.charged_nanocredits == charge
    assert counter.store.balance == Balance(RICH.posted - charge, spent=charge)
    assert counter.store.waste_nanousd == CENT // 4


async def test_a_job_that_is_stopped_and_billed_in_silence_is_the_operators_loss() -> (
    None
):
    counter = Counter(cheap=working_at(Cancelled(Billed.MAYBE)))

    await cancelled(counter)

    assert counter.store.balance == RICH
    assert counter.store.waste_nanousd == CENT


async def test_an_upstream_that_does_not_answer_may_charge() -> None:
    cheap = working_at(Cancelled())
    cheap.stop_fails = ProviderError(FailureKind.BAD_GATEWAY, "502")
    counter = Counter(cheap=cheap)

    await cancelled(counter)

    (task,) = counter.store.tasks.values()
    assert task.state is TaskState.CANCELLED
    assert counter.store.waste_nanousd == CENT


async def test_an_upstream_that_cannot_stop_is_not_asked_to() -> None:
    cheap = working_at(Cancelled())
    cheap.can_stop = False
    counter = Counter(cheap=cheap)

    await cancelled(counter)

    (task,) = counter.store.tasks.values()
    assert cheap.stopped == []
    assert task.state is TaskState.CANCELLED
    assert counter.store.waste_nanousd == CENT


async def test_when_it_is_too_late_the_pictures_are_delivered_and_charged() -> None:
    cheap = working_at(None, delivered(usage=USAGE))
    counter = Counter(cheap=cheap)

    left = await cancelled(counter)
    assert left is not None
    view = await counter.generate.carry_out(left, links=True)

    assert view.state is TaskState.COMPLETED
    assert view.charged_nanocredits == CHARGE
    assert len(cheap.jobs) == 1
    assert counter.store.balance.held == 0


async def test_when_it_is_too_late_nothing_is_bought_beside() -> None:
    over = ProviderError(FailureKind.BAD_GATEWAY, "it failed", ended=True)
    dear = ScriptedProvider(delivered(usage=USAGE))
    counter = Counter(cheap=working_at(None, over), dear=dear)

    left = await cancelled(counter)
    assert left is not None
    with pytest.raises(GatewayError):
        await counter.generate.carry_out(left, links=True)

    (task,) = counter.store.tasks.values()
    assert task.state is TaskState.FAILED
    assert dear.jobs == []
    assert counter.store.balance == RICH


async def test_a_task_that_was_taken_up_again_buys_nothing_beside_either() -> None:
    dear = ScriptedProvider(delivered(usage=USAGE))
    counter = Counter(cheap=ScriptedProvider(delivered()), dear=dear)
    task_id = counter.generate.new_task_id()
    accepted = await counter.generate.accept(task_id, counter.request(), KEY)
    assert isinstance(accepted, Accepted)

    with pytest.raises(GatewayError):
        await counter.generate.carry_out(replace(accepted, buys=False), links=True)

    assert dear.jobs == []
