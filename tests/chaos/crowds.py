"""Crowds of clients that ask at a given rate, whatever they are answered.

They do not heed Retry-After: a crowd that hammers is the worst there is.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PATIENCE_S = 75.0
PATH = "/v1/images/generations"
BODY = json.dumps(
    {"model": "gpt-image-2", "prompt": "a crowd", "quality": "low", "size": "3:1"}
).encode()


@dataclass(frozen=True)
class Seen:
    """One answer, and what it took to get it. Status 0: there was none."""

    status: int
    took_s: float
    ended_s: float
    retry_after_s: int | None = None


@dataclass
class Asker:
    """A tenant that asks ``per_s`` times a second, or reads a ``path`` as often."""

    key: str
    per_s: float
    path: str | None = None
    seen: list[Seen] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(each.status for each in self.seen)

    def took_s(self, *statuses: int) -> list[float]:
        """How long the answers with these statuses took, the quickest first."""
        return sorted(each.took_s for each in self.seen if each.status in statuses)


Idle = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]


async def ask(origin: str, askers: Sequence[Asker], for_s: float) -> float:
    """Let all of them ask, and wait for the last answer, within bounds.

    Returns the moment (monotonic, s) at which they stopped asking.
    """
    idle: Idle = []
    begun_s = time.monotonic()
    calls: set[asyncio.Task[None]] = set()

    async def going_on(asker: Asker) -> None:
        for number in range(round(asker.per_s * for_s)):
            due_s = begun_s + number / asker.per_s
            await asyncio.sleep(due_s - time.monotonic())
            call = asyncio.create_task(_one(origin, asker, idle))
            calls.add(call)
            call.add_done_callback(calls.discard)

    try:
        await asyncio.gather(*(going_on(asker) for asker in askers))
        stopped_s = time.monotonic()
        await asyncio.wait(calls, timeout=PATIENCE_S)
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        for writer in idle:
            writer[1].close()
            with suppress(OSError):
                await writer[1].wait_closed()
    return stopped_s


async def _one(origin: str, asker: Asker, idle: Idle) -> None:
    begun_s = time.monotonic()
    try:
        reader, writer = await _connected(origin, idle)
    except OSError:
        asker.seen.append(Seen(0, time.monotonic() - begun_s, time.monotonic()))
        return
    try:
        body = BODY if asker.path is None else b""
        lines = [
            f"{'POST' if body else 'GET'} {asker.path or PATH} HTTP/1.1",
            f"Host: {urlsplit(origin).netloc}",
            f"Authorization: Bearer {asker.key}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        answered_s = time.monotonic()
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        status = int(head.split(b" ", 2)[1])
        wait = re.search(rb"(?i)\r\nretry-after: *(\d+)", head)
        took_s = (answered_s if status != 200 else time.monotonic()) - begun_s
        asker.seen.append(
            Seen(status, took_s, time.monotonic(), int(wait[1]) if wait else None)
        )
    except (OSError, asyncio.IncompleteReadError):
        asker.seen.append(Seen(0, time.monotonic() - begun_s, time.monotonic()))
        writer.close()
    except asyncio.CancelledError:
        asker.seen.append(Seen(0, time.monotonic() - begun_s, time.monotonic()))
        writer.close()
        raise
    else:
        idle.append((reader, writer))


async def _connected(
    origin: str, idle: Idle
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while idle:
        reader, writer = idle.pop()
        if not reader.at_eof():
            return reader, writer
        writer.close()  # the server has closed it meanwhile
    parts = urlsplit(origin)
    return await asyncio.open_connection(parts.hostname, parts.port)
