"""What processes take over from each other: the rules themselves."""

from __future__ import annotations

import pytest

from gateway.core import breaker, fleet
from gateway.core.breaker import BreakerState, Flight, Others, Outcome, Record, trouble
from gateway.core.fleet import Size, adopted, aged, rested, sized, stance_of
from gateway.core.limits import Slots, resized, share_of
from providers.kit.contract import FailureKind, Operation

NOW_MS = 1_000_000
BAD = Outcome(kind=FailureKind.BAD_GATEWAY)


def after_bad(count: int) -> Record:
    record = Record()
    for _ in range(count):
        record = breaker.after_call(record, Flight(NOW_MS - 10), BAD, NOW_MS, 0.5)
    return record


def test_a_stance_means_the_same_on_a_clock_that_shows_something_else() -> None:
    record = breaker.opened(Record(), "5 failures in a row", NOW_MS, 0.5)
    told = aged(stance_of(record, NOW_MS + 2_000), 1_000)

    heard = adopted(Record(), told, 77)

    assert heard.open_until_ms == 77 + 12_000
    assert (heard.openings, heard.reason) == (1, "5 failures in a row")


def test_one_that_is_closed_by_another_forgets_its_trouble_but_not_its_lessons() -> (
    None
):
    record = breaker.opened(after_bad(5), "x", NOW_MS, 0.5)
    closed = stance_of(Record(closed_at_ms=NOW_MS), NOW_MS + 500)

    heard = adopted(record, closed, NOW_MS + 500)

    assert breaker.state_of(heard, NOW_MS + 500) is BreakerState.CLOSED
    assert (heard.buckets, heard.bad_streak, heard.reason) == ((), 0, "")
    assert heard.closed_at_ms == NOW_MS


def test_the_longer_pause_counts_and_one_ended_by_hand_is_over() -> None:
    record = rested(Record(), 60_000, NOW_MS)

    assert rested(record, 1_000, NOW_MS).paused_until_ms == NOW_MS + 60_000
    assert rested(record, 0, NOW_MS).paused_until_ms == 0


def test_what_others_saw_never_opens_what_went_well_here() -> None:
    seen = Others(good=0, bad=50, streak=50)

    assert trouble(Record(), [], NOW_MS, seen) is None
    assert trouble(after_bad(1), [], NOW_MS, seen) == "51 failures in a row"


def test_a_route_is_named_and_found_again() -> None:
    name = fleet.route_name("up/gpt-image-2", Operation.EDIT)

    assert fleet.route_named(name) == ("up/gpt-image-2", Operation.EDIT)
    assert fleet.route_named("up") is None
    assert fleet.route_named("up/gpt-image-2|dream") is None


@pytest.mark.parametrize(("most", "processes"), [(64, 4), (10, 3), (7, 7), (3, 2)])
def test_parts_add_up_to_the_whole(most: int, processes: int) -> None:
    parts = [share_of(most, processes, rank) for rank in range(processes)]

    assert sum(parts) == most
    assert max(parts) - min(parts) <= 1


def test_slots_that_shrank_stay_as_much_smaller_when_they_are_split_anew() -> None:
    assert resized(Slots(16, 8.0), 64) == Slots(64, 32.0)
    assert resized(Slots(64, 1.0), 16) == Slots(16, 1.0)


def test_more_processes_are_believed_at_once_and_fewer_only_if_it_lasts() -> None:
    size = sized(Size(2, 0), Size(4, 1), NOW_MS, 5_000)
    assert size == Size(4, 1)

    size = sized(size, Size(1, 0), NOW_MS, 5_000)
    assert size.processes == 4
    assert sized(size, Size(4, 2), NOW_MS + 1_000, 5_000) == Size(4, 2)
    assert sized(size, Size(1, 0), NOW_MS + 4_999, 5_000).processes == 4
    assert sized(size, Size(1, 0), NOW_MS + 5_000, 5_000) == Size(1, 0)
