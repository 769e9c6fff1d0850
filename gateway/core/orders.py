"""A request written down, to be carried out later by whoever takes it. Pure."""

from __future__ import annotations

import json
from dataclasses import fields

from gateway.core.catalogue import Catalogue
from gateway.core.preferences import parse_routing, routing_facts
from gateway.core.requests import ImageRequest
from gateway.core.sizes import Size
from gateway.core.terms import at_price, price_facts

_BESIDE = {"variant", "references", "mask", "reference_params", "ignored"}
KEPT_SCHEME = "kept:"
"""Names a picture that was brought in when the task was made, by its place."""


def order_json(request: ImageRequest, pictures: int, *, has_mask: bool) -> str:
    """Write a request down; its pictures are those kept beside it."""
    facts = {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in _BESIDE
    }
    facts["variant"] = request.variant.name
    # What it was held at, it is settled at: prices may change meanwhile.
    facts["price"] = price_facts(request.variant)
    facts["routing"] = routing_facts(request.routing)
    facts["references"] = [f"{KEPT_SCHEME}{place}" for place in range(pictures)]
    facts["mask"] = f"{KEPT_SCHEME}{pictures}" if has_mask else None
    return json.dumps(facts)


def request_from(text: str, catalogue: Catalogue) -> ImageRequest | None:
    """Read a request that was written down; None if its variant is gone."""
    facts = json.loads(text)
    variant = catalogue.variant(facts.pop("variant", ""))
    if variant is None:
        return None
    size = facts.pop("size")
    price = facts.pop("price", None)
    return ImageRequest(
        variant=variant if price is None else at_price(variant, price),
        size=Size(*size) if size else None,
        references=tuple(facts.pop("references")),
        routing=parse_routing(facts.pop("routing", None)),
        **facts,
    )


def class_of(request: ImageRequest) -> str:
    """Name what tasks that take about equally long have in common."""
    size = request.size.text if request.size else "auto"
    return f"{request.variant.name}/{request.quality}/{size}/{request.n}"
