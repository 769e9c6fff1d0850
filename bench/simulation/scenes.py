"""Years of simulated time, and what each must show."""

from __future__ import annotations

from random import Random

from bench.simulation.weather import DAY_S, Climate, Outage, outages, together
from bench.simulation.world import Place, Scene

PICTURE_NANOUSD = (2_000_000, 2_400_000, 3_000_000)
"""What a picture costs at the cheapest upstream, the next, the dearest: 0.2 to 0.3
cents."""
YEARS_RATE_PER_S = 0.05
FAIR = Climate()


def years(
    seed: int,
    days: float,
    upstreams: int,
    *,
    patient: bool = False,
    shared_share: float = 0.0,
) -> Scene:
    """Some upstreams that are each well 99.0 % of the time, for a year or so.

    One upstream alone is the control: nothing to fall back on. ``shared_share`` of the
    time all of them are down at once, as part of their 1 %. A day went before it all.
    """
    length_s = days * DAY_S
    own = Climate(share=FAIR.share - shared_share)
    shared: tuple[Outage, ...] = ()
    if shared_share:
        dice = Random(f"{seed} shared weather")
        shared = outages(Climate(share=shared_share), length_s, dice)
    places = []
    for number, cost_nanousd in enumerate(PICTURE_NANOUSD[:upstreams]):
        dice = Random(f"{seed} weather {number}")
        weather = together(outages(own, length_s, dice), shared)
        places.append(Place(f"upstream-{number + 1}", cost_nanousd, weather))
    return Scene(
        seed,
        length_s,
        YEARS_RATE_PER_S,
        tuple(places),
        patient=patient,
        spent_nanousd=round(YEARS_RATE_PER_S * DAY_S) * PICTURE_NANOUSD[0],
    )
