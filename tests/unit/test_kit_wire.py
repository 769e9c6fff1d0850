"""The wire: what can go wrong between us and an upstream, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.spool import SpoolFolder
from providers.kit.wire import (
    ERROR_BODY_MAX_BYTES,
    RETRY_AFTER_MAX_S,
    Body,
    Call,
    Download,
    Wire,
    retry_after_s,
    scrub,
)

SECRET = "s3cret-of-the-account"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def upstream(script: Script) -> AsyncGenerator[str, None]:
    """Serve a script on loopback, after the whole request came in."""

    async def handle(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
        await reader.readexactly(int(length or b"0"))
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def answering(data: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return script


def answer(body: bytes, *headers: str, status: int = 200) -> Script:
    lines = [f"HTTP/1.1 {status} x", f"Content-Length: {len(body)}", *headers]
    return answering("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


@asynccontextmanager
async def wire(
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncGenerator[Wire, None]:
    one = Wire(4, transport=transport, download_pauses_s=(0, 0, 0))
    try:
        yield one
    finally:
        await one.close()


def a_call(url: str, *, deadline_s: float = 5.0) -> Call:
    return Call(
        "POST",
        url,
        asyncio.get_running_loop().time() + deadline_s,
        headers={"Authorization": f"Bearer {SECRET}"},
        json={"prompt": "x"},
        secret=SECRET,
    )


async def body_of(one: Wire, call: Call) -> bytes:
    async with one.exchange(call) as reply:
        return b"".join([chunk async for chunk in reply.chunks()])


async def failure_of(one: Wire, call: Call) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await body_of(one, call)
    assert SECRET not in str(caught.value)
    return caught.value


async def test_a_body_comes_as_it_was_sent() -> None:
    async with upstream(answer(b"x" * 100_000)) as url, wire() as one:
        assert await body_of(one, a_call(url)) == b"x" * 100_000


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_refused_connection_was_certainly_not_bought() -> None:
    async with wire() as one:
        error = await failure_of(one, a_call(f"http://127.0.0.1:{closed_port()}"))
    assert (error.kind, error.billed) == (FailureKind.NETWORK, Billed.NO)


async def test_a_name_that_does_not_resolve_was_certainly_not_bought() -> None:
    async with wire() as one:
        error = await failure_of(one, a_call("http://no-such-host.invalid"))
    assert error.kind is FailureKind.NETWORK


async def test_no_handshake_at_all_was_certainly_not_bought() -> None:
    async def plain(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no TLS here")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, wire() as one:
        error = await failure_of(one, a_call(f"https://127.0.0.1:{port}"))
    assert error.kind is FailureKind.NETWORK


async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


@pytest.mark.parametrize(
    "script",
    [
        answering(b""),
        reset,
        answering(b"HTTP/1.1 200 OK\r\nContent-Le"),
        answering(b"this is not HTTP\r\n\r\n"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha"),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhalf"),
        answering(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
    ],
    ids=[
        "closed without a word",
        "reset",
        "half a head",
        "not HTTP",
        "half a body",
        "half a chunk",
        "a broken chunk",
        "an endless header",
    ],
)
async def test_what_breaks_after_sending_has_an_unknown_outcome(script: Script) -> None:
    async with upstream(script) as url, wire() as one:
        error = await failure_of(one, a_call(url))
    assert (error.kind, error.billed) == (FailureKind.TIMEOUT, Billed.MAYBE)


async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def test_the_deadline_ends_a_call_that_never_answers() -> None:
    async with upstream(hang) as url, wire() as one:
        error = await failure_of(one, a_call(url, deadline_s=0.05))
    assert error.kind is FailureKind.TIMEOUT
    assert "deadline" in error.detail


async def test_the_deadline_ends_a_body_that_drips() -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
        for _tick in range(9999):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with upstream(drip) as url, wire() as one:
        error = await failure_of(one, a_call(url, deadline_s=0.1))
    assert error.kind is FailureKind.TIMEOUT


def pausing(*pieces: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for piece in pieces:
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.write(piece)

    return script


async def test_a_body_may_be_late_but_must_not_stall() -> None:
    late, stalled = pausing(b"complete"), pausing(b"half", b"half")
    one = Wire(4, body_idle_s=0.02)
    async with upstream(late) as url:
        assert await body_of(one, a_call(url)) == b"complete"
    async with upstream(stalled) as url:
        error = await failure_of(one, a_call(url))
    assert (error.kind, error.status) == (FailureKind.TIMEOUT, 200)
    await one.close()


async def test_without_time_left_nothing_is_sent() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request.url)

    async with wire(httpx.MockTransport(handler)) as one:
        error = await failure_of(one, a_call("http://upstream.test", deadline_s=0))
    assert (error.kind, error.billed) == (FailureKind.TIMEOUT, Billed.NO)


async def test_cancelling_passes_through_and_frees_the_connection() -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        gone.set()

    async with upstream(script) as url, wire() as one:
        call = asyncio.create_task(body_of(one, a_call(url)))
        await asyncio.wait_for(asked.wait(), 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(gone.wait(), 10)


async def test_a_compressed_body_is_refused_not_unpacked() -> None:
    script = answer(gzip.compress(bytes(10_000_000)), "Content-Encoding: gzip")
    async with upstream(script) as url, wire() as one:
        error = await failure_of(one, a_call(url))
    assert (error.kind, error.billed) == (FailureKind.BAD_GATEWAY, Billed.MAYBE)


async def test_a_plain_answer_is_asked_for_and_no_cookie_is_kept() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, headers={"Set-Cookie": "a=b"})

    async with wire(httpx.MockTransport(handler)) as one:
        for _ in range(2):
            await body_of(one, a_call("http://upstream.test"))
    assert [r.headers["accept-encoding"] for r in seen] == ["identity"] * 2
    assert "cookie" not in seen[1].headers


async def test_a_redirect_is_not_followed() -> None:
    script = answer(b"", "Location: http://127.0.0.1:1/", status=302)
    async with (
        upstream(script) as url,
        wire() as one,
        one.exchange(a_call(url)) as reply,
    ):
        assert (reply.status, reply.is_success) == (302, False)


@pytest.mark.parametrize(
    ("script", "read_bytes"),
    [
        (answer(b"x" * 1_000_000, status=500), ERROR_BODY_MAX_BYTES),
        (answering(b"HTTP/1.1 500 x\r\nContent-Length: 99\r\n\r\nhalf"), 4),
        (answer(b"x" * 99, "Content-Encoding: gzip", status=500), 0),
    ],
)
async def test_an_error_body_is_read_to_a_limit_and_may_break_off(
    script: Script, read_bytes: int
) -> None:
    async with (
        upstream(script) as url,
        wire() as one,
        one.exchange(a_call(url)) as reply,
    ):
        assert len(await reply.error_body()) == read_bytes


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (httpx.ConnectError("x"), FailureKind.NETWORK),
        (httpx.ConnectTimeout("x"), FailureKind.NETWORK),
        (httpx.PoolTimeout("x"), FailureKind.NETWORK),
        (httpx.ReadTimeout("x"), FailureKind.TIMEOUT),
        (httpx.WriteError("x"), FailureKind.TIMEOUT),
        (httpx.RemoteProtocolError("x"), FailureKind.TIMEOUT),
        (ConnectionResetError("x"), FailureKind.TIMEOUT),
        (RuntimeError("Session is closed"), FailureKind.TIMEOUT),
    ],
)
async def test_whatever_the_client_raises_becomes_a_provider_error(
    broken: Exception, kind: FailureKind
) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise broken

    async with wire(httpx.MockTransport(handler)) as one:
        assert (await failure_of(one, a_call("http://upstream.test"))).kind is kind


class BrokenStream(httpx.AsyncByteStream):
    """A body that breaks in the words of a connection that was never made."""

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        yield b"half"
        raise httpx.ConnectTimeout("x")


async def test_a_body_that_breaks_was_sent_whatever_the_client_calls_it() -> None:
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, stream=BrokenStream())
    )
    async with wire(transport) as one:
        error = await failure_of(one, a_call("http://upstream.test"))
    assert (error.kind, error.status) == (FailureKind.TIMEOUT, 200)


async def test_text_that_is_no_unicode_is_the_requests_own_fault() -> None:
    async with wire() as one:
        call = replace(a_call("http://127.0.0.1:1"), json={"prompt": "\ud800"})
        error = await failure_of(one, call)
    assert error.kind is FailureKind.INVALID_REQUEST
    assert error.client_message


# --- downloads ---


def a_download(url: str, *hosts: str, left_s: float = 5) -> Download:
    deadline_at_s = asyncio.get_running_loop().time() + left_s
    return Download(url, hosts or ("127.0.0.1",), deadline_at_s, secret=SECRET)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 x\r\nContent-Length: 2\r\n\r\n"])
async def test_a_download_that_hangs_is_left_long_before_the_deadline(
    head: bytes, tmp_path: Path
) -> None:
    asked: list[bytes] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(head)
        writer.write(head)
        await reader.read()

    one = Wire(4, read_max_s=0.3, download_pauses_s=(0, 0))
    async with upstream(hang) as url:
        download = a_download(url, left_s=3600)
        with pytest.raises(ProviderError) as caught:
            await one.download(download, SpoolFolder(tmp_path))
        await one.close()
    assert (caught.value.kind, len(asked)) == (FailureKind.RESULT_LOST, 2)
    assert not list(tmp_path.iterdir())


async def test_a_download_without_time_says_nothing_of_the_picture(
    tmp_path: Path,
) -> None:
    async with wire() as one:
        with pytest.raises(ProviderError) as caught:
            await one.download(
                a_download("http://127.0.0.1/1.png", left_s=0), SpoolFolder(tmp_path)
            )
    assert caught.value.kind is FailureKind.RESULT_LOST
    cause = caught.value.__cause__
    assert isinstance(cause, ProviderError)
    assert cause.kind is FailureKind.TIMEOUT


async def test_a_download_is_tried_again_and_carries_no_credential(
    tmp_path: Path,
) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(503 if len(seen) < 3 else 200, content=b"picture")

    async with wire(httpx.MockTransport(handler)) as one:
        spool = await one.download(
            a_download("http://127.0.0.1/1.png?sig=a%2Fb"), SpoolFolder(tmp_path)
        )
    assert b"".join(spool.chunks()) == b"picture"
    assert spool.encoding == "raw"
    assert len(seen) == 3
    assert not any("authorization" in request.headers for request in seen)
    assert str(seen[0].url) == "http://127.0.0.1/1.png?sig=a%2Fb"
    spool.close()


async def test_a_download_that_fails_three_times_is_a_lost_result(
    tmp_path: Path,
) -> None:
    tries = 0

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n" + b"x" * 9**6)

    async with upstream(script) as url, wire() as one:
        with pytest.raises(ProviderError) as caught:
            await one.download(a_download(url), SpoolFolder(tmp_path))
    assert (caught.value.kind, caught.value.billed) == (
        FailureKind.RESULT_LOST,
        Billed.YES,
    )
    assert tries == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "ftp://127.0.0.1/1.png",
        "http://127.0.0.1@evil.test/1.png",
        "http://user@127.0.0.1/1.png",
        "http://127.0.0.1.evil.test/",
        "http://[::1/",
        "//127.0.0.1/1.png",
        "",
    ],
)
async def test_a_link_elsewhere_is_never_dialled(tmp_path: Path, url: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request.url)

    async with wire(httpx.MockTransport(handler)) as one:
        with pytest.raises(ProviderError) as caught:
            await one.download(a_download(url), SpoolFolder(tmp_path))
    assert caught.value.kind is FailureKind.RESULT_LOST
    assert "download_hosts" in caught.value.detail


# --- texts and waits ---


@pytest.mark.parametrize(
    "text",
    [
        f"Incorrect API key provided: {SECRET}.",
        "Incorrect API key provided: sk-proj-abc_DEF-123.",
        "Incorrect API key provided: sk-abcd****wxyz",
        "header Authorization: Bearer abc.def-ghi was refused",
        "authorization: bearer abc.def-ghi",
    ],
)
def test_secrets_are_taken_out_of_texts(text: str) -> None:
    clean = scrub(text, SECRET)
    assert "[secret]" in clean
    for part in (SECRET, "abc", "DEF", "wxyz"):
        assert part not in clean


def test_ordinary_words_stay_and_long_texts_end() -> None:
    assert scrub("a risk-free task-id of task-unified-1", "") == (
        "a risk-free task-id of task-unified-1"
    )
    assert len(scrub("x" * 10_000, SECRET)) == 500


DATE = "Tue, 24 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-7"}, 0),
        ({"retry-after": "86400"}, RETRY_AFTER_MAX_S),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "7"}, 7),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:20 GMT", "date": DATE}, 20),
        ({"retry-after": "Tue, 24 Nov 2026 09:00:00 GMT", "date": DATE}, 0),
        ({"retry-after": "Tue, 24 Nov 2026 10:00:20 GMT"}, None),
        ({"retry-after": "Tue, 24 Nov 99999 10:00:20 GMT", "date": DATE}, None),
    ],
)
def test_the_wait_is_read_from_the_headers(
    headers: dict[str, str], wait_s: float | None
) -> None:
    assert retry_after_s(headers) == wait_s


def test_whoever_reads_a_wait_may_allow_for_more() -> None:
    headers = {"retry-after": "86400"}
    assert retry_after_s(headers, at_most_s=3_600) == 3_600


@given(text=st.text(max_size=40), date=st.sampled_from([DATE, "", "x"]))
def test_junk_is_never_a_wait_beyond_the_limit(text: str, date: str) -> None:
    wait_s = retry_after_s({"retry-after": text, "date": date})
    assert wait_s is None or 0 <= wait_s <= RETRY_AFTER_MAX_S


# --- bodies that are sent piece by piece ---


def a_body(*, pieces: int = 400, fails_at: int | None = None) -> Body:
    """Make a body of 64 KiB pieces: far more than the sockets take by themselves."""
    piece = bytes(64 * 1024)

    def chunks() -> Iterator[bytes]:
        for index in range(pieces):
            if index == fails_at:
                raise OSError(5, "a bad disk")
            yield piece

    return Body("application/x-test", pieces * len(piece), chunks)


@asynccontextmanager
async def reading(
    count: int, reply: bytes = b"", hold_s: float = 0
) -> AsyncGenerator[str, None]:
    """Serve an upstream that reads so many bytes of a body, answers and closes."""

    async def handle(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(count)
            await asyncio.sleep(hold_s)
            writer.write(reply)
            await writer.drain()
            while reply and await reader.read(64 * 1024):
                pass
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


WHOLE = 400 * 64 * 1024
OK = b"HTTP/1.1 200 x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


async def test_a_body_in_pieces_can_be_sent_again() -> None:
    body = a_body()
    async with reading(WHOLE, OK) as url, wire() as one:
        for _ in range(2):
            call = replace(a_call(url), json=None, body=body)
            assert await body_of(one, call) == b"ok"


@pytest.mark.parametrize(
    ("count", "kind", "billed"),
    [
        (0, FailureKind.NETWORK, Billed.NO),
        (1_000_000, FailureKind.NETWORK, Billed.NO),
        (WHOLE, FailureKind.TIMEOUT, Billed.MAYBE),
    ],
)
async def test_a_body_counts_as_sent_with_its_last_byte(
    count: int, kind: FailureKind, billed: Billed
) -> None:
    async with reading(count) as url, wire() as one:
        call = replace(a_call(url), json=None, body=a_body())
        error = await failure_of(one, call)
    assert (error.kind, error.billed) == (kind, billed)


async def test_an_upstream_that_stops_taking_the_body_is_left() -> None:
    one = Wire(4, body_idle_s=0.05)
    async with reading(1_000_000, hold_s=5) as url:
        call = replace(a_call(url), json=None, body=a_body())
        error = await failure_of(one, call)
        await one.close()
    assert (error.kind, error.billed) == (FailureKind.NETWORK, Billed.NO)


async def test_an_upstream_may_think_long_once_it_has_the_body() -> None:
    one = Wire(4, body_idle_s=0.02)
    async with reading(WHOLE, OK, hold_s=0.05) as url:
        call = replace(a_call(url), json=None, body=a_body())
        assert await body_of(one, call) == b"ok"
        await one.close()


@pytest.mark.parametrize("head", [b"", OK.removesuffix(b"ok")])
async def test_an_answer_that_does_not_come_may_have_its_own_limit(
    head: bytes,
) -> None:
    async def late(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await asyncio.sleep(2)
        writer.write(OK.removeprefix(head))

    async with upstream(late) as url, wire() as one:
        call = replace(a_call(url), json=None, body=a_body())
        error = await failure_of(one, replace(call, answer_max_s=0.05))
    assert (error.kind, error.billed) == (FailureKind.TIMEOUT, Billed.MAYBE)


async def test_the_limit_of_an_answer_leaves_the_upload_its_time() -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(12):
            time.sleep(0.05)
            yield bytes(10)

    async with reading(120, OK) as url, wire() as one:
        body = Body("application/x-test", 120, chunks)
        call = replace(a_call(url), json=None, body=body, answer_max_s=0.5)
        assert await body_of(one, call) == b"ok"


async def test_an_answer_that_comes_before_the_whole_body_is_heard() -> None:
    early = OK.replace(b"200", b"413")
    async with reading(1_000_000, early) as url, wire() as one:
        call = replace(a_call(url), json=None, body=a_body())
        async with one.exchange(call) as reply:
            assert reply.status == 413
            assert await reply.error_body() == b"ok"


async def test_a_deadline_in_mid_upload_was_certainly_not_bought() -> None:
    async with reading(1_000_000, hold_s=5) as url, wire() as one:
        call = replace(a_call(url, deadline_s=0.1), json=None, body=a_body())
        error = await failure_of(one, call)
    assert (error.kind, error.billed) == (FailureKind.TIMEOUT, Billed.NO)


async def test_a_body_that_cannot_be_read_was_certainly_not_bought() -> None:
    async with reading(WHOLE, OK) as url, wire() as one:
        call = replace(a_call(url), json=None, body=a_body(fails_at=7))
        error = await failure_of(one, call)
    assert (error.kind, error.billed) == (FailureKind.NETWORK, Billed.NO)
