"""No float, and no division that makes one, where money is counted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "gateway"
MONEY = [
    *("core/ledger.py", "core/money.py", "core/pricing.py", "core/terms.py"),
    *("core/catalogue.py", "core/invoices.py", "core/statements.py"),
    *("core/tables.py", "core/litellm.py"),
    *("flows/credits.py", "flows/margin.py", "flows/statements.py"),
    *("adapters/sql/ledger.py", "adapters/sql/tenants.py", "adapters/sql/reports.py"),
    *("adapters/sql/tasks.py", "adapters/sql/trail.py"),
]
ALLOWED = {("core/statements.py", "now_ms / 1000")}
"""A time, which is not money."""


def floats(source: str) -> list[str]:
    """Name what makes a float in a program."""
    found = []
    for node in ast.walk(ast.parse(source)):
        makes = (
            (isinstance(node, ast.Constant) and isinstance(node.value, float))
            or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div))
            or (isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div))
            or (isinstance(node, ast.Name) and node.id in {"float", "round"})
        )
        if makes:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("name", MONEY)
def test_money_is_never_a_float(name: str) -> None:
    found = floats((ROOT / name).read_text())

    assert [each for each in found if (name, each) not in ALLOWED] == []


def test_the_check_sees_floats() -> None:
    assert floats("a = 1.5\nb = a / 2\nb /= 2\nfloat('1')\nround(b)") == [
        "b /= 2",
        "1.5",
        "a / 2",
        "float",
        "round",
    ]
