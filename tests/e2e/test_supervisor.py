"""The supervisor over programs that do what a gateway does while it starts."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.adapters.logs import LogListener
from gateway.serving import listen
from gateway.supervisor import Seat, Supervisor

SEEN_MAX_S = 20.0
SERVES = """
import os, pathlib, socket, sys
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
tie = socket.socket(fileno=int(sys.argv[5]))
tie.send(b"ready")
tie.recv(1)
"""
REFUSES = """
import os, sys, time
os.close(int(sys.argv[5]))
time.sleep(0.2)  # as it takes to end
raise SystemExit(78)
"""


@dataclass
class Machine:
    """What is started, one program after the other, and what is noted of it."""

    folder: Path
    texts: list[str | None]
    """None: the interpreter itself is missing."""
    out: io.StringIO = field(default_factory=io.StringIO)

    def run(self, seat: Seat) -> Sequence[str]:
        text = self.texts.pop(0)
        where = sys.executable if text else str(self.folder / "missing")
        return [where, "-c", text or "", str(self.folder / "pid"), *map(str, seat)]

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]

    @property
    def pid(self) -> str:
        """Of the last one that served."""
        return (self.folder / "pid").read_text()

    def kill(self) -> str:
        """Kill the one that serves; tells which that was."""
        killed = self.pid
        os.kill(int(killed), signal.SIGKILL)
        return killed


@asynccontextmanager
async def serving(machine: Machine) -> AsyncIterator[None]:
    ready, figures = asyncio.Event(), machine.folder / "metrics"
    supervisor = Supervisor(
        1, machine.run, listen("127.0.0.1", 0), figures, LogListener(machine.out)
    )

    async def is_ready() -> None:
        ready.set()

    task = asyncio.create_task(supervisor.serve(is_ready))
    async with asyncio.timeout(SEEN_MAX_S):
        await ready.wait()
        yield
        os.kill(os.getpid(), signal.SIGTERM)
        await task


async def another_than(machine: Machine, pid: str) -> None:
    while machine.pid in {pid, ""}:  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.02)


async def test_a_program_that_is_being_replaced_is_waited_for(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [SERVES, None, SERVES])
    async with serving(machine):
        await another_than(machine, machine.kill())

    noted = [note["event"] for note in machine.notes()]
    assert noted == ["worker_ended", "worker_not_started", "worker_ended"]


async def test_what_does_not_start_is_noted_with_its_own_code(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [SERVES, REFUSES, SERVES])
    async with serving(machine):
        await another_than(machine, machine.kill())

    codes = [note["code"] for note in machine.notes()]
    assert codes == [-signal.SIGKILL, 78]


async def test_of_the_dead_the_counters_are_kept_and_no_gauge(tmp_path: Path) -> None:
    machine = Machine(tmp_path, [SERVES, SERVES])
    figures = tmp_path / "metrics"
    async with serving(machine):
        for name in ("counter_0.db", "gauge_livemax_0.db", "gauge_livemax_1.db"):
            (figures / name).write_bytes(b"")
        await another_than(machine, machine.kill())

        left = {path.name for path in figures.iterdir()}
    assert left == {"counter_0.db", "gauge_livemax_1.db"}
