"""``/admin/v1/...``: for operators, behind the admin key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from litestar import Response, get, route
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.http import JSON_BODY_MAX_BYTES, AnyRequest, decode_json
from gateway.core.errors import (
    InvalidRequestError,
    NotFoundError,
    TooLargeError,
    UnauthorizedError,
)
from gateway.flows.keys import bearer
from gateway.ports import Tunable


@dataclass(frozen=True, slots=True)
class AdminGate:
    """Lets the admin key through. Without one configured, admin routes are off."""

    admin_key: str | None = field(repr=False)

    def opens(self, authorization: str | None) -> bool:
        """Tell whether a request carries the admin key."""
        given = bearer(authorization)
        if self.admin_key is None or given is None:
            return False
        return hmac.compare_digest(given.encode(), self.admin_key.encode())

    def check(self, authorization: str | None) -> None:
        """Let an admin pass.

        Raises:
            NotFoundError: no admin key is configured.
            UnauthorizedError: the request does not carry it.
        """
        if self.admin_key is None:
            raise NotFoundError(
                "Admin routes are off: set IMAGEWAY_ADMIN_KEY (server.admin_key) "
                "and start the gateway again.",
                code="admin_disabled",
            )
        if not self.opens(authorization):
            raise UnauthorizedError(
                "This route needs the admin key: 'Authorization: Bearer <admin key>'."
            )


def admin_routes(
    gate: AdminGate, sandboxes: Mapping[str, Tunable]
) -> list[HTTPRouteHandler]:
    """Route the admin's resources."""

    @route(
        "/admin/v1/sandbox/{upstream:str}",
        http_method=["GET", "POST", "PUT", "PATCH"],
        status_code=200,
    )
    async def sandbox(request: AnyRequest, upstream: FromPath[str]) -> Response[bytes]:
        """Read or change how a sandbox upstream behaves, while it runs."""
        gate.check(request.headers.get("authorization"))
        tunable = sandboxes.get(upstream)
        if tunable is None:
            raise NotFoundError(
                f"There is no sandbox upstream {upstream!r}. "
                f"There are: {', '.join(sorted(sandboxes)) or 'none'}.",
                code="upstream_not_found",
            )
        if request.method != "GET":
            _change(tunable, decode_json(await _body(request)))
        body = {"upstream": upstream, **tunable.snapshot()}
        return Response(msgspec.json.encode(body), media_type="application/json")

    @get("/admin/v1/sandbox")
    async def list_sandboxes(request: AnyRequest) -> Response[bytes]:
        """List how every sandbox upstream behaves."""
        gate.check(request.headers.get("authorization"))
        data = [{"upstream": name, **t.snapshot()} for name, t in sandboxes.items()]
        body = msgspec.json.encode({"object": "list", "data": data})
        return Response(body, media_type="application/json")

    return [sandbox, list_sandboxes]


async def _body(request: AnyRequest) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > JSON_BODY_MAX_BYTES:
            raise TooLargeError(
                f"The body may have at most {JSON_BODY_MAX_BYTES:,} bytes."
            )
    return body


def _change(tunable: Tunable, changes: object) -> None:
    if not isinstance(changes, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    try:
        tunable.change(changes)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error
