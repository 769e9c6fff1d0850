"""Real time and real chance."""

from __future__ import annotations

import asyncio
import random
import secrets
import time


class SystemClock:
    """The machine's clocks."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic_ms(self) -> int:
        """Milliseconds that never go back, for durations."""
        return time.monotonic_ns() // 1_000_000

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class SystemChance:
    """Randomness: unguessable for tokens, merely even for jitter."""

    def token(self, alphabet: str, length: int) -> str:
        """Draw unguessable characters."""
        # One draw for all of it: each costs a call into the system.
        drawn = secrets.randbelow(len(alphabet) ** length)
        characters = []
        for _ in range(length):
            drawn, place = divmod(drawn, len(alphabet))
            characters.append(alphabet[place])
        return "".join(characters)

    def fraction(self) -> float:
        """Draw evenly from 0 (inclusive) to 1 (exclusive)."""
        return random.random()  # noqa: S311 - jitter, nothing to guess
