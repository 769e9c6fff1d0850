"""What all tests share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="chaos at its whole size, for minutes"
    )


@pytest.fixture(scope="session")
def whole(pytestconfig: pytest.Config) -> bool:
    """Whether chaos is played at its whole size."""
    return bool(pytestconfig.getoption("--whole"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
