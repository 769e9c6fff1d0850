"""A month of requests: every book says what the witnesses saw, to the nano-credit."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.month import REQUESTS, play


@pytest.mark.timeout(3_600)
def test_all_books_of_a_month_agree(tmp_path: Path, whole: bool) -> None:
    month = play(REQUESTS if whole else 800, tmp_path / "month.db")

    assert month.disagreements == []
    assert month.served > month.failed > 0
    assert month.charged_nanocredits > 0
    assert all(month.bought_nanousd.values())
    assert month.lost_nanousd > 0
