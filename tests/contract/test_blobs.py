"""What every store of pictures must do."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from gateway.adapters.blobs import DiskBlobs
from gateway.adapters.objects import Address, Bucket, ObjectBlobs
from gateway.core.errors import ServiceUnavailableError
from gateway.ports import BlobStore
from providers.kit.contract import MadeImage
from providers.kit.spool import SpoolFolder
from tests.fakes import FakePayload
from tests.object_store import SECRET, S3Server

CONTENT = bytes(range(256)) * 1_000
LONG = bytes(range(256)) * 80_000
"""Longer than a part of an upload, and than what a reader takes at once."""
FLAT, NESTED = "file_1", "task-1/0"


class Backend(Protocol):
    """A store, and a way to let time pass in it."""

    @property
    def blobs(self) -> BlobStore: ...

    def age(self, blob: str, written_ms: int) -> None:
        """Let a blob have been written at another time."""


@dataclass(frozen=True)
class OnDisk:
    folder: Path

    @property
    def blobs(self) -> BlobStore:
        return DiskBlobs(self.folder / "blobs")

    def age(self, blob: str, written_ms: int) -> None:
        name = blob if "/" in blob else f"{blob}.raw"
        path = self.folder / "blobs" / name.partition("/")[0]
        os.utime(path, (written_ms / 1000, written_ms / 1000))


@dataclass(frozen=True)
class InS3:
    server: S3Server
    name: str
    bucket: Bucket

    @property
    def blobs(self) -> BlobStore:
        return ObjectBlobs(self.bucket, "results")

    def age(self, blob: str, written_ms: int) -> None:
        key = f"pre/fix/{self.bucket.folder}/results/{blob}"
        self.server.age(self.name, key, written_ms)


BACKENDS = ("disk", "s3")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "disk":
        return OnDisk(tmp_path)
    server: S3Server = request.getfixturevalue("s3")
    name = server.new_bucket()
    address = Address(f"s3://{name}/pre/fix", server.url, "", "id", "secret")
    return InS3(server, name, Bucket(address, SECRET, lambda _: None))


@pytest.fixture
def blobs(backend: Backend) -> BlobStore:
    return backend.blobs


async def read(blobs: BlobStore, blob: str) -> bytes | None:
    opened = await blobs.open(blob)
    if opened is None:
        return None
    try:
        assert opened.size_bytes == len(await opened.read(0, opened.size_bytes + 1))
        return await opened.read(0, opened.size_bytes)
    finally:
        opened.close()


@pytest.mark.parametrize("content", [CONTENT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("blob", [FLAT, NESTED])
async def test_a_file_is_read_as_it_was_kept(
    blobs: BlobStore, blob: str, content: bytes
) -> None:
    assert await blobs.keep_file(blob, FakePayload(content)) == len(content)

    assert await blobs.exists(blob)
    assert await read(blobs, blob) == content


async def test_what_is_kept_again_takes_the_place_of_what_was(blobs: BlobStore) -> None:
    await blobs.keep_file(FLAT, FakePayload(LONG))
    await blobs.keep_file(FLAT, FakePayload(CONTENT))

    assert await read(blobs, FLAT) == CONTENT


async def test_many_keep_and_read_at_once(blobs: BlobStore) -> None:
    contents = {f"task-{n}/0": bytes([n]) * (n * 10_000 + 1) for n in range(40)}

    await asyncio.gather(
        *(blobs.keep_file(b, FakePayload(c)) for b, c in contents.items())
    )
    found = await asyncio.gather(*(read(blobs, blob) for blob in contents))

    assert found == list(contents.values())


async def test_a_spool_stays_its_owners_after_it_was_kept(
    blobs: BlobStore, tmp_path: Path
) -> None:
    spool = SpoolFolder(tmp_path).open("raw")
    spool.append(CONTENT * 2)

    await blobs.keep_file(FLAT, spool)

    assert b"".join(spool.chunks()) == CONTENT * 2
    spool.close()
    assert await read(blobs, FLAT) == CONTENT * 2
    assert not list(tmp_path.glob("spool-*"))


@pytest.mark.parametrize("as_it_came", [False, True])
async def test_base64_is_read_as_the_file_that_it_stands_for(
    blobs: BlobStore, *, as_it_came: bool
) -> None:
    text = FakePayload(base64.b64encode(CONTENT), "base64")
    image = MadeImage(text, "image/png", 1, 1)

    kept_bytes = await blobs.keep(NESTED, image, as_it_came=as_it_came)

    assert kept_bytes == len(CONTENT)
    assert await read(blobs, NESTED) == CONTENT


async def test_parts_are_read_from_anywhere_and_end_with_the_file(
    blobs: BlobStore,
) -> None:
    await blobs.keep_file(FLAT, FakePayload(CONTENT))
    opened = await blobs.open(FLAT)
    assert opened is not None

    assert await opened.read(1_000, 5) == CONTENT[1_000:1_005]
    assert await opened.read(3, 2) == CONTENT[3:5]
    assert await opened.read(len(CONTENT) - 2, 100) == CONTENT[-2:]
    assert await opened.read(len(CONTENT), 100) == b""
    opened.close()


async def test_a_deleted_blob_is_gone_and_its_neighbours_are_not(
    blobs: BlobStore,
) -> None:
    for blob in (FLAT, "file_2", NESTED, "task-1/1"):
        await blobs.keep_file(blob, FakePayload(CONTENT))

    for blob in (FLAT, NESTED):
        await blobs.delete(blob)
        await blobs.delete(blob)
        assert not await blobs.exists(blob)
        assert await blobs.open(blob) is None

    assert await read(blobs, "file_2") == CONTENT
    assert await read(blobs, "task-1/1") == CONTENT


async def test_the_store_itself_outlives_its_last_blob(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path / "blobs")
    for blob in (FLAT, NESTED):
        await blobs.keep_file(blob, FakePayload(CONTENT))
        await blobs.delete(blob)

        assert list(tmp_path.iterdir()) == [tmp_path / "blobs"]
        assert list((tmp_path / "blobs").iterdir()) == []


async def test_what_is_open_can_be_read_though_it_is_deleted(blobs: BlobStore) -> None:
    await blobs.keep_file(FLAT, FakePayload(CONTENT))
    opened = await blobs.open(FLAT)
    assert opened is not None

    await blobs.delete(FLAT)

    assert await opened.read(0, 10) == CONTENT[:10]
    opened.close()


@pytest.mark.parametrize(
    "name", ["..", "../secret", "a/../../b", "/etc/passwd", "a//b", "", "a\x00b", "a.b"]
)
async def test_names_that_walk_open_nothing(blobs: BlobStore, name: str) -> None:
    assert await blobs.open(name) is None


async def test_only_what_is_old_expires(backend: Backend) -> None:
    blobs = backend.blobs
    for blob in ("old", "task-old/0", "new", "task-new/0"):
        await blobs.keep_file(blob, FakePayload(CONTENT))
    for old in ("old", "task-old/0"):
        backend.age(old, 1_000_000)

    assert await blobs.expire(1_000_000) == 0
    assert await blobs.expire(1_000_001) == 2

    there = {
        b: await blobs.exists(b) for b in ("old", "task-old/0", "new", "task-new/0")
    }
    assert there == {"old": False, "task-old/0": False, "new": True, "task-new/0": True}


async def test_a_store_that_is_not_there_yet_is_empty(blobs: BlobStore) -> None:
    assert await blobs.expire(1) == 0
    assert not await blobs.exists(FLAT)
    await blobs.delete(FLAT)


class _Unreadable(FakePayload):
    def chunks(self) -> Iterator[bytes]:
        yield b"a part"
        raise OSError(28, "No space left on device")


async def test_a_disk_that_refuses_leaves_nothing_half(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path / "blobs")

    with pytest.raises(ServiceUnavailableError) as refused:
        await blobs.keep_file(FLAT, _Unreadable(CONTENT))

    assert refused.value.code == "storage_unavailable"
    assert not await blobs.exists(FLAT)
    assert not list((tmp_path / "blobs").iterdir())


async def test_many_first_readers_of_a_picture_all_get_it(tmp_path: Path) -> None:
    blobs = DiskBlobs(tmp_path)
    content = bytes(range(256)) * 20_000
    spool = SpoolFolder(tmp_path).from_bytes(base64.b64encode(content), "base64")
    await blobs.keep("task/0", MadeImage(spool, "image/png", 1, 1), as_it_came=True)

    opened = await asyncio.gather(*(blobs.open("task/0") for _ in range(40)))

    assert all(blob is not None for blob in opened)
    for blob in opened:
        assert blob is not None
        assert blob.size_bytes == len(content)
        assert await blob.read(0, len(content)) == content
        blob.close()
    assert {path.suffix for path in (tmp_path / "task").iterdir()} == {".raw"}
