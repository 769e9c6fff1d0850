"""How a process goes away: what goes on until when, and what is done in any case."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import pytest
from litestar.types import Receive, Scope, Send

from gateway.api.front import Front
from gateway.api.http import send_answer
from gateway.serving import DRAIN_MAX_S, Leaving, listen, serve
from tests.fakes import FakeChance, FakeEvents, StillClock


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    await send_answer(send, 200, {}, b"")


@dataclass
class Notes:
    """Something served that notes what becomes of it."""

    seen: list[str] = field(default_factory=list)
    broken: str = ""
    """What of it ends with an error."""
    never_drained: bool = False
    app: Any = nothing
    leaving: Leaving = field(default_factory=lambda: Leaving(lambda: 0))
    leaving_s: float = 0.0

    def reload_soon(self) -> None:
        self.seen.append("to be reloaded")

    async def run(self) -> None:
        try:
            self._note("runs")
            await asyncio.Event().wait()
        finally:
            self.seen.append("runs no more")

    async def leave(self) -> None:
        await asyncio.sleep(0)
        self._note("left")

    async def drain(self) -> None:
        await asyncio.sleep(0)
        self._note("drained")
        if self.never_drained:
            await asyncio.Event().wait()

    async def close(self) -> None:
        self.seen.append("closed")

    def _note(self, what: str) -> None:
        self.seen.append(what)
        if what == self.broken:
            raise ValueError(what)


async def served(notes: Notes, drain_max_s: float = DRAIN_MAX_S) -> list[str]:
    """Serve until told to stop, which is as soon as it is ready."""
    await serve(
        notes,
        listen("127.0.0.1", 0),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
        drain_max_s=drain_max_s,
    )
    return notes.seen


async def test_what_goes_on_beside_requests_does_until_all_is_drained() -> None:
    seen = await served(Notes())

    assert seen == ["runs", "left", "drained", "runs no more", "closed"]


async def test_nobody_is_waited_for_after_the_deadline() -> None:
    seen = await served(Notes(never_drained=True), drain_max_s=1.0)

    assert seen[-2:] == ["runs no more", "closed"]


@pytest.mark.parametrize("broken", ["runs", "left", "drained"])
async def test_an_error_on_the_way_is_told_and_all_is_closed(broken: str) -> None:
    notes = Notes(broken=broken)

    with pytest.raises(ValueError, match=broken):
        await served(notes)

    assert notes.seen[-1] == "closed"
    assert "runs no more" in notes.seen


async def test_a_call_that_was_under_way_says_that_its_connection_ends() -> None:
    leaving = False

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal leaving
        leaving = True
        await send_answer(send, 200, {}, b"")

    crashes: list[BaseException] = []
    app = Front(
        slow,
        StillClock(),
        FakeChance(),
        FakeEvents(),
        lambda error, _: crashes.append(error),
        lambda: leaving,
    )
    transport = httpx.ASGITransport(cast("Any", app))
    async with httpx.AsyncClient(transport=transport) as client:
        answer = await client.get("http://gateway.test/")

    assert answer.headers["connection"] == "close"
    assert crashes == []
