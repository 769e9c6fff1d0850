"""Gives memory that is no longer used back to the system.

The C library keeps what large bodies needed, in pieces too scattered to be returned
by themselves.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def trimmer() -> Callable[[], object]:
    """Find the call that gives free memory back; does nothing where there is none."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda: None  # not glibc
    return lambda: trim(0)
