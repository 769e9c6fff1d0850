"""Pictures that no model could use: a clear 4xx, nothing held, no file left behind."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.e2e.gateways import LiveGateway
from tests.e2e.pictures import (
    BLUE,
    EDGE_PX,
    GREEN,
    RED,
    encoded,
    file_of,
    mask_that_clears_the_left_half,
)

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
LIMIT_BYTES = 50 * 1024 * 1024
BOUNDARY = "----of-the-tests"
TEXTS = {"model": "gpt-image-2", "prompt": "a fox", "size": "1:1", "quality": "low"}


@pytest.fixture(scope="module")
def client(shared_gateway: LiveGateway) -> Iterator[httpx.Client]:
    with shared_gateway.client(shared_gateway.tenant("hostile")) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_held_and_nothing_left(
    shared_gateway: LiveGateway, client: httpx.Client
) -> Iterator[None]:
    yield
    balance = client.get("/v1/credits").json()["data"]["user"]
    untouched = {"remaining_credits": 1000, "used_credits": 0, "held_credits": 0}
    assert balance == untouched
    assert list((shared_gateway.data_dir / "spool").iterdir()) == []


def refused(answer: httpx.Response) -> tuple[int, str | None, str]:
    """See that it is an error like all others; returns status, param and code."""
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert answer.headers["x-request-id"] == error["request_id"]
    assert answer.headers["x-task-id"].startswith("task-unified-")
    return answer.status_code, error["param"], error["code"]


def by_form(
    client: httpx.Client, *images: bytes, mask: bytes | None = None
) -> httpx.Response:
    name = "image" if len(images) == 1 else "image[]"
    files = [(name, ("picture.png", image, "image/png")) for image in images]
    if mask is not None:
        files.append(("mask", ("mask.png", mask, "image/png")))
    return client.post(EDITS, data=TEXTS, files=files)


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def by_json_edit(client: httpx.Client, image: bytes) -> httpx.Response:
    body = TEXTS | {"images": [{"image_url": data_url(image)}]}
    return client.post(EDITS, json=body)


def by_image_urls(client: httpx.Client, image: bytes) -> httpx.Response:
    return client.post(GENERATIONS, json=TEXTS | {"image_urls": [data_url(image)]})


def wide_png(width_px: int) -> bytes:
    """A whole PNG of one row, in one bit per pixel."""
    head = struct.pack(">IIBBBBB", width_px, 1, 1, 0, 0, 0, 0)
    row = zlib.compress(b"\x00" + bytes((width_px + 7) // 8))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", head), (b"IDAT", row), (b"IEND", b""))
    )


def animated(file_format: str) -> bytes:
    file = io.BytesIO()
    first, *others = (Image.new("RGB", (64, 64), c) for c in (RED, GREEN, BLUE))
    first.save(file, file_format, save_all=True, append_images=others)
    return file.getvalue()


BAD: dict[str, bytes] = {
    "nothing": b"",
    "a text named .png": b"I am a picture, believe me.\n" * 40,
    "a gzip bomb named .png": gzip.compress(bytes(20_000_000)),
    "20,000 px wide": wide_png(20_000),
    "65,536 px square": wide_png(65_536).replace(
        struct.pack(">II", 65_536, 1), struct.pack(">II", 65_536, 65_536)
    ),
    "an animated PNG": animated("png"),
    "an animated WebP": animated("webp"),
    "a GIF": file_of(RED, "gif"),
    "a BMP": file_of(RED, "bmp"),
    "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a PNG's first 20 bytes": file_of(RED)[:20],
    "a JPEG's first 20 bytes": file_of(RED, "jpeg")[:20],
}
WAYS: dict[str, Callable[[httpx.Client, bytes], httpx.Response]] = {
    "form": by_form,
    "JSON edit": by_json_edit,
    "image_urls": by_image_urls,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_still_picture_is_refused_whichever_way_it_comes(
    client: httpx.Client, name: str, way: str
) -> None:
    status, param, code = refused(WAYS[way](client, BAD[name]))

    assert (status, code) == (400, "invalid_image")
    assert param


def test_of_several_pictures_the_bad_one_is_named(client: httpx.Client) -> None:
    pictures = [file_of(RED), BAD["a text named .png"], file_of(BLUE)]
    urls = [data_url(picture) for picture in pictures]

    as_files = by_form(client, *pictures)
    as_urls = client.post(GENERATIONS, json=TEXTS | {"image_urls": urls})

    assert refused(as_files) == (400, "image[1]", "invalid_image")
    assert refused(as_urls) == (400, "image_urls[1]", "invalid_image")


def test_a_wide_picture_is_told_its_size_and_the_limit(client: httpx.Client) -> None:
    message = by_form(client, wide_png(20_000)).json()["error"]["message"]

    assert "20000x1" in message
    assert "16,384" in message


# --- masks ---


def test_a_mask_of_another_size_is_refused_naming_both(client: httpx.Client) -> None:
    answer = by_form(client, file_of(RED), mask=file_of((0, 0, 0, 0), edge_px=32))

    assert refused(answer) == (400, "mask", "image_dimension_mismatch")
    message = answer.json()["error"]["message"]
    assert "32x32" in message
    assert f"{EDGE_PX}x{EDGE_PX}" in message


@pytest.mark.parametrize(
    "mask",
    [
        file_of(RED),
        encoded(Image.new("L", (EDGE_PX, EDGE_PX)), "png"),
        file_of((0, 0, 0, 0), "webp"),
        b"a mask",
        b"",
    ],
    ids=["no alpha", "grey", "WebP", "text", "nothing"],
)
def test_a_mask_must_be_a_png_with_alpha(client: httpx.Client, mask: bytes) -> None:
    answer = by_form(client, file_of(RED), mask=mask)

    assert refused(answer) == (400, "mask", "invalid_image")


def test_a_mask_fits_the_first_picture_not_any(client: httpx.Client) -> None:
    wrong_order = [file_of(RED, edge_px=32), file_of(RED)]

    answer = by_form(client, *wrong_order, mask=mask_that_clears_the_left_half())

    assert refused(answer) == (400, "mask", "image_dimension_mismatch")


# --- too much ---


def test_17_pictures_are_too_many(client: httpx.Client) -> None:
    assert refused(by_form(client, *[file_of(RED)] * 17)) == (
        400,
        "image",
        "invalid_value",
    )
    urls = [data_url(file_of(RED))] * 17
    as_urls = client.post(GENERATIONS, json=TEXTS | {"image_urls": urls})
    assert refused(as_urls) == (400, "image_urls", "invalid_value")


def test_18_files_and_more_are_not_even_read(client: httpx.Client) -> None:
    answer = by_form(client, *[file_of(RED)] * 30)

    assert refused(answer) == (400, "image[]", "too_many_files")


def test_50_mb_and_a_byte_are_too_much(client: httpx.Client) -> None:
    png = file_of(RED)

    answer = by_form(client, png + bytes(LIMIT_BYTES + 1 - len(png)))

    assert refused(answer) == (413, "image", "image_too_large")


# --- forms that are none ---


def form_of(*parts: tuple[str, bytes]) -> bytes:
    lines = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode()
        + content
        + b"\r\n"
        for head, content in parts
    )
    return lines + f"--{BOUNDARY}--\r\n".encode()


WHOLE = form_of(
    ('name="prompt"', b"a fox"), ('name="image"; filename="a.png"', file_of(RED))
)
FORM = f"multipart/form-data; boundary={BOUNDARY}"
BROKEN: dict[str, tuple[str | None, bytes, int, str | None, str]] = {
    "cut in a file": (FORM, WHOLE[: len(WHOLE) // 2], 400, None, "invalid_multipart"),
    "cut before its end": (
        FORM,
        WHOLE[: -len(BOUNDARY)],
        400,
        None,
        "invalid_multipart",
    ),
    "nothing": (FORM, b"", 400, None, "invalid_multipart"),
    "another boundary": (FORM + "x", WHOLE, 400, None, "invalid_multipart"),
    "gzipped": (FORM, gzip.compress(WHOLE), 400, None, "invalid_multipart"),
    "no boundary": ("multipart/form-data", WHOLE, 400, None, "invalid_multipart"),
    "text/plain": ("text/plain", WHOLE, 400, None, "unsupported_content_type"),
    "a picture alone": (
        "image/png",
        file_of(RED),
        400,
        None,
        "unsupported_content_type",
    ),
    "no content type": (None, WHOLE, 400, None, "unsupported_content_type"),
    "a form said to be JSON": ("application/json", WHOLE, 400, None, "invalid_json"),
    "no picture": (
        FORM,
        form_of(('name="prompt"', b"a fox")),
        400,
        "image",
        "invalid_value",
    ),
    "a picture as text": (
        FORM,
        form_of(('name="prompt"', b"a fox"), ('name="image"', b"text")),
        400,
        "image",
        "invalid_value",
    ),
    "a file in another field": (
        FORM,
        form_of(
            ('name="prompt"', b"a fox"), ('name="photo"; filename="a"', file_of(RED))
        ),
        400,
        "photo",
        "invalid_value",
    ),
    "two masks": (
        FORM,
        form_of(
            ('name="prompt"', b"a fox"),
            ('name="image"; filename="a"', file_of(RED)),
            *[('name="mask"; filename="m"', mask_that_clears_the_left_half())] * 2,
        ),
        400,
        "mask",
        "invalid_value",
    ),
    "a prompt that is not UTF-8": (
        FORM,
        form_of(
            ('name="prompt"', b"\xff\xfe"), ('name="image"; filename="a"', file_of(RED))
        ),
        400,
        "prompt",
        "invalid_value",
    ),
    "2 MB of text": (
        FORM,
        form_of(('name="prompt"', b"x" * 2_000_000)),
        413,
        None,
        "request_too_large",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_no_edit_is_refused(client: httpx.Client, name: str) -> None:
    content_type, body, *expected = BROKEN[name]
    headers = {} if content_type is None else {"content-type": content_type}

    answer = client.post(EDITS, content=body, headers=headers)

    assert refused(answer) == tuple(expected)


@pytest.mark.parametrize(
    ("images", "param"),
    [
        ([], "images"),
        ([{}], "images[0]"),
        (["https://example.com/a.png"], "images[0]"),
        ([{"image_url": "ftp://example.com/a.png"}], "images[0].image_url"),
        ([{"image_url": data_url(file_of(RED)), "file_id": "file_1"}], "images[0]"),
    ],
    ids=["none", "empty", "text", "ftp", "both"],
)
def test_a_json_edit_names_the_image_that_is_wrong(
    client: httpx.Client, images: list[Any], param: str
) -> None:
    body = json.dumps(TEXTS | {"images": images}).encode()
    headers = {"content-type": "application/json"}

    answer = client.post(EDITS, content=body, headers=headers)

    status, told, _ = refused(answer)
    assert status == 400
    assert told is not None
    assert told.startswith(param)
