"""The status page: what it says, and what it does not let in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from gateway.api.status import feed_of, page_of
from gateway.core.errors import OutcomeUnknownError
from gateway.core.uptime import (
    DAY_MS,
    SLOT_MS,
    Count,
    Kind,
    Slot,
    day_of,
    incidents_of,
    slot_of,
    uptime_of,
)
from gateway.flows.uptime import Report
from gateway.ports import UptimeBook
from tests.inside import Inside, inside

MODEL = (Kind.MODEL, "gpt-image-2")
ATOM = "{http://www.w3.org/2005/Atom}"
UPSTREAMS = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Inside]:
    async with inside(tmp_path, works=False) as made:
        for upstream in UPSTREAMS:
            made.tune(upstream, latency_ms=0)
        yield made


def now_ms(there: Inside) -> int:
    return there.gateway.standing.clock.now_ms()


async def history(there: Inside) -> None:
    """A week with an outage of a quarter of an hour, two days ago."""
    now = now_ms(there)
    slots = [
        Slot(MODEL, day_of(now) - back * DAY_MS, Count(served=1_000))
        for back in range(1, 8)
    ]
    begun_ms = slot_of(now) - 2 * DAY_MS
    slots += [Slot(MODEL, begun_ms + n * SLOT_MS, Count(5, 15)) for n in range(3)]
    await there.books.uptime.add(slots)


async def test_what_ends_is_on_the_page_once_it_is_in_the_books(there: Inside) -> None:
    await there.ask()
    there.tune("sandbox-thrifty", failure_rate=1, failure_kind="overloaded")
    await there.ask()
    await there.ask(size="7:1")
    await there.gateway.standing.uptime.add()

    status = (await there.client.get("/status.json")).json()

    models = {each["name"]: each for each in status["models"]}
    upstreams = {each["name"]: each for each in status["upstreams"]}
    five = {"availability": 1.0, "served": 2, "failed": 0}
    assert status["state"] == "up"
    assert models["gpt-image-2"]["windows"]["5m"] == five
    assert models["gpt-image-2"]["windows"]["90d"] == five
    assert models["gpt-image-1.5"]["state"] == "unknown"
    half = {"availability": 0.5, "served": 1, "failed": 1}
    assert upstreams["sandbox-thrifty"]["windows"]["24h"] == half
    assert upstreams["sandbox-fair"]["windows"]["24h"]["served"] == 1


async def test_an_incident_is_told_on_the_page_in_json_and_in_the_feed(
    there: Inside,
) -> None:
    await history(there)

    page = (await there.client.get("/status")).text
    status = (await there.client.get("/status.json")).json()
    feed = ET.fromstring((await there.client.get("/status/feed.atom")).text)

    (incident,) = status["incidents"]
    assert (incident["name"], incident["served"], incident["failed"]) == (
        "gpt-image-2",
        15,
        45,
    )
    assert incident["until_ms"] - incident["since_ms"] == 3 * SLOT_MS
    assert "75 % of requests for gpt-image-2 failed" in page
    (entry,) = feed.findall(f"{ATOM}entry")
    assert entry.findtext(f"{ATOM}title") == "75 % of requests for gpt-image-2 failed"
    assert entry.findtext(f"{ATOM}published") is not None
    assert page.count("<rect") == 90 * (len(status["models"]) + len(UPSTREAMS))


async def test_the_page_needs_no_script_and_lets_none_in(there: Inside) -> None:
    answer = await there.client.get("/status", headers={"authorization": ""})

    policy = answer.headers["content-security-policy"]
    style = re.search(r"<style>(.*)</style>", answer.text, re.DOTALL)
    assert style is not None
    digest = hashlib.sha256(style[1].encode()).digest()
    assert answer.status_code == 200
    assert f"style-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "<script" not in answer.text
    assert "style=" not in answer.text
    assert not re.search(r"(src|href)=\"?https?:", answer.text)
    assert "prefers-color-scheme:dark" in answer.text


@pytest.mark.parametrize(
    "path", ["/status", "/status.json", "/status/feed.atom", "/metrics"]
)
async def test_the_media_type_is_told_with_its_charset_once(
    there: Inside, path: str
) -> None:
    told = (await there.client.get(path)).headers["content-type"]

    assert told.count("charset") == (0 if path.endswith("json") else 1)


async def test_the_badge_tells_thirty_days_of_a_model_or_of_all(there: Inside) -> None:
    await history(there)

    of_all = await there.client.get("/status/badge.svg")
    of_one = await there.client.get("/status/badge.svg?model=gpt-image-1.5")
    of_none = await there.client.get("/status/badge.svg?model=nothing")

    assert of_all.headers["content-type"] == "image/svg+xml"
    assert "uptime 30 d: 99.362 %" in of_all.text
    assert "uptime 30 d: no data" in of_one.text
    assert of_none.status_code == 404
    ET.fromstring(of_all.text)


async def test_whatever_a_host_or_a_model_is_called_it_is_text() -> None:
    name = 'a"><script>&b'
    slot = Slot((Kind.MODEL, name), 0, Count(0, 9))
    report = Report(
        at_ms=10 * SLOT_MS,
        models=(uptime_of(slot.subject, [slot], [], SLOT_MS),),
        upstreams=(),
        incidents=tuple(incidents_of([slot], 10 * SLOT_MS)),
    )

    page, feed = page_of(report).decode(), feed_of(report, f"http://{name}").decode()

    assert "<script" not in page + feed
    titles = ET.fromstring(feed).iter(f"{ATOM}title")
    assert [title.text for title in titles][1:] == [
        f"100 % of requests for {name} failed"
    ]


@pytest.mark.parametrize("failed", [0, 9])
def test_a_feed_that_says_nothing_new_is_the_same(failed: int) -> None:
    def feed(at_ms: int) -> bytes:
        slot = Slot(MODEL, 9 * SLOT_MS, Count(0, failed))
        incidents = tuple(incidents_of([slot], at_ms))
        assert all(incident.until_ms is None for incident in incidents)
        return feed_of(Report(at_ms, (), (), incidents), "http://h")

    assert feed(10 * SLOT_MS + 1) == feed(10 * SLOT_MS + 20_000)


async def test_names_of_upstreams_are_hidden_where_tenants_may_not_know_them(
    tmp_path: Path,
) -> None:
    config = Path("config/gateway.toml").read_text()
    hidden = config.replace("tenants_may_choose = true", "tenants_may_choose = false")
    assert hidden != config
    catalogue = Path("config/catalogue.toml").read_text()
    (tmp_path / "catalogue.toml").write_text(catalogue)
    async with inside(tmp_path, hidden, works=False) as there:
        page = (await there.client.get("/status")).text
        status = (await there.client.get("/status.json")).json()

    assert status["upstreams"] == []
    assert "sandbox-" not in page


async def test_while_the_database_is_away_counts_wait(there: Inside) -> None:
    await there.ask()
    book, kept = there.books.uptime, there.gateway.standing.uptime
    kept.book = Away()
    with pytest.raises(ConnectionError):
        await kept.add()
    await there.ask()
    kept.book = book
    await kept.add()
    await kept.add()

    assert sum(s.count.served for s in await book.slots(0) if s.subject == MODEL) == 2


async def test_an_end_in_the_middle_of_adding_counts_nothing_twice(
    there: Inside,
) -> None:
    await there.ask()
    book, kept = there.books.uptime, there.gateway.standing.uptime
    slow = Slow(book)
    kept.book = slow

    chore = asyncio.create_task(kept.add())
    await slow.begun.wait()
    chore.cancel()
    await asyncio.wait({chore})
    last = asyncio.create_task(kept.add())
    slow.go_on.set()
    await last

    assert sum(s.count.served for s in await book.slots(0) if s.subject == MODEL) == 1


async def test_what_may_be_in_the_books_is_not_added_again(there: Inside) -> None:
    await there.ask()
    book, kept = there.books.uptime, there.gateway.standing.uptime
    kept.book = Unsure(book)
    with pytest.raises(OutcomeUnknownError):
        await kept.add()
    kept.book = book
    await kept.add()

    assert sum(s.count.served for s in await book.slots(0) if s.subject == MODEL) == 1


async def test_however_often_it_is_asked_for_the_books_are_read_once(
    there: Inside,
) -> None:
    first, *others = await asyncio.gather(
        *(there.client.get("/status.json") for _ in range(20))
    )

    assert {answer.text for answer in others} == {first.text}


class Away:
    """A book that takes nothing."""

    async def add(self, slots: Iterable[Slot]) -> None:
        raise ConnectionError

    async def slots(self, since_ms: int) -> list[Slot]:
        return []

    async def days(self, since_ms: int) -> list[Slot]:
        return []

    async def troubled(self, since_ms: int, limit: int) -> list[Slot]:
        return []

    async def forget(self, before_ms: int) -> int:
        return 0


class Slow(Away):
    """A book that takes everything, when it is told to go on, whoever waits."""

    def __init__(self, book: UptimeBook) -> None:
        self.book = book
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def add(self, slots: Iterable[Slot]) -> None:
        async def late() -> None:
            await self.go_on.wait()
            await self.book.add(slots)

        self.begun.set()
        await asyncio.shield(asyncio.create_task(late()))


class Unsure(Away):
    """A book that takes everything, and fails to say so."""

    def __init__(self, book: UptimeBook) -> None:
        self.book = book

    async def add(self, slots: Iterable[Slot]) -> None:
        await self.book.add(slots)
        raise OutcomeUnknownError("It failed while it committed.")
