"""A whole gateway inside the test: its ASGI application without a port."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from gateway.adapters.logs import LogListener
from gateway.app import Gateway, build_gateway, read_settings
from gateway.books import Books, open_books
from gateway.core.money import NANO
from gateway.settings import Settings
from tests.e2e.gateways import ADMIN_KEY

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
ORIGIN = "http://gateway.test"


@dataclass
class Inside:
    """A gateway in this process, with a tenant and what its log has."""

    gateway: Gateway
    books: Books
    key: str
    client: httpx.AsyncClient
    log: io.StringIO

    async def ask(self, **body: Any) -> httpx.Response:
        """Ask for a picture."""
        return await self.client.post(
            "/v1/images/generations",
            json={"model": "gpt-image-2", "prompt": "x"} | body,
        )

    def tune(self, upstream: str, **knobs: Any) -> None:
        """Change how a sandbox behaves."""
        provider: Any = self.gateway.edition.providers[upstream]
        provider.settings.change(knobs)

    async def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Read every sample of the metrics, by name and labels."""
        text = (await self.client.get("/metrics")).text
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def sample(self, name: str, **labels: str) -> float:
        """Read one sample; it must be there."""
        return (await self.samples())[name, frozenset(labels.items())]


@asynccontextmanager
async def inside(
    folder: Path,
    config: str | None = None,
    *,
    works: bool = True,
    overrides: dict[str, str] | None = None,
) -> AsyncIterator[Inside]:
    """Run a gateway in this process; ``works`` has it take tasks and keep house."""
    path, secret = None, folder / "admin_key"
    secret.touch(mode=0o600)
    secret.write_text(ADMIN_KEY)
    if config is not None:
        path = folder / "gateway.toml"
        path.write_text(config)

    def read() -> Settings:
        return read_settings(
            path,
            {
                "storage.data_dir": str(folder / "data"),
                "server.admin_key": f"file:{secret}",
            }
            | (overrides or {}),
        )

    settings, log = read(), io.StringIO()
    async with open_books(settings, alone=True) as books:
        gateway = build_gateway(settings, books, LogListener(log), read_again=read)
        tenant = await books.tenants.create("acme")
        await books.tenants.grant(tenant, 100_000 * NANO, reference="first")
        key = (await books.keys.create(tenant)).secret
        await gateway.reload.begin()
        working = asyncio.create_task(gateway.run()) if works else None
        transport = httpx.ASGITransport(app=gateway.app, raise_app_exceptions=False)  # type: ignore[arg-type]
        headers = {"authorization": f"Bearer {key}"}
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url=ORIGIN, headers=headers, timeout=60
            ) as client:
                yield Inside(gateway, books, key, client, log)
        finally:
            if working is not None:
                working.cancel()
                await asyncio.wait({working})
            await gateway.leave()
            await gateway.drain()
            await gateway.close()
