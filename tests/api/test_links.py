"""Links over time and in parts; the clock is the test's own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from litestar.types import Message, Scope

from gateway.adapters.blobs import DiskBlobs
from gateway.api.front import Front
from gateway.api.links import Links, OpenLinks
from gateway.flows.files import FILE_KEPT_MS
from gateway.flows.tasks import Picture
from gateway.ports import OpenBlob, StoredFile
from tests.fakes import FakeChance, FakeEvents, FakePayload, StillClock

CONTENT = bytes(range(256)) * 1_000
SIZE = len(CONTENT)
NOW_MS = 1_790_000_000_000
MINUTE_MS = 60_000
ORIGIN = "https://gateway.test"


@dataclass(frozen=True)
class Watched:
    """An open blob that is counted as long as it is open."""

    inner: OpenBlob
    open_ones: list[OpenBlob]

    @property
    def size_bytes(self) -> int:
        return self.inner.size_bytes

    async def read(self, offset: int, length: int) -> bytes:
        return await self.inner.read(offset, length)

    def close(self) -> None:
        self.inner.close()
        self.open_ones.remove(self.inner)


@dataclass(frozen=True, slots=True)
class WatchedBlobs(DiskBlobs):
    """Blobs on the disk that know which of them are open."""

    open_ones: list[OpenBlob] = field(default_factory=list)

    async def open(self, blob: str) -> Any:
        opened = await DiskBlobs.open(self, blob)
        if opened is None:
            return None
        self.open_ones.append(opened)
        return Watched(opened, self.open_ones)


@dataclass
class House:
    """Links, what they open, and a client that follows them."""

    folder: Path
    clock: StillClock = field(default_factory=StillClock)
    crashes: list[BaseException] = field(default_factory=list)
    links: Links = field(default_factory=lambda: Links(b"a secret", ORIGIN))

    def __post_init__(self) -> None:
        self.results = WatchedBlobs(self.folder / "results")
        self.uploads = WatchedBlobs(self.folder / "uploads")
        self.app = Front(
            OpenLinks(self.links, self.results, self.uploads, self.clock),
            self.clock,
            FakeChance(),
            FakeEvents(),
            lambda error, _: self.crashes.append(error),
        )

    async def upload(self, name: str = "fox.png") -> tuple[str, str]:
        await self.uploads.keep_file("file_1", FakePayload(CONTENT))
        file = StoredFile(
            id="file_1",
            tenant_id="t-1",
            name=name,
            original_name=name,
            upload_path="",
            media_type="image/png",
            size_bytes=SIZE,
            width_px=1,
            height_px=1,
            created_ms=NOW_MS,
            expires_ms=NOW_MS + FILE_KEPT_MS,
        )
        links = self.links.to_files(a_scope())(file)
        return links.file_url, links.download_url

    async def result(self) -> str:
        await self.results.keep_file("task-1/0", FakePayload(CONTENT))
        picture = Picture(
            0, "image/png", blob="task-1/0", expires_ms=NOW_MS + 86_400_000
        )
        link = self.links.to(a_scope())(picture)
        assert link is not None
        return link

    async def ask(
        self, link: str, method: str = "GET", **headers: str
    ) -> httpx.Response:
        transport = httpx.ASGITransport(cast("Any", self.app))
        sent = [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in headers.items()
        ]
        async with httpx.AsyncClient(transport=transport) as client:
            answer = await client.request(method, link, headers=sent)
        assert not self.crashes
        assert not self.uploads.open_ones
        assert not self.results.open_ones
        return answer


def a_scope() -> Scope:
    scope: Any = {"type": "http", "scheme": "http", "headers": []}
    found: Scope = scope
    return found


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_an_upload_opens_for_72_hours_to_the_minute(house: House) -> None:
    link, _ = await house.upload()

    house.clock.at_ms = NOW_MS + (72 * 60 - 1) * MINUTE_MS
    opened = await house.ask(link)
    house.clock.at_ms = NOW_MS + (72 * 60 + 1) * MINUTE_MS
    closed = await house.ask(link)

    assert (opened.status_code, opened.content) == (200, CONTENT)
    assert code_of(closed) == (403, "link_expired")


async def test_a_result_opens_for_24_hours(house: House) -> None:
    link = await house.result()

    house.clock.at_ms = NOW_MS + (24 * 60 - 1) * MINUTE_MS
    assert (await house.ask(link)).content == CONTENT
    house.clock.at_ms = NOW_MS + (24 * 60 + 1) * MINUTE_MS
    assert code_of(await house.ask(link)) == (403, "link_expired")


async def test_a_picture_comes_with_what_keeps_it_a_picture(house: House) -> None:
    for link, name in (
        ((await house.upload())[0], "fox.png"),
        (await house.result(), "task-1-0.png"),
    ):
        headers = (await house.ask(link)).headers

        assert headers["content-type"] == "image/png"
        assert headers["content-length"] == str(SIZE)
        assert headers["content-disposition"] == f'inline; filename="{name}"'
        assert headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["access-control-allow-origin"] == "*"
        assert headers["accept-ranges"] == "bytes"


async def test_a_download_link_saves_under_the_name(house: House) -> None:
    _, link = await house.upload('狐 "1".png')

    answer = await house.ask(link)

    assert answer.content == CONTENT
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"_ _1_.png\"; filename*=UTF-8''%E7%8B%90%20%221%22.png"
    )


@pytest.mark.parametrize("name", ["a%20b.png", "a+b&c=d.png", "#?;.png", "x.JPEG"])
async def test_any_name_makes_a_link_that_opens(house: House, name: str) -> None:
    link, _ = await house.upload(name)

    assert (await house.ask(link)).content == CONTENT


async def test_a_changed_link_opens_nothing(house: House) -> None:
    link, _ = await house.upload()
    path, _, query = link.partition("?")
    expires, _, signature = query.partition("&")
    later = int(expires.removeprefix("expires=")) + 1

    for changed in (
        path,
        f"{path}?{expires}",
        f"{path}?{signature}",
        f"{path}?expires={later}&{signature}",
        f"{path}?expires=0&{signature}",
        f"{path}?expires=-1&{signature}",
        f"{path}?expires={'9' * 5_000}&{signature}",
        f"{path}?expires=\u0661&{signature}",
        f"{path}?{expires}&signature=",
        f"{path}?{expires}&signature=\u00e9",
        link[:-1],
        link.replace("fox.png", "fax.png"),
        link.replace("file_1", "file_2"),
        link.replace("uploads", "results"),
        link + "&a=1" * 20,
    ):
        assert code_of(await house.ask(changed)) == (403, "link_invalid"), changed


async def test_another_gateways_link_opens_nothing_here(house: House) -> None:
    link, _ = await house.upload()
    house.app = Front(
        OpenLinks(
            Links(b"another secret", ORIGIN), house.results, house.uploads, house.clock
        ),
        house.clock,
        FakeChance(),
        FakeEvents(),
        lambda error, _: house.crashes.append(error),
    )

    assert code_of(await house.ask(link)) == (403, "link_invalid")


async def test_what_was_deleted_is_not_there_any_more(house: House) -> None:
    link, _ = await house.upload()
    await house.uploads.delete("file_1")

    assert code_of(await house.ask(link)) == (404, "result_expired")


async def test_a_key_on_a_link_is_ignored(house: House) -> None:
    link, _ = await house.upload()

    answer = await house.ask(link, authorization="Bearer nonsense")

    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_head_tells_all_and_sends_nothing(house: House) -> None:
    link, _ = await house.upload()
    whole = await house.ask(link)

    answer = await house.ask(link, "HEAD", range="bytes=0-9")

    assert (answer.status_code, answer.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "accept-ranges"):
        assert answer.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, SIZE),
        ("bytes=65530-131080", 65_530, 131_081),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=5-{SIZE * 2}", 5, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes= 1 - 2", 1, 3),
    ],
)
async def test_a_range_is_just_that_part(
    house: House, asked: str, start: int, stop: int
) -> None:
    link, _ = await house.upload()

    answer = await house.ask(link, range=asked)

    assert answer.status_code == 206
    assert answer.content == CONTENT[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-9,20-29",
        "bytes=9-0",
        "bytes=-",
        "bytes=a-b",
        "bytes=--1",
        "bytes=\u0661-2",
        "bytes=" + "9" * 100 + "-",
        "lines=1-2",
        "",
    ],
)
async def test_what_is_not_one_plain_range_gets_the_whole(
    house: House, asked: str
) -> None:
    link, _ = await house.upload()
    answer = await house.ask(link, range=asked)

    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert "content-range" not in answer.headers


@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE}", "bytes=-0"]
)
async def test_a_range_behind_the_end_is_told_the_size(
    house: House, asked: str
) -> None:
    link, _ = await house.upload()

    answer = await house.ask(link, range=asked)

    assert code_of(answer) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_a_broken_off_download_goes_on_with_the_same_file_only(
    house: House,
) -> None:
    link, _ = await house.upload()
    etag = (await house.ask(link)).headers["etag"]

    same = await house.ask(link, range="bytes=9-", if_range=etag)
    other = await house.ask(link, range="bytes=9-", if_range='"another"')

    assert (same.status_code, same.content) == (206, CONTENT[9:])
    assert (other.status_code, other.content) == (200, CONTENT)


async def test_who_has_the_picture_already_is_not_sent_it_again(house: House) -> None:
    link, _ = await house.upload()
    etag = (await house.ask(link)).headers["etag"]

    answer = await house.ask(link, if_none_match=f'"x", {etag}')

    assert (answer.status_code, answer.content) == (304, b"")
    assert (await house.ask(link, if_none_match='"x"')).status_code == 200


async def test_the_file_is_closed_when_the_reader_hangs_up(house: House) -> None:
    link, _ = await house.upload()
    gone = asyncio.Event()
    sent: list[int] = []

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            sent.append(len(message["body"]))
            gone.set()

    url = httpx.URL(link)
    scope = a_scope() | {"method": "GET", "path": url.path, "query_string": url.query}
    await house.app(scope, receive, send)  # type: ignore[arg-type]  # as a server builds it

    assert 0 < sum(sent) < SIZE
    assert not house.uploads.open_ones
    assert not house.crashes
