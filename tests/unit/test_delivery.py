"""How pictures come: the preference first, however it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import Catalogue
from gateway.core.delivery import ASYNC, SYNC, WAIT_MAX_S, delivery_of
from gateway.core.requests import parse_generation
from gateway.settings import load_settings

CATALOGUE = Catalogue(
    variants=load_settings(None, {}, kinds={"sandbox", "openai"}).variants, offers={}
)
REQUEST = parse_generation({"prompt": "a fox"}, CATALOGUE)


def waiting_s(prefer: str) -> int | None:
    return delivery_of(prefer, REQUEST, "auto").wait_s


@pytest.mark.parametrize(
    ("prefer", "wait_s"),
    [
        ("wait=5", 5),
        ("WAIT=5", 5),
        ('wait="5"', 5),
        ("wait = 5", 5),
        ("wait\t=\t5", 5),
        ("wait=0", 0),
        ("wait=007", 7),
        ("wait=290", 290),
        ("wait=291", WAIT_MAX_S),
        ("wait=1000000", WAIT_MAX_S),
        ("wait=" + "9" * 900, WAIT_MAX_S),
        ("respond-async, wait=5", 5),
        ("respond-async; wait=5", 5),
        ("return=minimal, wait=5", 5),
        ('foo="a, wait=9", wait=5', 5),
        ('foo="a\\", wait=9", wait=5', 5),
        ("wait=3, wait=5", 3),
    ],
)
def test_a_wait_counts_however_it_is_written(prefer: str, wait_s: int) -> None:
    assert waiting_s(prefer) == wait_s


@pytest.mark.parametrize(
    "prefer", ["respond-async", "Respond-Async", 'respond-async=""', ", respond-async"]
)
def test_a_task_is_asked_for_in_one_word(prefer: str) -> None:
    assert delivery_of(prefer, REQUEST, "sync") == ASYNC


@pytest.mark.parametrize(
    "prefer",
    [
        "",
        "wait",
        "wait=",
        "wait=-1",
        "wait=5.5",
        "wait=abc",
        "wait=5 6",
        "wait=\u0665",
        "respond-async=no",
        'foo="respond-async"',
        'foo="a, respond-async, b"',
        "x" * 5_000 + ", wait=5",
    ],
)
def test_what_is_no_preference_of_ours_changes_nothing(prefer: str) -> None:
    assert delivery_of(prefer, REQUEST, "auto") == SYNC
    assert delivery_of(prefer, replace(REQUEST, by_url=True), "auto") == ASYNC


@given(st.text('wait=5"\\;, \t', max_size=2_000))
def test_junk_is_read_without_harm(prefer: str) -> None:
    wait_s = waiting_s(prefer)
    assert wait_s is None or 0 <= wait_s <= WAIT_MAX_S
