"""Server-sent events: what goes out, and what is let go when nobody reads."""

from __future__ import annotations

import asyncio
from typing import Any

from litestar.types import Message

from gateway.api.events import EventStream, send_events
from gateway.core.catalogue import Operation
from gateway.flows.tasks import Facts, TaskView
from providers.kit.contract import Partial
from tests.fakes import FakePayload, a_picture

FACTS = Facts("opaque", "png", "low", "1024x1024")


def a_look(index: int = 0) -> tuple[Partial, FakePayload]:
    image = a_picture()
    assert isinstance(image.payload, FakePayload)
    return Partial(index, image), image.payload


async def test_looks_that_come_after_the_client_left_are_let_go_at_once() -> None:
    events = EventStream(Operation.GENERATE, FACTS, 0)
    before, waiting = a_look()
    events.on_partial(before)

    events.close()
    after, late = a_look(1)
    events.on_partial(after)

    assert waiting.closed
    assert late.closed
    assert events.take() == []


async def test_a_reader_that_is_far_behind_loses_the_oldest_looks() -> None:
    events = EventStream(Operation.GENERATE, FACTS, 0)
    looks = [a_look(i) for i in range(40)]
    for partial, _ in looks:
        events.on_partial(partial)

    assert [payload.closed for _, payload in looks] == [True] * 8 + [False] * 32
    assert [partial.index for partial in events.take()] == list(range(8, 40))


async def test_a_look_that_cannot_be_sent_takes_the_others_with_it() -> None:
    events = EventStream(Operation.GENERATE, FACTS, 0)
    looks = [a_look(i) for i in range(3)]
    for partial, _ in looks:
        events.on_partial(partial)

    async def broken(message: Message) -> None:
        raise ConnectionError

    never: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    task: asyncio.Task[TaskView] = asyncio.create_task(_forever())
    try:
        await send_events(broken, events, task, never, "req")
    except ConnectionError:
        pass
    finally:
        task.cancel()

    assert all(payload.closed for _, payload in looks)


async def _forever() -> TaskView:
    await asyncio.Event().wait()
    raise AssertionError
