"""When two requests are one and the same."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.catalogue import Catalogue
from gateway.core.errors import InvalidRequestError
from gateway.core.idempotency import fingerprint, parse_key
from gateway.core.requests import parse_generation
from gateway.settings import load_settings

CATALOGUE = Catalogue(load_settings(None, {}, kinds=None).variants, {})


def print_of(digests: tuple[str, ...] = (), **fields: Any) -> str:
    return fingerprint(
        parse_generation({"prompt": "a fox", **fields}, CATALOGUE), digests
    )


@pytest.mark.parametrize(
    "same",
    [
        {"n": 1},
        {"quality": "medium", "size": "auto"},
        {"size": None},
        {"model": "gpt-image-2-2026-04-21"},
        {"unknown": 7},
    ],
)
def test_the_spelling_of_a_request_does_not_count(same: dict[str, Any]) -> None:
    assert print_of(**same) == print_of()


def test_sizes_that_are_the_same_pixels_are_the_same() -> None:
    assert print_of(size="16:9", resolution="1k") == print_of(size="1360X768")


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a fox."},
        {"n": 2},
        {"quality": "low"},
        {"size": "1:1"},
        {"model": "gpt-image-1.5"},
        {"background": "opaque"},
        {"output_format": "webp"},
        {"response_format": "url"},
        {"user": "u"},
        {"stream": True},
        {"image_urls": ["https://a.test/1"]},
        {"digests": ("abc",)},
    ],
)
def test_whatever_changes_the_answer_counts(other: dict[str, Any]) -> None:
    assert print_of(**other) != print_of()


def test_a_prompt_cannot_be_read_from_a_fingerprint() -> None:
    assert len(print_of()) == 64


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (None, None),
        ("abc-123", "abc-123"),
        (' "abc" ', "abc"),
        ('"', '"'),
        ("k" * 255, "k" * 255),
        ("with space", "with space"),
    ],
)
def test_keys_are_read_without_their_quotes(
    header: str | None, key: str | None
) -> None:
    assert parse_key(header) == key


@pytest.mark.parametrize("header", ["", "  ", '""', "k" * 256, "caf\xe9", "a\tb"])
def test_keys_that_are_none_are_refused(header: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_key(header)

    assert caught.value.param == "Idempotency-Key"
