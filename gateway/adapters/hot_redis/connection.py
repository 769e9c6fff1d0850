"""The one way to Redis: every call is short, and none of them fails anything.

All keys carry one hash tag, so that a cluster keeps them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from gateway.core.events import SharedStateChanged
from gateway.ports import Events

CALL_MAX_S = 0.05
CONNECT_MAX_S = 1.0
FAILURES_MAX = 3
PREFIX = "{imageway}:1:"
"""The figure is that of the format: processes of another one do not see it."""
CHANNEL = f"{PREFIX}notices"
SENTINEL_PORT = 26379
REASON_MAX_CHARS = 200
UNANSWERED = (
    RedisError,
    RedisClusterException,  # no error of the others' kind: no node can be reached
    OSError,
    TimeoutError,
    ValueError,  # these two, and nesting without end: what answers there is no Redis
    TypeError,
    RuntimeError,  # uvloop's, for a connection that was closed a moment ago
    AttributeError,  # redis-py's, for the same
)

Client = Redis | RedisCluster
Command = tuple[str | int, ...]


def opener(url: str) -> Callable[[], Client]:
    """Read where Redis is; what is returned makes a client, unconnected.

    Takes what redis-py takes, and ``redis+cluster://host:port`` or
    ``redis+sentinel://host:port,host:port/service/database``; ``rediss`` for TLS.

    Raises:
        ValueError: it cannot be read; the message never repeats any of it.
    """
    try:
        found = _opener(url)
        found()  # tells now what is wrong with it
    except (ValueError, RedisClusterException):
        # Where a password is not written as it has to be, any part may be of it.
        raise ValueError(
            "a URL is redis://:password@host:port, redis+cluster://host:port or "
            "redis+sentinel://host:port,host:port/service; what is special in a "
            "password is written as %XX"
        ) from None
    return found


def _opener(url: str) -> Callable[[], Client]:
    parts = urlsplit(url)
    secure = "s" if parts.scheme.startswith("rediss") else ""
    kind = parts.scheme.partition("+")[2]
    common: dict[str, Any] = {
        "socket_timeout": CONNECT_MAX_S,
        "socket_connect_timeout": CONNECT_MAX_S,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": True,
    }
    if kind == "sentinel":
        return _sentinel(parts, common, tls=bool(secure))
    if kind == "cluster":
        plain = f"redis{secure}{url[len(parts.scheme) :]}"
        return lambda: RedisCluster.from_url(plain, **common)
    return lambda: Redis.from_url(url, **common)


def _sentinel(
    parts: SplitResult, common: dict[str, Any], *, tls: bool
) -> Callable[[], Client]:
    credentials, _, places = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not places:
        raise ValueError("a server's name and Sentinels are missing")
    more = common | {"db": int(database or 0), "ssl": tls}
    if password:
        more |= {"username": unquote(user) or None, "password": unquote(password)}
    sentinels = [_address(place) for place in places.split(",")]

    def client() -> Client:
        asked = {k: v for k, v in common.items() if k != "retry"}
        watchers: Any = Sentinel(sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
        found: Redis = watchers.master_for(service, **more)
        return found

    return client


def _address(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":") if ":" in place else (place, "", "")
    return host.strip("[]"), int(port or SENTINEL_PORT)


@dataclass(slots=True)
class Guard:
    """Asks Redis, within 50 ms, as long as it answers; tells when that changes.

    ``call_max_s`` is that time; over a second is a second.
    """

    open: Callable[[], Client]
    events: Events
    call_max_s: float = CALL_MAX_S
    _client: Client | None = None
    _failures: int = 0
    _degraded: bool = False
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def degraded(self) -> bool:
        """Whether Redis is out of reach."""
        return self._degraded or self._client is None

    async def ask(self, *commands: Command) -> list[Any] | None:
        """Send commands in one round trip; None at once while Redis is out of reach.

        The answers are as many as the commands.
        """
        return None if self.degraded else await self._asked(commands)

    async def try_again(self, *commands: Command) -> list[Any] | None:
        """Ask though Redis was out of reach. Not for what a request waits for."""
        if self._client is None and not await self._connected():
            return None
        answers = await self._asked(commands)
        if answers is not None and self._degraded:
            self._degraded = False
            self.events.emit(SharedStateChanged(degraded=False))
        return answers

    async def close(self) -> None:
        """Give the connection back."""
        client, self._client = self._client, None
        await closed(client)

    async def _connected(self) -> bool:
        # Only connecting may take longer: names are looked up, keys are exchanged.
        client = self.open()
        try:
            async with asyncio.timeout(CONNECT_MAX_S):
                await client.execute_command("GET", f"{PREFIX}live:none")
        except UNANSWERED as error:
            await closed(client)
            self._lost(error)
            return False
        self._client, self._failures = client, 0
        return True

    async def _asked(self, commands: Sequence[Command]) -> list[Any] | None:
        client = self._client
        assert client is not None
        try:
            async with asyncio.timeout(self.call_max_s), self._one_at_a_time:
                answers = await _answers(client, commands)
        except UNANSWERED as error:
            self._failures += 1
            if self._failures >= FAILURES_MAX and client is self._client:
                self._client = None
                await closed(client)
                self._lost(error)
            return None
        self._failures = 0
        return answers

    def _lost(self, error: Exception) -> None:
        if not self._degraded:
            self._degraded = True
            reason = f"{type(error).__name__} {error}".strip()
            cut = reason[:REASON_MAX_CHARS]
            self.events.emit(SharedStateChanged(degraded=True, reason=cut))


async def _answers(client: Client, commands: Sequence[Command]) -> list[Any]:
    if len(commands) == 1:
        return [await client.execute_command(*commands[0])]
    if isinstance(client, RedisCluster):
        pipeline: Any = client.pipeline(transaction=False)
    else:
        pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    answers: list[Any] = await pipeline.execute()
    return answers


async def closed(client: Client | None) -> None:
    """Close a client, whatever state it is in."""
    if client is None:
        return
    pool: Any = getattr(client, "connection_pool", None)
    watchers = getattr(getattr(pool, "sentinel_manager", None), "sentinels", ())
    for each in (client, *watchers):
        with suppress(*UNANSWERED):
            async with asyncio.timeout(CALL_MAX_S):
                await each.aclose()


async def publish_once(open_client: Callable[[], Client], text: str) -> bool:
    """Send one notice from a process that does nothing else; tells whether it went."""
    client = open_client()
    try:
        async with asyncio.timeout(2 * CONNECT_MAX_S):
            await client.execute_command("PUBLISH", CHANNEL, text)
    except UNANSWERED:
        return False
    finally:
        await closed(client)
    return True
