from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.gateways import LiveGateway


@pytest.fixture(scope="module")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """One gateway for the tests of a file; each makes its own tenant."""
    with LiveGateway(tmp_path_factory.mktemp("gateway") / "data") as gateway:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=0)
        yield gateway


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[LiveGateway]:
    """A gateway of one's own, with quick sandboxes."""
    with LiveGateway(tmp_path / "data") as gateway:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=0)
        yield gateway
