"""The form of an API key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.keys import ALPHABET, digest, display, is_well_formed, key_from

KEY = key_from("0123456789abcdefghijABCDEFGHIJ")


@given(st.text(ALPHABET, min_size=30, max_size=30))
def test_every_key_that_is_made_is_well_formed(random: str) -> None:
    key = key_from(random)

    assert is_well_formed(key)
    assert len(key) == len("iwk_live_") + 36


def test_the_form_of_a_key_never_changes() -> None:
    assert "iwk_live_0123456789abcdefghijABCDEFGHIJ" + KEY[-6:] == KEY
    assert KEY[-6:] == "22ncFy"


@given(st.integers(0, len(KEY) - 1), st.sampled_from(ALPHABET))
def test_one_mistyped_character_is_noticed(at: int, char: str) -> None:
    mistyped = KEY[:at] + char + KEY[at + 1 :]

    assert is_well_formed(mistyped) == (mistyped == KEY)


@pytest.mark.parametrize(
    "text", ["", "iwk_live_", "sk-123", KEY + "0", KEY + "\n", f" {KEY}", KEY.upper()]
)
def test_what_is_no_key_is_turned_away(text: str) -> None:
    assert not is_well_formed(text)


@given(st.text())
def test_any_text_can_be_asked_about(text: str) -> None:
    assert not is_well_formed(text)
    assert len(digest(text, b"pepper")) == 32


def test_what_is_stored_depends_on_key_and_pepper() -> None:
    other = key_from("1123456789abcdefghijABCDEFGHIJ")

    assert digest(KEY, b"one") == digest(KEY, b"one")
    assert len({digest(KEY, b"one"), digest(KEY, b"two"), digest(other, b"one")}) == 3


def test_what_may_be_shown_again_gives_little_away() -> None:
    assert display(KEY) == f"iwk_live_01\u2026{KEY[-4:]}"
