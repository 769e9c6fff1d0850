"""What could not be written into the database yet: a file each, fsynced, in order.

A file is renamed into its place whole, and removed once the database has what it says.
Nothing in it is needed after that.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gateway.core.errors import storage_full
from gateway.ports import AttemptEnd, JobAccepted, Kept, TaskEnd

KINDS: dict[str, type[AttemptEnd | JobAccepted | TaskEnd]] = {
    "job_accepted": JobAccepted,
    "attempt_end": AttemptEnd,
    "task_end": TaskEnd,
}
SUFFIX, PART = ".json", ".part"
MODE = 0o600


class UnreadableError(Exception):
    """A file of the journal is damaged; the message names it."""


@dataclass(slots=True)
class DiskJournal:
    """Implements ``Journal`` in a folder, which must be there."""

    root: Path
    _waiting: Counter[str] = field(default_factory=Counter)
    _last: int = 0

    @classmethod
    def open(cls, root: Path) -> DiskJournal:
        """Open what an earlier process left.

        Raises:
            UnreadableError: a file is damaged: what it says must not be forgotten.
        """
        journal = cls(root)
        for unfinished in root.glob(f"*{PART}"):
            unfinished.unlink()
        for path in sorted(root.glob(f"*{SUFFIX}")):
            journal._waiting[_read(path).entry.task_id] += 1
            journal._last = max(journal._last, int(path.stem.partition("-")[0]))
        return journal

    @property
    def waiting(self) -> int:
        """How many entries the database does not have yet."""
        return self._waiting.total()

    def knows(self, task_id: str) -> bool:
        """See ``Journal``."""
        return task_id in self._waiting

    async def keep(self, entry: JobAccepted | AttemptEnd | TaskEnd) -> None:
        """See ``Journal``."""
        self._last += 1
        name = f"{self._last:012d}-{os.getpid()}{SUFFIX}"
        kind = next(kind for kind, type_ in KINDS.items() if isinstance(entry, type_))
        body = msgspec.json.encode((kind, entry))
        self._waiting[entry.task_id] += 1
        try:
            await asyncio.shield(asyncio.to_thread(_write, self.root / name, body))
        except OSError as error:
            self._forget(entry.task_id)
            raise storage_full() from error

    async def kept(self) -> Sequence[Kept]:
        """See ``Journal``."""
        return await asyncio.to_thread(
            lambda: [_read(path) for path in sorted(self.root.glob(f"*{SUFFIX}"))]
        )

    async def drop(self, kept: Kept) -> None:
        """See ``Journal``."""
        path = self.root / kept.name
        await asyncio.to_thread(path.unlink, missing_ok=True)
        self._forget(kept.entry.task_id)

    def _forget(self, task_id: str) -> None:
        self._waiting[task_id] -= 1
        if self._waiting[task_id] <= 0:
            del self._waiting[task_id]


def _write(path: Path, body: bytes) -> None:
    unfinished = path.with_suffix(PART)
    try:
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, MODE)
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> Kept:
    try:
        kind, body = msgspec.json.decode(
            path.read_bytes(), type=tuple[str, msgspec.Raw]
        )
        return Kept(path.name, msgspec.json.decode(body, type=KINDS[kind]))
    except (OSError, KeyError, msgspec.MsgspecError) as error:
        raise UnreadableError(
            f"{path} cannot be read ({error}). It says what a task cost: put its "
            "backup back, or move it away and see to the task by hand."
        ) from error
