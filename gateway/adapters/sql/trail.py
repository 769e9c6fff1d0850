"""The audit trail in SQL: written in the transaction of what it tells of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from gateway.adapters.sql.database import Change, Transaction
from gateway.core.statements import Cursor
from gateway.ports import Mark, Trace

Facts = Mapping[str, object] | None


def trace(
    mark: Mark,
    what: str,
    tenant_id: str | None,
    subject: str,
    changed: tuple[Facts, Facts],
) -> Change:
    """Write down who changed what; ``changed`` is how it was, and how it is."""
    before, after = changed
    return (
        """INSERT INTO trail
            (id, at_ms, who, what, tenant_id, subject, before_json, after_json)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)""",
        mark.id,
        mark.at_ms,
        mark.who,
        what,
        tenant_id,
        subject,
        None if before is None else json.dumps(before),
        None if after is None else json.dumps(after),
    )


async def read_trail(
    tx: Transaction, tenant_id: str | None, after: Cursor, limit: int
) -> Sequence[Trace]:
    """Read the trail, newest first, from behind a place on."""
    where = "" if tenant_id is None else "AND tenant_id = $4"
    rows = await tx.all(
        f"""SELECT id, at_ms, who, what, tenant_id, subject, before_json, after_json
        FROM trail WHERE (at_ms, id) < ($1, $2) {where}
        ORDER BY at_ms DESC, id DESC LIMIT $3""",  # noqa: S608 - a constant
        after.created_ms,
        after.txn_id,
        limit,
        *(() if tenant_id is None else (tenant_id,)),
    )
    return [Trace(*row) for row in rows]
