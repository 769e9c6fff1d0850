"""When two requests are one and the same, so that it is bought once. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields

from gateway.core.errors import GatewayError, InvalidRequestError
from gateway.core.preferences import routing_facts
from gateway.core.requests import ImageRequest

KEY_MAX_CHARS = 255
KEY_KEPT_MS = 24 * 3600 * 1000
"""How long a key stands for its request."""
RETRY_JOINS_MS = 10 * 60 * 1000
"""How long after its end a library's own retry still finds what it repeats."""
_NOT_OF_THE_REQUEST = {
    "variant",
    "ignored",
    "references",
    "mask",
    "reference_params",
    "mask_param",
    "by_url",
    "routing",
}


class IdempotencyConflictError(GatewayError):
    """The key was used with another request."""

    status = 422
    type = "invalid_request_error"
    code = "idempotency_conflict"
    client_may_retry = False


def conflict() -> IdempotencyConflictError:
    """Say that a key cannot be used again for another request."""
    return IdempotencyConflictError(
        "This Idempotency-Key was used with another request in the last 24 hours. "
        "Use a new key for a new request.",
        param="Idempotency-Key",
    )


def parse_key(header: str | None) -> str | None:
    """Read an ``Idempotency-Key`` header; quotes around it do not count.

    Raises:
        InvalidRequestError: it is empty, too long or not printable ASCII.
    """
    if header is None:
        return None
    key = header.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= KEY_MAX_CHARS or not (key.isascii() and key.isprintable()):
        raise InvalidRequestError(
            f"Idempotency-Key must be 1 to {KEY_MAX_CHARS} printable ASCII characters.",
            param="Idempotency-Key",
        )
    return key


def fingerprint(request: ImageRequest, digests: Sequence[str]) -> str:
    """Return what two requests share if and only if they ask for the same.

    Args:
        request: as it was parsed: the order and the spelling of fields do not count.
        digests: of the contents of the files that came with it, in order.
    """
    asked = {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in _NOT_OF_THE_REQUEST
    }
    # Only where there are some: what was asked before there were any stays the same.
    routing = routing_facts(request.routing)
    asked |= {"routing": routing} if routing else {}
    pictures = [request.references, request.mask, list(digests)]
    text = json.dumps([request.variant.name, asked, pictures], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
