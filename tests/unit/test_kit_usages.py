"""Only a usage that can be true is believed, and a cached token counts once."""

from __future__ import annotations

import pytest

from providers.kit import usages
from providers.kit.contract import Usage


@pytest.mark.parametrize(
    ("reported", "usage"),
    [
        (None, None),
        ({}, None),
        ([1], None),
        ({"output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": 196}, Usage(13, 0, 0, 0, 196)),
        (
            {"input_tokens": 13, "output_tokens": 196, "total_tokens": 209},
            Usage(13, 0, 0, 0, 196),
        ),
        ({"input_tokens": 13, "output_tokens": 196, "total_tokens": 200}, None),
        ({"input_tokens": 13, "output_tokens": 0}, None),
        ({"input_tokens": -1, "output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": -196}, None),
        ({"input_tokens": 13.0, "output_tokens": 196}, None),
        ({"input_tokens": True, "output_tokens": 196}, None),
        ({"input_tokens": "13", "output_tokens": 196}, None),
        ({"input_tokens": 13, "output_tokens": 10**30}, None),
    ],
)
def test_totals_alone_are_text_in_and_image_out(
    reported: object, usage: Usage | None
) -> None:
    assert usages.read_usage(reported) == usage


@pytest.mark.parametrize(
    ("details", "usage"),
    [
        ({"text_tokens": 20, "image_tokens": 100}, Usage(20, 0, 100, 0, 196)),
        (
            {"text_tokens": 20, "image_tokens": 100, "cached_tokens": 50},
            Usage(0, 20, 70, 30, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_tokens": 65,
                "cached_tokens_details": {"text_tokens": 5, "image_tokens": 60},
            },
            Usage(15, 5, 40, 60, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_text_tokens": 5,
                "cached_image_tokens": 60,
            },
            Usage(15, 5, 40, 60, 196),
        ),
        (
            {
                "text_tokens": 20,
                "image_tokens": 100,
                "cached_tokens": 9,
                "cached_text_tokens": 5,
            },
            None,
        ),
        ({"text_tokens": 20, "image_tokens": 100, "cached_tokens": 121}, None),
        ({"text_tokens": 20, "image_tokens": 100, "cached_image_tokens": 101}, None),
        ({"text_tokens": 20, "image_tokens": 99}, None),
        ({"text_tokens": 20, "image_tokens": -100}, None),
        ("20", Usage(120, 0, 0, 0, 196)),
    ],
)
def test_a_cached_token_is_counted_once(details: object, usage: Usage | None) -> None:
    reported = {
        "input_tokens": 120,
        "output_tokens": 196,
        "input_tokens_details": details,
    }
    assert usages.read_usage(reported) == usage
