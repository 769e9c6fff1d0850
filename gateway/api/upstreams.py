"""``/admin/v1/upstreams``, ``/admin/v1/routes/explain``: what runs where, and why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import msgspec
from litestar import Response, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.admin import AdminGate
from gateway.api.http import AnyRequest, header_texts, read_json
from gateway.api.render import number
from gateway.core.breaker import WINDOW_MS
from gateway.core.catalogue import Catalogue
from gateway.core.errors import NotFoundError
from gateway.core.preferences import Said, check_said, parse_headers, routing_facts
from gateway.core.pricing import hold_nanocredits
from gateway.core.requests import ImageRequest, parse_edit, parse_generation
from gateway.core.routing import NO_PREFERENCES, Candidate
from gateway.flows.dispatch import candidate_facts
from gateway.flows.upstreams import Explained, Upstreams, UpstreamView
from gateway.ports import Accounts, LastFailure, RouteView


def upstream_routes(gate: AdminGate, upstreams: Upstreams) -> list[HTTPRouteHandler]:
    """Route the upstreams."""
    changes: dict[str, Callable[[str], Awaitable[UpstreamView]]] = {
        "drain": upstreams.drain,
        "enable": upstreams.enable,
        "reset": upstreams.reset,
    }

    @get("/admin/v1/upstreams")
    async def list_upstreams(request: AnyRequest) -> Response[bytes]:
        """List every upstream with its offers, as they are at this moment."""
        gate.check(request.headers.get("authorization"))
        data = [_upstream(view) for view in await upstreams.views()]
        return _json({"object": "list", "data": data})

    @get("/admin/v1/upstreams/{name:str}")
    async def get_upstream(request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
        """Return one upstream."""
        gate.check(request.headers.get("authorization"))
        return _json(_upstream(await upstreams.view(name)))

    @post("/admin/v1/upstreams/{name:str}/{change:str}", status_code=200)
    async def change_upstream(
        request: AnyRequest, name: FromPath[str], change: FromPath[str]
    ) -> Response[bytes]:
        """Drain, enable or reset an upstream; returns what it is like after that."""
        gate.check(request.headers.get("authorization"))
        if change not in changes:
            raise NotFoundError(
                f"An upstream can be changed by: {', '.join(changes)}.",
                code="route_not_found",
            )
        return _json(_upstream(await changes[change](name)))

    @get("/health/upstreams")
    async def health(request: AnyRequest) -> Response[bytes]:
        """Tell whether each upstream can be called; 503 where none can."""
        gate.check(request.headers.get("authorization"))
        views = await upstreams.views()
        usable = [view.up and view.drained_since_ms is None for view in views]
        body: dict[str, object] = {
            "status": "ok" if all(usable) else "degraded" if any(usable) else "down",
            "upstreams": {view.name: _health(view) for view in views},
        }
        return Response(
            msgspec.json.encode(body),
            status_code=200 if any(usable) else 503,
            media_type="application/json",
        )

    return [list_upstreams, get_upstream, change_upstream, health]


def _health(view: UpstreamView) -> dict[str, object]:
    account, routes = view.account, view.account.routes
    reasons = [account.reason, *(route.health.reason for route in routes)]
    return {
        "up": view.up,
        "drained": view.drained_since_ms is not None,
        "account": account.state.value,
        "circuits_open": sum(not route.health.callable for route in routes),
        "circuits": len(routes),
        "reason": None if view.up else next(filter(None, reasons), None),
    }


@dataclass(frozen=True, slots=True)
class Explain:
    """Reads a request as the image routes do, for the operator's eyes.

    ``check`` raises what refuses a request before it is routed.
    """

    catalogue: Catalogue
    accounts: Accounts
    upstreams: Upstreams
    check: Callable[[ImageRequest], None]

    async def __call__(
        self, body: object, headers: list[tuple[str, str]], key_id: str | None
    ) -> Explained:
        """Explain where a body would go, with the preferences of a key if one is named.

        Raises:
            GatewayError: the body breaks a rule, or there is no such key.
        """
        is_edit = isinstance(body, dict) and "images" in body
        request = (
            parse_edit(body, self.catalogue)
            if is_edit
            else parse_generation(body, self.catalogue, prompt_optional=True)
        )
        key = NO_PREFERENCES
        if key_id is not None:
            found = await self.accounts.key(key_id)
            if found is None:
                raise NotFoundError("There is no such key.", code="key_not_found")
            key = found.routing
        said = Said(parse_headers(headers), request.routing, key)
        name = request.variant.name
        check_said(said, name, self.catalogue, tenants_may_choose=True)
        request = replace(request, routing=said.together)
        return await self.upstreams.explain(request, self.check)


def explain_routes(gate: AdminGate, explain: Explain) -> list[HTTPRouteHandler]:
    """Route the explanation of routes."""

    @post("/admin/v1/routes/explain", status_code=200)
    async def explain_route(request: AnyRequest) -> Response[bytes]:
        """Tell where a request body would go now; ``?key_id=`` adds a key's wishes."""
        gate.check(request.headers.get("authorization"))
        body = await read_json(request.receive)
        key_id = request.query_params.get("key_id")
        return _json(
            _explained(await explain(body, header_texts(request.scope), key_id))
        )

    return [explain_route]


def _explained(explained: Explained) -> dict[str, object]:
    request, refusal = explained.request, explained.refusal
    return {
        "object": "route.explanation",
        "model": request.variant.name,
        "operation": request.operation.value,
        "size": request.size.text if request.size else "auto",
        "quality": request.quality,
        "n": request.n,
        "credits_reserved": number(hold_nanocredits(request)),
        "routing": routing_facts(request.routing),
        "refusal": None
        if refusal is None
        else {"status": refusal.status, "code": refusal.code, "message": str(refusal)},
        "route": [_candidate(c, explained) for c in explained.decision.all],
    }


def _candidate(candidate: Candidate, explained: Explained) -> dict[str, object]:
    offer_id = candidate.offer.id
    estimate, cost = explained.estimates_nanousd[offer_id], candidate.cost_nanousd
    ratio = None
    if estimate and cost is not None:
        ratio = number(cost * 1_000 // estimate * 1_000_000)
    return candidate_facts(candidate, explained.decision) | {
        "upstream": candidate.offer.upstream,
        "estimate_usd": None if estimate is None else number(estimate),
        "learned_ratio": ratio,
        "health": _route(explained.routes[offer_id]),
    }


def _upstream(view: UpstreamView) -> dict[str, object]:
    account = view.account
    ages = [r.oldest_ms for r in account.routes if r.oldest_ms is not None]
    pauses = [r.pause_ends_in_ms for r in account.routes if r.pause_ends_in_ms]
    failures = [r.last_failure for r in account.routes if r.last_failure is not None]
    return {
        "upstream": view.name,
        "failure_domain": ", ".join(view.failure_domains),
        "drained": view.drained_since_ms is not None,
        "drained_since_ms": view.drained_since_ms,
        "credential": {
            "state": account.state.value,
            "reason": account.reason or None,
            "next_probe_in_ms": account.probe_in_ms,
        },
        "slots": {
            "used": account.in_flight,
            "limit": account.slots,
            "max": account.slots_max,
        },
        "in_flight": account.in_flight,
        "oldest_ms": max(ages, default=None),
        "pause_ends_in_ms": max(pauses, default=None),
        "last_failure": _failure(max(failures, key=lambda f: f.at_ms, default=None)),
        "offers": [
            {"offer": r.offer_id, "operation": r.operation.value, **_route(r)}
            for r in account.routes
        ],
    }


def _route(view: RouteView) -> dict[str, object]:
    health, seen = view.health, view.window
    return {
        "state": health.state.value,
        "reason": health.reason or None,
        "window": {
            "seconds": WINDOW_MS // 1000,
            "good": seen.good,
            "bad": seen.bad,
            "slow": seen.slow,
            "bad_in_a_row": view.bad_streak + seen.slow_streak,
        },
        "slots_free": health.slots_free,
        "in_flight": view.in_flight,
        "oldest_ms": view.oldest_ms,
        "next_probe_in_ms": view.probe_in_ms,
        "pause_ends_in_ms": view.pause_ends_in_ms,
        "usual_ms": None if health.usual_ms is None else round(health.usual_ms),
        "last_failure": _failure(view.last_failure),
    }


def _failure(last: LastFailure | None) -> dict[str, object] | None:
    return None if last is None else {"kind": last.kind.value, "at_ms": last.at_ms}


def _json(body: dict[str, object]) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
