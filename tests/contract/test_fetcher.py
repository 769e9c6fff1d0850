"""The fetcher, over real sockets: what it fetches, and what it never touches.

The files are served from 127.0.0.2, which the operator allows here; canaries listen on
127.0.0.1 and ::1, which nobody allows, and count who comes by.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.fetcher import (
    FETCHES_MAX,
    FETCHES_MAX_PER_CALLER,
    FILE_MAX_BYTES,
    TURN_MAX_S,
    GuardedFetcher,
)
from gateway.adapters.outbound import (
    LOOKUP_TIMEOUT_S,
    REFUSAL_TIME_MS,
    SystemResolver,
)
from gateway.core.addresses import UrlRules, may_reach
from gateway.ports import FetcherBusyError, FetchRefusedError
from providers.kit.spool import Spool, SpoolFolder
from tests.fakes import StillClock
from tests.virtual_time import LoopClock, VirtualTimeLoop

ALLOWED = ip_network("127.0.0.2/32")
HOME = "127.0.0.2"
PORTS = range(20_000, 32_000)
"""Below those that the system gives away by itself."""
NAME = "files.example.com"
FILE = bytes(range(256)) * 1024

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


# --- the network under test ---


@dataclass
class Zone:
    """A name server: each lookup of a name takes its next answer; the last stays."""

    names: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.names.get(host)
        if answers is None:
            raise OSError(f"no such name: {host}")
        return answers.pop(0) if len(answers) > 1 else answers[0]


@dataclass
class Witness(httpcore.AsyncNetworkBackend):
    """The real network, and a list of all that was dialled."""

    dialled: list[str] = field(default_factory=list)

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        return await httpcore.AnyIOBackend().connect_tcp(host, port, *args, **options)


@dataclass
class Site:
    """A file server on the allowed address, with a script per path.

    After a ``lasting`` path it waits for another request on the same connection.
    """

    pages: dict[str, Script] = field(default_factory=dict)
    lasting: set[str] = field(default_factory=set)
    port: int = 0
    heads: list[str] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str, host: str = HOME) -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        try:
            path = await self.answer(reader, writer)
            while path in self.lasting:
                path = await self.answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up.set()
        finally:
            self.open_now -= 1
            writer.close()

    async def answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> str:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        path = head.split()[1]
        await self.pages[path](writer)
        return path


@dataclass
class Canary:
    """Listens where nobody may come, and counts who does."""

    port: int = 0
    visits: int = 0

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.visits += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret")
        writer.close()


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, host, port, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def shared_port(*hosts: str) -> int:
    """Find a port that is free on all of these.

    Not one that the system gave for the first: on the next it may be taken.
    """
    for port in random.sample(PORTS, 100):
        try:
            for host in hosts:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                with socket.socket(family) as taken:
                    taken.bind((host, port))
        except OSError:
            continue
        return port
    raise AssertionError(hosts)


@dataclass
class Street:
    """A site, canaries around it, and the fetcher that is led astray."""

    site: Site
    canary: Canary
    zone: Zone
    clock: StillClock
    witness: Witness
    fetcher: GuardedFetcher
    spools: SpoolFolder

    async def fetch(
        self, url: str, *, limit_bytes: int = 2**20, deadline_s: float = 10
    ) -> bytes:
        spool = self.spools.open("raw", limit_bytes=limit_bytes)
        try:
            await self.fetcher.fetch(url, spool, deadline_s=deadline_s)
            return b"".join(spool.chunks())
        finally:
            spool.close()

    async def refusal(self, url: str, **options: Any) -> str:
        with pytest.raises(FetchRefusedError) as refused:
            await self.fetch(url, **options)
        return str(refused.value)


@pytest.fixture
async def street(tmp_path: Path) -> AsyncGenerator[Street, None]:
    site, canary = Site(), Canary()
    zone = Zone({NAME: [[HOME]]})
    clock, witness = StillClock(), Witness()
    async with AsyncExitStack() as stack:
        site.port = await stack.enter_async_context(listening(site.serve, HOME))
        canary.port = shared_port("127.0.0.1", "::1", HOME)
        for host in ("127.0.0.1", "::1"):
            await stack.enter_async_context(listening(canary.serve, host, canary.port))
        fetcher = GuardedFetcher(
            clock,
            zone.resolve,
            UrlRules(("https", "http"), (443, 80, site.port, canary.port)),
            (ALLOWED,),
            network=witness,
        )
        yield Street(site, canary, zone, clock, witness, fetcher, SpoolFolder(tmp_path))


def answering(data: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return script


def the_file(*headers: str) -> Script:
    lines = [f"Content-Length: {len(FILE)}", *headers, "", ""]
    return answering("\r\n".join(["HTTP/1.1 200 OK", *lines]).encode() + FILE)


def a_redirect(location: str, status: int = 302) -> Script:
    return answering(
        f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\n"
        "Content-Length: 0\r\n\r\n".encode()
    )


# --- what is fetched ---


async def test_a_file_comes_as_it_is_from_the_address_that_was_checked(
    street: Street,
) -> None:
    street.site.pages["/a.png?v=1"] = the_file("Content-Type: image/png")
    assert await street.fetch(street.site.url("/a.png?v=1", NAME)) == FILE
    assert street.witness.dialled == [HOME]
    (head,) = street.site.heads
    assert f"Host: {NAME}:{street.site.port}\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head


async def test_a_redirect_is_followed_and_its_name_looked_up_anew(
    street: Street,
) -> None:
    street.zone.names["cdn.example.com"] = [[HOME]]
    street.site.pages["/1"] = a_redirect("/2", 301)
    street.site.pages["/2"] = a_redirect(street.site.url("/3", "cdn.example.com"), 307)
    street.site.pages["/3"] = a_redirect(street.site.url("/4", NAME), 308)
    street.site.pages["/4"] = the_file()
    assert await street.fetch(street.site.url("/1", NAME)) == FILE
    assert street.zone.asked == [NAME, NAME, "cdn.example.com", NAME]


async def test_the_next_address_is_tried_when_one_does_not_answer(
    street: Street,
) -> None:
    fetcher = GuardedFetcher(
        street.clock,
        Zone({NAME: [["127.0.0.3", HOME]]}).resolve,
        street.fetcher.rules,
        (ip_network("127.0.0.2/31"),),
        network=street.witness,
    )
    street.site.pages["/"] = the_file()
    spool = street.spools.open("raw")
    await fetcher.fetch(street.site.url("/", NAME), spool, deadline_s=10)
    assert spool.size_bytes == len(FILE)
    assert street.witness.dialled == ["127.0.0.3", HOME]
    spool.close()


async def test_a_chunked_file_and_one_that_ends_with_its_connection_come_whole(
    street: Street,
) -> None:
    chunk = b"%x\r\n%b\r\n" % (len(FILE), FILE)
    street.site.pages["/chunked"] = answering(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    )
    street.site.pages["/closed"] = answering(b"HTTP/1.1 200 OK\r\n\r\n" + FILE)
    assert await street.fetch(street.site.url("/chunked")) == FILE
    assert await street.fetch(street.site.url("/closed")) == FILE


# --- what is never touched ---


def canary_urls(port: int) -> list[str]:
    return [
        f"http://127.0.0.1:{port}/",
        f"http://[::1]:{port}/",
        f"http://[::ffff:127.0.0.1]:{port}/",
        f"http://2130706433:{port}/",
        f"http://0x7f000001:{port}/",
        f"http://0177.0.0.1:{port}/",
        f"http://127.1:{port}/",
        f"http://0.0.0.0:{port}/",
        f"http://localhost:{port}/",
        f"http://inside.example.com:{port}/",
        f"http://mixed.example.com:{port}/",
        f"http://mixed6.example.com:{port}/",
        f"http://mapped.example.com:{port}/",
        f"http://many.example.com:{port}/",
        f"http://{NAME}@127.0.0.1:{port}/",
        f"//127.0.0.1:{port}/",
    ]


INSIDE = {
    "inside.example.com": [["127.0.0.1"]],
    "mixed.example.com": [[HOME, "127.0.0.1"]],
    "mixed6.example.com": [[HOME, "::1"]],
    "mapped.example.com": [["::ffff:127.0.0.1"]],
    # Further back than would ever be dialled.
    "many.example.com": [[HOME] * 40 + ["127.0.0.1"]],
}


async def test_no_url_leads_to_a_canary(street: Street) -> None:
    street.zone.names |= INSIDE
    for url in canary_urls(street.canary.port):
        await street.refusal(url)
    assert street.canary.visits == 0
    assert street.witness.dialled == []


async def test_no_redirect_leads_to_a_canary(street: Street) -> None:
    street.zone.names |= INSIDE
    locations = [
        *canary_urls(street.canary.port),
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://2852039166/latest/meta-data/",
        "file:///etc/passwd",
        f"gopher://127.0.0.1:{street.canary.port}/_",
    ]
    for location in locations:
        # A detour first: a check of the first hop only would let it through.
        street.site.pages["/1"] = a_redirect("/2")
        street.site.pages["/2"] = a_redirect(location)
        await street.refusal(street.site.url("/1", NAME))
    assert street.canary.visits == 0
    assert street.witness.dialled == [HOME] * 2 * len(locations)


async def test_a_name_that_moves_inside_after_its_check_is_not_followed(
    street: Street,
) -> None:
    street.zone.names["rebind.example.com"] = [[HOME], ["127.0.0.1"]]
    # Site and canary differ in nothing but what the name server says.
    async with listening(street.site.serve, HOME, street.canary.port):
        street.site.port = street.canary.port
        # And the first connection is there to be used again, unlooked-up.
        street.site.lasting.add("/")
        street.site.pages["/"] = a_redirect("/again")
        street.site.pages["/again"] = the_file()
        await street.refusal(street.site.url("/", "rebind.example.com"))
    assert street.zone.asked == ["rebind.example.com"] * 2
    assert street.witness.dialled == [HOME]
    assert street.canary.visits == 0


async def test_a_client_without_a_guard_does_reach_the_canary(street: Street) -> None:
    """The control: these canaries sing."""
    async with httpx.AsyncClient(trust_env=False, follow_redirects=True) as naive:
        for location in canary_urls(street.canary.port)[:4]:
            before = street.canary.visits
            street.site.pages["/"] = a_redirect(location)
            answer = await naive.get(street.site.url("/"))
            assert answer.text == "secret"
            assert street.canary.visits == before + 1


# --- what cannot be told apart ---


async def test_inside_unknown_and_silent_hosts_look_alike(street: Street) -> None:
    street.zone.names["inside.example.com"] = [["10.0.0.1"]]
    port = street.canary.port
    said = [
        await street.refusal(f"http://10.0.0.1:{port}/"),
        await street.refusal(f"http://inside.example.com:{port}/"),
        await street.refusal(f"http://unknown.example.com:{port}/"),
        await street.refusal(f"http://{HOME}:{port}/"),
    ]
    assert len(set(said)) == 1
    assert "could not be reached" in said[0]
    assert street.clock.slept_s == [REFUSAL_TIME_MS / 1000] * 4


async def test_a_slow_lookup_is_not_made_slower(street: Street) -> None:
    async def slow(host: str, port: int) -> Sequence[str]:
        street.clock.at_ms += 100 if host == NAME else 900
        return ["10.0.0.1"]

    fetcher = GuardedFetcher(street.clock, slow)
    for name in (NAME, "other.example.com"):
        with pytest.raises(FetchRefusedError):
            await fetcher.fetch(
                f"https://{name}/", street.spools.open("raw"), deadline_s=10
            )
    assert street.clock.slept_s == [(REFUSAL_TIME_MS - 100) / 1000, 0]


@pytest.mark.parametrize("answer", ["", "not an address", "10.0.0.1/8"])
async def test_an_answer_that_is_no_address_is_a_refusal(
    street: Street, answer: str
) -> None:
    street.zone.names[NAME] = [[HOME, answer]]
    assert "could not be reached" in await street.refusal(street.site.url("/", NAME))
    assert street.witness.dialled == []


async def test_a_name_without_addresses_is_a_refusal(street: Street) -> None:
    street.zone.names[NAME] = [[]]
    assert "could not be reached" in await street.refusal(street.site.url("/", NAME))


# --- what is too much ---


async def test_one_byte_over_the_limit_is_refused_as_soon_as_it_is_said(
    street: Street,
) -> None:
    async def declares(writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (FILE_MAX_BYTES + 1)
        )
        await writer.drain()
        await asyncio.sleep(60)

    street.site.pages["/"] = declares
    said = await street.refusal(street.site.url("/"), limit_bytes=FILE_MAX_BYTES)
    assert said == "The file is too large."


async def test_one_byte_over_the_limit_is_refused_though_nothing_was_said(
    street: Street,
) -> None:
    street.site.pages["/all"] = answering(
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(FILE_MAX_BYTES)
    )
    street.site.pages["/more"] = answering(
        b"HTTP/1.1 200 OK\r\n\r\n" + bytes(FILE_MAX_BYTES + 1)
    )
    everything = await street.fetch(street.site.url("/all"), limit_bytes=FILE_MAX_BYTES)
    assert len(everything) == FILE_MAX_BYTES
    said = await street.refusal(street.site.url("/more"), limit_bytes=FILE_MAX_BYTES)
    assert said == "The file is too large."


async def test_an_endless_file_ends_at_the_limit(street: Street) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()

    street.site.pages["/"] = endless
    assert await street.refusal(street.site.url("/")) == "The file is too large."
    await asyncio.wait_for(street.site.hung_up.wait(), 5)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_a_drip_ends_at_the_deadline_and_is_hung_up_on(
    street: Street, head: bytes
) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for letter in itertools.cycle([b"H"]):
            writer.write(letter)
            await writer.drain()
            await asyncio.sleep(0.02)

    street.site.pages["/"] = drip
    said = await street.refusal(street.site.url("/"), deadline_s=0.2)
    assert said == "The file did not come within 0.2 s."
    await asyncio.wait_for(street.site.hung_up.wait(), 5)


async def test_a_compressed_answer_is_not_unpacked(street: Street) -> None:
    for encoding in ("gzip", "GZIP", "br", "identity, gzip", "x"):
        street.site.pages["/"] = the_file(f"Content-Encoding: {encoding}")
        assert "compressed" in await street.refusal(street.site.url("/"))
    street.site.pages["/"] = the_file("Content-Encoding: identity")
    assert await street.fetch(street.site.url("/")) == FILE


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12345678",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n12345678",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n12345678",
        b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n12345678" % (b"9" * 5000),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n12345678\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n12345678\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n12345678",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
    ids=lambda answer: ascii(answer)[-40:],
)
async def test_an_answer_that_is_broken_or_breaks_off_is_refused(
    street: Street, answer: bytes
) -> None:
    street.site.pages["/"] = answering(answer)
    assert "did not come whole" in await street.refusal(street.site.url("/"))


async def test_what_comes_after_the_said_length_is_not_taken(street: Street) -> None:
    street.site.pages["/"] = answering(
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfileHTTP/1.1 200 OK\r\n\r\nmore"
    )
    assert await street.fetch(street.site.url("/")) == b"file"


@pytest.mark.parametrize("status", [204, 206, 300, 304, 401, 404, 500, 999])
async def test_any_other_status_is_no_file(street: Street, status: int) -> None:
    street.site.pages["/"] = answering(b"HTTP/1.1 %d X\r\n\r\n" % status)
    assert f"status {status}" in await street.refusal(street.site.url("/"))


async def test_the_fourth_redirect_is_not_followed(street: Street) -> None:
    for hop in range(1, 6):
        street.site.pages[f"/{hop}"] = a_redirect(f"/{hop + 1}")
    assert "more than 3 times" in await street.refusal(street.site.url("/1"))
    assert len(street.site.heads) == 4


async def test_a_redirect_to_nowhere_is_refused(street: Street) -> None:
    street.site.pages["/"] = answering(b"HTTP/1.1 302 Found\r\n\r\n")
    await street.refusal(street.site.url("/"))
    street.site.pages["/"] = answering(
        b"HTTP/1.1 302 Found\r\nLocation: /a\r\nLocation: /b\r\n\r\n"
    )
    await street.refusal(street.site.url("/"))


async def test_only_so_many_files_come_at_once(street: Street) -> None:
    more = FETCHES_MAX + 8
    go = asyncio.Event()

    async def held(writer: asyncio.StreamWriter) -> None:
        if street.site.open_now == FETCHES_MAX:
            # Long enough for one more to come, if it could.
            asyncio.get_running_loop().call_later(0.03, go.set)
        await go.wait()
        await the_file()(writer)

    street.site.pages["/"] = held
    async with asyncio.TaskGroup() as fetches:
        for _ in range(more):
            fetches.create_task(street.fetch(street.site.url("/")))
    assert street.site.open_most == FETCHES_MAX
    assert len(street.site.heads) == more


async def test_a_full_disk_is_not_the_callers_fault(street: Street) -> None:
    class FullSpool(Spool):
        __slots__ = ()

        def append(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    street.site.pages["/"] = the_file()
    full = FullSpool(street.spools.path, "raw", 2**20)
    with pytest.raises(OSError, match="No space"):
        await street.fetcher.fetch(street.site.url("/"), full, deadline_s=10)


# --- time, on a loop where none passes ---


async def hanging(host: str, port: int) -> Sequence[str]:
    await asyncio.sleep(3600)
    return [HOME]


@pytest.mark.parametrize(
    ("deadline_s", "says", "takes_s"),
    [
        (30, "could not be reached", LOOKUP_TIMEOUT_S),
        (2, "did not come within 2 s", 2),
    ],
)
def test_a_lookup_that_hangs_is_given_up(
    deadline_s: float, says: str, takes_s: float, tmp_path: Path
) -> None:
    async def story() -> float:
        fetcher = GuardedFetcher(LoopClock(), hanging)
        spool = SpoolFolder(tmp_path).open("raw")
        with pytest.raises(FetchRefusedError, match=says):
            await fetcher.fetch(f"https://{NAME}/", spool, deadline_s=deadline_s)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        assert runner.run(story()) == takes_s


def test_waiting_for_a_turn_ends_and_is_not_the_hosts_fault(tmp_path: Path) -> None:
    async def fate(fetcher: GuardedFetcher) -> str:
        with contextlib.closing(SpoolFolder(tmp_path).open("raw")) as spool:
            with pytest.raises(FetchRefusedError) as refused:
                await fetcher.fetch(f"https://{NAME}/", spool, deadline_s=30)
            return str(refused.value)

    async def story() -> list[str]:
        fetcher = GuardedFetcher(LoopClock(), hanging)
        rounds = int(TURN_MAX_S / LOOKUP_TIMEOUT_S) + 2
        return await asyncio.gather(
            *(fate(fetcher) for _ in range(FETCHES_MAX * rounds))
        )

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        fates = runner.run(story())
    assert "could not be reached" in fates[0]
    assert "as much as it may" in fates[-1]


@dataclass
class Queue:
    """A fetcher on virtual time whose every fetch takes as long as it may."""

    fetcher: GuardedFetcher
    spools: SpoolFolder

    async def ended(self, caller: str, deadline_s: float = 30) -> tuple[str, float]:
        """Fetch; returns how it ended, and when."""
        spool = self.spools.open("raw")
        outcome = "?"
        try:
            await self.fetcher.fetch(
                f"https://{NAME}/", spool, deadline_s=deadline_s, caller=caller
            )
        except FetcherBusyError:
            outcome = "busy"
        except FetchRefusedError:
            outcome = "refused"
        finally:
            spool.close()
        return outcome, asyncio.get_running_loop().time()

    async def ends(self, *fetches: tuple[str, float]) -> list[tuple[str, float]]:
        return await asyncio.gather(*(self.ended(*fetch) for fetch in fetches))


def queued(tmp_path: Path, *fetches: tuple[str, float]) -> list[tuple[str, float]]:
    class Silence(httpcore.AsyncNetworkBackend):
        async def connect_tcp(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
            await asyncio.sleep(3600)
            raise AssertionError

    async def here(host: str, port: int) -> Sequence[str]:
        return ["93.184.216.34"]

    async def story() -> list[tuple[str, float]]:
        fetcher = GuardedFetcher(LoopClock(), here, network=Silence())
        return await Queue(fetcher, SpoolFolder(tmp_path)).ends(*fetches)

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(story())


def test_the_time_of_a_fetch_begins_with_its_turn(tmp_path: Path) -> None:
    first = [("a", 15.0)] * FETCHES_MAX_PER_CALLER
    ends = queued(tmp_path, *first, ("a", 30.0))

    assert ends == [("refused", 15)] * FETCHES_MAX_PER_CALLER + [("refused", 45)]


def test_who_waits_too_long_for_a_turn_is_told_that_all_are_busy(
    tmp_path: Path,
) -> None:
    callers = [str(i) for i in range(FETCHES_MAX // FETCHES_MAX_PER_CALLER)]
    most = [(caller, 30.0) for caller in callers] * FETCHES_MAX_PER_CALLER
    ends = queued(tmp_path, *most, ("late", 30.0))

    assert ends == [("refused", 30)] * FETCHES_MAX + [("busy", TURN_MAX_S)]


def test_one_caller_cannot_take_the_turns_of_all(tmp_path: Path) -> None:
    greedy = [("greedy", 30.0)] * (3 * FETCHES_MAX)
    ends = queued(tmp_path, *greedy, ("modest", 5.0))

    assert ends[-1] == ("refused", 5)
    assert ends.count(("refused", 30)) == FETCHES_MAX_PER_CALLER
    assert ends.count(("busy", TURN_MAX_S)) == (len(greedy) - FETCHES_MAX_PER_CALLER)


# --- TLS ---


@dataclass(frozen=True)
class Certificate:
    path: Path
    key: Path

    def server(self, asked_names: list[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path, self.key)
        context.sni_callback = lambda _, name, __: asked_names.append(name or "")
        return context


def certificate(folder: Path, name: str, *, kind: str = "DNS") -> Certificate:
    openssl = shutil.which("openssl")
    assert openssl, "these tests need the openssl command"
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    command = (
        f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN={name} -addext subjectAltName={kind}:{name} "
        f"-out {made.path} -keyout {made.key}"
    )
    subprocess.run([openssl, *command.split()], check=True, capture_output=True)
    return made


@asynccontextmanager
async def a_secure_site(
    street: Street, folder: Path, name: str
) -> AsyncIterator[tuple[GuardedFetcher, Site, list[str]]]:
    """Serve with a certificate for ``name``, which the fetcher trusts."""
    site, asked_names, made = Site(), list[str](), certificate(folder, name)
    site.pages["/"] = the_file()
    trust = ssl.create_default_context(cafile=str(made.path))
    async with listening(site.serve, HOME, tls=made.server(asked_names)) as port:
        site.port = port
        fetcher = GuardedFetcher(
            street.clock,
            street.zone.resolve,
            UrlRules(ports=(port,)),
            (ALLOWED,),
            tls=trust,
        )
        yield fetcher, site, asked_names


async def test_the_name_is_what_the_certificate_is_checked_against(
    street: Street, tmp_path: Path
) -> None:
    async with a_secure_site(street, tmp_path, NAME) as (fetcher, site, asked_names):
        spool = street.spools.open("raw")
        url = f"https://{NAME}:{site.port}/"
        await fetcher.fetch(url, spool, deadline_s=10)
        assert b"".join(spool.chunks()) == FILE
        assert asked_names == [NAME]
        spool.close()


async def test_a_certificate_for_another_name_is_refused_at_the_right_address(
    street: Street, tmp_path: Path
) -> None:
    async with a_secure_site(street, tmp_path, "other.example.com") as secure:
        fetcher, site, _ = secure
        for host in (NAME, HOME):
            with pytest.raises(FetchRefusedError, match="certificate"):
                await fetcher.fetch(
                    f"https://{host}:{site.port}/",
                    street.spools.open("raw"),
                    deadline_s=10,
                )
        assert site.heads == []


async def test_a_broken_record_is_a_refusal(street: Street, tmp_path: Path) -> None:
    made = certificate(tmp_path, NAME)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = made.server([]).wrap_bio(incoming, outgoing, server_side=True)

    async def shakes_hands_and_mumbles(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                server_side.do_handshake()
                break
            writer.write(outgoing.read())
            incoming.write(await reader.read(65_536))
        writer.write(outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        await writer.drain()
        await reader.read()
        writer.close()

    async with listening(shakes_hands_and_mumbles, HOME) as port:
        fetcher = GuardedFetcher(
            street.clock,
            street.zone.resolve,
            UrlRules(ports=(port,)),
            (ALLOWED,),
            tls=ssl.create_default_context(cafile=str(made.path)),
        )
        with pytest.raises(FetchRefusedError, match="did not come whole"):
            await fetcher.fetch(
                f"https://{NAME}:{port}/", street.spools.open("raw"), deadline_s=10
            )


async def test_a_certificate_of_an_unknown_issuer_is_refused(
    street: Street, tmp_path: Path
) -> None:
    async with a_secure_site(street, tmp_path, NAME) as (trusting, site, _):
        fetcher = GuardedFetcher(
            street.clock, street.zone.resolve, trusting.rules, (ALLOWED,)
        )
        with pytest.raises(FetchRefusedError, match="certificate"):
            await fetcher.fetch(
                f"https://{NAME}:{site.port}/",
                street.spools.open("raw"),
                deadline_s=10,
            )


# --- the machine's resolver ---


async def test_the_machines_resolver_finds_all_addresses_or_says_so() -> None:
    resolver = SystemResolver()
    try:
        found = await resolver.resolve("localhost", 80)
        assert {ip_address(text).is_loopback for text in found} == {True}
        with pytest.raises(OSError, match=r"."):
            await resolver.resolve("", -1)
    finally:
        resolver.close()


# --- any text at all ---


@dataclass
class Echoing(httpcore.AsyncNetworkBackend):
    """Any host answers, with the same redirect; what was dialled is kept."""

    location: str
    dialled: list[str] = field(default_factory=list)

    async def connect_tcp(
        self, host: str, port: int, *_: Any, **__: Any
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        location = re.sub(r"[\r\n\0]", "", self.location).encode(errors="replace")
        return httpcore.AsyncMockStream(
            [b"HTTP/1.1 302 X\r\nLocation: ", location, b"\r\n\r\n"]
        )


HOSTS = st.sampled_from(
    [
        "127.0.0.1",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "0x7f.1",
        "8.8.8.8",
        "[2606:4700::1]",
        NAME,
        "mixed.example.com",
        "inside.example.com",
        "gone.example.com",
        "localhost",
        "169.254.169.254",
        "2130706433",
        "b\u00fccher.example",
        "a@b.example.com",
    ]
)
NAMES = {
    NAME: [["93.184.215.14"]],
    "xn--bcher-kva.example": [["2606:4700::1", "93.184.215.14"]],
    "mixed.example.com": [["93.184.215.14", "192.168.0.1"]],
    "inside.example.com": [["fd00::1"]],
}
URLS = st.text() | st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["https://", "http://", "//", "file://", "HTTP://", ""]),
    HOSTS | st.text(max_size=8),
    st.sampled_from(["", ":443", ":80", ":22", ":", ":-1"]),
    st.text(max_size=8) | st.text(max_size=8).map("/{}".format),
)


NO_TRUST = ssl.create_default_context()


def follow(url: str, location: str) -> list[str]:
    """Fetch a URL from a world that only redirects; returns what was dialled."""
    network = Echoing(location)
    fetcher = GuardedFetcher(
        StillClock(),
        Zone(dict(NAMES)).resolve,
        UrlRules(("https", "http")),
        tls=NO_TRUST,
        network=network,
    )
    spool = SpoolFolder(Path()).open("raw")
    with pytest.raises(FetchRefusedError):
        asyncio.run(fetcher.fetch(url, spool, deadline_s=10))
    assert spool.size_bytes == 0
    return network.dialled


@given(URLS, URLS)
def test_any_text_is_refused_or_dialled_where_it_may_be(
    url: str, location: str
) -> None:
    for host in follow(url, location):
        assert may_reach(ip_address(host), ())


def test_public_hosts_are_dialled_in_that_world() -> None:
    """The control: there is something to find."""
    here, there = f"https://{NAME}/", "http://b\u00fccher.example"
    assert follow(here, there) == ["93.184.215.14"] + ["2606:4700::1"] * 3
