"""The folder in which an embedded gateway remembers everything."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

SECRET_BYTES = 32
DISK_FREE_MIN_BYTES = 256 * 1024 * 1024
WORKERS = "workers"


class DataDirError(Exception):
    """The folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One of ``of`` processes that share a data folder, counted from 0."""

    number: int
    of: int


@dataclass(frozen=True, slots=True)
class DataDir:
    """Paths and guards of a data folder.

    ``seat`` is that of one of several processes that share it: what cannot be shared it
    has in a folder of its own.
    """

    root: Path
    seat: Seat | None = None

    @property
    def own(self) -> Path:
        """Where is kept what only one process may use."""
        if self.seat is None:
            return self.root
        return self.root / WORKERS / str(self.seat.number)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "imageway.db"

    @property
    def results(self) -> Path:
        """Where pictures are kept."""
        return self.root / "results"

    @property
    def inputs(self) -> Path:
        """Where the pictures of async tasks are kept until these are over."""
        return self.root / "inputs"

    @property
    def uploads(self) -> Path:
        """Where files that tenants uploaded are kept."""
        return self.root / "uploads"

    @property
    def spool(self) -> Path:
        """Where pictures under way are spooled."""
        return self.own / "spool"

    @property
    def journal(self) -> Path:
        """Where is kept what the database could not take yet."""
        return self.own / "journal"

    @property
    def figures(self) -> Path:
        """Where several processes keep their metrics."""
        return self.root / "metrics"

    def left_behind(self) -> list[DataDir]:
        """Find what processes kept for themselves that are not started any more.

        Of several processes only the first is told.
        """
        mine = self.seat or Seat(0, 0)
        if mine.number:
            return []
        numbers = [path.name for path in self.root.glob(f"{WORKERS}/*")]
        seats = [Seat(int(name), 0) for name in numbers if name.isdecimal()]
        left = [DataDir(self.root, seat) for seat in seats if seat.number >= mine.of]
        return left if self.seat is None else [DataDir(self.root), *left]

    def prepare(self) -> None:
        """Make the folder, for the owner only, and see that it can be written.

        Raises:
            DataDirError: it cannot.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.own.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.results.mkdir(exist_ok=True)
            self.uploads.mkdir(exist_ok=True)
            self.inputs.mkdir(exist_ok=True)
            self.spool.mkdir(exist_ok=True)
            self.journal.mkdir(mode=0o700, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise DataDirError(
                f"cannot write to the data folder {self.root}: {error.strerror}. "
                "Choose another with --data-dir, or give this user the right to write."
            ) from error

    def secret(self) -> bytes:
        """Read the secret that keys and links depend on; made on first use.

        It is linked into its place whole, so that two processes that start together
        agree on one.
        """
        path = self.root / "secret.key"
        try:
            return self._secret(path)
        except (OSError, ValueError) as error:
            raise DataDirError(
                f"{path} cannot be used ({error}): put its backup back. Without it no "
                "key works."
            ) from error

    def _secret(self, path: Path) -> bytes:
        if not path.exists():
            fresh = self.root / f".secret-{os.getpid()}"
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return bytes.fromhex(path.read_text().strip())

    def lock(self) -> int:
        """Take the folder for this process; held until the process ends.

        Raises:
            DataDirError: another gateway uses it.
        """
        path = self.own / "serve.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise DataDirError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise DataDirError(
                f"another gateway already runs on {self.own}: a data folder serves "
                "one process, and so does SQLite. Stop it, or configure PostgreSQL "
                "and give each gateway a --data-dir of its own."
            ) from error
        return handle

    async def trouble(self) -> str | None:
        """Say what keeps pictures from being stored, if anything does.

        Folders that somebody removed are made again.
        """
        try:
            folders = (self.results, self.spool, self.uploads, self.inputs)
            for folder in folders:
                if os.access(folder, os.W_OK | os.X_OK):
                    continue
                folder.mkdir(exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    return f"{folder} cannot be written"
            # Each may be a disk of its own.
            free_bytes = min(shutil.disk_usage(f).free for f in (self.root, *folders))
        except OSError as error:
            return f"the data folder cannot be used: {error.strerror}"
        if free_bytes < DISK_FREE_MIN_BYTES:
            return f"only {free_bytes >> 20} MiB free on the disk of the data folder"
        return None
