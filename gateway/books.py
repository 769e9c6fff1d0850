"""Opens the store and builds the flows over it: all that most commands need.

A part of the composition root, apart from ``app`` so that a command need not load the
server, the upstreams' adapters and what they bring along.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gateway.adapters.blobs import DiskBlobs
from gateway.adapters.clock import SystemChance, SystemClock
from gateway.adapters.data_dir import DataDir, DataDirError, Seat
from gateway.adapters.sql.accounts import SqlAccounts
from gateway.adapters.sql.backlog import SqlBacklog
from gateway.adapters.sql.database import Database
from gateway.adapters.sql.deliveries import SqlOutbox
from gateway.adapters.sql.drains import SqlDrains
from gateway.adapters.sql.files import SqlFiles
from gateway.adapters.sql.ledger import SqlLedger
from gateway.adapters.sql.migrations import MIGRATIONS, SchemaTooNewError, migrate
from gateway.adapters.sql.processes import SqlProcesses
from gateway.adapters.sql.queue import SqlQueue
from gateway.adapters.sql.reloads import SqlReloads
from gateway.adapters.sql.reports import SqlReports
from gateway.adapters.sql.sqlite import SqliteDatabase
from gateway.adapters.sql.tasks import SqlTaskStore
from gateway.adapters.sql.tenants import SqlTenants
from gateway.adapters.sql.uptime import SqlUptime
from gateway.core.catalogue import Catalogue
from gateway.core.errors import GatewayError, upstream_not_found
from gateway.core.events import Event
from gateway.core.fleet import Notice
from gateway.core.money import NANO
from gateway.core.webhooks import CallbackRules
from gateway.flows.credits import ManageTenants
from gateway.flows.keys import KeyNames, ManageKeys, NewKey
from gateway.flows.margin import ReadMargin
from gateway.flows.recovery import LOST_AFTER_MS
from gateway.flows.reload import Asked, AskToReload
from gateway.flows.statements import ReadCredits
from gateway.flows.tasks import ManageTasks, ReadTask, TaskView
from gateway.flows.webhooks import ManageWebhooks
from gateway.ports import AuditReport, BlobStore
from gateway.settings import Settings, Storage, load_settings

SQLITE = "sqlite"
Check = Callable[[], Awaitable[str | None]]
"""Tells what is wrong with a part, or None."""
FIRST_TENANT = "first"
FIRST_START = "first start"
"""Whom the audit trail names for it."""
FIRST_CREDITS = 1_000


class StartError(Exception):
    """The gateway cannot start; the message is one line and says why."""


def read_settings(config: Path | None, overrides: Mapping[str, str]) -> Settings:
    """Read the configuration; whether there are adapters for it is not looked at."""
    return load_settings(config, kinds=None, overrides=overrides)


def names_for_keys(settings: Settings) -> KeyNames:
    """Tell what keys may be bound to: the config's models and upstreams.

    Upstreams that are left out for want of a credential are known too.
    """
    known = {upstream.name for upstream in settings.upstreams}
    known |= {left.upstream for left in settings.left_out}
    catalogue = Catalogue(variants=settings.variants, offers={})

    def named(name: str) -> str | None:
        variant = catalogue.variant(name)
        return variant.name if variant is not None else None

    return KeyNames(named, frozenset(known))


@dataclass(frozen=True, slots=True)
class Books:
    """What commands work with: the store and the flows over it."""

    database: Database
    migrations_applied: int
    processes: SqlProcesses
    accounts: SqlAccounts
    ledger: SqlLedger
    tasks: SqlTaskStore
    queue: SqlQueue
    files: SqlFiles
    backlog: SqlBacklog
    uptime: SqlUptime
    outbox: SqlOutbox
    drains: SqlDrains
    reloads: SqlReloads
    tenants: ManageTenants
    read: ReadCredits
    margin: ReadMargin
    keys: ManageKeys
    webhooks: ManageWebhooks
    data_dir: DataDir
    secret: bytes
    upstream_names: tuple[str, ...]
    storage: Storage
    announce: Callable[[Notice], Awaitable[None]]
    """Tells running gateways, as far as they can be reached; it never fails."""

    def shelves(self, emit: Callable[[Event], None] = lambda _: None) -> Shelves:
        """Open the store of pictures; ``emit`` is told when it goes away or is back."""
        return open_shelves(self.storage, self.data_dir, self.secret, emit)

    @property
    def schema(self) -> int:
        """The schema that the database has."""
        return len(MIGRATIONS)

    async def audit(self) -> AuditReport:
        """Recompute every invariant from the rows."""
        return await self.ledger.audit()

    async def change_upstream(self, change: str, name: str) -> None:
        """Drain or enable an upstream; running gateways notice within a second.

        Raises:
            NotFoundError: the config has no such upstream in use.
        """
        if name not in self.upstream_names:
            raise upstream_not_found(name, self.upstream_names)
        if change == "drain":
            await self.drains.drain(name, now_ms=SystemClock().now_ms())
        else:
            await self.drains.enable(name)

    async def ask_to_reload(self, wait_max_s: float) -> Asked:
        """Have running gateways read their configuration again; waits for them."""
        ask = AskToReload(self.reloads, SystemClock(), self.announce)
        return await ask(alive_ms=LOST_AFTER_MS, wait_max_s=wait_max_s)

    async def cancel(self, task_id: str) -> TaskView:
        """Cancel an async task of any tenant; the running gateway notices.

        Raises:
            InvalidRequestError: the id has not the form of a task id.
            NotFoundError: there is no such task.
            ConflictError: it is a sync task, or it is over.
        """
        clock, shelves = SystemClock(), self.shelves()
        read_task = ReadTask(self.tasks, self.queue, shelves.results, clock)
        record = await self.tasks.get(task_id)
        owner = record.tenant_id if record else ""
        return await ManageTasks(self.queue, read_task, clock).cancel(task_id, owner)


@dataclass(frozen=True, slots=True)
class Shelves:
    """Where pictures are: results, uploads, and what async tasks start from.

    ``checks`` names what may keep pictures from being stored; none of them waits.
    ``look`` finds out how a store is that is far away; ``glance`` tells it without
    writing anything.
    """

    results: BlobStore
    uploads: BlobStore
    inputs: BlobStore
    checks: Mapping[str, Check]
    look: Callable[[], Awaitable[None]] | None = None
    glance: Check | None = None

    async def trouble(self) -> str | None:
        """Say what keeps pictures from being stored, if anything does."""
        for check in self.checks.values():
            wrong = await check()
            if wrong is not None:
                return wrong
        return None


def open_shelves(
    storage: Storage,
    data_dir: DataDir,
    secret: bytes,
    emit: Callable[[Event], None] = lambda _: None,
) -> Shelves:
    """Open the store of pictures that the config names; nothing is asked of it yet."""
    if storage.results is None:
        return Shelves(
            DiskBlobs(data_dir.results),
            DiskBlobs(data_dir.uploads),
            DiskBlobs(data_dir.inputs),
            {"disk": data_dir.trouble},
        )
    # A gateway that keeps its pictures on the disk does not load the library.
    from gateway.adapters.objects import Address, Bucket, ObjectBlobs  # noqa: PLC0415

    at = storage.results
    address = Address(at.url, at.endpoint, at.region, at.access_key, at.secret_key)
    bucket = Bucket(address, secret, emit)
    return Shelves(
        ObjectBlobs(bucket, "results"),
        ObjectBlobs(bucket, "uploads"),
        ObjectBlobs(bucket, "inputs"),
        {"disk": data_dir.trouble, "results": bucket.trouble},
        bucket.look,
        bucket.glance,
    )


def check_storage(settings: Settings) -> None:
    """See that what the config asks for is there.

    Raises:
        StartError: this version has no such storage, or something it needs is missing.
    """
    storage = settings.storage
    if storage.database != SQLITE and settings.server.secret is None:
        raise StartError(
            "server.secret: must be set where several gateways share a database, to "
            "the same at least 32 characters for all of them, as env:NAME or "
            "file:/path: keys and links depend on it."
        )
    if storage.redis:
        from gateway.adapters.hot_redis.connection import opener  # noqa: PLC0415 - only where it is asked for

        try:
            opener(storage.redis)
        except ValueError as error:
            raise StartError(f"storage.redis: {error}") from error


def warnings_of(settings: Settings) -> tuple[str, ...]:
    """Tell all that an operator should look at, as of today."""
    now_s = SystemClock().now_ms() / 1000
    today = datetime.fromtimestamp(now_s, UTC).date().isoformat()
    return settings.warnings + settings.aging(today)


def callback_rules(settings: Settings) -> CallbackRules:
    """Tell which callback URLs are taken."""
    return CallbackRules(settings.webhooks.ports, settings.webhooks.allow_networks)


def _user() -> str:
    # Not from the environment, where anybody can be anybody.
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _announcer(settings: Settings) -> Callable[[Notice], Awaitable[None]]:
    # For what changes while gateways run. One that is not reached notices by itself.
    async def announce(notice: Notice) -> None:
        if not settings.storage.redis:
            return
        from gateway.adapters.hot_redis import connection, fleet  # noqa: PLC0415 - only where it is asked for

        text = fleet.notices_text("command", [notice])
        await connection.publish_once(connection.opener(settings.storage.redis), text)

    return announce


@asynccontextmanager
async def open_books(
    settings: Settings,
    *,
    alone: bool = False,
    new: bool = True,
    seat: Seat | None = None,
) -> AsyncIterator[Books]:
    """Open the store, and bring its schema up to date.

    Args:
        settings: says where.
        alone: take the data folder for this process first; for what serves.
        seat: of this process, where several share the folder.
        new: whether it may be made; False refuses a folder without a database.

    Raises:
        StartError: it cannot be opened, or is taken.
    """
    check_storage(settings)
    clock, chance = SystemClock(), SystemChance()
    data_dir = DataDir(settings.storage.data_dir, seat)
    embedded = settings.storage.database == SQLITE
    if embedded and not new and not data_dir.database.exists():
        raise StartError(
            f"there is no database in {data_dir.root}. Name the data folder with "
            "--data-dir; imageway serve and imageway tenants create make one."
        )
    try:
        data_dir.prepare()
        if alone:
            data_dir.lock()
        secret = _secret(settings, data_dir)
        database = await _open_database(settings, data_dir)
    except (DataDirError, GatewayError) as error:
        raise StartError(str(error)) from error
    try:
        applied = await migrate(database, now_ms=clock.now_ms())
        accounts, ledger = SqlAccounts(database), SqlLedger(database)
        outbox, announce = SqlOutbox(database), _announcer(settings)
        yield Books(
            database=database,
            migrations_applied=applied,
            processes=SqlProcesses(database),
            accounts=accounts,
            ledger=ledger,
            tasks=SqlTaskStore(database),
            queue=SqlQueue(database),
            files=SqlFiles(database),
            backlog=SqlBacklog(database),
            uptime=SqlUptime(database),
            outbox=outbox,
            drains=SqlDrains(database),
            reloads=SqlReloads(database),
            tenants=ManageTenants(
                accounts,
                ledger,
                SqlTenants(database),
                clock,
                chance,
                announce=announce,
                who=f"command of {_user()}",
                callback_rules=callback_rules(settings),
            ),
            read=ReadCredits(SqlReports(database), clock),
            margin=ReadMargin(SqlReports(database), settings.nanocredits_per_usd),
            keys=ManageKeys(
                accounts,
                clock,
                chance,
                secret,
                announce=announce,
                names=names_for_keys(settings),
                who=f"command of {_user()}",
            ),
            webhooks=ManageWebhooks(outbox, accounts, clock, secret),
            data_dir=data_dir,
            secret=secret,
            upstream_names=tuple(upstream.name for upstream in settings.upstreams),
            storage=settings.storage,
            announce=announce,
        )
    except SchemaTooNewError as error:
        raise StartError(str(error)) from error
    finally:
        await database.close()


async def drained_upstreams(settings: Settings) -> frozenset[str]:
    """Name the upstreams that are drained; none where there is no database yet."""
    embedded = settings.storage.database == SQLITE
    if embedded and not DataDir(settings.storage.data_dir).database.exists():
        return frozenset()
    async with open_books(settings, new=False) as books:
        return frozenset(await books.drains.drained())


async def _open_database(settings: Settings, data_dir: DataDir) -> Database:
    if settings.storage.database == SQLITE:
        return await SqliteDatabase.open(data_dir.database)
    # Embedded gateways need not load the driver.
    from gateway.adapters.sql.postgres import PostgresDatabase  # noqa: PLC0415

    return await PostgresDatabase.open(settings.storage.database)


def _secret(settings: Settings, data_dir: DataDir) -> bytes:
    if settings.server.secret is not None:
        return settings.server.secret.encode()
    return data_dir.secret()


async def first_run(books: Books) -> NewKey | None:
    """Make a first tenant with credits and a key, if there is no tenant at all.

    What a crash left half done is completed: the first tenant alone, without a key.
    """
    known = [tenant for tenant, _ in await books.accounts.tenants()]
    tenants = books.tenants.acting_as(FIRST_START)
    if not known:
        known = [await tenants.create(FIRST_TENANT)]
    first, *others = known
    if others or first.name != FIRST_TENANT or await books.accounts.keys(first.id):
        return None
    grant = FIRST_CREDITS * NANO
    await tenants.grant(first, grant, reference="first grant")
    return await books.keys.acting_as(FIRST_START).create(first)
