"""Tenants and their keys, in SQL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.adapters.sql.key_use import count_or_not, read_use
from gateway.adapters.sql.ledger import lock_account
from gateway.adapters.sql.trail import trace
from gateway.core.errors import ConflictError, NotFoundError
from gateway.core.key_limits import USUAL_SCOPES, KeyLimits, KeyScope, KeyUse
from gateway.core.ledger import Balance
from gateway.core.preferences import routing_from_text, routing_text
from gateway.core.terms import terms_from
from gateway.core.webhooks import SECRETS_MAX, SigningKey, check_rotation
from gateway.ports import Key, KeyMark, Succession, Tenant


@dataclass(frozen=True, slots=True)
class SqlAccounts:
    """The ``Accounts`` and ``SigningKeys`` ports over any SQL database."""

    database: Database

    async def add_tenant(self, tenant: Tenant, *, now_ms: int) -> None:
        """See ``Accounts``; its account is opened with it, at zero."""
        await self.database.write(lambda tx: open_account(tx, tenant, now_ms))

    async def tenant_named(self, name: str) -> Tenant | None:
        """See ``Accounts``."""
        row = await self.database.read(
            lambda tx: tx.one("SELECT id, name FROM tenants WHERE name = $1", name)
        )
        return Tenant(*row) if row else None

    async def tenants(self) -> Sequence[tuple[Tenant, Balance]]:
        """See ``Accounts``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT t.id, t.name, a.posted, a.held, a.spent
                FROM tenants t JOIN accounts a ON a.tenant_id = t.id
                ORDER BY t.name"""
            )
        )
        return [(Tenant(*row[:2]), Balance(*row[2:])) for row in rows]

    async def add_key(self, key: Key, mark: KeyMark | None = None) -> None:
        """See ``Accounts``.

        Raises:
            NotFoundError: there is no such tenant.
            ConflictError: a key of that id or digest is there.
        """
        await self.database.write(lambda tx: _add_key(tx, key, mark))

    async def key_by_digest(self, digest: bytes) -> Key | None:
        """See ``Accounts``."""
        row = await self.database.read(
            lambda tx: tx.one(
                f"{_KEYS} WHERE k.digest = $1",
                digest,
            )
        )
        return _key(row) if row else None

    async def key(self, key_id: str) -> Key | None:
        """See ``Accounts``."""
        row = await self.database.read(
            lambda tx: tx.one(
                f"{_KEYS} WHERE k.id = $1",
                key_id,
            )
        )
        return _key(row) if row else None

    async def keys(self, tenant_id: str) -> Sequence[Key]:
        """See ``Accounts``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                f"{_KEYS} WHERE k.tenant_id = $1 ORDER BY k.created_ms, k.id",
                tenant_id,
            )
        )
        return [_key(row) for row in rows]

    async def keys_page(
        self, tenant_id: str | None, *, offset: int, limit: int
    ) -> tuple[int, Sequence[Key]]:
        """See ``Accounts``."""
        return await self.database.read(
            lambda tx: _keys_page(tx, tenant_id, offset, limit)
        )

    async def change_key(
        self, key_id: str, change: Callable[[Key], Key], mark: KeyMark | None = None
    ) -> Key | None:
        """See ``Accounts``."""
        return await self.database.write(
            lambda tx: _change_key(tx, key_id, change, mark)
        )

    async def rotate_key(
        self,
        key_id: str,
        rotate: Callable[[Key, Sequence[Key]], Succession],
        mark: KeyMark | None = None,
    ) -> Succession | None:
        """See ``Accounts``."""
        return await self.database.write(
            lambda tx: _rotate_key(tx, key_id, rotate, mark)
        )

    async def key_use(self, key_id: str) -> KeyUse | None:
        """See ``Accounts``."""
        today = self.database.dialect.today
        return await self.database.read(lambda tx: read_use(tx, today, key_id))

    async def revoke_key(
        self, key_id: str, *, now_ms: int, mark: KeyMark | None = None
    ) -> bool:
        """See ``Accounts``; a key revoked twice keeps the first time."""
        return await self.database.write(
            lambda tx: _revoke_key(tx, key_id, now_ms, mark)
        )

    async def signing_key(self, key_id: str) -> SigningKey | None:
        """See ``SigningKeys``."""
        return await self.database.read(lambda tx: _signing_key(tx, key_id))

    async def rotate_signing_key(
        self, key_id: str, *, now_ms: int
    ) -> SigningKey | None:
        """See ``SigningKeys``."""
        return await self.database.write(lambda tx: _rotate(tx, key_id, now_ms))


async def open_account(tx: Transaction, tenant: Tenant, now_ms: int) -> None:
    """Write a tenant and its account; a part of a larger transaction.

    Raises:
        ConflictError: the name is taken.
    """
    added = await tx.run(
        """INSERT INTO tenants (id, name, created_ms) VALUES ($1, $2, $3)
        ON CONFLICT DO NOTHING""",
        tenant.id,
        tenant.name,
        now_ms,
    )
    if not added:
        raise ConflictError(f"there is a tenant {tenant.name!r} already", param="name")
    await tx.run(
        """INSERT INTO accounts (tenant_id, posted, held, spent)
        VALUES ($1, 0, 0, 0)""",
        tenant.id,
    )


async def _trace(
    tx: Transaction, mark: KeyMark | None, before: Key | None, after: Key
) -> None:
    if mark is not None:
        was = None if before is None else mark.facts(before)
        told = trace(
            mark.mark, mark.what, after.tenant_id, after.id, (was, mark.facts(after))
        )
        await tx.changes(told)


async def _revoke_key(
    tx: Transaction, key_id: str, now_ms: int, mark: KeyMark | None
) -> bool:
    key = await _locked_key(tx, key_id)
    if key is None:
        return False
    if key.revoked_ms is None:
        await tx.run("UPDATE keys SET revoked_ms = $2 WHERE id = $1", key_id, now_ms)
        await _trace(tx, mark, key, replace(key, revoked_ms=now_ms))
    return True


async def _add_key(tx: Transaction, key: Key, mark: KeyMark | None = None) -> None:
    if not await tx.one("SELECT id FROM tenants WHERE id = $1", key.tenant_id):
        raise NotFoundError(f"there is no tenant {key.tenant_id!r}")
    added = await tx.run(
        """INSERT INTO keys
            (id, tenant_id, digest, display, delivery, created_ms, revoked_ms,
             routing_json, scopes, models, networks, expires_ms, requests_per_min,
             concurrent_tasks, total_budget, daily_budget, monthly_budget, rotated_to,
             meter_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,
            $17, $18, $19) ON CONFLICT DO NOTHING""",
        key.id,
        key.tenant_id,
        key.digest,
        key.display,
        key.delivery,
        key.created_ms,
        key.revoked_ms,
        *_changeable(key),
        key.meter,
    )
    if not added:
        raise ConflictError(f"there is a key {key.id!r} or one equal to it already")
    if key.limits.counted:
        await count_or_not(tx, key.tenant_id, key.meter)
    await _trace(tx, mark, None, key)


async def _keys_page(
    tx: Transaction, tenant_id: str | None, offset: int, limit: int
) -> tuple[int, list[Key]]:
    where = "WHERE k.tenant_id = COALESCE($1, k.tenant_id)"
    total = await tx.one(f"SELECT COUNT(*) FROM keys k {where}", tenant_id)  # noqa: S608 - a constant
    rows = await tx.all(
        f"{_KEYS} {where} ORDER BY k.created_ms DESC, k.id DESC LIMIT $2 OFFSET $3",
        tenant_id,
        limit,
        offset,
    )
    return (total[0] if total else 0), [_key(row) for row in rows]


async def _locked_key(tx: Transaction, key_id: str) -> Key | None:
    # The account first, as with every hold: what a key has used stands still then.
    owner = await tx.one("SELECT tenant_id FROM keys WHERE id = $1", key_id)
    if owner is None:
        return None
    await lock_account(tx, owner[0])
    row = await tx.one(f"{_KEYS} WHERE k.id = $1", key_id)
    return _key(row) if row else None


async def _change_key(
    tx: Transaction, key_id: str, change: Callable[[Key], Key], mark: KeyMark | None
) -> Key | None:
    before = await _locked_key(tx, key_id)
    if before is None:
        return None
    after = await _write_key(tx, change(before))
    await _trace(tx, mark, before, after)
    return after


async def _rotate_key(
    tx: Transaction,
    key_id: str,
    rotate: Callable[[Key, Sequence[Key]], Succession],
    mark: KeyMark | None,
) -> Succession | None:
    key = await _locked_key(tx, key_id)
    if key is None:
        return None
    rows = await tx.all(f"{_KEYS} WHERE k.meter_id = $1", key.meter)
    succession = rotate(key, [_key(row) for row in rows])
    await _add_key(tx, succession.after)
    before = await _write_key(tx, succession.before)
    await _trace(tx, mark, key, before)
    return Succession(before, succession.after)


async def _write_key(tx: Transaction, key: Key) -> Key:
    await tx.run(
        """UPDATE keys SET delivery = $2, routing_json = $3, scopes = $4, models = $5,
            networks = $6, expires_ms = $7, requests_per_min = $8,
            concurrent_tasks = $9, total_budget = $10, daily_budget = $11,
            monthly_budget = $12, rotated_to = $13
        WHERE id = $1""",
        key.id,
        key.delivery,
        *_changeable(key),
    )
    await count_or_not(tx, key.tenant_id, key.meter)
    return key


async def _signing_key(tx: Transaction, key_id: str) -> SigningKey | None:
    row = await tx.one(
        "SELECT id, tenant_id, webhook_version FROM keys WHERE id = $1", key_id
    )
    if row is None:
        return None
    rotations = await tx.all(
        """SELECT rotated_ms FROM webhook_rotations WHERE key_id = $1
        ORDER BY version DESC LIMIT $2""",
        key_id,
        SECRETS_MAX - 1,
    )
    found_id, tenant_id, version = row
    return SigningKey(found_id, tenant_id, version, tuple(at[0] for at in rotations))


async def _rotate(tx: Transaction, key_id: str, now_ms: int) -> SigningKey | None:
    # The update comes first: it makes another rotation of the same key wait.
    raised = await tx.run(
        "UPDATE keys SET webhook_version = webhook_version + 1 WHERE id = $1", key_id
    )
    key = await _signing_key(tx, key_id)
    if not raised or key is None:
        return None
    check_rotation(key, now_ms)
    await tx.run(
        """INSERT INTO webhook_rotations (key_id, version, rotated_ms)
        VALUES ($1, $2, $3)""",
        key_id,
        key.version,
        now_ms,
    )
    return await _signing_key(tx, key_id)


_KEYS = """SELECT k.id, k.tenant_id, k.digest, k.display, k.delivery, k.created_ms,
    k.revoked_ms, k.routing_json, k.scopes, k.models, k.networks, k.expires_ms,
    k.requests_per_min, k.concurrent_tasks, k.total_budget, k.daily_budget,
    k.monthly_budget, k.rotated_to, k.meter_id, k.counted, a.keys_version,
    a.suspended_ms, t.multiplier, t.prices_json
FROM keys k JOIN accounts a ON a.tenant_id = k.tenant_id
JOIN tenants t ON t.id = k.tenant_id"""


def _changeable(key: Key) -> tuple[int | str | None, ...]:
    limits = key.limits
    usual = limits.scopes == USUAL_SCOPES
    networks = limits.networks
    return (
        routing_text(key.routing),
        None if usual else " ".join(sorted(scope.value for scope in limits.scopes)),
        None if limits.models is None else " ".join(limits.models),
        None if networks is None else " ".join(str(each) for each in networks),
        limits.expires_ms,
        limits.requests_per_min,
        limits.concurrent_tasks,
        limits.total_nanocredits,
        limits.daily_nanocredits,
        limits.monthly_nanocredits,
        key.rotated_to,
    )


def _key(row: Row) -> Key:
    key_id, tenant_id, digest, display, delivery, created_ms, revoked_ms = row[:7]
    routing, scopes, models, networks, *numbers = row[7:17]
    rotated_to, meter_id, counted, keys_version, *terms = row[17:]
    suspended_ms, multiplier, prices = terms
    limits = KeyLimits(
        USUAL_SCOPES if scopes is None else frozenset(map(KeyScope, scopes.split())),
        None if models is None else tuple(models.split()),
        None if networks is None else tuple(map(ip_network, networks.split())),
        *numbers,
    )
    return Key(
        id=key_id,
        tenant_id=tenant_id,
        digest=digest,
        display=display,
        delivery=delivery,
        created_ms=created_ms,
        revoked_ms=revoked_ms,
        routing=routing_from_text(routing),
        limits=limits,
        meter_id="" if meter_id == key_id else meter_id or "",
        rotated_to=rotated_to,
        counted=bool(counted),
        keys_version=keys_version,
        terms=terms_from(multiplier, prices),
        suspended=suspended_ms is not None,
    )
