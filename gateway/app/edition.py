"""Everything that is made of one configuration, and is swapped whole for the next."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from litestar import Litestar, Response
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, ControllerRouterHandler, Receive, Scope, Send

from gateway.adapters.clock import SystemChance, SystemClock
from gateway.adapters.fetcher import GuardedFetcher
from gateway.adapters.logs import LogListener
from gateway.adapters.memory import memory_gauge
from gateway.adapters.outbound import SystemResolver
from gateway.adapters.webhooks import GuardedSender
from gateway.api.admin import AdminGate, admin_routes
from gateway.api.books import book_routes
from gateway.api.credits import CreditsApi, credit_routes
from gateway.api.errors import internal_error, render_error
from gateway.api.estimate import estimate_routes
from gateway.api.files import FileApi, file_routes
from gateway.api.health import health_routes
from gateway.api.http import AnyRequest, note_of
from gateway.api.images import Images, image_routes
from gateway.api.keys import KeyAdmin, key_routes
from gateway.api.links import Links, OpenLinks, link_routes
from gateway.api.models import model_routes
from gateway.api.pages import page_routes, read_pages
from gateway.api.reload import Reload, reload_routes
from gateway.api.render import Renderer
from gateway.api.sessions import Cookies, SessionApi, Sessions, session_routes
from gateway.api.status import status_routes
from gateway.api.tasks import task_routes
from gateway.api.tenants import WHO, TenantsApi, tenant_routes
from gateway.api.upstreams import Explain, explain_routes, upstream_routes
from gateway.api.webhooks import webhook_admin_routes, webhook_routes
from gateway.app.standing import Standing
from gateway.books import Books, StartError, callback_rules, names_for_keys
from gateway.core.addresses import UrlRules
from gateway.core.catalogue import Catalogue
from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    storage_full,
)
from gateway.core.fleet import Notice
from gateway.core.webhooks import CallbackRules, Delivery
from gateway.flows.admission import Admission
from gateway.flows.dispatch import Dispatcher
from gateway.flows.files import FetchFile
from gateway.flows.generate import Generate
from gateway.flows.inputs import LoadInputs
from gateway.flows.replay import Replay
from gateway.flows.tasks import ManageTasks
from gateway.flows.upstreams import Upstreams
from gateway.flows.uptime import ReadUptime
from gateway.ports import Fetcher, Sender, Tunable
from gateway.settings import Settings, load_settings
from gateway.workers import TaskRunner, Worker
from providers.kit.contract import Provider
from providers.kit.spool import SpoolFolder
from providers.kit.wire import Tools, Wire
from providers.registry import PROVIDERS

CONNECTIONS_SPARE = 1.1
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def read_settings(config: Path | None, overrides: Mapping[str, str]) -> Settings:
    """Read the configuration, and see that there is an adapter for every upstream."""
    return load_settings(config, kinds=frozenset(PROVIDERS), overrides=overrides)


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
    inputs = settings.inputs
    rules = callback_rules(settings)
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


@dataclass(frozen=True, slots=True)
class Around:
    """What an edition asks of the gateway that it is the present one of.

    ``in_flight`` counts the sync requests of all editions.
    """

    wake_worker: Callable[[], None]
    in_flight: Callable[[], int]
    reload: Reload


@dataclass(slots=True)
class Edition:
    """The gateway by one configuration. Requests stay with the one they came to."""

    settings: Settings
    inner: ASGIApp
    runner: TaskRunner
    worker: Worker
    admission: Admission
    upstreams: Upstreams
    catalogue: Catalogue
    providers: Mapping[str, Provider]
    wire: Wire
    outside: Outside
    render: Callable[[Delivery], Awaitable[bytes]]
    """Writes the body of a webhook."""
    requests: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        self.requests += 1
        try:
            await self.inner(scope, receive, send)
        finally:
            self.requests -= 1

    @property
    def idle(self) -> bool:
        """Whether nothing goes on by this configuration."""
        return not (self.requests or self.runner.in_flight or self.worker.in_flight)

    async def close(self) -> None:
        """Give connections back."""
        for provider in self.providers.values():
            await provider.close()
        await self.wire.close()


def build_edition(
    settings: Settings,
    standing: Standing,
    around: Around,
    before: Edition | None = None,
) -> Edition:
    """Wire everything together; what ``before`` has learned is taken over.

    Nothing of it is in use yet.

    Raises:
        StartError: an upstream's options are wrong.
    """
    books, shelves, clock = standing.books, standing.shelves, standing.clock
    chance, log, board = standing.chance, standing.log, standing.board
    events = standing.events
    outside = reach_outside(settings)
    providers, wire, catalogue = connect_providers(settings, books.data_dir.spool)
    upstreams = _upstreams(standing, catalogue, before)
    dispatcher = Dispatcher(
        providers,
        board,
        standing.tasks,
        clock,
        events,
        log.on_crash,
        drained=upstreams.drained,
        line=standing.line,
    )
    if before is not None:
        dispatcher.budget = before.runner.generate.dispatcher.budget
    generate = Generate(
        catalogue=catalogue,
        store=standing.tasks,
        dispatcher=dispatcher,
        results=standing.results,
        ledger=books.ledger,
        studio=standing.studio,
        clock=clock,
        chance=chance,
        events=events,
        today=standing.today,
        names_upstreams=settings.tenants_may_choose,
        process_id=standing.process_id,
    )
    runner = TaskRunner(generate, log.on_crash)
    admission = _admission(standing, catalogue, around, upstreams, before)
    authenticate, read_task = standing.authenticate, standing.read_task
    links = Links(books.secret, settings.server.public_url)
    renderer = Renderer(settings.nanocredits_per_usd)
    gate = AdminGate(settings.server.admin_key)
    spools, kept_inputs = standing.spools, standing.kept_inputs
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
        load_inputs=LoadInputs(
            outside.fetcher, books.files, shelves.uploads, spools, clock
        ),
        runner=runner,
        results=standing.results,
        links=links,
        renderer=renderer,
        spools=spools,
        replay=Replay(books.tasks, read_task, shelves.results, clock, spools),
        kept_inputs=kept_inputs,
        callback_rules=outside.callback_rules,
        wake_worker=around.wake_worker,
        storage_trouble=shelves.trouble,
        tenants_may_choose=settings.tenants_may_choose,
    )
    file_api = FileApi(
        authenticate=authenticate,
        files=standing.files,
        fetch=FetchFile(standing.files, outside.fetcher, spools),
        spools=spools,
        links=links,
        tenants=books.tenants,
        storage_trouble=shelves.trouble,
    )

    shows = CreditsApi(books.tenants, books.read)

    async def announce(notice: Notice) -> None:
        authenticate.forget(notice.subject)
        await books.announce(notice)

    manage = replace(
        books.tenants.acting_as(WHO),
        callback_rules=outside.callback_rules,
        announce=announce,
    )

    async def rendered(delivery: Delivery) -> bytes:
        if delivery.body is not None:
            return delivery.body.encode()
        view = await read_task(delivery.task_id, delivery.tenant_id)
        origin = view.record.origin if view.record is not None else ""
        link_to = links.at(settings.server.public_url.rstrip("/") or origin)
        return msgspec.json.encode(renderer.task(view, link_to))

    sessions = Sessions(books.secret, settings.server.public_url, clock, chance)
    routes = routed(
        [
            *image_routes(images),
            *estimate_routes(authenticate, catalogue, settings.nanocredits_per_usd),
            *task_routes(
                authenticate,
                gate,
                read_task,
                ManageTasks(books.queue, read_task, clock, events),
                links,
                renderer,
            ),
            *credit_routes(authenticate, shows),
            *tenant_routes(TenantsApi(gate, manage, shows, settings.variants)),
            *book_routes(
                gate,
                replace(books.margin, nanocredits_per_usd=settings.nanocredits_per_usd),
                books.audit,
                clock,
            ),
            *model_routes(authenticate, catalogue),
            *link_routes(OpenLinks(links, shelves.results, shelves.uploads, clock)),
            *file_routes(file_api),
            *webhook_routes(authenticate, books.webhooks, clock),
            *webhook_admin_routes(gate, books.webhooks),
            *admin_routes(gate, _sandboxes(providers)),
            *key_routes(
                KeyAdmin(
                    gate,
                    authenticate,
                    replace(
                        books.keys,
                        announce=standing.announce_key,
                        names=names_for_keys(settings),
                        who=WHO,
                    ),
                    books.tenants,
                    books.webhooks,
                    tenants_may_choose=settings.tenants_may_choose,
                )
            ),
            *reload_routes(gate, around.reload),
            *session_routes(SessionApi(sessions, authenticate, gate)),
            *page_routes(read_pages()),
            *upstream_routes(gate, upstreams),
            *explain_routes(
                gate,
                Explain(catalogue, books.accounts, upstreams, generate.check_route),
            ),
            *status_routes(_read_uptime(settings, standing, catalogue), links.origin),
            *health_routes(
                {
                    "process": standing.leaving.check,
                    "database": _database_check(books),
                    **shelves.checks,
                },
                standing.metrics.render,
            ),
        ],
        log,
    )
    return Edition(
        settings=settings,
        inner=Cookies(routes, sessions),
        runner=runner,
        worker=worker,
        admission=admission,
        upstreams=upstreams,
        catalogue=catalogue,
        providers=providers,
        wire=wire,
        outside=outside,
        render=rendered,
    )


def _read_uptime(
    settings: Settings, standing: Standing, catalogue: Catalogue
) -> ReadUptime:
    models = [name for name, offers in catalogue.offers.items() if offers]
    upstreams: list[str] = []
    if settings.tenants_may_choose:
        upstreams = [upstream.name for upstream in settings.upstreams]
    return ReadUptime(standing.books.uptime, standing.clock, models, upstreams)


def _upstreams(
    standing: Standing, catalogue: Catalogue, before: Edition | None
) -> Upstreams:
    if before is not None:
        return replace(before.upstreams, catalogue=catalogue)
    return Upstreams(
        catalogue,
        standing.books.drains,
        standing.board,
        standing.clock,
        standing.events,
        standing.today,
    )


def _admission(
    standing: Standing,
    catalogue: Catalogue,
    around: Around,
    upstreams: Upstreams,
    before: Edition | None,
) -> Admission:
    if before is not None:
        # With the same rooms: who waits by the old configuration waits in them too.
        return replace(before.admission, catalogue=catalogue, drained=upstreams.drained)
    return Admission(
        board=standing.board,
        line=standing.line,
        catalogue=catalogue,
        clock=standing.clock,
        chance=standing.chance,
        events=standing.events,
        in_flight=around.in_flight,
        memory_share=memory_gauge(),
        drained=upstreams.drained,
    )


def _sandboxes(providers: Mapping[str, Provider]) -> dict[str, Tunable]:
    found = {name: getattr(p, "settings", None) for name, p in providers.items()}
    return {name: tunable for name, tunable in found.items() if tunable is not None}


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


def routed(handlers: list[ControllerRouterHandler], log: LogListener) -> Litestar:
    """Build the application over its routes; every error leaves it as one of ours."""

    def refused(request: AnyRequest, error: GatewayError) -> Response[bytes]:
        note = note_of(request.scope)
        note.refused(error)
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
