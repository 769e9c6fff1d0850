"""Writes forms with files (multipart/form-data), never whole in memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from providers.kit.contract import InputFile
from providers.kit.payloads import raw_chunks, raw_length
from providers.kit.wire import Body

_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file of a form, under the name of its field."""

    field: str
    file: InputFile


def form(texts: Sequence[tuple[str, str]], files: Sequence[FormFile]) -> Body:
    """Build a form whose length is known and which can be sent any number of times.

    Field names are ours; values may be anything.

    Raises:
        OSError: a file cannot be read.
        UnicodeEncodeError: a value cannot be written as UTF-8.
    """
    # Chosen anew: nobody can write a prompt that ends its own field.
    boundary = secrets.token_hex(16)
    start = b"".join(
        _head(boundary, f'name="{name}"') + value.encode() + b"\r\n"
        for name, value in texts
    )
    heads = [
        _head(boundary, *_describe(index, one))
        for index, one in enumerate(files, start=1)
    ]
    end = f"--{boundary}--\r\n".encode()
    size_bytes = len(start) + len(end)
    for head, one in zip(heads, files, strict=True):
        size_bytes += len(head) + raw_length(one.file.payload) + len(b"\r\n")

    def chunks() -> Iterator[bytes]:
        yield start
        for head, one in zip(heads, files, strict=True):
            yield head
            yield from raw_chunks(one.file.payload)
            yield b"\r\n"
        yield end

    return Body(f"multipart/form-data; boundary={boundary}", size_bytes, chunks)


def _head(boundary: str, disposition: str, *lines: str) -> bytes:
    content = f"Content-Disposition: form-data; {disposition}"
    return "\r\n".join([f"--{boundary}", content, *lines, "", ""]).encode()


def _describe(index: int, one: FormFile) -> tuple[str, str]:
    kind = one.file.media_type
    name = f"{one.field.removesuffix('[]')}-{index}.{_EXTENSIONS.get(kind, 'bin')}"
    return f'name="{one.field}"; filename="{name}"', f"Content-Type: {kind}"
