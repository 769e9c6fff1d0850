"""HTTP out, for adapters: the one module that knows the HTTP client.

Every way in which a call can fail leaves as a ``ProviderError`` that says whether the
request can have been bought.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import ssl
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import aiohttp
import httpx
import msgspec
from httpx_aiohttp.transport import AiohttpResponseStream, AiohttpTransport

from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.spool import Spool, SpoolFolder, SpoolLimitError

CONNECT_TIMEOUT_S = 5.0
CONNECTION_WAIT_S = 10.0
"""From asking for a connection, free slot included, to having it."""
READ_MAX_S = 30.0
"""How long a look at a job may take. One that hangs is repeated, not waited for."""
BODY_IDLE_S = 30.0
BODY_PIECE_BYTES = 64 * 1024
KEEPALIVE_S = 4.0
"""Short: a kept connection that died makes the next POST's outcome unknown."""
ERROR_BODY_MAX_BYTES = 64 * 1024
ERROR_BODY_MAX_S = 5.0
RETRY_AFTER_MAX_S = 300.0
DOWNLOAD_MAX_BYTES = 64 * 1024 * 1024
DOWNLOAD_PAUSES_S = (0.0, 0.5, 2.0)
"""How long to wait before each try of a download; their number is the limit."""
TEXT_MAX_CHARS = 500

_SECRETS = re.compile(r"(?i:bearer)\s+[^\s\"',;]+|\bsk-[A-Za-z0-9_\-*.]{4,}", re.ASCII)
_HIDDEN = "[secret]"


@dataclass(frozen=True, slots=True)
class Body:
    """A request body that is sent piece by piece, any number of times.

    ``chunks`` yields exactly ``size_bytes``. It may raise OSError and ValueError: the
    request then counts as not sent.
    """

    media_type: str
    size_bytes: int
    chunks: Callable[[], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request, with ``json`` or a ``body`` or nothing.

    ``deadline_at_s`` is a time of the event loop's clock. ``first_byte_max_s`` is how
    long head and start of the answer may each be awaited; None: until the deadline.
    ``answer_max_s`` is how long the head may be awaited once the ``body`` is out.
    ``secret`` is only there to be kept out of error texts.
    """

    method: str
    url: str
    deadline_at_s: float
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    json: object = None
    body: Body | None = field(default=None, repr=False)
    first_byte_max_s: float | None = None
    answer_max_s: float | None = None
    secret: str = field(default="", repr=False)

    def within(self, limit_s: float) -> Call:
        """The same call, over in so many seconds from now at the latest."""
        end_s = min(self.deadline_at_s, deadline_in(limit_s))
        return replace(self, deadline_at_s=end_s)


class Reply:
    """The start of an answer; its body is read as it comes."""

    def __init__(
        self, response: httpx.Response, call: Call, body_idle_s: float = BODY_IDLE_S
    ) -> None:
        self._response = response
        self._call = call
        self._body_idle_s = body_idle_s
        self.status = response.status_code
        self.headers: Mapping[str, str] = {
            name.lower(): value for name, value in response.headers.items()
        }

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx. Redirects are not followed, so are none."""
        return self._response.is_success

    async def chunks(self, *, paced: bool = True) -> AsyncGenerator[bytes, None]:
        """Yield the body. One that is not ``paced`` may pause until the deadline.

        Raises:
            ProviderError: TIMEOUT when it breaks off or stalls; BAD_GATEWAY when it is
                compressed though we asked for it plain.
        """
        if self._is_compressed:
            raise ProviderError(
                FailureKind.BAD_GATEWAY,
                "a compressed body, which was not asked for",
                status=self.status,
                billed=Billed.MAYBE,
            )
        # Nothing is decoded: whatever is not plain was turned away above.
        body = self._response.aiter_bytes()
        # Some send the head at once and work then: the first byte may take as long
        # as the whole call.
        idle_s = self._call.first_byte_max_s or self._call.answer_max_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    chunk = await anext(body, None)
            except _BREAKS as error:
                raise _broken(error, self._call, self.status) from error
            if chunk is None:
                return
            yield chunk
            idle_s = self._body_idle_s if paced else None

    async def error_body(self) -> bytes:
        """Read the start of the body of a refusal, as far as it can be read."""
        start = b""
        if self._is_compressed:
            return start
        # The status is known, and it decides: a body that breaks off, or that does not
        # come, changes nothing.
        with contextlib.suppress(ProviderError, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_MAX_S):
                async for chunk in self.chunks():
                    start += chunk
                    if len(start) >= ERROR_BODY_MAX_BYTES:
                        break
        return start[:ERROR_BODY_MAX_BYTES]

    @property
    def _is_compressed(self) -> bool:
        return self.headers.get("content-encoding", "identity").lower() != "identity"


@dataclass(frozen=True, slots=True)
class Download:
    """A picture to be fetched from a link that an upstream gave.

    ``hosts`` are the only ones that may be asked. No credential is sent.
    """

    url: str
    hosts: Collection[str]
    deadline_at_s: float
    secret: str = field(default="", repr=False)


class Wire:
    """A pool of connections, shared by all adapters.

    Args:
        connections_max: as many as the upstreams together may be asked at once.
        transport: takes the place of the network, in tests.
        read_max_s: how long a look at a job may take, and a download until its start.
        body_idle_s: how long a body that has begun may pause.
        download_pauses_s: how long to wait before each try of a download.
    """

    def __init__(
        self,
        connections_max: int,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        read_max_s: float = READ_MAX_S,
        body_idle_s: float = BODY_IDLE_S,
        download_pauses_s: tuple[float, ...] = DOWNLOAD_PAUSES_S,
    ) -> None:
        self.read_max_s = read_max_s
        self._body_idle_s = body_idle_s
        self._download_pauses_s = download_pauses_s
        self._client = httpx.AsyncClient(
            transport=transport or _transport(connections_max),
            trust_env=False,
            follow_redirects=False,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            headers={"Accept": "application/json", "User-Agent": "imageway"},
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    @asynccontextmanager
    async def exchange(self, call: Call) -> AsyncGenerator[Reply, None]:
        """Send a request and hand over the reply; its body is read within the block.

        Raises:
            ProviderError: NETWORK when the request certainly did not go out, TIMEOUT
                when its outcome is unknown or the deadline passed.
        """
        if asyncio.get_running_loop().time() >= call.deadline_at_s:
            raise ProviderError(
                FailureKind.TIMEOUT, "no time was left to ask", billed=Billed.NO
            )
        upload = _Upload(call, call.body, self._body_idle_s) if call.body else None
        try:
            async with asyncio.timeout_at(call.deadline_at_s):
                async with asyncio.timeout(call.first_byte_max_s):
                    response = await self._send(call, upload)
                try:
                    yield Reply(response, call, self._body_idle_s)
                finally:
                    await _let_go(response)
        except TimeoutError as error:
            unsent = upload is not None and not upload.is_out
            raise ProviderError(
                FailureKind.TIMEOUT,
                "the deadline passed",
                billed=Billed.NO if unsent else None,
            ) from error

    async def download(self, download: Download, spools: SpoolFolder) -> Spool:
        """Fetch a picture into a spool; whoever gets it closes it.

        Raises:
            ProviderError: RESULT_LOST, after as many tries as there are pauses.
        """
        _check_link(download)
        lost = ProviderError(FailureKind.TIMEOUT, "no time was left to ask")
        for pause_s in self._download_pauses_s:
            now_s = asyncio.get_running_loop().time()
            if now_s + pause_s >= download.deadline_at_s:
                break
            await asyncio.sleep(pause_s)
            try:
                return await self._fetch(download, spools)
            except ProviderError as error:
                lost = error
        raise ProviderError(
            FailureKind.RESULT_LOST,
            f"the picture could not be fetched: {lost.detail}",
            status=lost.status,
        ) from lost

    async def _fetch(self, download: Download, spools: SpoolFolder) -> Spool:
        call = Call(
            "GET",
            download.url,
            download.deadline_at_s,
            headers={"Accept": "image/*"},
            first_byte_max_s=self.read_max_s,
            secret=download.secret,
        )
        spool = spools.open("raw", limit_bytes=DOWNLOAD_MAX_BYTES)
        try:
            async with self.exchange(call) as reply:
                _check_found(reply)
                async for chunk in reply.chunks():
                    spool.append(chunk)
        except (SpoolLimitError, OSError) as error:
            spool.close()
            raise ProviderError(FailureKind.RESULT_LOST, str(error)) from error
        except BaseException:
            spool.close()
            raise
        return spool

    async def _send(self, call: Call, upload: _Upload | None) -> httpx.Response:
        loop = asyncio.get_running_loop()
        timeout = httpx.Timeout(
            connect=CONNECT_TIMEOUT_S,
            pool=CONNECTION_WAIT_S,
            # A picture takes minutes until the first byte; the body's own pace is
            # kept by ``Reply.chunks``.
            read=max(call.deadline_at_s - loop.time(), 0.001),
            write=BODY_IDLE_S,
        )
        headers = {"Accept-Encoding": "identity", **call.headers}
        content = upload or _encoded(call)
        if call.body is not None:
            headers["Content-Type"] = call.body.media_type
            headers["Content-Length"] = str(call.body.size_bytes)
        elif content is not None:
            headers["Content-Type"] = "application/json"
        try:
            request = self._client.build_request(
                call.method, call.url, headers=headers, content=content, timeout=timeout
            )
            async with upload.watched() if upload else contextlib.nullcontext():
                return await self._client.send(request, stream=True)
        except _BREAKS as error:
            unsent = upload is not None and not upload.is_out
            raise _broken(error, call, None, unsent=unsent) from error


class _Upload:
    """Hands a body over once, and knows whether the last byte of it was."""

    def __init__(self, call: Call, body: Body, idle_s: float) -> None:
        self._body = body
        self._answer_max_s = call.answer_max_s
        self._idle_s = idle_s
        self._handed_over_bytes = 0
        self._limit: asyncio.Timeout | None = None

    @property
    def is_out(self) -> bool:
        return self._handed_over_bytes >= self._body.size_bytes

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[None, None]:
        """Give up, with TimeoutError, on one that stops taking it, or never answers."""
        async with asyncio.timeout(None) as limit:
            self._limit = limit
            try:
                yield
            finally:
                # Some answer early: the rest of the body has no clock then.
                self._limit = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._body.chunks():
            # Counted before it is handed over: from then on it may be out.
            self._handed_over_bytes += len(chunk)
            self._wind()
            yield chunk
            # A fast upstream never makes the transport wait; others have their turn.
            await asyncio.sleep(0)

    def _wind(self) -> None:
        if self._limit is not None:
            limit_s = self._answer_max_s if self.is_out else self._idle_s
            self._limit.reschedule(None if limit_s is None else deadline_in(limit_s))


def deadline_in(seconds: float) -> float:
    """A time of the event loop's clock, so many seconds from now."""
    return asyncio.get_running_loop().time() + seconds


def epoch_s() -> float:
    """Seconds since the epoch, by the machine's clock."""
    return time.time_ns() / 10**9


@dataclass(frozen=True, slots=True)
class Tools:
    """What adapters are built with: the network, temporary files, chance and time.

    ``now_s`` tells the seconds since the epoch.
    """

    wire: Wire
    spools: SpoolFolder
    fraction: Callable[[], float]
    now_s: Callable[[], float] = epoch_s


def unwritable() -> ProviderError:
    """Say that a text of the request is no UTF-8 (it holds half a character)."""
    return ProviderError(
        FailureKind.INVALID_REQUEST,
        "the request cannot be written as UTF-8",
        client_message="The request contains text that is not valid Unicode.",
    )


def unreadable_file(error: OSError) -> ProviderError:
    """Say that a file of the request cannot be read: nothing was sent."""
    return ProviderError(
        FailureKind.NETWORK, f"a file cannot be read: {error.strerror}"
    )


def scrub(text: str, secret: str) -> str:
    """Take a secret, and whatever looks like one, out of a text; shorten it."""
    if secret:
        text = text.replace(secret, _HIDDEN)
    return _SECRETS.sub(_HIDDEN, text)[:TEXT_MAX_CHARS]


def retry_after_s(
    headers: Mapping[str, str], *, at_most_s: float = RETRY_AFTER_MAX_S
) -> float | None:
    """Tell how long whoever answered asks us to stay away, 0 to ``at_most_s``.

    A date is taken relative to the answer's own Date: our clock may differ. What
    cannot be read counts as not said. ``headers`` have lower-case names.
    """
    wait_s = _number(headers.get("retry-after-ms"))
    if wait_s is not None:
        wait_s /= 1000
    else:
        wait_s = _number(headers.get("retry-after"))
    if wait_s is None:
        wait_s = _seconds_between(headers.get("date"), headers.get("retry-after"))
    if wait_s is None:
        return None
    return min(max(wait_s, 0.0), at_most_s)


# What httpx, the transport and the engine below it let out. ``InvalidURL`` and plain
# ``ValueError`` come of URLs and headers, before anything is sent; OSError includes
# the timeouts of asyncio.
_BREAKS = (
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
    aiohttp.ClientError,
    OSError,
    RuntimeError,
    ValueError,
)
_NOT_SENT_BY_ENGINE = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
)
_NOT_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)


def _encoded(call: Call) -> bytes | None:
    if call.json is None:
        return None
    try:
        return msgspec.json.encode(call.json)
    except UnicodeEncodeError as error:
        raise unwritable() from error


def _broken(
    error: Exception, call: Call, status: int | None, *, unsent: bool = False
) -> ProviderError:
    sent = status is not None or (not unsent and _was_sent(error))
    text = str(error) or "no details"
    return ProviderError(
        FailureKind.TIMEOUT if sent else FailureKind.NETWORK,
        scrub(f"{type(error).__name__}: {text}", call.secret),
        status=status,
    )


def _was_sent(error: Exception) -> bool:
    """Tell whether the request may have gone out: yes, unless it is certain.

    The transport calls every lost connection a ConnectTimeout, also one that was lost
    with the request on its way. Only the engine's own error underneath can be trusted.
    """
    engine = error if isinstance(error, aiohttp.ClientError) else error.__cause__
    if isinstance(engine, aiohttp.ClientError):
        return not isinstance(engine, _NOT_SENT_BY_ENGINE)
    return not isinstance(error, _NOT_SENT)


async def _let_go(response: httpx.Response) -> None:
    # All that matters has been read, or has failed already.
    with contextlib.suppress(httpx.HTTPError, aiohttp.ClientError, OSError):
        await response.aclose()


def _check_link(download: Download) -> None:
    try:
        link = urlsplit(download.url)
        host = (link.hostname or "").lower()
        plain = link.scheme in {"http", "https"} and "@" not in link.netloc
    except ValueError:
        host, plain = "", False
    if not plain or host not in {name.lower() for name in download.hosts}:
        raise ProviderError(
            FailureKind.RESULT_LOST,
            scrub(
                f"the answer links to a host that is not in download_hosts: {host!r}",
                download.secret,
            ),
        )


def _check_found(reply: Reply) -> None:
    if not reply.is_success:
        raise ProviderError(
            FailureKind.RESULT_LOST, f"status {reply.status}", status=reply.status
        )


@lru_cache(maxsize=1)
def _trusting() -> ssl.SSLContext:
    # To read the certificates that are trusted takes a twentieth of a second.
    return httpx.create_ssl_context(trust_env=False)


def _transport(connections_max: int) -> AiohttpTransport:
    tls = _trusting()

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=connections_max, keepalive_timeout=KEEPALIVE_S, ssl=tls
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    return _Transport(verify=tls, trust_env=False, client=session)


class _Transport(AiohttpTransport):
    """Reads bodies in larger pieces: each takes a walk through all layers of httpx."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if isinstance(response.stream, AiohttpResponseStream):
            response.stream.CHUNK_SIZE = BODY_PIECE_BYTES
        return response


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _seconds_between(start: str | None, end: str | None) -> float | None:
    try:
        dates = [parsedate_to_datetime(text or "") for text in (start, end)]
    except ValueError:
        return None
    first, last = (date.replace(tzinfo=date.tzinfo or UTC) for date in dates)
    return (last - first).total_seconds()
