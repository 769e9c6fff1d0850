"""When the process itself has too much to do, and when that is over. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAG_EVERY_MS = 100
LAG_WEIGHT = 0.2
"""Of the newest look at the event loop, ten of which are taken in a second."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where pressure begins and where it ends, and how long that has to last, in ms.

    Between ``over`` and ``under`` nothing changes: so that it does not flap.
    """

    over: float
    under: float
    lasts_ms: int


LAG_BOUNDS_MS = Bounds(over=200.0, under=100.0, lasts_ms=5_000)
MEMORY_BOUNDS = Bounds(over=0.90, under=0.80, lasts_ms=5_000)
"""As a share of the memory that the process may have."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """One signal as it stands. ``since_ms``: it has called for a change since then."""

    on: bool = False
    since_ms: int | None = None


def after(pressure: Pressure, value: float, now_ms: int, bounds: Bounds) -> Pressure:
    """Note a value of the signal."""
    calls = value < bounds.under if pressure.on else value > bounds.over
    if not calls:
        return replace(pressure, since_ms=None)
    since_ms = now_ms if pressure.since_ms is None else pressure.since_ms
    if now_ms - since_ms >= bounds.lasts_ms:
        return Pressure(on=not pressure.on)
    return replace(pressure, since_ms=since_ms)


def smoothed(lag_ms: float, new_ms: float) -> float:
    """Blend a look at the event loop's lag into those before it."""
    return lag_ms + LAG_WEIGHT * (max(0.0, new_ms) - lag_ms)
