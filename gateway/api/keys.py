"""``/admin/v1/keys``: for operators, and for tenants over keys with the scope admin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from litestar import Response, delete, get, patch, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.admin import AdminGate
from gateway.api.door import key_of
from gateway.api.http import AnyRequest, note_of, read_texts_json, whole_number
from gateway.core.errors import ForbiddenError, InvalidRequestError, NotFoundError
from gateway.core.key_limits import KeyScope
from gateway.core.keys import PREFIX
from gateway.flows.credits import ManageTenants
from gateway.flows.keys import (
    ROTATION_OVERLAP_MAX_S,
    ROTATION_OVERLAP_S,
    Authenticate,
    ManageKeys,
    NewKey,
    bearer,
    use_facts,
)
from gateway.flows.webhooks import ManageWebhooks
from gateway.ports import Key, Tenant

PAGE_SIZE = 20
PAGE_SIZE_MAX = 100
PAGE_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class KeyAdmin:
    """What the routes share.

    A key with the scope ``admin`` is its tenant's own operator: it sees that tenant's
    keys and no others, here and nowhere else under ``/admin``.
    """

    gate: AdminGate
    authenticate: Authenticate
    keys: ManageKeys
    tenants: ManageTenants
    webhooks: ManageWebhooks
    tenants_may_choose: bool
    """Whether tenants may say where their requests go."""

    async def asker(self, request: AnyRequest) -> str | None:
        """Tell which tenant asks; None: the operator.

        Raises:
            GatewayError: neither of them, or admin routes are off.
        """
        authorization = request.headers.get("authorization")
        given = bearer(authorization) or ""
        if self.gate.admin_key is None or not given.startswith(PREFIX):
            self.gate.check(authorization)
            return None
        key = await key_of(self.authenticate, request.scope, KeyScope.ADMIN)
        return key.tenant_id

    def acting(self, request: AnyRequest, asker: str | None) -> ManageKeys:
        """Have the audit trail name who asks: the operator, or a tenant's key."""
        if asker is None:
            return self.keys
        return self.keys.acting_as(f"key {note_of(request.scope).key_id}")

    async def owner(self, given: dict[str, object], asker: str | None) -> Tenant:
        """Take out of a body for which tenant a key is to be made.

        Raises:
            InvalidRequestError: an operator does not say.
            NotFoundError: there is no such tenant, or it is not the one that asks.
        """
        name = given.pop("tenant", None)
        if asker is not None and name is None:
            return Tenant(asker, "")
        if not isinstance(name, str):
            raise InvalidRequestError(
                "tenant must be the name of a tenant.", param="tenant"
            )
        tenant = await self.tenants.named(name)
        if asker not in {None, tenant.id}:
            raise NotFoundError(
                f"There is no tenant {name!r}.", code="tenant_not_found"
            )
        return tenant

    def check(self, given: Mapping[str, object], asker: str | None) -> None:
        """See that a tenant keeps to what is its own to choose.

        Raises:
            ForbiddenError: it says where requests go, and may not.
        """
        if "routing" in given and asker is not None and not self.tenants_may_choose:
            raise ForbiddenError(
                "Where requests go is not yours to choose at this gateway: leave "
                "routing out.",
                param="routing",
                code="routing_not_allowed",
            )

    def shown(self, key: Key) -> dict[str, object]:
        """Write a key without its secret."""
        return {"object": "api_key", **self.keys.facts(key)}

    async def made(self, new: NewKey) -> dict[str, object]:
        """Write a key that was just made, with what is shown this once."""
        secret = await self.webhooks.secret(new.key.id)
        return {**self.shown(new.key), "key": new.secret, "webhook_secret": secret}


def key_routes(admin: KeyAdmin) -> list[HTTPRouteHandler]:
    """Route the keys."""
    return [*_reading_routes(admin), *_making_routes(admin), *_ending_routes(admin)]


def _reading_routes(admin: KeyAdmin) -> list[HTTPRouteHandler]:
    @get("/admin/v1/keys")
    async def list_keys(request: AnyRequest) -> Response[bytes]:
        """List keys, newest first; of one tenant if it is named."""
        asker = await admin.asker(request)
        query = request.query_params
        page = whole_number(query.get("page"), "page", default=1, at_most=PAGE_MAX)
        size = whole_number(
            query.get("page_size"),
            "page_size",
            default=PAGE_SIZE,
            at_most=PAGE_SIZE_MAX,
        )
        name = query.get("tenant")
        if name is not None:
            asker = (await admin.owner({"tenant": name}, asker)).id
        total, found = await admin.keys.page(asker, page=page, page_size=size)
        return _json(
            {
                "object": "list",
                "data": [admin.shown(key) for key in found],
                "total": total,
                "page": page,
                "page_size": size,
                "has_more": page * size < total,
            }
        )

    @get("/admin/v1/keys/{key_id:str}")
    async def get_key(request: AnyRequest, key_id: FromPath[str]) -> Response[bytes]:
        """Return a key, and what it has used."""
        asker = await admin.asker(request)
        view = await admin.keys.show(key_id, asker)
        return _json({**admin.shown(view.key), "used": use_facts(view)})

    return [list_keys, get_key]


def _making_routes(admin: KeyAdmin) -> list[HTTPRouteHandler]:
    @post("/admin/v1/keys", status_code=201)
    async def create_key(request: AnyRequest) -> Response[bytes]:
        """Make a key; it is shown this once."""
        asker = await admin.asker(request)
        given = await _object(request)
        tenant = await admin.owner(given, asker)
        admin.check(given, asker)
        keys = admin.acting(request, asker)
        return _json(await admin.made(await keys.create(tenant, given)), 201)

    @patch("/admin/v1/keys/{key_id:str}")
    async def change_key(request: AnyRequest, key_id: FromPath[str]) -> Response[bytes]:
        """Change what is given of a key; null takes a limit away."""
        asker = await admin.asker(request)
        given = await _object(request)
        admin.check(given, asker)
        keys = admin.acting(request, asker)
        return _json(admin.shown(await keys.change(key_id, given, asker)))

    @post("/admin/v1/keys/{key_id:str}/rotate", status_code=201)
    async def rotate_key(request: AnyRequest, key_id: FromPath[str]) -> Response[bytes]:
        """Make a key that takes the place of another; that one expires by itself."""
        asker = await admin.asker(request)
        overlap_s = _overlap_s(await _object(request))
        keys = admin.acting(request, asker)
        new, old = await keys.rotate(key_id, asker, overlap_s=overlap_s)
        body = {**await admin.made(new), "previous": admin.shown(old)}
        return _json(body, 201)

    return [create_key, change_key, rotate_key]


def _ending_routes(admin: KeyAdmin) -> list[HTTPRouteHandler]:
    async def revoked(request: AnyRequest, key_id: str) -> Response[bytes]:
        asker = await admin.asker(request)
        await admin.acting(request, asker).revoke(key_id, asker)
        view = await admin.keys.show(key_id, asker)
        return _json(admin.shown(view.key))

    @post("/admin/v1/keys/{key_id:str}/revoke", status_code=200)
    async def revoke_key(request: AnyRequest, key_id: FromPath[str]) -> Response[bytes]:
        """Take a key back."""
        return await revoked(request, key_id)

    @delete("/admin/v1/keys/{key_id:str}", status_code=200)
    async def delete_key(request: AnyRequest, key_id: FromPath[str]) -> Response[bytes]:
        """Take a key back; what is known of it stays."""
        return await revoked(request, key_id)

    return [revoke_key, delete_key]


async def _object(request: AnyRequest) -> dict[str, object]:
    if request.headers.get("content-length") == "0":
        return {}
    body = await read_texts_json(request.receive)
    if not isinstance(body, dict):
        raise InvalidRequestError(
            "The body must be a JSON object.", code="invalid_body"
        )
    return body


def _overlap_s(given: dict[str, object]) -> int:
    overlap_s = given.pop("overlap_s", ROTATION_OVERLAP_S)
    if given or not isinstance(overlap_s, int) or isinstance(overlap_s, bool):
        raise InvalidRequestError(
            "The body may have overlap_s, a whole number of seconds from 0 to "
            f"{ROTATION_OVERLAP_MAX_S:,}, and nothing else.",
            param="overlap_s",
        )
    return overlap_s


def _json(body: Mapping[str, object], status: int = 200) -> Response[bytes]:
    return Response(
        msgspec.json.encode(body), media_type="application/json", status_code=status
    )
