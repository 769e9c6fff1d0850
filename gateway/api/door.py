"""Lets a request in: whose key it carries, from where, for what, and how often."""

from __future__ import annotations

from litestar.types import Scope

from gateway.api.http import header, note_of
from gateway.core.key_limits import KeyScope
from gateway.core.limits import Rate
from gateway.flows.keys import Authenticate, check_rate
from gateway.ports import Key


async def key_of(
    authenticate: Authenticate, scope: Scope, needs: KeyScope | None = None
) -> Key:
    """Find the key of a request, and note whose it is.

    Raises:
        GatewayError: as ``Authenticate``.
    """
    note = note_of(scope)
    authorization = header(scope, "authorization")
    key = await authenticate(authorization, needs, note.address)
    note.tenant_id, note.key_id = key.tenant_id, key.id
    return key


async def count_request(authenticate: Authenticate, scope: Scope, key: Key) -> None:
    """Count a request that makes pictures, and say how many more there may be.

    Raises:
        RateLimitedError: there were too many within the minute.
    """
    rate = await authenticate.rate_of(key)
    if rate is not None:
        note_of(scope).headers |= rate_headers(rate)
        check_rate(rate)


def rate_headers(rate: Rate) -> dict[str, str]:
    """Write a rate as OpenAI does; ``reset`` is when a place comes free."""
    return {
        "x-ratelimit-limit-requests": str(rate.limit),
        "x-ratelimit-remaining-requests": str(rate.left),
        "x-ratelimit-reset-requests": f"{rate.frees_in_s}s",
    }
