"""Where chaos is played: a data folder, workers that share it, a receiver."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.adapters.logs import LogListener
from gateway.app import build_gateway, read_settings
from gateway.books import open_books
from gateway.core.requests import parse_generation
from gateway.flows.generate import Accepted, Later
from tests.chaos.receivers import ADDRESS, Receiver, receiving
from tests.e2e.gateways import Answer, command, environment, in_books, new_tenant
from tests.e2e.nursery import Process, started

UPSTREAM = """
[[upstream]]
name = "{name}"
kind = "{kind}"
base_url = "{base_url}"
credential = "file:{credential}"
failure_domain = "{name}"
max_concurrent = {slots}
options = {{ {options} }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = {dollars} }}
"""
HOOKS = """
[webhooks]
allow_networks = ["{address}/32"]
ports = ["{port}"]
tries_after_s = [1, 1, 1, 1, 1]
"""
CREDITS = "100000"
OPEN_AT_ONCE = 50
BODY = {"prompt": "a fox", "size": "3:1", "quality": "low"}


@dataclass(frozen=True)
class At:
    """An upstream of the stage; the first is the cheapest."""

    kind: str
    base_url: str
    options: str = ""
    slots: int = 64


@dataclass
class Stage:
    """A data folder with one tenant, its key, and whoever works on it."""

    folder: Path
    config: Path
    receiver: Receiver
    env: dict[str, str]
    workers: list[Process] = field(default_factory=list)

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def run(self, *args: str) -> Answer:
        """Run a command on the data folder."""
        options = ("--data-dir", str(self.data_dir), "--config", str(self.config))
        return command(*args, *options, cwd=None, **self.env)

    def rows(self, query: str, *values: str) -> list[Any]:
        """Look into the books, as another process would."""
        return self.receiver.rows(query, *values)

    def work(self, lease_ms: int, *more: str) -> Process:
        """Start a worker, and wait until it works."""
        args = (str(self.config), str(self.data_dir), str(lease_ms), *more)
        env = environment(**self.env)
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = started("tests.chaos.worker", args, env, log_file=log)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "works\n"
        self.workers.append(worker)
        return worker

    def open(self, count: int) -> list[str]:
        """Put tasks into the queue; returns their ids."""
        told = self.receiver.url
        return asyncio.run(
            opened(self.config, self.data_dir, "acme", count, callback_url=told)
        )

    def finished(self) -> int:
        """How many tasks are completed."""
        return int(
            self.rows("SELECT COUNT(*) FROM tasks WHERE state = 'completed'")[0][0]
        )


async def opened(
    config: Path, data_dir: Path, tenant_name: str, count: int, **fields: object
) -> list[str]:
    """Put tasks of a tenant into the queue, as the API does; returns their ids."""
    settings = read_settings(config, {"storage.data_dir": str(data_dir)})
    async with open_books(settings) as books:
        gateway = build_gateway(settings, books, LogListener())
        generate = gateway.runner.generate
        tenant = await books.accounts.tenant_named(tenant_name)
        assert tenant is not None
        (key,) = await books.accounts.keys(tenant.id)
        request = parse_generation(BODY | fields, gateway.catalogue)

        async def one() -> str:
            task_id = generate.new_task_id()
            later = Later("http://gateway.test")
            accepted = await generate.accept(task_id, request, key, later=later)
            assert isinstance(accepted, Accepted)
            return accepted.task.id

        ids: list[str] = []
        while len(ids) < count:
            batch = min(OPEN_AT_ONCE, count - len(ids))
            ids += await asyncio.gather(*(one() for _ in range(batch)))
        await gateway.close()
    return ids


@contextmanager
def stage(folder: Path, credential: str, *upstreams: At) -> Iterator[Stage]:
    """Set the stage; whoever still works on it at the end is killed."""
    with receiving(folder / "data" / "imageway.db", folder) as receiver:
        config, secret = folder / "gateway.toml", folder / "credential"
        secret.write_text(credential)
        secret.chmod(0o600)
        config.write_text(
            HOOKS.format(address=ADDRESS, port=receiver.port)
            + "".join(
                UPSTREAM.format(
                    name=f"upstream-{place}",
                    kind=at.kind,
                    base_url=at.base_url,
                    credential=secret,
                    options=at.options,
                    slots=at.slots,
                    dollars=f"0.0{place}",
                )
                for place, at in enumerate(upstreams, start=1)
            )
        )
        env = {"SSL_CERT_FILE": str(receiver.certificate)}
        set_up = Stage(folder, config, receiver, env)
        _, receiver.secret = in_books(
            lambda books: new_tenant(books, "acme", CREDITS), set_up.data_dir, config
        )
        try:
            yield set_up
        finally:
            for worker in set_up.workers:
                end(worker)


def end(worker: Process) -> None:
    """Kill a worker as a crash would."""
    if worker.poll() is None:
        os.kill(worker.pid, signal.SIGCONT)
        worker.kill()
        worker.wait()
    for pipe in (worker.stdout, worker.stderr):
        if pipe is not None:
            pipe.close()


def until(true: Callable[[], bool], *, at_most_s: float, pause_s: float = 0.05) -> None:
    """Wait until something is so."""
    end_s = time.monotonic() + at_most_s
    while not true():
        assert time.monotonic() < end_s, f"not in {at_most_s} s"
        time.sleep(pause_s)
