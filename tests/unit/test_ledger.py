"""Credits are neither made nor lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.ledger import (
    Balance,
    Settled,
    grant_entries,
    hold,
    settle,
    settlement_entries,
)


def test_a_hold_takes_from_what_is_available() -> None:
    assert hold(Balance(posted=100, held=30), 70) == Balance(posted=100, held=100)


def test_a_hold_is_never_more_than_what_is_there() -> None:
    assert hold(Balance(posted=100, held=30), 71) is None


@pytest.mark.parametrize(
    ("due", "after", "settled"),
    [
        pytest.param(30, Balance(70, 10, 30), Settled(30), id="cheaper than held"),
        pytest.param(40, Balance(60, 10, 40), Settled(40), id="as held"),
        pytest.param(0, Balance(100, 10, 0), Settled(0), id="failed, so free"),
        pytest.param(
            60, Balance(40, 10, 60), Settled(60), id="dearer, and it is there"
        ),
        pytest.param(95, Balance(10, 10, 90), Settled(90, 5), id="dearer than all"),
    ],
)
def test_settling_charges_what_it_really_cost(
    due: int, after: Balance, settled: Settled
) -> None:
    before = Balance(posted=100, held=50)

    assert settle(before, held=40, due=due) == (after, settled)


@pytest.mark.parametrize(
    ("held", "due"), [(0, 1), (51, 1), (40, -1)], ids=["no hold", "not held", "refund"]
)
def test_only_a_hold_that_is_there_can_be_settled(held: int, due: int) -> None:
    with pytest.raises(AssertionError):
        settle(Balance(posted=100, held=50), held=held, due=due)


@pytest.mark.parametrize(
    ("posted", "held", "spent"), [(10, 11, 0), (10, -1, 0), (10, 0, -1), (-1, 0, 0)]
)
def test_an_overdrawn_balance_cannot_be_written_down(
    posted: int, held: int, spent: int
) -> None:
    with pytest.raises(AssertionError):
        Balance(posted, held, spent)


def test_entries_leave_out_what_is_nothing() -> None:
    assert settlement_entries("t", Settled(0)) == {}
    assert settlement_entries("t", Settled(60)) == {"tenant:t": -60, "revenue": 60}
    assert settlement_entries("t", Settled(60, 5)) == {
        "tenant:t": -60,
        "absorbed": -5,
        "revenue": 65,
    }


def test_a_grant_comes_from_somewhere() -> None:
    assert grant_entries("t", 70) == {"tenant:t": 70, "grants": -70}


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**7))
def test_whatever_is_due_every_credit_is_accounted_for(
    posted: int, nanocredits: int, due: int
) -> None:
    before = Balance(posted=posted)
    holding = hold(before, nanocredits)
    if holding is None:
        assert nanocredits > posted
        return

    after, settled = settle(holding, nanocredits, due)

    assert settled.charged + settled.absorbed == due
    assert settled.absorbed == 0 or after.available == 0
    assert after.posted + after.spent == posted
    assert after.held == 0
    assert sum(settlement_entries("t", settled).values()) == 0
