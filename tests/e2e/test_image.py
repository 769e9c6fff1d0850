"""The image's install steps, carried out in a clean folder, and what comes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.images import ROOT, Image, allowed, read_steps

START_MAX_S = 120
NOBODY = 10_001
"""The user of the image."""
PORT_OF_IMAGE = 8080


@pytest.fixture
def image() -> Iterator[Image]:
    """The image as a folder, nothing in it may be written afterwards."""
    if shutil.which("npm") is None and not os.environ.get("CI"):
        pytest.skip("npm is not installed: the image is built with it")
    folder = Path(tempfile.mkdtemp(prefix="imageway-image-"))
    folder.chmod(0o755)  # another user is to look into it
    try:
        image = Image(folder / "root", _base_python())
        image.root.mkdir()
        image.build()
        _lock(image.place("/opt"))
        yield image
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(folder)], check=False)
        shutil.rmtree(folder)


def _base_python() -> str:
    """Find what stands for the base image's Python: one that another user may run."""
    asked = ["python3.13", "/usr/bin/python3", sys.executable]
    usable = [found for each in asked if (found := shutil.which(each)) and _fits(found)]
    shared = [found for found in usable if _runs_as_nobody(found)]
    return (shared or usable)[0]


def _fits(python: str) -> bool:
    needs = "import sys, venv, ensurepip, pip; sys.exit(sys.version_info < (3, 11))"
    done = subprocess.run([python, "-c", needs], check=False, capture_output=True)
    return done.returncode == 0


def _runs_as_nobody(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", ""], check=False, **_as_nobody())
    except OSError:
        return False
    return done.returncode == 0


def _as_nobody() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []}


def _lock(folder: Path) -> None:
    subprocess.run(["chmod", "-R", "a-w", str(folder)], check=True)


@dataclass
class Container:
    """The image's command, run as its user with its environment and its volume."""

    image: Image
    port: int

    def __post_init__(self) -> None:
        data = self.image.env["IMAGEWAY_DATA_DIR"]
        as_nobody = _as_nobody() if _runs_as_nobody(self.image.python) else {}
        if as_nobody:
            shutil.chown(self.image.place(data), NOBODY, NOBODY)
        self.options: dict[str, Any] = as_nobody | {
            "cwd": self.image.place(data),
            "env": self.image.env
            | {
                "PATH": f"{self.image.place('/opt/imageway/bin')}:/usr/bin:/bin",
                "IMAGEWAY_DATA_DIR": str(self.image.place(data)),
                "IMAGEWAY__SERVER__HOST": "127.0.0.1",
                "IMAGEWAY__SERVER__PORT": str(self.port),
                "TMPDIR": str(self.image.place("/opt")),
            },
            "text": True,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def is_healthy(self) -> bool:
        """Run the image's health check."""
        command = [*self.image.command("HEALTHCHECK"), "--url", self.url]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            timeout=START_MAX_S,
            **self.options,
        )
        return done.returncode == 0


def free_port() -> int:
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def listed(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
    }


@pytest.mark.timeout(600)
def test_what_the_image_holds_serves_as_nobody_with_nothing_to_write_but_its_volume(
    image: Image,
) -> None:
    container = Container(image, free_port())
    before = listed(image.place("/opt"))
    assert not container.is_healthy()

    running = subprocess.Popen(
        image.command("CMD"), stderr=subprocess.PIPE, **container.options
    )
    try:
        end = time.monotonic() + START_MAX_S
        while not container.is_healthy():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < end
            time.sleep(0.2)
        ready = httpx.get(f"{container.url}/health/ready")
        front = httpx.get(container.url)
        owner = Path(f"/proc/{running.pid}").stat().st_uid
    finally:
        running.send_signal(getattr(signal, image.facts["STOPSIGNAL"]))
        _, logged = running.communicate(timeout=30)

    assert set(ready.json()["checks"].values()) == {"ok"}
    assert '<script type="module"' in front.text
    assert running.returncode == 0, logged
    assert listed(image.place("/opt")) == before
    data = image.place(image.env["IMAGEWAY_DATA_DIR"])
    assert (data / "imageway.db").exists()
    if _runs_as_nobody(image.python):
        assert owner == (NOBODY if os.geteuid() == 0 else os.geteuid())
    check_contents(container)


def check_contents(container: Container) -> None:
    """See that the gateway is installed there, whole, and nothing with it."""
    image = container.image
    python = str(image.place("/opt/imageway/bin/python"))
    asked = "import gateway, pathlib; print(pathlib.Path(gateway.__file__).parent)"
    found = subprocess.run(
        [python, "-c", asked], capture_output=True, check=True, **container.options
    )
    package = Path(found.stdout.strip())
    site = package.parent
    there = {str(path.relative_to(site)) for path in site.rglob("*")}
    sources = {
        str(path.relative_to(ROOT))
        for name in ("gateway", "providers")
        for path in (ROOT / name).rglob("*.py")
    }

    assert package.is_relative_to(image.place("/opt/imageway"))
    assert sources <= there
    assert "gateway/default_config/catalogue.toml" in there
    assert not {"tests", "pip", "pytest", "hatchling"} & there


def test_nothing_goes_into_the_build_but_what_is_named() -> None:
    ignore = (ROOT / ".dockerignore").read_text()

    for secret in (
        ".env",
        "data/secret.key",
        ".git/config",
        "tests/fakes.py",
        "requirements/dev.txt",
        "web/node_modules/vite/package.json",
        "gateway/pages/index.html",
        "gateway/__pycache__/app.cpython-311.pyc",
    ):
        assert not allowed(secret, ignore), secret
    for wanted in (
        "gateway/app.py",
        "config/gateway.toml",
        "requirements/run.txt",
        "gateway/adapters/sql/tasks.py",
        "pyproject.toml",
        "web/src/main.tsx",
    ):
        assert allowed(wanted, ignore), wanted


def test_the_image_is_run_by_a_user_without_rights_and_stopped_kindly() -> None:
    steps = read_steps((ROOT / "Dockerfile").read_text())
    last = max(n for n, step in enumerate(steps) if step.word == "FROM")
    said = {step.word: step.rest for step in steps[last:]}

    assert said["USER"] == f"{NOBODY}:{NOBODY}"
    assert said["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(said["CMD"]) == ["imageway", "serve"]
    assert said["EXPOSE"] == str(PORT_OF_IMAGE)
    assert "curl" not in " ".join(said.values())
    bases = {step.rest.partition(" ")[0] for step in steps if step.word == "FROM"}
    python, node = sorted(bases, reverse=True)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", python)
    assert re.fullmatch(r"node:20\.\d+\.\d+-bookworm-slim", node)
