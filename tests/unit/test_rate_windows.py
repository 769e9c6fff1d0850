"""A minute's limit holds in every minute, and is never less than it says."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.core.limits import MINUTE_S, Minute, taken

STEPS_MS = st.lists(
    st.one_of(st.just(0), st.integers(0, 3_000), st.integers(0, 90_000)), max_size=300
)


@settings(deadline=None)
@given(limit=st.integers(1, 20), steps_ms=STEPS_MS)
@example(limit=1, steps_ms=[999, 59_001, 0])
def test_in_no_minute_more_than_the_limit_and_in_each_as_many_as_asked_for(
    limit: int, steps_ms: list[int]
) -> None:
    minute, passed = Minute(), Counter[int]()
    for now_ms in accumulate(steps_ms):
        second = now_ms // 1000
        lately = sum(n for at, n in passed.items() if second - MINUTE_S < at <= second)

        minute, rate = taken(minute, limit, now_ms)

        assert rate.allowed == (lately < limit)
        assert rate.left == limit - lately - rate.allowed
        assert 1 <= rate.frees_in_s <= MINUTE_S
        assert len(minute.counts) <= MINUTE_S
        passed[second] += rate.allowed


@settings(deadline=None)
@given(limit=st.integers(1, 20), steps_ms=STEPS_MS)
def test_who_waits_as_long_as_was_said_is_let_through(
    limit: int, steps_ms: list[int]
) -> None:
    minute, now_ms = Minute(), 0
    for step_ms in steps_ms:
        now_ms += step_ms
        minute, rate = taken(minute, limit, now_ms)
        if not rate.allowed:
            _, later = taken(minute, limit, now_ms + rate.frees_in_s * 1000)
            assert later.allowed


@settings(deadline=None)
@given(limit=st.integers(1, 5), back_ms=st.integers(0, 10**9))
def test_a_clock_that_is_set_back_locks_nobody_out(limit: int, back_ms: int) -> None:
    minute, now_ms = Minute(), 10**12
    for _ in range(limit):
        minute, _ = taken(minute, limit, now_ms)

    _, rate = taken(minute, limit, now_ms - back_ms)

    assert rate.allowed == (now_ms // 1000 > (now_ms - back_ms) // 1000)
