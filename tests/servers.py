"""Real engines for tests: started on private ports and folders, ended with the run.

One PostgreSQL serves a whole test process; each test has a database of its own in it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import pytest

START_MAX_S = 60
USER = "imageway"
PASSWORD = "test-only"

_number = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """Find an engine's program; without it a test is skipped, in CI it fails."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        message = f"{name} is not installed: make test installs it where it may"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@lru_cache(maxsize=1)
def postgres_url() -> str:
    """Start a PostgreSQL once; returns the URL of its first database."""
    folder = Path(tempfile.mkdtemp(prefix="imageway-postgres-"))
    port = free_port()
    (folder / "password").write_text(PASSWORD)
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
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
    options = {
        "port": str(port),
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(folder),
        "max_connections": "200",
        "fsync": "off",  # what is tested is not the disk
    }
    server = subprocess.Popen(
        [program("postgres"), "-D", str(folder / "data")]
        + [
            part
            for name, value in options.items()
            for part in ("-c", f"{name}={value}")
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user,
        cwd=folder,
    )
    atexit.register(_end, server, folder)
    url = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
    _wait_for_port(port, server)
    return url


def postgres_database() -> str:
    """Make an empty database; returns its URL."""
    url = postgres_url()
    name = f"test_{os.getpid()}_{next(_number)}"
    until_s = time.monotonic() + START_MAX_S
    while True:
        made = subprocess.run(
            [program("psql"), url, "-qc", f"CREATE DATABASE {name}"],
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode == 0:
            return url.removesuffix("postgres") + name
        # It listens before it can serve.
        assert time.monotonic() < until_s, made.stderr
        time.sleep(0.1)


def _wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + START_MAX_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < until_s, "the server does not listen"
        time.sleep(0.05)


def _end(server: subprocess.Popen[bytes], folder: Path) -> None:
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
