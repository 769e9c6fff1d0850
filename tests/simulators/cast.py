"""Who plays whom in a rehearsal: six simulated accounts, and the gateway before them.

The prices rise in the order given here; what an account charges is what its offer says,
rounded up to a cent at fal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.simulators import (
    azure_server,
    fal_server,
    openai_server,
    openrouter_server,
    replicate_server,
    task_server,
)
from tests.simulators.server import Simulator

BASE_PORT = 9700
TOKENS = """cost = {{ per = "1M tokens", text_input = {0[0]}, text_cached = {0[0]}, \
image_input = {0[1]}, image_cached = {0[1]}, image_output = {0[2]} }}"""
TABLE = """cost = {{ per = "image", table = {{ {} }} }}"""
LIST_PRICE = (5, 8, 30)
"""USD per million tokens: text, image in, image out."""
UPSTREAM = """
[[upstream]]
name = "{name}"
kind = "{name}"
base_url = "{base_url}"
credential = "file:{key_file}"
failure_domain = "{name}"
max_concurrent = {slots}
options = {{ {options} }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "{model}"
{cost}
"""


@dataclass(frozen=True)
class Part:
    """One simulated account. ``place`` is its port's distance from the base port."""

    name: str
    kind: type[Simulator]
    key: str
    place: int
    latency_s: float
    cost: str
    model: str = "gpt-image-2"
    options: str = ""
    percent: int = 100

    @property
    def module(self) -> str:
        """What runs it in a process of its own."""
        return self.kind.__module__


def tokens(percent: int) -> str:
    """Write a price card, as so much of the list price."""
    return TOKENS.format([f"{price * percent / 100:.2f}" for price in LIST_PRICE])


def table() -> str:
    """Write the price of a picture by its quality."""
    prices = replicate_server.PRICES_USD.items()
    return TABLE.format(", ".join(f'"{quality}/*" = {usd}' for quality, usd in prices))


CAST = (
    Part(
        "task_api",
        task_server.TaskSimulator,
        task_server.KEY,
        4,
        latency_s=2.0,
        cost=tokens(90),
        options="poll_after_ms = 200",
    ),
    Part(
        "openai",
        openai_server.OpenAISimulator,
        openai_server.KEY,
        1,
        latency_s=1.0,
        cost=tokens(95),
        percent=95,
    ),
    Part(
        "fal",
        fal_server.FalSimulator,
        fal_server.KEY,
        3,
        latency_s=1.5,
        # A unit is a dollar there, and each job is rounded up to a cent of it.
        cost=tokens(100).replace(" }", ", unit_usd = 1 }"),
        model="openai/gpt-image-2",
    ),
    Part(
        "openrouter",
        openrouter_server.OpenRouterSimulator,
        openrouter_server.KEY,
        5,
        latency_s=1.0,
        cost=tokens(105),
        model="openai/gpt-image-2",
        percent=105,
    ),
    Part(
        "azure",
        azure_server.AzureSimulator,
        azure_server.KEY,
        2,
        latency_s=1.2,
        cost=tokens(110),
        percent=110,
    ),
    Part(
        "replicate",
        replicate_server.ReplicateSimulator,
        replicate_server.KEY,
        6,
        latency_s=2.5,
        cost=table(),
        model="openai/gpt-image-2",
        options="poll_ms = 200",
    ),
)
"""The cheapest first."""


def write_gateway(
    folder: Path, base_urls: Mapping[str, str], *, slots: int = 8
) -> Path:
    """Write the config of a gateway before them, and their keys; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    for part in CAST:
        if part.name not in base_urls:
            continue
        key_file = folder / f"{part.name}.key"
        key_file.touch(mode=0o600)
        key_file.write_text(part.key)
        blocks.append(
            UPSTREAM.format(
                name=part.name,
                base_url=base_urls[part.name],
                key_file=key_file.name,
                slots=slots,
                options=part.options,
                model=part.model,
                cost=part.cost,
            )
        )
    config = folder / "gateway.toml"
    config.write_text("".join(blocks))
    return config
