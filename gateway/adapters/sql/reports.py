"""What became of credits, in SQL: statements, open holds, usage. Only reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gateway.adapters.sql.database import Database, Row
from gateway.core.ledger import tenant_account
from gateway.core.statements import DAY_MS, Cursor, Span
from gateway.ports import CostLine, Entry, MarginRow, OpenHold, UsageRow
from providers.kit.contract import Usage

_DIMENSIONS = {
    "day": f"created_ms / {DAY_MS}",
    "key": "key_id",
    "model": "variant",
}


@dataclass(frozen=True, slots=True)
class SqlReports:
    """The ``Reports`` port over any SQL database."""

    database: Database

    async def entries(
        self, tenant_id: str, span: Span, *, after: Cursor, limit: int
    ) -> Sequence[Entry]:
        """See ``Reports``. A page costs the same wherever it is."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT e.txn_id, e.kind, e.nanocredits, e.created_ms, e.name,
                    COALESCE(s.task_id, r.task_id), COALESCE(g.note, r.note),
                    s.key_id, s.variant, s.images
                FROM (SELECT txn_id, kind, nanocredits, created_ms,
                        CASE kind WHEN 'charge' THEN reference
                            ELSE substr(reference, CAST($8 AS INTEGER)) END AS name
                    FROM entries WHERE account = $1
                        AND created_ms >= $2 AND created_ms < $3
                        AND (created_ms, txn_id) < ($4, $5)
                    ORDER BY created_ms DESC, txn_id DESC LIMIT $6) e
                LEFT JOIN settlements s ON e.kind = 'charge'
                    AND s.task_id = e.name AND s.tenant_id = $7
                LEFT JOIN grants g ON e.kind = 'grant'
                    AND g.reference = e.name AND g.tenant_id = $7
                LEFT JOIN refunds r ON e.kind = 'refund'
                    AND r.reference = e.name AND r.tenant_id = $7
                ORDER BY e.created_ms DESC, e.txn_id DESC""",
                tenant_account(tenant_id),
                span.from_ms,
                # An engine may seek by this bound alone.
                min(span.to_ms, after.created_ms + 1),
                after.created_ms,
                after.txn_id,
                limit,
                tenant_id,
                len(tenant_id) + 2,
            )
        )
        return [Entry(*row) for row in rows]

    async def open_holds(
        self, tenant_id: str, *, offset: int, limit: int
    ) -> Sequence[OpenHold]:
        """See ``Reports``. An open hold is that of a task that is not over."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT h.task_id, t.key_id, t.variant, h.nanocredits, h.created_ms,
                    h.expires_ms
                FROM tasks t JOIN holds h ON h.task_id = t.id
                WHERE t.tenant_id = $1 AND t.finished_ms IS NULL
                ORDER BY h.created_ms DESC, h.task_id DESC LIMIT $2 OFFSET $3""",
                tenant_id,
                limit,
                offset,
            )
        )
        return [OpenHold(*row) for row in rows]

    async def margin(self, span: Span) -> Sequence[MarginRow]:
        """See ``Reports``. Reads all that was settled in these days."""
        rows = await self.database.read(
            lambda tx: tx.all(_MARGIN, span.from_ms, span.to_ms)
        )
        return [MarginRow(*row) for row in rows]

    async def costs(
        self, upstream: str, span: Span, *, after: tuple[str, int], limit: int
    ) -> Sequence[CostLine]:
        """See ``Reports``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                """SELECT c.task_id, c.seq, c.variant, c.kind, c.source, c.nanousd,
                    c.created_ms, COALESCE(c.job_id, a.job_id)
                FROM cost_book c LEFT JOIN attempts a
                    ON a.task_id = c.task_id AND a.seq = c.seq
                WHERE c.upstream = $1 AND c.created_ms >= $2 AND c.created_ms < $3
                    AND (c.task_id, c.seq) > ($4, $5)
                ORDER BY c.task_id, c.seq LIMIT $6""",
                upstream,
                span.from_ms,
                span.to_ms,
                *after,
                limit,
            )
        )
        return [CostLine(*row) for row in rows]

    async def usage(
        self, tenant_id: str, span: Span, by: Sequence[str], *, limit: int
    ) -> Sequence[UsageRow]:
        """See ``Reports``."""
        rows = await self.database.read(
            lambda tx: tx.all(
                _usage_sql(tuple(by)), tenant_id, span.from_ms, span.to_ms, limit
            )
        )
        return [_usage(row) for row in rows]


_SUMS = ("tasks", "images", "charged", "absorbed", "refunded", "cost", "waste")
_MARGIN = f"""SELECT NULLIF(upstream, ''), NULLIF(variant, ''),
    {", ".join(f"CAST(SUM({name}) AS BIGINT)" for name in _SUMS)}
FROM (
    SELECT COALESCE((SELECT c.upstream FROM cost_book c
            WHERE c.task_id = s.task_id AND c.kind = 'cost'
            ORDER BY c.seq DESC LIMIT 1), '') AS upstream,
        COALESCE(s.variant, '') AS variant, 1 AS tasks, s.images AS images,
        s.charged AS charged, s.absorbed AS absorbed, 0 AS refunded, 0 AS cost,
        0 AS waste
    FROM settlements s WHERE s.created_ms >= $1 AND s.created_ms < $2
        AND s.usage_source <> 'none'
    UNION ALL
    SELECT COALESCE((SELECT c.upstream FROM cost_book c
            WHERE c.task_id = r.task_id AND c.kind = 'cost'
            ORDER BY c.seq DESC LIMIT 1), ''),
        COALESCE(s.variant, ''), 0, 0, 0, 0, r.nanocredits, 0, 0
    FROM refunds r JOIN settlements s ON s.task_id = r.task_id
    WHERE r.created_ms >= $1 AND r.created_ms < $2
    UNION ALL
    SELECT upstream, variant, 0, 0, 0, 0, 0,
        CASE kind WHEN 'cost' THEN nanousd ELSE 0 END,
        CASE kind WHEN 'waste' THEN nanousd ELSE 0 END
    FROM cost_book WHERE created_ms >= $1 AND created_ms < $2
) x GROUP BY upstream, variant ORDER BY upstream, variant"""  # noqa: S608 - constants


@lru_cache(maxsize=8)
def _usage_sql(by: tuple[str, ...]) -> str:
    chosen = ", ".join(
        f"{sql if name in by else 'NULL'} AS {name}_"
        for name, sql in _DIMENSIONS.items()
    )
    groups = ", ".join(f"{_DIMENSIONS[name]}" for name in by)
    sums = ", ".join(
        f"CAST(COALESCE(SUM({name}), 0) AS BIGINT)"
        for name in (
            "images",
            "charged",
            "text_input",
            "text_cached",
            "image_input",
            "image_cached",
            "image_output",
        )
    )
    last = f"GROUP BY {groups} ORDER BY {groups}" if by else "HAVING COUNT(*) > 0"
    return f"""SELECT {chosen}, COUNT(*), {sums} FROM settlements
    WHERE tenant_id = $1 AND created_ms >= $2 AND created_ms < $3
        AND usage_source <> 'none' {last} LIMIT $4"""  # noqa: S608 - constants


def _usage(row: Row) -> UsageRow:
    day, key_id, variant, requests, images, charged, *tokens = row
    return UsageRow(day, key_id, variant, requests, images, charged, Usage(*tokens))
