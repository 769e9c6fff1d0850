"""Builds everything: the only place where flows meet adapters."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from litestar import Litestar, Response
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, ControllerRouterHandler

from gateway.adapters.clock import SystemChance, SystemClock
from gateway.adapters.convert import PillowStudio
from gateway.adapters.data_dir import DataDir
from gateway.adapters.events import FanOut
from gateway.adapters.fetcher import GuardedFetcher
from gateway.adapters.hot_memory import Alone, MemoryBoard
from gateway.adapters.journal import DiskJournal, UnreadableError
from gateway.adapters.logs import LogListener
from gateway.adapters.memory import memory_gauge, trimmer
from gateway.adapters.metrics import Metrics
from gateway.adapters.outbound import SystemResolver
from gateway.adapters.webhooks import GuardedSender
from gateway.api.admin import AdminGate, admin_routes
from gateway.api.credits import credit_routes
from gateway.api.errors import internal_error, render_error
from gateway.api.estimate import estimate_body, estimate_routes
from gateway.api.files import FileApi, file_routes
from gateway.api.front import Front
from gateway.api.health import health_routes
from gateway.api.http import AnyRequest, ClientGoneError, note_of
from gateway.api.images import Images, image_routes
from gateway.api.links import Links, OpenLinks, link_routes
from gateway.api.models import model_routes
from gateway.api.render import Renderer, route_facts
from gateway.api.tasks import task_routes
from gateway.api.upstreams import Explain, explain_routes, upstream_routes
from gateway.api.webhooks import webhook_admin_routes, webhook_routes
from gateway.books import (
    Books,
    Shelves,
    StartError,
    check_storage,
    first_run,
    open_books,
    open_shelves,
)
from gateway.core.addresses import UrlRules
from gateway.core.catalogue import Catalogue
from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    storage_full,
)
from gateway.core.fleet import Notice, Topic
from gateway.core.idempotency import KEY_KEPT_MS
from gateway.core.pressure import LAG_EVERY_MS
from gateway.core.pricing import cost_rule
from gateway.core.requests import parse_generation
from gateway.core.routing import Moment, decide
from gateway.core.webhooks import CallbackRules, Delivery
from gateway.flows.admission import Admission
from gateway.flows.dispatch import Dispatcher, candidate_facts
from gateway.flows.files import FetchFile, Files
from gateway.flows.generate import SYNC_DEADLINE_MS, Generate, wish_of
from gateway.flows.inputs import KeptInputs, LoadInputs
from gateway.flows.journal import REPLAY_EVERY_S, JournaledTasks
from gateway.flows.keys import Authenticate
from gateway.flows.probe import Probe, probe_all
from gateway.flows.recovery import BEAT_EVERY_S, Recovery
from gateway.flows.replay import Replay
from gateway.flows.results import RESULT_KEPT_MS, Results
from gateway.flows.tasks import ManageTasks, ReadTask
from gateway.flows.upstreams import Upstreams
from gateway.flows.webhooks import DeliverWebhooks
from gateway.ports import (
    BlobStore,
    Clock,
    Events,
    Fetcher,
    Sender,
    TaskRecord,
    Tunable,
)
from gateway.serving import Leaving, listen
from gateway.settings import Settings, load_settings
from gateway.workers import Loops, TaskRunner, Worker
from providers.kit.contract import Provider
from providers.kit.spool import SpoolFolder
from providers.kit.wire import Tools, Wire
from providers.registry import PROVIDERS

if TYPE_CHECKING:
    from gateway.adapters.hot_redis.fleet import RedisFleet

SWEEP_EVERY_S = 60.0
EXPIRE_EVERY_S = 900.0
AUDIT_EVERY_S = 3600.0
TRIM_EVERY_S = 2.0
WEBHOOKS_EVERY_S = 1.0
DRAINS_EVERY_S = 1.0
LOOK_EVERY_S = 5.0
CONNECTIONS_SPARE = 1.1
TASK_KEPT_MS = 30 * 24 * 3600 * 1000
FORGET_AT_ONCE = 200
HEX = "0123456789abcdef"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Chore = tuple[float, Callable[[], Awaitable[object]]]
"""How often it is done, in seconds, and what."""
RESULT_GRACE_MS = 1_800_000
"""Links end after 24 h; the files are gone half an hour later."""


def read_settings(config: Path | None, overrides: Mapping[str, str]) -> Settings:
    """Read the configuration, and see that there is an adapter for every upstream."""
    return load_settings(config, kinds=frozenset(PROVIDERS), overrides=overrides)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway ready to serve."""

    app: ASGIApp
    runner: TaskRunner
    worker: Worker
    loops: Loops
    recovery: Recovery
    journaled: JournaledTasks
    catalogue: Catalogue
    providers: Mapping[str, Provider]
    wire: Wire
    log: LogListener
    audit: Callable[[], Awaitable[None]]
    upstreams: Upstreams
    shelves: Shelves
    leaving: Leaving
    leaving_s: float
    fleet: RedisFleet | None = None

    async def run(self) -> None:
        """Work on tasks, and keep house, until cancelled."""
        await asyncio.gather(self.loops.run(), self.worker.run())

    async def leave(self) -> None:
        """Take no further task; end, or let go of, all that were taken."""
        await self.worker.leave()

    async def drain(self) -> None:
        """Wait until the work on requests has ended."""
        await self.runner.drain()

    async def close(self) -> None:
        """Leave the other processes, and give connections back."""
        if late := self.runner.in_flight + self.worker.in_flight:
            self.log.note("drain_timeout", tasks=late)
        await self.journaled.replay()
        try:
            # Who leaves requests unfinished, or not booked, is found to be lost once it
            # is gone: they must not be closed by others while they may end here.
            if not self.runner.in_flight and not self.journaled.journal.waiting:
                await self.recovery.leave()
        except Exception as error:  # noqa: BLE001 - a supervisor: the rest is closed
            self.log.on_crash(error, "leaving")
        for provider in self.providers.values():
            await provider.close()
        await self.wire.close()


def connect_providers(
    settings: Settings, spool: Path
) -> tuple[dict[str, Provider], Wire, Catalogue]:
    """Build the adapters of all upstreams in use, and the catalogue they can do.

    Raises:
        StartError: an upstream's options are wrong.
    """
    chance = SystemChance()
    connections = sum(upstream.max_concurrent for upstream in settings.upstreams)
    wire = Wire(connections_max=int(connections * CONNECTIONS_SPARE) + 1)
    tools = Tools(wire, SpoolFolder(spool), chance.fraction)
    providers: dict[str, Provider] = {}
    for upstream in settings.upstreams:
        try:
            providers[upstream.name] = PROVIDERS[upstream.kind](upstream.account, tools)
        except ValueError as error:
            raise StartError(f"upstream {upstream.name}: {error}") from error

    catalogue = settings.catalogue(
        lambda upstream, model: providers[upstream].capabilities(model)
    )
    return providers, wire, catalogue


@dataclass(frozen=True, slots=True)
class Outside:
    """What reaches addresses that callers name."""

    fetcher: Fetcher
    sender: Sender
    callback_rules: CallbackRules


def reach_outside(settings: Settings) -> Outside:
    """Build what reaches addresses that callers name, as far as the config allows."""
    clock, resolver = SystemClock(), SystemResolver()
    webhooks, inputs = settings.webhooks, settings.inputs
    rules = CallbackRules(webhooks.ports, webhooks.allow_networks)
    schemes = ("https", "http") if inputs.allow_http else ("https",)
    fetcher = GuardedFetcher(
        clock,
        resolver.resolve,
        rules=UrlRules(schemes, inputs.ports),
        allow=inputs.allow_networks,
    )
    # To read all the certificates that are trusted takes a tenth of a second.
    sender = GuardedSender(clock, resolver.resolve, rules, tls=fetcher.tls)
    return Outside(fetcher, sender, rules)


def build_gateway(
    settings: Settings,
    books: Books,
    log: LogListener,
    outside: Outside,
    clock: Clock | None = None,
) -> Gateway:
    """Wire everything together; the clock is the machine's unless one is given."""
    clock = clock or SystemClock()
    chance, metrics = SystemChance(), Metrics()
    process_id = f"{socket.gethostname()}-{os.getpid()}-{chance.token(HEX, 8)}"
    metrics.watch_log(lambda: log.dropped_lines)
    events = FanOut((metrics.on_event, log.on_event), log.on_crash)
    providers, wire, catalogue = connect_providers(settings, books.data_dir.spool)
    offers = [offer for each in catalogue.offers.values() for offer in each]
    metrics.known([offer.id for offer in offers], list(catalogue.variants))
    fleet = _fleet(settings, process_id, clock, events, log)
    board = MemoryBoard(
        clock,
        chance,
        events,
        slots={u.name: u.max_concurrent for u in settings.upstreams},
        fleet=fleet or Alone(),
    )
    shelves = books.shelves(events.emit)
    blobs, uploads = shelves.results, shelves.uploads
    spools = SpoolFolder(books.data_dir.spool)
    results = Results(blobs, clock)
    upstreams = Upstreams(
        catalogue, books.drains, board, clock, events, lambda: _today(clock)
    )
    tasks = _journaled(books, clock, events, metrics)
    generate = Generate(
        catalogue=catalogue,
        store=tasks,
        dispatcher=Dispatcher(
            providers,
            board,
            tasks,
            clock,
            events,
            log.on_crash,
            drained=upstreams.drained,
        ),
        results=results,
        ledger=books.ledger,
        studio=PillowStudio(spools),
        clock=clock,
        chance=chance,
        events=events,
        today=lambda: _today(clock),
        names_upstreams=settings.tenants_may_choose,
        process_id=process_id,
    )
    runner = TaskRunner(generate, log.on_crash)
    admission = Admission(
        board=board,
        line=generate.dispatcher.line,
        catalogue=catalogue,
        clock=clock,
        chance=chance,
        events=events,
        in_flight=lambda: runner.in_flight,
        memory_share=memory_gauge(),
        drained=upstreams.drained,
    )
    metrics.watch_waiting(
        catalogue.variants, admission.waiting, lambda: admission.lag_ms
    )
    recovery = Recovery(books.tasks, books.processes, process_id, clock, events)
    leaving = Leaving(clock.monotonic_ms)
    authenticate = Authenticate(books.accounts, clock, books.secret)
    links = Links(books.secret, settings.server.public_url)
    renderer = Renderer(settings.nanocredits_per_usd)
    gate = AdminGate(settings.server.admin_key)
    read_task = ReadTask(books.tasks, books.queue, blobs, clock)
    kept_inputs = KeptInputs(shelves.inputs, spools)
    worker = Worker(
        queue=books.queue,
        generate=generate,
        catalogue=catalogue,
        kept_inputs=kept_inputs,
        clock=clock,
        crashed=log.on_crash,
        at_once=sum(u.max_concurrent for u in settings.upstreams),
        places=_places(settings, catalogue),
        share=board.share,
    )
    images = Images(
        catalogue=catalogue,
        authenticate=authenticate,
        generate=generate,
        admission=admission,
        load_inputs=LoadInputs(outside.fetcher, books.files, uploads, spools, clock),
        runner=runner,
        results=results,
        links=links,
        renderer=renderer,
        spools=spools,
        replay=Replay(books.tasks, read_task, blobs, clock, spools),
        kept_inputs=kept_inputs,
        callback_rules=outside.callback_rules,
        wake_worker=worker.wake_any,
        storage_trouble=shelves.trouble,
        tenants_may_choose=settings.tenants_may_choose,
    )
    files = Files(books.files, uploads, clock, chance)
    file_api = FileApi(
        authenticate=authenticate,
        files=files,
        fetch=FetchFile(files, outside.fetcher, spools),
        spools=spools,
        links=links,
        tenants=books.tenants,
        storage_trouble=shelves.trouble,
    )

    async def rendered(delivery: Delivery) -> bytes:
        view = await read_task(delivery.task_id, delivery.tenant_id)
        origin = view.record.origin if view.record is not None else ""
        link_to = links.at(settings.server.public_url.rstrip("/") or origin)
        return msgspec.json.encode(renderer.task(view, link_to))

    deliver = DeliverWebhooks(
        outbox=books.outbox,
        sender=outside.sender,
        signing_keys=books.accounts,
        render=rendered,
        clock=clock,
        chance=chance,
        events=events,
        pepper=books.secret,
        crashed=log.on_crash,
        tries_after_s=settings.webhooks.tries_after_s,
    )
    house = _House(books, blobs, kept_inputs, results, metrics, clock)
    inner = _litestar(
        [
            *image_routes(images),
            *estimate_routes(authenticate, catalogue, settings.nanocredits_per_usd),
            *task_routes(
                authenticate,
                gate,
                read_task,
                ManageTasks(books.queue, read_task, clock),
                links,
                renderer,
            ),
            *credit_routes(authenticate, books.tenants),
            *model_routes(authenticate, catalogue),
            *link_routes(OpenLinks(links, blobs, uploads, clock)),
            *file_routes(file_api),
            *webhook_routes(authenticate, books.webhooks, clock),
            *webhook_admin_routes(gate, books.webhooks),
            *admin_routes(gate, _sandboxes(providers)),
            *upstream_routes(gate, upstreams),
            *explain_routes(
                gate,
                Explain(catalogue, books.accounts, upstreams, generate.check_route),
            ),
            *health_routes(
                {
                    "process": leaving.check,
                    "database": _database_check(books),
                    **shelves.checks,
                },
                metrics.render,
            ),
        ],
        log,
    )
    return Gateway(
        app=Front(inner, clock, chance, events, log.on_crash, lambda: leaving.begun),
        runner=runner,
        worker=worker,
        loops=Loops(
            clock,
            log.on_crash,
            {
                "signs of life": (BEAT_EVERY_S, recovery.beat),
                "lost processes": (BEAT_EVERY_S, recovery.lost),
                "overdue tasks": (SWEEP_EVERY_S, recovery.overdue),
                "expired uploads": (EXPIRE_EVERY_S, files.expire),
                "webhooks": (WEBHOOKS_EVERY_S, deliver),
                "journal": (REPLAY_EVERY_S, tasks.replay),
                "drained upstreams": (DRAINS_EVERY_S, upstreams.refresh),
                "pressure": (LAG_EVERY_MS / 1000, admission.watch),
                **_lookout(shelves),
                **house.chores(),
            },
        ),
        recovery=recovery,
        journaled=tasks,
        catalogue=catalogue,
        providers=providers,
        wire=wire,
        log=log,
        audit=house.audit,
        upstreams=upstreams,
        leaving=leaving,
        leaving_s=settings.server.leaving_s,
        shelves=shelves,
        fleet=_joined(fleet, board, worker, authenticate, metrics),
    )


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


def _joined(
    fleet: RedisFleet | None,
    board: MemoryBoard,
    worker: Worker,
    authenticate: Authenticate,
    metrics: Metrics,
) -> RedisFleet | None:
    if fleet is None:
        return None
    fleet.board = board
    fleet.heed[Topic.TASKS] = lambda _: worker.wake()
    fleet.heed[Topic.KEYS] = authenticate.forget
    worker.tell_others = partial(fleet.send, Notice(Topic.TASKS))
    metrics.watch_fleet(lambda: board.processes)
    return fleet


@dataclass(frozen=True, slots=True)
class _House:
    """What is kept in order while the gateway runs."""

    books: Books
    blobs: BlobStore
    kept_inputs: KeptInputs
    results: Results
    metrics: Metrics
    clock: Clock

    def chores(self) -> dict[str, Chore]:
        """Name each chore, and how often it is done, in seconds."""
        trim = trimmer()

        async def trimmed() -> None:
            await asyncio.to_thread(trim)  # takes milliseconds after a burst

        return {
            "old idempotency keys": (EXPIRE_EVERY_S, self._forget_keys),
            "tasks over 30 days": (EXPIRE_EVERY_S, self._forget_tasks),
            "sent results": (SWEEP_EVERY_S, self.results.forget_sent),
            "expired results": (EXPIRE_EVERY_S, self._expire),
            "audit": (AUDIT_EVERY_S, self.audit),
            "free memory": (TRIM_EVERY_S, trimmed),
        }

    async def audit(self) -> None:
        """Audit the books, and show the drift."""
        report = await self.books.audit()
        drift = sum(abs(found.drift_nanocredits) for found in report.drifts)
        self.metrics.drift.set(max(drift, len(report.drifts)))

    async def _expire(self) -> None:
        before_ms = self.clock.now_ms() - RESULT_KEPT_MS - RESULT_GRACE_MS
        await self.blobs.expire(before_ms)
        await self.kept_inputs.blobs.expire(before_ms)

    async def _forget_tasks(self) -> None:
        before_ms = self.clock.now_ms() - TASK_KEPT_MS
        while len(await self.books.queue.forget_tasks(before_ms, FORGET_AT_ONCE)) > 1:
            await self.clock.sleep(0)

    async def _forget_keys(self) -> None:
        await self.books.tasks.forget_keys(self.clock.now_ms() - KEY_KEPT_MS)


@asynccontextmanager
async def started(
    settings: Settings,
) -> AsyncIterator[tuple[Gateway, socket.socket, str | None]]:
    """Bring a gateway to where it can serve; also gives the first key, if new.

    What a dead process left open is closed before the first request is taken.

    Raises:
        StartError: it cannot start.
    """
    log = LogListener()
    listening = listen(settings.server.host, settings.server.port)
    async with open_books(settings, alone=True) as books:
        # Only now: commands run beside a live gateway and its spools.
        swept = SpoolFolder(books.data_dir.spool).sweep()
        outside = reach_outside(settings)
        gateway = build_gateway(settings, books, log, outside)
        # Before anybody looks for tasks that were left open.
        replayed = await gateway.journaled.replay()
        alone = books.database.single_process
        recovered = await gateway.recovery.after_start(alone=alone)
        taken_over = await books.queue.reclaim() if alone else 0
        first = await first_run(books)
        await gateway.audit()
        await gateway.upstreams.refresh()
        if gateway.shelves.look is not None:
            await gateway.shelves.look()
        if gateway.fleet is not None:
            await gateway.fleet.exchange()
        log.note(
            "started",
            replayed_entries=replayed,
            recovered_tasks=recovered,
            taken_over_tasks=taken_over,
            swept_spools=swept,
        )
        async with _sharing(gateway.fleet):
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


def _journaled(
    books: Books, clock: Clock, events: Events, metrics: Metrics
) -> JournaledTasks:
    try:
        journal = DiskJournal.open(books.data_dir.journal)
    except UnreadableError as error:
        raise StartError(str(error)) from error
    metrics.watch_journal(lambda: journal.waiting)
    return JournaledTasks(books.tasks, journal, clock, events)


def _litestar(handlers: list[ControllerRouterHandler], log: LogListener) -> Litestar:
    def refused(request: AnyRequest, error: GatewayError) -> Response[bytes]:
        note = note_of(request.scope)
        note.error_code = error.code
        note.client_gone = isinstance(error, ClientGoneError)
        rendered = render_error(error, note.id, request.scope["path"])
        return Response(
            rendered.body, status_code=rendered.status, headers=dict(rendered.headers)
        )

    def turned_away(request: AnyRequest, error: HTTPException) -> Response[bytes]:
        return refused(request, _from_framework(error, request))

    def crashed(request: AnyRequest, error: Exception) -> Response[bytes]:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return refused(request, storage_full())
        log.on_crash(error, note_of(request.scope).id)
        return refused(request, internal_error())

    return Litestar(
        handlers,
        openapi_config=None,
        logging_config=None,
        exception_handlers={
            GatewayError: refused,
            HTTPException: turned_away,
            Exception: crashed,
        },
    )


def _from_framework(error: HTTPException, request: AnyRequest) -> GatewayError:
    where = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 404:  # noqa: PLR2004
        return NotFoundError(
            f"There is nothing at {where}. Check the path and the base URL, which "
            "ends in /v1.",
            code="route_not_found",
        )
    code = {405: "method_not_allowed", 413: "request_too_large"}
    refusal = InvalidRequestError(
        f"{where} was not understood: {error.detail}.",
        code=code.get(error.status_code, "invalid_request"),
    )
    refusal.status = error.status_code
    return refusal


def _sandboxes(providers: Mapping[str, Provider]) -> dict[str, Tunable]:
    found = {name: getattr(p, "settings", None) for name, p in providers.items()}
    return {name: tunable for name, tunable in found.items() if tunable is not None}


def _lookout(shelves: Shelves) -> dict[str, Chore]:
    return {"picture store": (LOOK_EVERY_S, shelves.look)} if shelves.look else {}


def _places(settings: Settings, catalogue: Catalogue) -> dict[str, int]:
    slots = {u.name: u.max_concurrent for u in settings.upstreams}
    return {
        variant: sum(slots[name] for name in {offer.upstream for offer in offers})
        for variant, offers in catalogue.offers.items()
    }


def _database_check(books: Books) -> Callable[[], Awaitable[str | None]]:
    async def check() -> str | None:
        try:
            await books.ledger.balance("")
        except GatewayError as error:
            return str(error)
        return None

    return check


def _today(clock: Clock) -> str:
    moment = datetime.fromtimestamp(clock.now_ms() / 1000, UTC)
    return moment.date().isoformat()


# --- what commands ask without a running gateway ---


def checked_catalogue(settings: Settings) -> Catalogue:
    """Build the catalogue as a gateway would.

    Raises:
        StartError: an upstream's options, or where to store, cannot be used.
    """
    check_storage(settings)
    providers, _, catalogue = connect_providers(
        settings, DataDir(settings.storage.data_dir).spool
    )
    del providers
    return catalogue


def warnings_of(settings: Settings) -> tuple[str, ...]:
    """Tell all that an operator should look at, as of today."""
    return settings.warnings + settings.aging(_today(SystemClock()))


async def probed(settings: Settings) -> list[Probe]:
    """Test the credential of each upstream in use with a free call.

    Raises:
        StartError: an upstream's options are wrong.
    """
    providers, wire, _ = connect_providers(
        settings, DataDir(settings.storage.data_dir).spool
    )
    models: dict[str, str] = {}
    for offer in settings.offers:
        models.setdefault(offer.upstream, offer.model)
    try:
        return await probe_all(providers, models)
    finally:
        for provider in providers.values():
            await provider.close()
        await wire.close()


async def probed_store(settings: Settings) -> str | None:
    """Ask the object store for a list; tells what is wrong with it, or None.

    Nothing is written, and nothing is asked where pictures are on the disk.
    """
    data_dir = DataDir(settings.storage.data_dir)
    shelves = open_shelves(settings.storage, data_dir, secret=b"")
    return await shelves.glance() if shelves.glance else None


def estimated(settings: Settings, body: object) -> dict[str, object]:
    """Price a request body, as ``POST /v1/estimate`` does."""
    catalogue = Catalogue(variants=settings.variants, offers={})
    return estimate_body(body, catalogue, settings.nanocredits_per_usd)


def route_of(settings: Settings, body: object) -> list[dict[str, object]]:
    """Tell where a fresh gateway would send a request body."""
    catalogue = checked_catalogue(settings)
    request = parse_generation(body, catalogue, prompt_optional=True)
    cost_nanousd = cost_rule(request)
    priced = [
        (offer, cost_nanousd(offer, request.n))
        for offer in catalogue.offers[request.variant.name]
    ]
    moment = Moment(_today(SystemClock()), SYNC_DEADLINE_MS)
    decision = decide(wish_of(request), priced, {}, moment)
    return [candidate_facts(candidate, decision) for candidate in decision.all]


def explained(record: TaskRecord) -> dict[str, object]:
    """Show a stored decision and its attempts."""
    return {
        "task_id": record.id,
        "variant": record.variant,
        "state": record.state.value,
        **route_facts(record),
    }


def as_json(body: dict[str, object]) -> str:
    """Encode a body that holds exact numbers."""
    return msgspec.json.encode(body).decode()
