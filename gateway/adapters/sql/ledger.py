"""Credits of tenants in SQL, and the audit that recomputes them from the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.adapters.sql.database import Change, Database, Row, Transaction
from gateway.adapters.sql.key_use import DRIFT
from gateway.adapters.sql.trail import trace
from gateway.core.errors import ConflictError, InvalidRequestError, NotFoundError
from gateway.core.ledger import (
    ABSORBED,
    EXPIRED,
    GRANTS,
    REVENUE,
    Balance,
    Lot,
    drawn,
    expired,
    expiry_entries,
    grant_entries,
    refund,
    refund_entries,
    tenant_account,
)
from gateway.core.money import NANO_MAX, decimal_text
from gateway.core.pricing import COST_SOURCES
from gateway.core.statements import moment_or_none, moment_text
from gateway.ports import (
    AuditReport,
    Drift,
    Expired,
    GrantRecord,
    Mark,
    NewGrant,
    NewRefund,
)

GRANT = "grant"
CHARGE = "charge"
REFUND = "refund"
EXPIRY = "expiry"
LOTS_MAX = 1_000
"""Grants of one tenant that end and are not used up."""


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
        grant = NewGrant(tenant_id, nanocredits, reference)
        return await self._give(grant, None, now_ms)

    async def give(self, grant: NewGrant, mark: Mark) -> Balance:
        """See ``Treasury``."""
        return await self._give(grant, mark, mark.at_ms)

    async def _give(self, grant: NewGrant, mark: Mark | None, now_ms: int) -> Balance:
        if grant.nanocredits <= 0:
            raise InvalidRequestError("credits must be above 0", param="credits")
        return await self.database.write(lambda tx: _grant(tx, grant, mark, now_ms))

    async def refund(self, refund: NewRefund, mark: Mark) -> Balance:
        """See ``Treasury``."""
        return await self.database.write(lambda tx: _refund(tx, refund, mark))

    async def knows_grant(self, tenant_id: str, reference: str) -> bool:
        """See ``Treasury``."""
        row = await self.database.read(
            lambda tx: tx.one(
                "SELECT 1 FROM grants WHERE tenant_id = $1 AND reference = $2",
                tenant_id,
                reference,
            )
        )
        return row is not None

    async def grants(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[GrantRecord]:
        """See ``Treasury``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT g.reference, g.nanocredits, g.created_ms, g.expires_ms,
                    g.note, CASE WHEN g.expires_ms IS NULL THEN NULL
                        ELSE COALESCE(l.nanocredits, 0) END
                FROM grants g LEFT JOIN lots l
                    ON l.tenant_id = g.tenant_id AND l.reference = g.reference
                WHERE g.tenant_id = $1 ORDER BY g.created_ms DESC, g.reference DESC
                LIMIT $2 OFFSET $3""",
                tenant_id,
                limit,
                offset,
            )
        )
        return [GrantRecord(*row) for row in rows]

    async def expire(self, now_ms: int, limit: int) -> Sequence[Expired]:
        """See ``Treasury``; each grant in a transaction of its own."""
        due = await self.database.read(
            lambda tx: tx.all(
                """SELECT l.tenant_id, l.reference FROM lots l
                JOIN accounts a ON a.tenant_id = l.tenant_id
                WHERE l.expires_ms <= $1 AND a.posted - a.held > 0
                ORDER BY l.expires_ms, l.tenant_id, l.reference LIMIT $2""",
                now_ms,
                limit,
            )
        )
        taken = []
        for tenant_id, reference in due:
            nanocredits = await self._expired(tenant_id, reference, now_ms)
            if nanocredits:
                taken.append(Expired(tenant_id, reference, nanocredits))
        return taken

    async def _expired(self, tenant_id: str, reference: str, now_ms: int) -> int:
        return await self.database.write(
            lambda tx: _expire(tx, tenant_id, reference, now_ms)
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


async def draw_lots(
    tx: Transaction, tenant_id: str, txn_id: str, nanocredits: int, now_ms: int
) -> None:
    """Take a charge out of grants that end; the account is locked.

    A part of the settlement's transaction, for tenants that have such grants.
    """
    rows = await tx.all(
        """SELECT reference, expires_ms, nanocredits FROM lots WHERE tenant_id = $1
        ORDER BY expires_ms, reference""",
        tenant_id,
    )
    lots = {reference: Lot(reference, *rest) for reference, *rest in rows}
    for reference, part in drawn(lots.values(), nanocredits).items():
        await _draw(tx, (txn_id, CHARGE), tenant_id, lots[reference], part, now_ms)


async def _draw(
    tx: Transaction,
    txn: tuple[str, str],
    tenant_id: str,
    lot: Lot,
    part: int,
    now_ms: int,
) -> None:
    txn_id, kind = txn
    await tx.run(
        """INSERT INTO draws
            (txn_id, tenant_id, reference, kind, nanocredits, created_ms)
        VALUES ($1, $2, $3, $4, $5, $6)""",
        txn_id,
        tenant_id,
        lot.reference,
        kind,
        part,
        now_ms,
    )
    if part < lot.nanocredits:
        await tx.run(
            """UPDATE lots SET nanocredits = nanocredits - $3
            WHERE tenant_id = $1 AND reference = $2""",
            tenant_id,
            lot.reference,
            part,
        )
        return
    await tx.run(
        "DELETE FROM lots WHERE tenant_id = $1 AND reference = $2",
        tenant_id,
        lot.reference,
    )
    await tx.run("UPDATE accounts SET lots = lots - 1 WHERE tenant_id = $1", tenant_id)


async def _grant(
    tx: Transaction, grant: NewGrant, mark: Mark | None, now_ms: int
) -> Balance:
    tenant_id, nanocredits = grant.tenant_id, grant.nanocredits
    before = await lock_account(tx, tenant_id)
    added = await tx.run(
        """INSERT INTO grants
            (tenant_id, reference, nanocredits, created_ms, expires_ms, note)
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING""",
        tenant_id,
        grant.reference,
        nanocredits,
        now_ms,
        grant.expires_ms,
        grant.note,
    )
    if not added:
        await _check_same_grant(tx, grant)
        return before
    check_fits(before, nanocredits)
    await tx.run(
        "UPDATE accounts SET posted = posted + $2 WHERE tenant_id = $1",
        tenant_id,
        nanocredits,
    )
    lines = entry_lines(
        grant_entries(tenant_id, nanocredits),
        kind=GRANT,
        reference=f"{tenant_id}:{grant.reference}",
        now_ms=now_ms,
    )
    await tx.changes(*lines)
    if grant.expires_ms is not None:
        await _open_lot(tx, grant, grant.expires_ms)
    if mark is not None:
        facts = {
            "credits": decimal_text(nanocredits),
            "expires_at": moment_or_none(grant.expires_ms),
            "note": grant.note,
        }
        changed = (None, facts)
        await tx.changes(trace(mark, GRANT, tenant_id, grant.reference, changed))
    return Balance(before.posted + nanocredits, before.held, before.spent)


def check_fits(balance: Balance, nanocredits: int) -> None:
    """See that an account can hold so much more.

    Raises:
        InvalidRequestError: it cannot.
    """
    if balance.posted + nanocredits > NANO_MAX:
        raise InvalidRequestError(
            f"a balance can be at most {decimal_text(NANO_MAX)} credits",
            param="credits",
        )


async def _open_lot(tx: Transaction, grant: NewGrant, expires_ms: int) -> None:
    await tx.run(
        """INSERT INTO lots (tenant_id, reference, expires_ms, nanocredits)
        VALUES ($1, $2, $3, $4)""",
        grant.tenant_id,
        grant.reference,
        expires_ms,
        grant.nanocredits,
    )
    opened = await tx.run(
        "UPDATE accounts SET lots = lots + 1 WHERE tenant_id = $1 AND lots < $2",
        grant.tenant_id,
        LOTS_MAX,
    )
    if not opened:
        raise ConflictError(
            f"the tenant has {LOTS_MAX:,} grants that end; as many as it may. Give "
            "fewer and larger ones, or wait until some are used up.",
            code="too_many_grants",
        )


async def _check_same_grant(tx: Transaction, grant: NewGrant) -> None:
    row = await tx.one(
        """SELECT nanocredits, expires_ms FROM grants
        WHERE tenant_id = $1 AND reference = $2""",
        grant.tenant_id,
        grant.reference,
    )
    if row and tuple(row) != (grant.nanocredits, grant.expires_ms):
        until = "" if row[1] is None else f" until {moment_text(row[1])}"
        raise ConflictError(
            f"reference {grant.reference!r} was used for a grant of "
            f"{decimal_text(row[0])} credits{until}",
            param="reference",
        )


async def _refund(tx: Transaction, asked: NewRefund, mark: Mark) -> Balance:
    before = await lock_account(tx, asked.tenant_id)
    charge = await tx.one(
        """SELECT s.charged, CAST(COALESCE((SELECT SUM(r.nanocredits) FROM refunds r
            WHERE r.task_id = s.task_id), 0) AS BIGINT)
        FROM settlements s WHERE s.task_id = $1 AND s.tenant_id = $2""",
        asked.task_id,
        asked.tenant_id,
    )
    if charge is None:
        raise NotFoundError(
            f"The tenant has no task {asked.task_id!r} that was charged.",
            param="task_id",
            code="task_not_found",
        )
    if await _was_refunded(tx, asked):
        return before
    left = charge[0] - charge[1]
    nanocredits = left if asked.nanocredits is None else asked.nanocredits
    if nanocredits > left or left <= 0:
        raise ConflictError(
            f"Task {asked.task_id} was charged {decimal_text(charge[0])} credits, and "
            f"{decimal_text(charge[1])} were refunded: {decimal_text(left)} are left.",
            param="credits",
            code="refund_exceeds_charge",
        )
    check_fits(before, nanocredits)
    after = refund(before, nanocredits)
    facts = {
        "task_id": asked.task_id,
        "credits": decimal_text(nanocredits),
        "note": asked.note,
    }
    await tx.changes(
        (
            """INSERT INTO refunds
                (tenant_id, reference, task_id, nanocredits, note, created_ms)
            VALUES ($1, $2, $3, $4, $5, $6)""",
            asked.tenant_id,
            asked.reference,
            asked.task_id,
            nanocredits,
            asked.note,
            mark.at_ms,
        ),
        (
            "UPDATE accounts SET posted = $2, spent = $3 WHERE tenant_id = $1",
            asked.tenant_id,
            after.posted,
            after.spent,
        ),
        *entry_lines(
            refund_entries(asked.tenant_id, nanocredits),
            kind=REFUND,
            reference=f"{asked.tenant_id}:{asked.reference}",
            now_ms=mark.at_ms,
        ),
        trace(mark, REFUND, asked.tenant_id, asked.reference, (None, facts)),
    )
    return after


async def _was_refunded(tx: Transaction, asked: NewRefund) -> bool:
    row = await tx.one(
        """SELECT task_id, nanocredits FROM refunds
        WHERE tenant_id = $1 AND reference = $2""",
        asked.tenant_id,
        asked.reference,
    )
    if row is None:
        return False
    same = row[0] == asked.task_id and asked.nanocredits in {None, row[1]}
    if not same:
        raise ConflictError(
            f"reference {asked.reference!r} was used for a refund of "
            f"{decimal_text(row[1])} credits of task {row[0]}",
            param="reference",
        )
    return True


async def _expire(tx: Transaction, tenant_id: str, reference: str, now_ms: int) -> int:
    balance = await lock_account(tx, tenant_id)
    row = await tx.one(
        """SELECT reference, expires_ms, nanocredits,
            (SELECT COUNT(*) FROM draws d WHERE d.tenant_id = l.tenant_id
                AND d.reference = l.reference AND d.kind = 'expiry')
        FROM lots l WHERE tenant_id = $1 AND reference = $2 AND expires_ms <= $3""",
        tenant_id,
        reference,
        now_ms,
    )
    if row is None:
        return 0
    lot = Lot(*row[:3])
    nanocredits = expired(balance, lot)
    if not nanocredits:
        return 0
    # What holds have kept is taken later, by a transaction of another name.
    name = f"{tenant_id}:{reference}#{row[3] + 1}"
    await tx.changes(
        (
            "UPDATE accounts SET posted = posted - $2 WHERE tenant_id = $1",
            tenant_id,
            nanocredits,
        ),
        *entry_lines(
            expiry_entries(tenant_id, nanocredits),
            kind=EXPIRY,
            reference=name,
            now_ms=now_ms,
        ),
    )
    txn = (f"{EXPIRY}:{name}", EXPIRY)
    await _draw(tx, txn, tenant_id, lot, nanocredits, now_ms)
    return nanocredits


@dataclass(frozen=True, slots=True)
class Check:
    """An invariant, as a query for what breaks it: (subject, expected, found).

    ``rule`` is its number, I1 to I10: see docs/credits.md.
    """

    rule: str
    invariant: str
    sql: str
    params: tuple[str, ...] = ()


_TENANT_PREFIX = tenant_account("")

# Each table is read a few times at most, whatever its size. So EXCEPT and not NOT IN,
# which PostgreSQL answers row by row once a list outgrows its memory for sorting.
CHECKS = (
    Check(
        "I2",
        "every tenant has an account",
        """SELECT t.id, 0, 0 FROM tenants t
        LEFT JOIN accounts a ON a.tenant_id = t.id WHERE a.tenant_id IS NULL""",
    ),
    Check(
        "I2",
        "posted is the sum of the tenant's entries",
        """SELECT a.tenant_id, COALESCE(e.total, 0), a.posted FROM accounts a
        LEFT JOIN (SELECT account, CAST(SUM(nanocredits) AS BIGINT) AS total
            FROM entries WHERE account NOT IN ($2, $3, $4, $5) GROUP BY account) e
        ON e.account = CAST($1 AS TEXT) || a.tenant_id
        WHERE a.posted <> COALESCE(e.total, 0)""",
        # The operator's own accounts may hold more than an integer does.
        (_TENANT_PREFIX, REVENUE, GRANTS, ABSORBED, EXPIRED),
    ),
    Check(
        "I2",
        "held is the sum of the tenant's open holds",
        """SELECT a.tenant_id, COALESCE(h.total, 0), a.held FROM accounts a
        LEFT JOIN (SELECT o.tenant_id, CAST(SUM(o.nanocredits) AS BIGINT) AS total
            FROM holds o LEFT JOIN settlements s ON s.task_id = o.task_id
            WHERE s.task_id IS NULL GROUP BY o.tenant_id) h
        ON h.tenant_id = a.tenant_id WHERE a.held <> COALESCE(h.total, 0)""",
    ),
    Check(
        "I2",
        "spent is the sum of the tenant's charges less refunds",
        """SELECT a.tenant_id, COALESCE(c.total, 0) - COALESCE(r.total, 0), a.spent
        FROM accounts a
        LEFT JOIN (SELECT h.tenant_id, CAST(SUM(s.charged) AS BIGINT) AS total
            FROM settlements s JOIN holds h ON h.task_id = s.task_id
            GROUP BY h.tenant_id) c ON c.tenant_id = a.tenant_id
        LEFT JOIN (SELECT tenant_id, CAST(SUM(nanocredits) AS BIGINT) AS total
            FROM refunds GROUP BY tenant_id) r ON r.tenant_id = a.tenant_id
        WHERE a.spent <> COALESCE(c.total, 0) - COALESCE(r.total, 0)""",
    ),
    Check(
        "I1",
        "a balance is never negative",
        """SELECT tenant_id, 0, posted - held FROM accounts
        WHERE posted - held < 0 OR held < 0 OR spent < 0""",
    ),
    Check(
        "I3",
        "all entries sum to zero",
        """SELECT 'ledger', 0, x.total FROM
            (SELECT CAST(SUM(nanocredits) AS BIGINT) AS total FROM entries) x
        WHERE x.total <> 0""",
    ),
    Check(
        "I3",
        "every transaction sums to zero",
        """SELECT txn_id, 0, CAST(SUM(nanocredits) AS BIGINT) FROM entries
        GROUP BY txn_id HAVING SUM(nanocredits) <> 0""",
    ),
    Check(
        "I3",
        "every entry is on a known account",
        """SELECT e.account, 0, CAST(SUM(e.nanocredits) AS BIGINT) FROM entries e
        JOIN (SELECT account FROM entries WHERE account NOT IN ($2, $3, $4, $5)
            EXCEPT SELECT CAST($1 AS TEXT) || id FROM tenants) x
        ON x.account = e.account GROUP BY e.account""",
        (_TENANT_PREFIX, REVENUE, GRANTS, ABSORBED, EXPIRED),
    ),
    Check(
        "I4",
        "a hold is settled once",
        """SELECT task_id, CAST(MIN(due) AS BIGINT), CAST(SUM(due) AS BIGINT)
        FROM settlements GROUP BY task_id HAVING COUNT(*) > 1""",
    ),
    Check(
        "I4",
        "a settlement closes a hold",
        """SELECT s.task_id, 0, s.charged FROM settlements s
        LEFT JOIN holds h ON h.task_id = s.task_id WHERE h.task_id IS NULL""",
    ),
    Check(
        "I4",
        "charged and absorbed make up what is due",
        """SELECT task_id, due, charged + absorbed FROM settlements
        WHERE charged + absorbed <> due OR due < 0 OR charged < 0 OR absorbed < 0""",
    ),
    Check(
        "I4",
        "nothing is absorbed before the hold is used up",
        """SELECT s.task_id, h.nanocredits, s.charged
        FROM settlements s JOIN holds h ON h.task_id = s.task_id
        WHERE s.absorbed > 0 AND s.charged < h.nanocredits""",
    ),
    # The next four find an entry that is missing, too many, or of another amount.
    Check(
        "I8",
        "the tenant's entry is the charge",
        """SELECT s.task_id, 0 - s.charged, COALESCE(e.nanocredits, 0)
        FROM settlements s JOIN holds h ON h.task_id = s.task_id
        LEFT JOIN entries e ON e.txn_id = 'charge:' || s.task_id
            AND e.account = CAST($1 AS TEXT) || h.tenant_id
        WHERE COALESCE(e.nanocredits, 0) <> 0 - s.charged""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "I8",
        "the revenue entry is what was due",
        """SELECT s.task_id, s.due, COALESCE(e.nanocredits, 0) FROM settlements s
        LEFT JOIN entries e ON e.txn_id = 'charge:' || s.task_id AND e.account = $1
        WHERE COALESCE(e.nanocredits, 0) <> s.due""",
        (REVENUE,),
    ),
    # From behind "charge:" on, and not the other way round: the index is of task ids.
    Check(
        "I8",
        "every charge entry has its settlement",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        LEFT JOIN settlements s ON s.task_id = substr(e.txn_id, 8)
        WHERE e.kind = 'charge' AND s.task_id IS NULL""",
    ),
    Check(
        "I2",
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
        "I2",
        "every grant entry has its grant",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        JOIN (SELECT txn_id FROM entries WHERE kind = 'grant'
            EXCEPT SELECT 'grant:' || tenant_id || ':' || reference FROM grants) x
        ON x.txn_id = e.txn_id""",
    ),
    Check(
        "I4",
        "a task has a hold",
        """SELECT t.id, 0, 0 FROM tasks t
        LEFT JOIN holds h ON h.task_id = t.id AND h.tenant_id = t.tenant_id
        WHERE h.task_id IS NULL""",
    ),
    Check(
        "I4",
        "an open hold belongs to a task",
        """SELECT h.task_id, 0, h.nanocredits FROM holds h
        LEFT JOIN settlements s ON s.task_id = h.task_id
        LEFT JOIN tasks t ON t.id = h.task_id
        WHERE s.task_id IS NULL AND t.id IS NULL""",
    ),
    Check(
        "I5",
        "a final task has no open hold",
        """SELECT t.id, 0, COALESCE(h.nanocredits, 0) FROM tasks t
        LEFT JOIN holds h ON h.task_id = t.id
        LEFT JOIN settlements s ON s.task_id = t.id
        WHERE t.state IN ('completed', 'failed', 'cancelled')
            AND s.task_id IS NULL""",
    ),
    Check(
        "I5",
        "a final task has no open attempt",
        """SELECT t.id || ' #' || a.seq, 0, a.estimate_nanousd FROM attempts a
        JOIN tasks t ON t.id = a.task_id
        WHERE t.finished_ms IS NOT NULL AND a.finished_ms IS NULL""",
    ),
    Check(
        "I5",
        "a settled task is final",
        """SELECT t.id, 0, s.charged FROM tasks t
        JOIN settlements s ON s.task_id = t.id
        WHERE t.state IN ('pending', 'processing')""",
    ),
    Check(
        "I5",
        "a failed task costs nothing",
        """SELECT t.id, 0, s.due FROM tasks t JOIN settlements s ON s.task_id = t.id
        WHERE t.state = 'failed' AND s.due <> 0""",
    ),
    Check("I2", "what a key has used is the sum of its holds and charges", DRIFT),
    Check(
        "I7",
        "every cost has a source that is known",
        """SELECT task_id || ' #' || seq, 0, nanousd FROM cost_book
        WHERE source NOT IN ($1, $2, $3, $4, $5)""",
        COST_SOURCES,
    ),
    Check(
        "I2",
        "what is left of a grant is the grant less what was drawn",
        """SELECT g.tenant_id || ':' || g.reference,
            g.nanocredits - COALESCE(d.total, 0), COALESCE(l.nanocredits, 0)
        FROM grants g
        LEFT JOIN lots l ON l.tenant_id = g.tenant_id AND l.reference = g.reference
        LEFT JOIN (SELECT tenant_id, reference,
                CAST(SUM(nanocredits) AS BIGINT) AS total
            FROM draws GROUP BY tenant_id, reference) d
        ON d.tenant_id = g.tenant_id AND d.reference = g.reference
        WHERE g.expires_ms IS NOT NULL
            AND COALESCE(l.nanocredits, 0) <> g.nanocredits - COALESCE(d.total, 0)""",
    ),
    Check(
        "I2",
        "what is kept of a grant that ends is of a grant that ends",
        """SELECT l.tenant_id || ':' || l.reference, 0, l.nanocredits FROM lots l
        LEFT JOIN grants g ON g.tenant_id = l.tenant_id AND g.reference = l.reference
        WHERE g.expires_ms IS NULL OR g.expires_ms <> l.expires_ms""",
    ),
    Check(
        "I2",
        "an account knows how many grants that end it has",
        """SELECT a.tenant_id, COALESCE(l.n, 0), a.lots FROM accounts a
        LEFT JOIN (SELECT tenant_id, COUNT(*) AS n FROM lots GROUP BY tenant_id) l
        ON l.tenant_id = a.tenant_id WHERE a.lots <> COALESCE(l.n, 0)""",
    ),
    Check(
        "I2",
        "a charge draws no more of grants that end than it is",
        """SELECT d.txn_id, COALESCE(s.charged, 0), d.total FROM
            (SELECT txn_id, CAST(SUM(nanocredits) AS BIGINT) AS total FROM draws
            WHERE kind = 'charge' GROUP BY txn_id) d
        LEFT JOIN settlements s ON s.task_id = substr(d.txn_id, 8)
        WHERE d.total > COALESCE(s.charged, 0)""",
    ),
    Check(
        "I2",
        "what ended is entered as it was drawn",
        """SELECT d.txn_id, 0 - d.nanocredits, COALESCE(e.nanocredits, 0)
        FROM draws d LEFT JOIN entries e ON e.txn_id = d.txn_id
            AND e.account = CAST($1 AS TEXT) || d.tenant_id
        WHERE d.kind = 'expiry' AND COALESCE(e.nanocredits, 0) <> 0 - d.nanocredits""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "I2",
        "every entry of an end has its draw",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        LEFT JOIN draws d ON d.txn_id = e.txn_id
        WHERE e.kind = 'expiry' AND d.txn_id IS NULL""",
    ),
    Check(
        "I6",
        "a webhook follows its settlement",
        """SELECT d.id, 0, 0 FROM deliveries d
        LEFT JOIN settlements s ON s.task_id = d.task_id
        WHERE d.task_id <> '' AND s.task_id IS NULL""",
    ),
    # By the price that was kept beside it: whole numbers, the multiplier in millionths.
    Check(
        "I7",
        "a charge is what its usage costs",
        """SELECT task_id, x.cost / 1000000 * multiplier
                + (x.cost % 1000000 * multiplier + 500000) / 1000000, due
        FROM (SELECT task_id, due, multiplier, text_input * text_input_price
                + text_cached * text_cached_price + image_input * image_input_price
                + image_cached * image_cached_price
                + image_output * image_output_price AS cost
            FROM settlements WHERE multiplier IS NOT NULL) x
        WHERE due <> x.cost / 1000000 * multiplier
            + (x.cost % 1000000 * multiplier + 500000) / 1000000""",
    ),
    Check(
        "I8",
        "a task is charged once",
        """SELECT reference, CAST(MAX(nanocredits) AS BIGINT),
            CAST(SUM(nanocredits) AS BIGINT)
        FROM entries WHERE kind = 'charge' AND account NOT IN ($1, $2)
        GROUP BY reference HAVING COUNT(*) > 1""",
        (REVENUE, ABSORBED),
    ),
    Check(
        "I9",
        "refunds are at most the charge",
        """SELECT r.task_id, COALESCE(s.charged, 0), r.total FROM
            (SELECT task_id, tenant_id, CAST(SUM(nanocredits) AS BIGINT) AS total
            FROM refunds GROUP BY task_id, tenant_id) r
        LEFT JOIN settlements s
            ON s.task_id = r.task_id AND s.tenant_id = r.tenant_id
        WHERE r.total > COALESCE(s.charged, 0)""",
    ),
    Check(
        "I9",
        "a refund is entered as it was made",
        """SELECT r.tenant_id || ':' || r.reference, r.nanocredits,
            COALESCE(e.nanocredits, 0) FROM refunds r
        LEFT JOIN entries e
            ON e.txn_id = 'refund:' || r.tenant_id || ':' || r.reference
            AND e.account = CAST($1 AS TEXT) || r.tenant_id
        WHERE COALESCE(e.nanocredits, 0) <> r.nanocredits""",
        (_TENANT_PREFIX,),
    ),
    Check(
        "I9",
        "every refund entry has its refund",
        """SELECT e.txn_id, 0, e.nanocredits FROM entries e
        JOIN (SELECT txn_id FROM entries WHERE kind = 'refund'
            EXCEPT SELECT 'refund:' || tenant_id || ':' || reference FROM refunds) x
        ON x.txn_id = e.txn_id""",
    ),
    # SQLite would keep a fraction in a column of whole numbers.
    Check(
        "I10",
        "money is whole numbers",
        """SELECT x.subject, 0, CAST(x.amount AS BIGINT) FROM (
            SELECT 'accounts ' || tenant_id AS subject, posted AS amount FROM accounts
            UNION ALL SELECT 'accounts ' || tenant_id, held FROM accounts
            UNION ALL SELECT 'accounts ' || tenant_id, spent FROM accounts
            UNION ALL SELECT 'entries ' || txn_id, nanocredits FROM entries
            UNION ALL SELECT 'grants ' || reference, nanocredits FROM grants
            UNION ALL SELECT 'lots ' || reference, nanocredits FROM lots
            UNION ALL SELECT 'draws ' || txn_id, nanocredits FROM draws
            UNION ALL SELECT 'refunds ' || reference, nanocredits FROM refunds
            UNION ALL SELECT 'holds ' || task_id, nanocredits FROM holds
            UNION ALL SELECT 'settlements ' || task_id, due FROM settlements
            UNION ALL SELECT 'settlements ' || task_id, charged FROM settlements
            UNION ALL SELECT 'settlements ' || task_id, absorbed FROM settlements
            UNION ALL SELECT 'cost_book ' || task_id, nanousd FROM cost_book
        ) x WHERE x.amount <> CAST(x.amount AS BIGINT)""",
    ),
)


async def _audit(tx: Transaction) -> AuditReport:
    drifts = [
        _drift(check, row)
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


def _drift(check: Check, row: Row) -> Drift:
    subject, expected, found = row
    return Drift(
        rule=check.rule,
        invariant=check.invariant,
        subject=subject,
        detail=f"expected {decimal_text(expected)}, found {decimal_text(found)}",
        drift_nanocredits=found - expected,
    )
