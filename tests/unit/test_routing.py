"""Which offer goes first, and what is said of those left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.breaker import BreakerState, Health
from gateway.core.catalogue import Offer, PerImage
from gateway.core.limits import (
    REBUYS_ALWAYS,
    RetryBudget,
    RiskBook,
    earned,
    may_rebuy,
    spent,
)
from gateway.core.routing import (
    Candidate,
    Moment,
    Preferences,
    Sort,
    Wish,
    cannot,
    decide,
)
from providers.kit.contract import Capabilities, Operation

WISH = Wish(Operation.GENERATE, (1024, 1024), "low", 1)
NOW = Moment(today="2026-11-24", left_ms=300_000)


def offer(name: str, **changes: object) -> Offer:
    plain = Offer(name, "gpt-image-2", "m", PerImage(flat=1), Capabilities())
    return replace(plain, **changes)  # type: ignore[arg-type]


def reasons(
    *priced: tuple[Offer, int | None], health: dict[str, Health] | None = None
) -> dict[str, str]:
    decision = decide(WISH, priced, health or {}, NOW)
    return {candidate.offer.upstream: candidate.reason for candidate in decision.all}


@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.booleans(), st.integers(0, 3)),
        max_size=12,
    )
)
def test_the_first_choice_is_the_cheapest_of_those_that_may_be_tried(
    shelf: list[tuple[int, bool, int]],
) -> None:
    priced = [(offer(f"u{i}"), cost) for i, (cost, _, _) in enumerate(shelf)]
    health = {
        f"u{i}/gpt-image-2": Health(
            state=BreakerState.CLOSED if healthy else BreakerState.OPEN,
            slots_free=slots,
        )
        for i, (_, healthy, slots) in enumerate(shelf)
    }
    open_costs = [cost for cost, healthy, slots in shelf if healthy and slots]

    decision = decide(WISH, priced, health, NOW)

    assert [c.cost_nanousd for c in decision.ranked] == sorted(open_costs)
    assert len(decision.all) == len(shelf)


def test_of_two_equal_ones_the_less_busy_goes_first_then_the_name_decides() -> None:
    priced = [(offer("b"), 5), (offer("a"), 5), (offer("c"), 5)]
    health = {"a/gpt-image-2": Health(in_flight=3)}

    decision = decide(WISH, priced, health, NOW)

    assert [c.offer.upstream for c in decision.ranked] == ["b", "c", "a"]


def test_what_was_learned_of_real_costs_changes_the_order() -> None:
    priced = [(offer("says-cheap"), 100), (offer("honest"), 120)]
    ratios = {"low/1K": 1_500_000, "high/1K": 500_000, "low/2K": 500_000}
    health = {"says-cheap/gpt-image-2": Health(cost_ratios=ratios)}

    decision = decide(WISH, priced, health, NOW)

    assert [(c.offer.upstream, c.cost_nanousd) for c in decision.ranked] == [
        ("honest", 120),
        ("says-cheap", 150),
    ]


def test_what_failed_lately_is_the_last_hope_of_a_request_that_has_failed() -> None:
    priced = [(offer("a"), 1), (offer("b"), 2), (offer("c"), 3), (offer("d"), 4)]
    health = {
        "b/gpt-image-2": Health(doubtful=True),
        "c/gpt-image-2": Health(state=BreakerState.HALF_OPEN, doubtful=True),
    }

    def order(*tried: str) -> list[str]:
        ids = frozenset(f"{name}/gpt-image-2" for name in tried)
        decision = decide(WISH, priced, health, NOW, tried=ids)
        return [c.offer.upstream for c in decision.ranked]

    assert order() == ["a", "b", "c", "d"]
    assert order("a") == ["d", "b", "c"]


def test_everyone_left_out_is_told_why() -> None:
    health = {
        "open/gpt-image-2": Health(
            state=BreakerState.OPEN, reason="5 failures in a row"
        ),
        "full/gpt-image-2": Health(slots_free=0),
        "slow/gpt-image-2": Health(usual_ms=400_000.0),
    }

    assert reasons(
        (offer("fine"), 1),
        (offer("open"), 1),
        (offer("full"), 1),
        (offer("slow"), 1),
        (offer("gone", sunset_on="2026-11-24"), 1),
        (offer("unpriced"), None),
        (offer("editor", capabilities=Capabilities(frozenset({Operation.EDIT}))), 1),
        health=health,
    ) == {
        "fine": "",
        "open": "open: 5 failures in a row",
        "full": "no free slot",
        "slow": "usually takes longer than the time left",
        "gone": "ended at this upstream on 2026-11-24",
        "unpriced": "cost unknown for this size and quality",
        "editor": "cannot generate",
    }


def test_an_offer_lives_until_the_day_before_its_sunset() -> None:
    assert reasons((offer("last-day", sunset_on="2026-11-25"), 1)) == {"last-day": ""}


@pytest.mark.parametrize(
    ("capabilities", "wish", "reason"),
    [
        (
            Capabilities(sizes=frozenset({(512, 512)})),
            WISH,
            "cannot make size 1024x1024",
        ),
        (
            Capabilities(sizes=frozenset({(512, 512)})),
            replace(WISH, size=None),
            "cannot make size auto",
        ),
        (Capabilities(qualities=frozenset({"high"})), WISH, "cannot make quality low"),
        (Capabilities(output_formats=frozenset({"webp"})), WISH, None),
        (Capabilities(output_formats=frozenset()), WISH, "makes no picture format"),
        (
            Capabilities(backgrounds=frozenset({"opaque"})),
            replace(WISH, background="transparent"),
            "cannot make a transparent background",
        ),
        (Capabilities(), replace(WISH, references=1), "takes at most 0 references"),
        (
            Capabilities(references_max=1),
            replace(WISH, references=1, mask=True),
            "cannot use a mask",
        ),
        (Capabilities(backgrounds=frozenset()), replace(WISH, background="auto"), None),
    ],
)
def test_what_an_offer_cannot_do_is_known_before_the_call(
    capabilities: Capabilities, wish: Wish, reason: str | None
) -> None:
    assert cannot(capabilities, wish) == reason


# --- preferences ---

UPSTREAMS = ("a", "b", "c", "d")
Shelf = list[tuple[int, int, float | None]]
"""Cost, free slots and usual duration of upstreams a, b, c and d, all callable."""
names = st.sampled_from([*UPSTREAMS, *(f"{u}/gpt-image-2" for u in UPSTREAMS)])
lists = st.none() | st.lists(names, min_size=1, max_size=5).map(tuple)
shelves = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.none() | st.floats(1, 200_000)),
    min_size=4,
    max_size=4,
)
preferences = st.builds(
    Preferences,
    only=lists,
    ignore=lists,
    order=lists,
    sort=st.none() | st.sampled_from(Sort),
)


def ranked(shelf: Shelf, wanted: Preferences) -> tuple[Candidate, ...]:
    priced = [(offer(u), shelf[i][0]) for i, u in enumerate(UPSTREAMS)]
    health = {
        f"{u}/gpt-image-2": Health(slots_free=shelf[i][1], usual_ms=shelf[i][2])
        for i, u in enumerate(UPSTREAMS)
    }
    decision = decide(WISH, priced, health, NOW, preferences=wanted)
    assert {c.offer.upstream for c in decision.all} == {*UPSTREAMS}
    return decision.ranked


def allows(wanted: Preferences, upstream: str) -> bool:
    both = {upstream, f"{upstream}/gpt-image-2"}
    kept = wanted.only is None or bool(both & {*wanted.only})
    return kept and not both & {*(wanted.ignore or ())}


@given(shelves, preferences)
def test_what_is_tried_is_an_order_of_just_those_that_are_allowed(
    shelf: Shelf, wanted: Preferences
) -> None:
    tried = [c.offer.upstream for c in ranked(shelf, wanted)]

    assert sorted(tried) == [u for u in UPSTREAMS if allows(wanted, u)]


@given(shelves, lists, lists, st.sampled_from([None, Sort.PRICE]))
def test_by_price_the_cheapest_of_the_allowed_goes_first(
    shelf: Shelf,
    only: tuple[str, ...] | None,
    ignore: tuple[str, ...] | None,
    sort: Sort | None,
) -> None:
    tried = ranked(shelf, Preferences(only=only, ignore=ignore, sort=sort))

    costs = [c.cost_nanousd for c in tried]
    assert costs == sorted(costs, key=lambda cost: cost or 0)


@given(shelves, preferences)
def test_the_named_order_is_kept_before_anything_else(
    shelf: Shelf, wanted: Preferences
) -> None:
    tried = [c.offer.upstream for c in ranked(shelf, wanted)]

    order = wanted.order or ()
    upstreams = list(dict.fromkeys(name.partition("/")[0] for name in order))
    named = [u for u in upstreams if allows(wanted, u)]
    assert tried[: len(named)] == named


@given(shelves, st.sampled_from(Sort))
def test_the_rest_goes_by_the_sort_and_equals_by_the_price(
    shelf: Shelf, sort: Sort
) -> None:
    def worth(candidate: Candidate) -> tuple[float, int]:
        cost, slots, usual_ms = shelf[UPSTREAMS.index(candidate.offer.upstream)]
        by_time = float("inf") if usual_ms is None else usual_ms
        by = {Sort.PRICE: 0.0, Sort.LATENCY: by_time, Sort.THROUGHPUT: -float(slots)}
        return by[sort], cost

    tried = ranked(shelf, Preferences(sort=sort))

    assert [worth(c) for c in tried] == sorted(map(worth, tried))


def test_of_the_unknown_ones_the_cheapest_goes_first_after_the_known() -> None:
    shelf: Shelf = [(1, 1, None), (9, 1, 80_000.0), (2, 1, None), (8, 1, 20_000.0)]

    tried = ranked(shelf, Preferences(sort=Sort.LATENCY))

    assert [c.offer.upstream for c in tried] == ["d", "b", "a", "c"]


def test_what_preferences_leave_out_says_which_one_did_it_and_is_not_waited_for() -> (
    None
):
    health = {"b/gpt-image-2": Health(state=BreakerState.OPEN, retry_at_ms=9_000)}
    priced = [(offer(u), 1) for u in ("a", "b", "c")]
    wanted = Preferences(only=("a", "c/gpt-image-2"), ignore=("c",))

    decision = decide(WISH, priced, health, NOW, preferences=wanted)

    assert {c.offer.upstream: c.reason for c in decision.all} == {
        "a": "",
        "b": "left out by routing.only",
        "c": "left out by routing.ignore",
    }
    assert decision.soonest_retry_ms is None


def test_a_drained_upstream_takes_nothing_new_and_may_come_back() -> None:
    moment = replace(NOW, drained=frozenset({"a"}))

    decision = decide(WISH, [(offer("a"), 1)], {}, moment)

    assert [c.reason for c in decision.left_out] == ["drained"]
    assert decision.may_return


def test_what_is_said_first_counts_field_by_field() -> None:
    header = Preferences(sort=Sort.LATENCY)
    body = Preferences(sort=Sort.PRICE, only=("a",))
    key = Preferences(only=("b",), allow_fallbacks=False)

    assert header.over(body).over(key) == Preferences(
        only=("a",), sort=Sort.LATENCY, allow_fallbacks=False
    )


def test_the_soonest_return_is_known() -> None:
    health = {
        "a/gpt-image-2": Health(state=BreakerState.OPEN, retry_at_ms=9_000),
        "b/gpt-image-2": Health(state=BreakerState.PAUSED, retry_at_ms=4_000),
    }

    decision = decide(WISH, [(offer("a"), 1), (offer("b"), 1)], health, NOW)

    assert decision.soonest_retry_ms == 4_000


def test_five_requests_earn_one_further_attempt() -> None:
    budget = RetryBudget(tokens=0.0, at_ms=0)
    for _ in range(4):
        budget = earned(budget, 0)
    assert spent(budget, 0) is None

    assert spent(earned(budget, 0), 0) is not None


def test_three_further_attempts_in_ten_seconds_are_always_there() -> None:
    budget: RetryBudget | None = RetryBudget(tokens=0.0, at_ms=0)
    taken = 0
    while budget is not None:
        budget = spent(budget, 10_000)
        taken += budget is not None

    assert taken == 3


def test_second_purchases_stay_within_one_percent_of_the_spend() -> None:
    assert may_rebuy(RiskBook(REBUYS_ALWAYS - 1, 10**12, 0), 1)
    assert may_rebuy(RiskBook(REBUYS_ALWAYS, 60, 10_000), 40)
    assert not may_rebuy(RiskBook(REBUYS_ALWAYS, 60, 10_000), 41)
