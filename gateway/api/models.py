"""``/v1/models``: what can be asked for, its price and its limits."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.door import key_of
from gateway.api.http import AnyRequest
from gateway.api.render import number
from gateway.core.catalogue import (
    MILLIONTHS,
    Catalogue,
    TenantPrice,
    TokenRule,
    Variant,
)
from gateway.core.errors import NotFoundError
from gateway.core.key_limits import check_model
from gateway.core.requests import PROMPT_MAX_CHARS
from gateway.core.sizes import AREA_MAX_PX, AREA_MIN_PX, EDGE_MAX_PX
from gateway.core.terms import priced
from gateway.flows.keys import Authenticate

OWNER = "imageway"


def model_routes(
    authenticate: Authenticate, catalogue: Catalogue
) -> list[HTTPRouteHandler]:
    """Route the models."""

    @get("/v1/models")
    async def list_models(
        request: AnyRequest,
    ) -> Response[bytes]:
        """List the variants that the key may ask for, retired ones too."""
        key = await key_of(authenticate, request.scope)
        data = [
            _model(priced(variant, key.terms), catalogue)
            for variant in catalogue.variants.values()
            if key.limits.models is None or variant.name in key.limits.models
        ]
        return _json({"object": "list", "data": data})

    @get("/v1/models/{model:str}")
    async def get_model(request: AnyRequest, model: FromPath[str]) -> Response[bytes]:
        """Return one variant by its name or an alias."""
        key = await key_of(authenticate, request.scope)
        variant = catalogue.variant(model)
        if variant is None:
            raise NotFoundError(
                f"The model {model!r} does not exist here. See GET /v1/models.",
                param="model",
                code="model_not_found",
            )
        check_model(key.limits, variant.name)
        return _json(_model(priced(variant, key.terms), catalogue))

    return [list_models, get_model]


def _model(variant: Variant, catalogue: Catalogue) -> dict[str, object]:
    sold = bool(catalogue.offers.get(variant.name))
    status = "available" if sold else "unavailable"
    if variant.retired:
        status = "retired"
    elif variant.shutdown_on is not None and sold:
        status = "deprecated"
    model: dict[str, object] = {
        "id": variant.name,
        "object": "model",
        "created": variant.created_s,
        "owned_by": OWNER,
        "status": status,
        "aliases": sorted(variant.aliases),
        "successor": variant.successor,
        "pricing": _price(variant.tenant_price),
        "limits": _limits(variant),
    }
    if variant.shutdown_on is not None:
        day = datetime.fromisoformat(variant.shutdown_on).replace(tzinfo=UTC)
        model["shutdown_date"] = int(day.timestamp())
    return model


def _price(of_tenant: TenantPrice) -> dict[str, object]:
    price = of_tenant.card
    shown: dict[str, object] = {
        "unit": "credits per 1K tokens",
        "text_input": number(price.text_input * 1000),
        "text_cached_input": number(price.text_cached * 1000),
        "image_input": number(price.image_input * 1000),
        "image_cached_input": number(price.image_cached * 1000),
        "image_output": number(price.image_output * 1000),
    }
    if of_tenant.multiplier_millionths != MILLIONTHS:
        shown["multiplier"] = number(of_tenant.multiplier_millionths * 1000)
    return shown


def _limits(variant: Variant) -> dict[str, object]:
    limits: dict[str, object] = {
        "prompt_characters": PROMPT_MAX_CHARS,
        "n": variant.n_max,
        "reference_images": variant.references_max,
        "qualities": list(variant.tile_bases),
        "default_quality": variant.default_quality,
    }
    if variant.token_rule is TokenRule.TILES:
        limits |= {
            "edge_px": EDGE_MAX_PX,
            "area_min_px": AREA_MIN_PX,
            "area_max_px": AREA_MAX_PX,
        }
    return limits


def _json(body: dict[str, object]) -> Response[bytes]:
    return Response(msgspec.json.encode(body), media_type="application/json")
