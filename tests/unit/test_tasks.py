"""Names and states of tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.tasks import (
    TASK_ID_ALPHABET,
    TASK_ID_CHARS,
    TaskState,
    is_task_id,
    task_id_for,
)


def test_only_three_states_are_final() -> None:
    assert {state for state in TaskState if state.final} == {
        TaskState.COMPLETED,
        TaskState.FAILED,
        TaskState.CANCELLED,
    }


def test_an_id_tells_when_its_task_was_made() -> None:
    assert task_id_for(1_700_000_000, "abcd1234") == "task-unified-1700000000-abcd1234"


@given(
    st.integers(0, 10**11),
    st.text(TASK_ID_ALPHABET, min_size=TASK_ID_CHARS, max_size=TASK_ID_CHARS),
)
def test_every_id_that_is_made_is_known_as_one(created_s: int, suffix: str) -> None:
    assert is_task_id(task_id_for(created_s, suffix))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "task-unified-",
        "1700000000-abcd1234",
        "task-unified--abcd1234",
        "task-unified-1700000000-abcd123",
        "task-unified-1700000000-abcd12345",
        "task-unified-1700000000-ABCD1234",
        "task-unified-17000x0000-abcd1234",
        "task-unified-١٧-abcd1234",  # noqa: RUF001 - digits, but not ours
        "task-unified-1700000000-abcd-234",
        "task-unified-1700000000-abcd123\n",
    ],
)
def test_other_texts_are_no_ids(text: str) -> None:
    assert not is_task_id(text)
