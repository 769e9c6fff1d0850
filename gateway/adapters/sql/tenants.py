"""Tenants as an operator sees and changes them, in SQL; every change leaves a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.adapters.sql.accounts import open_account
from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.adapters.sql.ledger import lock_account
from gateway.adapters.sql.trail import read_trail, trace
from gateway.core.ledger import Balance
from gateway.core.statements import Cursor
from gateway.core.terms import cards_text, terms_from
from gateway.core.webhooks import LOW, PENDING, host_of, low_body, low_event_id
from gateway.ports import LowBalance, Mark, Tenant, TenantRecord, Trace

LOW_AT_ONCE = 1_000
"""Tenants that are told in one look; the others are in the next."""

_RECORDS = """SELECT t.id, t.name, t.created_ms, a.posted, a.held, a.spent,
    a.suspended_ms, t.multiplier, t.prices_json, t.low_nanocredits, t.low_url,
    t.low_key_id
FROM tenants t JOIN accounts a ON a.tenant_id = t.id"""


@dataclass(frozen=True, slots=True)
class SqlTenants:
    """The ``Tenants`` port over any SQL database."""

    database: Database

    async def add(self, tenant: Tenant, mark: Mark) -> None:
        """See ``Tenants``."""

        async def add(tx: Transaction) -> None:
            await open_account(tx, tenant, mark.at_ms)
            facts = {"id": tenant.id, "name": tenant.name}
            made = trace(mark, "tenant.create", tenant.id, tenant.name, (None, facts))
            await tx.changes(made)

        await self.database.write(add)

    async def record(self, tenant: str) -> TenantRecord | None:
        """See ``Tenants``; an id goes before a name."""
        rows = await self.database.read(
            lambda tx: tx.all(f"{_RECORDS} WHERE t.id = $1 OR t.name = $1", tenant)
        )
        found = sorted(map(_record, rows), key=lambda record: record.id != tenant)
        return found[0] if found else None

    async def page(
        self, *, offset: int, limit: int
    ) -> tuple[int, Sequence[TenantRecord]]:
        """See ``Tenants``."""

        async def page(tx: Transaction) -> tuple[int, list[TenantRecord]]:
            total = await tx.one("SELECT COUNT(*) FROM tenants")
            rows = await tx.all(
                f"{_RECORDS} ORDER BY t.name LIMIT $1 OFFSET $2", limit, offset
            )
            return (total[0] if total else 0), [_record(row) for row in rows]

        return await self.database.read(page)

    async def change(
        self,
        tenant_id: str,
        what: str,
        change: Callable[[TenantRecord], TenantRecord],
        mark: Mark,
    ) -> TenantRecord | None:
        """See ``Tenants``."""
        return await self.database.write(
            lambda tx: _change(tx, tenant_id, what, change, mark)
        )

    async def trail(
        self, tenant_id: str | None, *, after: Cursor, limit: int
    ) -> Sequence[Trace]:
        """See ``Tenants``."""
        return await self.database.read(
            lambda tx: read_trail(tx, tenant_id, after, limit)
        )

    async def tell_low(self, now_ms: int) -> int:
        """See ``Tenants``; what is held counts as there."""
        rows = await self.database.read(
            lambda tx: tx.all(f"{_FELL_OR_ROSE} LIMIT $1", LOW_AT_ONCE)
        )
        told = 0
        for (tenant_id,) in rows:
            told += await self._tell(tenant_id, now_ms)
        return told

    async def _tell(self, tenant_id: str, now_ms: int) -> int:
        return await self.database.write(lambda tx: _tell(tx, tenant_id, now_ms))


_FELL_OR_ROSE = """SELECT t.id FROM tenants t JOIN accounts a ON a.tenant_id = t.id
WHERE t.low_nanocredits IS NOT NULL
    AND (a.posted < t.low_nanocredits) = (t.low_told_ms IS NULL)"""


async def _change(
    tx: Transaction,
    tenant_id: str,
    what: str,
    change: Callable[[TenantRecord], TenantRecord],
    mark: Mark,
) -> TenantRecord | None:
    # The account first: no hold is between these two states.
    row = await tx.one("SELECT id FROM tenants WHERE id = $1", tenant_id)
    if row is None:
        return None
    await lock_account(tx, tenant_id)
    row = await tx.one(f"{_RECORDS} WHERE t.id = $1", tenant_id)
    assert row is not None
    before = _record(row)
    after = change(before)
    if after == before:
        return before
    low = after.low
    await tx.changes(
        (
            "UPDATE accounts SET suspended_ms = $2 WHERE tenant_id = $1",
            tenant_id,
            after.suspended_ms,
        ),
        (
            """UPDATE tenants SET multiplier = $2, prices_json = $3,
                low_nanocredits = $4, low_url = $5, low_key_id = $6,
                low_told_ms = CASE WHEN $7 = 1 THEN NULL ELSE low_told_ms END
            WHERE id = $1""",
            tenant_id,
            after.terms.multiplier_millionths,
            cards_text(after.terms.cards),
            None if low is None else low.nanocredits,
            None if low is None else low.url,
            None if low is None else low.key_id,
            int(low != before.low),
        ),
        trace(mark, what, tenant_id, before.name, (before.facts, after.facts)),
    )
    return after


async def _tell(tx: Transaction, tenant_id: str, now_ms: int) -> int:
    # Once more, and alone: another process may have been quicker.
    balance = await lock_account(tx, tenant_id)
    row = await tx.one(
        """SELECT low_nanocredits, low_url, low_key_id, low_told_ms FROM tenants
        WHERE id = $1 AND low_nanocredits IS NOT NULL""",
        tenant_id,
    )
    if row is None:
        return 0
    threshold, url, key_id, told_ms = row
    is_low = balance.posted < threshold
    if is_low == (told_ms is not None):
        return 0
    await tx.run(
        "UPDATE tenants SET low_told_ms = $2 WHERE id = $1",
        tenant_id,
        now_ms if is_low else None,
    )
    if not is_low:
        return 0
    return await tx.run(
        """INSERT INTO deliveries (id, task_id, tenant_id, key_id, event, url, host,
            state, next_ms, created_ms, body)
        VALUES ($1, '', $2, $3, $4, $5, $6, $7, $8, $8, $9) ON CONFLICT DO NOTHING""",
        low_event_id(tenant_id, now_ms),
        tenant_id,
        key_id,
        LOW,
        url,
        host_of(url),
        PENDING,
        now_ms,
        low_body(tenant_id, now_ms, balance.posted, threshold),
    )


def _record(row: Row) -> TenantRecord:
    tenant_id, name, created_ms, posted, held, spent, suspended_ms = row[:7]
    multiplier, prices, low_nanocredits, low_url, low_key_id = row[7:]
    return TenantRecord(
        id=tenant_id,
        name=name,
        created_ms=created_ms,
        balance=Balance(posted, held, spent),
        suspended_ms=suspended_ms,
        terms=terms_from(multiplier, prices),
        low=None
        if low_nanocredits is None
        else LowBalance(low_nanocredits, low_url, low_key_id),
    )
