"""The schema, as numbered steps that are applied once and never edited."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from gateway.adapters.sql.database import (
    Database,
    Dialect,
    StoreFailedError,
    Transaction,
)


class SchemaTooNewError(Exception):
    """The database was written by a newer imageway than this one."""

    code = "schema_too_new"


@dataclass(frozen=True, slots=True)
class Migration:
    """One step. ``{blob}`` stands for the engine's type of bytes.

    ``reopened_tables`` can be changed in this step, though they are immutable: they are
    to be named in ``immutable_tables`` as well, to be so again.
    """

    statements: tuple[str, ...]
    immutable_tables: tuple[str, ...] = ()
    reopened_tables: tuple[str, ...] = ()


MIGRATIONS = (
    Migration(
        statements=(
            """CREATE TABLE tenants (
                id TEXT PRIMARY KEY,
                name TEXT NOT NULL UNIQUE,
                created_ms BIGINT NOT NULL
            )""",
            """CREATE TABLE keys (
                id TEXT PRIMARY KEY,
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                digest {blob} NOT NULL UNIQUE,
                display TEXT NOT NULL,
                delivery TEXT NOT NULL,
                created_ms BIGINT NOT NULL,
                revoked_ms BIGINT
            )""",
            "CREATE INDEX keys_by_tenant ON keys (tenant_id, created_ms)",
            # A cache of the rows below, kept in the same transactions: the conditional
            # UPDATE of it is what decides whether credits are there. The upper bound
            # also catches SQLite's silent step from integer to float on overflow.
            """CREATE TABLE accounts (
                tenant_id TEXT PRIMARY KEY REFERENCES tenants (id),
                posted BIGINT NOT NULL CHECK (posted <= 9223372036854775807),
                held BIGINT NOT NULL CHECK (held >= 0),
                spent BIGINT NOT NULL
                    CHECK (spent >= 0 AND spent <= 9223372036854775807),
                CHECK (posted - held >= 0)
            )""",
            """CREATE TABLE entries (
                txn_id TEXT NOT NULL,
                account TEXT NOT NULL,
                nanocredits BIGINT NOT NULL CHECK (nanocredits <> 0),
                kind TEXT NOT NULL CHECK (kind IN ('grant', 'charge')),
                reference TEXT NOT NULL,
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (txn_id, account)
            )""",
            "CREATE INDEX entries_by_account ON entries (account, created_ms)",
            """CREATE TABLE grants (
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                reference TEXT NOT NULL,
                nanocredits BIGINT NOT NULL CHECK (nanocredits > 0),
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (tenant_id, reference)
            )""",
            # Holds do not point at tasks: the ledger outlives a task's metadata.
            """CREATE TABLE holds (
                task_id TEXT PRIMARY KEY,
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                nanocredits BIGINT NOT NULL CHECK (nanocredits > 0),
                created_ms BIGINT NOT NULL,
                expires_ms BIGINT NOT NULL
            )""",
            """CREATE TABLE settlements (
                task_id TEXT PRIMARY KEY REFERENCES holds (task_id),
                due BIGINT NOT NULL CHECK (due >= 0),
                charged BIGINT NOT NULL CHECK (charged >= 0),
                absorbed BIGINT NOT NULL CHECK (absorbed >= 0),
                usage_source TEXT NOT NULL,
                created_ms BIGINT NOT NULL,
                CHECK (charged + absorbed = due)
            )""",
            """CREATE TABLE tasks (
                id TEXT PRIMARY KEY,
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                key_id TEXT NOT NULL,
                variant TEXT NOT NULL,
                operation TEXT NOT NULL,
                mode TEXT NOT NULL CHECK (mode IN ('sync', 'async')),
                state TEXT NOT NULL CHECK (state IN
                    ('pending', 'processing', 'completed', 'failed', 'cancelled')),
                request_json TEXT NOT NULL,
                route_json TEXT,
                answer_json TEXT,
                error_json TEXT,
                text_input BIGINT,
                text_cached BIGINT,
                image_input BIGINT,
                image_cached BIGINT,
                image_output BIGINT,
                created_ms BIGINT NOT NULL,
                deadline_ms BIGINT NOT NULL,
                finished_ms BIGINT,
                CHECK ((finished_ms IS NULL) = (state IN ('pending', 'processing')))
            )""",
            """CREATE INDEX tasks_unfinished ON tasks (created_ms, id)
                WHERE finished_ms IS NULL""",
            "CREATE INDEX tasks_by_tenant ON tasks (tenant_id, created_ms)",
            """CREATE TABLE attempts (
                task_id TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
                seq BIGINT NOT NULL CHECK (seq >= 1),
                offer_id TEXT NOT NULL,
                upstream TEXT NOT NULL,
                state TEXT NOT NULL
                    CHECK (state IN ('sending', 'accepted', 'done', 'failed')),
                estimate_nanousd BIGINT NOT NULL,
                started_ms BIGINT NOT NULL,
                finished_ms BIGINT,
                job_id TEXT,
                kind TEXT,
                upstream_status BIGINT,
                upstream_code TEXT,
                detail TEXT,
                billed TEXT,
                cost_nanousd BIGINT NOT NULL DEFAULT 0,
                PRIMARY KEY (task_id, seq)
            )""",
            """CREATE TABLE results (
                task_id TEXT NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
                idx BIGINT NOT NULL CHECK (idx >= 0),
                blob TEXT NOT NULL,
                media_type TEXT NOT NULL,
                size_bytes BIGINT NOT NULL,
                width_px BIGINT NOT NULL,
                height_px BIGINT NOT NULL,
                inline BIGINT NOT NULL CHECK (inline IN (0, 1)),
                expires_ms BIGINT NOT NULL,
                revised_prompt TEXT,
                PRIMARY KEY (task_id, idx)
            )""",
            """CREATE TABLE cost_book (
                task_id TEXT NOT NULL,
                seq BIGINT NOT NULL,
                upstream TEXT NOT NULL,
                variant TEXT NOT NULL,
                kind TEXT NOT NULL CHECK (kind IN ('cost', 'waste')),
                source TEXT NOT NULL,
                nanousd BIGINT NOT NULL CHECK (nanousd >= 0),
                unknown_outcome BIGINT NOT NULL CHECK (unknown_outcome IN (0, 1)),
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (task_id, seq),
                CHECK (unknown_outcome = 0 OR kind = 'waste')
            )""",
            # Covers the sum that every re-buy is decided by.
            """CREATE INDEX cost_book_by_time
                ON cost_book (created_ms, unknown_outcome, nanousd)""",
        ),
        immutable_tables=("entries", "grants", "holds", "settlements", "cost_book"),
    ),
    Migration(
        statements=(
            """CREATE TABLE files (
                id TEXT PRIMARY KEY,
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                name TEXT NOT NULL,
                original_name TEXT NOT NULL,
                upload_path TEXT NOT NULL,
                media_type TEXT NOT NULL,
                size_bytes BIGINT NOT NULL CHECK (size_bytes > 0),
                width_px BIGINT NOT NULL CHECK (width_px > 0),
                height_px BIGINT NOT NULL CHECK (height_px > 0),
                created_ms BIGINT NOT NULL,
                expires_ms BIGINT NOT NULL CHECK (expires_ms > created_ms)
            )""",
            "CREATE INDEX files_by_tenant ON files (tenant_id, expires_ms)",
            "CREATE INDEX files_by_expiry ON files (expires_ms)",
        ),
    ),
    Migration(
        statements=(
            "ALTER TABLE tasks ADD COLUMN fingerprint TEXT",
            """CREATE INDEX tasks_by_fingerprint
            ON tasks (key_id, fingerprint, created_ms)""",
            """CREATE TABLE idempotency (
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                client_key TEXT NOT NULL,
                fingerprint TEXT NOT NULL,
                task_id TEXT NOT NULL,
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (tenant_id, client_key)
            )""",
            "CREATE INDEX idempotency_by_task ON idempotency (task_id)",
            "CREATE INDEX idempotency_by_age ON idempotency (created_ms)",
        ),
    ),
    Migration(
        statements=(
            "ALTER TABLE tasks ADD COLUMN callback_url TEXT",
            "ALTER TABLE tasks ADD COLUMN origin TEXT",
            "ALTER TABLE tasks ADD COLUMN order_json TEXT",
            "ALTER TABLE tasks ADD COLUMN fence BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE tasks ADD COLUMN lease_until_ms BIGINT",
            "ALTER TABLE tasks ADD COLUMN takeovers BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE tasks ADD COLUMN cancel_ms BIGINT",
            "ALTER TABLE tasks ADD COLUMN started_ms BIGINT",
            "ALTER TABLE tasks ADD COLUMN class TEXT",
            "ALTER TABLE accounts ADD COLUMN queued BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE accounts ADD COLUMN running BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE accounts ADD COLUMN claimed_ms BIGINT NOT NULL DEFAULT 0",
            "CREATE INDEX accounts_queued ON accounts (queued) WHERE queued > 0",
            """CREATE INDEX tasks_queued ON tasks (tenant_id, created_ms)
            WHERE state = 'pending' AND mode = 'async'""",
            """CREATE INDEX tasks_leased ON tasks (lease_until_ms)
            WHERE state = 'processing' AND mode = 'async'""",
            "CREATE INDEX tasks_by_class ON tasks (class, finished_ms)",
            """CREATE INDEX tasks_by_end ON tasks (finished_ms)
            WHERE finished_ms IS NOT NULL""",
            """CREATE TABLE deliveries (
                id TEXT PRIMARY KEY,
                task_id TEXT NOT NULL,
                tenant_id TEXT NOT NULL,
                key_id TEXT NOT NULL,
                event TEXT NOT NULL,
                url TEXT NOT NULL,
                host TEXT NOT NULL,
                state TEXT NOT NULL,
                round BIGINT NOT NULL DEFAULT 0,
                tries BIGINT NOT NULL DEFAULT 0,
                next_ms BIGINT NOT NULL,
                lease_until_ms BIGINT NOT NULL DEFAULT 0,
                status BIGINT,
                error TEXT,
                created_ms BIGINT NOT NULL,
                delivered_ms BIGINT
            )""",
            """CREATE INDEX deliveries_due ON deliveries (next_ms)
            WHERE state = 'pending'""",
            "CREATE INDEX deliveries_by_tenant ON deliveries (tenant_id, created_ms)",
            "CREATE INDEX deliveries_by_task ON deliveries (task_id)",
            "ALTER TABLE keys ADD COLUMN webhook_version BIGINT NOT NULL DEFAULT 1",
            "ALTER TABLE keys ADD COLUMN webhook_rotated_ms BIGINT",
        ),
    ),
    Migration(
        statements=(
            "ALTER TABLE attempts ADD COLUMN n BIGINT NOT NULL DEFAULT 1",
            "ALTER TABLE attempts ADD COLUMN alive BIGINT NOT NULL DEFAULT 0",
            "DROP INDEX tasks_leased",
            """CREATE INDEX tasks_leased ON tasks (lease_until_ms)
            WHERE state = 'processing' AND lease_until_ms IS NOT NULL""",
        ),
    ),
    Migration(
        statements=(
            "ALTER TABLE keys ADD COLUMN routing_json TEXT",
            """CREATE TABLE drains (
                upstream TEXT PRIMARY KEY,
                since_ms BIGINT NOT NULL
            )""",
        ),
    ),
    Migration(
        statements=(
            """CREATE TABLE webhook_rotations (
                key_id TEXT NOT NULL REFERENCES keys (id),
                version BIGINT NOT NULL CHECK (version > 1),
                rotated_ms BIGINT NOT NULL,
                PRIMARY KEY (key_id, version)
            )""",
            """INSERT INTO webhook_rotations (key_id, version, rotated_ms)
            SELECT id, webhook_version, webhook_rotated_ms FROM keys
            WHERE webhook_rotated_ms IS NOT NULL""",
            "ALTER TABLE keys DROP COLUMN webhook_rotated_ms",
        ),
    ),
    Migration(
        statements=(
            """CREATE TABLE rebuys (
                task_id TEXT NOT NULL,
                seq BIGINT NOT NULL,
                risked_nanousd BIGINT NOT NULL CHECK (risked_nanousd >= 0),
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (task_id, seq)
            )""",
            "CREATE INDEX rebuys_by_time ON rebuys (created_ms, risked_nanousd)",
        ),
        immutable_tables=("rebuys",),
    ),
    Migration(
        statements=(
            # What only one may do at a time locks its row here.
            "CREATE TABLE turns (name TEXT PRIMARY KEY, taken BIGINT NOT NULL)",
            "INSERT INTO turns (name, taken) VALUES ('deliveries', 0), ('rebuys', 0)",
            "CREATE TABLE processes (id TEXT PRIMARY KEY, seen_ms BIGINT NOT NULL)",
            "ALTER TABLE tasks ADD COLUMN owner TEXT",
        ),
    ),
    Migration(
        statements=(
            # How often all processes were asked to read their configuration again, and
            # how far each of them is.
            """CREATE TABLE reloads (
                id BIGINT PRIMARY KEY CHECK (id = 1),
                asked BIGINT NOT NULL
            )""",
            "INSERT INTO reloads (id, asked) VALUES (1, 0)",
            "ALTER TABLE processes ADD COLUMN reload_heeded BIGINT",
            "ALTER TABLE processes ADD COLUMN reload_problem TEXT",
        ),
    ),
    Migration(
        statements=(
            "ALTER TABLE keys ADD COLUMN scopes TEXT",
            "ALTER TABLE keys ADD COLUMN models TEXT",
            "ALTER TABLE keys ADD COLUMN networks TEXT",
            "ALTER TABLE keys ADD COLUMN expires_ms BIGINT",
            "ALTER TABLE keys ADD COLUMN requests_per_min BIGINT",
            "ALTER TABLE keys ADD COLUMN concurrent_tasks BIGINT",
            "ALTER TABLE keys ADD COLUMN total_budget BIGINT",
            "ALTER TABLE keys ADD COLUMN daily_budget BIGINT",
            "ALTER TABLE keys ADD COLUMN monthly_budget BIGINT",
            "ALTER TABLE keys ADD COLUMN rotated_to TEXT",
            # Keys that one became by rotation share what they have used.
            "ALTER TABLE keys ADD COLUMN meter_id TEXT",
            "UPDATE keys SET meter_id = id",
            "CREATE INDEX keys_by_meter ON keys (meter_id)",
            "ALTER TABLE keys ADD COLUMN counted BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE accounts ADD COLUMN keys_version BIGINT NOT NULL DEFAULT 0",
            # Holds from before count towards no budget.
            "ALTER TABLE holds ADD COLUMN key_id TEXT",
            "ALTER TABLE holds ADD COLUMN day TEXT",
            "ALTER TABLE settlements ADD COLUMN key_id TEXT",
            "ALTER TABLE settlements ADD COLUMN day TEXT",
            # All that a key was charged is read from it alone, without the rows.
            "CREATE INDEX settlements_by_key ON settlements (key_id, day, charged)",
            # A cache of the holds and settlements of counted keys, kept in the same
            # transactions: by all time, by day and by month.
            """CREATE TABLE key_use (
                meter_id TEXT NOT NULL,
                period TEXT NOT NULL,
                nanocredits BIGINT NOT NULL CHECK (nanocredits >= 0),
                open_tasks BIGINT NOT NULL CHECK (open_tasks >= 0),
                PRIMARY KEY (meter_id, period)
            )""",
        ),
    ),
    Migration(
        statements=(
            # Made anew, since SQLite cannot widen a CHECK. An entry has a fixed place
            # among those of its account: a statement is read from there on.
            """CREATE TABLE entries_anew (
                txn_id TEXT NOT NULL,
                account TEXT NOT NULL,
                nanocredits BIGINT NOT NULL CHECK (nanocredits <> 0),
                kind TEXT NOT NULL
                    CHECK (kind IN ('grant', 'charge', 'refund', 'expiry')),
                reference TEXT NOT NULL,
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (txn_id, account)
            )""",
            """INSERT INTO entries_anew
            SELECT txn_id, account, nanocredits, kind, reference, created_ms
            FROM entries""",
            "DROP TABLE entries",
            "ALTER TABLE entries_anew RENAME TO entries",
            """CREATE INDEX entries_by_account
            ON entries (account, created_ms, txn_id)""",
            # What was used and at which price stands beside the charge: the task's own
            # row is forgotten after 30 days.
            "ALTER TABLE settlements ADD COLUMN tenant_id TEXT",
            "ALTER TABLE settlements ADD COLUMN variant TEXT",
            "ALTER TABLE settlements ADD COLUMN images BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE settlements ADD COLUMN text_input BIGINT",
            "ALTER TABLE settlements ADD COLUMN text_cached BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_input BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_cached BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_output BIGINT",
            "ALTER TABLE settlements ADD COLUMN text_input_price BIGINT",
            "ALTER TABLE settlements ADD COLUMN text_cached_price BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_input_price BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_cached_price BIGINT",
            "ALTER TABLE settlements ADD COLUMN image_output_price BIGINT",
            "ALTER TABLE settlements ADD COLUMN multiplier BIGINT",
            """UPDATE settlements SET
                tenant_id = (SELECT h.tenant_id FROM holds h
                    WHERE h.task_id = settlements.task_id),
                key_id = COALESCE(key_id, (SELECT t.key_id FROM tasks t
                    WHERE t.id = settlements.task_id)),
                variant = (SELECT t.variant FROM tasks t
                    WHERE t.id = settlements.task_id),
                images = (SELECT COUNT(*) FROM results r
                    WHERE r.task_id = settlements.task_id),
                text_input = (SELECT t.text_input FROM tasks t
                    WHERE t.id = settlements.task_id),
                text_cached = (SELECT t.text_cached FROM tasks t
                    WHERE t.id = settlements.task_id),
                image_input = (SELECT t.image_input FROM tasks t
                    WHERE t.id = settlements.task_id),
                image_cached = (SELECT t.image_cached FROM tasks t
                    WHERE t.id = settlements.task_id),
                image_output = (SELECT t.image_output FROM tasks t
                    WHERE t.id = settlements.task_id)""",
            """CREATE INDEX settlements_by_tenant
            ON settlements (tenant_id, created_ms)""",
            "ALTER TABLE grants ADD COLUMN expires_ms BIGINT",
            "ALTER TABLE grants ADD COLUMN note TEXT",
            # What is left of each grant that ends: a cache of grants and draws, kept in
            # the same transactions. ``accounts.lots`` counts a tenant's, so that who
            # has none pays nothing for it.
            """CREATE TABLE lots (
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                reference TEXT NOT NULL,
                expires_ms BIGINT NOT NULL,
                nanocredits BIGINT NOT NULL CHECK (nanocredits > 0),
                PRIMARY KEY (tenant_id, reference)
            )""",
            "CREATE INDEX lots_by_end ON lots (expires_ms)",
            """ALTER TABLE accounts ADD COLUMN lots BIGINT NOT NULL DEFAULT 0
                CHECK (lots >= 0)""",
            # What was taken out of a grant that ends, by which transaction.
            """CREATE TABLE draws (
                txn_id TEXT NOT NULL,
                tenant_id TEXT NOT NULL,
                reference TEXT NOT NULL,
                kind TEXT NOT NULL CHECK (kind IN ('charge', 'expiry')),
                nanocredits BIGINT NOT NULL CHECK (nanocredits > 0),
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (txn_id, tenant_id, reference),
                FOREIGN KEY (tenant_id, reference)
                    REFERENCES grants (tenant_id, reference)
            )""",
            "CREATE INDEX draws_by_grant ON draws (tenant_id, reference)",
            """CREATE TABLE refunds (
                tenant_id TEXT NOT NULL REFERENCES tenants (id),
                reference TEXT NOT NULL,
                task_id TEXT NOT NULL REFERENCES holds (task_id),
                nanocredits BIGINT NOT NULL CHECK (nanocredits > 0),
                note TEXT,
                created_ms BIGINT NOT NULL,
                PRIMARY KEY (tenant_id, reference)
            )""",
            "CREATE INDEX refunds_by_task ON refunds (task_id)",
            "ALTER TABLE accounts ADD COLUMN suspended_ms BIGINT",
            """ALTER TABLE tenants ADD COLUMN multiplier BIGINT NOT NULL
                DEFAULT 1000000 CHECK (multiplier > 0)""",
            "ALTER TABLE tenants ADD COLUMN prices_json TEXT",
            "ALTER TABLE tenants ADD COLUMN low_nanocredits BIGINT",
            "ALTER TABLE tenants ADD COLUMN low_url TEXT",
            "ALTER TABLE tenants ADD COLUMN low_key_id TEXT",
            "ALTER TABLE tenants ADD COLUMN low_told_ms BIGINT",
            # The body of a webhook that tells of no task.
            "ALTER TABLE deliveries ADD COLUMN body TEXT",
            # What an invoice names a call by; the attempt is forgotten after 30 days.
            "ALTER TABLE cost_book ADD COLUMN job_id TEXT",
            """CREATE TABLE trail (
                id TEXT PRIMARY KEY,
                at_ms BIGINT NOT NULL,
                who TEXT NOT NULL,
                what TEXT NOT NULL,
                tenant_id TEXT,
                subject TEXT NOT NULL,
                before_json TEXT,
                after_json TEXT
            )""",
            "CREATE INDEX trail_by_time ON trail (at_ms, id)",
            "CREATE INDEX trail_by_tenant ON trail (tenant_id, at_ms, id)",
        ),
        reopened_tables=("settlements",),
        immutable_tables=("entries", "settlements", "draws", "refunds", "trail"),
    ),
    Migration(
        statements=(
            # Counts, added up by every process; width is slot (five minutes) or day.
            """CREATE TABLE uptime (
                width TEXT NOT NULL CHECK (width IN ('slot', 'day')),
                since_ms BIGINT NOT NULL,
                kind TEXT NOT NULL CHECK (kind IN ('model', 'upstream')),
                name TEXT NOT NULL,
                served BIGINT NOT NULL CHECK (served >= 0),
                failed BIGINT NOT NULL CHECK (failed >= 0),
                PRIMARY KEY (width, since_ms, kind, name)
            )""",
            """CREATE INDEX uptime_troubled ON uptime (since_ms)
            WHERE width = 'slot' AND failed >= 3""",
        ),
    ),
)
"""Step n of the schema stands at n - 1."""


async def migrate(database: Database, *, now_ms: int) -> int:
    """Bring the schema up to date, in one transaction; returns the steps applied.

    Processes that do so at once wait for each other. One that is up to date is only
    looked at, which takes no right to change it.

    Raises:
        SchemaTooNewError: a newer imageway has been here; nothing was changed.
        StoreFailedError: a step failed; nothing was changed.
    """
    dialect = database.dialect
    with suppress(
        StoreFailedError
    ):  # there is none yet; or the next statement says why
        if await database.read(_version) == len(MIGRATIONS):
            return 0
    try:
        return await database.write(lambda tx: _migrate(tx, dialect, now_ms))
    except StoreFailedError as error:
        # Only an operator reads it, who needs to know what the engine says.
        raise StoreFailedError(
            f"cannot bring the schema up to date: {error.__cause__ or error}. "
            "Nothing was changed."
        ) from error


async def _migrate(tx: Transaction, dialect: Dialect, now_ms: int) -> int:
    for statement in dialect.alone:
        await tx.all(statement)
    await tx.run(
        """CREATE TABLE IF NOT EXISTS schema_migrations (
            version BIGINT PRIMARY KEY, applied_ms BIGINT NOT NULL)"""
    )
    version = await _version(tx)
    if version > len(MIGRATIONS):
        raise SchemaTooNewError(
            f"{SchemaTooNewError.code}: the database has schema {version}, this "
            f"imageway knows schemas up to {len(MIGRATIONS)}: upgrade imageway. "
            "Nothing was changed."
        )
    for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in _statements(migration, dialect):
            await tx.run(statement)
        await tx.run(
            "INSERT INTO schema_migrations (version, applied_ms) VALUES ($1, $2)",
            number,
            now_ms,
        )
    return len(MIGRATIONS) - version


async def _version(tx: Transaction) -> int:
    row = await tx.one("SELECT COALESCE(MAX(version), 0) FROM schema_migrations")
    return int(row[0]) if row else 0


def _statements(migration: Migration, dialect: Dialect) -> list[str]:
    made = [text.replace("{blob}", dialect.blob) for text in migration.statements]
    opened = [
        text.replace("{table}", table)
        for table in migration.reopened_tables
        for text in dialect.reopened
    ]
    guarded = [
        text.replace("{table}", table)
        for table in migration.immutable_tables
        for text in dialect.immutable
    ]
    return opened + made + guarded
