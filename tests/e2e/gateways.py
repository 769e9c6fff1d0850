"""A gateway as its operator runs it: a process of its own, its CLI, its HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from gateway.app import as_json, explained
from gateway.books import Books, open_books
from gateway.core.money import parse_nano
from gateway.flows.credits import balance_texts
from gateway.settings import load_settings
from tests.e2e.nursery import Process, started

T = TypeVar("T")
ADMIN_KEY = "admin-key-of-the-tests"
START_MAX_S = 30
STOP_MAX_S = 30
COMMAND = (sys.executable, "-m", "gateway")
ROOT = Path(__file__).parents[2]


@dataclass
class Answer:
    """What a command printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def environment(**more: str) -> dict[str, str]:
    """The environment of a machine on which nothing is set up."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("IMAGEWAY")}
    kept.pop("OPENAI_API_KEY", None)
    return kept | {"IMAGEWAY_ADMIN_KEY": ADMIN_KEY, "PYTHONPATH": str(ROOT)} | more


def command(*args: str, cwd: Path | None = None, **env: str) -> Answer:
    """Run the CLI to its end."""
    done = subprocess.run(
        [*COMMAND, *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
        env=environment(**env),
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def in_books(
    run: Callable[[Books], Awaitable[T]],
    data_dir: Path,
    config: Path | None = None,
    **env: str,
) -> T:
    """Do what a command does with the books, without the start of a process."""
    settings = load_settings(
        config,
        environment(**env),
        kinds=None,
        overrides={"storage.data_dir": str(data_dir)},
    )

    async def opened() -> T:
        async with open_books(settings) as books:
            return await run(books)

    with ThreadPoolExecutor(1) as aside:  # who asks may be in a loop already
        return aside.submit(asyncio.run, opened()).result()


async def new_tenant(books: Books, name: str, amount: str) -> tuple[str, str]:
    """Make a tenant with credits; returns a key and its webhook secret."""
    tenant = await books.tenants.create(name, nanocredits=parse_nano(amount))
    made = await books.keys.create(tenant)
    return made.secret, await books.webhooks.secret(made.key.id)


def configured(folder: Path, config: str, **env: str) -> LiveGateway:
    """Make a gateway in a folder, with a config and variables of its own."""
    path = folder / "gateway.toml"
    path.write_text(config)
    return LiveGateway(folder / "data", config=path, env=env)


@dataclass
class LiveGateway:
    """A gateway process over one data folder; can be killed and started again.

    It is of the nursery, unless it is to be ``fresh``: an interpreter of its own.
    """

    data_dir: Path
    config: Path | None = None
    env: dict[str, str] = field(default_factory=dict)
    url: str = ""
    first_key: str | None = None
    logs: list[str] = field(default_factory=list)
    log_file: Path | None = None
    module: str = "gateway"
    fresh: bool = False
    workers: int = 1
    _process: Process | None = None
    _collector: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it listens."""
        args = ["serve", "--port", "0", "--data-dir", str(self.data_dir)]
        if self.config is not None:
            args += ["--config", str(self.config)]
        if self.workers > 1:
            args += ["--workers", str(self.workers)]
        self._process = started(
            self.module,
            args,
            environment(**self.env),
            log_file=self.log_file,
            fresh=self.fresh or self.workers > 1,
        )
        self._collector = threading.Thread(target=self._collect_logs, daemon=True)
        self._collector.start()
        banner = self._banner()
        found = re.search(r"runs at (\S+)", banner)
        assert found, (banner, self.logs)
        self.url = found[1]
        key = re.search(r"iwk_live_\w+", banner)
        self.first_key = key[0] if key else self.first_key

    def stop(self) -> int:
        """Stop it as an operator does; returns its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return self._ended()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        assert self._process is not None
        return self._process.poll() is None

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        return self._ended()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._ended()

    def cli(self, *args: str) -> Answer:
        """Run a command against the same data folder and config."""
        options = ["--data-dir", str(self.data_dir)]
        if self.config is not None:
            options += ["--config", str(self.config)]
        done = command(*args, *options, cwd=None, **self.env)
        assert done.code == 0, done
        return done

    def in_books(self, run: Callable[[Books], Awaitable[T]]) -> T:
        """Do something with the books, beside the gateway."""
        return in_books(run, self.data_dir, self.config, **self.env)

    def tenant(self, name: str, amount: str = "1000") -> str:
        """Make a tenant with credits; returns a key of it."""
        key, _ = self.in_books(lambda books: new_tenant(books, name, amount))
        return key

    def balance(self, name: str) -> dict[str, str]:
        """Read a tenant's balance."""

        async def read(books: Books) -> dict[str, str]:
            tenant = await books.tenants.named(name)
            return balance_texts(await books.tenants.balance(tenant.id))

        return self.in_books(read)

    def explained(self, task_id: str) -> Any:
        """Read what ``routes explain`` tells of a task."""

        async def read(books: Books) -> str:
            record = await books.tasks.get(task_id)
            assert record is not None
            return as_json(explained(record))

        return json.loads(self.in_books(read))

    def client(self, key: str | None = None, **more: Any) -> httpx.Client:
        """An HTTP client that carries a key."""
        headers = {"authorization": f"Bearer {key or self.first_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **more)

    def sandbox(self, upstream: str, **settings: Any) -> dict[str, Any]:
        """Change how a sandbox upstream behaves."""
        with self.client(ADMIN_KEY) as admin:
            answer = admin.patch(f"/admin/v1/sandbox/{upstream}", json=settings)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert isinstance(found, dict)
        return found

    def bought(self, upstream: str) -> int:
        """Read how many jobs a sandbox upstream was given money for."""
        purchases = self.sandbox(upstream)["purchases"]
        return int(purchases["jobs"])

    def metric(self, name: str) -> dict[str, float]:
        """Read the samples of a metric, by their labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line.removeprefix(name) for line in lines if line.startswith(name)]
        split = [line.rsplit(" ", 1) for line in found]
        return {labels: float(value) for labels, value in split}

    def audit(self) -> dict[str, Any]:
        """Audit the books."""

        async def read(books: Books) -> dict[str, Any]:
            report = await books.audit()
            return {"clean": not report.drifts, **asdict(report)}

        return self.in_books(read)

    def _ended(self) -> int:
        assert self._process is not None
        assert self._collector is not None
        code = self._process.wait(STOP_MAX_S)
        if self._process.stdout is None or self._process.stdout.closed:
            return code
        self._collector.join(STOP_MAX_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def _banner(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(START_MAX_S, self._process.kill)
        watchdog.start()
        banner = ""
        for line in self._process.stdout:
            banner += line
            if "another key" in line or "    -d '" in line:
                break
        watchdog.cancel()
        return banner

    def _collect_logs(self) -> None:
        assert self._process is not None
        for line in self._process.stderr or ():
            self.logs.append(line)
