"""The only place that turns an error into a body and its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from gateway.core.errors import GatewayError

INTERNAL_MESSAGE = (
    "Something went wrong in the gateway itself. Send the request id to the operator."
)
FILE_API = "/api/v1/files/"


@dataclass(frozen=True, slots=True)
class Rendered:
    """An answer ready to be sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def render_error(error: GatewayError, request_id: str, path: str) -> Rendered:
    """Render an error: the four OpenAI keys always, and what helps beside them.

    Clients of the file API (by the path) look for its own keys at the top level.
    """
    body = {
        "message": str(error),
        "type": error.type,
        "param": error.param,
        "code": error.code,
        "request_id": request_id,
        **error.extra,
    }
    headers = {"content-type": "application/json"}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.client_may_retry is not None:
        headers["x-should-retry"] = "true" if error.client_may_retry else "false"
    whole: dict[str, object] = {"error": body}
    if path.startswith(FILE_API):
        whole |= {"success": False, "code": error.status, "msg": str(error)}
    return Rendered(error.status, headers, msgspec.json.encode(whole))


def internal_error() -> GatewayError:
    """Stand in for an error that nobody foresaw; it says nothing of the cause."""
    return GatewayError(INTERNAL_MESSAGE, client_may_retry=False)
