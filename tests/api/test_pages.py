"""The built pages: what is served, how it is packed, what a browser may do with it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import httpx
import pytest
from litestar import Litestar

from gateway.api.pages import page_routes, read_pages

INDEX = "<!doctype html><p>pages</p>"
SCRIPT = "export const answer = 42;" * 50


@pytest.fixture
def built(tmp_path: Path) -> Path:
    assets = tmp_path / "assets"
    assets.mkdir()
    (tmp_path / "index.html").write_text(INDEX)
    (assets / "index-abc.js").write_text(SCRIPT)
    (assets / "index-abc.js.gz").write_bytes(gzip.compress(SCRIPT.encode()))
    (assets / "index-abc.js.br").write_bytes(b"as brotli")
    (assets / "mark-abc.svg").write_text("<svg/>")
    (assets / "notes.txt").write_text("nothing for a browser")
    return tmp_path


def client(folder: Path) -> httpx.AsyncClient:
    app = Litestar(page_routes(read_pages(folder)), openapi_config=None)
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://gateway.test")


async def test_the_front_page_may_load_nothing_from_elsewhere(built: Path) -> None:
    async with client(built) as browser:
        page = await browser.get("/")
    policy = dict(
        part.strip().split(" ", 1)
        for part in page.headers["content-security-policy"].split(";")
    )

    assert page.text == INDEX
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["cache-control"] == "no-cache"
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) <= {"'none'", "'self'", "'self' blob:"}


async def test_a_file_comes_as_small_as_its_reader_can_take_it(built: Path) -> None:
    seen = {}
    async with client(built) as browser:
        for accepted in ("gzip, br", "gzip;q=1", "br;q=0, gzip;q=0.0", "identity", ""):
            headers = {"accept-encoding": accepted}
            async with browser.stream(
                "GET", "/assets/index-abc.js", headers=headers
            ) as answer:
                raw = b"".join([chunk async for chunk in answer.aiter_raw()])
            seen[accepted] = answer.headers.get("content-encoding")
            assert answer.headers["vary"] == "accept-encoding"
            assert "immutable" in answer.headers["cache-control"]
            assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
            assert int(answer.headers["content-length"]) == len(raw)

    assert list(seen.values()) == ["br", "gzip", None, None, None]


async def test_what_a_browser_has_is_not_sent_again(built: Path) -> None:
    async with client(built) as browser:
        first = await browser.get("/", headers={"accept-encoding": ""})
        known = {"if-none-match": first.headers["etag"], "accept-encoding": ""}
        again = await browser.get("/", headers=known)
        (built / "index.html").write_text(INDEX + " anew")
        os.utime(built / "index.html", ns=(1, 1))
    async with client(built) as browser:
        changed = await browser.get("/", headers=known)

    assert (again.status_code, again.content) == (304, b"")
    assert (changed.status_code, changed.text) == (200, INDEX + " anew")


async def test_nothing_but_what_was_built_is_there(built: Path) -> None:
    async with client(built) as browser:
        for path in (
            "/assets/other.js",
            "/assets/notes.txt",
            "/assets/..%2findex.html",
            "/assets/index-abc.js.br",
        ):
            assert (await browser.get(path)).status_code != 200, path
        assert (await browser.get("/assets/mark-abc.svg")).headers[
            "content-type"
        ] == "image/svg+xml"


async def test_without_pages_there_is_a_front_page_that_says_so(tmp_path: Path) -> None:
    async with client(tmp_path) as browser:
        page = await browser.get("/")
    assert "make web" in page.text
    assert "<script" not in page.text
