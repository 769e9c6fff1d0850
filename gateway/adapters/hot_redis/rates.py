"""The requests of the last minute over all processes, in Redis: one round trip each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.adapters.hot_redis.connection import PREFIX, Command, Guard
from gateway.core.limits import MINUTE_S, Rate

TOGETHER_MAX = 64
"""Requests that are asked for in one round trip."""

_TAKE = """
local second = tonumber(redis.call('TIME')[1])
local counts = redis.call('HGETALL', KEYS[1])
local limit, minute = tonumber(ARGV[1]), tonumber(ARGV[2])
local used, oldest = 0, second
for i = 1, #counts, 2 do
  local at = tonumber(counts[i])
  if at <= second - minute or at > second then
    redis.call('HDEL', KEYS[1], counts[i])
  else
    used = used + tonumber(counts[i + 1])
    oldest = math.min(oldest, at)
  end
end
local allowed = 0
if used < limit then
  allowed = 1
  redis.call('HINCRBY', KEYS[1], second, 1)
  redis.call('PEXPIRE', KEYS[1], minute * 1000)
end
return {allowed, math.max(0, limit - used - allowed), oldest + minute - second}
"""
"""The rule of ``core.limits.taken``, where all processes meet."""


class Local(Protocol):
    """What counts in this process alone."""

    async def take(self, meter: str, limit: int) -> Rate:
        """Let one request more through, or not, by what this process may."""
        ...

    async def note(self, meter: str, limit: int) -> None:
        """Note a request that was let through."""
        ...


@dataclass(slots=True)
class RedisRates:
    """Implements ``Rates``. While Redis is away ``local`` decides.

    That is told of every request, so that it does not begin from nothing then. What
    comes while Redis is asked is asked together after that: a crowd that stood in line
    for the connection would look like a Redis that does not answer.
    """

    guard: Guard
    local: Local
    _waiting: list[_Waiting] = field(default_factory=list)
    _asking: asyncio.Task[None] | None = None

    async def take(self, meter: str, limit: int) -> Rate:
        """Let one request more through, or not; by the clock of Redis."""
        rate = None if self.guard.degraded else await self._asked(meter, limit)
        if rate is None:
            return await self.local.take(meter, limit)
        if rate.allowed:
            await self.local.note(meter, limit)
        return rate

    async def _asked(self, meter: str, limit: int) -> Rate | None:
        mine = _Waiting(meter, limit, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
        return await mine.rate

    async def _ask(self) -> None:
        try:
            while self._waiting:
                group = self._waiting[:TOGETHER_MAX]
                del self._waiting[:TOGETHER_MAX]
                await self._ask_for(group)
        finally:
            self._asking = None
            left, self._waiting = self._waiting, []
            for each in left:  # none, unless this was cut off
                each.rate.cancel()

    async def _ask_for(self, group: list[_Waiting]) -> None:
        answers: list[Any] | None = None
        try:
            answers = await self.guard.ask(*(each.command for each in group))
        finally:
            for place, each in enumerate(group):
                if not each.rate.done():
                    answer = None if answers is None else answers[place]
                    each.rate.set_result(_rate(each.limit, answer))


@dataclass(frozen=True, slots=True)
class _Waiting:
    meter: str
    limit: int
    rate: asyncio.Future[Rate | None]

    @property
    def command(self) -> Command:
        return ("EVAL", _TAKE, 1, f"{PREFIX}rate:{self.meter}", self.limit, MINUTE_S)


def _rate(limit: int, answer: Sequence[int] | None) -> Rate | None:
    if answer is None:
        return None
    allowed, left, frees_in_s = answer
    return Rate(bool(allowed), limit, left, frees_in_s)
