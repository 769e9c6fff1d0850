"""Tenants and their keys, in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.adapters.sql.database import Database, Row, Transaction
from gateway.core.errors import ConflictError, NotFoundError
from gateway.core.ledger import Balance
from gateway.core.preferences import routing_from_text, routing_text
from gateway.core.terms import terms_from
from gateway.core.webhooks import SECRETS_MAX, SigningKey, check_rotation
from gateway.ports import Key, Tenant


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

    async def add_key(self, key: Key) -> None:
        """See ``Accounts``.

        Raises:
            NotFoundError: there is no such tenant.
            ConflictError: a key of that id or digest is there.
        """
        await self.database.write(lambda tx: _add_key(tx, key))

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

    async def revoke_key(self, key_id: str, *, now_ms: int) -> bool:
        """See ``Accounts``; a key revoked twice keeps the first time."""
        changed = await self.database.write(
            lambda tx: tx.run(
                """UPDATE keys SET revoked_ms = COALESCE(revoked_ms, $2)
                WHERE id = $1""",
                key_id,
                now_ms,
            )
        )
        return changed > 0

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


async def _add_key(tx: Transaction, key: Key) -> None:
    if not await tx.one("SELECT id FROM tenants WHERE id = $1", key.tenant_id):
        raise NotFoundError(f"there is no tenant {key.tenant_id!r}")
    added = await tx.run(
        """INSERT INTO keys
            (id, tenant_id, digest, display, delivery, created_ms, revoked_ms,
             routing_json)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING""",
        key.id,
        key.tenant_id,
        key.digest,
        key.display,
        key.delivery,
        key.created_ms,
        key.revoked_ms,
        routing_text(key.routing),
    )
    if not added:
        raise ConflictError(f"there is a key {key.id!r} or one equal to it already")


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
    k.revoked_ms, k.routing_json, a.suspended_ms, t.multiplier, t.prices_json
FROM keys k JOIN accounts a ON a.tenant_id = k.tenant_id
JOIN tenants t ON t.id = k.tenant_id"""


def _key(row: Row) -> Key:
    routing, suspended_ms, multiplier, prices = row[7:]
    return replace(
        Key(*row[:7]),
        routing=routing_from_text(routing),
        terms=terms_from(multiplier, prices),
        suspended=suspended_ms is not None,
    )
