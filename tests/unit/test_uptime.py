"""What an uptime is made of, and when failures are an incident."""

from __future__ import annotations

from gateway.core import uptime
from gateway.core.uptime import (
    DAY_MS,
    SLOT_MS,
    Count,
    Kind,
    Slot,
    State,
    incidents_of,
    uptime_of,
)

NOON_MS = 20_000 * DAY_MS + DAY_MS // 2
MODEL = (Kind.MODEL, "gpt-image-2")


def slot(ago: int, served: int, failed: int, name: str = "gpt-image-2") -> Slot:
    since_ms = NOON_MS - ago * SLOT_MS
    return Slot((Kind.MODEL, name), since_ms, Count(served, failed))


def test_clients_mistakes_count_nowhere_and_moderation_is_an_answer() -> None:
    assert uptime.of_request("client_error") is None
    assert uptime.of_request("cancelled") is None
    assert uptime.of_request("refused") == Count(served=1)
    assert uptime.of_request("timeout") == Count(failed=1)
    assert uptime.of_attempt("content_policy") is None
    assert uptime.of_attempt("done") == Count(served=1)
    assert uptime.of_attempt("auth") == Count(failed=1)


def test_a_window_takes_what_began_in_it_and_the_slot_that_it_cuts() -> None:
    slots = [
        slot(0, 1, 0),
        slot(1, 2, 0),
        slot(2, 4, 0),
        slot(7, 8, 0),
        slot(400, 9, 9),
    ]

    found = uptime_of(MODEL, slots, [], NOON_MS + 10)

    totals = {name: count.total for name, count in found.windows.items()}
    assert totals == {"5m": 3, "30m": 7, "24h": 15, "7d": 33, "30d": 0, "90d": 0}


def test_long_windows_are_made_of_days() -> None:
    today_ms = uptime.day_of(NOON_MS)
    days = [
        Slot(MODEL, today_ms - back * DAY_MS, Count(served=1)) for back in range(100)
    ]

    found = uptime_of(MODEL, [], days, NOON_MS)

    assert found.windows["30d"].total == 31
    assert found.windows["90d"].total == 91
    assert len(found.days) == 90
    assert set(found.days) == {Count(served=1)}


def test_availability_is_rounded_down_so_that_a_failure_is_never_hidden() -> None:
    assert Count(2_999_999, 1).millionths == 999_999
    assert Count(5, 0).millionths == 1_000_000
    assert Count().millionths is None


def test_how_it_is_now_is_told_by_the_last_slots() -> None:
    def state(*slots: Slot) -> State:
        return uptime_of(MODEL, slots, [], NOON_MS).state

    assert state() is State.UNKNOWN
    assert state(slot(0, 10, 0)) is State.UP
    assert state(slot(0, 100, 2)) is State.UP
    assert state(slot(0, 10, 3)) is State.DEGRADED
    assert state(slot(0, 3, 3)) is State.DOWN
    assert state(slot(5, 0, 50)) is State.UNKNOWN


def test_one_failure_at_night_is_no_incident() -> None:
    assert incidents_of([slot(9, 0, 1), slot(8, 0, 2)], NOON_MS) == []
    assert len(incidents_of([slot(9, 0, 3)], NOON_MS)) == 1
    assert incidents_of([slot(9, 100, 3)], NOON_MS) == []


def test_slots_near_each_other_are_one_incident_and_far_ones_two() -> None:
    near = incidents_of([slot(20, 1, 9), slot(19, 0, 5), slot(16, 0, 4)], NOON_MS)
    far = incidents_of([slot(20, 1, 9), slot(16, 0, 4)], NOON_MS)

    (one,) = near
    assert one.since_ms == NOON_MS - 20 * SLOT_MS
    assert one.until_ms == NOON_MS - 15 * SLOT_MS
    assert one.count == Count(1, 18)
    assert [each.count.failed for each in far] == [4, 9]


def test_an_incident_is_over_once_it_has_been_quiet_for_a_while() -> None:
    slots = [slot(3, 0, 9)]

    (lasting,) = incidents_of(slots, NOON_MS - 1)
    (over,) = incidents_of(slots, NOON_MS)

    assert lasting.until_ms is None
    assert over.until_ms == NOON_MS - 2 * SLOT_MS


def test_incidents_of_two_models_are_two() -> None:
    found = incidents_of([slot(3, 0, 9), slot(3, 0, 9, "other")], NOON_MS)

    assert {each.subject[1] for each in found} == {"gpt-image-2", "other"}
