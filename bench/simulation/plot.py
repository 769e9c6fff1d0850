"""Draws the figures of a simulation as one SVG file, with nothing but text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH_PX = 760
LEFT_PX, RIGHT_PX = 190, 20
ROW_PX = 34
TOP_PX = 46
CURVE_PX = 180
GAP_PX = 84
NINES_FROM, NINES_TO = 1.5, 5.5
STYLE = """<style>
svg { background: #fff; font: 12px system-ui, sans-serif; fill: #222 }
.title { font-weight: 600; font-size: 14px }
.grid { stroke: #ddd } .bar { stroke: #c33; stroke-dasharray: 4 3 }
.seed { fill: #1768ac } .oracle { fill: none; stroke: #888 }
.curve { fill: none; stroke: #1768ac; stroke-width: 2 }
.down { fill: #f6dddd }
</style>"""


@dataclass(frozen=True, slots=True)
class Row:
    """Availabilities of one set-up, per seed, with what an oracle would have had."""

    name: str
    found: Sequence[float]
    oracle: Sequence[float]


@dataclass(frozen=True, slots=True)
class Curve:
    """Share of traffic at the cheap upstream over time, dead from 0 to ``dead_s``."""

    points: Sequence[tuple[float, float]]
    dead_s: float


def draw(path: Path, rows: Sequence[Row], curve: Curve) -> None:
    """Write the plot."""
    curve_top = TOP_PX + ROW_PX * len(rows) + GAP_PX
    height = curve_top + CURVE_PX + 46
    about = "Simulated availability, and the way back after an outage"
    box = f'width="{WIDTH_PX}" height="{height}" viewBox="0 0 {WIDTH_PX} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>',
        f"<title>{about}</title>",
        STYLE,
        *_availability(rows),
        *_way_back(curve, curve_top),
        "</svg>",
    ]
    path.write_text("\n".join(parts) + "\n")


def _availability(rows: Sequence[Row]) -> Iterable[str]:
    bottom = TOP_PX + ROW_PX * len(rows)
    yield _text(10, 22, "Requests served, one dot per seed (rings: an oracle)", "title")
    for share in (0.9, 0.99, 0.999, 0.9999, 0.99999):
        x = _nines_px(share)
        if LEFT_PX <= x <= WIDTH_PX - RIGHT_PX:
            kind = "bar" if share == 0.999 else "grid"
            yield _line(x, TOP_PX - 8, x, bottom, kind)
            yield _text(x, bottom + 18, f"{share * 100:.5g} %", middle=True)
    for place, row in enumerate(rows):
        y = TOP_PX + ROW_PX * (place + 0.5)
        yield _text(10, y + 4, row.name)
        for share in row.oracle:
            yield _dot(_nines_px(share), y, 6, "oracle")
        for share in row.found:
            yield _dot(_nines_px(share), y, 4, "seed")


def _way_back(curve: Curve, top: float) -> Iterable[str]:
    bottom = top + CURVE_PX
    first, last = curve.points[0][0], curve.points[-1][0]
    wide = WIDTH_PX - LEFT_PX - RIGHT_PX

    def at(seconds: float) -> float:
        return LEFT_PX + wide * (seconds - first) / (last - first)

    title = "Share of requests that begin at the cheapest upstream, dead in the red"
    yield _text(10, top - 16, title, "title")
    yield (
        f'<rect class="down" x="{at(0):.1f}" y="{top}" '
        f'width="{at(curve.dead_s) - at(0):.1f}" height="{CURVE_PX}"/>'
    )
    for share in (0.0, 0.5, 1.0):
        y = bottom - CURVE_PX * share
        yield _line(LEFT_PX, y, WIDTH_PX - RIGHT_PX, y, "grid")
        yield _text(LEFT_PX - 44, y + 4, f"{share:.0%}")
    for seconds in range(0, int(last) + 1, 120):
        yield _text(at(seconds), bottom + 18, f"{seconds} s", middle=True)
    points = " ".join(
        f"{at(seconds):.1f},{bottom - CURVE_PX * share:.1f}"
        for seconds, share in curve.points
    )
    yield f'<polyline class="curve" points="{points}"/>'


def _nines_px(share: float) -> float:
    # Each further nine takes the same room.
    nines = min(NINES_TO, -math.log10(max(1e-9, 1 - share)))
    wide = WIDTH_PX - LEFT_PX - RIGHT_PX
    return LEFT_PX + wide * (nines - NINES_FROM) / (NINES_TO - NINES_FROM)


def _text(
    x: float, y: float, text: str, kind: str = "", *, middle: bool = False
) -> str:
    looks = f' class="{kind}"' if kind else ""
    looks += ' text-anchor="middle"' if middle else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{looks}>{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _dot(x: float, y: float, radius: int, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
