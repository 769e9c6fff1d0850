"""Amounts are exact, and only what is plainly an amount is read as one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.money import (
    NANO,
    NANO_MAX,
    decimal_text,
    parse_nano,
    usd_from_credits,
)

PER_USD = 68 * NANO


@pytest.mark.parametrize(
    ("text", "nano"),
    [
        ("0", 0),
        ("12", 12 * NANO),
        ("12.5", 12_500_000_000),
        ("0.000000001", 1),
        ("007.10", 7_100_000_000),
        ("0.113832", 113_832_000),
        ("9223372036.854775807", NANO_MAX),
    ],
)
def test_a_plain_decimal_is_read_exactly(text: str, nano: int) -> None:
    assert parse_nano(text) == nano


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "+1",
        "1e3",
        "1_000",
        "1,5",
        " 1",
        "1\n",
        ".5",
        "5.",
        "0.0000000001",
        "NaN",
        "Infinity",
        "0x10",
        "١٢",
        "9223372036.854775808",
        "99999999999",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_nano(text)


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0"),
        (10 * NANO, "10"),
        (100, "0.0000001"),
        (12_500_000_000, "12.5"),
        (-1, "-0.000000001"),
        (-100 * NANO, "-100"),
        (NANO_MAX, "9223372036.854775807"),
    ],
)
def test_an_amount_is_written_as_its_shortest_decimal(nano: int, text: str) -> None:
    assert decimal_text(nano) == text


@given(st.integers(0, NANO_MAX))
def test_what_is_written_reads_back_the_same(nano: int) -> None:
    assert parse_nano(decimal_text(nano)) == nano


@pytest.mark.parametrize(
    ("nanocredits", "nanousd"),
    [
        (68 * NANO, NANO),
        (-68 * NANO, -NANO),
        (34, 1),  # half a nano-dollar: up
        (33, 0),
        (-34, -1),
        (-33, 0),
        (1_836_000, 27_000),
        (0, 0),
    ],
)
def test_credits_in_dollars_are_rounded_half_up(nanocredits: int, nanousd: int) -> None:
    assert usd_from_credits(nanocredits, PER_USD) == nanousd
