"""Real engines for tests: started on private ports and folders, ended with the run.

One PostgreSQL serves a whole test process; each test has a database of its own in it.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

START_MAX_S = 60
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
        package = "redis-server" if name.startswith("redis") else "postgresql"
        message = (
            f"{name} is not installed. make test installs it where it may; elsewhere "
            f"install PostgreSQL and Redis (Debian: apt-get install {package})"
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
        folder = Path(tempfile.mkdtemp(prefix="imageway-postgres-", dir=_open_folder()))
        server = cls(folder, free_port(), durable)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(server.kill)
        (folder / "password").write_text(PASSWORD)
        if (user := _other_user()) is not None:
            ids = pwd.getpwnam(user)
            for path in (folder, folder / "password"):
                os.chown(path, ids.pw_uid, ids.pw_gid)
        made = ("-D", str(folder / "data"), "-U", USER, "--auth=scram-sha-256")
        subprocess.run(
            [program("initdb"), *made, f"--pwfile={folder / 'password'}", "-E", "UTF8"],
            check=True,
            capture_output=True,
            user=user,
            cwd=folder,
        )
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
        subprocess.run(
            [program("pg_ctl"), "-D", str(self.folder / "data"), *STOP],
            check=True,
            capture_output=True,
            user=_other_user(),
            cwd=self.folder,
        )
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


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_MAX_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < until_s, "the server does not listen"
        time.sleep(0.05)
