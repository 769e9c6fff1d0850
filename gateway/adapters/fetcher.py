"""Fetches files that callers link to, and cannot be led into our own network.

What is dialled is an address that was looked up once and found public, all of them;
the name stays what the certificate is checked against. Each redirect starts over.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address

import httpcore

from gateway.core.addresses import (
    Address,
    CheckedUrl,
    ForbiddenUrlError,
    Network,
    UrlRules,
    checked_url,
    may_reach,
    redirected,
)
from gateway.ports import Clock, FetchRefusedError, WritableSpool
from providers.kit.spool import SpoolLimitError

FETCHES_MAX = 32
"""At once, in the whole process; the others wait, within their deadline."""
FILE_MAX_BYTES = 50 * 1024 * 1024
"""What a file may say of its length; what it really has, its spool limits."""
REDIRECTS_MAX = 3
LOOKUPS_MAX = 8
LOOKUP_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 5.0
"""For all addresses of a host together, and again for the TLS handshake."""
ADDRESSES_DIALLED_MAX = 3
REFUSAL_TIME_MS = 250
"""A host refused for its addresses takes as long as one that is not there."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Finds all addresses of a name; raises OSError if there are none."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = (
    ("User-Agent", "imageway"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
)
_TIMEOUTS = {"connect": CONNECT_TIMEOUT_S}
"""The rest is bounded by the deadline of the whole."""
_BREAKS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    OSError,  # a broken TLS record comes as ssl.SSLError
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

    async def fetch(self, url: str, into: WritableSpool, *, deadline_s: float) -> None:
        """Stream the file at ``url`` into a spool, within ``deadline_s`` seconds.

        Raises:
            FetchRefusedError: the URL may not be, or could not be, fetched whole.
            OSError: the spool cannot be written (the disk is full, say).
        """
        deadline = asyncio.timeout(deadline_s)
        try:
            first = checked_url(url, self.rules)
            async with deadline, self._turns:
                await self._follow(first, into)
        except ForbiddenUrlError as error:
            raise FetchRefusedError(str(error)) from error
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise FetchRefusedError(
                f"The file did not come within {deadline_s:g} s."
            ) from error

    async def _follow(self, url: CheckedUrl, into: WritableSpool) -> None:
        guard = _Guard(self.clock, self.resolve, self.allow, self.network)
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
                    url = redirected(url, _header(response, b"location"), self.rules)
                finally:
                    await response.aclose()
        raise FetchRefusedError(
            f"The URL redirects more than {REDIRECTS_MAX} times. Give the last one."
        )


@dataclass(frozen=True, slots=True)
class SystemResolver:
    """The machine's own resolver, in few threads: a slow one must not eat them all."""

    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(LOOKUPS_MAX, "lookup")
    )

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """Find all addresses of a name.

        Raises:
            OSError: there are none, or nobody can tell.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, _look_up, host, port
        )

    def close(self) -> None:
        """Drop what waits; a lookup under way ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Guard(httpcore.AsyncNetworkBackend):
    """Stands where connections are made, so that nothing can go around it."""

    clock: Clock
    resolve: Resolve
    allow: tuple[Network, ...]
    network: httpcore.AsyncNetworkBackend

    async def connect_tcp(
        self, host: str, port: int, *_: object, **__: object
    ) -> httpcore.AsyncNetworkStream:
        """Dial a host, if all its addresses may be reached."""
        started_ms = self.clock.monotonic_ms()
        stream = await self._dial(await self._addresses(host, port), port)
        if stream is None:
            spent_ms = self.clock.monotonic_ms() - started_ms
            await self.clock.sleep(max(0, REFUSAL_TIME_MS - spent_ms) / 1000)
            raise FetchRefusedError(_UNREACHABLE)
        return stream

    async def _addresses(self, host: str, port: int) -> Sequence[Address]:
        """Find where a host is; nowhere, if one address of it must not be reached."""
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = [ip_address(text) for text in await self._named(host, port)]
        except (OSError, ValueError):
            return ()
        if not all(may_reach(address, self.allow) for address in found):
            return ()
        return found[:ADDRESSES_DIALLED_MAX]

    async def _named(self, host: str, port: int) -> Sequence[str]:
        try:
            return [str(ip_address(host))]
        except ValueError:
            return await self.resolve(host, port)

    async def _dial(
        self, addresses: Sequence[Address], port: int
    ) -> httpcore.AsyncNetworkStream | None:
        for address in addresses:
            try:
                return await self.network.connect_tcp(
                    str(address), port, timeout=CONNECT_TIMEOUT_S / len(addresses)
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return None


def _look_up(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]


async def _ask(
    pool: httpcore.AsyncConnectionPool, url: CheckedUrl
) -> httpcore.Response:
    request = httpcore.Request(
        "GET",
        httpcore.URL(
            scheme=url.scheme, host=url.host, port=url.port, target=url.target
        ),
        headers=[("Host", url.authority), *_HEADERS],
        extensions={"timeout": _TIMEOUTS},
    )
    try:
        return await pool.handle_async_request(request)
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        # The guard let nothing of its own out: this is the handshake.
        raise FetchRefusedError(
            "No secure connection to the URL's host: check its certificate."
        ) from error
    except _BREAKS as error:
        raise FetchRefusedError(_BROKEN_OFF) from error


async def _receive(response: httpcore.Response, into: WritableSpool) -> None:
    if response.status != 200:  # noqa: PLR2004 - OK
        raise FetchRefusedError(
            f"The URL answered with status {response.status} instead of the file."
        )
    if _header(response, b"content-encoding").lower() not in {"", "identity"}:
        raise FetchRefusedError(
            "The URL answered with a compressed body, which was not asked for."
        )
    length = _header(response, b"content-length")
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
    except _BREAKS as error:
        raise FetchRefusedError(_BROKEN_OFF) from error


def _header(response: httpcore.Response, name: bytes) -> str:
    """Read a header, all its lines; empty if there is none."""
    lines = [value for key, value in response.headers if key.lower() == name]
    return b", ".join(lines).decode(errors="replace").strip()
