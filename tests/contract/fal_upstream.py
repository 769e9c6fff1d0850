"""The fal adapter before a simulated queue.fal.run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from providers.kit.contract import Billed, Capabilities, Operation
from tests.contract.upstreams import (
    USUALLY_BILLED,
    Case,
    K,
    Upstream,
    alone,
    connected,
)
from tests.simulators.fal_server import KEY, FalSimulator
from tests.simulators.server import Fault, served

MODEL = "openai/gpt-image-2"


@asynccontextmanager
async def fal_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, FalSimulator], None]:
    async with (
        served(FalSimulator()) as simulator,
        connected(
            "fal",
            simulator,
            folder,
            FAL_FAULTS,
            options=options,
            usual={"model": MODEL},
        ) as upstream,
    ):
        yield upstream, simulator


def refused(status: int, detail: object, **headers: str) -> Fault:
    """Say that the queue does not take the job."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status=status, body={"detail": detail}, headers=named)


def broken(status: int, error_type: str, detail: str = "no", **headers: str) -> Fault:
    """Say that the job ends with an error of the infrastructure."""
    body = {"detail": detail, "error_type": error_type}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"X-Fal-Error-Type": error_type, **named}
    return Fault("run", status=status, body=body, headers=headers)


def faulted(kind: str, message: str = "no", *, status: int = 422) -> Fault:
    """Say that the job ends with an error of the model."""
    told: dict[str, Any] = {"loc": ["body", "prompt"], "msg": message, "type": kind}
    headers = {"X-Fal-Retryable": "false"}
    return Fault("run", status=status, body={"detail": [told]}, headers=headers)


FAL_FAULTS = {
    K.INVALID_REQUEST: [faulted("image_too_small", f"wrong, {KEY}")],
    K.CONTENT_POLICY: [faulted("content_policy_violation", f"refused, {KEY}")],
    K.UNSUPPORTED: [refused(404, "Application 'gpt-image-2' not found")],
    K.AUTH: [refused(401, f"Invalid key: {KEY}")],
    K.INSUFFICIENT_FUNDS: [
        refused(403, "User is locked. Reason: Exhausted balance. Top up your balance.")
    ],
    K.RATE_LIMITED: [refused(429, "Too many concurrent requests", retry_after="7")],
    K.OVERLOADED: [broken(503, "runner_scheduling_failure")],
    K.BAD_GATEWAY: [Fault(status=502, body=f"<html>{KEY}</html>")],
    K.TIMEOUT: [Fault(close="before_reply")],
    K.NO_OUTPUT: [Fault("run", answer="empty")],
    K.RESULT_LOST: [Fault("run", answer="dead_url")],
}


FAL = Case(
    "fal",
    alone(fal_upstream),
    # fal may charge for a 422.
    USUALLY_BILLED | {K.INVALID_REQUEST: Billed.MAYBE, K.CONTENT_POLICY: Billed.MAYBE},
    Capabilities(
        operations=frozenset(Operation),
        n_max=4,
        qualities=frozenset({"low", "medium", "high"}),
        backgrounds=frozenset({"opaque"}),
        mask=True,
        references_max=16,
        cancel=True,
    ),
    secret=KEY,
    look_step="status",
    file_step="file",
    probe_step="status",
    wrong_options=[
        ({"nope": 1}, "nope"),
        ({"edits": "no"}, "edits"),
        ({"edit_models": ["a"]}, "edit_models"),
        ({"edit_models": {"a": "b c"}}, "edit_models"),
        ({"n_max": 5}, "n_max"),
        ({"references_max": 17}, "references_max"),
        ({"usage": True}, "usage"),
        ({"priority": "high"}, "priority"),
        ({"sizes": ["big"]}, "sizes"),
        ({"qualities": ["best"]}, "qualities"),
        ({"download_hosts": ["https://x.test/"]}, "download_hosts"),
    ],
    model=MODEL,
)
