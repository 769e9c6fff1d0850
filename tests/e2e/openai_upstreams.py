"""Gateways whose upstreams are simulated OpenAIs, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.gateways import ROOT, LiveGateway
from tests.simulators.openai_server import KEY

STOP_MAX_S = 30
OFFER = """
[[upstream]]
name = "{name}"
kind = "openai"
base_url = "{base_url}"
credential = "env:SIMULATED_KEY"
failure_domain = "{name}"
options = {{ {options} }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"

[upstream.offer.cost]
per = "1M tokens"
text_input = {dollars}
text_cached = {dollars}
image_input = {dollars}
image_cached = {dollars}
image_output = {dollars}
"""


@dataclass(frozen=True)
class SimulatedUpstream:
    """A simulated OpenAI, steered and asked over HTTP."""

    name: str
    base_url: str
    options: str = ""
    """In TOML: how the gateway is told that it differs."""

    def script(self, *faults: dict[str, Any]) -> None:
        """Let the next calls go wrong; each fault has the fields of a ``Fault``."""
        httpx.post(self._origin + "/_script", json=faults).raise_for_status()

    def purchases(self) -> list[dict[str, Any]]:
        """Read what was bought here, oldest first."""
        found = httpx.get(self._origin + "/_purchases").json()
        assert isinstance(found, list)
        return found

    @property
    def _origin(self) -> str:
        return self.base_url.removesuffix("/v1")


@contextmanager
def simulated_upstream(name: str) -> Iterator[SimulatedUpstream]:
    """Run one on a free port."""
    with running_server("tests.simulators.openai_server") as base_url:
        yield SimulatedUpstream(name, base_url)


@contextmanager
def running_server(module: str, *options: str) -> Iterator[str]:
    """Run a module as a process that prints its base URL; returns that."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait(STOP_MAX_S)


@contextmanager
def gateway_before(
    folder: Path, *upstreams: SimulatedUpstream
) -> Iterator[LiveGateway]:
    """Run a gateway that buys there: the first is the cheapest, and so on."""
    config = folder / "gateway.toml"
    config.write_text(
        "".join(
            OFFER.format(
                name=u.name, base_url=u.base_url, options=u.options, dollars=place
            )
            for place, u in enumerate(upstreams, start=1)
        )
    )
    env = {"SIMULATED_KEY": KEY}
    with LiveGateway(folder / "data", config=config, env=env) as gateway:
        yield gateway
