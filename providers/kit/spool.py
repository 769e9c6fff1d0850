"""Bytes on their way through: a little in memory, the rest in a temporary file."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

MEMORY_MAX_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024
LIMIT_BYTES = 64 * 1024 * 1024

Encoding = Literal["base64", "raw"]


class SpoolLimitError(Exception):
    """More was written into a spool than it may hold."""


@dataclass(frozen=True, slots=True)
class SpoolFolder:
    """Where spools put their files. Each process needs a folder of its own."""

    path: Path

    def sweep(self) -> int:
        """Delete what an earlier process left behind, at start-up; returns how many.

        Makes the folder if it is not there.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        leftovers = list(self.path.glob("spool-*"))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        return len(leftovers)

    def open(self, encoding: Encoding, *, limit_bytes: int = LIMIT_BYTES) -> Spool:
        """Start an empty spool."""
        return Spool(self.path, encoding, limit_bytes)

    def from_bytes(self, content: bytes, encoding: Encoding = "raw") -> Spool:
        """Spool what is in memory already, whatever its size."""
        spool = self.open(encoding, limit_bytes=len(content))
        try:
            spool.append(content)
        except OSError:
            spool.close()  # a full disk needs the room
            raise
        return spool


class Spool:
    """A ``Payload`` that is written first, then read any number of times.

    The first read ends the writing. Whoever holds a spool closes it.
    """

    __slots__ = (
        "_encoding",
        "_file",
        "_folder",
        "_limit_bytes",
        "_memory",
        "_path",
        "_readable",
        "_size_bytes",
    )

    def __init__(self, folder: Path, encoding: Encoding, limit_bytes: int) -> None:
        self._folder = folder
        self._encoding: Encoding = encoding
        self._limit_bytes = limit_bytes
        self._memory: bytearray | None = bytearray()
        self._file: BinaryIO | None = None
        self._path: Path | None = None
        self._size_bytes = 0
        self._readable = False

    @property
    def encoding(self) -> Encoding:
        """How the content is encoded."""
        return self._encoding

    @property
    def size_bytes(self) -> int:
        """How much has been written."""
        return self._size_bytes

    def append(self, data: bytes) -> None:
        """Write on.

        Raises:
            SpoolLimitError: this would pass the limit; nothing of it was written.
            OSError: the file cannot be written (the disk is full, say).
        """
        assert not self._readable, "a spool is not written after it was read"
        if self._size_bytes + len(data) > self._limit_bytes:
            raise SpoolLimitError(f"more than {self._limit_bytes} bytes")
        if self._memory is not None:
            if self._size_bytes + len(data) <= MEMORY_MAX_BYTES:
                self._memory += data
                self._size_bytes += len(data)
                return
            self._move_to_file(bytes(self._memory))
        assert self._file is not None, "a closed spool"
        self._file.write(data)
        self._size_bytes += len(data)

    def chunks(self) -> Iterator[bytes]:
        """Yield the content from its start, at most ``CHUNK_BYTES`` at a time.

        Raises:
            ValueError: the spool is closed.
            OSError: the file cannot be read.
        """
        self._finish_writing()
        if self._memory is not None:
            memory = self._memory
            for at in range(0, len(memory), CHUNK_BYTES):
                yield bytes(memory[at : at + CHUNK_BYTES])
        elif self._path is not None:
            with self._path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        else:
            raise ValueError("the spool is closed")

    def persist(self, path: str) -> None:
        """Keep the content as a file of that path, in place of any that is there.

        The file appears whole or not at all; making it durable (fsync) is up to the
        caller. A link is made where the file system allows, else a copy.

        Raises:
            ValueError: the spool is closed.
            OSError: it cannot be written.
        """
        self._finish_writing()
        part = Path(f"{path}.part")
        part.unlink(missing_ok=True)
        if self._memory is not None:
            part.write_bytes(self._memory)
        elif self._path is not None:
            _link_or_copy(self._path, part)
        else:
            raise ValueError("the spool is closed")
        part.replace(path)
        # A rename between two links to one file does nothing, says POSIX.
        part.unlink(missing_ok=True)

    def close(self) -> None:
        """Give memory and file back."""
        self._readable = True
        self._memory = None
        file, self._file = self._file, None
        path, self._path = self._path, None
        if path is not None:
            path.unlink(missing_ok=True)
        if file is not None:
            # What is still buffered cannot be written on a full disk; nobody wants it.
            with contextlib.suppress(OSError):
                file.close()

    def _move_to_file(self, start: bytes) -> None:
        handle, name = tempfile.mkstemp(prefix="spool-", dir=self._folder)
        self._path = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._memory = None
        self._file.write(start)

    def _finish_writing(self) -> None:
        self._readable = True
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or one without links. A real trouble (no space, no
        # permission) shows again in the copy.
        shutil.copyfile(source, target)
