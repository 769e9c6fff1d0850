"""Reads server-sent events whose data is JSON with pictures, while they arrive.

What a picture may weigh is the only limit on a line: its base64 goes into a spool, as
in ``kit.answers``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from providers.kit.answers import Answer, AnswerReader, UnreadableAnswerError
from providers.kit.spool import SpoolFolder

FRAME_MAX_BYTES = 96 * 1024 * 1024
STREAM_MAX_BYTES = 512 * 1024 * 1024
NAME_MAX_BYTES = 256

_LF, _CR = b"\n\r"
_BOM = b"\xef\xbb\xbf"
_END = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. Whoever gets it closes the answer; None is the ``[DONE]`` of some."""

    name: str
    answer: Answer | None


class EventReader:
    """Takes a stream in chunks of any size; ``finish`` ends it.

    Lines may end in CR, LF or both. Comments, fields that nobody knows and data that
    is no JSON object (keep-alives of relays) are passed over. ``close`` after a
    failure gives every spool back.
    """

    def __init__(self, spools: SpoolFolder) -> None:
        self._spools = spools
        self._read_bytes = 0
        self._after_cr = False
        self._line = _Line()
        self._name = ""
        self._frame: _Frame | None = None

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take the next bytes, and yield the events that end in them.

        Raises:
            UnreadableAnswerError: an event that cannot be read, or too much of all.
            OSError: a spool cannot be written.
        """
        self._read_bytes += len(chunk)
        if self._read_bytes > STREAM_MAX_BYTES:
            raise UnreadableAnswerError(f"a stream of more than {STREAM_MAX_BYTES}")
        start = 0
        for end in _line_ends(chunk):
            rest_of_crlf = self._after_cr and end == start and chunk[end] == _LF
            self._after_cr = chunk[end] == _CR
            if not rest_of_crlf:
                self._take(chunk[start:end])
                yield from self._end_line()
            start = end + 1
        if start < len(chunk):
            self._after_cr = False
            self._take(chunk[start:])

    def finish(self) -> Iterator[Event]:
        """Yield an event that is whole but for the blank line after it."""
        # Cut off in the middle, an event was none: that the stream ended says enough.
        with contextlib.suppress(UnreadableAnswerError):
            yield from self._end_line()
            yield from self._end_frame()

    def close(self) -> None:
        """Give all spools back."""
        if self._frame is not None:
            self._frame.close()
            self._frame = None

    def _take(self, text: bytes) -> None:
        data = self._line.take(text)
        if data and self._line.field == b"data":
            self._open_frame().take(data)

    def _end_line(self) -> Iterator[Event]:
        line, self._line = self._line, _Line()
        line.end()
        if line.is_blank:
            yield from self._end_frame()
        elif line.field == b"data":
            # The end of one line of data is a line feed, which JSON passes over.
            self._open_frame().take(b"\n")
        elif line.field == b"event":
            self._name = bytes(line.value).decode(errors="replace")

    def _open_frame(self) -> _Frame:
        if self._frame is None:
            self._frame = _Frame(self._spools)
        return self._frame

    def _end_frame(self) -> Iterator[Event]:
        name, self._name = self._name, ""
        frame, self._frame = self._frame, None
        if frame is None:
            return
        try:
            if frame.is_end:
                yield Event(name, None)
            elif frame.is_object:
                yield Event(name, frame.finish())
        finally:
            frame.close()


class _Line:
    """One line: first the name of its field, then its value."""

    def __init__(self) -> None:
        self.field: bytes | None = None
        self.value = bytearray()
        self._start = b""
        self._at_value_start = False

    @property
    def is_blank(self) -> bool:
        return not self._start and self.field == b""

    def take(self, text: bytes) -> bytes:
        """Take a piece; returns what belongs to the value."""
        if self.field is None:
            name, colon, text = text.partition(b":")
            # A name that is too long is no name that we know.
            self._start = (self._start + name)[: NAME_MAX_BYTES + 1]
            if not colon:
                return b""
            self.field = self._start.removeprefix(_BOM)
            # Says that this line is not blank, though it may have no name (comment).
            self._start = b":"
            self._at_value_start = True
        if self._at_value_start and text:
            self._at_value_start = False
            text = text.removeprefix(b" ")
        if self.field == b"event":
            self.value += text[: NAME_MAX_BYTES - len(self.value)]
        return text

    def end(self) -> None:
        if self.field is None:
            # A line without a colon is a field without a value.
            self.field = self._start.removeprefix(_BOM)
            self._start = self.field


class _Frame:
    """The data of one event."""

    def __init__(self, spools: SpoolFolder) -> None:
        self._reader = AnswerReader(spools)
        self._start = b""
        self._read_bytes = 0

    @property
    def is_object(self) -> bool:
        return self._start.startswith(b"{")

    @property
    def is_end(self) -> bool:
        return self._start.rstrip() == _END

    def take(self, data: bytes) -> None:
        self._read_bytes += len(data)
        if self._read_bytes > FRAME_MAX_BYTES:
            raise UnreadableAnswerError(f"an event of more than {FRAME_MAX_BYTES}")
        if len(self._start) <= len(_END):
            self._start = (self._start + data).lstrip()[: len(_END) + 1]
        if self.is_object:
            self._reader.feed(data)

    def finish(self) -> Answer:
        return self._reader.finish()

    def close(self) -> None:
        self._reader.close()


def _line_ends(chunk: bytes) -> Iterator[int]:
    feed, back = chunk.find(_LF), chunk.find(_CR)
    while feed >= 0 or back >= 0:
        if back < 0 or 0 <= feed < back:
            yield feed
            feed = chunk.find(_LF, feed + 1)
        else:
            yield back
            back = chunk.find(_CR, back + 1)
