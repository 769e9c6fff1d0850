"""Renders a task as the one object that OpenAI and EvoLink clients both accept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from gateway.core.money import decimal_text, usd_from_credits
from gateway.core.tasks import TaskState
from gateway.flows.tasks import Listed, Picture, TaskView
from gateway.ports import AttemptRecord, TaskRecord
from providers.kit.contract import MadeImage, Usage
from providers.kit.payloads import base64_chunks, base64_length

LinkTo = Callable[[Picture], str | None]


def number(nano: int) -> msgspec.Raw:
    """Write a whole number of 1e-9 as an exact JSON number."""
    return msgspec.Raw(decimal_text(nano).encode())


@dataclass(frozen=True, slots=True)
class Renderer:
    """Renders tasks; needs to know what a dollar is in credits."""

    nanocredits_per_usd: int

    def task(self, view: TaskView, link_to: LinkTo) -> dict[str, object]:
        """Render a task with links to its pictures, as ``GET /v1/tasks/{id}`` does."""
        body = self._head(view)
        if view.state is TaskState.COMPLETED:
            urls = [(p, link_to(p)) for p in view.pictures]
            body["data"] = [_item(p, {"url": url}) for p, url in urls if url]
            body["results"] = [url for _, url in urls if url]
        if view.error is not None:
            body["error"] = view.error
        return body

    def line(self, listed: Listed) -> dict[str, object]:
        """Render a task in a list."""
        line = listed.line
        took_ms = _took_ms(line.started_ms or line.created_ms, line.finished_ms)
        charged = line.charged_nanocredits
        return {
            "id": line.id,
            "model": line.variant,
            "type": "image",
            "status": line.state.value,
            "progress": listed.progress,
            "created_at": line.created_ms // 1000,
            "duration": None if took_ms is None else took_ms // 1000,
            "has_results": line.results > 0,
            "result_count": line.results,
            "has_error": line.has_error,
            "credits_used": None if charged is None else number(charged),
        }

    def inline(self, view: TaskView) -> InlineAnswer:
        """Render a completed task with its pictures inside, to be streamed out."""
        body = self._head(view) | {"results": []}
        head = msgspec.json.encode(body)[:-1] + b',"data":['
        return InlineAnswer(head, view.pictures)

    def admin(self, view: TaskView, link_to: LinkTo) -> dict[str, object]:
        """Render a task with its routing decision and attempts, for operators."""
        body = self.task(view, link_to)
        if view.record is not None:
            body["tenant_id"] = view.record.tenant_id
            body |= route_facts(view.record)
        return body

    def _head(self, view: TaskView) -> dict[str, object]:
        body: dict[str, object] = {
            "created": view.created_s,
            "id": view.id,
            "object": "image.generation.task",
            "type": "image",
            "model": view.variant,
            "status": view.state.value,
            "progress": view.progress,
            "task_info": {
                "can_cancel": view.can_cancel,
                "estimated_time": view.estimated_s,
            },
        }
        if view.facts is not None:
            body |= {
                "background": view.facts.background,
                "output_format": view.facts.output_format,
                "quality": view.facts.quality,
                "size": view.facts.size,
            }
        return body | {"usage": self._usage(view)}

    def _usage(self, view: TaskView) -> dict[str, object]:
        usage: dict[str, object] = {}
        if view.usage is not None:
            usage |= token_counts(view.usage)
            usage["estimated"] = view.usage_source == "estimated"
        usage |= {
            "billing_rule": "per_token",
            "credits_reserved": number(view.reserved_nanocredits),
            "user_group": "default",
        }
        if view.charged_nanocredits is not None:
            charged = view.charged_nanocredits
            usd = usd_from_credits(charged, self.nanocredits_per_usd)
            usage["credits_used"] = number(charged)
            usage["cost"] = {"credits": number(charged), "usd": number(usd)}
        return usage


def route_facts(record: TaskRecord) -> dict[str, object]:
    """Render the decision that a task was routed by, and its attempts."""
    route = record.route_json
    return {
        "route": None if route is None else msgspec.Raw(route.encode()),
        "attempts": [_attempt(attempt) for attempt in record.attempts],
    }


def token_counts(usage: Usage) -> dict[str, object]:
    """Render a usage in OpenAI's words; cached tokens are part of the input."""
    text = usage.text_input + usage.text_cached
    image = usage.image_input + usage.image_cached
    details = {"text_tokens": text, "image_tokens": image}
    if usage.text_cached or usage.image_cached:
        details["cached_tokens"] = usage.text_cached + usage.image_cached
        details["cached_text_tokens"] = usage.text_cached
        details["cached_image_tokens"] = usage.image_cached
    return {
        "total_tokens": text + image + usage.image_output,
        "input_tokens": text + image,
        "output_tokens": usage.image_output,
        "input_tokens_details": details,
        "output_tokens_details": {
            "image_tokens": usage.image_output,
            "text_tokens": 0,
        },
    }


@dataclass(frozen=True, slots=True)
class InlineAnswer:
    """A JSON answer whose pictures are read from their spools while it is sent.

    Base64 that an upstream sent goes out as it came in.
    """

    head: bytes
    pictures: tuple[Picture, ...]

    @property
    def length_bytes(self) -> int:
        """Length of the whole body."""
        between = 2 + len(self.pictures) - 1
        return len(self.head) + between + sum(map(_picture_bytes, self.pictures))

    def chunks(self) -> Iterator[bytes]:
        """Yield the body in parts."""
        yield self.head
        for place, picture in enumerate(self.pictures):
            before, after = _around(picture)
            yield (b"," if place else b"") + before
            yield from base64_chunks(_made(picture).payload)
            yield after
        yield b"]}"


def _picture_bytes(picture: Picture) -> int:
    before, after = _around(picture)
    return len(before) + base64_length(_made(picture).payload) + len(after)


def _around(picture: Picture) -> tuple[bytes, bytes]:
    rest = msgspec.json.encode(_item(picture, {}))[1:]
    return b'{"b64_json":"', b'"' + (b"," if len(rest) > 1 else b"") + rest


def _item(picture: Picture, content: dict[str, object]) -> dict[str, object]:
    if picture.revised_prompt is not None:
        content["revised_prompt"] = picture.revised_prompt
    return content


def _made(picture: Picture) -> MadeImage:
    assert picture.made is not None, picture
    return picture.made


def _attempt(attempt: AttemptRecord) -> dict[str, object]:
    return {
        "seq": attempt.seq,
        "offer": attempt.offer_id,
        "upstream": attempt.upstream,
        "state": attempt.state.value,
        "kind": attempt.kind,
        "upstream_status": attempt.upstream_status,
        "upstream_code": attempt.upstream_code,
        "detail": attempt.detail,
        "billed": attempt.billed,
        "estimate_usd": number(attempt.estimate_nanousd),
        "cost_usd": number(attempt.cost_nanousd),
        "job_id": attempt.job_id,
        "started_ms": attempt.started_ms,
        "duration_ms": _took_ms(attempt.started_ms, attempt.finished_ms),
    }


def _took_ms(started_ms: int, ended_ms: int | None) -> int | None:
    # The clock may have been set back in between.
    return None if ended_ms is None else max(0, ended_ms - started_ms)
