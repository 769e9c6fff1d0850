"""``/v1/webhooks/...``: what became of webhooks, and the secret that signs them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.admin import AdminGate
from gateway.api.door import key_of
from gateway.api.http import AnyRequest, whole_number
from gateway.core.key_limits import KeyScope
from gateway.core.webhooks import ROTATION_OVERLAP_MS, Delivery
from gateway.flows.keys import Authenticate
from gateway.flows.webhooks import ManageWebhooks
from gateway.ports import Clock, Key

PAGE_SIZE = 20
PAGE_SIZE_MAX = 100
PAGE_MAX = 1_000_000


def webhook_routes(
    authenticate: Authenticate, webhooks: ManageWebhooks, clock: Clock
) -> list[HTTPRouteHandler]:
    """Route the webhooks of a tenant."""

    async def caller(request: AnyRequest) -> Key:
        return await key_of(authenticate, request.scope, KeyScope.TASKS)

    @get("/v1/webhooks/deliveries")
    async def list_deliveries(request: AnyRequest) -> Response[bytes]:
        """List the tenant's deliveries, newest first."""
        key = await caller(request)
        return await _page(request, webhooks, key.tenant_id)

    @post("/v1/webhooks/deliveries/{delivery_id:str}/redeliver", status_code=200)
    async def redeliver(
        request: AnyRequest, delivery_id: FromPath[str]
    ) -> Response[bytes]:
        """Send a webhook again, under the same id."""
        key = await caller(request)
        return _json(_delivery(await webhooks.redeliver(delivery_id, key.tenant_id)))

    @post("/v1/webhooks/secret/rotate", status_code=200)
    async def rotate(request: AnyRequest) -> Response[bytes]:
        """Give the key another secret; it is shown this once."""
        key = await caller(request)
        secret = await webhooks.rotate(key.id)
        until_ms = clock.now_ms() + ROTATION_OVERLAP_MS
        return _json(
            {
                "key_id": key.id,
                "webhook_secret": secret,
                "previous_valid_until": until_ms // 1000,
            }
        )

    return [list_deliveries, redeliver, rotate]


def webhook_admin_routes(
    gate: AdminGate, webhooks: ManageWebhooks
) -> list[HTTPRouteHandler]:
    """Route the webhooks of all tenants, for operators."""

    @get("/admin/v1/deliveries")
    async def list_all(request: AnyRequest) -> Response[bytes]:
        """List all tenants' deliveries, newest first."""
        gate.check(request.headers.get("authorization"))
        return await _page(request, webhooks, None)

    @post("/admin/v1/deliveries/{delivery_id:str}/redeliver", status_code=200)
    async def redeliver_any(
        request: AnyRequest, delivery_id: FromPath[str]
    ) -> Response[bytes]:
        """Send any tenant's webhook again."""
        gate.check(request.headers.get("authorization"))
        again = await webhooks.redeliver(delivery_id, None)
        return _json({**_delivery(again), "tenant_id": again.tenant_id})

    return [list_all, redeliver_any]


async def _page(
    request: AnyRequest, webhooks: ManageWebhooks, tenant_id: str | None
) -> Response[bytes]:
    query = request.query_params
    page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
    size = whole_number(
        query.get("page_size"), "page_size", default=PAGE_SIZE, at_most=PAGE_SIZE_MAX
    )
    total, found = await webhooks.list(
        tenant_id,
        state=request.query_params.get("state"),
        offset=(page - 1) * size,
        limit=size,
    )
    return _json(
        {
            "object": "list",
            "data": _rows(found, named=tenant_id is None),
            "total": total,
            "page": page,
            "page_size": size,
            "has_more": page * size < total,
        }
    )


def _rows(found: Sequence[Delivery], *, named: bool) -> list[dict[str, object]]:
    if not named:
        return [_delivery(each) for each in found]
    return [{**_delivery(each), "tenant_id": each.tenant_id} for each in found]


def _delivery(delivery: Delivery) -> dict[str, object]:
    waits = delivery.state == "pending"
    return {
        "id": delivery.id,
        "object": "webhook.delivery",
        "task_id": delivery.task_id or None,
        "key_id": delivery.key_id,
        "event": delivery.event,
        "url": delivery.url,
        "state": delivery.state,
        "tries": delivery.tries,
        "last_status": delivery.status,
        "last_error": delivery.error,
        "created_at": _moment(delivery.created_ms),
        "next_try_at": _moment(delivery.next_ms if waits else None),
        "delivered_at": _moment(delivery.delivered_ms),
    }


def _moment(at_ms: int | None) -> str | None:
    if at_ms is None:
        return None
    moment = datetime.fromtimestamp(at_ms / 1000, UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _json(body: object) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
