"""What a process keeps whatever its configuration becomes."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from gateway.adapters.clock import SystemChance, SystemClock
from gateway.adapters.convert import PillowStudio
from gateway.adapters.data_dir import DataDirError
from gateway.adapters.events import FanOut
from gateway.adapters.hot_memory import Alone, MemoryBoard
from gateway.adapters.journal import DiskJournal, UnreadableError
from gateway.adapters.logs import LogListener
from gateway.adapters.memory import trimmer
from gateway.adapters.metrics import Metrics, keep_by_seat
from gateway.adapters.rates import MemoryRates
from gateway.books import Books, Shelves, StartError
from gateway.core.fleet import Notice, Topic
from gateway.core.idempotency import KEY_KEPT_MS
from gateway.core.uptime import DAY_MS, KEPT_DAYS
from gateway.flows.files import Files
from gateway.flows.inputs import KeptInputs
from gateway.flows.journal import JournaledTasks
from gateway.flows.keys import Authenticate
from gateway.flows.line import Line
from gateway.flows.recovery import Recovery
from gateway.flows.results import RESULT_KEPT_MS, Results
from gateway.flows.tasks import ReadTask
from gateway.flows.uptime import ADD_EVERY_S, KeepUptime
from gateway.ports import Chance, Clock, Events, Rates
from gateway.serving import Leaving
from gateway.settings import Settings
from providers.kit.spool import SpoolFolder

if TYPE_CHECKING:
    from gateway.adapters.hot_redis.fleet import RedisFleet
    from gateway.adapters.tracing import Tracer

SWEEP_EVERY_S = 60.0
EXPIRE_EVERY_S = 900.0
AUDIT_EVERY_S = 3600.0
GRANTS_EVERY_S = 10.0
LOW_EVERY_S = 10.0
TRIM_EVERY_S = 2.0
SAMPLE_EVERY_S = 1.0
BACKLOG_EVERY_S = 10.0
TASK_KEPT_MS = 30 * 24 * 3600 * 1000
FORGET_AT_ONCE = 200
RESULT_GRACE_MS = 1_800_000
"""Links end after 24 h; the files are gone half an hour later."""
HEX = "0123456789abcdef"
Chore = tuple[float, Callable[[], Awaitable[object]]]
"""How often it is done, in seconds, and what."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The parts that outlive a configuration, and carry what was learned over."""

    books: Books
    shelves: Shelves
    log: LogListener
    clock: Clock
    chance: Chance
    metrics: Metrics
    events: FanOut
    process_id: str
    board: MemoryBoard
    line: Line
    tasks: JournaledTasks
    recovery: Recovery
    authenticate: Authenticate
    files: Files
    read_task: ReadTask
    results: Results
    kept_inputs: KeptInputs
    spools: SpoolFolder
    studio: PillowStudio
    uptime: KeepUptime
    tracer: Tracer | None
    leaving: Leaving
    fleet: RedisFleet | None

    def today(self) -> str:
        """Tell the day in UTC, as YYYY-MM-DD."""
        moment = datetime.fromtimestamp(self.clock.now_ms() / 1000, UTC)
        return moment.date().isoformat()

    async def announce_key(self, notice: Notice) -> None:
        """Heed a change of keys that this process made, and tell the others."""
        self.authenticate.forget(notice.subject)
        if self.fleet is not None:
            self.fleet.send(notice)

    async def audit(self) -> None:
        """Audit the books, and show the drift."""
        report = await self.books.audit()
        drift = sum(abs(found.drift_nanocredits) for found in report.drifts)
        self.metrics.show_drift(max(drift, len(report.drifts)))

    def chores(self) -> dict[str, Chore]:
        """Name each chore that keeps house, and how often it is done, in seconds."""
        trim = trimmer()

        async def trimmed() -> None:
            await asyncio.to_thread(trim)  # takes milliseconds after a burst

        return {
            "expired uploads": (EXPIRE_EVERY_S, self.files.expire),
            "old idempotency keys": (EXPIRE_EVERY_S, self._forget_keys),
            "tasks over 30 days": (EXPIRE_EVERY_S, self._forget_tasks),
            "sent results": (SWEEP_EVERY_S, self.results.forget_sent),
            "expired results": (EXPIRE_EVERY_S, self._expire),
            "audit": (AUDIT_EVERY_S, self.audit),
            "grants that are over": (GRANTS_EVERY_S, self.books.tenants.expire_grants),
            "low balances": (LOW_EVERY_S, self.books.tenants.tell_low_balances),
            "free memory": (TRIM_EVERY_S, trimmed),
            "what others show": (SAMPLE_EVERY_S, self.metrics.sample),
            "uptime": (ADD_EVERY_S, self.uptime.add),
            "old uptime": (EXPIRE_EVERY_S, self._forget_uptime),
            "open tasks": (BACKLOG_EVERY_S, self._show_backlog),
        }

    async def _show_backlog(self) -> None:
        backlog = await self.books.backlog.read()
        self.metrics.show_backlog(backlog, self.clock.now_ms())

    async def _forget_uptime(self) -> None:
        kept_ms = (KEPT_DAYS + 1) * DAY_MS
        await self.books.uptime.forget(self.clock.now_ms() - kept_ms)

    async def _expire(self) -> None:
        before_ms = self.clock.now_ms() - RESULT_KEPT_MS - RESULT_GRACE_MS
        await self.shelves.results.expire(before_ms)
        await self.kept_inputs.blobs.expire(before_ms)

    async def _forget_tasks(self) -> None:
        before_ms = self.clock.now_ms() - TASK_KEPT_MS
        while len(await self.books.queue.forget_tasks(before_ms, FORGET_AT_ONCE)) > 1:
            await self.clock.sleep(0)

    async def _forget_keys(self) -> None:
        await self.books.tasks.forget_keys(self.clock.now_ms() - KEY_KEPT_MS)


def build_standing(
    settings: Settings, books: Books, log: LogListener, clock: Clock | None
) -> Standing:
    """Build it by the first configuration; the clock is the machine's without one."""
    clock = clock or SystemClock()
    if books.data_dir.seat is not None:
        keep_by_seat(books.data_dir.seat.number)
    chance, metrics = SystemChance(), Metrics(version("imageway"))
    process_id = f"{socket.gethostname()}-{os.getpid()}-{chance.token(HEX, 8)}"
    metrics.watch("log_lines_dropped", lambda: log.dropped_lines)
    uptime = KeepUptime(books.uptime, clock)
    tracer = _tracer(settings, clock)
    listeners = [metrics.on_event, log.on_event, uptime.on_event]
    if tracer is not None:
        listeners.append(tracer.on_event)
    events = FanOut(tuple(listeners), log.on_crash)
    fleet = _fleet(settings, process_id, clock, events, log)
    board = MemoryBoard(clock, chance, events, slots={}, fleet=fleet or Alone())
    shelves = books.shelves(events.emit)
    spools = SpoolFolder(books.data_dir.spool)
    authenticate = Authenticate(
        books.accounts,
        clock,
        books.secret,
        rates=_rates(fleet, MemoryRates(clock, board.share)),
        strangers=MemoryRates(clock),
    )
    if fleet is not None:
        fleet.board = board
        fleet.heed[Topic.KEYS] = authenticate.forget
        metrics.watch("fleet_processes", lambda: board.processes)
    return Standing(
        books=books,
        shelves=shelves,
        log=log,
        clock=clock,
        chance=chance,
        metrics=metrics,
        events=events,
        process_id=process_id,
        board=board,
        line=Line(),
        tasks=_journaled(books, clock, events, metrics),
        recovery=Recovery(books.tasks, books.processes, process_id, clock, events),
        authenticate=authenticate,
        files=Files(books.files, shelves.uploads, clock, chance),
        read_task=ReadTask(books.tasks, books.queue, shelves.results, clock),
        results=Results(shelves.results, clock),
        kept_inputs=KeptInputs(shelves.inputs, spools),
        spools=spools,
        studio=PillowStudio(spools),
        uptime=uptime,
        tracer=tracer,
        leaving=Leaving(clock.monotonic_ms),
        fleet=fleet,
    )


def _tracer(settings: Settings, clock: Clock) -> Tracer | None:
    if not settings.tracing.endpoint:
        return None
    try:
        from gateway.adapters.tracing import Tracer, collector  # noqa: PLC0415 - only where it is asked for
    except ImportError as error:
        raise StartError(
            "tracing.endpoint: tracing is an extra: install imageway[tracing], or "
            "leave it empty."
        ) from error
    sender = collector(settings.tracing.endpoint)
    return Tracer(sender, clock, settings.tracing.one_in)


def _fleet(
    settings: Settings,
    process_id: str,
    clock: Clock,
    events: FanOut,
    log: LogListener,
) -> RedisFleet | None:
    if not settings.storage.redis:
        return None
    from gateway.adapters.hot_redis.connection import Guard, opener  # noqa: PLC0415 - only where it is asked for
    from gateway.adapters.hot_redis.fleet import RedisFleet  # noqa: PLC0415

    guard = Guard(opener(settings.storage.redis), events)
    return RedisFleet(guard, clock, process_id, log.on_crash)


def _rates(fleet: RedisFleet | None, local: MemoryRates) -> Rates:
    if fleet is None:
        return local
    from gateway.adapters.hot_redis.rates import RedisRates  # noqa: PLC0415 - only where it is asked for

    return RedisRates(fleet.guard, local)


async def replay_left_behind(standing: Standing) -> int:
    """Book what processes kept that are not started any more; returns how much.

    Whoever of them still ends its work books it by itself.
    """
    done = 0
    for folder in standing.books.data_dir.left_behind():
        if not folder.journal.is_dir():
            continue
        try:
            taken = folder.lock()
        except DataDirError:
            continue
        try:
            journal = DiskJournal.open(folder.journal)
            events = standing.events
            left = JournaledTasks(standing.books.tasks, journal, standing.clock, events)
            done += await left.replay()
        except UnreadableError as error:
            raise StartError(str(error)) from error
        finally:
            os.close(taken)
    return done


def _journaled(
    books: Books, clock: Clock, events: Events, metrics: Metrics
) -> JournaledTasks:
    try:
        journal = DiskJournal.open(books.data_dir.journal)
    except UnreadableError as error:
        raise StartError(str(error)) from error
    metrics.watch("journal_waiting", lambda: journal.waiting)
    return JournaledTasks(books.tasks, journal, clock, events)
