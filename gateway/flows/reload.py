"""Reads the configuration again, when this process or any other is asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gateway.core.errors import ConfigRefusedError, GatewayError
from gateway.core.events import ConfigRead
from gateway.core.fleet import Notice, Topic
from gateway.ports import Clock, Events, ReloadNote, Reloads

LOOK_EVERY_S = 1.0
PROBLEM_MAX_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Swapped:
    """What differs in the new configuration, by section; nothing if it is the same."""

    changed: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class ReloadConfig:
    """Has the configuration swapped, once at a time, and says how that went.

    ``swap`` takes over what it reads as a whole, or raises ``ConfigRefusedError``.
    ``announce`` wakes the other processes, which look into the store as well: so an
    asking that is not heard is heeded ``LOOK_EVERY_S`` later.
    """

    reloads: Reloads
    process_id: str
    swap: Callable[[], Awaitable[Swapped]]
    events: Events
    announce: Callable[[Notice], None] = lambda _: None
    _heeded: int = 0
    _last: Swapped | tuple[str, ...] = Swapped(())
    """What came of it, or what was wrong."""
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def begin(self) -> None:
        """Take what was asked so far as heeded, at the end of the start.

        The configuration was read at its beginning: it is read again if need be.
        """
        number = await self.reloads.asked()
        if number:
            with suppress(ConfigRefusedError):  # it was told of
                await self._heed(number)

    async def everywhere(self) -> Swapped:
        """Reload here and ask all others to; without the store only here.

        Raises:
            ConfigRefusedError: this process goes on as before; the others decide
                for themselves.
        """
        try:
            number = await self.reloads.ask()
        except GatewayError:
            async with self._one_at_a_time:
                return await self._swapped()
        self.announce(Notice(Topic.CONFIG))
        return await self._heed(number)

    async def look(self) -> None:
        """Reload if somebody asked for it since."""
        number = await self.reloads.asked()
        if number <= self._heeded:
            return
        with suppress(ConfigRefusedError):  # it was told of
            await self._heed(number)

    async def _heed(self, number: int) -> Swapped:
        async with self._one_at_a_time:
            if number <= self._heeded:  # the files were read after that was asked
                if isinstance(self._last, Swapped):
                    return self._last
                raise ConfigRefusedError(self._last)
            self._heeded, self._last = number, ("the reload broke off",)
            try:
                self._last = swapped = await self._swapped()
            except ConfigRefusedError as error:
                self._last = tuple(error.problems)
                raise
            finally:
                await self._note(number)
        return swapped

    async def _note(self, number: int) -> None:
        problem = None
        if not isinstance(self._last, Swapped):
            problem = "; ".join(self._last)[:PROBLEM_MAX_CHARS]
        with suppress(GatewayError):  # it was done all the same
            await self.reloads.note(self.process_id, number, problem)

    async def _swapped(self) -> Swapped:
        try:
            swapped = await self.swap()
        except ConfigRefusedError as error:
            problem = "; ".join(error.problems)[:PROBLEM_MAX_CHARS]
            self.events.emit(ConfigRead("refused", problem=problem))
            raise
        outcome = "reloaded" if swapped.changed else "unchanged"
        self.events.emit(ConfigRead(outcome, swapped.changed))
        return swapped


@dataclass(frozen=True, slots=True)
class AskToReload:
    """Asks all running processes, and waits for what they say."""

    reloads: Reloads
    clock: Clock
    announce: Callable[[Notice], Awaitable[None]]

    async def __call__(self, *, alive_ms: int, wait_max_s: float) -> Asked:
        """Ask; returns when all have heeded it, or after that time."""
        alive_since_ms = self.clock.now_ms() - alive_ms
        number = await self.reloads.ask()
        await self.announce(Notice(Topic.CONFIG))
        until_ms = self.clock.monotonic_ms() + int(wait_max_s * 1000)
        while True:
            notes = await self.reloads.notes(alive_since_ms=alive_since_ms)
            late = [note for note in notes if (note.heeded or 0) < number]
            if not late or self.clock.monotonic_ms() >= until_ms:
                done = [note for note in notes if note not in late]
                return Asked(done, late)
            await self.clock.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking: who has heeded it by now, and who has not."""

    done: Sequence[ReloadNote]
    late: Sequence[ReloadNote]
