"""Forms: their length is told before, and they are never whole in memory."""

from __future__ import annotations

import base64
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.kit.contract import InputFile
from providers.kit.multipart import FormFile, form
from providers.kit.payloads import (
    BrokenBase64Error,
    base64_chunks,
    base64_length,
    raw_chunks,
    raw_length,
)
from providers.kit.spool import SpoolFolder
from tests.fakes import FakePayload


def an_input(content: bytes, encoding: Literal["raw", "base64"] = "raw") -> InputFile:
    return InputFile(FakePayload(content, encoding), "image/png", 64, 32)


def test_a_form_reads_as_the_standard_writes_it() -> None:
    body = form([("n", "2")], [FormFile("image[]", an_input(b"\x00\r\n--"))])
    boundary = body.media_type.removeprefix("multipart/form-data; boundary=")
    content = b"".join(body.chunks())
    assert content.replace(boundary.encode(), b"X") == (
        b'--X\r\nContent-Disposition: form-data; name="n"\r\n\r\n2\r\n'
        b'--X\r\nContent-Disposition: form-data; name="image[]"; '
        b'filename="image-1.png"\r\nContent-Type: image/png\r\n\r\n\x00\r\n--\r\n'
        b"--X--\r\n"
    )
    assert len(content) == body.size_bytes
    assert b"".join(body.chunks()) == content


def test_nobody_can_guess_where_a_field_ends() -> None:
    assert len({form([], []).media_type for _ in range(20)}) == 20


@given(
    texts=st.lists(st.tuples(st.just("prompt"), st.text())),
    files=st.lists(st.tuples(st.binary(), st.booleans())),
)
def test_the_length_is_always_told_right(
    texts: list[tuple[str, str]], files: list[tuple[bytes, bool]]
) -> None:
    inputs = [
        an_input(base64.b64encode(file), "base64") if encoded else an_input(file)
        for file, encoded in files
    ]
    body = form(texts, [FormFile("image", one) for one in inputs])
    content = b"".join(body.chunks())
    assert len(content) == body.size_bytes
    for file, _ in files:
        assert b"\r\n\r\n" + file + b"\r\n--" in content


def test_gigabytes_of_references_need_no_memory(tmp_path: Path) -> None:
    # One file of 20 MB, told sixteen times: 320 MB go out.
    spool = SpoolFolder(tmp_path).open("raw")
    for _ in range(20):
        spool.append(bytes(1_000_000))
    reference = InputFile(spool, "image/png", 64, 32)
    tracemalloc.start()
    try:
        body = form([], [FormFile("image[]", reference)] * 16)
        assert sum(map(len, body.chunks())) == body.size_bytes > 320_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
        spool.close()


@given(content=st.binary(), cut=st.integers(1, 7))
def test_a_payload_reads_as_either(content: bytes, cut: int) -> None:
    text = base64.b64encode(content)
    raw = CutPayload(content, cut)
    encoded = CutPayload(text, cut, "base64")
    for payload in (raw, encoded):
        assert b"".join(raw_chunks(payload)) == content
        assert raw_length(payload) == len(content)
        assert b"".join(base64_chunks(payload)) == text
        assert base64_length(payload) == len(text)


class CutPayload(FakePayload):
    """Comes in small pieces."""

    def __init__(
        self, content: bytes, cut: int, encoding: Literal["raw", "base64"] = "raw"
    ) -> None:
        super().__init__(content, encoding)
        self.cut = cut

    def chunks(self) -> Iterator[bytes]:
        for at in range(0, len(self.content), self.cut):
            yield self.content[at : at + self.cut]


@pytest.mark.parametrize("text", [b"AAA", b"AA%A", b"AA==AAAA", b"AAAAA"])
def test_broken_base64_is_said(text: bytes) -> None:
    with pytest.raises(BrokenBase64Error):
        list(raw_chunks(FakePayload(text, "base64")))
