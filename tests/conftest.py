"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.object_store import S3Server, running_s3
from tests.servers import RedisServer

# Hundreds of processes are started. That none of them keeps what it has compiled, as
# images of containers like it, would cost half a second of each start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


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


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server; each test has a bucket of its own in it."""
    with running_s3() as server:
        yield server


@pytest.fixture(scope="session")
def _one_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(_one_redis: RedisServer) -> RedisServer:
    """A Redis with nothing in it, not to be stopped."""
    _one_redis.empty()
    return _one_redis


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis to be killed and frozen."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server
        server.thaw()
