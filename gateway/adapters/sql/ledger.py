"""Credits of tenants in SQL, and the audit that recomputes them from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.adapters.sql.database import Change, Database, Row, Transaction
from gateway.adapters.sql.key_use import DRIFT
from gateway.core.errors import ConflictError, InvalidRequestError, NotFoundError
from gateway.core.ledger import (
    ABSORBED,
    GRANTS,
    REVENUE,
    Balance,
    grant_entries,
    tenant_account,
)
from gateway.core.money import NANO_MAX, decimal_text
from gateway.core.pricing import COST_SOURCES
from gateway.ports import AuditReport, Drift

GRANT = "grant"
CHARGE = "charge"


@dataclass(frozen=True, slots=True)
class SqlLedger:
    """The ``Ledger`` port over any SQL database."""

    database: Database

    async def grant(
        self, tenant_id: str, nanocredits: int, *, reference: str, now_ms: int
    ) -> Balance:
        """See ``Ledger``.

        Raises:
            InvalidRequestError: nothing to add, or more than an account can hold.
            NotFoundError: there is no such tenant.
            ConflictError: the reference was used for another amount.
        """
        if nanocredits <= 0:
            raise InvalidRequestError("credits must be above 0", param="credits")
        return await self.database.write(
            lambda tx: _grant(tx, tenant_id, nanocredits, reference, now_ms)
        )

    async def balance(self, tenant_id: str) -> Balance | None:
        """See ``Ledger``."""
        row = await self.database.read(
            lambda tx: tx.one(
                "SELECT posted, held, spent FROM accounts WHERE tenant_id = $1",
                tenant_id,
            )
        )
        return Balance(*row) if row else None

    async def audit(self) -> AuditReport:
        """See ``Ledger``. Reads every row of the ledger, from one snapshot."""
        return await self.database.read(_audit)


async def lock_account(tx: Transaction, tenant_id: str) -> Balance:
    """Read a balance that nobody else can change until this transaction is over.

    An UPDATE that changes nothing, since it is what both engines lock a row by.

    Raises:
        NotFoundError: there is no such tenant.
    """
    row = await tx.one(
        """UPDATE accounts SET held = held WHERE tenant_id = $1
        RETURNING posted, held, spent""",
        tenant_id,
    )
    if row is None:
        raise NotFoundError(f"there is no tenant {tenant_id!r}")
    return Balance(*row)


def entry_lines(
    lines: Mapping[str, int], *, kind: str, reference: str, now_ms: int
) -> list[Change]:
    """Write the lines of one double-entry transaction, named by kind and reference."""
    return [
        (
            """INSERT INTO entries
                (txn_id, account, nanocredits, kind, reference, created_ms)
            VALUES ($1, $2, $3, $4, $5, $6)""",
            f"{kind}:{reference}",
            account,
            nanocredits,
            kind,
            reference,
            now_ms,
        )
        for account, nanocredits in lines.items()
    ]


async def _grant(
    tx: Transaction, tenant_id: str, nanocredits: int, reference: str, now_ms: int
) -> Balance:
    before = await lock_account(tx, tenant_id)
    added = await tx.run(
        """INSERT INTO grants (tenant_id, reference, nanocredits, created_ms)
        VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING""",
        tenant_id,
        reference,
        nanocredits,
        now_ms,
    )
    if not added:
        await _check_same_grant(tx, tenant_id, reference, nanocredits)
        return before
    if before.posted + nanocredits > NANO_MAX:
        raise InvalidRequestError(
            f"a balance can be at most {decimal_text(NANO_MAX)} credits",
            param="credits",
        )
    await tx.run(
        "UPDATE accounts SET posted = posted + $2 WHERE tenant_id = $1",
        tenant_id,
        nanocredits,
    )
    lines = entry_lines(
        grant_entries(tenant_id, nanocredits),
        kind=GRANT,
        reference=f"{tenant_id}:{reference}",
        now_ms=now_ms,
    )
    await tx.changes(*lines)
    return Balance(before.posted + nanocredits, before.held, before.spent)


async def _check_same_grant(
    tx: Transaction, tenant_id: str, reference: str, nanocredits: int
) -> None:
    row = await tx.one(
        "SELECT nanocredits FROM grants WHERE tenant_id = $1 AND reference = $2",
        tenant_id,
        reference,
    )
    if row and row[0] != nanocredits:
        raise ConflictError(
            f"reference {reference!r} was used for a grant of "
            f"{decimal_text(row[0])} credits",
            param="reference",
        )


@dataclass(frozen=True, slots=True)
class Check:
    """An invariant, as a query for what breaks it: (subject, expected, found)."""

    invariant: str
    sql: str
    params: tuple[str, ...] = ()


_TENANT_PREFIX = tenant_account("")

# Each table is read a few times at most, whatever its size. So EXCEPT and not NOT IN,
# which PostgreSQL answers row by row once a list outgrows its memory for sorting.
CHECKS = (
    Check(
        "every tenant has an account",
        """SELECT t.id, 0, 0 FROM tenants t
        LEFT JOIN accounts a ON a.tenant_id = t.id WHERE a.tenant_id IS NULL""",
    ),
    Check(
        "posted is the sum of the tenant's entries",
        """SELECT a.tenant_id, COALESCE(e.total, 0), a.posted FROM accounts a
        LEFT JOIN (SELECT account, CAST(SUM(nanocredits) AS BIGINT) AS total
            FROM entries GROUP BY account) e
        ON e.account = CAST($1 AS TEXT) || a.tenant_id
        WHERE a.posted <> COALESCE(e.total, 0)""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "held is the sum of the tenant's open holds",
        """SELECT a.tenant_id, COALESCE(h.total, 0), a.held FROM accounts a
        LEFT JOIN (SELECT o.tenant_id, CAST(SUM(o.nanocredits) AS BIGINT) AS total
            FROM holds o LEFT JOIN settlements s ON s.task_id = o.task_id
            WHERE s.task_id IS NULL GROUP BY o.tenant_id) h
        ON h.tenant_id = a.tenant_id WHERE a.held <> COALESCE(h.total, 0)""",
    ),
    Check(
        "spent is the sum of the tenant's charges",
        """SELECT a.tenant_id, COALESCE(c.total, 0), a.spent FROM accounts a
        LEFT JOIN (SELECT h.tenant_id, CAST(SUM(s.charged) AS BIGINT) AS total
            FROM settlements s JOIN holds h ON h.task_id = s.task_id
            GROUP BY h.tenant_id) c
        ON c.tenant_id = a.tenant_id WHERE a.spent <> COALESCE(c.total, 0)""",
    ),
    Check(
        "a balance is never negative",
        """SELECT tenant_id, 0, posted - held FROM accounts
        WHERE posted - held < 0 OR held < 0 OR spent < 0""",
    ),
    Check(
        "all entries sum to zero",
        """SELECT 'ledger', 0, x.total FROM
            (SELECT CAST(SUM(nanocredits) AS BIGINT) AS total FROM entries) x
        WHERE x.total <> 0""",
    ),
    Check(
        "every transaction sums to zero",
        """SELECT txn_id, 0, CAST(SUM(nanocredits) AS BIGINT) FROM entries
        GROUP BY txn_id HAVING SUM(nanocredits) <> 0""",
    ),
    Check(
        "every entry is on a known account",
        """SELECT e.account, 0, CAST(SUM(e.nanocredits) AS BIGINT) FROM entries e
        JOIN (SELECT account FROM entries WHERE account NOT IN ($2, $3, $4)
            EXCEPT SELECT CAST($1 AS TEXT) || id FROM tenants) x
        ON x.account = e.account GROUP BY e.account""",
        (_TENANT_PREFIX, REVENUE, GRANTS, ABSORBED),
    ),
    Check(
        "a hold is settled once",
        """SELECT task_id, CAST(MIN(due) AS BIGINT), CAST(SUM(due) AS BIGINT)
        FROM settlements GROUP BY task_id HAVING COUNT(*) > 1""",
    ),
    Check(
        "a settlement closes a hold",
        """SELECT s.task_id, 0, s.charged FROM settlements s
        LEFT JOIN holds h ON h.task_id = s.task_id WHERE h.task_id IS NULL""",
    ),
    Check(
        "charged and absorbed make up what is due",
        """SELECT task_id, due, charged + absorbed FROM settlements
        WHERE charged + absorbed <> due OR due < 0 OR charged < 0 OR absorbed < 0""",
    ),
    Check(
        "nothing is absorbed before the hold is used up",
        """SELECT s.task_id, h.nanocredits, s.charged
        FROM settlements s JOIN holds h ON h.task_id = s.task_id
        WHERE s.absorbed > 0 AND s.charged < h.nanocredits""",
    ),
    # The next four find an entry that is missing, too many, or of another amount.
    Check(
        "the tenant's entry is the charge",
        """SELECT s.task_id, 0 - s.charged, COALESCE(e.nanocredits, 0)
        FROM settlements s JOIN holds h ON h.task_id = s.task_id
        LEFT JOIN entries e ON e.txn_id = 'charge:' || s.task_id
            AND e.account = CAST($1 AS TEXT) || h.tenant_id
        WHERE COALESCE(e.nanocredits, 0) <> 0 - s.charged""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "the revenue entry is what was due",
        """SELECT s.task_id, s.due, COALESCE(e.nanocredits, 0) FROM settlements s
        LEFT JOIN entries e ON e.txn_id = 'charge:' || s.task_id AND e.account = $1
        WHERE COALESCE(e.nanocredits, 0) <> s.due""",
        (REVENUE,),
    ),
    Check(
        "every charge entry has its settlement",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        JOIN (SELECT txn_id FROM entries WHERE kind = 'charge'
            EXCEPT SELECT 'charge:' || task_id FROM settlements) x
        ON x.txn_id = e.txn_id""",
    ),
    Check(
        "a grant is entered as it was made",
        """SELECT g.tenant_id || ':' || g.reference, g.nanocredits,
            COALESCE(e.nanocredits, 0) FROM grants g
        LEFT JOIN entries e
            ON e.txn_id = 'grant:' || g.tenant_id || ':' || g.reference
            AND e.account = CAST($1 AS TEXT) || g.tenant_id
        WHERE COALESCE(e.nanocredits, 0) <> g.nanocredits""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "every grant entry has its grant",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        JOIN (SELECT txn_id FROM entries WHERE kind = 'grant'
            EXCEPT SELECT 'grant:' || tenant_id || ':' || reference FROM grants) x
        ON x.txn_id = e.txn_id""",
    ),
    Check(
        "a task has a hold",
        """SELECT t.id, 0, 0 FROM tasks t
        LEFT JOIN holds h ON h.task_id = t.id AND h.tenant_id = t.tenant_id
        WHERE h.task_id IS NULL""",
    ),
    Check(
        "an open hold belongs to a task",
        """SELECT h.task_id, 0, h.nanocredits FROM holds h
        LEFT JOIN settlements s ON s.task_id = h.task_id
        LEFT JOIN tasks t ON t.id = h.task_id
        WHERE s.task_id IS NULL AND t.id IS NULL""",
    ),
    Check(
        "a final task has no open hold",
        """SELECT t.id, 0, COALESCE(h.nanocredits, 0) FROM tasks t
        LEFT JOIN holds h ON h.task_id = t.id
        LEFT JOIN settlements s ON s.task_id = t.id
        WHERE t.state IN ('completed', 'failed', 'cancelled')
            AND s.task_id IS NULL""",
    ),
    Check(
        "a final task has no open attempt",
        """SELECT t.id || ' #' || a.seq, 0, a.estimate_nanousd FROM attempts a
        JOIN tasks t ON t.id = a.task_id
        WHERE t.finished_ms IS NOT NULL AND a.finished_ms IS NULL""",
    ),
    Check(
        "a settled task is final",
        """SELECT t.id, 0, s.charged FROM tasks t
        JOIN settlements s ON s.task_id = t.id
        WHERE t.state IN ('pending', 'processing')""",
    ),
    Check(
        "a failed task costs nothing",
        """SELECT t.id, 0, s.due FROM tasks t JOIN settlements s ON s.task_id = t.id
        WHERE t.state = 'failed' AND s.due <> 0""",
    ),
    Check("what a key has used is the sum of its holds and charges", DRIFT),
    Check(
        "every cost has a source that is known",
        """SELECT task_id || ' #' || seq, 0, nanousd FROM cost_book
        WHERE source NOT IN ($1, $2, $3, $4, $5)""",
        COST_SOURCES,
    ),
)


async def _audit(tx: Transaction) -> AuditReport:
    drifts = [
        _drift(check.invariant, row)
        for check in CHECKS
        for row in await tx.all(check.sql, *check.params)
    ]
    counts = await tx.one(
        """SELECT (SELECT COUNT(*) FROM tenants), (SELECT COUNT(*) FROM entries),
            (SELECT COUNT(*) FROM holds h LEFT JOIN settlements s
                ON s.task_id = h.task_id WHERE s.task_id IS NULL),
            (SELECT COUNT(*) FROM settlements)"""
    )
    assert counts is not None
    tenants, entries, holds_open, settlements = counts
    return AuditReport(tenants, entries, holds_open, settlements, tuple(drifts))


def _drift(invariant: str, row: Row) -> Drift:
    subject, expected, found = row
    return Drift(
        invariant=invariant,
        subject=subject,
        detail=f"expected {decimal_text(expected)}, found {decimal_text(found)}",
        drift_nanocredits=found - expected,
    )
