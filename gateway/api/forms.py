"""Reads ``multipart/form-data``: text into memory, files into spools, all bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

from litestar.types import Receive
from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)

from gateway.api.http import consume
from gateway.core.errors import InvalidRequestError, TooLargeError
from gateway.ports import Spools, WritableSpool

TEXT_MAX_BYTES = 1024 * 1024
"""All text fields together; a prompt has at most 128,000 bytes."""
PARTS_MAX = 64
FORM_MAX_S = 600.0
"""Time for a whole form to arrive: 16 files of 50 MB at 11 Mbit/s."""


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file of a form. ``name`` is the field that it came in."""

    name: str
    filename: str
    spool: WritableSpool


@dataclass(slots=True)
class Form:
    """A form that arrived whole; whoever has it closes it."""

    texts: dict[str, str] = field(default_factory=dict)
    files: list[FormFile] = field(default_factory=list)

    def close(self) -> None:
        """Give the spools back."""
        for file in self.files:
            file.spool.close()


@dataclass(frozen=True, slots=True)
class FormLimits:
    """What a form may bring; ``file_max_bytes`` is for each file."""

    files: int
    file_max_bytes: int


@dataclass(slots=True)
class _Part:
    name: str
    text: bytearray | None = None
    spool: WritableSpool | None = None


@dataclass(slots=True)
class _Reader:
    spools: Spools
    limits: FormLimits
    form: Form = field(default_factory=Form)
    part: _Part | None = None
    text_bytes: int = 0

    def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        else:
            self._add(bytes(event))

    def _begin(self, segment: MultipartSegment) -> None:
        if segment.filename is None:
            self.part = _Part(segment.name, text=bytearray())
            return
        if not segment.filename:  # a file field of a browser's form, left empty
            self.part = _Part(segment.name)
            return
        if len(self.form.files) >= self.limits.files:
            raise InvalidRequestError(
                f"A request may bring at most {self.limits.files} files.",
                param=_short(segment.name),
                code="too_many_files",
            )
        spool = self.spools.open("raw", limit_bytes=self.limits.file_max_bytes + 1)
        self.form.files.append(FormFile(segment.name, segment.filename, spool))
        self.part = _Part(segment.name, spool=spool)

    def _add(self, data: bytes) -> None:
        assert self.part is not None
        if self.part.text is not None:
            self.text_bytes += len(data)
            if self.text_bytes > TEXT_MAX_BYTES:
                raise TooLargeError(
                    f"The text fields may have {TEXT_MAX_BYTES:,} bytes together."
                )
            self.part.text += data
        elif self.part.spool is not None:
            if self.part.spool.size_bytes + len(data) > self.limits.file_max_bytes:
                raise TooLargeError(
                    f"Each file may have at most {self.limits.file_max_bytes:,} bytes.",
                    param=_short(self.part.name),
                    code="image_too_large",
                )
            self.part.spool.append(data)

    def _end(self) -> None:
        assert self.part is not None
        name = self.part.name
        if self.part.text is not None:
            try:
                self.form.texts[name] = self.part.text.decode()
            except UnicodeDecodeError as error:
                raise InvalidRequestError(
                    f"{_short(name)} must be UTF-8 text.", param=_short(name)
                ) from error
        self.part = None


def boundary_of(content_type: str | None) -> str | None:
    """Tell the boundary if a content type is that of a form, else None."""
    kind, options = parse_options_header(content_type or "")
    return options.get("boundary", "") if kind == "multipart/form-data" else None


async def read_form(
    receive: Receive, boundary: str, spools: Spools, limits: FormLimits
) -> Form:
    """Read a form to its end.

    Raises:
        InvalidRequestError: it is not a form, is cut off, or has too many files.
        TooLargeError: a file or the text is over its limit.
    """
    reader = _Reader(spools, limits)
    with _understood():
        parser = PushMultipartParser(
            boundary, max_segment_count=PARTS_MAX, max_segment_size=inf
        )

    def take(chunk: bytes) -> None:
        if not chunk:
            return
        with _understood():
            for event in parser.parse(chunk):
                reader.take(event)

    try:
        await consume(receive, take, max_s=FORM_MAX_S)
        with _understood():
            parser.close()
    except BaseException:
        reader.form.close()
        raise
    return reader.form


@contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except ParserLimitReached as error:
        raise InvalidRequestError(
            f"The form may have at most {PARTS_MAX} parts with short headers.",
            code="invalid_multipart",
        ) from error
    except (MultipartError, ValueError, LookupError) as error:
        raise InvalidRequestError(
            "The body is not a whole multipart form. Let your client's library build "
            "it, and set no Content-Type of your own.",
            code="invalid_multipart",
        ) from error


def _short(name: str) -> str:
    return name[:64]
