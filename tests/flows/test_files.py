"""Uploads: what is accepted, how it is named, and that nothing half is left."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    ServiceUnavailableError,
    TooLargeError,
)
from gateway.core.images import IMAGE_MAX_BYTES
from gateway.flows.files import (
    FILE_KEPT_MS,
    FILES_MAX,
    FILES_MAX_BYTES_PER_TENANT,
    FetchFile,
    Files,
    Naming,
)
from gateway.ports import (
    FetcherBusyError,
    FetchRefusedError,
    FileUse,
    StoredFile,
    WritableSpool,
)
from providers.kit.contract import Payload
from providers.kit.spool import SpoolFolder
from tests.fakes import FakeChance, FakePayload, MemoryBlobs, StillClock

HOUR_MS = 3_600_000
NOW_MS = 1_790_000_000_000


def encoded(image_format: str, size: tuple[int, int] = (8, 4), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, image_format, **options)
    return file.getvalue()


PNG, JPEG, WEBP = (encoded(name) for name in ("PNG", "JPEG", "WEBP"))


class InPieces(FakePayload):
    """A payload that comes as a spool gives it."""

    def chunks(self) -> Iterator[bytes]:
        for at in range(0, len(self.content), 65_536):
            yield self.content[at : at + 65_536]


class Uploads(MemoryBlobs):
    async def keep_file(self, blob: str, content: Payload) -> int:
        if self.full is not None:
            raise self.full
        self.kept[blob] = b"".join(content.chunks())
        return len(self.kept[blob])


@dataclass
class MemoryFiles:
    """A ``FileStore`` in a dictionary; can be told to fail."""

    kept: dict[str, StoredFile] = field(default_factory=dict)
    broken: GatewayError | None = None

    async def add_file(
        self, file: StoredFile, *, at_most: FileUse, now_ms: int
    ) -> bool:
        if self.broken is not None:
            raise self.broken
        use = await self.file_use(file.tenant_id, now_ms=now_ms)
        over = use.size_bytes + file.size_bytes > at_most.size_bytes
        if over or use.files >= at_most.files:
            return False
        self.kept[file.id] = file
        return True

    async def file_use(self, tenant_id: str, *, now_ms: int) -> FileUse:
        live = self._live(tenant_id, now_ms)
        return FileUse(len(live), sum(file.size_bytes for file in live))

    async def file(self, file_id: str, *, now_ms: int) -> StoredFile | None:
        file = self.kept.get(file_id)
        return file if file and file.expires_ms > now_ms else None

    async def files(
        self, tenant_id: str, *, now_ms: int, offset: int, limit: int
    ) -> tuple[int, Sequence[StoredFile]]:
        live = self._live(tenant_id, now_ms)[::-1]
        return len(live), live[offset : offset + limit]

    async def remove_file(self, file_id: str) -> None:
        self.kept.pop(file_id, None)

    async def expired_files(self, *, now_ms: int, limit: int) -> Sequence[StoredFile]:
        return [f for f in self.kept.values() if f.expires_ms <= now_ms][:limit]

    def _live(self, tenant_id: str, now_ms: int) -> list[StoredFile]:
        return [
            file
            for file in self.kept.values()
            if file.tenant_id == tenant_id and file.expires_ms > now_ms
        ]


@dataclass
class Cupboard:
    """A tenant's files over memory."""

    clock: StillClock = field(default_factory=StillClock)
    store: MemoryFiles = field(default_factory=MemoryFiles)
    blobs: Uploads = field(default_factory=Uploads)

    @property
    def files(self) -> Files:
        return Files(self.store, self.blobs, self.clock, FakeChance())

    async def keep(
        self, content: bytes = PNG, naming: Naming | None = None, tenant: str = "t-1"
    ) -> StoredFile:
        naming = naming or Naming()
        payload = InPieces(content)
        return await self.files.keep(tenant, payload, naming, param="file")

    def hoard(self, size_bytes: int) -> None:
        self.store.kept["large"] = replace(stored("large"), size_bytes=size_bytes)

    def fill(self) -> None:
        for number in range(FILES_MAX):
            self.store.kept[str(number)] = stored(str(number))


def stored(file_id: str) -> StoredFile:
    return StoredFile(
        id=file_id,
        tenant_id="t-1",
        name="a.png",
        original_name="a.png",
        upload_path="",
        media_type="image/png",
        size_bytes=1,
        width_px=1,
        height_px=1,
        created_ms=NOW_MS,
        expires_ms=NOW_MS + FILE_KEPT_MS,
    )


@pytest.fixture
def cupboard() -> Cupboard:
    return Cupboard()


@pytest.mark.parametrize(
    ("content", "media_type", "name"),
    [
        (PNG, "image/png", "image.png"),
        (JPEG, "image/jpeg", "image.jpg"),
        (WEBP, "image/webp", "image.webp"),
    ],
    ids=["png", "jpeg", "webp"],
)
async def test_a_picture_is_kept_as_what_its_bytes_say(
    cupboard: Cupboard, content: bytes, media_type: str, name: str
) -> None:
    file = await cupboard.keep(content)

    assert (file.media_type, file.name) == (media_type, name)
    assert (file.width_px, file.height_px) == (8, 4)
    assert file.size_bytes == len(content)
    assert file.expires_ms - file.created_ms == 72 * HOUR_MS
    assert cupboard.blobs.kept == {file.blob: content}
    assert cupboard.store.kept == {file.id: file}


async def test_an_id_cannot_be_guessed_from_its_looks(cupboard: Cupboard) -> None:
    file = await cupboard.keep()

    assert file.id.startswith("file_")
    assert len(file.id) == len("file_") + 24


def animated(image_format: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(file, image_format, save_all=True, append_images=frames[1:])
    return file.getvalue()


def animated_behind_a_profile(size_bytes: int = 200_000) -> bytes:
    plain = animated("PNG")
    profile = b"\x00" * size_bytes
    chunk = len(profile).to_bytes(4, "big") + b"iCCP" + profile + b"\x00" * 4
    return plain[:33] + chunk + plain[33:]


REFUSED = {
    "nothing": b"",
    "text named .png": b"I am a picture, I promise.\n" * 100,
    "a zip": b"PK\x03\x04" + PNG,
    "a gzip": b"\x1f\x8b\x08\x00" + PNG,
    "a GIF": encoded("GIF"),
    "a BMP": encoded("BMP"),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "half a header": PNG[:20],
    "an animated PNG": animated("PNG"),
    "an animated WebP": animated("WEBP"),
    "an animation behind a large profile": animated_behind_a_profile(),
    "an animation behind a larger profile": animated_behind_a_profile(2_000_000),
    "a header without end": animated_behind_a_profile(17_000_000),
    "20,000 pixels wide": encoded("PNG", (20_000, 1)),
    "over 64 megapixels": encoded("JPEG", (8_001, 8_000)),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_no_model_could_use_is_refused(
    cupboard: Cupboard, name: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await cupboard.keep(REFUSED[name], Naming(original_name="picture.png"))

    assert (refused.value.code, refused.value.param) == ("invalid_image", "file")
    assert not cupboard.blobs.kept
    assert not cupboard.store.kept


async def test_fifty_megabytes_are_kept_and_one_byte_more_is_not(
    cupboard: Cupboard,
) -> None:
    at_most = PNG + b"\x00" * (IMAGE_MAX_BYTES - len(PNG))
    assert (await cupboard.keep(at_most)).size_bytes == IMAGE_MAX_BYTES

    with pytest.raises(TooLargeError) as refused:
        await cupboard.keep(at_most + b"\x00")

    assert refused.value.code == "image_too_large"
    assert len(cupboard.store.kept) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("cat.png", "cat.png"),
        ("CAT.PNG", "CAT.PNG"),
        ("cat", "cat.png"),
        ("cat.jpg", "cat.jpg.png"),
        ("evil.html", "evil.html.png"),
        ("../../etc/passwd", "passwd.png"),
        ("C:\\photos\\cat.png", "cat.png"),
        ("a\x00b\r\nc\x1b.png", "abc.png"),
        ("gpj.\u202egnp.png", "gpj.gnp.png"),
        ("..", "image.png"),
        ("/", "image.png"),
        (" . ", "image.png"),
        (".htaccess", "htaccess.png"),
        ("狐 🦊.png", "狐 🦊.png"),
        ("x" * 500, "x" * 196 + ".png"),
    ],
)
async def test_a_name_neither_walks_nor_misleads(
    cupboard: Cupboard, given: str, kept: str
) -> None:
    assert (await cupboard.keep(PNG, Naming(file_name=given))).name == kept
    assert (await cupboard.keep(PNG, Naming(original_name=given))).name == kept


async def test_the_wanted_name_wins_and_the_given_one_is_remembered(
    cupboard: Cupboard,
) -> None:
    naming = Naming(original_name="IMG_001.png", file_name="fox.png")

    file = await cupboard.keep(PNG, naming)

    assert (file.name, file.original_name) == ("fox.png", "IMG_001.png")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("images/2026", "images/2026"),
        ("/images//2026/", "images/2026"),
        ("../../etc", "etc"),
        ("a\\..\\b", "a/b"),
        ("a/\x00\x07/b\n", "a/b"),
        ("x/" * 500, ("x/" * 100)[:-1]),
        ("", ""),
    ],
)
async def test_an_upload_path_is_a_label_and_leads_nowhere(
    cupboard: Cupboard, given: str, kept: str
) -> None:
    file = await cupboard.keep(PNG, Naming(upload_path=given))

    assert file.upload_path == kept


async def test_a_huge_name_is_not_read_to_its_end(cupboard: Cupboard) -> None:
    naming = Naming(file_name="\u202e" * 50_000_000, upload_path="\u202e" * 50_000_000)

    file = await cupboard.keep(PNG, naming)

    assert (file.name, file.upload_path) == ("image.png", "")


async def test_a_full_tenant_is_turned_away_before_and_after_its_body(
    cupboard: Cupboard,
) -> None:
    cupboard.fill()

    for upload in (cupboard.files.check_room("t-1"), cupboard.keep()):
        with pytest.raises(InvalidRequestError) as refused:
            await upload
        assert refused.value.code == "file_quota_exceeded"
    assert not cupboard.blobs.kept
    await cupboard.files.check_room("t-2")
    await cupboard.keep(tenant="t-2")


async def test_a_file_that_would_pass_the_bytes_of_a_tenant_is_refused(
    cupboard: Cupboard,
) -> None:
    files = cupboard.files
    cupboard.hoard(FILES_MAX_BYTES_PER_TENANT - len(PNG))
    await files.keep("t-1", FakePayload(PNG), Naming(), param="file")
    cupboard.hoard(FILES_MAX_BYTES_PER_TENANT - 2 * len(PNG) + 1)
    await files.check_room("t-1")

    with pytest.raises(InvalidRequestError) as refused:
        await files.keep("t-1", FakePayload(PNG), Naming(), param="file")

    assert refused.value.code == "file_quota_exceeded"
    assert len(cupboard.blobs.kept) == 1
    await files.keep("t-2", FakePayload(PNG), Naming(), param="file")


async def test_a_tenant_without_a_byte_left_is_turned_away_before_the_body(
    cupboard: Cupboard,
) -> None:
    cupboard.hoard(FILES_MAX_BYTES_PER_TENANT)

    with pytest.raises(InvalidRequestError) as refused:
        await cupboard.files.check_room("t-1")

    assert refused.value.code == "file_quota_exceeded"


async def test_room_comes_back_when_files_expire(cupboard: Cupboard) -> None:
    cupboard.fill()
    cupboard.clock.at_ms += FILE_KEPT_MS

    await cupboard.files.check_room("t-1")

    assert (await cupboard.files.quota("t-1")).used == FileUse(0, 0)


@pytest.mark.parametrize("broken", ["store", "blobs"])
async def test_a_file_is_kept_whole_or_not_at_all(
    cupboard: Cupboard, broken: str
) -> None:
    down = ServiceUnavailableError("down")
    if broken == "store":
        cupboard.store.broken = down
    else:
        cupboard.blobs.full = down

    with pytest.raises(ServiceUnavailableError):
        await cupboard.keep()

    assert not cupboard.blobs.kept
    assert not cupboard.store.kept


async def test_a_file_of_another_tenant_is_not_there(cupboard: Cupboard) -> None:
    file = await cupboard.keep()

    assert await cupboard.files.find("t-1", file.id) == file
    asked: list[Callable[[], Awaitable[object]]] = [
        lambda: cupboard.files.find("t-2", file.id),
        lambda: cupboard.files.delete("t-2", file.id),
        lambda: cupboard.files.find("t-1", "file_unknown"),
    ]
    for ask in asked:
        with pytest.raises(NotFoundError) as refused:
            await ask()
        assert refused.value.code == "file_not_found"
    assert cupboard.blobs.kept


async def test_a_deleted_file_leaves_nothing(cupboard: Cupboard) -> None:
    file = await cupboard.keep()

    await cupboard.files.delete("t-1", file.id)

    assert not cupboard.blobs.kept
    assert not cupboard.store.kept
    with pytest.raises(NotFoundError):
        await cupboard.files.delete("t-1", file.id)


async def test_what_expires_is_swept_and_the_rest_stays(cupboard: Cupboard) -> None:
    files, clock = cupboard.files, cupboard.clock
    old = await files.keep("t-1", FakePayload(PNG), Naming(), param="file")
    clock.at_ms += 1
    young = await files.keep("t-1", FakePayload(PNG), Naming(), param="file")
    clock.at_ms = old.expires_ms

    assert await files.expire() == 1
    assert await files.expire() == 0

    assert set(cupboard.store.kept) == set(cupboard.blobs.kept) == {young.id}


@dataclass
class FakeFetcher:
    """Finds what is at its URLs; anything else may not be fetched."""

    there: dict[str, bytes]
    busy: bool = False
    callers: list[str] = field(default_factory=list)

    async def fetch(
        self, url: str, into: WritableSpool, *, deadline_s: float, caller: str = ""
    ) -> None:
        assert 0 < deadline_s <= 30
        self.callers.append(caller)
        if self.busy:
            raise FetcherBusyError
        if url not in self.there:
            into.append(b"a part of it")
            raise FetchRefusedError("The URL could not be reached.")
        into.append(self.there[url])


async def test_a_file_is_fetched_from_where_its_owner_points(
    cupboard: Cupboard, tmp_path: Path
) -> None:
    url = "https://pictures.test/a%20fox.jpg?size=large"
    fetcher = FakeFetcher({url: JPEG})
    fetch = FetchFile(cupboard.files, fetcher, SpoolFolder(tmp_path))

    file = await fetch("t-1", url, Naming(upload_path="foxes"))

    assert (file.name, file.original_name) == ("a fox.jpg", "a fox.jpg")
    assert (file.media_type, file.upload_path) == ("image/jpeg", "foxes")
    assert cupboard.blobs.kept[file.blob] == JPEG
    assert fetcher.callers == ["t-1"]


async def test_who_gets_no_turn_to_fetch_is_asked_to_come_back(
    cupboard: Cupboard, tmp_path: Path
) -> None:
    fetch = FetchFile(cupboard.files, FakeFetcher({}, busy=True), SpoolFolder(tmp_path))

    with pytest.raises(ServiceUnavailableError) as refused:
        await fetch("t-1", "https://a.test/", Naming())

    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_s
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "image_fetch_failed"),
        (b"<html>not found</html>" * 50_000, "invalid_image"),
        (PNG + b"\x00" * IMAGE_MAX_BYTES, "image_too_large"),
    ],
    ids=["not there", "a page", "too large"],
)
async def test_what_cannot_be_fetched_or_used_leaves_nothing(
    cupboard: Cupboard, tmp_path: Path, content: bytes | None, code: str
) -> None:
    there = (
        {} if content is None else {"https://a.test/": content[: IMAGE_MAX_BYTES + 1]}
    )
    fetch = FetchFile(cupboard.files, FakeFetcher(there), SpoolFolder(tmp_path))

    with pytest.raises(GatewayError) as refused:
        await fetch("t-1", "https://a.test/", Naming())

    assert (refused.value.code, refused.value.param) == (code, "file_url")
    assert 400 <= refused.value.status < 500
    assert not list(tmp_path.iterdir())
    assert not cupboard.store.kept
