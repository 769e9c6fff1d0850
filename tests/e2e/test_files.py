"""The file API as its clients use it, over HTTP, with a real disk below."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from tests.e2e.gateways import LiveGateway

UPLOAD = "/api/v1/files/upload"
LIMIT_BYTES = 50 * 1024 * 1024
OWN_HOST = "127.0.0.2"
"""A loopback address that this gateway may fetch from; it may not from 127.0.0.1."""


NUMBERS = itertools.count(1)


def encoded(image_format: str = "PNG", color: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), color).save(file, image_format)
    return file.getvalue()


PNG = encoded()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("picture.png", content)
    return file.getvalue()


REFUSED = {
    "text named .png": b"not a picture at all\n" * 100,
    "a zip named .png": zipped(b"\x00" * 10_000_000),
    "a gzip named .png": gzip.compress(PNG),
    "a GIF": encoded("GIF"),
    "nothing": b"",
}


@dataclass(frozen=True)
class Host:
    """A web server with pictures, on an address of its own."""

    server: ThreadingHTTPServer

    def url(self, path: str, host: str = OWN_HOST) -> str:
        return f"http://{host}:{self.server.server_address[1]}/{path}"


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        place = urlsplit(self.path).path
        if place == "/inside":
            self.send_response(302)
            self.send_header("location", f"http://127.0.0.1:{self.server.server_port}/")  # type: ignore[attr-defined]  # a TCP server's
            self.end_headers()
            return
        content = {
            "/fox%20photo.png": PNG,
            "/page.png": b"<html>",
            "/large.png": PNG + b"\x00" * (LIMIT_BYTES + 1 - len(PNG)),
        }.get(place)
        self.send_response(404 if content is None else 200)
        self.send_header("content-length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
        return


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    class Everywhere(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            return  # who asked has hung up: that is what some tests are about

    server = Everywhere(("0.0.0.0", 0), _Pictures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Host(server)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def gateway(
    host: Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    env = {
        "IMAGEWAY__INPUTS__ALLOW_NETWORKS": f'["{OWN_HOST}/32"]',
        "IMAGEWAY__INPUTS__ALLOW_HTTP": "true",
        "IMAGEWAY__INPUTS__PORTS": f'["{host.server.server_address[1]}"]',
    }
    folder = tmp_path_factory.mktemp("files") / "data"
    with LiveGateway(folder, env=env) as live:
        yield live


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with gateway.client(gateway.tenant("files")) as client:
        yield client


@pytest.fixture
def newcomer(gateway: LiveGateway) -> Iterator[httpx.Client]:
    """A tenant without files."""
    with gateway.client(gateway.tenant(f"newcomer-{next(NUMBERS)}")) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_left(gateway: LiveGateway) -> Iterator[None]:
    """Whatever is sent, no temporary file is left of it."""
    yield
    assert left_over(gateway.data_dir) == []


def left_over(data_dir: Path) -> list[Path]:
    """Temporary files that nobody needs any more."""
    return [*(data_dir / "spool").iterdir(), *(data_dir / "uploads").glob("*.part")]


def by_base64(client: httpx.Client, content: bytes, **more: Any) -> httpx.Response:
    text = base64.b64encode(content).decode()
    return client.post(f"{UPLOAD}/base64", json={"base64_data": text, **more})


def by_stream(
    client: httpx.Client, content: bytes, name: str = "picture.png", **more: str
) -> httpx.Response:
    files = {"file": (name, content, "image/png")}
    return client.post(f"{UPLOAD}/stream", files=files, data=more)


def by_url(client: httpx.Client, url: object, **more: Any) -> httpx.Response:
    return client.post(f"{UPLOAD}/url", json={"file_url": url, **more})


def kept(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert answer.status_code == 200, body
    assert {"success": body["success"], "code": body["code"]} == {
        "success": True,
        "code": 200,
    }
    assert body["msg"]
    data = body["data"]
    assert isinstance(data, dict)
    return data


def refused(answer: httpx.Response) -> tuple[int, str, str | None]:
    """See that an error has both shapes; returns status, code and param."""
    body = answer.json()
    error = body["error"]
    assert body["success"] is False, body
    assert body["code"] == answer.status_code
    assert body["msg"] == error["message"]
    assert {"message", "type", "param", "code"} <= set(error)
    return answer.status_code, error["code"], error["param"]


def test_the_three_ways_in_answer_in_one_shape(
    client: httpx.Client, host: Host
) -> None:
    answers = {
        "base64": by_base64(client, PNG, file_name="fox.png", upload_path="a/b"),
        "stream": by_stream(client, PNG, "fox.png", upload_path="a/b"),
        "url": by_url(client, host.url("fox%20photo.png"), upload_path="a/b"),
    }
    for way, answer in answers.items():
        data = kept(answer)
        assert set(data) == {
            "file_id",
            "file_name",
            "original_name",
            "file_size",
            "mime_type",
            "upload_path",
            "file_url",
            "download_url",
            "upload_time",
            "expires_at",
        }
        name = "fox photo.png" if way == "url" else "fox.png"
        assert (data["file_name"], data["original_name"]) == (name, name)
        assert data["file_size"] == len(PNG)
        assert (data["mime_type"], data["upload_path"]) == ("image/png", "a/b")
        uploaded = datetime.fromisoformat(data["upload_time"])
        expires = datetime.fromisoformat(data["expires_at"])
        assert expires - uploaded == timedelta(hours=72)
        assert httpx.get(data["file_url"]).content == PNG
        saved = httpx.get(data["download_url"])
        assert saved.content == PNG
        assert saved.headers["content-disposition"] == f'attachment; filename="{name}"'


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_the_type_is_what_the_bytes_say(
    client: httpx.Client, image_format: str
) -> None:
    content = encoded(image_format)

    data = kept(by_stream(client, content, "whatever.bin"))

    assert data["mime_type"] == f"image/{image_format.lower()}"
    answer = httpx.get(data["file_url"])
    assert answer.headers["content-type"] == data["mime_type"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == content


def test_base64_is_taken_as_any_client_writes_it(client: httpx.Client) -> None:
    content = PNG + bytes(range(256)) * 300
    text = base64.b64encode(content).decode()
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    bodies = {
        "plain": json.dumps({"base64_data": text}),
        "a data URL": json.dumps({"base64_data": f"data:image/png;base64,{text}"}),
        "a data URL of another type": json.dumps(
            {"base64_data": f"DATA:text/plain;base64,{text}"}
        ),
        "in lines": json.dumps({"base64_data": lines}),
        "escaped slashes": json.dumps({"base64_data": text}).replace("/", "\\/"),
        "escaped signs": json.dumps({"base64_data": text})
        .replace("=", "\\u003d")
        .replace("+", "\\u002b"),
        "no padding": json.dumps({"base64_data": text.rstrip("=")}),
        "nulls": json.dumps(
            {"base64_data": text, "file_name": None, "upload_path": None}
        ),
        "more than is asked": json.dumps({"more": [{}], "base64_data": text}),
    }
    for name, body in bodies.items():
        answer = client.post(f"{UPLOAD}/base64", content=body)
        assert httpx.get(kept(answer)["file_url"]).content == content, name


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({}, "base64_data"),
        ({"base64_data": None}, "base64_data"),
        ({"base64_data": 5}, "base64_data"),
        ({"base64_data": ""}, "base64_data"),
        ({"base64_data": "!!!!"}, "base64_data"),
        ({"base64_data": "iVBOR"}, "base64_data"),
        ({"base64_data": "\u72d0"}, "base64_data"),
        ({"base64_data": "data:image/png;base64,"}, "base64_data"),
        ({"base64_data": "data:image/png,iVBORw0KGgo="}, "base64_data"),
        ({"base64_data": "iVBORw0KGgo=", "file_name": 5}, "file_name"),
        ({"base64_data": "iVBORw0KGgo=", "upload_path": ["a"]}, "upload_path"),
        ([], None),
        (None, None),
    ],
)
def test_what_is_no_base64_is_refused_by_its_field(
    client: httpx.Client, sent: Any, param: str | None
) -> None:
    status, _, named = refused(client.post(f"{UPLOAD}/base64", json=sent))

    assert (status, named) == (400, param)


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b'{"base64_data": "iVBO', b"\xff", b"[" * 100_000, b'{"a":"\\ud800"}'],
)
def test_a_broken_json_body_is_refused(client: httpx.Client, sent: bytes) -> None:
    for way in ("base64", "url"):
        assert refused(client.post(f"{UPLOAD}/{way}", content=sent))[0] == 400


def test_half_a_surrogate_pair_is_no_fault_of_ours(client: httpx.Client) -> None:
    for name in ("file_url", "base64_data", "file_name", "upload_path"):
        fields = {"file_url": "http://a.test/", "base64_data": "iVBORw0KGgo="}
        sent = json.dumps(fields | {name: "http://127.0.0.1/\ud800"})
        for way in ("base64", "url"):
            assert refused(client.post(f"{UPLOAD}/{way}", content=sent))[0] == 400


@pytest.mark.parametrize("name", REFUSED)
def test_only_pictures_that_models_take_are_kept(
    client: httpx.Client, name: str
) -> None:
    answers = {
        "base64_data": by_base64(client, REFUSED[name], file_name="picture.png"),
        "file": by_stream(client, REFUSED[name]),
    }

    for param, answer in answers.items():
        status, code, named = refused(answer)
        assert (status, named) == (400, param)
        assert code in {"invalid_image", "invalid_value"}


def test_fifty_megabytes_are_kept_and_one_byte_more_is_not(
    newcomer: httpx.Client, host: Host
) -> None:
    most = PNG + b"\x00" * (LIMIT_BYTES - len(PNG))
    for way, upload in (("base64_data", by_base64), ("file", by_stream)):
        assert kept(upload(newcomer, most))["file_size"] == LIMIT_BYTES
        answer = upload(newcomer, most + b"\x00")
        assert refused(answer) == (413, "image_too_large", way)

    assert refused(by_url(newcomer, host.url("large.png")))[0] in {400, 413}
    quota = newcomer.get("/api/v1/files/quota").json()["data"]
    assert quota["used_files"] == 2


def test_a_body_far_over_the_limit_is_refused(client: httpx.Client) -> None:
    answer = client.post(f"{UPLOAD}/base64", content=b" " * (73 * 1024 * 1024))

    assert refused(answer)[:2] == (413, "request_too_large")


def test_names_come_from_the_form_in_either_spelling(client: httpx.Client) -> None:
    for fields in (
        {"file_name": "fox.png", "upload_path": "foxes"},
        {"fileName": "fox.png", "uploadPath": "foxes"},
    ):
        data = kept(by_stream(client, PNG, "IMG_1.png", **fields))
        assert data["original_name"] == "IMG_1.png"
        assert (data["file_name"], data["upload_path"]) == ("fox.png", "foxes")


def test_a_name_that_walks_stays_where_it_is(
    client: httpx.Client, gateway: LiveGateway
) -> None:
    data = kept(by_stream(client, PNG, "../../../evil.html", upload_path="../../x"))

    assert (data["file_name"], data["upload_path"]) == ("evil.html.png", "x")
    answer = httpx.get(data["file_url"])
    assert (answer.content, answer.headers["content-type"]) == (PNG, "image/png")
    assert not list(gateway.data_dir.parent.rglob("evil*"))


FORM = {"content-type": "multipart/form-data; boundary=edge"}
START = (
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
)
BROKEN_FORMS: dict[str, tuple[dict[str, str], bytes]] = {
    "cut off in the file": (FORM, START + PNG[:40]),
    "cut off before its end": (FORM, START + PNG),
    "large and cut off": (FORM, START + PNG + b"\x00" * 3_000_000),
    "no part": (FORM, b"--edge--\r\n"),
    "empty": (FORM, b""),
    "not a form": (FORM, PNG),
    "the file as a text": (FORM, START.replace(b'; filename="a.png"', b"") + b"\r\n"),
    "another field": (FORM, START.replace(b'"file"', b'"image"') + b"\r\n--edge--"),
    "no boundary": ({"content-type": "multipart/form-data"}, START),
    "JSON": ({"content-type": "application/json"}, b"{}"),
    "the picture itself": ({"content-type": "image/png"}, PNG),
    "no type": ({}, START + PNG + b"\r\n--edge--\r\n"),
}


@pytest.mark.parametrize("name", BROKEN_FORMS)
def test_a_broken_form_is_refused_at_once(client: httpx.Client, name: str) -> None:
    headers, content = BROKEN_FORMS[name]

    answer = client.post(
        f"{UPLOAD}/stream", headers=headers, content=content, timeout=5
    )

    assert refused(answer)[0] == 400


def test_two_files_at_once_are_refused(client: httpx.Client) -> None:
    files = [("file", ("a.png", PNG)), ("file", ("b.png", PNG))]

    answer = client.post(f"{UPLOAD}/stream", files=files)

    assert refused(answer)[:2] == (400, "too_many_files")


def test_an_upload_that_its_client_breaks_off_leaves_nothing(
    newcomer: httpx.Client, gateway: LiveGateway
) -> None:
    address = urlsplit(gateway.url)
    assert address.hostname
    head = (
        f"POST {UPLOAD}/stream HTTP/1.1\r\nhost: x\r\n"
        f"authorization: {newcomer.headers['authorization']}\r\n"
        f"content-type: {FORM['content-type']}\r\ncontent-length: 9000000\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port or 80)) as broken:
        broken.sendall(head.encode() + START + PNG + b"\x00" * 1_000_000)

    # Answered after the gateway has seen the end of the one before.
    seen = [entry for entry in gateway.logs if '"client_gone":true' in entry]
    while not seen:
        assert newcomer.get("/api/v1/files/list").json()["data"]["total"] == 0
        seen = [entry for entry in gateway.logs if '"client_gone":true' in entry]
    assert UPLOAD in seen[-1]


@pytest.mark.parametrize(
    "url",
    [
        None,
        "",
        5,
        "not a url",
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "https://" + "a" * 5_000,
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f000001/",
    ],
)
def test_urls_that_may_not_be_fetched_are_refused(
    client: httpx.Client, url: object
) -> None:
    status, _, param = refused(by_url(client, url))

    assert (status, param) == (400, "file_url")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing", "image_fetch_failed"),
        ("inside", "image_fetch_failed"),
        ("page.png", "invalid_image"),
    ],
)
def test_what_a_url_does_not_give_is_not_kept(
    client: httpx.Client, host: Host, path: str, code: str
) -> None:
    assert refused(by_url(client, host.url(path))) == (400, code, "file_url")


def test_files_are_listed_in_pages_newest_first(newcomer: httpx.Client) -> None:
    uploaded = [kept(by_stream(newcomer, PNG, f"{i}.png"))["file_id"] for i in range(5)]

    def page(number: int) -> list[str]:
        answer = newcomer.get(
            "/api/v1/files/list", params={"page": number, "pageSize": 2}
        )
        data = answer.json()["data"]
        assert data["total"] == 5
        for file in data["files"]:
            assert set(file) == {"file_id", "file_name", "file_size", "upload_time"}
        return [file["file_id"] for file in data["files"]]

    seen = page(1) + page(2) + page(3)
    assert seen == uploaded[::-1]
    assert page(4) == []


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("page", "0"),
        ("page", "-1"),
        ("page", "x"),
        ("page", "9" * 5_000),
        ("page", "\u0661"),
        ("pageSize", "0"),
        ("pageSize", "101"),
        ("pageSize", ""),
    ],
)
def test_pages_that_cannot_be_are_refused(
    client: httpx.Client, param: str, value: str
) -> None:
    answer = client.get("/api/v1/files/list", params={param: value})

    assert refused(answer) == (400, "invalid_value", param)


def test_the_quota_counts_what_is_there(newcomer: httpx.Client) -> None:
    def quota() -> dict[str, Any]:
        return dict(newcomer.get("/api/v1/files/quota").json()["data"])

    assert quota() == {
        "user_group": "default",
        "used_files": 0,
        "max_files": 2_000,
        "remain_files": 2_000,
        "used_bytes": 0,
        "max_bytes": 5_368_709_120,
        "remain_bytes": 5_368_709_120,
        "is_custom": False,
        "quota_reason": "default",
    }
    file_id = kept(by_base64(newcomer, PNG))["file_id"]
    assert (quota()["used_files"], quota()["remain_files"]) == (1, 1_999)
    assert quota()["used_bytes"] == len(PNG)
    assert quota()["remain_bytes"] == 5_368_709_120 - len(PNG)

    newcomer.delete(f"/api/v1/files/{file_id}")

    assert quota()["used_files"] == 0


def test_nothing_is_stored_for_a_tenant_without_credits(gateway: LiveGateway) -> None:
    with gateway.client(gateway.tenant("penniless", "0")) as client:
        for send in (by_base64, by_stream):
            answer = send(client, PNG)
            assert refused(answer)[:2] == (402, "insufficient_quota")
        assert kept(client.get("/api/v1/files/quota"))["used_files"] == 0


UPLOADS = ("base64", "stream", "url")


def refusal_before_body(client: httpx.Client, way: str) -> tuple[int, str]:
    """Announce a body, send none of it, and take what is answered."""
    address = urlsplit(str(client.base_url))
    assert address.hostname
    head = (
        f"POST {UPLOAD}/{way} HTTP/1.1\r\nhost: x\r\n"
        f"authorization: {client.headers['authorization']}\r\n"
        f"content-type: {FORM['content-type']}\r\ncontent-length: 52000000\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port or 80), 10) as line:
        line.sendall(head.encode())
        with closing(HTTPResponse(line)) as answer:
            answer.begin()
            status, body = answer.status, json.loads(answer.read())
    return status, str(body["error"]["code"])


@pytest.mark.parametrize("way", UPLOADS)
def test_who_has_no_credits_is_turned_away_before_the_body(
    gateway: LiveGateway, way: str
) -> None:
    key = gateway.tenant(f"penniless-{way}", "0")

    with gateway.client(key) as poor:
        assert refusal_before_body(poor, way) == (402, "insufficient_quota")
        assert poor.get("/api/v1/files/quota").status_code == 200


@pytest.mark.parametrize("way", UPLOADS)
def test_a_disk_in_trouble_turns_uploads_away_before_their_body(
    newcomer: httpx.Client, gateway: LiveGateway, way: str
) -> None:
    uploads = gateway.data_dir / "uploads"
    aside = gateway.data_dir / "uploads-aside"
    uploads.rename(aside)
    uploads.write_text("no folder")
    try:
        assert refusal_before_body(newcomer, way) == (503, "storage_unavailable")
    finally:
        uploads.unlink()
        aside.rename(uploads)
    kept(by_stream(newcomer, PNG))


def test_a_deleted_file_is_gone_with_its_links(
    client: httpx.Client, gateway: LiveGateway
) -> None:
    data = kept(by_base64(client, PNG))
    path = f"/api/v1/files/{data['file_id']}"

    answer = client.delete(path)

    assert answer.status_code == 200
    assert answer.json()["success"] is True
    gone = httpx.get(data["file_url"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "result_expired")
    assert refused(client.delete(path)) == (404, "file_not_found", "file_id")
    assert not list((gateway.data_dir / "uploads").glob(f"{data['file_id']}*"))


def test_a_file_is_nobodys_business_but_its_tenants(
    client: httpx.Client, gateway: LiveGateway
) -> None:
    data = kept(by_base64(client, PNG))
    with gateway.client(gateway.tenant("stranger")) as stranger:
        foreign = stranger.delete(f"/api/v1/files/{data['file_id']}")
        unknown = stranger.delete(f"/api/v1/files/{data['file_id'][:-1]}0")
        listed = stranger.get("/api/v1/files/list").json()["data"]

    assert refused(foreign) == (404, "file_not_found", "file_id")
    assert foreign.json()["msg"] == unknown.json()["msg"]
    assert listed == {"total": 0, "files": []}
    assert httpx.get(data["file_url"]).content == PNG


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"{UPLOAD}/base64"),
        ("POST", f"{UPLOAD}/stream"),
        ("POST", f"{UPLOAD}/url"),
        ("GET", "/api/v1/files/list"),
        ("GET", "/api/v1/files/quota"),
        ("DELETE", "/api/v1/files/file_1"),
    ],
)
def test_without_a_key_there_is_nothing(
    gateway: LiveGateway, method: str, path: str
) -> None:
    answer = httpx.request(method, gateway.url + path, content=b"{}")

    assert refused(answer)[:2] == (401, "missing_api_key")


def test_a_route_that_is_not_there_answers_in_both_shapes(
    client: httpx.Client,
) -> None:
    assert refused(client.get("/api/v1/files/nothing/here"))[0] == 404
    assert refused(client.put(f"{UPLOAD}/url"))[0] == 405


def test_a_link_gives_parts_and_heads_and_ignores_keys(client: httpx.Client) -> None:
    link = kept(by_stream(client, PNG))["file_url"]

    part = httpx.get(link, headers={"range": "bytes=8-15", "authorization": "Bearer x"})
    behind = httpx.get(link, headers={"range": f"bytes={len(PNG)}-"})
    head = httpx.head(link)
    changed = httpx.get(link[:-1])

    assert (part.status_code, part.content) == (206, PNG[8:16])
    assert part.headers["content-range"] == f"bytes 8-15/{len(PNG)}"
    assert behind.status_code == 416
    assert behind.headers["content-range"] == f"bytes */{len(PNG)}"
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(PNG))
    assert (changed.status_code, changed.json()["error"]["code"]) == (
        403,
        "link_invalid",
    )


def test_a_restart_keeps_files_and_links(tmp_path: Path) -> None:
    with LiveGateway(tmp_path / "data") as gateway:
        with gateway.client() as client:
            data = kept(by_stream(client, PNG))
        gateway.kill()
        gateway.start()
        with gateway.client() as client:
            listed = client.get("/api/v1/files/list").json()["data"]
        link = urlsplit(data["file_url"])
        content = httpx.get(f"{gateway.url}{link.path}?{link.query}").content

    assert [file["file_id"] for file in listed["files"]] == [data["file_id"]]
    assert content == PNG
