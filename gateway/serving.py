"""The process that serves: its socket, its loop, and how it goes away.

SIGTERM: not ready any more, no further task is taken, those that wait for jobs are let
go; requests are still taken for a while, for whoever balances load does not know yet.
Then the port is closed and what is under way ends, up to one deadline for all. SIGINT
does not wait, and a second signal ends everything at once. SIGHUP has the
configuration read again, unless it is the terminal that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn
import uvloop
from litestar.types import ASGIApp

from gateway.adapters.data_dir import Seat
from gateway.books import StartError

DRAIN_MAX_S = 180.0
"""From when the port is closed until nobody is waited for any more."""
KEEP_ALIVE_S = 75
BACKLOG = 2048
READY = b"ready"
WATCHED_MS = 60_000
"""Whoever asked for readiness within that time will see that it ends."""


@dataclass(slots=True)
class Leaving:
    """Whether the process is about to stop, and whether anybody looks out for that."""

    now_ms: Callable[[], int]
    begun: bool = False
    _asked_ms: int | None = None

    async def check(self) -> str | None:
        """Answer a question for readiness."""
        self._asked_ms = self.now_ms()
        return "the process is about to stop" if self.begun else None

    @property
    def watched(self) -> bool:
        """Whether readiness was asked for lately."""
        asked_ms = self._asked_ms
        return asked_ms is not None and self.now_ms() - asked_ms <= WATCHED_MS


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of several processes serves: its seat, and the port they share.

    ``tie`` is closed at the other end when whoever started it is gone.
    """

    seat: Seat
    listening: socket.socket
    tie: socket.socket

    @classmethod
    def taken(cls, number: int, of: int, listening: int, tie: int) -> Place:
        """Take over what was handed down as numbers of open files."""
        shared = socket.socket(fileno=listening)
        return cls(Seat(number, of), shared, socket.socket(fileno=tie))

    def ready(self) -> None:
        """Say that requests are answered, and from now on leave when left alone."""
        self.tie.setblocking(False)  # noqa: FBT003 - socket's own
        with contextlib.suppress(OSError):
            self.tie.send(READY)
        asyncio.get_running_loop().add_reader(self.tie.fileno(), self._left_alone)

    def _left_alone(self) -> None:
        asyncio.get_running_loop().remove_reader(self.tie.fileno())
        os.kill(os.getpid(), signal.SIGTERM)


class Served(Protocol):
    """What is served."""

    @property
    def app(self) -> ASGIApp:
        """Answers requests."""
        ...

    @property
    def leaving(self) -> Leaving:
        """Tells its own parts that the process is about to stop."""
        ...

    @property
    def leaving_s(self) -> float:
        """How long requests are still taken by then."""
        ...

    def reload_soon(self) -> None:
        """Have the configuration read again; returns at once."""
        ...

    async def run(self) -> None:
        """Do what goes on beside requests, until cancelled."""
        ...

    async def leave(self) -> None:
        """Take no further task; end, or let go of, all that were taken."""
        ...

    async def drain(self) -> None:
        """Wait until the work on requests has ended."""
        ...

    async def close(self) -> None:
        """Give everything back; what still goes on is lost."""
        ...


def hear_no_hang_up_yet() -> None:
    """Keep SIGHUP until it can be heeded: it would end a process that still starts."""
    if not os.isatty(0):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def hear_hang_up(heard: Callable[[bool], None]) -> None:
    """Have SIGHUP heard by the running loop, that from before too.

    ``heard`` is told whether there was a terminal.
    """
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, heard, os.isatty(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def is_abandoned(*, had_terminal: bool) -> bool:
    """Tell whether SIGHUP means that the terminal is gone: nobody could end it then."""
    return had_terminal and not os.isatty(0)


def listen(host: str, port: int) -> socket.socket:
    """Take the port.

    Raises:
        StartError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it. Without it the end of an answer waits 40 ms for the
    # client's ACK; uvloop sets it, other loops do not.
    taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        taken.bind((host, port))
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. "
            "Stop what uses it, or choose another with --port."
        ) from error
    return taken


def event_loop() -> asyncio.AbstractEventLoop:
    """Make the loop that a gateway runs on.

    uvicorn picks a loop only where it makes one itself, and here it is handed one.
    """
    return uvloop.new_event_loop()


async def serve(
    gateway: Served,
    listening: socket.socket,
    ready: Callable[[], None],
    *,
    drain_max_s: float = DRAIN_MAX_S,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what is under way.

    ``ready`` is called once requests are answered and signals are heard. Nothing is
    waited for longer than ``drain_max_s`` after the port was closed.
    """
    config = uvicorn.Config(
        gateway.app,
        lifespan="off",
        log_config=None,
        access_log=False,
        http="httptools",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(drain_max_s),
    )
    # What it would log of requests is logged already, one canonical line each.
    logging.getLogger("uvicorn.error").disabled = True
    beside = asyncio.ensure_future(gateway.run())
    server = _Server(config, ready, gateway, drain_max_s)
    try:
        await server.serve(sockets=[listening])
    finally:
        try:
            await server.drain()
        finally:
            # Not before: what drains is to be seen alive by other processes.
            beside.cancel()
            await asyncio.wait({beside})
            await gateway.close()
    if not beside.cancelled():
        beside.result()


class _Server(uvicorn.Server):
    """A uvicorn that returns after a signal instead of raising it again.

    There are books to be closed after the last answer.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        gateway: Served,
        drain_max_s: float,
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._gateway = gateway
        self._drain_max_s = drain_max_s
        self._left: asyncio.Future[None] | None = None
        self._until_s = 0.0
        self._draining: asyncio.Future[tuple[None, None]] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The first signal lets what is under way end, the second does not.
        leaving = self._gateway.leaving
        if leaving.begun:
            self.force_exit = self.should_exit = True
            self._until_s = 0.0
            if self._draining is not None:
                self._draining.cancel()
            return
        wait_s = 0.0
        if sig == signal.SIGTERM and leaving.watched:
            wait_s = self._gateway.leaving_s
        self._leave(wait_s)
        asyncio.get_running_loop().call_later(wait_s, super().handle_exit, sig, frame)

    def _on_hang_up(self, had_terminal: bool) -> None:  # noqa: FBT001 - a callback
        if is_abandoned(had_terminal=had_terminal):
            self.handle_exit(signal.SIGTERM, None)
        else:
            self._gateway.reload_soon()

    def _leave(self, wait_s: float) -> asyncio.Future[None]:
        self._gateway.leaving.begun = True
        now_s = asyncio.get_running_loop().time()
        self._until_s = now_s + wait_s + self._drain_max_s
        self._left = asyncio.ensure_future(self._gateway.leave())
        return self._left

    async def drain(self) -> None:
        """Wait for what is under way, up to the deadline or a second signal."""
        left = self._left or self._leave(0.0)  # a server that ended by itself
        work = asyncio.gather(left, self._gateway.drain())
        self._draining = work
        end = asyncio.get_running_loop().call_at(self._until_s, work.cancel)
        await asyncio.wait({work})
        end.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            work.result()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Heard until the loop is closed: after the last answer work is drained and
        # books are closed, and a signal must not break that off.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        hear_hang_up(self._on_hang_up)
        yield
