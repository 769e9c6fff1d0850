"""Tables of figures, each beside what it should be. A figure never fails a run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

MIB = 1024 * 1024
NAME_CHARS = 58
FOUND_CHARS = 30


@dataclass
class Table:
    """Prints each figure as soon as it is known."""

    title: str
    _short: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"\n== {self.title} ({where()})", flush=True)

    def line(self, name: str, found: str) -> None:
        """Print a figure that has no target."""
        print(f"{name:<{NAME_CHARS}} {found:>{FOUND_CHARS}}", flush=True)

    def at_most(
        self, name: str, found: float, limit: float, unit: str, *, places: int = 1
    ) -> None:
        """Print a figure and the most that it should be."""
        fits = found <= limit
        verdict = "ok" if fits else "OVER"
        text = f"{found:,.{places}f} {unit}"
        wanted = f"at most {limit:,.{places}f} {unit}"
        print(
            f"{name:<{NAME_CHARS}} {text:>{FOUND_CHARS}}   {wanted}: {verdict}",
            flush=True,
        )
        self._short += [] if fits else [name]

    def at_least(self, name: str, found: float, limit: float) -> None:
        """Print a share and the least that it should be."""
        fits = found >= limit
        verdict = "ok" if fits else "UNDER"
        print(
            f"{name:<{NAME_CHARS}} {found:>{FOUND_CHARS}.4f}   "
            f"at least {limit:g}: {verdict}",
            flush=True,
        )
        self._short += [] if fits else [name]

    def share_at_least(self, name: str, found: float, limit: float) -> None:
        """Print a share, from 0 to 1, and the least that it should be."""
        fits = found >= limit
        verdict = "ok" if fits else "UNDER"
        wanted = f"at least {limit:.2%}"
        print(
            f"{name:<{NAME_CHARS}} {found:>{FOUND_CHARS}.4%}   {wanted}: {verdict}",
            flush=True,
        )
        self._short += [] if fits else [name]

    def all_of(self, name: str, found: int, wanted: int) -> None:
        """Print how many of those that should have gone well did."""
        self._count(name, found, wanted, "of")

    def none_of(self, name: str, found: int) -> None:
        """Print how many there are of what should not be there."""
        self._count(name, found, 0, "should be")

    def end(self) -> None:
        """Say what fell short, and how busy the machine was by then."""
        missed = ", ".join(self._short) or "nothing"
        print(f"-- off its target: {missed} (load {load()})", flush=True)

    def _count(self, name: str, found: int, wanted: int, word: str) -> None:
        verdict = "ok" if found == wanted else "WRONG"
        text = f"{found} {word} {wanted}"
        print(f"{name:<{NAME_CHARS}} {text:>{FOUND_CHARS}}   {verdict}", flush=True)
        self._short += [] if found == wanted else [name]


def where() -> str:
    """Say when and on what the figures were taken."""
    day = time.strftime("%Y-%m-%d %H:%M")
    return f"{day}, {os.cpu_count()} cores, load {load()}"


def load() -> str:
    """Tell the load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"
