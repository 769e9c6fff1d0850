"""The requests of the last minute over all processes, in Redis: one round trip each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway.adapters.hot_redis.connection import PREFIX, Command, Guard
from gateway.core.limits import MINUTE_S, Rate

TOGETHER_MAX = 64
"""Requests that are asked for in one round trip."""

_TAKE = """
local second, minute = tonumber(redis.call('TIME')[1]), tonumber(ARGV[1])
local answers = {}
for k, key in ipairs(KEYS) do
  local counts, limit = redis.call('HGETALL', key), tonumber(ARGV[k + 1])
  local used, oldest, allowed = 0, second, 0
  for i = 1, #counts, 2 do
    local at = tonumber(counts[i])
    if at <= second - minute or at > second then
      redis.call('HDEL', key, counts[i])
    else
      used = used + tonumber(counts[i + 1])
      oldest = math.min(oldest, at)
    end
  end
  if used < limit then
    allowed = 1
    redis.call('HINCRBY', key, second, 1)
    redis.call('PEXPIRE', key, minute * 1000)
  end
  local left = math.max(0, limit - used - allowed)
  answers[k] = {allowed, left, oldest + minute - second}
end
return answers
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
        rates: list[Rate | None] = [None] * len(group)
        keys = (f"{PREFIX}rate:{each.meter}" for each in group)
        limits = (each.limit for each in group)
        command: Command = ("EVAL", _TAKE, len(group), *keys, MINUTE_S, *limits)
        try:
            answers = await self.guard.ask(command)
            if answers is not None:
                rates = [_rate(*both) for both in zip(group, answers[0], strict=True)]
        finally:
            for each, rate in zip(group, rates, strict=True):
                if not each.rate.done():
                    each.rate.set_result(rate)


@dataclass(frozen=True, slots=True)
class _Waiting:
    meter: str
    limit: int
    rate: asyncio.Future[Rate | None]


def _rate(asked: _Waiting, answer: Sequence[int]) -> Rate:
    allowed, left, frees_in_s = answer
    return Rate(bool(allowed), asked.limit, left, frees_in_s)
