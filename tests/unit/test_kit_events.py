"""The event reader agrees with the standard, wherever the chunks are cut."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections import deque
from collections.abc import Iterable
from itertools import chain, pairwise, repeat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from providers.kit import events
from providers.kit.answers import UnreadableAnswerError
from providers.kit.events import EventReader
from providers.kit.spool import SpoolFolder
from tests.simulators.pictures import png

TEXT = base64.b64encode(png(64, 32)).decode()


@pytest.fixture
def spools(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path)


def read(
    spools: SpoolFolder, stream: bytes, cuts: Iterable[int] = ()
) -> list[tuple[str, object]]:
    """Read a stream: name and body of each event; its pictures are checked."""
    reader = EventReader(spools)
    found: list[tuple[str, object]] = []
    try:
        for start, end in pairwise(sorted({0, *cuts, len(stream)})):
            found += map(seen, reader.feed(stream[start:end]))
        found += map(seen, reader.finish())
    finally:
        reader.close()
    assert not list(spools.path.iterdir())
    return found


def seen(event: events.Event) -> tuple[str, object]:
    if event.answer is None:
        return event.name, None
    for picture in event.answer.pictures.values():
        assert b"".join(picture.spool.chunks()) == TEXT.encode()
    event.answer.close()
    return event.name, event.answer.body


def both_ways(spools: SpoolFolder, stream: bytes) -> list[tuple[str, object]]:
    whole = read(spools, stream)
    assert read(spools, stream, range(len(stream))) == whole
    return whole


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (b'event: a\ndata: {"x":1}\n\n', [("a", {"x": 1})]),
        (b'event:a\ndata:{"x":1}\n\n', [("a", {"x": 1})]),
        (b'event: a\r\ndata: {"x":1}\r\n\r\n', [("a", {"x": 1})]),
        (b'event: a\rdata: {"x":1}\r\r', [("a", {"x": 1})]),
        (b'data: {"x":\ndata: 1}\n\n', [("", {"x": 1})]),
        (b'data: {"x":\r\ndata:\r\ndata: 1}\r\n\r\n', [("", {"x": 1})]),
        (b'data:  {"x":1}\n\n', [("", {"x": 1})]),
        (b'\xef\xbb\xbfdata: {"x":1}\n\n', [("", {"x": 1})]),
        (b': hi\n\n\n:\nid: 1\nretry: 5\nfoo\ndata: {"x":1}\n\n', [("", {"x": 1})]),
        (b'data: {"x":1}\nevent: late\n\n', [("late", {"x": 1})]),
        (b'event: a\n\ndata: {"x":1}\n\n', [("", {"x": 1})]),
        (b'data: {"x":1}\n\ndata: {"x":2}\n\n', [("", {"x": 1}), ("", {"x": 2})]),
        (b"data: [DONE]\n\n", [("", None)]),
        (b"data:[DONE]", [("", None)]),
        (b'data: {"x":1}', [("", {"x": 1})]),
        (b'data: {"x":1}\n', [("", {"x": 1})]),
        (b'data: {"x":1', []),
        (b"data: ping\n\ndata\n\ndata:\n\ndata: [1]\n\n", []),
        (b"<html>: 502</html>\n\n", []),
        (b"", []),
    ],
)
def test_the_spellings_of_servers_mean_the_same(
    spools: SpoolFolder, stream: bytes, found: list[tuple[str, object]]
) -> None:
    assert both_ways(spools, stream) == found


def test_a_picture_goes_into_a_spool_wherever_it_is_cut(spools: SpoolFolder) -> None:
    stream = f'event: a\r\ndata: {{"b64_json":"{TEXT}"}}\r\n\r\n'.encode()
    assert both_ways(spools, stream) == [("a", {"b64_json": "0"})]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    bodies=st.lists(
        st.dictionaries(st.text(max_size=5), st.text() | st.integers(), max_size=3),
        max_size=4,
    ),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400)),
)
def test_any_bodies_come_out_as_they_went_in(
    spools: SpoolFolder,
    bodies: list[dict[str, str | int]],
    line_end: str,
    cuts: list[int],
) -> None:
    # These two names are read as pictures.
    bodies = [body for body in bodies if not {"b64_json", "url"} & set(body)]
    stream = "".join(
        f"event: e{line_end}data: {json.dumps(body)}{line_end}{line_end}"
        for body in bodies
    ).encode()
    inside = [cut for cut in cuts if cut < len(stream)]
    assert read(spools, stream, inside) == [("e", body) for body in bodies]


@pytest.mark.parametrize(
    "stream", [b'data: {"x":}\n\n', b'data: {"x":"\n\n', b"data: {\xff}\n\n"]
)
def test_an_object_that_cannot_be_read_is_said(
    spools: SpoolFolder, stream: bytes
) -> None:
    with pytest.raises(UnreadableAnswerError):
        read(spools, stream)
    assert not list(spools.path.iterdir())


@pytest.mark.parametrize(
    "line", [b"data: {", b"event: ", b": ", b"nobody knows: ", b"x"]
)
def test_an_endless_line_ends_at_a_limit_and_fills_no_memory(
    spools: SpoolFolder, line: bytes
) -> None:
    reader = EventReader(spools)
    chunk = b"y" * 1024 * 1024
    list(reader.feed(line))
    tracemalloc.start()
    try:
        pieces = repeat(chunk, events.STREAM_MAX_BYTES // len(chunk) + 1)
        with pytest.raises(UnreadableAnswerError):
            deque(chain.from_iterable(map(reader.feed, pieces)), maxlen=0)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(chunk)
    finally:
        tracemalloc.stop()
        reader.close()


def test_a_large_frame_is_never_whole_in_memory(spools: SpoolFolder) -> None:
    text = base64.b64encode(png(64, 32, padding=7_500_000))
    reader = EventReader(spools)
    tracemalloc.start()
    try:
        list(reader.feed(b'data: {"b64_json":"'))
        for at in range(0, len(text), 16 * 1024):
            list(reader.feed(text[at : at + 16 * 1024]))
        (event,) = reader.feed(b'"}\n\n')
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert event.answer is not None
    picture = event.answer.take("0")
    assert picture is not None
    assert picture.spool.size_bytes == len(text) > 10_000_000
    picture.spool.close()
