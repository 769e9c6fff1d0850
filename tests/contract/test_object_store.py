"""What only an object store can do, or do wrong: over the real protocol."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gateway.adapters.objects import (
    GETS_MAX,
    PART_BYTES,
    PATIENCE,
    PUTS_MAX,
    WINDOW_MAX_BYTES,
    WINDOW_MIN_BYTES,
    WINDOWS_BYTES,
    Address,
    Bucket,
    ObjectBlobs,
    Patience,
)
from gateway.core.errors import StoreAwayError
from gateway.core.events import Event, StoreChanged
from providers.kit.contract import MadeImage
from providers.kit.payloads import BrokenBase64Error
from tests.fakes import FakePayload
from tests.object_store import SECRET, S3Server, answering

FAILS_FAST = Patience(retries=0)
IMPATIENT = Patience(request_s=0.5, retries=0)
LONG = bytes(range(256)) * (PART_BYTES // 256) * 2 + b"the end"
HOUR_S = 3_600
NOW_S = 1_790_000_000


def open_bucket(
    server: S3Server, name: str, secret: bytes = SECRET, patience: Patience = PATIENCE
) -> Bucket:
    address = Address(f"s3://{name}", server.url, "", "id", "secret")
    return Bucket(address, secret, lambda _: None, patience)


def away_bucket(url: str, told: list[Event], patience: Patience = FAILS_FAST) -> Bucket:
    address = Address("s3://pictures/folder", url, "", "id", "hidden-secret")
    return Bucket(address, SECRET, told.append, patience)


# --- two gateways, one bucket ---


async def test_gateways_that_share_a_bucket_do_not_meet(s3: S3Server) -> None:
    name = s3.new_bucket()
    ours = ObjectBlobs(open_bucket(s3, name), "results")
    theirs = ObjectBlobs(open_bucket(s3, name, b"another secret"), "results")
    await ours.keep_file("task-1/0", FakePayload(b"ours"))
    await theirs.keep_file("task-1/0", FakePayload(b"theirs"))

    assert await theirs.expire(2**60) == 1

    assert not await theirs.exists("task-1/0")
    opened = await ours.open("task-1/0")
    assert opened is not None
    assert await opened.read(0, 100) == b"ours"


async def test_replicas_of_one_gateway_see_the_same_pictures(s3: S3Server) -> None:
    name = s3.new_bucket()
    one, other = (ObjectBlobs(open_bucket(s3, name), "inputs") for _ in range(2))
    await one.keep_file("task-1/0", FakePayload(b"shared"))

    assert await other.exists("task-1/0")
    await other.delete("task-1/0")
    await one.delete("task-1/0")
    assert s3.keys(name) == []


async def test_kinds_of_pictures_are_kept_apart(s3: S3Server) -> None:
    bucket = open_bucket(s3, s3.new_bucket())
    results, uploads = ObjectBlobs(bucket, "results"), ObjectBlobs(bucket, "uploads")
    await results.keep_file("file_1", FakePayload(b"a result"))

    assert not await uploads.exists("file_1")
    assert await uploads.expire(2**60) == 0
    assert await results.exists("file_1")


# --- up ---


async def test_a_short_picture_goes_up_in_one_request(s3: S3Server) -> None:
    name = s3.new_bucket()
    blobs = ObjectBlobs(open_bucket(s3, name), "results")
    s3.requests.clear()

    await blobs.keep_file("task-1/0", FakePayload(b"short"))

    assert s3.requests == [f"PUT /{name}/{blobs.bucket.folder}/results/task-1/0"]


async def test_base64_is_decoded_on_its_way_up(s3: S3Server) -> None:
    blobs = ObjectBlobs(open_bucket(s3, s3.new_bucket()), "results")
    text = FakePayload(base64.b64encode(LONG), "base64")

    image = MadeImage(text, "image/png", 1, 1)
    kept_bytes = await blobs.keep("task-1/0", image, as_it_came=True)

    opened = await blobs.open("task-1/0")
    assert opened is not None
    assert kept_bytes == opened.size_bytes == len(LONG)
    assert await opened.read(0, len(LONG)) == LONG


class _Breaking(FakePayload):
    """Yields more than a part, and then fails."""

    def chunks(self) -> Iterator[bytes]:
        yield bytes(PART_BYTES + 1)
        raise BrokenBase64Error("cut off")


async def test_what_cannot_be_read_to_its_end_is_taken_back(s3: S3Server) -> None:
    name = s3.new_bucket()
    blobs = ObjectBlobs(open_bucket(s3, name), "results")

    with pytest.raises(BrokenBase64Error):
        await blobs.keep_file("task-1/0", _Breaking(b""))

    assert s3.keys(name) == []
    assert s3.unfinished(name) == []
    assert await blobs.bucket.trouble() is None


class _Endless(FakePayload):
    """Has ever more to give, slowly."""

    def chunks(self) -> Iterator[bytes]:
        while True:
            yield bytes(PART_BYTES)


async def test_an_upload_that_is_given_up_is_taken_back(s3: S3Server) -> None:
    name = s3.new_bucket()
    blobs = ObjectBlobs(open_bucket(s3, name), "results")
    keeping = asyncio.create_task(blobs.keep_file("task-1/0", _Endless(b"")))
    while not s3.unfinished(name):  # noqa: ASYNC110 - the server has no event
        await asyncio.sleep(0.01)

    keeping.cancel()
    await asyncio.wait({keeping})

    assert keeping.cancelled()
    assert s3.keys(name) == []
    assert s3.unfinished(name) == []


async def test_an_upload_that_takes_too_long_is_taken_back(s3: S3Server) -> None:
    name = s3.new_bucket()
    patience = Patience(call_s=0.5)
    blobs = ObjectBlobs(open_bucket(s3, name, patience=patience), "results")

    with pytest.raises(StoreAwayError) as refused:
        await blobs.keep_file("task-1/0", _Endless(b""))

    assert s3.keys(name) == []
    assert s3.unfinished(name) == []
    assert "does not answer within 0.5 s" in str(refused.value.__cause__)
    assert await blobs.bucket.trouble() is None  # it takes other pictures


UPLOADING = """
import asyncio, resource, sys
sys.path.insert(0, {root!r})
from gateway.adapters.objects import Address, Bucket, ObjectBlobs, Patience
from pathlib import Path
from providers.kit.spool import SpoolFolder

async def main():
    patience = Patience(request_s=600, call_s=600, upload_s=600)
    address = Address({name!r}, {url!r}, "", "id", "secret")
    bucket = Bucket(address, b"s", print, patience)
    blobs = ObjectBlobs(bucket, "results")
    spools = SpoolFolder(Path({folder!r}))
    def spool():
        made = spools.open("raw")
        for _ in range(32 * 16):
            made.append(bytes(64 * 1024))
        return made
    first, *rest = [spool() for _ in range(13)]
    await blobs.keep_file("task-0/0", first)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keeps = [blobs.keep_file(f"task-1/{{n}}", spool) for n, spool in enumerate(rest)]
    await asyncio.gather(*keeps)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

asyncio.run(main())
"""


@pytest.mark.timeout(600)
def test_memory_stays_flat_however_much_goes_up(s3: S3Server, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    name = f"s3://{s3.new_bucket()}"
    program = UPLOADING.format(root=root, name=name, url=s3.url, folder=str(tmp_path))

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    grown_bytes = int(done.stdout) * 1024
    assert grown_bytes < 8 * PART_BYTES * 3  # 12 have 384 MB


# --- down ---


async def test_a_picture_comes_in_few_requests_and_from_any_place(s3: S3Server) -> None:
    name = s3.new_bucket()
    blobs = ObjectBlobs(open_bucket(s3, name), "results")
    await blobs.keep_file("task-1/0", FakePayload(LONG))
    s3.requests.clear()

    opened = await blobs.open("task-1/0")
    assert opened is not None
    pieces = [
        await opened.read(offset, 64 * 1024)
        for offset in range(0, opened.size_bytes, 64 * 1024)
    ]
    opened.close()

    assert b"".join(pieces) == LONG
    assert len(s3.requests) == -(-len(LONG) // WINDOW_MAX_BYTES)


async def test_the_more_readers_the_less_each_holds(s3: S3Server) -> None:
    bucket = open_bucket(s3, s3.new_bucket())
    blobs = ObjectBlobs(bucket, "results")
    await blobs.keep_file("task-1/0", FakePayload(b"short"))

    assert bucket.window_bytes == WINDOW_MAX_BYTES
    opened = [await blobs.open("task-1/0") for _ in range(100)]
    assert bucket.window_bytes * bucket.readers <= WINDOWS_BYTES
    bucket.readers += 100_000
    assert bucket.window_bytes == WINDOW_MIN_BYTES
    bucket.readers -= 100_000
    for blob in opened:
        assert blob is not None
        blob.close()
        blob.close()
    assert bucket.readers == 0


async def test_two_pictures_are_never_mixed(s3: S3Server) -> None:
    blobs = ObjectBlobs(open_bucket(s3, s3.new_bucket()), "results")
    await blobs.keep_file("task-1/0", FakePayload(LONG))
    opened = await blobs.open("task-1/0")
    assert opened is not None
    assert await opened.read(0, 10) == LONG[:10]

    await blobs.keep_file("task-1/0", FakePayload(LONG[::-1]))

    with pytest.raises(StoreAwayError):
        await opened.read(WINDOW_MAX_BYTES, 10)


# --- expiry ---


async def test_what_is_too_young_is_not_looked_at(s3: S3Server) -> None:
    name = s3.new_bucket()
    blobs = ObjectBlobs(open_bucket(s3, name), "results")
    old = [f"task-unified-{NOW_S - HOUR_S}-{n:08}/0" for n in range(5)]
    young = [f"task-unified-{NOW_S + n}-00000000/0" for n in range(1_100)]
    for blob in old + young:
        s3.call("PUT", f"/{name}/{blobs.bucket.folder}/results/{blob}")
    for blob in old:
        key = f"{blobs.bucket.folder}/results/{blob}"
        s3.age(name, key, (NOW_S - HOUR_S) * 1_000)
    s3.requests.clear()

    assert await blobs.expire(NOW_S * 1_000) == len(old)

    lists = [asked for asked in s3.requests if "list-type" in asked]
    assert len(lists) == 1
    assert len(s3.requests) == 2


# --- faults ---


FAULTS = {
    "is not there": (
        "404 Not Found",
        "NoSuchBucket",
        "there is no bucket pictures: ma",
    ),
    "denied": ("403 Forbidden", "AccessDenied", "needs the right to put, get, delete"),
    "wrong key": ("403 Forbidden", "SignatureDoesNotMatch", "results_secret_key"),
    "busy": ("503 Slow Down", "SlowDown", "answers with an error: SlowDown"),
    "slow": ("", "", "is too slow: see how it is doing"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_an_operator_is_told_what_is_wrong_and_what_to_do(fault: str) -> None:
    status, code, sentence = FAULTS[fault]
    told: list[Event] = []
    async with answering(status, code) as url:
        patience = FAILS_FAST if status else IMPATIENT
        bucket = away_bucket(url, told, patience)
        blobs = ObjectBlobs(bucket, "results")
        await bucket.look()
        await bucket.look()
        trouble = await bucket.trouble()
        with pytest.raises(StoreAwayError) as kept:
            await blobs.keep_file("task-1/0", FakePayload(b"a picture"))
        with pytest.raises(StoreAwayError) as read:
            await blobs.open("task-1/0")
        with pytest.raises(StoreAwayError):
            await blobs.delete("task-1/0")
        with pytest.raises(StoreAwayError):
            await blobs.expire(1)
        assert await blobs.exists("task-1/0")  # for all that is known

    assert sentence in (trouble or "")
    assert "hidden" not in (trouble or "")
    assert told == [StoreChanged("away", trouble)]
    for refused in (kept.value, read.value):
        assert refused.code == "storage_unavailable"
        assert refused.retry_after_s == 30
        assert "pictures" not in str(refused).replace("its pictures", "")


async def test_a_store_that_is_down_is_told_and_back_once_it_answers() -> None:
    told: list[Event] = []
    async with answering("200 OK", "") as url:
        port = int(url.rpartition(":")[2])
    bucket = away_bucket(url, told)
    await bucket.look()
    trouble = await bucket.trouble()

    assert trouble is not None
    assert f"127.0.0.1:{port} cannot be reached" in trouble
    assert told == [StoreChanged("away", trouble)]


async def test_a_picture_that_is_refused_tells_of_trouble_until_a_look_succeeds(
    s3: S3Server,
) -> None:
    name = f"{s3.new_bucket()}-not-yet"
    told: list[Event] = []
    address = Address(f"s3://{name}", s3.url, "", "id", "secret")
    bucket = Bucket(address, SECRET, told.append)
    blobs = ObjectBlobs(bucket, "results")

    with pytest.raises(StoreAwayError):
        await blobs.keep_file("a", FakePayload(b"a picture"))
    trouble = await bucket.trouble()
    s3.call("PUT", f"/{name}")
    s3.requests.clear()
    with pytest.raises(StoreAwayError):
        await blobs.keep_file("a", FakePayload(b"a picture"))
    asked_meanwhile = list(s3.requests)
    await bucket.look()
    await blobs.keep_file("a", FakePayload(b"a picture"))

    assert trouble == f"there is no bucket {name}: make it, or correct storage.results"
    assert asked_meanwhile == []
    assert await bucket.trouble() is None
    assert told == [StoreChanged("away", trouble), StoreChanged("back")]


async def test_who_waits_for_a_turn_is_not_kept_waiting_for_ever(s3: S3Server) -> None:
    bucket = open_bucket(s3, s3.new_bucket())
    blobs = ObjectBlobs(bucket, "results")
    await blobs.keep_file("a", FakePayload(b"a picture"))
    bucket.patience = Patience(call_s=0.3)

    async with AsyncExitStack() as others:
        for turns, count in ((bucket.puts, PUTS_MAX), (bucket.gets, GETS_MAX)):
            for _ in range(count):
                await others.enter_async_context(turns)
        with pytest.raises(StoreAwayError):
            await blobs.keep_file("b", FakePayload(b"a picture"))
        with pytest.raises(StoreAwayError):
            await blobs.open("a")

    bucket.patience = PATIENCE
    assert await bucket.trouble() is None
    await blobs.keep_file("b", FakePayload(b"a picture"))


def test_the_library_is_loaded_only_where_it_is_used(tmp_path: Path) -> None:
    program = (
        "import sys, gateway.app, gateway.books as books\n"
        "from gateway.adapters.data_dir import DataDir\n"
        "storage = books.read_settings(None, {}).storage\n"
        "books.open_shelves(storage, DataDir(storage.data_dir), b'')\n"
        "print('obstore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False\n"
