"""``/v1/credits``: what a tenant has, in EvoLink's shape."""

from __future__ import annotations

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.door import key_of
from gateway.api.http import AnyRequest
from gateway.api.render import number
from gateway.core.key_limits import KeyScope, left_nanocredits
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
        """Return the balance. ``remaining`` is what new requests may use.

        ``token`` is the key: what its budgets leave of that, and what it has used.
        """
        key = await key_of(authenticate, request.scope, KeyScope.BILLING)
        balance = await tenants.balance(key.tenant_id)
        user = {
            "remaining_credits": number(balance.available),
            "used_credits": number(balance.spent),
            "held_credits": number(balance.held),
        }
        token = {**user, "unlimited_credits": False}
        use = await tenants.use_of(key)
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
        return Response(msgspec.json.encode(body), media_type="application/json")

    return [get_credits]
