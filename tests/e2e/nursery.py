"""Gateways that start sooner: what they load is loaded once, each is a fork of that.

``python -m tests.e2e.nursery FD`` takes orders from a socket. Every gateway is a
process of its own, with its own arguments, environment and output, and runs its module
from the beginning; to load it would take a second of a processor for each.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
LOADED = ("gateway.cli", "gateway.commands", "gateway.app", "gateway.serving")
"""What ``imageway serve`` loads, whatever its config says; none of it has threads."""
ORDER_MAX_BYTES = 100_000


@dataclass
class Child:
    """A process from the nursery: of a ``Popen`` what a gateway needs."""

    pid: int
    stdout: IO[str]
    stderr: IO[str]
    returncode: int | None = None
    _end: socket.socket | None = None

    def poll(self) -> int | None:
        """Return the exit code if it has ended."""
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code, which is -9 for SIGKILL."""
        code = self._look(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a gateway", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout_s: float | None) -> int | None:
        if self._end is not None and select.select([self._end], [], [], timeout_s)[0]:
            self.returncode = int(self._end.recv(100))
            self._end.close()
            self._end = None
        return self.returncode


Process = subprocess.Popen[str] | Child


def started(
    module: str,
    args: Sequence[str],
    env: Mapping[str, str],
    *,
    log_file: Path | None = None,
    fresh: bool = False,
) -> Process:
    """Run ``python -m`` with these arguments, in this environment and no other.

    What it logs goes into the ``log_file``, or else is to be read. It is of the
    nursery, where there can be one, unless it is to be ``fresh``.
    """
    with ExitStack() as opened:
        log = opened.enter_context(log_file.open("wb")) if log_file else None
        if sys.platform == "linux" and not fresh:
            return _born(json.dumps([module, list(args), dict(env)]), log)
        return subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdout=subprocess.PIPE,
            stderr=log or subprocess.PIPE,
            text=True,
            env=dict(env),
        )


def _born(order: str, log: IO[bytes] | None) -> Child:
    out, its_out = os.pipe()
    err, its_err = os.pipe()
    end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [its_out, log.fileno() if log else its_err, its_end.fileno()]
    socket.send_fds(_nursery(), [order.encode()], fds)
    its_end.close()
    os.close(its_out)
    os.close(its_err)
    pid = int(end.recv(100))
    return Child(pid, os.fdopen(out), os.fdopen(err), _end=end)


@lru_cache(maxsize=1)
def _nursery() -> socket.socket:
    orders, its_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    place = its_orders.fileno()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.nursery", str(place)],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        pass_fds=[place],
    )
    its_orders.close()
    atexit.register(process.wait)
    atexit.register(orders.close)
    return orders


def main() -> None:
    """Take orders until nobody is there to give them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in LOADED:
        importlib.import_module(module)
    orders = socket.socket(fileno=int(sys.argv[1]))
    while True:
        order, places, _, _ = socket.recv_fds(orders, ORDER_MAX_BYTES, 3)
        if not order:
            return
        if os.fork() == 0:
            orders.close()
            _watch(order, *places)
            return
        for place in places:
            os.close(place)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(order: bytes, out: int, err: int, place: int) -> None:
    # The gateway is a child of this process, which has only to tell of its end.
    end = socket.socket(fileno=place)
    pid = os.fork()
    if pid == 0:
        end.close()
        _become(order, out, err)
        return
    os.close(out)
    os.close(err)
    end.send(str(pid).encode())
    _, status = os.waitpid(pid, 0)
    end.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(order: bytes, out: int, err: int) -> None:
    module, args, env = json.loads(order)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, number in ((out, 1), (err, 2)):
        os.dup2(place, number)
        os.close(place)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
