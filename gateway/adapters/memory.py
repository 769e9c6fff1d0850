"""How much memory the process uses, and how it gives back what it no longer does.

The C library keeps what large bodies needed, in pieces too scattered to be returned
by themselves.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

STATM = Path("/proc/self/statm")
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def trimmer() -> Callable[[], object]:
    """Find the call that gives free memory back; does nothing where there is none."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None  # not glibc
    return lambda: trim(0)


def memory_gauge() -> Callable[[], float]:
    """Find what tells how much of its memory this process uses, from 0 to 1.

    Always 0 where the system does not say.
    """
    limit_bytes, page_bytes = _limit_bytes(), os.sysconf("SC_PAGE_SIZE")

    def share() -> float:
        try:
            resident_pages = int(STATM.read_bytes().split()[1])
        except OSError:
            return 0.0
        return resident_pages * page_bytes / limit_bytes

    return share


def _limit_bytes() -> int:
    # Of the container, if that has one: else of the machine.
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        try:
            limit = min(limit, int(path.read_text()))
        except (OSError, ValueError):
            continue  # there is none, or it says "max"
    return limit
