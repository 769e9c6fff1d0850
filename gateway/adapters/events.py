"""Hands each event to every listener, at once and in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.core.events import Event


@dataclass(frozen=True, slots=True)
class FanOut:
    """Implements ``Events``: a listener that fails stops nothing.

    ``crashed`` is told of it; it must not fail either.
    """

    listeners: tuple[Callable[[Event], None], ...]
    crashed: Callable[[BaseException, str], None]

    def emit(self, event: Event) -> None:
        """Tell every listener."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception as error:  # noqa: BLE001 - the supervisor of listeners
                self.crashed(error, f"telling of {type(event).__name__}")
