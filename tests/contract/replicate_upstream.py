"""The replicate adapter before a simulated Replicate."""

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
from tests.simulators.replicate_server import (
    KEY,
    ReplicateSimulator,
    throttled,
)
from tests.simulators.server import Fault, served

MODEL = "openai/gpt-image-2"
USUAL = {"model": MODEL, "width_px": 1024, "height_px": 1024}


@asynccontextmanager
async def replicate_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, ReplicateSimulator], None]:
    async with (
        served(ReplicateSimulator()) as simulator,
        connected(
            "replicate",
            simulator,
            folder,
            REPLICATE_FAULTS,
            options=options,
            purchases=lambda: simulator.billed,
            hang=Fault(answer="stuck"),
            usual=USUAL,
        ) as upstream,
    ):
        yield upstream, simulator


def refused(status: int, title: str, detail: str) -> Fault:
    return Fault(
        status=status, body={"title": title, "detail": detail, "status": status}
    )


def failed(text: str) -> Fault:
    """Let the prediction fail, with a text and nothing else to tell why."""
    return Fault(answer="failed", body=text)


REPLICATE_FAULTS = {
    K.INVALID_REQUEST: [failed(f"The input was invalid. {KEY} (E006)")],
    K.CONTENT_POLICY: [
        failed(f"Your request was rejected by the safety system. {KEY}")
    ],
    K.UNSUPPORTED: [refused(404, "Not found", "The requested resource is not there.")],
    K.AUTH: [refused(401, "Unauthenticated", f"This is no token: {KEY}")],
    K.INSUFFICIENT_FUNDS: [
        refused(
            402,
            "Insufficient credit",
            "You have insufficient credit to run this model.",
        )
    ],
    K.RATE_LIMITED: [throttled(30)],
    K.OVERLOADED: [failed("Service is unavailable due to high demand. (E003)")],
    K.BAD_GATEWAY: [Fault(status=502, body=f"<html>{KEY}</html>")],
    K.TIMEOUT: [Fault(close="before_reply")],
    K.NO_OUTPUT: [Fault(answer="empty")],
    K.RESULT_LOST: [Fault(answer="dead_link")],
}


REPLICATE = Case(
    "replicate",
    alone(replicate_upstream),
    USUALLY_BILLED,
    Capabilities(
        operations=frozenset(Operation),
        n_max=10,
        sizes=frozenset(
            {
                (1024, 1024),
                (1536, 1024),
                (1024, 1536),
                (2048, 2048),
                (2048, 1152),
                (1152, 2048),
                (3840, 2160),
                (2160, 3840),
            }
        ),
        qualities=frozenset({"auto", "low", "medium", "high"}),
        backgrounds=frozenset({"opaque"}),
        references_max=16,
        cancel=True,
    ),
    secret=KEY,
    look_step="poll",
    file_step="output",
    wrong_options=[
        ({"nope": 1}, "nope"),
        ({"wait_s": 61}, "wait_s"),
        ({"wait_s": -1}, "wait_s"),
        ({"poll_ms": 1}, "poll_ms"),
        ({"aspect_ratios": {"big": "1:1"}}, "aspect_ratios"),
        ({"aspect_ratios": {"1024x1024": "1 1"}}, "aspect_ratios"),
        ({"references_max": 17}, "references_max"),
        ({"n_max": 0}, "n_max"),
        ({"qualities": ["best"]}, "qualities"),
        ({"output_formats": ["gif"]}, "output_formats"),
        ({"backgrounds": ["auto"]}, "backgrounds"),
        ({"download_hosts": ["https://x.test/"]}, "download_hosts"),
    ],
    model=MODEL,
    size_px=(1536, 1024),
    counts_tokens=False,
)
