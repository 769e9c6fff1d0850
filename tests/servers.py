"""Real engines for tests: started on private ports and folders, ended with the run.

One PostgreSQL serves a whole test process; each test has a database of its own in it.
One Redis does too, and is emptied for each test; those that are stopped have their own.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Self

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

START_MAX_S = 60
PACKAGES = {
    "redis-server": "redis-server",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}
USER = "imageway"
PASSWORD = "test-only"
STOP = ("stop", "-m", "immediate", "-w")

_number = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def installed(name: str) -> str | None:
    """Find an engine's program, where Debian keeps it or on the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(debian[-1]) if debian else shutil.which(name)


def program(name: str) -> str:
    """Find an engine's program; without it a test is skipped, in CI it fails."""
    found = installed(name)
    if found is None:
        package = PACKAGES.get(name, "postgresql")
        message = (
            f"{name} is not installed. make test installs it where it may; elsewhere "
            f"install it by hand (Debian: apt-get install {package})"
        )
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@dataclass(slots=True)
class PostgresServer:
    """A PostgreSQL on a port and folder of its own; ``durable`` ones call fsync.

    Stopping and starting it again keeps what was committed.
    """

    folder: Path
    port: int
    durable: bool
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(cls, *, durable: bool = False) -> PostgresServer:
        """Make and start one; it ends with this process."""
        folder = _postgres_folder()
        server = cls(folder, free_port(), durable)
        atexit.register(server.kill)
        _as_user(folder, "cp", "-R", str(_new_cluster()), str(folder / "data"))
        server.start()
        return server

    @property
    def url(self) -> str:
        """The URL of its first database."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it; returns once it serves."""
        options = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "200",
            # Most tests are not about the disk.
            "fsync": "on" if self.durable else "off",
        }
        self.process = subprocess.Popen(
            [program("postgres"), "-D", str(self.folder / "data")]
            + [
                part
                for name, value in options.items()
                for part in ("-c", f"{name}={value}")
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=_other_user(),
            cwd=self.folder,
        )
        _wait_for_port(self.port, self.process)
        # It listens before it can serve.
        until_s = time.monotonic() + START_MAX_S
        asked = (program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port))
        while subprocess.run(asked, check=False).returncode:
            assert time.monotonic() < until_s, "the server does not serve"
            time.sleep(0.05)

    def stop(self) -> None:
        """End it as a crash does: all connections are cut, nothing is tidied up."""
        where = ("-D", str(self.folder / "data"))
        _as_user(self.folder, program("pg_ctl"), *where, *STOP)
        assert self.process is not None
        self.process.wait()

    def kill(self) -> None:
        """End it, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def database(self) -> str:
        """Make an empty database; returns its URL."""
        name = f"test_{os.getpid()}_{next(_number)}"
        subprocess.run(
            [program("psql"), self.url, "-qc", f"CREATE DATABASE {name}"],
            check=True,
            capture_output=True,
        )
        return self.url.removesuffix("postgres") + name


@lru_cache(maxsize=1)
def _new_cluster() -> Path:
    # To be copied: making one takes seconds of a processor.
    folder = _postgres_folder()
    secret = folder / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    how = ("-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8")
    _as_user(folder, program("initdb"), "-D", str(folder / "data"), *how, "--no-sync")
    return folder / "data"


def _postgres_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="imageway-postgres-", dir=_open_folder()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if (user := _other_user()) is not None:
        shutil.chown(folder, user)
    return folder


def _as_user(folder: Path, *command: str) -> None:
    subprocess.run(
        command, check=True, capture_output=True, user=_other_user(), cwd=folder
    )


def _other_user() -> str | None:
    # PostgreSQL refuses to run as root. Debian's package brings a user of its own.
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return "nobody"


def _open_folder() -> Path:
    # A folder for temporary files that others can walk to, if they have to.
    chosen = Path(tempfile.gettempdir())
    if _other_user() is None:
        return chosen
    ways = (chosen, *chosen.parents)
    return chosen if all(way.stat().st_mode & 0o001 for way in ways) else Path("/tmp")


@lru_cache(maxsize=1)
def _shared_postgres() -> PostgresServer:
    return PostgresServer.make()


def postgres_database() -> str:
    """Make an empty database in the PostgreSQL of this process; returns its URL."""
    return _shared_postgres().database()


@dataclass(slots=True)
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
            [
                program("redis-server"),
                *self.program_args,
                *where,
                *keeps,
                *secret,
                *self.options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + START_MAX_S
        while not self._answers():
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < until_s, "the server does not answer"
            time.sleep(0.02)

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


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_MAX_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < until_s, "the server does not listen"
        time.sleep(0.05)
