"""Work that tells of its progress, and whoever listens, do not disturb each other."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from providers.kit.contract import Done, FailureKind, MadeImage, Partial, ProviderError
from providers.kit.streams import Emit, relayed
from tests.fakes import FakePayload


def a_look(index: int = 0) -> Partial:
    return Partial(index, MadeImage(FakePayload(b"x"), "image/png", 1, 1))


def is_closed(look: Partial) -> bool:
    assert isinstance(look.image.payload, FakePayload)
    return look.image.payload.closed


async def test_what_is_told_comes_in_order_and_is_the_readers() -> None:
    looks = [a_look(index) for index in range(3)]

    async def work(emit: Emit) -> None:
        for look in looks:
            emit(look)
            await asyncio.sleep(0)

    assert [item async for item in relayed(work)] == looks
    assert not any(map(is_closed, looks))


async def test_a_failure_comes_after_what_was_told_before() -> None:
    look = a_look()
    seen: list[Partial | Done] = []

    async def work(emit: Emit) -> None:
        emit(look)
        raise ProviderError(FailureKind.OVERLOADED, "no")

    async def listen() -> None:
        async for item in relayed(work):
            seen.append(item)  # noqa: PERF401 - it raises in between

    with pytest.raises(ProviderError):
        await listen()
    assert seen == [look]


async def test_leaving_early_stops_the_work_and_closes_what_nobody_took() -> None:
    first, second, third = a_look(), a_look(), a_look()
    done = Done((third.image,), None)
    stopped: list[bool] = []

    async def work(emit: Emit) -> None:
        emit(first)
        emit(second)
        emit(done)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    async with aclosing(relayed(work)) as made:
        assert await anext(made) is first
    assert stopped == [True]
    assert [is_closed(look) for look in (first, second, third)] == [False, True, True]


async def test_a_failure_that_nobody_waits_for_disturbs_nobody() -> None:
    async def work(emit: Emit) -> None:
        emit(a_look())
        raise ProviderError(FailureKind.OVERLOADED, "no")

    async with aclosing(relayed(work)) as made:
        await anext(made)
        await asyncio.sleep(0)


async def test_the_deadline_of_the_work_never_interrupts_the_reader() -> None:
    async def work(emit: Emit) -> None:
        emit(a_look())
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    async def listen() -> None:
        async for _ in relayed(work):
            await asyncio.sleep(0.02)

    with pytest.raises(TimeoutError):
        await listen()
