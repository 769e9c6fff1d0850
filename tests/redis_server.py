"""A Redis of the tests' own: on a private port and in a private folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

START_MAX_S = 60
LOOK_EVERY_S = 0.02
MISSING = (
    "redis-server is not installed. make test installs it where it may; elsewhere "
    "install Redis (Debian: apt-get install redis-server)"
)


def program() -> str:
    """Find the program; without it a test is skipped, but in CI it fails."""
    found = shutil.which("redis-server")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class RedisServer:
    """One server; it can be killed, started again, frozen and emptied."""

    folder: Path
    options: tuple[str, ...] = ()
    program_args: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    password: str = ""
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        where = ["--port", str(self.port), "--bind", "127.0.0.1"]
        keeps = ["--dir", str(self.folder), "--save", "", "--appendonly", "no"]
        secret = ["--requirepass", self.password] if self.password else []
        self._process = subprocess.Popen(
            [program(), *self.program_args, *where, *keeps, *secret, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_MAX_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < until, "redis-server does not answer"
            time.sleep(LOOK_EVERY_S)

    def kill(self) -> None:
        """End it at once; what it held is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop its time: connections stay, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def empty(self) -> None:
        """Forget everything in it."""
        with self.client() as client:
            client.flushall()

    def client(self) -> Redis:
        """A client to look into it."""
        return Redis(
            port=self.port,
            password=self.password or None,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
        )

    def commands(self) -> int:
        """How many commands it has run."""
        with self.client() as client:
            return int(client.info("stats")["total_commands_processed"])

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except RedisError:
            return False

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
