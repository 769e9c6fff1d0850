"""Spans as a collector receives them, and the lines of the log beside them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from gateway.core.traces import span_id_of, trace_id_of
from tests.inside import inside

SERVER, CLIENT = 2, 3
PROMPT = "a secret garden"


class Collector:
    """Takes spans over OTLP/HTTP, and keeps them as they are on the wire."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.raw = b""
        self.url = ""

    def take(self, body: bytes) -> None:
        self.raw += body
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            body = self.rfile.read(length)
            if self.headers.get("content-encoding") == "gzip":
                raise AssertionError(self.headers)
            collector.take(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
            yield collector
        finally:
            server.shutdown()
            serving.join()


def facts(span: Any) -> dict[str, Any]:
    """The attributes of a span."""
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        found[each.key] = getattr(each.value, kind)
    return found


async def test_a_request_that_fell_over_is_one_trace_with_each_call(
    tmp_path: Path,
) -> None:
    with collecting() as collector:
        where = {"tracing.endpoint": collector.url}
        async with inside(tmp_path, overrides=where) as there:
            there.tune("sandbox-thrifty", failure_rate=1, failure_kind="overloaded")
            answer = await there.ask(prompt=PROMPT)
            task_id = answer.headers["x-task-id"]
            await there.client.get(f"/v1/tasks/{task_id}")
        lines = [json.loads(line) for line in there.log.getvalue().splitlines()]

    trace_id = trace_id_of(task_id)
    mine = [s for s in collector.spans if s.trace_id.hex() == trace_id]
    by_name = {s.span_id.hex(): s for s in mine}
    request = by_name[span_id_of(task_id, "request")]
    task = by_name[span_id_of(task_id, "task")]
    first, second = (by_name[span_id_of(task_id, f"attempt {n}")] for n in (1, 2))
    assert len(mine) == 4
    assert (request.kind, request.parent_span_id) == (SERVER, b"")
    assert request.name == "POST /v1/images/generations"
    assert task.parent_span_id == request.span_id
    assert {first.parent_span_id, second.parent_span_id} == {task.span_id}
    assert (first.kind, facts(first)["error.type"]) == (CLIENT, "overloaded")
    assert facts(first)["gen_ai.provider.name"] == "sandbox-thrifty"
    assert facts(second)["gen_ai.provider.name"] == "sandbox-fair"
    told = facts(task)
    assert told["gen_ai.operation.name"] == "generate_content"
    assert told["gen_ai.request.model"] == "gpt-image-2"
    assert told["gen_ai.usage.output_tokens"] > 0
    assert told["imageway.outcome"] == "success"
    assert task.start_time_unix_nano <= first.start_time_unix_nano
    assert second.end_time_unix_nano <= task.end_time_unix_nano
    assert PROMPT.encode() not in collector.raw
    of_task = [line for line in lines if line.get("task_id") == task_id]
    assert {line["trace_id"] for line in of_task} == {trace_id}
    assert {"attempt", "task", "request"} <= {line["event"] for line in of_task}
    # Reading the task is a trace of its own.
    assert len({s.trace_id for s in collector.spans}) == 2


async def test_a_repetition_is_no_second_begin_of_its_task(tmp_path: Path) -> None:
    body, once = {"model": "gpt-image-2", "prompt": "x"}, {"idempotency-key": "a"}
    with collecting() as collector:
        where = {"tracing.endpoint": collector.url}
        async with inside(tmp_path, overrides=where) as there:
            first, again = [
                await there.client.post(
                    "/v1/images/generations", json=body, headers=once
                )
                for _ in range(2)
            ]

    ids = [(span.trace_id, span.span_id) for span in collector.spans]
    task_id = first.headers["x-task-id"]
    asked = [s for s in collector.spans if facts(s).get("imageway.task_id") == task_id]
    assert again.headers["x-task-id"] == task_id
    assert len(ids) == len(set(ids))
    assert [s.kind for s in asked].count(SERVER) == 2


async def test_a_collector_that_is_not_there_costs_no_request(tmp_path: Path) -> None:
    nowhere = {"tracing.endpoint": "http://127.0.0.1:9/v1/traces"}
    async with inside(tmp_path, overrides=nowhere) as there:
        assert (await there.ask()).status_code == 200


@pytest.mark.parametrize(("one_in", "kept"), [("1", 8), ("1000000", 0)])
async def test_only_a_share_is_kept_where_that_is_asked_for(
    tmp_path: Path, one_in: str, kept: int
) -> None:
    with collecting() as collector:
        where = {"tracing.endpoint": collector.url, "tracing.one_in": one_in}
        async with inside(tmp_path, overrides=where) as there:
            for _ in range(8):
                await there.client.get("/v1/models")

    assert len(collector.spans) == kept


async def test_another_log_level_is_taken_over_by_a_reload(tmp_path: Path) -> None:
    shipped = Path("config/gateway.toml").read_text()
    catalogue = Path("config/catalogue.toml").read_text()
    (tmp_path / "catalogue.toml").write_text(catalogue)
    async with inside(tmp_path, shipped) as there:
        changed = shipped.replace('level = "info"', 'level = "warning"')
        (tmp_path / "gateway.toml").write_text(changed)
        await there.client.get("/v1/models")
        swapped = await there.gateway.reload.everywhere()
        before = there.log.getvalue()
        await there.client.get("/v1/models")
        await there.ask(model="nothing")

        assert swapped.changed == ("log_level",)
        assert '"route":"/v1/models"' in before
        assert there.log.getvalue() == before
