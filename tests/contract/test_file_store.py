"""What every store of uploads must do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.sql.files import SqlFiles
from gateway.ports import FileUse, StoredFile
from tests.contract.stores import BACKENDS, NOW_MS, TENANT, Stores, open_stores

HOUR_MS = 3_600_000


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        await opened.fund(0)
        await opened.fund(0, "t-2")
        yield opened


@pytest.fixture
def files(stores: Stores) -> SqlFiles:
    return SqlFiles(stores.database)


def a_file(file_id: str = "file_1", **changes: Any) -> StoredFile:
    fields: dict[str, Any] = {
        "id": file_id,
        "tenant_id": TENANT,
        "name": "狐.png",
        "original_name": "my fox.png",
        "upload_path": "animals/foxes",
        "media_type": "image/png",
        "size_bytes": 52_428_800,
        "width_px": 1024,
        "height_px": 768,
        "created_ms": NOW_MS,
        "expires_ms": NOW_MS + 72 * HOUR_MS,
    }
    return StoredFile(**(fields | changes))


def room(files_max: int = 100, max_bytes: int = 2**40) -> FileUse:
    return FileUse(files_max, max_bytes)


async def add(
    files: SqlFiles, *wanted: StoredFile, at_most: FileUse | None = None
) -> list[bool]:
    return [
        await files.add_file(file, at_most=at_most or room(), now_ms=NOW_MS)
        for file in wanted
    ]


async def test_a_file_is_found_as_it_was_added(files: SqlFiles) -> None:
    assert await add(files, a_file()) == [True]

    assert await files.file("file_1", now_ms=NOW_MS) == a_file()
    assert await files.file("file_2", now_ms=NOW_MS) is None


async def test_a_file_is_there_to_the_last_millisecond_of_its_time(
    files: SqlFiles,
) -> None:
    await add(files, a_file())
    end_ms = a_file().expires_ms

    assert await files.file("file_1", now_ms=end_ms - 1) is not None
    assert await files.file("file_1", now_ms=end_ms) is None
    assert await files.files(TENANT, now_ms=end_ms, offset=0, limit=9) == (0, [])


async def test_files_are_listed_newest_first_and_only_to_their_tenant(
    files: SqlFiles,
) -> None:
    old = a_file("file_a", created_ms=NOW_MS - 2)
    new = a_file("file_b", created_ms=NOW_MS - 1)
    await add(files, new, old, a_file("file_c", tenant_id="t-2"))

    assert await files.files(TENANT, now_ms=NOW_MS, offset=0, limit=9) == (
        2,
        [new, old],
    )


async def test_pages_together_show_every_file_once(files: SqlFiles) -> None:
    await add(files, *(a_file(f"file_{i}") for i in range(5)))

    seen = []
    for offset in (0, 2, 4, 6):
        total, page = await files.files(TENANT, now_ms=NOW_MS, offset=offset, limit=2)
        assert total == 5
        seen += [file.id for file in page]

    assert sorted(seen) == [f"file_{i}" for i in range(5)]


async def test_a_full_tenant_gets_no_further_file(files: SqlFiles) -> None:
    added = await add(files, *(a_file(f"file_{i}") for i in range(3)), at_most=room(2))

    assert added == [True, True, False]
    assert await files.file("file_2", now_ms=NOW_MS) is None


async def test_the_files_of_others_and_expired_ones_take_no_room(
    files: SqlFiles,
) -> None:
    expired = a_file("file_a", created_ms=NOW_MS - 9, expires_ms=NOW_MS)
    await add(files, expired, a_file("file_b", tenant_id="t-2"))

    assert await add(files, a_file("file_c"), at_most=room(1)) == [True]


async def test_fifty_at_once_with_room_for_ten_are_exactly_ten(
    files: SqlFiles,
) -> None:
    added = await asyncio.gather(
        *(
            files.add_file(a_file(f"file_{i}"), at_most=room(10), now_ms=NOW_MS)
            for i in range(50)
        )
    )

    total, kept = await files.files(TENANT, now_ms=NOW_MS, offset=0, limit=100)
    assert (sum(added), total, len(kept)) == (10, 10, 10)
    assert {file.id for file in kept} == {
        f"file_{i}" for i, was_added in enumerate(added) if was_added
    }


async def test_a_file_that_just_fits_is_the_last(files: SqlFiles) -> None:
    at_most = room(max_bytes=10)
    sizes = (6, 5, 4, 1)
    wanted = [a_file(f"file_{size}", size_bytes=size) for size in sizes]

    assert await add(files, *wanted, at_most=at_most) == [True, False, True, False]

    assert await files.file_use(TENANT, now_ms=NOW_MS) == FileUse(2, 10)
    assert await files.file_use("t-2", now_ms=NOW_MS) == FileUse(0, 0)
    assert await add(
        files, a_file("file_x", tenant_id="t-2", size_bytes=10), at_most=at_most
    ) == [True]


async def test_the_bytes_of_expired_files_take_no_room(files: SqlFiles) -> None:
    expired = a_file("file_a", created_ms=NOW_MS - 9, expires_ms=NOW_MS, size_bytes=9)
    await add(files, expired)

    fresh = a_file("file_b", size_bytes=10)
    assert await add(files, fresh, at_most=room(max_bytes=10)) == [True]
    assert await files.file_use(TENANT, now_ms=NOW_MS) == FileUse(1, 10)


async def test_twenty_at_once_with_bytes_for_three_are_exactly_three(
    files: SqlFiles,
) -> None:
    added = await asyncio.gather(
        *(
            files.add_file(
                a_file(f"file_{i}", size_bytes=3),
                at_most=room(max_bytes=11),
                now_ms=NOW_MS,
            )
            for i in range(20)
        )
    )

    assert sum(added) == 3
    assert await files.file_use(TENANT, now_ms=NOW_MS) == FileUse(3, 9)


async def test_a_removed_file_makes_room(files: SqlFiles) -> None:
    await add(files, a_file(), at_most=room(1))

    await files.remove_file("file_1")
    await files.remove_file("file_1")

    assert await files.file("file_1", now_ms=NOW_MS) is None
    assert await add(files, a_file("file_2"), at_most=room(1)) == [True]


async def test_expired_files_are_found_for_whoever_sweeps(files: SqlFiles) -> None:
    ends = (NOW_MS + 5, NOW_MS + 1, NOW_MS + 3, NOW_MS + 9)
    await add(files, *(a_file(f"file_{e - NOW_MS}", expires_ms=e) for e in ends))

    expired = await files.expired_files(now_ms=NOW_MS + 5, limit=9)
    first = await files.expired_files(now_ms=NOW_MS + 5, limit=2)

    assert [file.id for file in expired] == ["file_1", "file_3", "file_5"]
    assert [file.id for file in first] == ["file_1", "file_3"]


async def test_a_reopened_database_keeps_files(stores: Stores) -> None:
    await add(SqlFiles(stores.database), a_file())

    await stores.reopen()

    found = await SqlFiles(stores.database).file("file_1", now_ms=NOW_MS)
    assert found == a_file()
