from __future__ import annotations

from typing import Any

import pytest

from tests.virtual_time import VirtualTimeLoop


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Flows are told on a clock of their own: time never passes."""
    return "asyncio", {"loop_factory": VirtualTimeLoop}
