"""The journal on the disk: everything in order, nothing forgotten before its time."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gateway.adapters.journal import DiskJournal, UnreadableError
from gateway.core.errors import ServiceUnavailableError
from gateway.ports import JobAccepted
from tests.contract.stores import a_lost_attempt, a_result, a_won_attempt, an_end

ENTRIES = (
    JobAccepted("task-1", 1, "job-1", '{"prompt":"a fox"}', fence=3),
    a_lost_attempt("task-2"),
    an_end("task-1", attempts=(a_won_attempt(),), results=(a_result(),)),
)


async def test_what_is_kept_is_there_in_order_after_a_restart(tmp_path: Path) -> None:
    journal = DiskJournal.open(tmp_path)
    for entry in ENTRIES[:2]:
        await journal.keep(entry)
    later = DiskJournal.open(tmp_path)
    await later.keep(ENTRIES[2])

    assert tuple(kept.entry for kept in await later.kept()) == ENTRIES
    assert later.waiting == len(ENTRIES)
    assert later.knows("task-1")
    assert not later.knows("task-3")


async def test_a_task_is_known_until_its_last_entry_is_dropped(tmp_path: Path) -> None:
    journal = DiskJournal.open(tmp_path)
    for entry in ENTRIES:
        await journal.keep(entry)
    job, lost, end = await journal.kept()

    await journal.drop(job)
    assert journal.knows("task-1")
    await journal.drop(end)
    assert not journal.knows("task-1")
    await journal.drop(lost)

    assert journal.waiting == 0
    assert not list(tmp_path.iterdir())


async def test_what_was_not_written_whole_was_not_kept(tmp_path: Path) -> None:
    (tmp_path / "000000000001-1.part").write_text('["task_end",{"ta')

    assert DiskJournal.open(tmp_path).waiting == 0
    assert not list(tmp_path.iterdir())


async def test_a_damaged_entry_is_not_passed_over(tmp_path: Path) -> None:
    await DiskJournal.open(tmp_path).keep(ENTRIES[0])
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-9])

    with pytest.raises(UnreadableError, match=path.name):
        DiskJournal.open(tmp_path)


async def test_a_disk_that_takes_nothing_is_said_so(tmp_path: Path) -> None:
    journal = DiskJournal(tmp_path / "gone")

    with pytest.raises(ServiceUnavailableError):
        await journal.keep(ENTRIES[0])

    assert journal.waiting == 0


async def test_a_full_disk_gets_no_fuller_with_every_try(tmp_path: Path) -> None:
    journal = DiskJournal.open(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(ServiceUnavailableError):
            await journal.keep(ENTRIES[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert not list(tmp_path.iterdir())


async def test_entries_are_for_nobody_elses_eyes(tmp_path: Path) -> None:
    await DiskJournal.open(tmp_path).keep(ENTRIES[0])

    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
