"""What was kept while the store was away is booked when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from gateway.core.errors import OutcomeUnknownError, ServiceUnavailableError
from gateway.core.events import Journaled
from gateway.core.ledger import Balance, Settled
from gateway.flows.journal import WRITE_MAX_S, JournaledTasks
from gateway.ports import AttemptEnd, JobAccepted, Kept, NewTask, TaskEnd, TaskRecord
from tests.contract.stores import a_task, an_end
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
    unsure: bool = False
    """Whether an opening ends before it is known what became of it."""
    lost: bool = False
    """Whether the openings that are not sure are not there."""
    closed: bool = False
    """Whether others have closed the task before."""
    finished: list[str] = field(default_factory=list)

    async def finish(self, end: TaskEnd) -> Settled:
        await self._answer()
        if end.task_id == self.refused:
            raise ServiceUnavailableError("not this one")
        self.finished.append(end.task_id)
        return Settled(0 if self.closed else end.due_nanocredits)

    async def open(self, task: NewTask) -> str | None:
        await MemoryStore.open(self, task)
        if self.lost:
            del self.tasks[task.id]
        if self.unsure:
            raise OutcomeUnknownError("cut off")
        return None

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


async def test_a_task_that_was_written_after_all_is_opened() -> None:
    store = Refusing(balance=Balance(posted=10**12), unsure=True)
    tasks = await replaying(store)

    assert await tasks.open(a_task("one")) is None

    assert tasks.journal.waiting == 0


async def test_a_task_that_is_not_there_is_closed_when_it_appears_later() -> None:
    store = Refusing(balance=Balance(posted=10**12), unsure=True, lost=True)
    tasks = await replaying(store)

    with pytest.raises(OutcomeUnknownError):
        await tasks.open(a_task("one"))

    assert tasks.journal.knows("one")


async def test_a_picture_that_others_gave_up_is_counted_as_a_loss() -> None:
    events = FakeEvents()
    store = Refusing(closed=True)
    tasks = JournaledTasks(store, MemoryJournal(), StillClock(), events)

    settled = await tasks.finish(an_end("one"))

    assert settled.charged == 0
    assert events.seen == [Journaled("one", "TaskEnd", "too_late")]
