"""What adapters that are answered with pictures at once send, byte for byte."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import respx

from providers.kit.contract import Account, Done, ImageJob
from providers.registry import PROVIDERS
from tests.contract.upstreams import close, tools
from tests.simulators.pictures import png


async def request_of(
    kind: str, account: Account, job: ImageJob, folder: Path
) -> httpx.Request:
    """Run a job against a router that answers anything, and return the request."""
    body = {"data": [{"b64_json": base64.b64encode(png(64, 32)).decode()}]}
    with respx.mock(assert_all_called=False) as router:
        route = router.route(method="POST").respond(json=body)
        transport = httpx.MockTransport(router.async_handler)
        async with tools(folder, transport) as given:
            done = await PROVIDERS[kind](account, given).start(job)
        assert isinstance(done, Done)
        close(done)
        assert route.call_count == 1
        request: httpx.Request = route.calls[0].request
        return request
