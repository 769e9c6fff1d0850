"""JSON bodies hold pictures as data URIs, and never hold them in memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest

from providers.kit.contract import FailureKind, InputFile, ProviderError
from providers.kit.json_bodies import json_body
from providers.kit.spool import SpoolFolder


def a_file(
    folder: Path, content: bytes, encoding: Literal["raw", "base64"] = "raw"
) -> InputFile:
    text = base64.b64encode(content) if encoding == "base64" else content
    spool = SpoolFolder(folder).from_bytes(text, encoding)
    return InputFile(spool, "image/png", 1, 1)


def uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("encoding", ["raw", "base64"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 70_000, 300_001])
def test_files_at_any_depth_are_data_uris(
    encoding: Literal["raw", "base64"], size: int, tmp_path: Path
) -> None:
    one, two = bytes(size), b"\xff" * size
    body = json_body(
        {
            "prompt": 'é "quoted" \\',
            "image_urls": [a_file(tmp_path, one, encoding)],
            "deep": [{"image_url": {"url": a_file(tmp_path, two)}}],
            "n": 1,
        }
    )
    sent = b"".join(body.chunks())
    assert len(sent) == body.size_bytes
    assert b"".join(body.chunks()) == sent
    assert json.loads(sent) == {
        "prompt": 'é "quoted" \\',
        "image_urls": [uri(one)],
        "deep": [{"image_url": {"url": uri(two)}}],
        "n": 1,
    }


def test_a_body_without_files_is_plain_json() -> None:
    body = json_body({"a": 1})
    assert (body.media_type, body.size_bytes) == ("application/json", 7)
    assert b"".join(body.chunks()) == b'{"a":1}'


def test_half_a_character_cannot_be_written() -> None:
    with pytest.raises(ProviderError) as caught:
        json_body({"prompt": "\ud800"})
    assert caught.value.kind is FailureKind.INVALID_REQUEST


def test_a_large_file_is_never_held_whole(tmp_path: Path) -> None:
    body = json_body({"image": a_file(tmp_path, bytes(20_000_000))})
    tracemalloc.start()
    try:
        assert sum(map(len, body.chunks())) == body.size_bytes > 26_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
