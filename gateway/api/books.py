"""``/admin/v1/margin`` and ``/admin/v1/audit``: the operator's own books."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.admin import AdminGate
from gateway.api.credits import csv_answer, wants_csv
from gateway.api.http import AnyRequest
from gateway.core.statements import moment_text, parse_usage_span
from gateway.core.tables import Cell
from gateway.flows.margin import MARGIN_COLUMNS, ReadMargin
from gateway.ports import AuditReport, Clock

Audit = Callable[[], Awaitable[AuditReport]]


def book_routes(
    gate: AdminGate, margin: ReadMargin, audit: Audit, clock: Clock
) -> list[HTTPRouteHandler]:
    """Route the books."""

    @get("/admin/v1/margin")
    async def get_margin(request: AnyRequest) -> Response[bytes]:
        """Sum up what was earned and spent, by upstream and model."""
        gate.check(request.headers.get("authorization"))
        query = request.query_params
        span = parse_usage_span(query.get("from"), query.get("to"), clock.now_ms())
        rows = await margin(span)
        if wants_csv(request):
            return csv_answer(MARGIN_COLUMNS, rows, None)
        return _json(
            {
                "object": "list",
                "from": moment_text(span.from_ms)[:10],
                "to": moment_text(span.to_ms - 1)[:10],
                "data": [_numbers(row) for row in rows],
            }
        )

    @get("/admin/v1/audit")
    async def run_audit(request: AnyRequest) -> Response[bytes]:
        """Recompute every invariant of the books, from the rows."""
        gate.check(request.headers.get("authorization"))
        report = await audit()
        return _json({"clean": not report.drifts, **asdict(report)})

    return [get_margin, run_audit]


def _numbers(row: dict[str, Cell]) -> dict[str, object]:
    # Exact: what is a decimal text there is a number here.
    return {
        name: msgspec.Raw(str(value).encode())
        if name.endswith(("_credits", "_usd"))
        else value
        for name, value in row.items()
    }


def _json(body: object) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
