"""The task_api adapter before a simulated EvoLink."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from providers.kit.contract import Capabilities, Operation
from providers.task_api import TaskApi
from tests.contract.upstreams import (
    USUALLY_BILLED,
    Case,
    K,
    Upstream,
    alone,
    connected,
)
from tests.simulators.server import Fault, served
from tests.simulators.task_server import KEY, TaskSimulator

USUAL = {"width_px": 1024, "height_px": 1024}


@asynccontextmanager
async def task_upstream(
    folder: Path, kind: type[TaskSimulator] = TaskSimulator, **options: object
) -> AsyncGenerator[tuple[Upstream, TaskSimulator], None]:
    async with (
        served(kind()) as simulator,
        connected(
            "task_api",
            simulator,
            folder,
            TASK_FAULTS,
            options=options,
            purchases=lambda: unreleased(simulator),
            usual=USUAL,
        ) as upstream,
    ):
        assert isinstance(upstream.provider, TaskApi)
        upstream.provider = replace(upstream.provider, replay_pause_s=0)
        yield upstream, simulator


def unreleased(simulator: TaskSimulator) -> int:
    """Count the pictures that the account pays for."""
    return sum(one.n for one in simulator.purchases if one.charge != "released")


def task_error(status: int, code: str, message: str = "no") -> list[Fault]:
    error = {"code": code, "message": message, "type": "x"}
    return [Fault(status=status, body={"error": error})]


TASK_FAULTS = {
    K.INVALID_REQUEST: task_error(400, "invalid_request", f"wrong, {KEY}"),
    K.CONTENT_POLICY: task_error(400, "content_policy_violation", f"refused, {KEY}"),
    K.UNSUPPORTED: task_error(404, "model_not_found"),
    K.AUTH: task_error(401, "unauthorized", f"Incorrect API key: {KEY}"),
    K.INSUFFICIENT_FUNDS: task_error(402, "insufficient_quota"),
    K.RATE_LIMITED: task_error(429, "rate_limit_exceeded"),
    K.OVERLOADED: task_error(503, "no_available_channel"),
    K.BAD_GATEWAY: [Fault(status=502, body=f"<html>{KEY}</html>")],
    # The reply is lost, and so is the one to the same key.
    K.TIMEOUT: [Fault(close="before_reply")] * 2,
    K.NO_OUTPUT: [Fault(answer="empty")],
    K.RESULT_LOST: [Fault(answer="dead_url")],
}


TASK = Case(
    "task_api",
    alone(task_upstream),
    USUALLY_BILLED,
    Capabilities(
        operations=frozenset(Operation),
        n_max=1,
        mask=True,
        references_max=16,
        idempotent=frozenset({Operation.GENERATE}),
    ),
    secret=KEY,
    bad_file=K.UNSUPPORTED,
    look_step="poll",
    file_step="download",
    wrong_options=[
        ({"nope": 1}, "nope"),
        ({"dialect": "kie"}, "dialect"),
        ({"submit_path": "images"}, "submit_path"),
        ({"task_path": "/tasks"}, "task_path"),
        ({"files_url": "files.test"}, "files_url"),
        ({"references": "always"}, "references"),
        ({"references": "upload", "dialect": "apimart"}, "references"),
        ({"references_max": 17}, "references_max"),
        ({"n_max": 11}, "n_max"),
        ({"poll_after_ms": 10}, "poll_after_ms"),
        ({"sizes": ["big"]}, "sizes"),
        ({"qualities": ["best"]}, "qualities"),
        ({"output_formats": ["gif"]}, "output_formats"),
        ({"download_hosts": ["https://x.test/"]}, "download_hosts"),
    ],
    size_px=(1776, 592),
    counts_tokens=False,
)
