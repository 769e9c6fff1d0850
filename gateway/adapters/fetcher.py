"""Fetches files that callers link to, and cannot be led into our own network.

The guard of ``outbound`` stands at every connection; each redirect starts over.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import httpcore

from gateway.adapters.outbound import (
    BREAKS,
    TIMEOUTS,
    Guard,
    Resolve,
    SystemResolver,
    UnreachableError,
    header,
    location,
)
from gateway.core.addresses import (
    CheckedUrl,
    ForbiddenUrlError,
    Network,
    UrlRules,
    checked_url,
    redirected,
)
from gateway.ports import Clock, FetcherBusyError, FetchRefusedError, WritableSpool
from providers.kit.spool import SpoolLimitError

__all__ = ["GuardedFetcher", "SystemResolver"]

FETCHES_MAX = 32
"""At once, in the whole process; the others wait for their turn."""
FETCHES_MAX_PER_CALLER = 8
TURN_MAX_S = 20.0
"""How long a fetch may wait for its turn."""
FILE_MAX_BYTES = 50 * 1024 * 1024
"""What a file may say of its length; what it really has, its spool limits."""
REDIRECTS_MAX = 3

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = (
    ("User-Agent", "imageway"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
)

_UNREACHABLE = (
    "The URL could not be reached. "
    "Its host must have public addresses only, and answer."
)
_BROKEN_OFF = "The file did not come whole: the connection broke off."
_TOO_LARGE = "The file is too large."


@dataclass(frozen=True, slots=True)
class GuardedFetcher:
    """The ``Fetcher`` port over HTTP/1.1. One per process, since it counts fetches.

    Fields:
        allow: networks of the operator's own that may be reached though not public.
        network: dials addresses, never names.
    """

    clock: Clock
    resolve: Resolve
    rules: UrlRules = field(default_factory=UrlRules)
    allow: tuple[Network, ...] = ()
    tls: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)
    network: httpcore.AsyncNetworkBackend = field(default_factory=httpcore.AnyIOBackend)
    _turns: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(FETCHES_MAX), init=False
    )

    _turns_of: WeakValueDictionary[str, asyncio.Semaphore] = field(
        default_factory=WeakValueDictionary, init=False
    )
    """Of each caller; kept by those who have a turn, or wait for one."""

    async def fetch(
        self, url: str, into: WritableSpool, *, deadline_s: float, caller: str = ""
    ) -> None:
        """Stream the file at ``url`` into a spool, within ``deadline_s`` seconds.

        They begin with its turn. Without a ``caller``, only the turns of all count.

        Raises:
            FetcherBusyError: no turn came within ``TURN_MAX_S``.
            FetchRefusedError: the URL may not be, or could not be, fetched whole.
            OSError: the spool cannot be written (the disk is full, say).
        """
        try:
            first = checked_url(url, self.rules)
            async with self._turn(caller):
                await self._follow_until(first, into, deadline_s)
        except ForbiddenUrlError as error:
            raise FetchRefusedError(str(error)) from error

    @asynccontextmanager
    async def _turn(self, caller: str) -> AsyncIterator[None]:
        own = asyncio.Semaphore(FETCHES_MAX_PER_CALLER)
        if caller:
            own = self._turns_of.setdefault(caller, own)
        async with AsyncExitStack() as held:
            # Waiting for others is no fault of the host: it has a limit of its own.
            try:
                async with asyncio.timeout(TURN_MAX_S):
                    # In this order: who waits for its own holds up nobody else.
                    await held.enter_async_context(own)
                    await held.enter_async_context(self._turns)
            except TimeoutError:
                raise FetcherBusyError(
                    "The gateway is fetching as much as it may. Send the request again."
                ) from None
            yield

    async def _follow_until(
        self, url: CheckedUrl, into: WritableSpool, deadline_s: float
    ) -> None:
        deadline = asyncio.timeout(deadline_s)
        try:
            async with deadline:
                await self._follow(url, into)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise FetchRefusedError(
                f"The file did not come within {deadline_s:g} s."
            ) from error

    async def _follow(self, url: CheckedUrl, into: WritableSpool) -> None:
        guard = Guard(self.clock, self.resolve, self.allow, self.network)
        # No connection outlives its request: none can be taken over by another name.
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self.tls, max_keepalive_connections=0, network_backend=guard
        )
        async with pool:
            for _ in range(1 + REDIRECTS_MAX):
                response = await _ask(pool, url)
                try:
                    if response.status not in _REDIRECTS:
                        await _receive(response, into)
                        return
                    url = redirected(url, header(response, b"location"), self.rules)
                finally:
                    await response.aclose()
        raise FetchRefusedError(
            f"The URL redirects more than {REDIRECTS_MAX} times. Give the last one."
        )


async def _ask(
    pool: httpcore.AsyncConnectionPool, url: CheckedUrl
) -> httpcore.Response:
    request = httpcore.Request(
        "GET",
        location(url),
        headers=[("Host", url.authority), *_HEADERS],
        extensions={"timeout": TIMEOUTS},
    )
    try:
        return await pool.handle_async_request(request)
    except UnreachableError as error:
        raise FetchRefusedError(_UNREACHABLE) from error
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        # The guard has an error of its own: this is the handshake.
        raise FetchRefusedError(
            "No secure connection to the URL's host: check its certificate."
        ) from error
    except BREAKS as error:
        raise FetchRefusedError(_BROKEN_OFF) from error


async def _receive(response: httpcore.Response, into: WritableSpool) -> None:
    if response.status != 200:  # noqa: PLR2004 - OK
        raise FetchRefusedError(
            f"The URL answered with status {response.status} instead of the file."
        )
    if header(response, b"content-encoding").lower() not in {"", "identity"}:
        raise FetchRefusedError(
            "The URL answered with a compressed body, which was not asked for."
        )
    length = header(response, b"content-length")
    if length.isdecimal() and int(length) > FILE_MAX_BYTES:
        raise FetchRefusedError(_TOO_LARGE)
    body = response.aiter_stream()
    while (piece := await _next_piece(body)) is not None:
        try:
            into.append(piece)
        except SpoolLimitError as error:
            raise FetchRefusedError(_TOO_LARGE) from error


async def _next_piece(body: AsyncIterator[bytes]) -> bytes | None:
    """Read on, at most 64 KiB; None at the end."""
    try:
        return await anext(body, None)
    except BREAKS as error:
        raise FetchRefusedError(_BROKEN_OFF) from error
