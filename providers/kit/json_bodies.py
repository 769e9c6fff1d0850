"""Writes JSON with pictures in it (data URIs), never whole in memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping

import msgspec

from providers.kit.contract import InputFile
from providers.kit.payloads import base64_chunks, base64_length
from providers.kit.wire import Body


def json_body(fields: Mapping[str, object]) -> Body:
    """Build a body in which every ``InputFile``, at any depth, is a data URI.

    Its length is known and it can be sent any number of times.

    Raises:
        UnicodeEncodeError: a text cannot be written as UTF-8.
    """
    files: list[InputFile] = []
    # Chosen anew: nobody can write a prompt that stands for a file.
    mark = secrets.token_hex(16)

    def marked(value: object) -> object:
        if isinstance(value, InputFile):
            files.append(value)
            return mark
        if isinstance(value, Mapping):
            return {name: marked(one) for name, one in value.items()}
        return [marked(one) for one in value] if isinstance(value, list) else value

    start, *texts = msgspec.json.encode(marked(fields)).split(mark.encode())
    heads = [f"data:{one.media_type};base64,".encode() for one in files]
    size_bytes = len(start)
    for head, one, text in zip(heads, files, texts, strict=True):
        size_bytes += len(head) + base64_length(one.payload) + len(text)

    def chunks() -> Iterator[bytes]:
        yield start
        for head, one, text in zip(heads, files, texts, strict=True):
            yield head
            yield from base64_chunks(one.payload)
            yield text

    return Body("application/json", size_bytes, chunks)
