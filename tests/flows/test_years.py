"""What the simulation of years shows, on a small scale: `make simulate` in short."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from bench.simulation.hours import (
    CHEAP,
    CHEAP_NANOUSD,
    DEAR,
    all_fail,
    calls_at,
    kill,
    moderated,
    recover,
    resets,
)
from bench.simulation.scenes import years
from bench.simulation.weather import Climate, Outage, Trouble, Weather, fate, outages
from bench.simulation.world import Report, Scene, simulate
from gateway.core.limits import REBUYS_ALWAYS
from providers.kit.contract import FailureKind

STORMY = Climate(share=0.1, short_s=60.0, long_s=600.0)


def stormy(seed: int, upstreams: int, *, hours: float = 6) -> Scene:
    """A few hours with an outage in every twenty minutes or so.

    Enough was spent before for second purchases after all of them.
    """
    scene = years(seed, hours / 24, upstreams)
    return replace(
        scene,
        spent_nanousd=10 * scene.spent_nanousd,
        places=tuple(
            replace(
                place, outages=outages(STORMY, scene.length_s, Random(f"{seed} {n}"))
            )
            for n, place in enumerate(scene.places)
        ),
    )


def the_books_are_right(report: Report) -> bool:
    right = not report.drifts and not report.holds_open and not report.billed_twice
    return right and report.billed_by_upstreams_nanousd <= report.cost_nanousd


def events_of(scene: Scene, log: Path) -> bytes:
    report = simulate(scene, log)
    events = log.read_bytes()
    assert hashlib.sha256(events).hexdigest() == report.digest
    return events


def test_the_same_seed_tells_the_same_story_to_the_byte(tmp_path: Path) -> None:
    log = tmp_path / "events.log"
    once, again = [events_of(stormy(1, 2, hours=3), log) for _ in range(2)]
    other = events_of(stormy(2, 2, hours=1), log)

    assert b" breaker " in once
    assert once == again
    assert not once.startswith(other)


def test_with_a_second_upstream_most_outages_are_not_seen() -> None:
    with_two, alone = simulate(stormy(3, 2)), simulate(stormy(3, 1))

    assert alone.availability < 0.95
    assert with_two.availability > 0.98
    assert with_two.oracle - with_two.availability < 0.01
    assert the_books_are_right(with_two)
    assert the_books_are_right(alone)


@pytest.mark.parametrize("trouble", [Trouble.REFUSES, Trouble.CRASHES])
def test_a_dead_upstream_fails_no_client(trouble: Trouble) -> None:
    dead = kill(1, 5.0, trouble, dead_s=60.0)

    assert dead.errors == 0
    assert dead.calls <= 5 + dead.in_flight
    assert dead.first_fallback_s <= 1
    assert the_books_are_right(dead.report)


def test_a_black_hole_is_seen_before_its_calls_come_back() -> None:
    assert kill(1, 5.0, Trouble.HANGS, dead_s=120.0).opened_s <= 92


def test_traffic_comes_back_step_by_step() -> None:
    way = recover(1, 4.0, Trouble.CRASHES, dead_s=30.0)

    assert way.probes_at_once == 1
    assert way.probes <= 10
    assert way.first_load <= 0.25
    assert way.back_s <= 120


def test_where_all_fail_the_load_is_not_multiplied() -> None:
    report = all_fail(1, 50.0, 20.0)

    assert report.served == 0
    assert report.attempts <= 1.25 * report.requests


def test_moderation_is_never_asked_elsewhere() -> None:
    report = moderated(1, 100)

    assert report.errors["moderation_blocked"] == report.requests
    assert calls_at(report, CHEAP) == report.requests
    assert calls_at(report, DEAR) == 0


def test_lost_answers_are_bought_again_within_the_cap_and_billed_once() -> None:
    spent = 3_000 * CHEAP_NANOUSD
    report = resets(1, 1_000, spent)

    cap = (spent + report.cost_nanousd) // 100 // CHEAP_NANOUSD
    assert REBUYS_ALWAYS < report.rebuys <= cap
    assert report.errors.total() > 0
    assert report.bought_twice > 0
    assert the_books_are_right(report)


def test_a_call_under_way_is_cut_off_by_a_crash_and_swallowed_by_a_black_hole() -> None:
    def met(trouble: Trouble) -> tuple[float, FailureKind | None]:
        end = fate(Weather((Outage(100, 200, trouble),)), 90, 25, 0.5)
        return end.after_s, end.kind

    assert met(Trouble.CRASHES) == (10, FailureKind.TIMEOUT)
    assert met(Trouble.HANGS) == (float("inf"), None)
    assert met(Trouble.REFUSES) == (25, None)


async def test_time_goes_on_after_half_a_year() -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(300 * 86_400)

    for _ in range(100):
        await asyncio.sleep(0.1)

    assert round(loop.time() - 300 * 86_400, 3) == 10


def test_outages_take_the_share_of_the_time_that_they_should() -> None:
    length_s = 10 * 365 * 86_400.0
    weather = Weather(outages(Climate(), length_s, Random(1)))

    assert 0.008 < weather.share_down(length_s) < 0.012
