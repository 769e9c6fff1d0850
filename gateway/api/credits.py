"""``/v1/credits`` and ``/v1/usage``: what a tenant has, and what became of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.door import key_of
from gateway.api.http import AnyRequest, whole_number
from gateway.api.render import number
from gateway.core.errors import InvalidRequestError
from gateway.core.key_limits import KeyScope, left_nanocredits
from gateway.core.statements import (
    ENTRIES_MAX,
    ENTRIES_USUAL,
    Span,
    moment_text,
    parse_cursor,
    parse_span,
    parse_usage_by,
    parse_usage_span,
)
from gateway.core.tables import csv_text
from gateway.flows.credits import ManageTenants
from gateway.flows.keys import Authenticate
from gateway.flows.statements import (
    ENTRY_COLUMNS,
    ReadCredits,
    entry_row,
    usage_columns,
    usage_row,
)
from gateway.ports import Entry, OpenHold, UsageRow

CSV = "text/csv"
FORMATS = ("json", "csv")
HOLDS_PAGE_SIZE = 100
HOLDS_PAGE_SIZE_MAX = 1_000
PAGE_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class CreditsApi:
    """What the routes of a tenant and those of an operator show alike."""

    tenants: ManageTenants
    read: ReadCredits

    async def entries(self, request: AnyRequest, tenant_id: str) -> Response[bytes]:
        """Answer with a page of the statement, newest first."""
        query = request.query_params
        limit = whole_number(
            query.get("limit"), "limit", default=ENTRIES_USUAL, at_most=ENTRIES_MAX
        )
        span = parse_span(query.get("from"), query.get("to"))
        page = await self.read.page(
            tenant_id, span, after=parse_cursor(query.get("after")), limit=limit
        )
        if wants_csv(request):
            rows = [entry_row(entry) for entry in page.entries]
            return csv_answer(ENTRY_COLUMNS, rows, page.next)
        return _json(
            {
                "object": "list",
                "data": [_entry(entry) for entry in page.entries],
                "has_more": page.next is not None,
                "next": page.next,
            }
        )

    async def holds(self, request: AnyRequest, tenant_id: str) -> Response[bytes]:
        """Answer with what is set aside for tasks that are not over."""
        query = request.query_params
        page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
        size = whole_number(
            query.get("page_size"),
            "page_size",
            default=HOLDS_PAGE_SIZE,
            at_most=HOLDS_PAGE_SIZE_MAX,
        )
        found = await self.read.open_holds(
            tenant_id, offset=(page - 1) * size, limit=size + 1
        )
        return _json(
            {
                "object": "list",
                "data": [_hold(each) for each in found[:size]],
                "page": page,
                "page_size": size,
                "has_more": len(found) > size,
            }
        )

    async def usage(self, request: AnyRequest, tenant_id: str) -> Response[bytes]:
        """Answer with what was used, by day, key and model."""
        query = request.query_params
        now_ms = self.read.clock.now_ms()
        span = parse_usage_span(query.get("from"), query.get("to"), now_ms)
        by = parse_usage_by(query.get("group_by"))
        rows = await self.read.usage(tenant_id, span, by)
        columns = usage_columns(by)
        if wants_csv(request):
            return csv_answer(columns, [usage_row(row) for row in rows], None)
        return _json(
            {
                "object": "list",
                **_span(span),
                "group_by": list(by),
                "data": [_usage(row, columns) for row in rows],
                "total_credits": number(sum(row.charged_nanocredits for row in rows)),
            }
        )


def credit_routes(
    authenticate: Authenticate, credits_api: CreditsApi
) -> list[HTTPRouteHandler]:
    """Route the credits."""

    async def tenant_of(request: AnyRequest) -> str:
        key = await key_of(authenticate, request.scope, KeyScope.BILLING)
        return key.tenant_id

    @get("/v1/credits")
    async def get_credits(
        request: AnyRequest,
    ) -> Response[bytes]:
        """Return the balance. ``remaining`` is what new requests may use.

        ``token`` is the key: what its budgets leave of that, and what it has used.
        """
        key = await key_of(authenticate, request.scope, KeyScope.BILLING)
        balance = await credits_api.tenants.balance(key.tenant_id)
        user = {
            "remaining_credits": number(balance.available),
            "used_credits": number(balance.spent),
            "held_credits": number(balance.held),
        }
        token = {**user, "unlimited_credits": False}
        use = await credits_api.tenants.use_of(key)
        if use is not None:
            left = left_nanocredits(key.limits, use)
            assert left is not None, key.id
            token["remaining_credits"] = number(min(left, max(0, balance.available)))
            token["used_credits"] = number(use.total_nanocredits)
        body = {
            "success": True,
            "message": "",
            "data": {"token": token, "user": user},
        }
        return _json(body)

    @get("/v1/credits/entries")
    async def list_entries(request: AnyRequest) -> Response[bytes]:
        """List what came and went, newest first."""
        return await credits_api.entries(request, await tenant_of(request))

    @get("/v1/credits/holds")
    async def list_holds(request: AnyRequest) -> Response[bytes]:
        """List what is set aside."""
        return await credits_api.holds(request, await tenant_of(request))

    @get("/v1/usage")
    async def get_usage(request: AnyRequest) -> Response[bytes]:
        """Sum up what was used."""
        return await credits_api.usage(request, await tenant_of(request))

    return [get_credits, list_entries, list_holds, get_usage]


def wants_csv(request: AnyRequest) -> bool:
    """Tell whether a table is asked for as CSV: by ``format``, or by ``Accept``.

    Raises:
        InvalidRequestError: ``format`` is something else.
    """
    wanted = request.query_params.get("format")
    if wanted is None:
        accepted: str = request.headers.get("accept", "")
        first = accepted.partition(",")[0].partition(";")[0]
        return first.strip().lower() == CSV
    if wanted not in FORMATS:
        raise InvalidRequestError(
            f"format must be one of {', '.join(FORMATS)}.", param="format"
        )
    return bool(wanted == "csv")


def csv_answer(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, str | int | None]],
    following: str | None,
) -> Response[bytes]:
    """Answer with CSV; ``X-Next`` is where the next page begins, if there is one."""
    return Response(
        csv_text(columns, rows).encode(),
        media_type=CSV,
        headers={"x-next": following} if following is not None else {},
    )


def _entry(entry: Entry) -> dict[str, object]:
    row: dict[str, object] = {**entry_row(entry), "object": "credit.entry"}
    return {**row, "credits": number(entry.nanocredits)}


def _hold(each: OpenHold) -> dict[str, object]:
    return {
        "object": "credit.hold",
        "task_id": each.task_id,
        "key_id": each.key_id,
        "model": each.variant,
        "credits": number(each.nanocredits),
        "created_at": moment_text(each.created_ms),
        "expires_at": moment_text(each.expires_ms),
    }


def _usage(row: UsageRow, columns: Sequence[str]) -> dict[str, object]:
    facts = usage_row(row)
    groups: dict[str, object] = {
        name: facts[name] for name in ("day", "key_id", "model") if name in columns
    }
    return {
        **groups,
        "requests": row.requests,
        "images": row.images,
        "credits": number(row.charged_nanocredits),
        "tokens": {
            "text_input": row.tokens.text_input,
            "text_cached": row.tokens.text_cached,
            "image_input": row.tokens.image_input,
            "image_cached": row.tokens.image_cached,
            "image_output": row.tokens.image_output,
        },
    }


def _span(span: Span) -> dict[str, object]:
    return {
        "from": moment_text(span.from_ms)[:10],
        "to": moment_text(span.to_ms - 1)[:10],
    }


def _json(body: object) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
