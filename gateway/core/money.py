"""Credits and dollars as whole numbers of 1e-9, read and written as decimals."""

from __future__ import annotations

import re
from fractions import Fraction

NANO = 1_000_000_000
NANO_MAX = 2**63 - 1
DECIMALS_MAX = 9

_DECIMAL = re.compile(r"(?P<whole>\d{1,10})(?:\.(?P<part>\d{1,9}))?")


def parse_nano(text: str) -> int:
    """Read an amount such as ``12.5`` as a whole number of 1e-9.

    Only plain decimals: no sign, exponent, separator, space, NaN.

    Raises:
        ValueError: not such a decimal, over 9 decimals, or over int64.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None or not text.isascii():
        raise ValueError(
            "must be a plain decimal such as 12.5, "
            f"not negative, with at most {DECIMALS_MAX} decimals"
        )
    nano = int(match["whole"]) * NANO + int((match["part"] or "").ljust(9, "0"))
    if nano > NANO_MAX:
        raise ValueError(f"must be at most {decimal_text(NANO_MAX)}")
    return nano


def decimal_text(nano: int) -> str:
    """Write a whole number of 1e-9 as the shortest exact decimal."""
    sign = "-" if nano < 0 else ""
    whole, part = divmod(abs(nano), NANO)
    return f"{sign}{whole}.{part:09}".rstrip("0").rstrip(".")


def usd_from_credits(nanocredits: int, nanocredits_per_usd: int) -> int:
    """Convert nano-credits to nano-dollars, rounded half up: for display only."""
    exact = Fraction(nanocredits * NANO, nanocredits_per_usd)
    return int(exact + Fraction(1, 2)) if exact >= 0 else -int(Fraction(1, 2) - exact)
