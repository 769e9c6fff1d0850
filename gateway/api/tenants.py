"""``/admin/v1/tenants...``: tenants, their credits and prices, for operators.

Who changed what is in ``/admin/v1/trail``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec
from litestar import Response, get, patch, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.admin import AdminGate
from gateway.api.credits import CreditsApi
from gateway.api.http import AnyRequest, read_texts_json, whole_number
from gateway.api.render import number
from gateway.core.errors import InvalidRequestError
from gateway.core.ledger import Balance
from gateway.core.statements import (
    Cursor,
    cursor_text,
    moment_text,
    parse_cursor,
    parse_end,
)
from gateway.core.terms import amount_nano
from gateway.flows.credits import ManageTenants, grant_facts, tenant_facts
from gateway.ports import GrantRecord, Tenant, TenantRecord, Trace

PAGE_SIZE = 100
PAGE_SIZE_MAX = 1_000
PAGE_MAX = 1_000_000
WHO = "admin key"
"""What the audit trail says of a change by these routes."""


@dataclass(frozen=True, slots=True)
class TenantsApi:
    """What the routes work with. ``models`` names all variants."""

    gate: AdminGate
    manage: ManageTenants
    shows: CreditsApi
    models: Collection[str]

    def check(self, request: AnyRequest) -> None:
        """Let an operator pass.

        Raises:
            GatewayError: it is none.
        """
        self.gate.check(request.headers.get("authorization"))

    async def owner(self, request: AnyRequest, tenant: str) -> TenantRecord:
        """Let an operator pass, and find a tenant by id or name.

        Raises:
            GatewayError: it is none, or there is no such tenant.
        """
        self.check(request)
        return await self.manage.record(tenant)


def tenant_routes(api: TenantsApi) -> list[HTTPRouteHandler]:
    """Route the tenants."""
    return [
        *_reading_routes(api),
        *_changing_routes(api),
        *_credit_routes(api),
        *_report_routes(api),
    ]


def _reading_routes(api: TenantsApi) -> list[HTTPRouteHandler]:
    @get("/admin/v1/tenants")
    async def list_tenants(request: AnyRequest) -> Response[bytes]:
        """List tenants by name."""
        api.check(request)
        page, size = _page_of(request)
        total, found = await api.manage.page(offset=(page - 1) * size, limit=size)
        return _json(
            {
                "object": "list",
                "data": [_tenant(record) for record in found],
                "total": total,
                "page": page,
                "page_size": size,
                "has_more": page * size < total,
            }
        )

    @get("/admin/v1/tenants/{tenant:str}")
    async def get_tenant(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Return a tenant, by id or name."""
        return _json(_tenant(await api.owner(request, tenant)))

    @get("/admin/v1/trail")
    async def list_trail(request: AnyRequest) -> Response[bytes]:
        """List who changed what, newest first; of one tenant if it is named."""
        api.check(request)
        query = request.query_params
        limit = whole_number(
            query.get("limit"), "limit", default=PAGE_SIZE, at_most=PAGE_SIZE_MAX
        )
        after = parse_cursor(query.get("after"))
        name = query.get("tenant")
        tenant_id = None if name is None else (await api.manage.record(name)).id
        found = await api.manage.trail(tenant_id, after=after, limit=limit + 1)
        shown = found[:limit]
        more = len(found) > limit
        last = Cursor(shown[-1].at_ms, shown[-1].id) if more else None
        return _json(
            {
                "object": "list",
                "data": [_trace(each) for each in shown],
                "has_more": more,
                "next": None if last is None else cursor_text(last),
            }
        )

    return [list_tenants, get_tenant, list_trail]


def _changing_routes(api: TenantsApi) -> list[HTTPRouteHandler]:
    @post("/admin/v1/tenants", status_code=201)
    async def create_tenant(request: AnyRequest) -> Response[bytes]:
        """Make a tenant, with a first grant if credits are given."""
        api.check(request)
        given = await _object(request)
        name = _text(given, "name")
        amount = given.pop("credits", None)
        nanocredits = 0 if amount is None else amount_nano(amount, "credits")
        _nothing_more(given)
        if name is None:
            raise InvalidRequestError("name must be a text.", param="name")
        made = await api.manage.create(name, nanocredits=nanocredits)
        return _json(_tenant(await api.manage.record(made.id)), 201)

    @patch("/admin/v1/tenants/{tenant:str}")
    async def change_tenant(
        request: AnyRequest, tenant: FromPath[str]
    ) -> Response[bytes]:
        """Change price multiplier, own prices, or the warning of a low balance."""
        owner = await api.owner(request, tenant)
        given = await _object(request)
        return _json(_tenant(await api.manage.change(owner.id, given, api.models)))

    @post("/admin/v1/tenants/{tenant:str}/suspend", status_code=200)
    async def suspend(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Take nothing new for a tenant; what runs is finished."""
        owner = await api.owner(request, tenant)
        return _json(_tenant(await api.manage.suspend(owner.id)))

    @post("/admin/v1/tenants/{tenant:str}/resume", status_code=200)
    async def resume(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Let a suspended tenant go on."""
        owner = await api.owner(request, tenant)
        return _json(_tenant(await api.manage.resume(owner.id)))

    return [create_tenant, change_tenant, suspend, resume]


def _credit_routes(api: TenantsApi) -> list[HTTPRouteHandler]:
    @get("/admin/v1/tenants/{tenant:str}/grants")
    async def list_grants(
        request: AnyRequest, tenant: FromPath[str]
    ) -> Response[bytes]:
        """List a tenant's grants, newest first."""
        owner = await api.owner(request, tenant)
        page, size = _page_of(request)
        found = await api.manage.grants(
            owner.id, offset=(page - 1) * size, limit=size + 1
        )
        return _json(
            {
                "object": "list",
                "data": [_grant(grant) for grant in found[:size]],
                "page": page,
                "page_size": size,
                "has_more": len(found) > size,
            }
        )

    @post("/admin/v1/tenants/{tenant:str}/grants", status_code=200)
    async def give(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Give credits, once for each reference or Idempotency-Key."""
        owner = await api.owner(request, tenant)
        given = await _object(request)
        nanocredits = amount_nano(given.pop("credits", None), "credits")
        end = given.pop("expires_at", None)
        reference, note = _reference(request, given), _text(given, "note")
        _nothing_more(given)
        balance = await api.manage.grant(
            Tenant(owner.id, owner.name),
            nanocredits,
            reference=reference,
            expires_ms=None if end is None else parse_end(end, "expires_at"),
            note=note,
        )
        return _json(_balance(owner, balance))

    @post("/admin/v1/tenants/{tenant:str}/refunds", status_code=200)
    async def refund(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Give back what a task was charged, or a part, once for each reference."""
        owner = await api.owner(request, tenant)
        given = await _object(request)
        task_id = _text(given, "task_id")
        amount = given.pop("credits", None)
        reference, note = _reference(request, given), _text(given, "note")
        _nothing_more(given)
        if task_id is None:
            raise InvalidRequestError("task_id must be a text.", param="task_id")
        balance = await api.manage.refund(
            Tenant(owner.id, owner.name),
            task_id,
            nanocredits=None if amount is None else amount_nano(amount, "credits"),
            reference=reference,
            note=note,
        )
        return _json(_balance(owner, balance))

    return [list_grants, give, refund]


def _report_routes(api: TenantsApi) -> list[HTTPRouteHandler]:
    @get("/admin/v1/tenants/{tenant:str}/entries")
    async def entries(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Read a tenant's statement, as the tenant does."""
        owner = await api.owner(request, tenant)
        return await api.shows.entries(request, owner.id)

    @get("/admin/v1/tenants/{tenant:str}/holds")
    async def holds(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Read a tenant's open holds, as the tenant does."""
        owner = await api.owner(request, tenant)
        return await api.shows.holds(request, owner.id)

    @get("/admin/v1/tenants/{tenant:str}/usage")
    async def usage(request: AnyRequest, tenant: FromPath[str]) -> Response[bytes]:
        """Read a tenant's usage, as the tenant does."""
        owner = await api.owner(request, tenant)
        return await api.shows.usage(request, owner.id)

    return [entries, holds, usage]


def _tenant(record: TenantRecord) -> dict[str, object]:
    return {
        "object": "tenant",
        **tenant_facts(record),
        **_amounts(record.balance),
    }


def _balance(owner: TenantRecord, balance: Balance) -> dict[str, object]:
    return {"object": "balance", "tenant_id": owner.id, **_amounts(balance)}


def _amounts(balance: Balance) -> dict[str, object]:
    return {
        "available": number(balance.available),
        "held": number(balance.held),
        "spent": number(balance.spent),
    }


def _grant(grant: GrantRecord) -> dict[str, object]:
    left = grant.left_nanocredits
    return {
        "object": "credit.grant",
        **grant_facts(grant),
        "credits": number(grant.nanocredits),
        "left": None if left is None else number(left),
    }


def _trace(each: Trace) -> dict[str, object]:
    return {
        "object": "change",
        "id": each.id,
        "at": moment_text(each.at_ms),
        "who": each.who,
        "what": each.what,
        "tenant_id": each.tenant_id,
        "subject": each.subject,
        "before": _raw(each.before_json),
        "after": _raw(each.after_json),
    }


def _raw(text: str | None) -> msgspec.Raw | None:
    return None if text is None else msgspec.Raw(text.encode())


def _page_of(request: AnyRequest) -> tuple[int, int]:
    query = request.query_params
    page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
    size = whole_number(
        query.get("page_size"), "page_size", default=PAGE_SIZE, at_most=PAGE_SIZE_MAX
    )
    return page, size


async def _object(request: AnyRequest) -> dict[str, object]:
    body = await read_texts_json(request.receive)
    if not isinstance(body, dict):
        raise InvalidRequestError(
            "The body must be a JSON object.", code="invalid_body"
        )
    return body


def _text(given: dict[str, object], name: str) -> str | None:
    text = given.pop(name, None)
    if text is not None and not isinstance(text, str):
        raise InvalidRequestError(f"{name} must be a text.", param=name)
    return text


def _reference(request: AnyRequest, given: dict[str, object]) -> str | None:
    reference = _text(given, "reference")
    key: str | None = request.headers.get("idempotency-key")
    return key if reference is None else reference


def _nothing_more(given: Mapping[str, object]) -> None:
    for name in given:
        raise InvalidRequestError(
            f"{name[:64]!r} is not a field of this request.", param=name[:64]
        )


def _json(body: Mapping[str, object], status: int = 200) -> Response[bytes]:
    return Response(
        msgspec.json.encode(body), media_type="application/json", status_code=status
    )
