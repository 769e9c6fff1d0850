"""What is learned of real costs, and how little one odd answer can do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.ratios import (
    LIFE_MS,
    RATIO_MAX,
    RATIO_MIN,
    RATIO_SCALE,
    SAMPLES_MIN,
    TIERS_MAX,
    Ratios,
    Sample,
    adjusted,
    believed,
    learned,
    tier_of,
)

NOW_MS = 5_000_000
TIER = "low/1K"


def after(
    ratios: Ratios, *costs: int, tier: str = TIER, now_ms: int = NOW_MS
) -> Ratios:
    """Learn costs, in percent of the estimate."""
    for cost in costs:
        ratios = learned(ratios, Sample(tier, 100, cost), now_ms)
    return ratios


def test_a_ratio_is_believed_only_after_twenty_costs() -> None:
    assert believed(after((), *[150] * (SAMPLES_MIN - 1)), NOW_MS) == {}

    ratio = believed(after((), *[150] * SAMPLES_MIN), NOW_MS)[TIER]

    assert 1_400_000 < ratio < 1_500_000


def test_every_tier_learns_for_itself() -> None:
    ratios = after(after((), *[150] * 150), *[80] * 150, tier="high/4K")

    assert believed(ratios, NOW_MS) == {TIER: 1_500_000, "high/4K": 800_000}


@pytest.mark.parametrize(
    ("quality", "size", "tier"),
    [
        ("low", (1024, 1024), "low/1K"),
        ("high", (3840, 2160), "high/4K"),
        ("auto", None, "auto/auto"),
    ],
)
def test_a_tier_is_a_quality_and_a_class_of_sizes(
    quality: str, size: tuple[int, int] | None, tier: str
) -> None:
    assert tier_of(quality, size) == tier


COSTS = st.integers(0, 10**12)
LESSONS = st.lists(st.tuples(COSTS, st.integers(0, LIFE_MS)), max_size=60)


@given(LESSONS)
def test_a_ratio_stays_between_a_half_and_two(lessons: list[tuple[int, int]]) -> None:
    ratios: Ratios = ()
    now_ms = 0
    for cost, later_ms in lessons:
        now_ms += later_ms
        ratios = after(ratios, cost, now_ms=now_ms)

        assert all(RATIO_MIN <= ratio.millionths <= RATIO_MAX for ratio in ratios)
        assert {type(ratio.millionths) for ratio in ratios} == {int}


@given(st.lists(st.integers(0, 1_000), max_size=60), COSTS)
def test_one_odd_answer_moves_a_ratio_by_a_twentieth_at_most(
    usual: list[int], odd: int
) -> None:
    before = after((), *usual)
    known = before[0].millionths if before else RATIO_SCALE

    moved = after(before, odd)[0].millionths

    assert known * 29 // 30 - 1 <= moved <= known * 21 // 20


@given(COSTS)
def test_usual_answers_make_an_odd_one_good_to_the_last_millionth(odd: int) -> None:
    settled = after((), *[100] * SAMPLES_MIN)

    back = after(settled, odd, *[100] * 150)

    assert believed(back, NOW_MS) == {TIER: RATIO_SCALE}


@given(COSTS, st.integers(1, 100))
def test_an_odd_answer_alone_never_outranks_for_longer_than_a_day(
    odd: int, dearer_percent: int
) -> None:
    # The offer is ranked behind one that costs more, so nothing more is bought there
    # and nothing more is learned: only time can bring it back.
    settled = after((), *[100] * SAMPLES_MIN, odd)
    other = 1_000 + 10 * dearer_percent

    def cost(now_ms: int) -> int:
        ratio = believed(settled, now_ms).get(TIER, RATIO_SCALE)
        return adjusted(1_000, ratio)

    assert cost(NOW_MS) <= 1_050
    assert cost(NOW_MS + LIFE_MS) == 1_000 < other


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60), st.data())
def test_without_news_a_ratio_only_ever_fades_towards_one(
    costs: list[int], data: st.DataObject
) -> None:
    ratios = after((), *[100] * SAMPLES_MIN, *costs)
    sooner = data.draw(st.integers(0, LIFE_MS))
    later = data.draw(st.integers(sooner, 2 * LIFE_MS))

    def off(age_ms: int) -> int:
        return abs(
            believed(ratios, NOW_MS + age_ms).get(TIER, RATIO_SCALE) - RATIO_SCALE
        )

    assert off(later) <= off(sooner) <= off(0)
    assert off(LIFE_MS) == 0


def test_what_is_forgotten_must_be_learned_anew() -> None:
    ratios = after((), *[150] * 40)
    later_ms = NOW_MS + LIFE_MS

    assert believed(after(ratios, 150, now_ms=later_ms), later_ms) == {}


@given(st.lists(st.sampled_from([f"q{n}/1K" for n in range(100)]), max_size=200))
def test_no_more_tiers_are_kept_than_the_limit_and_the_latest_stay(
    tiers: list[str],
) -> None:
    ratios: Ratios = ()
    for place, tier in enumerate(tiers):
        ratios = after(ratios, 100, tier=tier, now_ms=NOW_MS + place)

    newest = list(dict.fromkeys(reversed(tiers)))[:TIERS_MAX]
    assert {ratio.tier for ratio in ratios} == set(newest)
    assert len(ratios) <= TIERS_MAX


@given(st.integers(0, 10**15), st.integers(RATIO_MIN, RATIO_MAX))
def test_an_estimate_is_adjusted_upwards_to_a_whole_nano(
    nanousd: int, millionths: int
) -> None:
    exact = nanousd * millionths

    assert 0 <= adjusted(nanousd, millionths) * RATIO_SCALE - exact < RATIO_SCALE
