"""``/`` and ``/assets/...``: the playground and console, as they were built.

The API never depends on them: a gateway without them shows ``fallback`` instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from gateway.api.health import PAGE
from gateway.api.http import AnyRequest
from gateway.core.errors import NotFoundError

PAGES = Path(__file__).parents[1] / "pages"
"""Where ``make web`` puts what it builds; in a wheel too."""
FILES_MAX = 200
FILE_MAX_BYTES = 4 * 1024 * 1024
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
ENCODINGS = {"br": ".br", "gzip": ".gz"}
"""In the order of preference, with the ending that the build gives to each."""
SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self' blob:; connect-src 'self'; form-action 'none'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",
    "vary": "accept-encoding",
}
FOR_EVER = "public, max-age=31536000, immutable"
"""For names that hold a hash of what is in them."""
ASK_AGAIN = "no-cache"


@dataclass(frozen=True, slots=True)
class Page:
    """A built file: its bytes as they are, and by encoding."""

    media_type: str
    plain: bytes
    packed: Mapping[str, bytes]
    etag: str


def read_pages(folder: Path = PAGES) -> dict[str, Page]:
    """Read what was built, by path below the folder; nothing if nothing was."""
    if not (folder / "index.html").is_file():
        return {}
    files = sorted(f for f in folder.rglob("*") if f.suffix in MEDIA_TYPES)
    assert len(files) <= FILES_MAX, folder
    return {file.relative_to(folder).as_posix(): _page(file) for file in files}


def page_routes(
    pages: Mapping[str, Page], fallback: str = PAGE
) -> list[HTTPRouteHandler]:
    """Route the pages, or only a front page that says what this is."""
    if not pages:

        @get("/", media_type="text/html")
        async def front_page() -> str:
            """Tell somebody with a browser what this is."""
            return fallback

        return [front_page]

    @get("/")
    async def playground(request: AnyRequest) -> Response[bytes]:
        """Show the playground."""
        return _answer(request, pages["index.html"], ASK_AGAIN)

    @get("/assets/{name:str}")
    async def asset(request: AnyRequest, name: FromPath[str]) -> Response[bytes]:
        """Hand out a script, a style or a picture of the pages."""
        page = pages.get(f"assets/{name}")
        if page is None:
            raise NotFoundError(
                "There is no such file: load the page again.", code="route_not_found"
            )
        return _answer(request, page, FOR_EVER)

    return [playground, asset]


def _page(file: Path) -> Page:
    plain = file.read_bytes()
    assert len(plain) <= FILE_MAX_BYTES, file
    packed = {
        encoding: twin.read_bytes()
        for encoding, ending in ENCODINGS.items()
        if (twin := file.with_name(file.name + ending)).is_file()
    }
    stat = file.stat()
    etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
    return Page(MEDIA_TYPES[file.suffix], plain, packed, etag)


def _answer(request: AnyRequest, page: Page, cache: str) -> Response[bytes]:
    taken = _accepted(request.headers.get("accept-encoding", ""))
    encoding = next((e for e in page.packed if e in taken), None)
    etag = page.etag if encoding is None else f'{page.etag[:-1]}-{encoding}"'
    headers = SECURITY | {"cache-control": cache, "etag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(b"", status_code=304, headers=headers)
    if encoding is not None:
        headers["content-encoding"] = encoding
    body = page.plain if encoding is None else page.packed[encoding]
    return Response(body, media_type=page.media_type, headers=headers)


_REFUSED = re.compile(r"q=0(\.0*)?")


def _accepted(text: str) -> set[str]:
    offers = (each.replace(" ", "").partition(";") for each in text.split(","))
    return {name for name, _, weight in offers if not _REFUSED.fullmatch(weight)}
