"""Short stretches in which one thing happens to an upstream, looked at call by call."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.simulation.watch import Call
from bench.simulation.weather import Outage, Trouble
from bench.simulation.world import Place, Report, Scene, simulate
from providers.kit.contract import FailureKind

CHEAP, DEAR = "cheap", "dear"
CHEAP_NANOUSD, DEAR_NANOUSD = 2_000_000, 2_400_000
WARM_UP_S = 120.0
WORK_MOST_S = 150.0
"""No call takes longer by itself: what is lost here is lost by what happens."""
NORMAL_WINDOW_S = 10.0
BACK_WINDOW_S = 60.0
DEAD_S = 300.0
WATCHED_S = 600.0
RESETS_PER_S = 5.0
RESETS_SHARE = 0.1
TICK_S = 0.002
"""The gateway's clock is rounded to milliseconds, that of the upstreams is not."""


def two(
    seed: int, rate_per_s: float, length_s: float, *troubles: Outage, **more: object
) -> Scene:
    """Two upstreams, of which the cheap one gets into trouble.

    A day's worth of such traffic was paid for before.
    """
    scene = Scene(
        seed,
        length_s,
        rate_per_s,
        (
            Place(CHEAP, CHEAP_NANOUSD, troubles, failures=()),
            Place(DEAR, DEAR_NANOUSD, failures=()),
        ),
        work_most_s=WORK_MOST_S,
        spent_nanousd=round(rate_per_s * 86_400) * CHEAP_NANOUSD,
        traced=True,
    )
    return replace(scene, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Kill:
    """How a cheap upstream was left that answers no more.

    ``calls`` began there between its death and the first probe; ``in_flight`` of them
    were still out when the breaker opened. ``opened_s`` counts from the first of them.
    """

    report: Report
    calls: int
    in_flight: int
    opened_s: float
    first_fallback_s: float

    @property
    def errors(self) -> int:
        """Clients that got no picture."""
        return self.report.errors.total()


def kill(
    seed: int, rate_per_s: float, trouble: Trouble, dead_s: float = DEAD_S
) -> Kill:
    """Let the cheap upstream die for 5 minutes, under a steady load."""
    outage = Outage(WARM_UP_S, WARM_UP_S + dead_s, trouble)
    report = simulate(two(seed, rate_per_s, outage.end_s, outage))
    opened_s = _change(report, "open", outage.begin_s)
    probing_s = _change(report, "half_open", opened_s)
    met = _begun(report, CHEAP, outage.begin_s, probing_s - TICK_S)
    first_s = met[0].begin_s if met else outage.begin_s
    fallbacks = [c for c in _begun(report, DEAR, first_s, outage.end_s) if c.seq > 1]
    return Kill(
        report,
        calls=len(met),
        in_flight=sum(call.begin_s <= opened_s < call.end_s for call in met),
        opened_s=opened_s - first_s,
        first_fallback_s=fallbacks[0].begin_s - first_s if fallbacks else math.inf,
    )


@dataclass(frozen=True, slots=True)
class Recovery:
    """How traffic came back to a cheap upstream that was dead for 5 minutes.

    Shares are of the load before. ``closed_s`` counts from the end of the outage,
    ``back_s`` from the closing: from then on 95 % of a minute's requests went there.
    """

    report: Report
    probes: int
    probes_at_once: int
    closed_s: float
    first_load: float
    back_s: float
    shares: tuple[tuple[float, float], ...]
    """Share of requests that began at the cheap one, per 10 s from its death."""


def recover(
    seed: int, rate_per_s: float, trouble: Trouble, dead_s: float = DEAD_S
) -> Recovery:
    """Let the cheap upstream die for 5 minutes, and watch it come back."""
    outage = Outage(WARM_UP_S, WARM_UP_S + dead_s, trouble)
    report = simulate(two(seed, rate_per_s, outage.end_s + WATCHED_S, outage))
    opened_s = _change(report, "open", outage.begin_s)
    closed_s = _change(report, "closed", opened_s)
    probes = [
        call
        for call in _begun(report, CHEAP, opened_s, closed_s)
        if call.begin_s > opened_s
    ]
    normal = rate_per_s * NORMAL_WINDOW_S
    first = _begun(report, CHEAP, closed_s, closed_s + NORMAL_WINDOW_S)
    return Recovery(
        report,
        probes=sum(call.begin_s < outage.end_s for call in probes),
        probes_at_once=_at_once(probes),
        closed_s=closed_s - outage.end_s,
        first_load=len(first) / normal,
        back_s=_back_s(report, closed_s),
        shares=tuple(
            (float(t), _share(report, outage.begin_s + t, outage.begin_s + t + 10))
            for t in range(-60, round(dead_s + WATCHED_S) - 60, 10)
        ),
    )


def all_fail(seed: int, rate_per_s: float, length_s: float = 60.0) -> Report:
    """Let both upstreams answer 503 to everything."""
    outage = Outage(0.0, math.inf, Trouble.REFUSES)
    scene = two(seed, rate_per_s, length_s, outage)
    places = tuple(replace(place, outages=(outage,)) for place in scene.places)
    return simulate(replace(scene, places=places))


def moderated(seed: int, requests: int) -> Report:
    """Let the cheap upstream refuse every prompt."""
    outage = Outage(0.0, math.inf, Trouble.MODERATES)
    return simulate(two(seed, 1.0, float(requests), outage))


def resets(seed: int, requests: int, spent_nanousd: int) -> Report:
    """Break off one of ten answers of the cheap upstream after it has the request.

    That is too few to open its breaker, so that nothing else bounds the second buys.
    """
    length_s = requests / RESETS_PER_S
    scene = two(seed, RESETS_PER_S, length_s, spent_nanousd=spent_nanousd)
    cheap, dear = scene.places
    cheap = replace(cheap, failures=((FailureKind.TIMEOUT, RESETS_SHARE),))
    return simulate(replace(scene, places=(cheap, dear)))


def calls_at(report: Report, upstream: str) -> int:
    """Count the calls of a traced stretch that went to an upstream."""
    return sum(call.upstream == upstream for call in report.calls)


def _change(report: Report, state: str, since_s: float) -> float:
    times = (
        change.at_s
        for change in report.states
        if change.upstream == CHEAP and change.state == state
        if change.at_s >= since_s
    )
    return next(times, math.inf)


def _begun(report: Report, upstream: str, from_s: float, to_s: float) -> list[Call]:
    return [
        call
        for call in report.calls
        if call.upstream == upstream and from_s <= call.begin_s < to_s
    ]


def _at_once(calls: list[Call]) -> int:
    return max(
        (sum(c.begin_s <= call.begin_s < c.end_s for c in calls) for call in calls),
        default=0,
    )


def _share(report: Report, from_s: float, to_s: float) -> float:
    firsts = [c for c in report.calls if c.seq == 1 and from_s <= c.begin_s < to_s]
    cheap = sum(call.upstream == CHEAP for call in firsts)
    return cheap / len(firsts) if firsts else 0.0


def _back_s(report: Report, closed_s: float) -> float:
    for wait in range(0, 600, 5):
        begin_s = closed_s + wait
        if _share(report, begin_s, begin_s + BACK_WINDOW_S) >= 0.95:
            return float(wait)
    return math.inf
