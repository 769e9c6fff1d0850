"""``POST /v1/estimate``: the price of a request before it is sent."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from litestar import asgi
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send

from gateway.api.door import key_of
from gateway.api.http import note_of, read_json, send_answer
from gateway.api.images import MethodNotAllowedError
from gateway.api.render import number, token_counts
from gateway.core.catalogue import Catalogue
from gateway.core.pricing import Estimate, Quote, estimate
from gateway.core.requests import ImageRequest, parse_generation
from gateway.core.terms import USUAL, Terms, priced
from gateway.flows.keys import Authenticate


def estimate_body(
    raw: object,
    catalogue: Catalogue,
    nanocredits_per_usd: int,
    terms: Terms = USUAL,
) -> dict[str, object]:
    """Price a request body; the prompt may be missing.

    Raises:
        GatewayError: the body breaks a rule of the request itself.
    """
    request = parse_generation(raw, catalogue, prompt_optional=True)
    request = replace(request, variant=priced(request.variant, terms))
    found = estimate(request, nanocredits_per_usd=nanocredits_per_usd)
    return _body(request, found)


def estimate_routes(
    authenticate: Authenticate, catalogue: Catalogue, nanocredits_per_usd: int
) -> list[ASGIRouteHandler]:
    """Route the estimate."""

    @asgi("/v1/estimate", copy_scope=False)
    async def price(scope: Scope, receive: Receive, send: Send) -> None:
        note = note_of(scope)
        if scope["method"] != "POST":  # type: ignore[typeddict-item]
            note.headers["allow"] = "POST"
            raise MethodNotAllowedError("Use POST on this route.")
        key = await key_of(authenticate, scope)
        raw = await read_json(receive)
        body = estimate_body(raw, catalogue, nanocredits_per_usd, key.terms)
        headers = {"content-type": "application/json"}
        await send_answer(send, 200, headers, msgspec.json.encode(body))

    return [price]


def _body(request: ImageRequest, priced: Estimate) -> dict[str, object]:
    return {
        "object": "image.estimate",
        "model": request.variant.name,
        "size": request.size.text if request.size else "auto",
        "quality": request.quality,
        "n": request.n,
        "reference_images": len(request.references),
        "low": _quote(priced.low),
        "high": _quote(priced.high),
        "credits_reserved": number(priced.high.nanocredits),
    }


def _quote(quote: Quote) -> dict[str, object]:
    return {
        "credits": number(quote.nanocredits),
        "usd": number(quote.nanousd),
        "tokens": {
            "text_input": quote.usage.text_input,
            "text_cached": quote.usage.text_cached,
            "image_input": quote.usage.image_input,
            "image_cached": quote.usage.image_cached,
            "image_output": quote.usage.image_output,
        },
        "usage": token_counts(quote.usage),
    }
