"""Who reloads when, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from gateway.core.errors import ConfigRefusedError, ServiceUnavailableError
from gateway.core.events import ConfigRead
from gateway.core.fleet import Notice, Topic
from gateway.flows.reload import AskToReload, ReloadConfig, Swapped
from gateway.ports import ReloadNote
from tests.fakes import FakeEvents, StillClock


@dataclass
class MemoryReloads:
    """``Reloads`` in memory; can be away."""

    number: int = 0
    away: bool = False
    kept: dict[str, ReloadNote] = field(default_factory=dict)

    async def ask(self) -> int:
        self._check()
        self.number += 1
        return self.number

    async def asked(self) -> int:
        self._check()
        return self.number

    async def note(self, process_id: str, number: int, problem: str | None) -> None:
        self._check()
        self.kept[process_id] = ReloadNote(process_id, number, problem)

    async def notes(self, *, alive_since_ms: int) -> Sequence[ReloadNote]:
        del alive_since_ms
        return list(self.kept.values())

    def _check(self) -> None:
        if self.away:
            raise ServiceUnavailableError("away")


@dataclass
class Files:
    """What a process reads when it reloads."""

    problems: list[str] = field(default_factory=list)
    read: int = 0

    async def swap(self) -> Swapped:
        self.read += 1
        if self.problems:
            raise ConfigRefusedError(self.problems)
        return Swapped(("offers",))


@dataclass
class Process:
    """One process of a fleet."""

    reload: ReloadConfig
    files: Files
    events: FakeEvents
    told: list[Notice]


def process(reloads: MemoryReloads, name: str) -> Process:
    files, events, told = Files(), FakeEvents(), list[Notice]()
    reload = ReloadConfig(reloads, name, files.swap, events, told.append)
    return Process(reload, files, events, told)


async def test_what_one_is_asked_for_every_other_does_once() -> None:
    reloads = MemoryReloads()
    one, other = process(reloads, "one"), process(reloads, "other")
    await other.reload.begin()

    await one.reload.everywhere()
    for _ in range(3):
        await one.reload.look()
        await other.reload.look()

    assert (one.files.read, other.files.read) == (1, 1)
    assert one.told == [Notice(Topic.CONFIG)]
    assert other.events.seen == [ConfigRead("reloaded", ("offers",))]


async def test_who_starts_while_others_are_asked_heeds_it_at_the_end_of_its_start() -> (
    None
):
    reloads = MemoryReloads()
    await reloads.ask()
    late = process(reloads, "late")

    await late.reload.begin()
    await late.reload.look()

    assert late.files.read == 1, "its configuration may be from before the asking"
    assert reloads.kept["late"].heeded == 1, "nobody waits for it"


async def test_where_nobody_ever_asked_the_start_reads_once() -> None:
    fresh = process(MemoryReloads(), "fresh")

    await fresh.reload.begin()

    assert fresh.files.read == 0


async def test_two_askings_at_once_are_each_told_what_became_of_their_own() -> None:
    reloads = MemoryReloads()
    one = process(reloads, "one")
    gate = asyncio.Event()
    swap = one.reload.swap

    async def slow() -> Swapped:
        swapped = await swap()
        await gate.wait()
        one.files.problems = ["broken meanwhile"]
        return swapped

    one.reload.swap = slow
    first = asyncio.create_task(one.reload.everywhere())
    await asyncio.sleep(0)
    second = asyncio.create_task(one.reload.everywhere())
    await asyncio.sleep(0)
    noted: list[ReloadNote] = []
    note = reloads.note

    async def noting(process_id: str, number: int, problem: str | None) -> None:
        noted.append(ReloadNote(process_id, number, problem))
        await note(process_id, number, problem)

    reloads.note = noting  # type: ignore[method-assign]
    gate.set()
    await asyncio.wait({first, second})

    assert first.result().changed == ("offers",)
    assert isinstance(second.exception(), ConfigRefusedError)
    assert noted == [
        ReloadNote("one", 1, None),
        ReloadNote("one", 2, "broken meanwhile"),
    ]


async def test_who_asks_is_told_even_if_a_look_was_faster() -> None:
    reloads = MemoryReloads()
    one = process(reloads, "one")
    ask = reloads.ask

    async def then_looks() -> int:
        number = await ask()
        await one.reload.look()
        return number

    reloads.ask = then_looks  # type: ignore[method-assign]

    assert (await one.reload.everywhere()).changed == ("offers",)
    assert one.files.read == 1


async def test_a_refusal_is_told_noted_and_not_tried_again_by_itself() -> None:
    reloads = MemoryReloads()
    one = process(reloads, "one")
    one.files.problems = ["server.prot: unknown key"]

    with pytest.raises(ConfigRefusedError) as refused:
        await one.reload.everywhere()
    await one.reload.look()

    assert refused.value.extra == {"problems": ["server.prot: unknown key"]}
    assert one.files.read == 1
    assert one.events.seen == [
        ConfigRead("refused", problem="server.prot: unknown key")
    ]
    assert reloads.kept["one"] == ReloadNote("one", 1, "server.prot: unknown key")


async def test_without_the_store_a_process_still_reloads_by_itself() -> None:
    reloads = MemoryReloads(away=True)
    one = process(reloads, "one")

    swapped = await one.reload.everywhere()

    assert swapped.changed == ("offers",)
    assert one.told == []


async def test_a_store_that_goes_away_meanwhile_spoils_nothing() -> None:
    reloads = MemoryReloads()
    one = process(reloads, "one")
    await reloads.ask()
    swap = one.reload.swap

    async def and_away() -> Swapped:
        reloads.away = True
        return await swap()

    one.reload.swap = and_away

    await one.reload.look()

    assert one.events.seen == [ConfigRead("reloaded", ("offers",))]


async def test_who_asks_learns_who_heeded_who_refused_and_who_is_late() -> None:
    reloads = MemoryReloads()
    one, other = process(reloads, "one"), process(reloads, "other")
    other.files.problems = ["broken"]
    reloads.kept["stuck"] = ReloadNote("stuck", None, None)

    async def announce(_: Notice) -> None:
        await one.reload.look()
        await other.reload.look()

    ask = AskToReload(reloads, StillClock(), announce)
    asked = await ask(alive_ms=30_000, wait_max_s=0)

    assert {note.process_id: note.problem for note in asked.done} == {
        "one": None,
        "other": "broken",
    }
    assert [note.process_id for note in asked.late] == ["stuck"]
