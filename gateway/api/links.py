"""``/files/...``: signed, expiring links to results and uploads, and what they open.

Plain ASGI behind its route: a file is read in pieces as fast as its reader takes them,
and given back when the reader hangs up.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

from litestar import route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from gateway.api.http import (
    RequestNote,
    disconnected,
    header,
    note_of,
    send_chunk,
    send_start,
)
from gateway.api.render import LinkTo
from gateway.core import links as rules
from gateway.core.errors import GatewayError, NotFoundError
from gateway.flows.tasks import Picture
from gateway.ports import BlobStore, Clock, OpenBlob, StoredFile

CHUNK_BYTES = 64 * 1024
STALLED_MAX_S = 60.0
"""A reader that takes nothing for so long is given up."""
QUERY_MAX_FIELDS = 16
EXPIRES_MAX_DIGITS = 12
METHODS = [HttpMethod.GET, HttpMethod.HEAD]
MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
ALWAYS = {
    "accept-ranges": "bytes",
    "access-control-allow-origin": "*",
    "cache-control": "private, max-age=3600",
    "content-security-policy": "default-src 'none'; sandbox",
}

_ONE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class LinkRefusedError(GatewayError):
    """A link's signature does not fit, or its time is over."""

    status = 403
    type = "invalid_request_error"
    code = "link_invalid"


class RangeRefusedError(GatewayError):
    """The range begins behind the end of the file."""

    status = 416
    type = "invalid_request_error"
    code = "range_not_satisfiable"


@dataclass(frozen=True, slots=True)
class FileLinks:
    """The links to an upload: one to be shown, one to be saved."""

    file_url: str
    download_url: str


@dataclass(frozen=True, slots=True)
class Links:
    """Makes links and checks them. ``public_url`` empty: as the client calls us."""

    secret: bytes
    public_url: str

    def to(self, scope: Scope) -> LinkTo:
        """Return what makes the links of an answer to this request."""
        return self.at(self.origin(scope))

    def at(self, origin: str) -> LinkTo:
        """Return what makes links that begin with ``origin``."""

        def link_to(picture: Picture) -> str | None:
            if picture.blob is None:
                return None
            path = rules.result_path(picture.blob, picture.media_type)
            return self._signed(origin, path, picture.expires_ms)

        return link_to

    def to_files(self, scope: Scope) -> Callable[[StoredFile], FileLinks]:
        """Return what makes the links to uploads, in an answer to this request."""
        origin = self.origin(scope)

        def links_to(file: StoredFile) -> FileLinks:
            path = f"/files/uploads/{file.id}/{file.name}"
            url = self._signed(origin, path, file.expires_ms)
            return FileLinks(file_url=url, download_url=f"{url}&download=1")

        return links_to

    def check(self, path: str, query: Mapping[str, str], now_s: int) -> None:
        """Let a link pass, or say why not.

        Raises:
            LinkRefusedError: the signature does not fit, or the time is over.
        """
        expires, signature = query.get("expires", ""), query.get("signature", "")
        a_number = expires.isascii() and expires.isdigit()
        fits = a_number and len(expires) <= EXPIRES_MAX_DIGITS
        if not fits or not rules.is_signed(self.secret, path, int(expires), signature):
            raise LinkRefusedError(
                "The link is not valid. Use it exactly as the gateway gave it."
            )
        if now_s >= int(expires):
            raise LinkRefusedError(
                "The link has expired: results are kept for 24 hours, uploads for 72.",
                code="link_expired",
            )

    def origin(self, scope: Scope) -> str:
        """Tell where links begin, for who calls us like this."""
        host = header(scope, "host") or "127.0.0.1"
        return self.public_url.rstrip("/") or f"{scope['scheme']}://{host}"

    def _signed(self, origin: str, path: str, expires_ms: int) -> str:
        # Signed as it is read back: a path is decoded before it is looked at.
        query = rules.sign(self.secret, path, expires_ms // 1000)
        return f"{origin}{quote(path)}?{query}"


@dataclass(frozen=True, slots=True)
class _Target:
    store: BlobStore
    blob: str
    name: str

    @property
    def etag(self) -> str:
        # A blob never changes: its name stands for its bytes.
        return f'"{self.blob.replace("/", "-")}"'

    @property
    def media_type(self) -> str:
        extension = self.name.rpartition(".")[2].lower()
        return MEDIA_TYPES.get(extension, "application/octet-stream")


@dataclass(frozen=True, slots=True)
class OpenLinks:
    """The endpoint of all links. No key is asked for; one that is sent is ignored."""

    links: Links
    results: BlobStore
    uploads: BlobStore
    clock: Clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        query = _query(scope)
        self.links.check(scope["path"], query, self.clock.now_ms() // 1000)
        target = self._target(scope["path"])
        headers = ALWAYS | {
            "content-type": target.media_type,
            "content-disposition": _disposition(
                target.name, download=query.get("download") == "1"
            ),
            "etag": target.etag,
        }
        opened = await target.store.open(target.blob)
        if opened is None:
            raise NotFoundError(
                "What the link stood for is not there any more.", code="result_expired"
            )
        try:
            if target.etag in (header(scope, "if-none-match") or ""):
                await send_start(send, 304, headers)
                await send_chunk(send, b"", last=True)
                return
            await _answer(scope, receive, send, opened, headers)
        finally:
            opened.close()

    def _target(self, path: str) -> _Target:
        _, _, kind, folder, name = path.split("/", 4)
        if kind == "uploads":
            return _Target(self.uploads, folder, name)
        index = name.partition(".")[0]
        return _Target(self.results, f"{folder}/{index}", f"{folder}-{name}")


def link_routes(endpoint: OpenLinks) -> list[HTTPRouteHandler]:
    """Route the links."""

    @route("/files/results/{task:str}/{name:str}", http_method=METHODS)
    async def open_result() -> ASGIApp:
        """Hand a result to whoever holds its link."""
        return endpoint

    @route("/files/uploads/{file_id:str}/{name:str}", http_method=METHODS)
    async def open_upload() -> ASGIApp:
        """Hand an upload to whoever holds its link."""
        return endpoint

    return [open_result, open_upload]


async def _answer(
    scope: Scope,
    receive: Receive,
    send: Send,
    opened: OpenBlob,
    headers: dict[str, str],
) -> None:
    note, size_bytes = note_of(scope), opened.size_bytes
    status, part = 200, range(size_bytes)
    if scope["method"] == "HEAD":  # type: ignore[typeddict-item]  # HTTP, by its route
        part = range(0)
        headers["content-length"] = str(size_bytes)
    else:
        asked = _asked_range(scope, size_bytes, headers["etag"], note)
        if asked is not None:
            status, part = 206, asked
            headers["content-range"] = (
                f"bytes {asked.start}-{asked.stop - 1}/{size_bytes}"
            )
        headers["content-length"] = str(len(part))
    await send_start(send, status, headers)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        if not await _sent_whole(send, opened, part, watch):
            note.client_gone = True
    finally:
        watch.cancel()


def _asked_range(
    scope: Scope, size_bytes: int, etag: str, note: RequestNote
) -> range | None:
    """Tell which bytes are asked for; None for all of them.

    What is not one plain range is ignored, as RFC 9110 allows; so is a range of a
    file that the client does not have (``If-Range``).
    """
    match = _ONE_RANGE.fullmatch((header(scope, "range") or "").replace(" ", ""))
    if match is None or (header(scope, "if-range") or etag) != etag:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if first:
        start, stop = int(first), min(int(last or size_bytes) + 1, size_bytes)
        if last and int(last) < start:
            return None
    else:
        start, stop = max(size_bytes - int(last), 0), size_bytes
    if start >= stop:
        note.headers["content-range"] = f"bytes */{size_bytes}"
        raise RangeRefusedError(f"The file has {size_bytes:,} bytes.")
    return range(start, stop)


async def _sent_whole(
    send: Send, opened: OpenBlob, part: range, watch: asyncio.Future[None]
) -> bool:
    """Send a part of a file; tell whether the client was there to the end."""
    for offset in range(part.start, part.stop, CHUNK_BYTES):
        piece = await opened.read(offset, min(CHUNK_BYTES, part.stop - offset))
        try:
            async with asyncio.timeout(STALLED_MAX_S):
                await send_chunk(send, piece, last=False)
        except TimeoutError:
            return False
        await asyncio.sleep(0)  # others are served between two pieces
        if watch.done():
            return False
    await send_chunk(send, b"", last=True)
    return True


def _query(scope: Scope) -> dict[str, str]:
    try:
        text = scope["query_string"].decode("ascii")
        return dict(parse_qsl(text, max_num_fields=QUERY_MAX_FIELDS))
    except ValueError:
        return {}  # too many fields, or not even ASCII: nothing that we have signed


def _disposition(name: str, *, download: bool) -> str:
    """Name the file, also for readers that know ASCII only (RFC 6266)."""
    kind = "attachment" if download else "inline"
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", name)
    if plain == name:
        return f'{kind}; filename="{name}"'
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
