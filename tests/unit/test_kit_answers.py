"""The answer reader agrees with a JSON parser, wherever the chunks are cut."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from providers.kit.answers import (
    PAYLOADS_MAX,
    SKELETON_MAX_BYTES,
    Answer,
    AnswerReader,
    UnreadableAnswerError,
)
from providers.kit.spool import MEMORY_MAX_BYTES, SpoolFolder
from tests.simulators.pictures import png

FILE = png(64, 32)
TEXT = base64.b64encode(FILE).decode()
LARGE = base64.b64encode(png(64, 32, padding=90_000)).decode()
"""So long that reading its header does not decode it all."""


@pytest.fixture
def spools(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path)


def read(spools: SpoolFolder, body: bytes, cuts: Iterable[int] = ()) -> Answer:
    reader = AnswerReader(spools)
    edges = sorted({0, *cuts, len(body)})
    try:
        for start, end in pairwise(edges):
            reader.feed(body[start:end])
        return reader.finish()
    finally:
        reader.close()


def one(spools: SpoolFolder, text: str, key: str = "b64_json") -> str | bytes:
    """Read an answer whose picture is a JSON string; its file, or its fault.

    Read twice: in one piece and cut after every byte.
    """
    body = f'{{"data":[{{"{key}":"{text}"}}]}}'.encode()
    whole, cut = (
        file_or_fault(read(spools, body, cuts)) for cuts in ((), range(len(body)))
    )
    assert whole == cut
    return whole


def file_or_fault(answer: Answer) -> str | bytes:
    if answer.faults:
        return answer.faults[0]
    (picture,) = answer.pictures.values()
    text = b"".join(picture.spool.chunks())
    answer.close()
    return base64.b64decode(text, validate=True)


def test_a_picture_goes_into_a_spool_and_leaves_a_mark(spools: SpoolFolder) -> None:
    body = {"created": 1, "data": [{"b64_json": TEXT, "revised_prompt": 'a "b"'}]}
    answer = read(spools, json.dumps(body).encode())

    assert answer.body == {
        "created": 1,
        "data": [{"b64_json": "0", "revised_prompt": 'a "b"'}],
    }
    picture = answer.take("0")
    assert picture is not None
    assert b"".join(picture.spool.chunks()) == TEXT.encode()
    assert picture.spool.encoding == "base64"
    assert (picture.header.width_px, picture.header.height_px) == (64, 32)
    assert answer.take("0") is None
    picture.spool.close()


def test_an_amount_keeps_its_digits(spools: SpoolFolder) -> None:
    answer = read(spools, b'{"cost": 0.12345678901234567890, "n": 1}')
    assert answer.body == {"cost": Decimal("0.12345678901234567890"), "n": 1}


def test_a_number_beyond_all_bounds_is_unreadable(spools: SpoolFolder) -> None:
    with pytest.raises(UnreadableAnswerError):
        read(spools, b'{"cost": 1e99999999999999999999}')


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace("/", r"\/"),
        TEXT.replace("=", r"\u003d").replace("+", r"\u002B"),
        TEXT[:76] + r"\r\n" + TEXT[76:] + r"\n",
        f"data:image/png;base64,{TEXT}",
        f"data:image\\/png;base64,{TEXT}",
    ],
)
def test_the_spellings_of_relays_all_give_the_same_file(
    spools: SpoolFolder, text: str
) -> None:
    assert one(spools, text) == FILE


def test_a_data_uri_is_a_picture_under_url_too(spools: SpoolFolder) -> None:
    assert one(spools, f"data:image/png;base64,{TEXT}", key="url") == FILE


def test_an_ordinary_url_stays_in_the_answer(spools: SpoolFolder) -> None:
    body = {"data": [{"url": "https://x.test/1.png"}, {"url": "dat"}, {"url": ""}]}
    answer = read(spools, json.dumps(body).encode())
    assert answer.body == body
    assert not answer.pictures


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT[:-3],
        TEXT[:40] + "!" + TEXT[41:],
        TEXT[:40] + "=" + TEXT[41:],
        TEXT + "====",
        TEXT[:40] + "é" * 2 + TEXT[44:],
        TEXT[:40] + r"\"" + TEXT[41:],
        TEXT[:40] + r"\\/" + TEXT[41:],
        TEXT[:40] + r"\u00e9" + TEXT[41:],
        LARGE[:100_000] + "=" + LARGE[100_001:],
        LARGE[:100_000] + r"\\/" + LARGE[100_001:],
        base64.b64encode(b"I cannot draw that").decode(),
        f"data:image/png,{TEXT}",
        "data:image/png;base64",
        "data:" + "x" * 400,
    ],
    ids=lambda text: text[-60:],
)
def test_a_bad_picture_is_a_fault_and_leaves_no_file(
    spools: SpoolFolder, text: str
) -> None:
    found = one(spools, text)
    assert isinstance(found, str)
    assert not list(spools.path.iterdir())


def test_a_bad_picture_does_not_take_a_good_one_along(spools: SpoolFolder) -> None:
    body = {"data": [{"b64_json": "%%%%" * 9}, {"b64_json": TEXT}, {"b64_json": "x"}]}
    answer = read(spools, json.dumps(body).encode())
    assert list(answer.pictures) == ["1"]
    assert len(answer.faults) == 2
    answer.close()


def test_a_picture_over_the_limit_is_a_fault(spools: SpoolFolder) -> None:
    body = json.dumps({"data": [{"b64_json": "A" * 1000}]}).encode()
    reader = AnswerReader(spools, payload_max_bytes=999)
    reader.feed(body)
    assert "999" in reader.finish().faults[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>502</body></html>",
        b'{"data":[{"b64_json":"' + TEXT.encode(),
        b'{"data":[{"b64_json":"' + TEXT.encode() + b'"}]',
        b'{"data":[{"b64_json":"' + TEXT.encode() + b"\\",
        b'{"a":"\\u12',
        b'{"a":"\\u12zz"}',
        b'{"a":"\xff"}',
        b"[" * 100_000,
        b'{"a":NaN}',
        b'["b64_json":"x"]',
    ],
)
def test_what_is_cut_off_or_not_json_is_unreadable_and_leaves_no_file(
    spools: SpoolFolder, body: bytes
) -> None:
    with pytest.raises(UnreadableAnswerError):
        read(spools, body)
    assert not list(spools.path.iterdir())


def test_all_that_can_grow_is_bounded(spools: SpoolFolder) -> None:
    with pytest.raises(UnreadableAnswerError, match="beside the pictures"):
        read(spools, b'{"a":"' + bytes(SKELETON_MAX_BYTES) + b'"}')
    many = json.dumps([{"b64_json": TEXT}] * (PAYLOADS_MAX + 1)).encode()
    with pytest.raises(UnreadableAnswerError, match="pictures"):
        read(spools, many)


def test_a_large_picture_is_never_in_memory_whole(spools: SpoolFolder) -> None:
    text = base64.b64encode(png(64, 32, padding=6 * 1024 * 1024))
    body = b'{"data":[{"b64_json":"' + text + b'"}]}'
    reader = AnswerReader(spools)
    tracemalloc.start()
    for at in range(0, len(body), 16 * 1024):
        reader.feed(body[at : at + 16 * 1024])
    answer = reader.finish()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    picture = answer.take("0")
    assert picture is not None
    assert picture.spool.size_bytes == len(text)
    assert peak_bytes < 4 * MEMORY_MAX_BYTES
    picture.spool.close()


# --- any JSON, any chunks ---

NAMES = st.sampled_from(["b64_json", "url", "data", "usage", 'b64"json', "b64_json\\"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=30)
    | st.sampled_from([TEXT, f"data:image/png;base64,{TEXT}", "b64_json", ":", "dat"])
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=600, suppress_health_check=list(HealthCheck), deadline=None)
@given(
    document=DOCUMENTS,
    cuts=st.lists(st.integers(0, 2000), max_size=12),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_any_answer_in_any_chunks_equals_what_a_json_parser_reads(
    tmp_path: Path,
    document: Any,
    cuts: list[int],
    indent: int | None,
    ascii_only: bool,
) -> None:
    try:
        body = json.dumps(document, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    answer = read(SpoolFolder(tmp_path), body, tuple(c for c in cuts if c < len(body)))
    try:
        assert list(differences(answer, answer.body, json.loads(body))) == []
        assert not list(tmp_path.iterdir())
    finally:
        answer.close()


def differences(answer: Answer, found: Any, meant: Any, key: str = "") -> Iterator[Any]:
    """Compare, putting the spooled text back in place of its mark."""
    if isinstance(meant, dict):
        assert found.keys() == meant.keys()
        for name in meant:
            yield from differences(answer, found[name], meant[name], name)
    elif isinstance(meant, list):
        for left, right in zip(found, meant, strict=True):
            yield from differences(answer, left, right)
    elif found != meant:
        picture = answer.pictures.get(found)
        is_picture = isinstance(meant, str) and (
            key == "b64_json" or meant.startswith("data:")
        )
        good = meant in {TEXT, f"data:image/png;base64,{TEXT}"}
        if not is_picture or good is (picture is None):
            yield key, found, meant
        elif picture is not None and b"".join(picture.spool.chunks()) != TEXT.encode():
            yield key, "spooled otherwise", meant
