"""Spools: what goes in comes out, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.kit.spool import (
    CHUNK_BYTES,
    MEMORY_MAX_BYTES,
    SpoolFolder,
    SpoolLimitError,
)

SMALL = b"small"
LARGE = bytes(range(256)) * (MEMORY_MAX_BYTES // 256 + 3)
each_size = pytest.mark.parametrize("content", [b"", SMALL, LARGE], ids=len)


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    folder = SpoolFolder(tmp_path / "spools")
    folder.sweep()
    return folder


def files(folder: SpoolFolder) -> int:
    return len(list(folder.path.iterdir()))


@each_size
def test_what_was_written_is_read_as_often_as_one_likes(
    folder: SpoolFolder, content: bytes
) -> None:
    spool = folder.from_bytes(content)

    assert b"".join(spool.chunks()) == content
    assert b"".join(spool.chunks()) == content
    assert spool.size_bytes == len(content)
    assert all(len(chunk) <= CHUNK_BYTES for chunk in spool.chunks())
    spool.close()


def test_a_small_one_never_touches_the_disk(folder: SpoolFolder) -> None:
    spool = folder.open("base64")
    spool.append(bytes(MEMORY_MAX_BYTES))
    assert files(folder) == 0
    spool.append(b"1")
    assert files(folder) == 1
    spool.close()


@each_size
def test_closing_leaves_nothing_and_may_be_done_twice(
    folder: SpoolFolder, content: bytes
) -> None:
    spool = folder.from_bytes(content)
    spool.close()
    spool.close()

    assert files(folder) == 0
    with pytest.raises(ValueError, match="closed"):
        list(spool.chunks())


def test_a_reader_that_has_begun_gets_to_the_end(folder: SpoolFolder) -> None:
    spool = folder.from_bytes(LARGE)
    chunks = spool.chunks()
    first = next(chunks)
    spool.close()
    assert first + b"".join(chunks) == LARGE


@each_size
def test_what_is_kept_outlives_the_spool(
    folder: SpoolFolder, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"of an earlier try")
    spool = folder.from_bytes(content)
    spool.persist(str(path))
    spool.persist(str(path))
    spool.close()

    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "spools"]


def test_a_large_one_is_kept_without_a_copy(
    folder: SpoolFolder, tmp_path: Path
) -> None:
    spool = folder.from_bytes(LARGE)
    spool.persist(str(tmp_path / "kept"))
    assert (tmp_path / "kept").stat().st_nlink == 2
    spool.close()


def test_keeping_where_there_is_no_folder_is_an_os_error(
    folder: SpoolFolder, tmp_path: Path
) -> None:
    spool = folder.from_bytes(LARGE)
    with pytest.raises(OSError, match="No such file"):
        spool.persist(str(tmp_path / "nowhere" / "kept"))
    spool.close()


def test_the_limit_is_exact_and_refuses_whole_writes(folder: SpoolFolder) -> None:
    spool = folder.open("raw", limit_bytes=10)
    spool.append(b"123456789")
    with pytest.raises(SpoolLimitError, match="10 bytes"):
        spool.append(b"ab")
    spool.append(b"0")
    assert b"".join(spool.chunks()) == b"1234567890"
    spool.close()


def test_start_up_sweeps_what_a_crash_left(folder: SpoolFolder) -> None:
    lost = folder.from_bytes(LARGE)
    (folder.path / "not-ours").touch()
    assert SpoolFolder(folder.path).sweep() == 1
    assert [p.name for p in folder.path.iterdir()] == ["not-ours"]
    lost.close()


@given(pieces=st.lists(st.integers(0, MEMORY_MAX_BYTES), max_size=4))
def test_pieces_of_any_size_come_out_in_order(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[int]
) -> None:
    spool = SpoolFolder(tmp_path_factory.getbasetemp()).open("raw")
    parts = [bytes([number]) * size for number, size in enumerate(pieces)]
    for part in parts:
        spool.append(part)
    assert b"".join(spool.chunks()) == b"".join(parts)
    spool.close()
