"""How many calls at once an upstream is trusted with."""

from __future__ import annotations

from gateway.core.breaker import Effect, Flight
from gateway.core.limits import Slots, slots_after

NOW_MS = 1_000_000


def given_up(slots: Slots, flight: Flight, now_ms: int = NOW_MS) -> Slots:
    return slots_after(slots, flight, Effect.BAD, now_ms, given_up=True)


def after_good(slots: Slots, calls: int) -> Slots:
    for _ in range(calls):
        slots = slots_after(slots, Flight(0), Effect.GOOD, NOW_MS, given_up=False)
    return slots


def test_a_call_that_was_too_much_takes_three_of_ten_slots() -> None:
    slots, flight = Slots(64, 10.0), Flight(NOW_MS)

    limited = slots_after(slots, flight, Effect.PAUSE, NOW_MS, given_up=False)

    assert limited.now == given_up(slots, flight).now == 7.0


def test_a_crowd_that_was_too_much_shrinks_the_slots_once() -> None:
    slots = Slots(1000, 1000.0)
    for _ in range(600):
        slots = given_up(slots, Flight(NOW_MS - 60_000))
    assert slots.now == 700.0

    assert round(given_up(slots, Flight(NOW_MS), NOW_MS + 1000).now) == 490


def test_a_failure_or_an_answer_broken_off_says_nothing_of_the_load() -> None:
    slots = Slots(64, 10.0)

    assert slots_after(slots, Flight(0), Effect.BAD, NOW_MS, given_up=False) == slots


def test_a_call_that_had_too_little_time_was_not_too_much() -> None:
    slots = Slots(64, 10.0)

    assert slots_after(slots, Flight(0), Effect.NONE, NOW_MS, given_up=True) == slots


def test_what_a_probe_meets_is_for_the_breaker() -> None:
    slots = Slots(64, 10.0)

    assert given_up(slots, Flight(0, probe=True)) == slots


def test_one_slot_always_remains() -> None:
    assert given_up(Slots(64, 1.0), Flight(0)).now == 1.0


def test_a_round_of_successes_adds_a_tenth_and_at_least_one() -> None:
    assert after_good(Slots(64, 4.0), 3).now == 4.0
    assert after_good(Slots(64, 4.0), 4).now == 5.0
    assert after_good(Slots(1000, 200.0), 200).now == 220.0
    assert after_good(Slots(64, 64.0), 64).now == 64.0
