"""Simulates years of outages, and prints what clients and the operator saw of them.

The gateway's own dispatcher, breakers, routing and ledger rules run on a clock on which
no time passes. The same seed gives the same events, to the byte. Every run is a process
of its own, so that all cores are used.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Table
from bench.simulation.hours import (
    CHEAP,
    CHEAP_NANOUSD,
    DEAD_S,
    DEAR,
    Recovery,
    all_fail,
    calls_at,
    kill,
    moderated,
    recover,
    resets,
)
from bench.simulation.plot import Curve, Row, draw
from bench.simulation.scenes import years
from bench.simulation.weather import Trouble
from bench.simulation.world import Report, simulate
from gateway.core.limits import REBUYS_ALWAYS

DAYS = 365.0
SEEDS = 5
SHORT = 0.1
"""Share of the days that the less important stretches are given."""
BUSY_PER_S = 20.0
STORM_PER_S = 50.0
HOLE_PER_S = (5.0, 20.0)
RESET_REQUESTS = 11_000
SPENT_NANOUSD = 50_000 * CHEAP_NANOUSD
POINT = 0.0001
PLOT = Path("docs/uptime.svg")


@dataclass(frozen=True, slots=True)
class Stretch:
    """A set-up that is simulated for long, once per seed."""

    name: str
    upstreams: int
    share_of_days: float = 1.0
    patient: bool = False
    shared_share: float = 0.0
    each_at_least: float = 0.0
    mean_at_least: float = 0.0
    mean_below: float = 1.0
    oracle_within: float = 1.0


STRETCHES = (
    Stretch(
        "two upstreams",
        2,
        each_at_least=0.999,
        mean_at_least=0.9997,
        oracle_within=2 * POINT,
    ),
    Stretch("three upstreams", 3, each_at_least=0.9999),
    Stretch("no failover (control)", 1, SHORT, mean_below=0.992),
    Stretch("two upstreams, async", 2, SHORT, patient=True),
    Stretch("two, 0.05 % in common", 2, SHORT, shared_share=0.0005),
)


def played(
    stretch: Stretch, seed: int, days: float, logs: Path | None = None
) -> Report:
    """Simulate one stretch with one seed; its events go to a file in ``logs``."""
    scene = years(
        seed,
        days * stretch.share_of_days,
        stretch.upstreams,
        patient=stretch.patient,
        shared_share=stretch.shared_share,
    )
    name = re.sub("[^a-z0-9]+", "-", stretch.name.lower()).strip("-")
    return simulate(scene, logs and logs / f"{name}-{seed}.log")


def measure_years(
    pool: ProcessPoolExecutor, seeds: Sequence[int], days: float, logs: Path | None
) -> list[Row]:
    """Play all stretches at once, and tell of each as soon as it is over."""
    futures = [
        [pool.submit(played, stretch, seed, days, logs) for seed in seeds]
        for stretch in STRETCHES
    ]
    rows = []
    for stretch, runs in zip(STRETCHES, futures, strict=True):
        table = Table(f"{stretch.name}, {days * stretch.share_of_days:g} days each")
        reports = [run.result() for run in runs]
        for seed, report in zip(seeds, reports, strict=True):
            tell(table, seed, report)
        tell_all(table, stretch, reports)
        table.end()
        rows.append(
            Row(
                stretch.name,
                [report.availability for report in reports],
                [report.oracle for report in reports],
            )
        )
    return rows


def tell(table: Table, seed: int, report: Report) -> None:
    """Print what was seen with one seed."""
    down = " ".join(f"{1 - share:.2%}" for share in report.share_down)
    table.line(f"seed {seed}: requests; upstreams well", f"{report.requests:,}; {down}")
    found = f"{report.availability:.4%} / {report.oracle:.4%}"
    table.line("  served / by an oracle", found)
    errors = ", ".join(f"{n} {code}" for code, n in report.errors.most_common())
    table.line(f"  errors: {errors or 'none'}", f"{report.errors.total():,}")
    table.line("  attempts per request", f"{report.attempts / report.requests:.4f}")
    per_million = 1e6 / report.requests
    twice = (
        f"{report.rebuys * per_million:,.0f} / {report.bought_twice * per_million:,.0f}"
    )
    table.line("  bought again / bought twice, per million", twice)
    always = report.cost_nanousd / report.cheapest_nanousd
    oracle = report.cost_nanousd / report.oracle_nanousd
    table.line(
        "  cost / always at the cheapest, / an oracle", f"{always:.4f}, {oracle:.4f}"
    )
    table.line("  first bad call to open, p50 / p95", _times(report.detected_s))
    table.line("  end of outage to traffic back, p50 / p95", _times(report.returned_s))
    table.line("  SHA-256 of the events", report.digest[:16])


def tell_all(table: Table, stretch: Stretch, reports: Sequence[Report]) -> None:
    """Print what all seeds together must show."""
    shares = [report.availability for report in reports]
    behind = max(report.oracle - report.availability for report in reports)
    mean = statistics.mean(shares)
    worst, best = min(shares), max(shares)
    if stretch.each_at_least:
        table.share_at_least("every seed: served", worst, stretch.each_at_least)
    else:
        table.line("every seed: served", f"{worst:.4%} to {best:.4%}")
    if stretch.mean_at_least:
        table.share_at_least("mean: served", mean, stretch.mean_at_least)
    else:
        table.line("mean: served", f"{mean:.4%}")
    if stretch.mean_below < 1:
        limit = 100 * stretch.mean_below
        table.at_most("mean: served", 100 * mean, limit, "%", places=2)
    if stretch.oracle_within < 1:
        within = stretch.oracle_within * 100
        table.at_most(
            "behind the oracle, at most", behind * 100, within, "points", places=4
        )
    table.none_of("clients billed twice", sum(r.billed_twice for r in reports))
    table.none_of("drifts of the audit", sum(len(r.drifts) for r in reports))
    table.none_of("holds left open", sum(r.holds_open for r in reports))
    short = sum(r.billed_by_upstreams_nanousd > r.cost_nanousd for r in reports)
    table.none_of("seeds in which upstreams billed more than was booked", short)


def measure_hours(pool: ProcessPoolExecutor, seed: int) -> Curve:
    """Play the short stretches, and tell of them."""
    sudden = [
        (trouble, pool.submit(kill, seed, BUSY_PER_S, trouble))
        for trouble in (Trouble.REFUSES, Trouble.CRASHES)
    ]
    holes = [
        (rate, pool.submit(kill, seed, rate, Trouble.HANGS)) for rate in HOLE_PER_S
    ]
    ways = [
        (trouble, pool.submit(recover, seed, BUSY_PER_S, trouble))
        for trouble in (Trouble.REFUSES, Trouble.CRASHES, Trouble.HANGS)
    ]
    storm = pool.submit(all_fail, seed, STORM_PER_S)
    policy = pool.submit(moderated, seed, 1_000)
    cuts = [
        (spent, pool.submit(resets, seed, RESET_REQUESTS, spent))
        for spent in (0, SPENT_NANOUSD)
    ]

    table = Table("one upstream dies for 5 minutes at 20 requests/s")
    for trouble, future in sudden:
        dead = future.result()
        table.none_of(f"{trouble.value}: clients with an error", dead.errors)
        allowed = 5.0 + dead.in_flight
        table.at_most("  calls to it before a probe", dead.calls, allowed, "calls")
        table.at_most("  first fallback after", dead.first_fallback_s, 1.0, "s")
        table.line("  bought again", f"{dead.report.rebuys:,}")
    for rate, hole in holes:
        stuck = hole.result()
        name = f"black hole at {rate:g}/s: first stuck call to open"
        table.at_most(name, stuck.opened_s, 92.0, "s")
        table.line(
            "  requests stuck in it / with an error", f"{stuck.calls} / {stuck.errors}"
        )
    table.end()
    curve = _tell_ways(ways)
    _tell_rest(storm.result(), policy.result(), cuts)
    return curve


def _tell_ways(ways: Sequence[tuple[Trouble, Future[Recovery]]]) -> Curve:
    table = Table("and comes back")
    shares: tuple[tuple[float, float], ...] = ()
    for trouble, future in ways:
        way = future.result()
        shares = shares or way.shares
        table.at_most(f"{trouble.value}: probes in flight", way.probes_at_once, 1, "")
        table.at_most("  probes in the outage", way.probes, 10, "")
        load = way.first_load * 100
        table.at_most("  load in the first 10 s after closing", load, 25, "% of normal")
        table.at_most("  95 % of traffic back after closing", way.back_s, 120, "s")
        table.line("  end of the outage to closing", f"{way.closed_s:.0f} s")
    table.end()
    return Curve(shares, DEAD_S)


def _tell_rest(
    storm: Report, policy: Report, cuts: Sequence[tuple[int, Future[Report]]]
) -> None:
    table = Table("failures that must not spread")
    each = storm.attempts / storm.requests
    table.at_most("all fail at 50/s: attempts per request", each, 1.25, "", places=2)
    table.line(
        "moderation: calls at the one that refuses", f"{calls_at(policy, CHEAP):,}"
    )
    table.none_of("  calls at a second upstream", calls_at(policy, DEAR))
    for spent, future in cuts:
        report = future.result()
        lost = report.rebuys + report.errors.total()
        table.line(
            f"resets after send, {spent / 1e9:,.0f} USD spent before", f"{lost:,}"
        )
        table.none_of("  clients billed twice", report.billed_twice)
        table.none_of(
            "  drifts, holds left open", len(report.drifts) + report.holds_open
        )
        spend = spent + report.cost_nanousd
        cap = max(REBUYS_ALWAYS, spend // 100 // CHEAP_NANOUSD)
        table.at_most("  bought again", report.rebuys, cap, "")
        table.line("  failed and not charged", f"{report.errors.total():,}")
    table.end()


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    p50, p95 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
    return f"{p50:,.0f} / {p95:,.0f} s, {len(ordered)} outages"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--days", type=float, default=DAYS)
    options.add_argument("--seeds", type=int, default=SEEDS)
    options.add_argument("--first-seed", type=int, default=1)
    options.add_argument("--workers", type=int, default=os.cpu_count())
    options.add_argument("--plot", type=Path, help=f"draw the figures, as in {PLOT}")
    options.add_argument("--logs", type=Path, help="folder for the events of each run")
    chosen = options.parse_args()
    if chosen.logs is not None:
        chosen.logs.mkdir(parents=True, exist_ok=True)
    begun_s = time.monotonic()
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    with ProcessPoolExecutor(chosen.workers) as pool:
        curve = measure_hours(pool, chosen.first_seed)
        rows = measure_years(pool, seeds, chosen.days, chosen.logs)
    if chosen.plot is not None:
        draw(chosen.plot, rows, curve)
    print(f"\n{(time.monotonic() - begun_s) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
