"""Pictures on the local disk, one file each, for as long as they are kept."""

from __future__ import annotations

import asyncio
import base64
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gateway.core.errors import storage_full
from providers.kit.contract import MadeImage, Payload
from providers.kit.payloads import raw_chunks, raw_length

RAW, AS_IT_CAME = ".raw", ".b64"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}")


@dataclass(frozen=True, slots=True)
class DiskBlob:
    """An open file of one picture."""

    file: BinaryIO
    size_bytes: int

    async def read(self, offset: int, length: int) -> bytes:
        """Read a part of the file, from the page cache as a rule."""
        self.file.seek(offset)
        return self.file.read(length)

    def close(self) -> None:
        """Give the file back."""
        self.file.close()


@dataclass(frozen=True, slots=True)
class DiskBlobs:
    """Implements ``BlobStore`` in a folder.

    A picture is either its file (``.raw``) or base64 text as an upstream sent it
    (``.b64``), which becomes the file when it is opened for the first time.
    """

    root: Path

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        """Store a picture.

        What was asked to be kept is on the disk for good when this returns. What is
        kept as it came survives the death of this process, not of the machine.

        Raises:
            ServiceUnavailableError: the disk does not take it.
        """
        path, payload = self._path(blob), image.payload
        if not as_it_came:
            return await self.keep_file(blob, payload)
        with _storing():
            path.parent.mkdir(parents=True, exist_ok=True)
            suffix = RAW if payload.encoding == "raw" else AS_IT_CAME
            payload.persist(f"{path}{suffix}")
            return raw_length(payload)

    async def keep_file(self, blob: str, content: Payload) -> int:
        """Store a file; it is on the disk for good when this returns.

        Raises:
            ServiceUnavailableError: the disk does not take it.
        """
        path = self._path(blob)
        with _storing():
            path.parent.mkdir(parents=True, exist_ok=True)
            return await asyncio.to_thread(_write, Path(f"{path}{RAW}"), content)

    async def open(self, blob: str) -> DiskBlob | None:
        """Open a stored picture."""
        if not _NAME.fullmatch(blob):
            return None
        raw = Path(f"{self._path(blob)}{RAW}")
        try:
            if not raw.exists():
                await asyncio.to_thread(
                    _decode_file, Path(f"{self._path(blob)}{AS_IT_CAME}"), raw
                )
            file = raw.open("rb")
        except FileNotFoundError:
            return None
        return DiskBlob(file, os.fstat(file.fileno()).st_size)

    async def delete(self, blob: str) -> None:
        """Forget a picture, and its task's folder with the last one."""
        path = self._path(blob)
        for suffix in (RAW, AS_IT_CAME):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        if path.parent == self.root:
            return
        try:
            path.parent.rmdir()
        except OSError:
            return  # others are left in it, or it is gone

    async def exists(self, blob: str) -> bool:
        """Tell whether a picture is there."""
        path = self._path(blob)
        return any(Path(f"{path}{suffix}").exists() for suffix in (RAW, AS_IT_CAME))

    async def expire(self, before_ms: int) -> int:
        """Delete folders and files that nothing was written to since; counts them."""
        return await asyncio.to_thread(_expire, self.root, before_ms)

    def _path(self, blob: str) -> Path:
        assert _NAME.fullmatch(blob), blob
        return self.root / blob


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_full() from error


def _write(path: Path, payload: Payload) -> int:
    # Written beside, then renamed: a name never stands for half a picture.
    partial = path.with_suffix(".part")
    size_bytes = 0
    try:
        with partial.open("wb") as file:
            for chunk in raw_chunks(payload):
                size_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise
    _sync_folder(path.parent)
    return size_bytes


def _decode_file(source: Path, target: Path) -> None:
    # Each reader decodes into a file of its own; whoever is first puts it in place, and
    # whoever finds the source gone finds the target there.
    try:
        encoded = source.open("rb")
    except FileNotFoundError:
        return
    handle, name = tempfile.mkstemp(prefix=f"{target.name}-", dir=target.parent)
    partial = Path(name)
    try:
        with encoded, os.fdopen(handle, "wb") as file:
            while text := encoded.read(64 * 1024):
                file.write(base64.b64decode(text + b"=" * (-len(text) % 4)))
        partial.rename(target)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk needs the room
        raise
    source.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _expire(root: Path, before_ms: int) -> int:
    if not root.exists():
        return 0
    old = [entry for entry in root.iterdir() if _written_ms(entry) < before_ms]
    for entry in old:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return len(old)


def _written_ms(entry: Path) -> float:
    try:
        return entry.stat().st_mtime_ns / 1_000_000
    except FileNotFoundError:
        return math.inf  # deleted meanwhile
