"""The azure adapter before a simulated resource."""

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
from tests.simulators.azure_server import KEY, AzureSimulator
from tests.simulators.server import Fault, served


@asynccontextmanager
async def azure_upstream(
    folder: Path, *, secret: str = KEY, **options: object
) -> AsyncGenerator[tuple[Upstream, AzureSimulator], None]:
    async with (
        served(AzureSimulator()) as simulator,
        connected(
            "azure",
            simulator,
            folder,
            AZURE_FAULTS,
            options=options,
            secret=secret,
        ) as upstream,
    ):
        yield upstream, simulator


def azure_error(status: int, code: str, message: str = "no", **more: object) -> Fault:
    error = {"code": code, "message": message, **more}
    return Fault(status=status, body={"error": error})


AZURE_FAULTS = {
    K.INVALID_REQUEST: [azure_error(400, "invalid_value", f"wrong, {KEY}")],
    K.CONTENT_POLICY: [
        azure_error(
            400,
            "BadRequest",
            f"refused, {KEY}",
            inner_error={"code": "ResponsibleAIPolicyViolation"},
        )
    ],
    K.UNSUPPORTED: [azure_error(404, "DeploymentNotFound")],
    K.AUTH: [azure_error(401, "401", f"Access denied: {KEY}")],
    K.INSUFFICIENT_FUNDS: [azure_error(429, "insufficient_quota")],
    K.RATE_LIMITED: [azure_error(429, "429", "Please retry after 26 seconds.")],
    K.OVERLOADED: [Fault(status=503, body=f"<html>{KEY}</html>")],
    K.BAD_GATEWAY: [azure_error(500, "InternalServerError", KEY)],
    K.TIMEOUT: [Fault(close="before_reply")],
    K.NO_OUTPUT: [Fault(answer="empty")],
    K.RESULT_LOST: [Fault(answer="dead_url")],
}


AZURE = Case(
    "azure",
    alone(azure_upstream),
    USUALLY_BILLED,
    Capabilities(
        operations=frozenset(Operation),
        output_formats=frozenset({"png", "jpeg"}),
        mask=True,
        references_max=16,
        stream=True,
    ),
    secret=KEY,
    wrong_options=[
        ({"form": "v2"}, "form"),
        ({"api_version": "x&y=1"}, "api_version"),
        ({"deployment": "x"}, "deployment"),
        ({"sizes": ["big"]}, "sizes"),
    ],
)
