"""``/v1/credits``: what a tenant has, in EvoLink's shape."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.door import key_of
from gateway.api.http import AnyRequest
from gateway.api.render import number
from gateway.core.key_limits import KeyScope
from gateway.flows.credits import ManageTenants
from gateway.flows.keys import Authenticate


def credit_routes(
    authenticate: Authenticate, tenants: ManageTenants
) -> list[HTTPRouteHandler]:
    """Route the credits."""

    @get("/v1/credits")
    async def get_credits(
        request: AnyRequest,
    ) -> Response[bytes]:
        """Return the balance. ``remaining`` is what new requests may use."""
        key = await key_of(authenticate, request.scope, KeyScope.BILLING)
        balance = await tenants.balance(key.tenant_id)
        user = {
            "remaining_credits": number(balance.available),
            "used_credits": number(balance.spent),
            "held_credits": number(balance.held),
        }
        body = {
            "success": True,
            "message": "",
            "data": {"token": {**user, "unlimited_credits": False}, "user": user},
        }
        return Response(msgspec.json.encode(body), media_type="application/json")

    return [get_credits]
