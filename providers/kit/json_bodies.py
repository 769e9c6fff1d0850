"""Writes JSON with pictures in it as data URIs, never whole in memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping

import msgspec

from providers.kit.contract import InputFile
from providers.kit.payloads import base64_chunks, base64_length
from providers.kit.wire import Body, unreadable_file, unwritable


def json_body(fields: Mapping[str, object]) -> Body:
    """Build a body in which every ``InputFile``, at any depth, is a data URI.

    Its length is known and it can be sent any number of times.

    Raises:
        ProviderError: a text cannot be written as UTF-8, or a file cannot be read.
    """
    # Chosen anew: nobody can write a prompt that stands for a file.
    mark = secrets.token_hex(16)
    files: list[InputFile] = []
    try:
        texts = msgspec.json.encode(_marked(fields, mark, files)).split(mark.encode())
        size_bytes = sum(map(len, texts))
        size_bytes += sum(base64_length(file.payload) for file in files)
    except UnicodeEncodeError as error:
        raise unwritable() from error
    except OSError as error:
        raise unreadable_file(error) from error

    def chunks() -> Iterator[bytes]:
        yield texts[0]
        for file, text in zip(files, texts[1:], strict=True):
            yield from base64_chunks(file.payload)
            yield text

    return Body("application/json", size_bytes, chunks)


def _marked(value: object, mark: str, files: list[InputFile]) -> object:
    if isinstance(value, InputFile):
        files.append(value)
        return f"data:{value.media_type};base64,{mark}"
    if isinstance(value, Mapping):
        return {name: _marked(one, mark, files) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(one, mark, files) for one in value]
    return value
