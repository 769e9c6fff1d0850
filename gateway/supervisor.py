"""Several processes of one machine that serve one port: ``imageway serve --workers N``.

The supervisor takes port and data folder, starts the processes, and starts again those
that end. It serves nothing itself. Signals are passed on: the processes have a session
of their own, for Ctrl-C in a terminal would reach them twice. If it is killed, they see
the other end of their tie closed, and leave.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gateway.adapters.logs import LogListener
from gateway.adapters.metrics import forget_process
from gateway.books import SQLITE, StartError, first_run, open_books
from gateway.serving import READY, hear_hang_up, is_abandoned, listen
from gateway.settings import Settings, environment_with

START_MAX_S = 60.0
"""Until a process must answer requests, or its start counts as failed."""
END_MAX_S = 1.0
"""For a process that did not start to end by itself."""
PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 10.0
"""Before a process that ended by itself is started again; doubles each time."""
STEADY_S = 60.0
"""After so long the next pause is the shortest again."""

Seat = tuple[int, int, int, int]
"""What a process is told: its number, of how many, and port and tie as open files."""
Run = Callable[[Seat], Sequence[str]]
"""Tells the command line of the process with a seat."""


@dataclass(slots=True)
class _Process:
    """One process; ``since_s`` is when it was last started, by the loop's clock."""

    running: asyncio.subprocess.Process
    tie: socket.socket
    since_s: float
    ready: bool = False


@dataclass(slots=True)
class Supervisor:
    """Keeps a number of processes serving until it is told to stop."""

    workers: int
    run: Run
    listening: socket.socket
    figures: Path
    log: LogListener
    _processes: dict[int, _Process] = field(default_factory=dict)
    _signals: list[signal.Signals] = field(default_factory=list)
    _hung_up: bool = False
    _leaving: bool = False
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Serve until SIGTERM or SIGINT; ``ready`` once all processes answer.

        Raises:
            StartError: a process did not start.
        """
        self._hear_signals()
        shutil.rmtree(self.figures, ignore_errors=True)
        self.figures.mkdir(mode=0o700)
        keepers: list[asyncio.Task[None]] = []
        try:
            starts = map(self._start, range(self.workers))
            for failed in await asyncio.gather(*starts, return_exceptions=True):
                if failed is not None:
                    raise failed
            if not self._leaving:
                await ready()
            keepers = [
                asyncio.create_task(self._keep(number)) for number in self._processes
            ]
            await asyncio.gather(*keepers)
        finally:
            self.listening.close()
            await self._end()

    async def _keep(self, number: int) -> None:
        pause_s = PAUSE_MIN_S
        while True:
            process = self._processes[number]
            code = await process.running.wait()
            process.tie.close()
            forget_process(self.figures, number)
            if self._leaving:
                return
            ran_s = asyncio.get_running_loop().time() - process.since_s
            pause_s = PAUSE_MIN_S if ran_s > STEADY_S else pause_s
            self.log.note("worker_ended", worker=number, code=code, again_in_s=pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._left.wait()
            if self._leaving:
                return
            pause_s = min(PAUSE_MAX_S, pause_s * 2)
            process.since_s = asyncio.get_running_loop().time()
            with suppress(StartError):  # it has ended, or is ended: the loop goes on
                await self._start(number)

    async def _start(self, number: int) -> None:
        if self._leaving:
            return
        port, loop = self.listening.fileno(), asyncio.get_running_loop()
        try:
            running, ours = await self._spawn(number, port)
        except OSError as error:
            self.log.note("worker_not_started", worker=number, problem=str(error))
            raise StartError(f"worker {number} cannot be started: {error}") from error
        self._processes[number] = _Process(running, ours, loop.time())
        for each in self._signals:  # that came while it was started
            self._send(running, each)
        try:
            async with asyncio.timeout(START_MAX_S):
                said = await loop.sock_recv(ours, len(READY))
        except (TimeoutError, OSError):
            said = b""
        if said != READY and not self._leaving:
            await self._kill(running)
            raise StartError(f"worker {number} did not start; its last lines say why")
        self._processes[number].ready = True
        if self._hung_up:
            self._reload(self._processes[number])

    async def _spawn(
        self, number: int, port: int
    ) -> tuple[asyncio.subprocess.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # noqa: FBT003 - socket's own
        try:
            with theirs:
                running = await asyncio.create_subprocess_exec(
                    *self.run((number, self.workers, port, theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(port, theirs.fileno()),
                    start_new_session=True,
                    env=environment_with(PROMETHEUS_MULTIPROC_DIR=str(self.figures)),
                )
        except OSError:
            ours.close()
            raise
        return running, ours

    async def _kill(self, running: asyncio.subprocess.Process) -> None:
        # One that let go of its tie mostly ends by itself, with a code that says why.
        with suppress(TimeoutError):
            async with asyncio.timeout(END_MAX_S):
                await running.wait()
        self._send(running, signal.SIGKILL)

    async def _end(self) -> None:
        # After an error: nobody must be left behind.
        for process in self._processes.values():
            self._send(process.running, signal.SIGTERM)
        for process in self._processes.values():
            await process.running.wait()

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._pass_on, number)
        hear_hang_up(self._on_hang_up)

    def _on_hang_up(self, had_terminal: bool) -> None:  # noqa: FBT001 - a callback
        if is_abandoned(had_terminal=had_terminal):
            self._pass_on(signal.SIGTERM)
            return
        # One of them asks all others: the next that is ready, if none is.
        self._hung_up = True
        for process in self._processes.values():
            if process.ready and process.running.returncode is None:
                self._reload(process)
                return

    def _reload(self, process: _Process) -> None:
        self._hung_up = False
        self._send(process.running, signal.SIGHUP)

    def _pass_on(self, number: signal.Signals) -> None:
        self._leaving = True
        self._left.set()
        self._signals.append(number)
        for process in self._processes.values():
            self._send(process.running, number)

    def _send(
        self, running: asyncio.subprocess.Process, number: signal.Signals
    ) -> None:
        if running.returncode is None:
            with suppress(ProcessLookupError):
                running.send_signal(number)


def check_workers(settings: Settings) -> None:
    """See that several processes can share what the config names.

    Raises:
        StartError: they cannot.
    """
    storage = settings.storage
    missing = []
    if storage.database == SQLITE:
        missing.append('storage.database = "postgresql://..."')
    if not storage.redis:
        missing.append('storage.redis = "redis://..."')
    if missing:
        raise StartError(
            f"several workers need PostgreSQL and Redis: set {' and '.join(missing)}, "
            "or leave --workers out"
        )


async def supervise(
    settings: Settings,
    workers: int,
    run: Run,
    ready: Callable[[int, str | None], None],
) -> None:
    """Serve by several processes until told to stop.

    ``ready`` gets the port, and the first key if it is new.

    Raises:
        StartError: it cannot be done.
    """
    check_workers(settings)
    listening = listen(settings.server.host, settings.server.port)
    async with open_books(settings, alone=True) as books:
        figures = books.data_dir.figures
    supervisor = Supervisor(workers, run, listening, figures, LogListener())
    port = int(listening.getsockname()[1])

    async def serving() -> None:
        # Not before: if the start failed, nobody would ever see the key.
        async with open_books(settings) as books:
            first = await first_run(books)
        ready(port, first.secret if first else None)

    await supervisor.serve(serving)
