"""Memory and processor time of another process, as the kernel counts them."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_EVERY_S = 0.02
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RESET_PEAK = "5"


@dataclass(frozen=True)
class Process:
    """A process that belongs to the same user."""

    pid: int

    def resident_bytes(self) -> int:
        """Tell how much of its memory is in use."""
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        """Tell the most that was in use since ``forget_peak``, exactly."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        """Start a new peak."""
        Path(f"/proc/{self.pid}/clear_refs").write_text(RESET_PEAK)

    def cpu_s(self) -> float:
        """Tell the processor time of all its threads so far, to 10 ms."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(stat[11]) + int(stat[12])) / TICKS_PER_S

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found, status
        return int(found[1]) * 1024


@dataclass
class Watch:
    """Watches a process's memory within a block; the figures stand after it."""

    process: Process
    before_bytes: int = 0
    sampled_peak_bytes: int = 0
    peak_bytes: int = 0
    cpu_s: float = 0.0
    took_s: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.process.forget_peak()
        self.before_bytes = self.process.resident_bytes()
        self.cpu_s = -self.process.cpu_s()
        self.took_s = -time.monotonic()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._thread is not None
        self._over.set()
        self._thread.join()
        self.took_s += time.monotonic()
        self.cpu_s += self.process.cpu_s()
        self.peak_bytes = self.process.peak_bytes()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_EVERY_S):
            now = self.process.resident_bytes()
            self.sampled_peak_bytes = max(self.sampled_peak_bytes, now)
