"""What a tenant may spend: hold, charge what it really cost, give back the rest.

Pure. The store runs these rules inside one database transaction; the audit and the
tests run them again, apart from the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

REVENUE = "revenue"
GRANTS = "grants"
ABSORBED = "absorbed"
EXPIRED = "expired"


def tenant_account(tenant_id: str) -> str:
    """Name the ledger account of a tenant."""
    return f"tenant:{tenant_id}"


@dataclass(frozen=True, slots=True)
class Balance:
    """A tenant's credits, in nano-credits.

    ``posted`` is the sum of all entries; ``held`` the part of it that open holds set
    aside; ``spent`` all that was ever charged, less refunds.
    """

    posted: int = 0
    held: int = 0
    spent: int = 0

    def __post_init__(self) -> None:
        assert self.held >= 0, self
        assert self.spent >= 0, self
        assert self.posted - self.held >= 0, self

    @property
    def available(self) -> int:
        """What a new hold may take, in nano-credits."""
        return self.posted - self.held


@dataclass(frozen=True, slots=True)
class Settled:
    """How a hold was closed, in nano-credits.

    ``charged`` was taken from the tenant; ``absorbed`` is what it cost beyond the
    hold and beyond what was available: booked to the operator.
    """

    charged: int
    absorbed: int = 0
    again: bool = field(default=False, compare=False)
    """It had been closed before: this time nothing has changed."""


def hold(balance: Balance, nanocredits: int) -> Balance | None:
    """Set credits aside; None if they are not there."""
    assert nanocredits > 0, nanocredits
    if balance.available < nanocredits:
        return None
    return replace(balance, held=balance.held + nanocredits)


def settle(balance: Balance, held: int, due: int) -> tuple[Balance, Settled]:
    """Close a hold with what is due; 0 voids it. The balance never goes below zero."""
    assert 0 < held <= balance.held, (held, balance)
    assert due >= 0, due
    freed = replace(balance, held=balance.held - held)
    charged = min(due, freed.available)
    after = replace(freed, posted=freed.posted - charged, spent=freed.spent + charged)
    return after, Settled(charged=charged, absorbed=due - charged)


def refund(balance: Balance, nanocredits: int) -> Balance:
    """Give a part of what was charged back."""
    assert 0 < nanocredits <= balance.spent, (nanocredits, balance)
    return replace(
        balance,
        posted=balance.posted + nanocredits,
        spent=balance.spent - nanocredits,
    )


@dataclass(frozen=True, slots=True)
class Lot:
    """What is left of a grant that ends, in nano-credits."""

    reference: str
    expires_ms: int
    nanocredits: int


def drawn(lots: Iterable[Lot], nanocredits: int) -> dict[str, int]:
    """Take a charge out of grants that end, the soonest first, as far as they go.

    Returns how much of each; what is left of the charge is taken from credits that do
    not end.
    """
    taken: dict[str, int] = {}
    for lot in sorted(lots, key=lambda lot: (lot.expires_ms, lot.reference)):
        part = min(lot.nanocredits, nanocredits)
        if part:
            taken[lot.reference] = part
        nanocredits -= part
    return taken


def expired(balance: Balance, lot: Lot) -> int:
    """Tell how much of a grant that is over can be taken out of the balance now.

    What open holds have set aside stays until they are closed.
    """
    return min(lot.nanocredits, balance.available)


def settlement_entries(tenant_id: str, settled: Settled) -> dict[str, int]:
    """Double-entry lines of a settlement, in nano-credits; they sum to zero."""
    lines = {
        tenant_account(tenant_id): -settled.charged,
        ABSORBED: -settled.absorbed,
        REVENUE: settled.charged + settled.absorbed,
    }
    return {account: nano for account, nano in lines.items() if nano}


def grant_entries(tenant_id: str, nanocredits: int) -> dict[str, int]:
    """Double-entry lines of a grant, in nano-credits; they sum to zero."""
    return {tenant_account(tenant_id): nanocredits, GRANTS: -nanocredits}


def refund_entries(tenant_id: str, nanocredits: int) -> dict[str, int]:
    """Double-entry lines of a refund, in nano-credits; they sum to zero."""
    return {tenant_account(tenant_id): nanocredits, REVENUE: -nanocredits}


def expiry_entries(tenant_id: str, nanocredits: int) -> dict[str, int]:
    """Double-entry lines of a grant's end, in nano-credits; they sum to zero."""
    return {tenant_account(tenant_id): -nanocredits, EXPIRED: nanocredits}
