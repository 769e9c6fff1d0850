"""Who owns credits and how many: tenants, grants, balances."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.errors import InvalidRequestError, NotFoundError
from gateway.core.key_limits import KeyUse, left_nanocredits
from gateway.core.ledger import Balance
from gateway.core.money import decimal_text
from gateway.ports import Accounts, Chance, Clock, Key, Ledger, Tenant

TENANT_NAME_MAX_CHARS = 64
ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_CHARS = 16
_NOTHING_USED = KeyUse("1970-01-01")


@dataclass(frozen=True, slots=True)
class ManageTenants:
    """Makes tenants and gives them credits."""

    accounts: Accounts
    ledger: Ledger
    clock: Clock
    chance: Chance

    async def create(self, name: str, *, nanocredits: int = 0) -> Tenant:
        """Make a tenant with a first grant.

        Raises:
            InvalidRequestError: the name is empty, too long or not printable.
            ConflictError: the name is taken.
        """
        if not 1 <= len(name) <= TENANT_NAME_MAX_CHARS or not name.isprintable():
            raise InvalidRequestError(
                f"A tenant's name has 1 to {TENANT_NAME_MAX_CHARS} printable "
                "characters.",
                param="name",
            )
        tenant = Tenant(id="ten_" + self.chance.token(ID_ALPHABET, ID_CHARS), name=name)
        await self.accounts.add_tenant(tenant, now_ms=self.clock.now_ms())
        if nanocredits:
            await self.grant(tenant, nanocredits, reference="first grant")
        return tenant

    async def named(self, name: str) -> Tenant:
        """Find a tenant by name.

        Raises:
            NotFoundError: there is none of that name.
        """
        tenant = await self.accounts.tenant_named(name)
        if tenant is None:
            raise NotFoundError(
                f"There is no tenant {name!r}. See: imageway tenants list.",
                code="tenant_not_found",
            )
        return tenant

    async def grant(
        self, tenant: Tenant, nanocredits: int, *, reference: str | None = None
    ) -> Balance:
        """Add credits. The same ``reference`` again changes nothing.

        Raises:
            InvalidRequestError: the amount is not above zero.
            ConflictError: the reference was used with another amount.
        """
        if nanocredits <= 0:
            raise InvalidRequestError("A grant must be above zero.", param="credits")
        return await self.ledger.grant(
            tenant.id,
            nanocredits,
            reference=reference or "grant " + self.chance.token(ID_ALPHABET, ID_CHARS),
            now_ms=self.clock.now_ms(),
        )

    async def balance(self, tenant_id: str) -> Balance:
        """Read what a tenant has."""
        return await self.ledger.balance(tenant_id) or Balance()

    async def use_of(self, key: Key) -> KeyUse | None:
        """Read what a key has used; None for one that has no budget to use up."""
        has_budget = left_nanocredits(key.limits, _NOTHING_USED) is not None
        return await self.accounts.key_use(key.id) if has_budget else None


def balance_texts(balance: Balance) -> dict[str, str]:
    """Write a balance as decimal strings of credits: available, held, spent."""
    return {
        "available": decimal_text(balance.available),
        "held": decimal_text(balance.held),
        "spent": decimal_text(balance.spent),
    }
