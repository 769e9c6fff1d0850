"""``/admin/v1/reload``: reads the configuration again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from litestar import Response, post
from litestar.handlers import HTTPRouteHandler

from gateway.api.admin import AdminGate
from gateway.api.http import AnyRequest
from gateway.flows.reload import Swapped

Reload = Callable[[], Awaitable[Swapped]]


def reload_routes(gate: AdminGate, reload: Reload) -> list[HTTPRouteHandler]:
    """Route the reload."""

    @post("/admin/v1/reload", status_code=200)
    async def reload_config(request: AnyRequest) -> Response[bytes]:
        """Reload here and now, and ask all other processes to."""
        gate.check(request.headers.get("authorization"))
        swapped = await reload()
        body = {
            "outcome": "reloaded" if swapped.changed else "unchanged",
            "changed": swapped.changed,
            "warnings": swapped.warnings,
        }
        return Response(msgspec.json.encode(body), media_type="application/json")

    return [reload_config]
