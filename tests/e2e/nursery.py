"""Gateways that start sooner: what they load is loaded once, each is a fork of that.

``python -m tests.e2e.nursery FD`` takes orders from a socket. Every gateway is a
process of its own, with its own arguments, environment and output, and runs the command
line from its beginning; to load it would take a second of a processor for each.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
LOADED = ("gateway.cli", "gateway.commands", "gateway.app", "gateway.serving")
"""What ``imageway serve`` loads, whatever its config says."""
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

    def wait(self, timeout: float) -> int:
        """Wait for its end; returns the exit code, which is -9 for SIGKILL."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("imageway", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout_s: float) -> int | None:
        if self._end is not None and select.select([self._end], [], [], timeout_s)[0]:
            self.returncode = int(self._end.recv(100))
            self._end.close()
            self._end = None
        return self.returncode


def born(args: Sequence[str], env: Mapping[str, str]) -> Child:
    """Run ``imageway`` with these arguments, in this environment and no other."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    order = json.dumps([list(args), dict(env)]).encode()
    socket.send_fds(_nursery(), [order], [its_out, its_err, its_end.fileno()])
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
    args, env = json.loads(order)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, number in ((out, 1), (err, 2)):
        os.dup2(place, number)
        os.close(place)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["imageway", *args]
    importlib.import_module("gateway.cli").main()


if __name__ == "__main__":
    main()
