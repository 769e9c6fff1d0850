"""When an offer is left alone, and how it comes back: the rule itself."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import breaker
from gateway.core.breaker import (
    EFFECT_BY_KIND,
    SLOW_AFTER_MS,
    BreakerState,
    Effect,
    Flight,
    Outcome,
    Record,
    after_call,
    state_of,
    trouble,
)
from gateway.core.ratios import Sample, believed
from providers.kit.contract import FailureKind

NOW_MS = 1_000_000
GOOD = Outcome()
BAD = Outcome(kind=FailureKind.BAD_GATEWAY)


def after(record: Record, *outcomes: Outcome, now_ms: int = NOW_MS) -> Record:
    for outcome in outcomes:
        record = after_call(record, Flight(now_ms - 1000), outcome, now_ms, 0.5)
    return record


def opened_at(now_ms: int = NOW_MS) -> Record:
    return breaker.opened(Record(), "test", now_ms, 0.5)


def probed(record: Record, outcome: Outcome, now_ms: int) -> Record:
    return after_call(record, Flight(now_ms - 100, probe=True), outcome, now_ms, 0.5)


def test_four_failures_in_a_row_are_borne_and_the_fifth_is_not() -> None:
    assert trouble(after(Record(), *[BAD] * 4), [], NOW_MS) is None
    assert trouble(after(Record(), *[BAD] * 5), [], NOW_MS) == "5 failures in a row"


def test_successes_from_before_the_trouble_do_not_break_a_streak() -> None:
    old, new = Flight(NOW_MS - 30_000), Flight(NOW_MS)
    record = Record()
    for now_ms in range(NOW_MS + 200, NOW_MS + 1_200, 200):
        record = after_call(record, new, BAD, now_ms, 0.5)
        record = after_call(record, old, GOOD, now_ms + 1, 0.5)

    assert trouble(record, [], NOW_MS + 1_200) == "5 failures in a row"

    record = after_call(record, Flight(NOW_MS + 1), GOOD, NOW_MS + 1_300, 0.5)
    assert trouble(record, [], NOW_MS + 1_300) is None


def test_a_few_quick_failures_are_no_streak_while_more_calls_are_still_out() -> None:
    # Of a healthy upstream under load: failures come home before successes do.
    record = after(Record(), *[BAD] * 5)
    out = [Flight(NOW_MS - 900)] * 6

    assert trouble(record, out, NOW_MS) is None
    assert trouble(record, out[:5], NOW_MS) == "5 failures in a row"


def test_half_of_ten_calls_bad_opens_though_none_are_in_a_row() -> None:
    nine = after(Record(), *[BAD, GOOD] * 4, BAD)
    assert trouble(nine, [], NOW_MS) is None

    ten = after(nine, GOOD)
    assert trouble(ten, [], NOW_MS) == "5 of 10 calls bad in 120 s"


def test_what_happened_two_minutes_ago_is_forgotten() -> None:
    record = after(Record(), *[BAD, GOOD] * 5)

    assert trouble(record, [], NOW_MS + breaker.WINDOW_MS) is None


def test_calls_that_hang_open_the_breaker_before_they_come_back() -> None:
    stuck = [Flight(NOW_MS + i * 200) for i in range(10)]
    just_before = NOW_MS + 800 + breaker.SLOW_AFTER_MS

    assert trouble(Record(), stuck, just_before) is None
    assert trouble(Record(), stuck, just_before + 1) == "5 slow calls in a row"


def test_usual_is_near_the_median_though_a_few_calls_take_very_long() -> None:
    record, dice = Record(), Random(1)
    for call in range(2_000):
        took_ms = round(25_000 * dice.lognormvariate(0, 0.65))
        now_ms = NOW_MS + call * 1_000
        record = after_call(record, Flight(now_ms - took_ms), GOOD, now_ms, 0.5)

    assert record.usual_ms is not None
    assert 21_000 < record.usual_ms < 29_000


def test_a_success_that_was_slow_in_coming_excuses_no_other_call() -> None:
    began_ms = NOW_MS - breaker.SLOW_AFTER_MS - 1
    record = replace(Record(bad_streak=4), usual_ms=25_000.0)

    slow = after_call(record, Flight(began_ms), GOOD, NOW_MS, 0.5)
    fine = after_call(record, Flight(began_ms + 1), GOOD, NOW_MS, 0.5)

    assert (slow.bad_streak, slow.last_good_started_ms) == (4, -1)
    assert (fine.bad_streak, fine.last_good_started_ms) == (0, began_ms + 1)


def test_an_hour_in_which_all_is_slow_does_not_become_the_usual() -> None:
    record = Record(usual_ms=25_000.0)
    for _ in range(30):
        record = after_call(record, Flight(NOW_MS - 200_000), GOOD, NOW_MS, 0.5)

    assert record.usual_ms is not None
    assert record.usual_ms < 31_000


def test_slow_is_measured_by_what_is_usual() -> None:
    usual = replace(Record(), usual_ms=60_000.0)
    stuck = [Flight(NOW_MS)] * 5

    assert trouble(usual, stuck, NOW_MS + 170_000) is None
    assert trouble(usual, stuck, NOW_MS + 180_001) == "5 slow calls in a row"


def test_a_success_that_began_later_excuses_slow_calls() -> None:
    stuck = [Flight(NOW_MS)] * 5
    record = after_call(Record(), Flight(NOW_MS + 1), GOOD, NOW_MS + 50_000, 0.5)

    assert trouble(record, stuck, NOW_MS + 100_000) is None


@pytest.mark.parametrize(
    "kind", [k for k in FailureKind if EFFECT_BY_KIND[k] is Effect.NONE]
)
def test_what_is_not_the_upstreams_fault_is_not_held_against_it(
    kind: FailureKind,
) -> None:
    assert after(Record(), *[Outcome(kind=kind)] * 50) == Record()


def test_our_own_cancelling_says_nothing() -> None:
    assert after(Record(), *[Outcome(cancelled=True)] * 50) == Record()


def test_a_call_that_had_too_little_time_says_nothing() -> None:
    hasty = Outcome(kind=FailureKind.TIMEOUT, given_up=True)
    record = Record(usual_ms=20_000.0)

    def given(age_ms: int) -> Record:
        return after_call(record, Flight(NOW_MS - age_ms), hasty, NOW_MS, 0.5)

    assert given(breaker.SLOW_AFTER_MS) == record
    assert given(breaker.SLOW_AFTER_MS + 1).bad_streak == 1

    record = Record(usual_ms=100_000.0)
    assert given(breaker.FAIR_MS) == record
    assert given(breaker.FAIR_MS + 1).bad_streak == 1

    record = Record(usual_ms=20_000.0)
    assert after(record, Outcome(kind=FailureKind.TIMEOUT)).bad_streak == 1


@pytest.mark.parametrize(("opening", "seconds"), [(1, 15), (2, 30), (3, 60), (9, 300)])
def test_each_opening_is_twice_as_long_up_to_five_minutes(
    opening: int, seconds: int
) -> None:
    record = replace(Record(), openings=opening - 1)

    until_ms = breaker.opened(record, "", NOW_MS, 0.5).open_until_ms

    assert until_ms == NOW_MS + seconds * 1000


@given(fraction=st.floats(0, 1, exclude_max=True))
def test_jitter_stays_within_a_fifth(fraction: float) -> None:
    until_ms = breaker.opened(Record(), "", NOW_MS, fraction).open_until_ms

    assert until_ms is not None
    assert 12_000 <= until_ms - NOW_MS <= 18_000


def test_openings_are_forgotten_after_ten_quiet_minutes() -> None:
    record = replace(Record(), openings=5, closed_at_ms=NOW_MS)
    later_ms = NOW_MS + breaker.OPENINGS_FORGOTTEN_AFTER_MS

    assert breaker.opened(record, "", later_ms, 0.5).openings == 6
    assert breaker.opened(record, "", later_ms + 1, 0.5).openings == 1


def test_a_second_outage_is_backed_off_from_like_the_first() -> None:
    record = replace(Record(), openings=5, closed_at_ms=NOW_MS)
    now_ms = NOW_MS + 2 * breaker.OPENINGS_FORGOTTEN_AFTER_MS
    record = breaker.opened(record, "", now_ms, 0.5)

    for seconds in (30, 60, 120, 240, 300):
        assert record.open_until_ms is not None
        now_ms = record.open_until_ms + 100
        record = probed(record, BAD, now_ms)
        assert record.open_until_ms == now_ms + seconds * 1000


def test_an_open_breaker_becomes_half_open_by_time_alone() -> None:
    record = opened_at()

    assert state_of(record, NOW_MS + 14_999) is BreakerState.OPEN
    assert state_of(record, NOW_MS + 15_000) is BreakerState.HALF_OPEN


def test_two_good_probes_close_it_and_a_bad_one_opens_it_for_longer() -> None:
    once = probed(opened_at(), GOOD, NOW_MS + 16_000)
    assert state_of(once, NOW_MS + 16_000) is BreakerState.HALF_OPEN

    twice = probed(once, GOOD, NOW_MS + 17_000)
    assert state_of(twice, NOW_MS + 17_000) is BreakerState.CLOSED

    failed = probed(once, BAD, NOW_MS + 17_000)
    assert failed.open_until_ms == NOW_MS + 17_000 + 30_000


def test_late_failures_of_an_outage_do_not_count_after_the_recovery() -> None:
    closed = probed(probed(opened_at(), GOOD, NOW_MS + 16_000), GOOD, NOW_MS + 17_000)
    late = Flight(NOW_MS - 60_000)

    for _ in range(20):
        closed = after_call(closed, late, BAD, NOW_MS + 18_000, 0.5)

    assert trouble(closed, [late] * 20, NOW_MS + 200_000) is None


def test_traffic_returns_in_doubling_steps() -> None:
    record = replace(Record(), closed_at_ms=NOW_MS)
    steps = [
        breaker.reentry_room(record, [], NOW_MS + s * 1000) for s in (0, 10, 30, 59)
    ]

    assert steps == [2, 4, 16, 64]
    assert breaker.reentry_room(record, [], NOW_MS + 60_000) is None
    assert breaker.reentry_room(Record(), [], NOW_MS) is None


def test_calls_stuck_since_the_outage_take_no_room_from_those_that_return() -> None:
    record = replace(Record(), closed_at_ms=NOW_MS)
    stuck = [Flight(NOW_MS - 60_000)] * 40

    assert breaker.reentry_room(record, stuck, NOW_MS) == 2
    assert breaker.reentry_room(record, [*stuck, Flight(NOW_MS)], NOW_MS) == 1


def test_a_pause_is_as_long_as_asked_but_five_minutes_at_most() -> None:
    def rest_ms(retry_after_s: float | None) -> int:
        limited = Outcome(FailureKind.RATE_LIMITED, retry_after_s=retry_after_s)
        return after(Record(), limited).paused_until_ms - NOW_MS

    assert rest_ms(20) == 20_000
    assert rest_ms(86_400) == 300_000
    assert rest_ms(None) == 5_000


def test_what_a_call_cost_is_remembered_by_tier() -> None:
    dearer = Outcome(sample=Sample("low/1K", 100, 150))

    record = after(Record(), *[dearer] * 20, GOOD, BAD)

    assert list(believed(record.ratios, NOW_MS)) == ["low/1K"]
    assert 1_400_000 < believed(record.ratios, NOW_MS)["low/1K"] < 1_500_000


@given(
    st.lists(
        st.tuples(
            st.sampled_from([GOOD, BAD, Outcome(FailureKind.NO_OUTPUT)]),
            st.integers(0, 30_000),
        ),
        max_size=60,
    )
)
def test_a_record_never_grows(calls: list[tuple[Outcome, int]]) -> None:
    record, now_ms = Record(), NOW_MS
    for outcome, wait_ms in calls:
        now_ms += wait_ms
        record = after(record, outcome, now_ms=now_ms)

    assert len(record.buckets) <= breaker.WINDOW_MS // breaker.BUCKET_MS


def test_one_long_job_is_no_measure_of_those_after_it() -> None:
    record = after_call(Record(), Flight(0), Outcome(), 400_000, 0.5)

    assert record.usual_ms == SLOW_AFTER_MS


def test_a_forced_try_that_fails_keeps_nobody_away_for_longer() -> None:
    record = opened_at()
    early = Flight(NOW_MS + 5_000, probe=True)

    tried = after_call(record, early, BAD, NOW_MS + 5_200, 0.5)

    assert (tried.open_until_ms, tried.openings) == (record.open_until_ms, 1)
    due = probed(tried, BAD, NOW_MS + 16_000)
    assert due.openings == 2


def test_an_upstream_that_may_be_asked_at_once_is_left_alone_for_a_second() -> None:
    soon = Outcome(kind=FailureKind.RATE_LIMITED, retry_after_s=0.0)

    assert after(Record(), soon).paused_until_ms == NOW_MS + 1_000
