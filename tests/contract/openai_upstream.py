"""The openai adapter before a simulated OpenAI."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from providers.kit.contract import Capabilities, Operation
from tests.contract.upstreams import (
    USUALLY_BILLED,
    Case,
    K,
    Upstream,
    alone,
    connected,
)
from tests.simulators.openai_server import KEY, OpenAISimulator
from tests.simulators.server import Fault, served


@asynccontextmanager
async def openai_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, OpenAISimulator], None]:
    async with (
        served(OpenAISimulator()) as simulator,
        connected(
            "openai",
            simulator,
            folder,
            OPENAI_FAULTS,
            options=options,
        ) as upstream,
    ):
        yield upstream, simulator


def openai_error(status: int, code: str | None, message: str = "no") -> Fault:
    error = {"message": message, "type": "x", "param": None, "code": code}
    return Fault(status=status, body={"error": error})


OPENAI_FAULTS = {
    K.INVALID_REQUEST: [openai_error(400, "invalid_value", f"wrong, {KEY}")],
    K.CONTENT_POLICY: [openai_error(400, "moderation_blocked", f"refused, {KEY}")],
    K.UNSUPPORTED: [openai_error(404, "model_not_found")],
    K.AUTH: [openai_error(401, "invalid_api_key", f"Incorrect API key: {KEY}")],
    K.INSUFFICIENT_FUNDS: [openai_error(429, "insufficient_quota")],
    K.RATE_LIMITED: [openai_error(429, "rate_limit_exceeded")],
    K.OVERLOADED: [openai_error(503, "server_is_overloaded")],
    K.BAD_GATEWAY: [Fault(status=502, body=f"<html>{KEY}</html>")],
    K.TIMEOUT: [Fault(close="before_reply")],
    K.NO_OUTPUT: [Fault(answer="empty")],
    K.RESULT_LOST: [Fault(answer="dead_url")],
}


OPENAI = Case(
    "openai",
    alone(openai_upstream),
    USUALLY_BILLED,
    Capabilities(
        operations=frozenset(Operation), mask=True, references_max=16, stream=True
    ),
    secret=KEY,
    wrong_options=[
        ({"nope": 1}, "nope"),
        ({"auth_header": "basic"}, "auth_header"),
        ({"response_format": "png"}, "response_format"),
        ({"usage": True}, "usage"),
        ({"n_max": 0}, "n_max"),
        ({"references_max": 17}, "references_max"),
        ({"edits": "no"}, "edits"),
        ({"stream": 1}, "stream"),
        ({"n_max": "4"}, "n_max"),
        ({"strip_fields": "quality"}, "strip_fields"),
        ({"sizes": ["big"]}, "sizes"),
        ({"qualities": ["best"]}, "qualities"),
        ({"output_formats": ["gif"]}, "output_formats"),
        ({"backgrounds": ["auto"]}, "backgrounds"),
        ({"download_hosts": ["https://x.test/"]}, "download_hosts"),
        ({"organization": "a\r\nb: c"}, "organization"),
        ({"path_prefix": "a b"}, "path_prefix"),
    ],
)
