"""Hands each event to every listener, at once and in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.core.events import Event


@dataclass(frozen=True, slots=True)
class FanOut:
    """Implements ``Events``."""

    listeners: tuple[Callable[[Event], None], ...]

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self.listeners:
            listener(event)
