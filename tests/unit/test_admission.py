"""Who waits, who is next, who is refused: the rules alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import admission
from gateway.core.admission import Crowd, Reason, ahead, refusal, retry_after_s, turn_of
from gateway.core.breaker import BreakerState, Health

MINUTE_MS = 60_000.0
TENANTS = "abcdefgh"
counts = st.dictionaries(st.sampled_from(TENANTS), st.integers(1, 40))


def crowd(
    here: Mapping[str, int],
    *,
    running: Mapping[str, int] | None = None,
    slots_free: int = 0,
    pace_per_ms: float | None = 0.01,
) -> Crowd:
    return Crowd(here, running or {}, {}, slots_free, pace_per_ms)


def served(waiting: Mapping[str, int], running: Mapping[str, int]) -> list[str]:
    """Call everybody who waits, as slots that nobody uses yet come free."""
    left, slots, turns = Counter(waiting), Counter(running), dict[str, int]()
    order: list[str] = []
    while left.total():
        tenant = min(
            (t for t in left if left[t]), key=lambda t: turn_of(t, slots, turns)
        )
        left[tenant] -= 1
        slots[tenant] += 1
        turns[tenant] = len(order)
        order.append(tenant)
    return order


def test_a_tenant_that_asks_for_little_is_next_whatever_others_have_waiting() -> None:
    waiting = {"noisy": 250, "quiet": 1}

    assert served(waiting, {"noisy": 20})[0] == "quiet"


@given(counts, counts)
def test_who_has_less_than_another_is_never_called_after_it(
    waiting: dict[str, int], running: dict[str, int]
) -> None:
    slots, left = Counter(running), Counter(waiting)
    for tenant in served(waiting, running):
        assert all(slots[tenant] <= slots[other] for other in left if left[other])
        slots[tenant] += 1
        left[tenant] -= 1


@given(counts)
def test_slots_given_to_those_who_want_more_differ_by_one_at_most(
    waiting: dict[str, int],
) -> None:
    had, left = Counter[str](), Counter(waiting)
    for tenant in served(waiting, {}):
        had[tenant] += 1
        left[tenant] -= 1
        hungry = [had[each] for each in left if left[each]]
        assert not hungry or max(had.values()) - min(hungry) <= 1


@given(counts, counts, st.sampled_from(TENANTS))
def test_the_place_of_a_new_request_is_the_one_it_gets_but_for_ties(
    waiting: dict[str, int], running: dict[str, int], tenant: str
) -> None:
    told = ahead(tenant, waiting, running)
    order = served(Counter(waiting) + Counter({tenant: 1}), running)
    nth = waiting.get(tenant, 0) + 1
    found = [i for i, each in enumerate(order) if each == tenant][nth - 1]

    assert found <= told <= found + len(waiting)


def test_of_two_with_as_many_slots_the_one_served_longer_ago_is_next() -> None:
    # Not the one with the oldest request: who has a long line would always be that.
    last_turns = {"a": 7, "b": 3}

    assert min("abc", key=lambda t: turn_of(t, {}, last_turns)) == "c"
    assert min("ab", key=lambda t: turn_of(t, {}, last_turns)) == "b"


def test_one_tenant_alone_fills_half_of_the_room_and_another_still_gets_in() -> None:
    half = admission.ROOM_MAX_REQUESTS // 2

    assert refusal("a", crowd({"a": half - 1}), MINUTE_MS) is None
    full = refusal("a", crowd({"a": half}), MINUTE_MS)
    assert full is not None
    assert full.reason is Reason.TENANT_SHARE
    assert refusal("b", crowd({"a": half}), MINUTE_MS) is None


def test_the_fuller_the_room_the_less_of_it_may_one_tenant_have() -> None:
    third = admission.ROOM_MAX_REQUESTS // 3

    assert refusal("a", crowd({"a": third, "b": third - 1}), MINUTE_MS) is None
    told = refusal("a", crowd({"a": third, "b": third + 2}), MINUTE_MS)
    assert told is not None
    assert told.reason is Reason.TENANT_SHARE


@given(st.integers(1, 9), st.data())
def test_however_many_ask_for_all_they_can_get_there_is_room_for_one_more(
    greedy: int, data: st.DataObject
) -> None:
    here: Counter[str] = Counter()
    names = [f"t{n}" for n in range(greedy)]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3_000)):
        if refusal(name, crowd(here, pace_per_ms=None), MINUTE_MS) is None:
            here[name] += 1

    assert here.total() <= admission.ROOM_MAX_REQUESTS
    assert refusal("new", crowd(here, pace_per_ms=None), MINUTE_MS) is None


def test_a_room_full_of_tenants_with_little_is_full_for_everybody() -> None:
    here = {f"t{n}": 1 for n in range(admission.ROOM_MAX_REQUESTS)}

    told = refusal("new", crowd(here), MINUTE_MS)

    assert told is not None
    assert told.reason is Reason.ROOM_FULL
    assert not told.reason.by_tenant


def test_who_waits_too_long_because_of_itself_is_told_so() -> None:
    slow = 1 / MINUTE_MS  # one call a minute

    own = refusal("a", crowd({"a": 3}, pace_per_ms=slow), MINUTE_MS)
    all_of_them = {f"t{n}": 1 for n in range(9)}
    others = refusal("a", crowd(all_of_them, pace_per_ms=slow), MINUTE_MS)

    assert own is not None
    assert own.reason is Reason.TENANT_WAIT
    assert own.wait_ms == pytest.approx(4 * MINUTE_MS)
    assert others is not None
    assert others.reason is Reason.WAIT_TOO_LONG


def test_nobody_waits_for_a_slot_that_is_free() -> None:
    assert refusal("a", crowd({"a": 3}, slots_free=4, pace_per_ms=1e-9), 0.0) is None
    assert admission.expected_wait_ms("a", crowd({"a": 3}, slots_free=4)) == 0


def test_where_nobody_knows_how_long_calls_take_only_the_room_is_a_bound() -> None:
    assert refusal("a", crowd({"a": 99}, pace_per_ms=None), 0.0) is None


def test_the_pace_is_that_of_the_slots_that_may_be_used() -> None:
    good = Health(slots_free=2, in_flight=8, usual_ms=1_000.0)
    shut = Health(BreakerState.OPEN, slots_free=10, usual_ms=1_000.0)
    unknown = Health(slots_free=5)

    assert admission.pace_per_ms([good, shut, unknown]) == pytest.approx(0.01)
    assert admission.pace_per_ms([shut, unknown]) is None


@given(st.one_of(st.none(), st.floats(0, 1e9)), st.floats(0, 1, exclude_max=True))
def test_no_library_is_told_to_come_back_at_once_or_never(
    wait_ms: float | None, fraction: float
) -> None:
    assert 1 <= retry_after_s(wait_ms, fraction) <= 30


def test_those_refused_together_do_not_come_back_together() -> None:
    assert {retry_after_s(20_000, n / 10) for n in range(10)} >= {15, 20, 24}
    assert {retry_after_s(90_000, n / 10) for n in range(10)} >= {18, 24, 29}
