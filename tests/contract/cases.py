"""Every adapter there is, for the tests that all must pass: one line each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from providers.kit.contract import Operation
from tests.contract.azure_upstream import AZURE
from tests.contract.fal_upstream import FAL
from tests.contract.openai_upstream import OPENAI
from tests.contract.openrouter_upstream import OPENROUTER
from tests.contract.replicate_upstream import REPLICATE
from tests.contract.sandbox_upstream import SANDBOX
from tests.contract.task_upstream import TASK
from tests.contract.upstreams import Case

CASES = [
    AZURE,
    FAL,
    OPENAI,
    OPENROUTER,
    REPLICATE,
    SANDBOX,
    TASK,
]


def those(able: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Run a test for the adapters that can do what it is about."""
    cases = [case for case in CASES if able(case)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def failures_of(able: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Run a test for every failure of those that can do what it is about."""
    return pytest.mark.parametrize(
        ("case", "kind"),
        [(case, kind) for case in CASES if able(case) for kind in case.failures],
        ids=lambda value: getattr(value, "name", "").lower(),
    )


def edits(case: Case) -> bool:
    return Operation.EDIT in case.capable.operations


def masks(case: Case) -> bool:
    return case.capable.mask


def remote(case: Case) -> bool:
    return case.is_remote


def streams(case: Case) -> bool:
    return case.capable.stream


def answers_with_pictures(case: Case) -> bool:
    """Whether the upstream's answer to a job holds the pictures themselves."""
    return case.is_remote and not downloads(case)


def downloads(case: Case) -> bool:
    return case.file_step != ""


each_provider = those(lambda _: True)
each_failure = failures_of(lambda _: True)
