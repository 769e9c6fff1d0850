"""What metrics, logs, uptime and traces take of a request's processor time.

A gateway serves small pictures from a simulated upstream and its processor time is
counted; then the events of such a request are told to each listener alone, many times.
The share is the one over the other: nothing of it hides in the noise of two runs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)

from bench.figures import Table
from bench.processes import Process
from bench.speed import WARM_UP_REQUESTS, Place, alone, crowd
from bench.upstreams import gateway, upstream
from gateway.adapters.clock import SystemClock
from gateway.adapters.logs import LogListener
from gateway.adapters.metrics import Metrics
from gateway.adapters.tracing import Tracer
from gateway.app import connect_providers, read_settings
from gateway.core.events import AttemptFinished, Event, RequestFinished, TaskFinished
from gateway.core.uptime import Slot
from gateway.flows.uptime import KeepUptime
from providers.kit.contract import Usage

CREDITS = "100000000"
SHARE_MAX = 5.0
"""Per cent of the request's processor time."""

Listener = Callable[[Event], None]


class Nowhere:
    """A book that takes everything and keeps nothing."""

    async def add(self, slots: object) -> None: ...

    async def slots(self, since_ms: int) -> Sequence[Slot]:
        del since_ms
        return []

    async def days(self, since_ms: int) -> Sequence[Slot]:
        del since_ms
        return []

    async def troubled(self, since_ms: int, limit: int) -> Sequence[Slot]:
        del since_ms, limit
        return []

    async def forget(self, before_ms: int) -> int:
        del before_ms
        return 0


class Encoded(SpanExporter):
    """Encodes spans as the real one does, and sends them nowhere."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        encode_spans(spans).SerializeToString()
        return SpanExportResult.SUCCESS


def events_of(place: int) -> tuple[Event, ...]:
    """What is told of one request that is served at once."""
    task_id = f"task-unified-1795562712-{place:08d}"
    return (
        AttemptFinished(
            task_id=task_id,
            seq=1,
            offer_id="sandbox-thrifty/gpt-image-2",
            upstream="sandbox-thrifty",
            variant="gpt-image-2",
            outcome="done",
            billed="yes",
            duration_ms=12_345,
            cost_nanousd=14_870_000,
            estimate_nanousd=14_870_000,
        ),
        TaskFinished(
            task_id=task_id,
            variant="gpt-image-2",
            operation="generate",
            mode="sync",
            state="completed",
            outcome="success",
            error_code=None,
            attempts=1,
            saved_by_fallback=False,
            images=1,
            duration_ms=12_350,
            charged_nanocredits=1_820_088_000,
            absorbed_nanocredits=0,
            usage=Usage(text_input=26, image_output=987),
            usage_source="reported",
            overhead_ms=5,
        ),
        RequestFinished(
            request_id=f"req_{place:032x}",
            method="POST",
            route="/v1/images/generations",
            status=200,
            duration_ms=12_352,
            task_id=task_id,
            tenant_id="tenant-1",
            key_id="key-1",
        ),
    )


def told_us(listen: Listener, close: Callable[[], None], requests: int) -> float:
    """Return what it takes to tell a listener of a request, in microseconds."""
    told = [events_of(place) for place in range(requests)]
    begun_s = time.process_time()
    for events in told:
        for event in events:
            listen(event)
    close()
    return (time.process_time() - begun_s) / requests * 1e6


def listeners(folder: Path) -> dict[str, tuple[Listener, Callable[[], None]]]:
    settings = read_settings(None, {"storage.data_dir": str(folder)})
    _, _, catalogue = connect_providers(settings, folder)
    metrics, clock = Metrics(), SystemClock()
    metrics.known(catalogue)
    tracer = Tracer(BatchSpanProcessor(Encoded(), max_queue_size=1_000_000), clock)
    return {
        "metrics": (metrics.on_event, lambda: None),
        "logs": (LogListener(io.StringIO()).on_event, lambda: None),
        "uptime": (KeepUptime(Nowhere(), clock).on_event, lambda: None),
        "traces, an extra": (tracer.on_event, tracer.close),
    }


def request_us(folder: Path, requests: int) -> float:
    """Return what the gateway takes for a small picture, in microseconds."""
    with upstream("steady") as steady, gateway(folder, steady) as live:
        place = Place(live.url, live.tenant("bench", CREDITS))
        process = Process(live.pid)
        asyncio.run(alone(place, WARM_UP_REQUESTS))
        before_s = process.cpu_s()
        asyncio.run(crowd(place, requests))
        return (process.cpu_s() - before_s) / requests * 1e6


def measure(requests: int) -> None:
    table = Table("telemetry")
    with tempfile.TemporaryDirectory() as folder:
        whole_us = request_us(Path(folder) / "live", requests)
        table.line("a small picture: CPU of the gateway", f"{whole_us:,.0f} us/req")
        sum_us = 0.0
        for name, (listen, close) in listeners(Path(folder) / "spool").items():
            took_us = told_us(listen, close, 5 * requests)
            sum_us += took_us
            share = 100 * took_us / whole_us
            table.line(f"of which {name}", f"{took_us:.0f} us, {share:.1f} %")
            if name == "uptime":
                share = 100 * sum_us / whole_us
                table.at_most("telemetry, together", share, SHARE_MAX, "%")
    table.line("telemetry with traces", f"{100 * sum_us / whole_us:.1f} %")
    table.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    measure(parser.parse_args().requests)
