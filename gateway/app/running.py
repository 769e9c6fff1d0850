"""A gateway that serves, by one configuration after the other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING

from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.adapters.hot_memory import Bygone
from gateway.adapters.logs import LogListener
from gateway.api.front import Front
from gateway.app.edition import Around, Edition, build_edition
from gateway.app.standing import (
    Chore,
    Standing,
    build_standing,
    replay_left_behind,
)
from gateway.books import Books, StartError, first_run, open_books
from gateway.core.catalogue import Catalogue
from gateway.core.errors import ConfigRefusedError, ServiceUnavailableError
from gateway.core.fleet import Notice, Topic
from gateway.core.pressure import LAG_EVERY_MS
from gateway.flows.journal import REPLAY_EVERY_S
from gateway.flows.recovery import BEAT_EVERY_S
from gateway.flows.reload import LOOK_EVERY_S, ReloadConfig, Swapped
from gateway.flows.webhooks import DeliverWebhooks
from gateway.ports import Clock
from gateway.serving import Leaving, Place, listen
from gateway.settings import ConfigError, Settings
from gateway.workers import Loops, TaskRunner, Worker
from providers.kit.contract import Account
from providers.kit.spool import SpoolFolder

if TYPE_CHECKING:
    from gateway.adapters.hot_redis.fleet import RedisFleet

WEBHOOKS_EVERY_S = 1.0
DRAINS_EVERY_S = 1.0
UPSTREAMS_EVERY_S = 1.0
STORE_EVERY_S = 5.0
RETIRED_EVERY_S = 1.0
RETIRED_MAX_EDITIONS = 8
"""Each keeps its connections until the last request by it has ended."""
SWEEP_EVERY_S = 60.0
ONLY_AT_START = ("host", "port", "secret")
"""Of the section server; all of the sections storage and tracing are."""
LEAVING = "the process is about to stop"
DERIVED = frozenset({"warnings", "files"})
"""What of the settings says nothing of its own."""

ReadAgain = Callable[[], Settings]


@dataclass(slots=True)
class Gateway:
    """A gateway ready to serve.

    ``edition`` is made of the configuration in use. A reload puts another in its place
    and retires it: requests and tasks that it has begun end by it.
    """

    standing: Standing
    read_again: ReadAgain
    edition: Edition = field(init=False)
    reload: ReloadConfig = field(init=False)
    deliver: DeliverWebhooks = field(init=False)
    loops: Loops = field(init=False)
    app: ASGIApp = field(init=False)
    _retired: list[Edition] = field(default_factory=list)
    _accounts: dict[str, Account] = field(default_factory=dict)
    """The last one of every upstream that there was."""
    _reload_asked: asyncio.Event = field(default_factory=asyncio.Event)
    _everywhere: bool = False

    @property
    def leaving(self) -> Leaving:
        """Tells its own parts that the process is about to stop."""
        return self.standing.leaving

    @property
    def leaving_s(self) -> float:
        """How long requests are still taken by then."""
        return self.edition.settings.server.leaving_s

    @property
    def runner(self) -> TaskRunner:
        """Carries out the requests that come now."""
        return self.edition.runner

    @property
    def worker(self) -> Worker:
        """Takes tasks from the queue now."""
        return self.edition.worker

    @property
    def catalogue(self) -> Catalogue:
        """What is offered now."""
        return self.edition.catalogue

    def in_flight(self) -> int:
        """Count the sync requests under way."""
        return sum(each.runner.in_flight for each in self._editions())

    def reload_soon(self) -> None:
        """Have this process and all others read their configuration again."""
        self._everywhere = True
        self._reload_asked.set()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request by the configuration in use."""
        await self.edition(scope, receive, send)

    async def run(self) -> None:
        """Work on tasks, and keep house, until cancelled."""
        await asyncio.gather(self.loops.run(), self._work(), self._keep_reloading())

    async def leave(self) -> None:
        """Take no further task; end, or let go of, all that were taken."""
        await asyncio.gather(*(each.worker.leave() for each in self._editions()))

    async def drain(self) -> None:
        """Wait until the work on requests has ended."""
        await asyncio.gather(*(each.runner.drain() for each in self._editions()))

    async def close(self) -> None:
        """Leave the other processes, and give connections back."""
        standing, editions = self.standing, self._editions()
        late = sum(each.worker.in_flight for each in editions) + self.in_flight()
        if late:
            standing.log.note("drain_timeout", tasks=late)
        await standing.tasks.replay()
        with suppress(ServiceUnavailableError):
            await standing.uptime.add()
        try:
            # Who leaves requests unfinished, or not booked, is found to be lost once it
            # is gone: they must not be closed by others while they may end here.
            if not self.in_flight() and not standing.tasks.journal.waiting:
                await standing.recovery.leave()
        except Exception as error:  # noqa: BLE001 - a supervisor: the rest is closed
            standing.log.on_crash(error, "leaving")
        for edition in editions:
            await edition.close()
        if standing.tracer is not None:
            await asyncio.to_thread(standing.tracer.close)

    def begin(self, edition: Edition) -> None:
        """Put an edition into use."""
        standing = self.standing
        self.edition = edition
        standing.log.level = edition.settings.log_level
        settings, catalogue = edition.settings, edition.catalogue
        self._accounts = self._accounts | _accounts_of(settings)
        standing.board.refit({u.name: u.max_concurrent for u in settings.upstreams})
        standing.metrics.known(catalogue)
        standing.metrics.watch_waiting(
            catalogue.variants,
            self._waiting,
            lambda: self.edition.admission.lag_ms,
        )
        edition.worker.beside = self._worked_on_before
        if standing.fleet is not None:
            send = partial(standing.fleet.send, Notice(Topic.TASKS))
            edition.worker.tell_others = send

    def _editions(self) -> list[Edition]:
        return [*self._retired, self.edition]

    def _worked_on_before(self) -> frozenset[str]:
        return frozenset[str]().union(*(each.worker.working for each in self._retired))

    async def _work(self) -> None:
        while True:
            edition = self.edition
            await edition.worker.run()
            if edition is self.edition:
                return

    async def _keep_reloading(self) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            everywhere, self._everywhere = self._everywhere, False
            try:
                await (self.reload.everywhere() if everywhere else self.reload.look())
            except ConfigRefusedError:
                continue  # it was told of
            except Exception as error:  # noqa: BLE001 - a supervisor: the next may do
                self.standing.log.on_crash(error, "reloading the configuration")

    async def swap(self) -> Swapped:
        """Read the configuration, and take it over as a whole.

        Raises:
            ConfigRefusedError: it cannot be used; nothing has changed.
        """
        before = self.edition
        settings = await self._checked(before.settings)
        changed = _differing(before.settings, settings)
        if not changed:
            return Swapped(())
        try:
            # Reading certificates alone takes 100 ms of a processor.
            edition = await asyncio.to_thread(
                build_edition, settings, self.standing, self.around(), before
            )
        except StartError as error:
            raise ConfigRefusedError([str(error)]) from error
        with suppress(ServiceUnavailableError):  # the next look may do
            await edition.upstreams.refresh()
        if self.leaving.begun:
            await edition.close()
            raise ConfigRefusedError([LEAVING])
        accounts = self._accounts
        self._retired.append(before)
        self.begin(edition)
        self.deliver.sender = edition.outside.sender
        self.deliver.render = edition.render
        self.deliver.tries_after_s = settings.webhooks.tries_after_s
        before.worker.stop()
        # What was learned of an account says nothing of the one in its place, nor does
        # what will be by requests that go on with it.
        for each in self._retired:
            gone = _differing_accounts(_accounts_of(each.settings), self._accounts)
            dispatcher = each.runner.generate.dispatcher
            dispatcher.board = Bygone(self.standing.board, gone)
        for name in _differing_accounts(accounts, self._accounts):
            await self.standing.board.reset(name)
        return Swapped(changed, settings.warnings)

    async def _checked(self, before: Settings) -> Settings:
        if self.leaving.begun:
            raise ConfigRefusedError([LEAVING])
        await self._close_retired()
        if len(self._retired) >= RETIRED_MAX_EDITIONS:
            problem = (
                f"work by {len(self._retired)} configurations before this one has not "
                "ended yet: wait until it has"
            )
            raise ConfigRefusedError([problem])
        try:
            settings = await asyncio.to_thread(self.read_again)
        except ConfigError as error:
            raise ConfigRefusedError([str(each) for each in error.problems]) from error
        problems = [
            f"{path}: takes a restart to change; put the old value back until then"
            for path in _only_at_start(before, settings)
        ]
        if problems:
            raise ConfigRefusedError(problems)
        return settings

    async def _close_retired(self) -> None:
        idle = [each for each in self._retired if each.idle]
        self._retired = [each for each in self._retired if not each.idle]
        for edition in idle:
            await edition.close()

    def around(self) -> Around:
        """Tell an edition what it may ask of this gateway."""
        return Around(
            wake_worker=self._wake_worker,
            in_flight=self.in_flight,
            reload=self._reload_everywhere,
        )

    # What is asked of the edition in use, whichever it is by then:

    def _wake_worker(self) -> None:
        self.edition.worker.wake_any()

    def _waiting(self, variant: str) -> int:
        return self.edition.admission.waiting(variant)

    async def _refresh_drains(self) -> None:
        await self.edition.upstreams.refresh()
        for each in self._retired:
            each.upstreams.follow(self.edition.upstreams)

    async def _show_upstreams(self) -> None:
        # Whoever looks also notices circuits that nobody asks of any more.
        views = await self.edition.upstreams.views()
        self.standing.metrics.show_upstreams({v.name: v.up for v in views})

    async def _watch_pressure(self) -> None:
        await self.edition.admission.watch()

    async def _reload_everywhere(self) -> Swapped:
        return await self.reload.everywhere()

    def chores(self) -> dict[str, Chore]:
        """Name each chore, and how often it is done, in seconds."""
        standing = self.standing
        look = standing.shelves.look
        return {
            "signs of life": (BEAT_EVERY_S, standing.recovery.beat),
            "lost processes": (BEAT_EVERY_S, standing.recovery.lost),
            "overdue tasks": (SWEEP_EVERY_S, standing.recovery.overdue),
            "webhooks": (WEBHOOKS_EVERY_S, self.deliver),
            "journal": (REPLAY_EVERY_S, standing.tasks.replay),
            "drained upstreams": (DRAINS_EVERY_S, self._refresh_drains),
            "how upstreams are": (UPSTREAMS_EVERY_S, self._show_upstreams),
            "pressure": (LAG_EVERY_MS / 1000, self._watch_pressure),
            "reloads": (LOOK_EVERY_S, self.reload.look),
            "configurations before": (RETIRED_EVERY_S, self._close_retired),
            **({"picture store": (STORE_EVERY_S, look)} if look else {}),
            **standing.chores(),
        }

    def heed_reloads(self, _: str) -> None:
        """Look soon whether somebody asked for a reload."""
        self._reload_asked.set()


def _differing(before: Settings, after: Settings) -> tuple[str, ...]:
    return tuple(
        each.name
        for each in fields(Settings)
        if each.name not in DERIVED
        and getattr(before, each.name) != getattr(after, each.name)
    )


def _accounts_of(settings: Settings) -> dict[str, Account]:
    return {upstream.name: upstream.account for upstream in settings.upstreams}


def _differing_accounts(
    before: Mapping[str, Account], after: Mapping[str, Account]
) -> frozenset[str]:
    return frozenset(
        name for name in before.keys() & after.keys() if before[name] != after[name]
    )


def _only_at_start(before: Settings, after: Settings) -> list[str]:
    names = [("server", name) for name in ONLY_AT_START]
    names += [("storage", each.name) for each in fields(before.storage)]
    names += [("tracing", each.name) for each in fields(before.tracing)]
    return [
        f"{section}.{name}"
        for section, name in names
        if getattr(getattr(before, section), name)
        != getattr(getattr(after, section), name)
    ]


def build_gateway(
    settings: Settings,
    books: Books,
    log: LogListener,
    clock: Clock | None = None,
    read_again: ReadAgain | None = None,
) -> Gateway:
    """Wire everything together; the clock is the machine's unless one is given.

    Without ``read_again`` a reload finds nothing new.

    Raises:
        StartError: it cannot be done by these settings.
    """
    standing = build_standing(settings, books, log, clock)
    gateway = Gateway(standing, read_again or (lambda: settings))
    fleet = standing.fleet
    gateway.reload = ReloadConfig(
        books.reloads,
        standing.process_id,
        gateway.swap,
        standing.events,
        announce=fleet.send if fleet is not None else lambda _: None,
    )
    edition = build_edition(settings, standing, gateway.around())
    gateway.begin(edition)
    gateway.deliver = DeliverWebhooks(
        outbox=books.outbox,
        sender=edition.outside.sender,
        signing_keys=books.accounts,
        render=edition.render,
        clock=standing.clock,
        chance=standing.chance,
        events=standing.events,
        pepper=books.secret,
        crashed=log.on_crash,
        tries_after_s=settings.webhooks.tries_after_s,
    )
    gateway.loops = Loops(standing.clock, log.on_crash, gateway.chores())
    gateway.app = Front(
        gateway.handle,
        standing.clock,
        standing.chance,
        standing.events,
        log.on_crash,
        lambda: standing.leaving.begun,
        lambda: gateway.edition.settings.server.trusted_proxies,
    )
    if fleet is not None:
        fleet.heed[Topic.TASKS] = lambda _: gateway.worker.wake()
        fleet.heed[Topic.CONFIG] = gateway.heed_reloads
    return gateway


@asynccontextmanager
async def started(
    settings: Settings, read_again: ReadAgain, place: Place | None = None
) -> AsyncIterator[tuple[Gateway, socket.socket, str | None]]:
    """Bring a gateway to where it can serve; also gives the first key, if new.

    What a dead process left open is closed before the first request is taken. Without
    a ``place`` the process is the only one of its data folder, and takes the port.

    Raises:
        StartError: it cannot start.
    """
    log = LogListener()
    if place is None:
        listening, seat = listen(settings.server.host, settings.server.port), None
    else:
        listening, seat = place.listening, place.seat
    async with open_books(settings, alone=True, seat=seat) as books:
        # Only now: commands run beside a live gateway and its spools.
        swept = SpoolFolder(books.data_dir.spool).sweep()
        gateway = build_gateway(settings, books, log, read_again=read_again)
        standing = gateway.standing
        # Before anybody looks for tasks that were left open.
        replayed = await replay_left_behind(standing) + await standing.tasks.replay()
        alone = books.database.single_process
        recovered = await standing.recovery.after_start(alone=alone)
        taken_over = await books.queue.reclaim() if alone else 0
        first = await first_run(books) if place is None else None
        try:
            await standing.audit()
        except ServiceUnavailableError as error:
            log.on_crash(error, "audit")  # it is hourly: no reason not to serve
        await gateway.edition.upstreams.refresh()
        if standing.shelves.look is not None:
            await standing.shelves.look()
        if standing.fleet is not None:
            await standing.fleet.exchange()
        await gateway.reload.begin()
        if settings.server.admin_key is None:
            log.note("admin_routes_off", why="server.admin_key is not set")
        log.note(
            "started",
            replayed_entries=replayed,
            recovered_tasks=recovered,
            taken_over_tasks=taken_over,
            swept_spools=swept,
        )
        async with _sharing(standing.fleet):
            yield gateway, listening, first.secret if first else None
    log.note("stopped")


@asynccontextmanager
async def _sharing(fleet: RedisFleet | None) -> AsyncIterator[None]:
    # As long as there may be calls, drained or late: until then they have slots that
    # other processes must not take.
    if fleet is None:
        yield
        return
    shared = asyncio.create_task(fleet.run())
    try:
        yield
    finally:
        shared.cancel()
        await asyncio.wait({shared})
