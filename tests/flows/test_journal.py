"""What was kept while the store was away is booked when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.core.errors import ServiceUnavailableError
from gateway.core.ledger import Settled
from gateway.flows.journal import WRITE_MAX_S, JournaledTasks
from gateway.ports import AttemptEnd, JobAccepted, Kept, TaskEnd, TaskRecord
from tests.contract.stores import an_end
from tests.fakes import FakeEvents, MemoryStore, StillClock

Entry = JobAccepted | AttemptEnd | TaskEnd


@dataclass
class MemoryJournal:
    """A ``Journal`` that lasts as long as the test."""

    entries: list[Kept] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        return len(self.entries)

    def knows(self, task_id: str) -> bool:
        return any(kept.entry.task_id == task_id for kept in self.entries)

    async def keep(self, entry: Entry) -> None:
        self.entries.append(Kept(f"{len(self.entries)}", entry))

    async def kept(self) -> Sequence[Kept]:
        return tuple(self.entries)

    async def drop(self, kept: Kept) -> None:
        self.entries.remove(kept)


@dataclass
class Refusing(MemoryStore):
    """A store that refuses a task, is away, or does not answer."""

    refused: str = ""
    away: bool = False
    silent: bool = False
    finished: list[str] = field(default_factory=list)

    async def finish(self, end: TaskEnd) -> Settled:
        await self._answer()
        if end.task_id == self.refused:
            raise ServiceUnavailableError("not this one")
        self.finished.append(end.task_id)
        return Settled(end.due_nanocredits)

    async def get(self, task_id: str) -> TaskRecord | None:
        await self._answer()
        return self.tasks.get(task_id)

    async def _answer(self) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if self.away:
            raise ServiceUnavailableError("away")


async def replaying(store: Refusing, *task_ids: str) -> JournaledTasks:
    journal = MemoryJournal()
    for task_id in task_ids:
        await journal.keep(an_end(task_id))
    return JournaledTasks(store, journal, StillClock(), FakeEvents())


async def test_an_entry_that_is_refused_keeps_no_other_task_waiting() -> None:
    store = Refusing(refused="two")
    tasks = await replaying(store, "one", "two", "two", "three")

    assert await tasks.replay() == 2

    assert store.finished == ["one", "three"]
    assert tasks.journal.waiting == 2
    store.refused = ""
    assert await tasks.replay() == 2
    assert store.finished == ["one", "three", "two", "two"]


async def test_a_store_that_is_away_is_asked_once_and_not_for_every_entry() -> None:
    store = Refusing(away=True)
    tasks = await replaying(store, "one", "two")

    assert await tasks.replay() == 0

    store.away = False
    assert await tasks.replay() == 2


async def test_a_store_that_does_not_answer_is_away() -> None:
    tasks = await replaying(Refusing(silent=True), "one", "two")

    async with asyncio.timeout(3 * WRITE_MAX_S):
        assert await tasks.replay() == 0

    assert tasks.journal.waiting == 2
