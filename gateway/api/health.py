"""``/health/...``, ``/metrics`` and a plain front page: for operators, newcomers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import msgspec
from litestar import Response, get
from litestar.handlers import HTTPRouteHandler

from gateway.api.http import AnyRequest

Checks = Mapping[str, Callable[[], Awaitable[str | None]]]
"""Each tells what is wrong with its part, or None."""

PAGE = """<!doctype html><meta charset="utf-8"><title>imageway</title>
<body style="font:16px/1.5 system-ui;max-width:42rem;margin:4rem auto;padding:0 1rem">
<h1>imageway</h1><p>The gateway runs. Point your OpenAI client at this address:
<p><code>base_url = "http://&lt;this host&gt;/v1"</code>
<p>The playground is not built here: <code>make web</code> does it, with Node 20.
<p><a href="/health/ready">readiness</a> · <a href="/status">status</a>
· <a href="/metrics">metrics</a></body>
"""


def health_routes(
    checks: Checks, metrics: Callable[[str], Awaitable[tuple[bytes, str]]]
) -> list[HTTPRouteHandler]:
    """Route what operators look at."""

    @get("/health/live")
    async def live() -> Response[bytes]:
        """Answer as long as the process can answer at all."""
        return _json({"status": "ok"}, 200)

    @get("/health/ready")
    async def ready() -> Response[bytes]:
        """Tell whether requests can be served; names what is wrong."""
        found = {name: await check() for name, check in checks.items()}
        wrong = {name: what for name, what in found.items() if what is not None}
        body: dict[str, object] = {
            "status": "unavailable" if wrong else "ok",
            "checks": {name: what or "ok" for name, what in found.items()},
        }
        return _json(body, 503 if wrong else 200)

    @get("/metrics")
    async def show_metrics(request: AnyRequest) -> Response[bytes]:
        """Show the metrics in Prometheus' text format, or in OpenMetrics."""
        body, media_type = await metrics(request.headers.get("accept", ""))
        # As a header: the framework would name the charset of a text again.
        return Response(body, headers={"content-type": media_type})

    return [live, ready, show_metrics]


def _json(body: dict[str, object], status: int) -> Response[bytes]:
    return Response(
        msgspec.json.encode(body), status_code=status, media_type="application/json"
    )
