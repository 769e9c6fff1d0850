"""Bodies on their way in: cut anywhere, never held whole, refused within bounds."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.types import HTTPReceiveMessage, Receive

from gateway.api import lifting
from gateway.api.forms import FormLimits, boundary_of, read_form
from gateway.api.http import JSON_BODY_MAX_BYTES, decode_json, read_body
from gateway.api.lifting import read_lifted
from gateway.core.errors import GatewayError, InvalidRequestError, TooLargeError
from providers.kit.spool import SpoolFolder

LIMITS = FormLimits(files=3, file_max_bytes=1000)
PICTURE = base64.b64encode(b"a picture, or so").decode()


def arriving(chunks: Sequence[bytes]) -> Receive:
    """A client that sends these pieces, and then waits for its answer."""
    messages = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks or [b""])
    ]

    async def receive() -> HTTPReceiveMessage:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)  # type: ignore[return-value]

    return receive


def pieces(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    return [body[a:b] for a, b in pairwise(edges)]


def form(*parts: tuple[str, str | None, bytes], boundary: str = "xxx") -> bytes:
    body = b""
    for name, filename, content in parts:
        file = f'; filename="{filename}"' if filename else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}'
        body += head.encode() + b"\r\n\r\n" + content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


@pytest.fixture
def spools(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path)


# --- JSON with data URLs ---


@settings(max_examples=200)
@given(
    urls=st.lists(st.binary(max_size=200), max_size=4),
    cuts=st.lists(st.integers(0, 5000), max_size=12),
    escaped=st.booleans(),
)
def test_data_urls_are_lifted_out_wherever_the_body_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    urls: list[bytes],
    cuts: list[int],
    escaped: bool,
) -> None:
    texts = [base64.b64encode(url).decode() for url in urls]
    body = {"prompt": 'say "data:" twice', "image_urls": [], "n": 1}
    body["image_urls"] = [f"data:image/png;base64,{text}" for text in texts]
    raw = json.dumps(body)
    if escaped:
        raw = raw.replace("/", "\\/")

    async def run() -> None:
        spools = SpoolFolder(tmp_path_factory.getbasetemp())
        lifted = await read_lifted(arriving(pieces(raw.encode(), cuts)), spools)
        found = [b"".join(spool.chunks()).decode() for spool in lifted.spools]
        lifted.close()
        assert found == texts
        marks = [f"data:#{i}" for i in range(len(texts))]
        assert lifted.json == body | {"image_urls": marks}

    asyncio.run(run())


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=40),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(max_size=10), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    cuts=st.lists(st.integers(0, 5000), max_size=8),
)
def test_json_without_data_urls_is_what_it_was(
    tmp_path_factory: pytest.TempPathFactory, body: Any, cuts: list[int]
) -> None:
    raw = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")

    async def run() -> None:
        spools = SpoolFolder(tmp_path_factory.getbasetemp())
        lifted = await read_lifted(arriving(pieces(raw, cuts)), spools)
        assert lifted.json == body

    asyncio.run(run())


async def test_a_data_url_over_its_limit_is_refused_and_leaves_nothing(
    spools: SpoolFolder,
) -> None:
    raw = b'{"image_urls": ["data:image/png;base64,' + b"A" * 20_971_521 + b'"]}'
    chunks = [raw[i : i + 65_536] for i in range(0, len(raw), 65_536)]

    with pytest.raises(TooLargeError) as caught:
        await read_lifted(arriving(chunks), spools)

    assert caught.value.code == "image_too_large"
    assert list(spools.path.iterdir()) == []


async def test_more_data_urls_than_pictures_may_be_sent_are_refused(
    spools: SpoolFolder,
) -> None:
    many = [f"data:image/png;base64,{PICTURE}"] * (lifting.LIFTED_MAX + 1)
    body = json.dumps({"image_urls": many}).encode()

    with pytest.raises(InvalidRequestError):
        await read_lifted(arriving([body]), spools)

    assert list(spools.path.iterdir()) == []


@pytest.mark.parametrize("over", [1, 1000, 100_000])
async def test_a_body_just_over_its_limit_is_refused_at_once(over: int) -> None:
    body = b"x" * (JSON_BODY_MAX_BYTES + over)

    async with asyncio.timeout(1):
        with pytest.raises(TooLargeError):
            await read_body(arriving([body[:1000], body[1000:]]), JSON_BODY_MAX_BYTES)


ENCODED = base64.b64encode(bytes(range(256)) * 3).decode()


@given(cuts=st.lists(st.integers(0, 3000), max_size=12))
@pytest.mark.parametrize(
    "written",
    [
        ENCODED.replace("+", "\\u002B").replace("/", "\\u002f"),
        ENCODED.replace("/", "\\/"),
        "\\r\\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)),
        "\\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)) + "\\n",
    ],
)
@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:image/PNG;x=1;BASE64,"]
)
def test_base64_is_read_however_an_encoder_writes_it(
    tmp_path_factory: pytest.TempPathFactory, head: str, written: str, cuts: list[int]
) -> None:
    raw = f'{{"images": [{{"image_url": "{head}{written}"}}]}}'.encode()

    async def run() -> None:
        spools = SpoolFolder(tmp_path_factory.getbasetemp())
        lifted = await read_lifted(arriving(pieces(raw, cuts)), spools)
        (found,) = [b"".join(spool.chunks()).decode() for spool in lifted.spools]
        lifted.close()
        assert found == ENCODED
        assert lifted.json == {"images": [{"image_url": "data:#0"}]}

    asyncio.run(run())


@pytest.mark.parametrize("escape", ["\\b", "\\u2028", "\\u005C", '\\"', "\\\\"])
async def test_an_escape_that_base64_cannot_have_is_refused(
    spools: SpoolFolder, escape: str
) -> None:
    raw = f'{{"image_url": "data:image/png;base64,AAAA{escape}AAAA"}}'.encode()

    with pytest.raises(InvalidRequestError):
        await read_lifted(arriving([raw]), spools)

    assert list(spools.path.iterdir()) == []


@given(cuts=st.lists(st.integers(0, 300), max_size=8))
def test_a_prompt_may_quote_and_even_be_a_data_url(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    body = {
        "prompt": "data:image/png;base64,AAAA",
        "x": 'what is <img src="data:image/png;base64,AAAA">? \\',
        "image_urls": ["https://a.test/1", 'not "data:image/png;base64,AAAA"'],
        "y": ["data:image/png;base64,AAAA"],
    }
    raw = json.dumps(body).encode()

    async def run() -> None:
        spools = SpoolFolder(tmp_path_factory.getbasetemp())
        lifted = await read_lifted(arriving(pieces(raw, cuts)), spools)
        assert lifted.spools == []
        assert lifted.json == body

    asyncio.run(run())


# --- forms ---


@given(cuts=st.lists(st.integers(0, 2000), max_size=10))
def test_a_form_arrives_whole_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    first, second = b"\r\n--xx not a boundary\r\n", bytes(range(256))
    raw = form(
        ("prompt", None, "ein Fuchs 狐".encode()),
        ("image[]", "a.png", first),
        ("image[]", "b.png", second),
    )

    async def run() -> None:
        spools = SpoolFolder(tmp_path_factory.getbasetemp())
        read = await read_form(arriving(pieces(raw, cuts)), "xxx", spools, LIMITS)
        files = [(f.name, b"".join(f.spool.chunks())) for f in read.files]
        read.close()
        assert read.texts == {"prompt": "ein Fuchs 狐"}
        assert files == [("image[]", first), ("image[]", second)]

    asyncio.run(run())


WHOLE = form(("prompt", None, b"a fox"), ("image", "a.png", b"x" * 900))


@pytest.mark.parametrize(
    ("body", "error", "code"),
    [
        (WHOLE[:-20], InvalidRequestError, "invalid_multipart"),
        (WHOLE[:100], InvalidRequestError, "invalid_multipart"),
        (b"", InvalidRequestError, "invalid_multipart"),
        (b"not a form at all", InvalidRequestError, "invalid_multipart"),
        (WHOLE.replace(b"xxx", b"yyy"), InvalidRequestError, "invalid_multipart"),
        (form(("image", "a", b"x" * 1001)), TooLargeError, "image_too_large"),
        (form(*[("image", "a", b"x")] * 4), InvalidRequestError, "too_many_files"),
        (form(("prompt", None, b"x" * 1_048_577)), TooLargeError, "request_too_large"),
        (form(("prompt", None, b"\xff\xfe")), InvalidRequestError, "invalid_value"),
        (
            form(*[(f"p{i}", None, b"x") for i in range(65)]),
            InvalidRequestError,
            "invalid_multipart",
        ),
    ],
)
async def test_a_form_that_is_wrong_is_refused_and_leaves_nothing(
    spools: SpoolFolder, body: bytes, error: type[GatewayError], code: str
) -> None:
    with pytest.raises(error) as caught:
        await read_form(arriving(pieces(body, [7, 70, 700])), "xxx", spools, LIMITS)

    assert caught.value.code == code
    assert list(spools.path.iterdir()) == []


async def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(
    tmp_path: Path,
) -> None:
    spools = SpoolFolder(tmp_path)
    limits = FormLimits(files=1, file_max_bytes=10_000_000)
    raw = form(("image", "a.png", b"x" * 1_000_000))
    messages: list[Any] = [
        {"type": "http.request", "body": raw[:600_000], "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> HTTPReceiveMessage:
        return messages.pop(0)  # type: ignore[no-any-return]

    with pytest.raises(GatewayError):
        await read_form(receive, "xxx", spools, limits)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", "abc"),
        ('Multipart/Form-Data; charset=utf-8; boundary="a b"', "a b"),
        ("multipart/form-data", ""),
        ('multipart/form-data; boundary=""', ""),
        ("application/json", None),
        (None, None),
    ],
)
def test_the_boundary_is_found_in_the_content_type(
    content_type: str | None, boundary: str | None
) -> None:
    assert boundary_of(content_type) == boundary


def test_an_exact_body_keeps_every_place_of_a_number() -> None:
    body = decode_json(b'{"a": 0.1, "b": 12345678901234567890.123456789}', exact=True)

    assert body == {"a": Decimal("0.1"), "b": Decimal("12345678901234567890.123456789")}


@pytest.mark.parametrize("number", [b"1e999", b"-1e308", b"1e99999999999999999999"])
def test_a_number_that_is_out_of_range_is_no_json(number: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_json(b'{"n": %s}' % number, exact=True)

    assert caught.value.code == "invalid_json"
