"""The guard of all calls to where callers point: it lets none into our own network.

What is dialled is an address that was looked up once and found public, all of them;
the name stays what the certificate is checked against.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address

import httpcore

from gateway.core.addresses import Address, CheckedUrl, Network, may_reach
from gateway.ports import Clock

LOOKUPS_MAX = 8
LOOKUP_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 5.0
"""For all addresses of a host together, and again for the TLS handshake."""
ADDRESSES_DIALLED_MAX = 3
REFUSAL_TIME_MS = 250
"""A host refused for its addresses takes as long as one that is not there."""
TIMEOUTS = {"connect": CONNECT_TIMEOUT_S}
"""The rest is bounded by the deadline of the whole."""
BREAKS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    OSError,  # a broken TLS record comes as ssl.SSLError
)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Finds all addresses of a name; raises OSError if there are none."""


class UnreachableError(Exception):
    """A host is not there, or must not be reached: which of them is not told."""


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
class Guard(httpcore.AsyncNetworkBackend):
    """Stands where connections are made, so that nothing can go around it.

    Fields:
        allow: networks of the operator's own that may be reached though not public.
        network: dials addresses, never names.
    """

    clock: Clock
    resolve: Resolve
    allow: tuple[Network, ...]
    network: httpcore.AsyncNetworkBackend

    async def connect_tcp(
        self, host: str, port: int, *_: object, **__: object
    ) -> httpcore.AsyncNetworkStream:
        """Dial a host, if all its addresses may be reached.

        Raises:
            UnreachableError: they may not be, or none answers.
        """
        started_ms = self.clock.monotonic_ms()
        stream = await self._dial(await self._addresses(host, port), port)
        if stream is None:
            spent_ms = self.clock.monotonic_ms() - started_ms
            await self.clock.sleep(max(0, REFUSAL_TIME_MS - spent_ms) / 1000)
            raise UnreachableError
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


def location(url: CheckedUrl) -> httpcore.URL:
    """Write a checked URL in the client's form, without reading it anew."""
    return httpcore.URL(
        scheme=url.scheme, host=url.host, port=url.port, target=url.target
    )


def header(response: httpcore.Response, name: bytes) -> str:
    """Read a header, all its lines; empty if there is none."""
    lines = [value for key, value in response.headers if key.lower() == name]
    return b", ".join(lines).decode(errors="replace").strip()


def _look_up(host: str, port: int) -> Sequence[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]
