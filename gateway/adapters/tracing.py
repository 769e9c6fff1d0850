"""Spans of requests, tasks and calls, sent to an OpenTelemetry collector.

A listener of events: a span is made once what it is about has ended, with the ids that
``core.traces`` makes of the task's id, so that the processes that work on a task need
not know of each other. Names of attributes follow OpenTelemetry's conventions for HTTP
and for generative AI; prompts and pictures are in none of them. Loaded only where the
config asks for it: the library is an extra.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from gateway.core.events import AttemptFinished, Event, RequestFinished, TaskFinished
from gateway.core.outcomes import FAILED, RequestOutcome
from gateway.core.traces import span_id_of, trace_id_of
from gateway.ports import Clock
from providers.kit.contract import Usage

REQUEST, TASK = "request", "task"
MS_NS = 1_000_000
SEND_MAX_S = 5.0
PICTURE_ROUTES = frozenset({"/v1/images/generations", "/v1/images/edits"})
Facts = Mapping[str, str | int | bool | None]


def collector(endpoint: str) -> SpanProcessor:
    """Send spans in batches, from a thread; what a collector does not take is lost."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=SEND_MAX_S))


@dataclass(frozen=True, slots=True)
class Tracer:
    """Makes spans of events; of ``one_in`` traces one is kept."""

    processor: SpanProcessor
    clock: Clock
    one_in: int = 1
    resource: Resource = field(
        default_factory=lambda: Resource(
            {
                "service.name": "imageway",
                "service.version": version("imageway"),
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            }
        )
    )
    scope: InstrumentationScope = field(
        default_factory=lambda: InstrumentationScope("imageway", version("imageway"))
    )

    def on_event(self, event: Event) -> None:
        """Make a span, if the event is the end of what has one."""
        match event:
            case RequestFinished():
                self._request(event)
            case TaskFinished():
                self._task(event)
            case AttemptFinished():
                self._attempt(event)
            case _:
                pass

    def close(self) -> None:
        """Send what waits, for a few seconds at most."""
        self.processor.shutdown()

    def _request(self, event: RequestFinished) -> None:
        # Only who first asks for pictures begins a task; who asks again, or reads one,
        # is a trace apart.
        begins = event.route in PICTURE_ROUTES and not event.repeats
        trace = event.task_id if begins and event.task_id else event.request_id
        failed = event.error_code if event.status >= 500 else None  # noqa: PLR2004
        self._end(
            trace,
            REQUEST,
            f"{event.method} {event.route}",
            SpanKind.SERVER,
            event.duration_ms,
            {
                "http.request.method": event.method,
                "http.route": event.route,
                "http.response.status_code": event.status,
                "error.type": event.error_code,
                "imageway.request_id": event.request_id,
                "imageway.task_id": event.task_id,
            },
            failed=failed,
        )

    def _task(self, event: TaskFinished) -> None:
        usage = event.usage
        self._end(
            event.task_id,
            TASK,
            f"generate_content {event.variant}",
            SpanKind.INTERNAL,
            event.duration_ms,
            {
                "gen_ai.operation.name": "generate_content",
                "gen_ai.output.type": "image",
                "gen_ai.provider.name": "imageway",
                "gen_ai.request.model": event.variant,
                "gen_ai.usage.input_tokens": None
                if usage is None
                else _input_tokens(usage),
                "gen_ai.usage.output_tokens": None
                if usage is None
                else usage.image_output,
                "error.type": event.error_code,
                "imageway.task_id": event.task_id,
                "imageway.operation": event.operation,
                "imageway.mode": event.mode,
                "imageway.outcome": event.outcome,
                "imageway.attempts": event.attempts,
                "imageway.images": event.images,
                "imageway.charged_nanocredits": event.charged_nanocredits,
            },
            parent=REQUEST,
            failed=event.error_code
            if RequestOutcome(event.outcome) in FAILED
            else None,
        )

    def _attempt(self, event: AttemptFinished) -> None:
        won = event.outcome == "done"
        self._end(
            event.task_id,
            f"attempt {event.seq}",
            f"generate_content {event.variant}",
            SpanKind.CLIENT,
            event.duration_ms,
            {
                "gen_ai.operation.name": "generate_content",
                "gen_ai.output.type": "image",
                "gen_ai.provider.name": event.upstream,
                "gen_ai.request.model": event.variant,
                "http.response.status_code": event.upstream_status,
                "error.type": None if won else event.outcome,
                "imageway.task_id": event.task_id,
                "imageway.attempt": event.seq,
                "imageway.offer": event.offer_id,
                "imageway.billed": event.billed,
                "imageway.cost_nanousd": event.cost_nanousd,
            },
            parent=TASK,
            failed=None if won else event.outcome,
        )

    def _end(  # noqa: PLR0913 - a span has so many sides
        self,
        trace: str,
        part: str,
        name: str,
        kind: SpanKind,
        duration_ms: int,
        facts: Facts,
        *,
        parent: str | None = None,
        failed: str | None = None,
    ) -> None:
        trace_id = int(trace_id_of(trace), 16)
        if trace_id % self.one_in:
            return
        end_ns = self.clock.now_ms() * MS_NS
        status = Status(StatusCode.ERROR, failed) if failed else Status()
        span = ReadableSpan(
            name=name,
            context=_context(trace_id, span_id_of(trace, part)),
            parent=_context(trace_id, span_id_of(trace, parent)) if parent else None,
            resource=self.resource,
            attributes={
                key: value for key, value in facts.items() if value is not None
            },
            kind=kind,
            instrumentation_scope=self.scope,
            status=status,
            start_time=end_ns - duration_ms * MS_NS,
            end_time=end_ns,
        )
        self.processor.on_end(span)


def _input_tokens(usage: Usage) -> int:
    text = usage.text_input + usage.text_cached
    return text + usage.image_input + usage.image_cached


def _context(trace_id: int, span_id: str) -> SpanContext:
    return SpanContext(
        trace_id, int(span_id, 16), is_remote=False, trace_flags=TraceFlags(1)
    )
