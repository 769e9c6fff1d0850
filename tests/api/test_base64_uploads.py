"""Base64 in JSON on its way in: cut anywhere, written anyhow, never held whole."""

from __future__ import annotations

import asyncio
import base64
import json
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.types import HTTPReceiveMessage, Receive

from gateway.api.base64_uploads import read_base64_upload
from gateway.core.errors import GatewayError, InvalidRequestError, TooLargeError
from gateway.core.images import IMAGE_MAX_BYTES
from providers.kit.spool import SpoolFolder
from tests.api.test_bodies import arriving, pieces

CONTENT = bytes(range(256)) * 3 + b"x"
TEXT = base64.b64encode(CONTENT).decode()
LINES = "\\r\\n".join(TEXT[i : i + 76] for i in range(0, len(TEXT), 76))
HALF = base64.b64encode(CONTENT[:256]).decode()


async def read(
    folder: Path, chunks: Sequence[bytes]
) -> tuple[bytes, dict[str, object]]:
    spool = SpoolFolder(folder).open("raw", limit_bytes=10_000)
    with closing(spool):
        fields = await read_base64_upload(arriving(chunks), spool)
        return b"".join(spool.chunks()), fields


@pytest.mark.parametrize(
    "written",
    [
        TEXT,
        TEXT.rstrip("="),
        LINES,
        TEXT.replace("+", "\\u002B").replace("/", "\\/").replace("=", "\\u003d"),
        f"data:image/png;base64,{TEXT}",
        f"DATA:text\\/plain; x=1;base64,{LINES}",
    ],
    ids=["plain", "unpadded", "lines", "escaped", "data URL", "odd data URL"],
)
@given(cuts=st.lists(st.integers(0, 3000), max_size=12))
def test_a_picture_is_decoded_however_it_is_written_and_cut(
    tmp_path_factory: pytest.TempPathFactory, written: str, cuts: list[int]
) -> None:
    fields = {
        "base64_data ": 'a "base64_data": "QUJD" \\',
        "more": [{"base64_data": "QUJD"}, "base64_data", "QUJD"],
        "file_name": "base64_data",
    }
    before, after = json.dumps(fields)[1:-1], '"upload_path": "\\u72d0"'
    raw = f'{{{before}, "base64_data"\n : "{written}", {after}}}'.encode()

    content, found = asyncio.run(
        read(tmp_path_factory.getbasetemp(), pieces(raw, cuts))
    )

    assert content == CONTENT
    assert found == fields | {"upload_path": "狐"}


NOT_BASE64 = {
    "two padded pieces": HALF + HALF,
    "a piece behind a padded one": HALF + "QUJD",
    "padding in the middle of a group": "QU=J" * 200,
    "padding alone": "====",
    "one sign too many": "QUJDR",
    "another alphabet": "QUJ_" * 200,
    "nothing": "",
    "a data URL of nothing": "data:image/png;base64,",
    "a data URL of text": f"data:image/png,{TEXT}",
    "a data URL with a long head": f"data:{'x' * 300};base64,{TEXT}",
    "another script": "\\u72d0" * 4,
    "half a pair": "\\ud83e" * 4,
}


@pytest.mark.parametrize("name", NOT_BASE64)
@given(cuts=st.lists(st.integers(0, 1500), max_size=6))
def test_what_is_no_base64_is_refused_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, name: str, cuts: list[int]
) -> None:
    raw = f'{{"base64_data": "{NOT_BASE64[name]}"}}'.encode()

    with pytest.raises(InvalidRequestError) as refused:
        asyncio.run(read(tmp_path_factory.getbasetemp(), pieces(raw, cuts)))

    assert refused.value.param == "base64_data"


async def test_a_padded_piece_is_the_last_wherever_the_next_one_begins(
    tmp_path: Path,
) -> None:
    raw = f'{{"base64_data": "{HALF}{HALF}"}}'.encode()

    for cut in range(len(raw)):
        with pytest.raises(InvalidRequestError) as refused:
            await read(tmp_path, pieces(raw, [cut]))
        assert refused.value.param == "base64_data"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"base64_data": "QUJD', "invalid_json"),
        (b'{"base64_data": "QUJD\\', "invalid_json"),
        (b'{"file_name": "\\u00xx\\u0000"}', "invalid_json"),
        (b'{"base64_data": "QUJD"}}', "invalid_json"),
        (b'["base64_data", "QUJD"]', "invalid_body"),
        (b'"base64_data"', "invalid_body"),
        (b'{"base64_data": null, "file_name": "QUJD"}', "invalid_value"),
        (b'{"base64_data": ["QUJD"]}', "invalid_value"),
        (b'{"a": {"base64_data": "QUJD"}}', "invalid_value"),
        (b'{"base64_data": "QUJD", "base64_data": "QUJD"}', "invalid_value"),
    ],
)
async def test_a_body_without_one_picture_is_refused(
    tmp_path: Path, raw: bytes, code: str
) -> None:
    for cuts in ([], list(range(len(raw)))):
        with pytest.raises(InvalidRequestError) as refused:
            await read(tmp_path, pieces(raw, cuts))
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"base64_data": "' + b"QUJD" * 4_000 + b'"}', "image_too_large"),
        (b'{"a": "' + b"x" * 1_048_577 + b'"}', "request_too_large"),
        (b" " * 1_048_577, "request_too_large"),
    ],
    ids=["picture", "rest", "nothing"],
)
async def test_what_is_over_a_limit_is_refused(
    tmp_path: Path, raw: bytes, code: str
) -> None:
    with pytest.raises(GatewayError) as refused:
        await read(tmp_path, pieces(raw, list(range(0, len(raw), 65_536))))

    assert isinstance(refused.value, TooLargeError)
    assert refused.value.code == code


def sending_zeros(size_bytes: int) -> Receive:
    text = b"A" * 65_536
    left = size_bytes // 3 * 4 // len(text)
    parts = iter([b'{"base64_data": "', *[text] * left, b'"}'])

    async def receive() -> HTTPReceiveMessage:
        part = next(parts)
        more = part != b'"}'
        return {"type": "http.request", "body": part, "more_body": more}

    return receive


async def test_fifty_megabytes_take_next_to_no_memory(tmp_path: Path) -> None:
    spool = SpoolFolder(tmp_path).open("raw", limit_bytes=IMAGE_MAX_BYTES)
    tracemalloc.start()
    try:
        await read_base64_upload(sending_zeros(IMAGE_MAX_BYTES), spool)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spool.size_bytes > 0.99 * IMAGE_MAX_BYTES
    assert most_bytes < 2_000_000
    spool.close()
