"""Who reloads when, and what is told of it."""

from __future__ import annotations

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


async def test_who_starts_after_an_asking_has_read_the_files_already() -> None:
    reloads = MemoryReloads()
    await reloads.ask()
    late = process(reloads, "late")

    await late.reload.begin()
    await late.reload.look()

    assert late.files.read == 0


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
