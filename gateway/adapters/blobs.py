"""Pictures on the local disk, one file each, for as long as they are kept."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gateway.core.errors import ServiceUnavailableError
from providers.kit.contract import MadeImage, Payload

RAW, AS_IT_CAME = ".raw", ".b64"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}")


@dataclass(frozen=True, slots=True)
class DiskBlob:
    """An open file of one picture."""

    file: BinaryIO
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Read a part of the file."""
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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if as_it_came:
                suffix = RAW if payload.encoding == "raw" else AS_IT_CAME
                payload.persist(f"{path}{suffix}")
                return _decoded_bytes(payload)
            return await asyncio.to_thread(_write, Path(f"{path}{RAW}"), payload)
        except OSError as error:
            raise ServiceUnavailableError(
                "The gateway cannot store pictures at the moment. Try again later.",
                code="storage_unavailable",
                retry_after_s=30,
            ) from error

    async def open(self, blob: str) -> DiskBlob | None:
        """Open a stored picture."""
        if not _NAME.fullmatch(blob):
            return None
        raw = Path(f"{self._path(blob)}{RAW}")
        try:
            if not raw.exists():
                await asyncio.to_thread(_decode_file, raw.with_suffix(AS_IT_CAME), raw)
            file = raw.open("rb")
        except FileNotFoundError:
            return None
        return DiskBlob(file, os.fstat(file.fileno()).st_size)

    async def delete(self, blob: str) -> None:
        """Forget a picture, and its task's folder with the last one."""
        path = self._path(blob)
        for suffix in (RAW, AS_IT_CAME):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        try:
            path.parent.rmdir()
        except OSError:
            return  # others are left in it, or it is gone

    async def exists(self, blob: str) -> bool:
        """Tell whether a picture is there."""
        path = self._path(blob)
        return any(Path(f"{path}{suffix}").exists() for suffix in (RAW, AS_IT_CAME))

    async def expire(self, before_ms: int) -> int:
        """Delete the folders that nothing was written to since; returns how many."""
        return await asyncio.to_thread(_expire, self.root, before_ms)

    def _path(self, blob: str) -> Path:
        assert _NAME.fullmatch(blob), blob
        return self.root / blob


def _write(path: Path, payload: Payload) -> int:
    # Written beside, then renamed: a name never stands for half a picture.
    partial = path.with_suffix(".part")
    size_bytes = 0
    with partial.open("wb") as file:
        for chunk in _raw_chunks(payload):
            size_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    _sync_folder(path.parent)
    return size_bytes


def _raw_chunks(payload: Payload) -> Iterator[bytes]:
    if payload.encoding == "raw":
        yield from payload.chunks()
        return
    rest = b""
    for chunk in payload.chunks():
        text = rest + chunk
        whole = len(text) // 4 * 4
        yield base64.b64decode(text[:whole])
        rest = text[whole:]
    yield base64.b64decode(rest + b"=" * (-len(rest) % 4))


def _decode_file(source: Path, target: Path) -> None:
    partial = target.with_suffix(".part")
    with source.open("rb") as encoded, partial.open("wb") as file:
        while text := encoded.read(64 * 1024):
            file.write(base64.b64decode(text + b"=" * (-len(text) % 4)))
    partial.rename(target)
    source.unlink(missing_ok=True)


def _decoded_bytes(payload: Payload) -> int:
    if payload.encoding == "raw":
        return payload.size_bytes
    tail = b""
    for chunk in payload.chunks():
        tail = chunk
    padding = len(tail) - len(tail.rstrip(b"="))
    return (payload.size_bytes - padding) * 3 // 4


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _expire(root: Path, before_ms: int) -> int:
    if not root.exists():
        return 0
    old = [
        folder
        for folder in root.iterdir()
        if folder.stat().st_mtime_ns < before_ms * 1_000_000
    ]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return len(old)
