"""Valid objects with one line; a test names only the fields that it is about."""

from __future__ import annotations

from typing import Any

from providers.kit.contract import Account, ImageJob, Operation, Usage


def a_job(**changes: Any) -> ImageJob:
    fields: dict[str, Any] = {
        "task_id": "task-unified-1-abcdefgh",
        "model": "gpt-image-2",
        "operation": Operation.GENERATE,
        "prompt": "A beautiful colorful sunset over the ocean",
        "width_px": 64,
        "height_px": 32,
        "quality": "low",
        "n": 1,
        "output_format": "png",
        "expected": Usage(text_input=13, image_output=62),
        "deadline_s": 5.0,
    }
    return ImageJob(**(fields | changes))


def an_account(**changes: Any) -> Account:
    fields: dict[str, Any] = {
        "name": "upstream",
        "base_url": "http://upstream.test/v1",
        "secret": "sk-test-s3cret-of-the-account",
    }
    return Account(**(fields | changes))
