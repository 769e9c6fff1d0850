"""The openrouter adapter before a simulated OpenRouter."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from providers.kit.contract import Capabilities, Operation
from tests.contract.upstreams import (
    USUALLY_BILLED,
    Case,
    K,
    Upstream,
    alone,
    connected,
)
from tests.simulators.openrouter_server import (
    KEY,
    OpenRouterSimulator,
)
from tests.simulators.server import Fault, served

MODEL = "openai/gpt-image-2"


@asynccontextmanager
async def openrouter_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, OpenRouterSimulator], None]:
    async with (
        served(OpenRouterSimulator()) as simulator,
        connected(
            "openrouter",
            simulator,
            folder,
            OPENROUTER_FAULTS,
            options=options,
            usual={"model": MODEL},
        ) as upstream,
    ):
        yield upstream, simulator


def openrouter_error(status: int, message: str = "no", **metadata: Any) -> Fault:
    error = {"code": status, "message": message, "metadata": metadata}
    return Fault(status=status, body={"error": error, "user_id": "user_1"})


OPENROUTER_FAULTS = {
    K.INVALID_REQUEST: [
        openrouter_error(400, f"wrong, {KEY}", error_type="invalid_request")
    ],
    K.CONTENT_POLICY: [openrouter_error(403, f"flagged, {KEY}", reasons=["violence"])],
    K.UNSUPPORTED: [openrouter_error(404, "No endpoints found for that.")],
    K.AUTH: [openrouter_error(401, f"No such key: {KEY}")],
    K.INSUFFICIENT_FUNDS: [openrouter_error(402, limit_source="openrouter_credits")],
    K.RATE_LIMITED: [openrouter_error(429, error_type="rate_limit_exceeded")],
    K.OVERLOADED: [openrouter_error(529)],
    K.BAD_GATEWAY: [Fault(status=502, body=f"<html>{KEY}</html>")],
    K.TIMEOUT: [Fault(close="before_reply")],
    K.NO_OUTPUT: [Fault(answer="empty")],
}


OPENROUTER = Case(
    "openrouter",
    alone(openrouter_upstream),
    {kind: USUALLY_BILLED[kind] for kind in OPENROUTER_FAULTS},
    Capabilities(
        operations=frozenset(Operation),
        references_max=16,
        backgrounds=frozenset({"opaque"}),
        stream=True,
    ),
    secret=KEY,
    wrong_options=[
        ({"nope": 1}, "nope"),
        ({"n_max": 11}, "n_max"),
        ({"references_max": 17}, "references_max"),
        ({"stream": 1}, "stream"),
        ({"sizes": ["big"]}, "sizes"),
        ({"dimensions": "pixels"}, "dimensions"),
        ({"dimensions": "aspect_ratio"}, "sizes: must be named"),
        ({"dimensions": "aspect_ratio", "sizes": ["1000x999"]}, "sizes: 1000x999"),
        ({"strip_fields": ["prompt"]}, "strip_fields"),
        ({"output_formats": ["svg"]}, "output_formats"),
        ({"provider": {"zdr": True}}, "zdr"),
        ({"provider": {"only": ["a b"]}}, "only"),
        ({"usage": True}, "usage"),
    ],
    model=MODEL,
)
