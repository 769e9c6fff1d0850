"""Overload of the process itself: it begins late, and ends later."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.pressure import (
    LAG_BOUNDS_MS,
    LAG_EVERY_MS,
    Pressure,
    after,
    smoothed,
)

HIGH, BETWEEN, LOW = 500.0, 150.0, 10.0
LASTS = LAG_BOUNDS_MS.lasts_ms // LAG_EVERY_MS


def seen(*values: float) -> list[Pressure]:
    """Take a look every 100 ms."""
    states = [Pressure()]
    for place, value in enumerate(values):
        states.append(after(states[-1], value, place * LAG_EVERY_MS, LAG_BOUNDS_MS))
    return states


def test_a_lag_must_last_for_five_seconds() -> None:
    states = seen(*[HIGH] * (LASTS + 1))

    assert [state.on for state in states].index(True) == LASTS + 1


def test_one_good_look_begins_the_count_anew() -> None:
    assert not any(state.on for state in seen(*[HIGH] * LASTS, LOW, *[HIGH] * LASTS))


def test_it_ends_only_after_five_seconds_well_below() -> None:
    on = [HIGH] * (LASTS + 1)

    assert seen(*on, *[BETWEEN] * 10 * LASTS)[-1].on
    assert seen(*on, *[LOW] * LASTS)[-1].on
    assert not seen(*on, *[LOW] * (LASTS + 1))[-1].on


@given(st.lists(st.sampled_from([HIGH, BETWEEN, LOW]), max_size=400))
def test_it_never_changes_twice_within_five_seconds(values: list[float]) -> None:
    on = [state.on for state in seen(*values)]
    changes = [i for i, (one, two) in enumerate(pairwise(on)) if one is not two]

    assert all(two - one > LASTS for one, two in pairwise(changes))


def test_a_single_late_look_is_no_lag() -> None:
    lag_ms = smoothed(0.0, 900.0)

    assert lag_ms < LAG_BOUNDS_MS.over
    for _ in range(10):
        lag_ms = smoothed(lag_ms, 900.0)
    assert lag_ms > LAG_BOUNDS_MS.over
