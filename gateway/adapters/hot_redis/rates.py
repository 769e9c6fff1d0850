"""The requests of the last minute over all processes, in Redis: one round trip each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gateway.adapters.hot_redis.connection import PREFIX, Guard
from gateway.core.limits import MINUTE_S, Rate

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


@dataclass(frozen=True, slots=True)
class RedisRates:
    """Implements ``Rates``. While Redis is away ``local`` decides.

    That is told of every request, so that it does not begin from nothing then.
    """

    guard: Guard
    local: Local

    async def take(self, meter: str, limit: int) -> Rate:
        """Let one request more through, or not; by the clock of Redis."""
        key = f"{PREFIX}rate:{meter}"
        answers = await self.guard.ask(("EVAL", _TAKE, 1, key, limit, MINUTE_S))
        if answers is None:
            return await self.local.take(meter, limit)
        allowed, left, frees_in_s = answers[0]
        if allowed:
            await self.local.note(meter, limit)
        return Rate(bool(allowed), limit, left, frees_in_s)
