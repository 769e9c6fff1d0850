"""A pretend api.openai.com on loopback: the images API, its refusals, and its faults.

It is an independent witness: it shares no code with the gateway, counts tokens by its
own reading of the published formula, and keeps a log of every picture that was bought.

By hand: ``python -m tests.simulators.openai_server --port 9001``; then faults can be
scripted with ``POST /_script`` (a JSON list of ``Fault`` fields) and purchases read
with ``GET /_purchases``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tests.simulators.pictures import big_picture, output_tokens, patches, picture, png
from tests.simulators.server import (
    Fault,
    Part,
    Reply,
    Seen,
    Simulator,
    deliver,
    deliver_events,
    opened,
    run_by_hand,
    scripted,
    send,
)

KEY = "sk-simulated-key-0123456789"
MODELS = {
    "gpt-image-2": {"low": 16, "medium": 48, "high": 96},
    "gpt-image-2.5-flare": {
        "low": 16,
        "medium": 24,
        "high": 48,
        "xhigh": 64,
        "max": 96,
    },
    # Takes response_format, as relays and older models do.
    "relay-image": {"low": 16, "medium": 48, "high": 96},
}
FIELDS = {
    "model",
    "prompt",
    "n",
    "size",
    "quality",
    "background",
    "output_format",
    "output_compression",
    "moderation",
    "user",
    "safety_identifier",
    "stream",
    "partial_images",
}
EDIT_FIELDS = FIELDS | {"input_fidelity"}
NUMBERS = {"n", "output_compression", "partial_images"}
IMAGES_MAX = 16
PARTIAL_TOKENS = 100
NO_EVENTS = {"plain", "html", "error", "gzip"}
OPERATIONS = {"/v1/images/generations": "generate", "/v1/images/edits": "edit"}
PROMPT_MAX_CHARS = 32_000


@dataclass(frozen=True)
class Purchase:
    """Pictures that the account would be billed for.

    ``references`` and ``mask`` are the SHA-256 of the files that arrived.
    """

    model: str
    size: str
    quality: str
    n: int
    usage: Mapping[str, Any]
    operation: str = "generate"
    references: tuple[str, ...] = ()
    mask: str | None = None
    stream: bool = False
    prompt: str = field(default="", compare=False)


def fields_of(seen: Seen) -> dict[str, Any]:
    """Read the fields of either kind of body, typed as in JSON."""
    if OPERATIONS[seen.path] == "generate":
        fields: dict[str, Any] = seen.json()
        return fields
    return {
        part.name: typed(part.name, part.head.decode())
        for part in seen.form
        if part.filename is None
    }


def typed(name: str, text: str) -> Any:
    if name == "stream":
        return {"true": True, "false": False}.get(text, text)
    return int(text) if name in NUMBERS and text.isdecimal() else text


@dataclass
class OpenAISimulator(Simulator):
    """A running simulator, as tests see it.

    ``lists_to_anybody`` is a relay that tells its models without a key.
    """

    key: str = KEY
    lists_to_anybody: bool = False

    prefix = "/v1"

    def bill_usd(self, purchase: Purchase) -> Decimal:
        told = purchase.usage["input_tokens_details"]
        micros = told["text_tokens"] * 5 + told["image_tokens"] * 8
        micros += purchase.usage["output_tokens"] * 30
        return Decimal(micros * self.percent) / 10**8

    def sells_at(self, path: str) -> bool:
        return path in OPERATIONS

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.method == "GET" and seen.path == "/pictures/1.png":
            return await send(writer, Reply(200, png(64, 32), "image/png"))
        self.requests.append(seen)
        if seen.method == "GET" and seen.path == "/v1/models":
            refused = None if self.lists_to_anybody else check_key(seen, self.key)
            return await self.tell(refused, listing(MODELS), writer)
        if seen.path not in OPERATIONS or seen.method != "POST":
            return await send(writer, error(404, "Unknown URL.", code=None))
        fault = self.fault()
        refused = check(seen, self.key)
        if refused is not None:
            return await send(writer, refused)
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await send(writer, scripted(fault))
        return await self.sell(seen, fault, writer)

    async def sell(
        self, seen: Seen, fault: Fault, writer: asyncio.StreamWriter
    ) -> bool:
        body = fields_of(seen)
        asked = asked_for(body)
        usage = usage_of(body["model"], asked, body["prompt"], seen.images)
        self.purchases.append(
            Purchase(
                body["model"],
                asked.size,
                asked.quality,
                asked.n,
                usage,
                operation=OPERATIONS[seen.path],
                references=tuple(part.sha256 for part in seen.images),
                mask=seen.mask.sha256 if seen.mask else None,
                stream=asked.partials is not None,
                prompt=body["prompt"],
            )
        )
        answer = answer_of(asked, usage)
        await asyncio.sleep(fault.delay_s or self.latency_s)
        if asked.partials is None or fault.answer in NO_EVENTS:
            return await deliver(writer, spoil(answer, fault, self), fault)
        kind = "image_edit" if seen.images else "image_generation"
        return await deliver_events(
            writer, events_of(kind, asked, answer, fault, self), fault
        )


# --- what was asked, and what is wrong with it ---


@dataclass(frozen=True)
class Asked:
    """A request with its gaps filled in as the model would."""

    width: int
    height: int
    quality: str
    n: int
    format: str
    background: str
    partials: int | None
    """None: no stream was asked for."""

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def asked_for(body: dict[str, Any]) -> Asked:
    size = body.get("size", "auto")
    width, height = (1024, 1024) if size == "auto" else map(int, size.split("x"))
    quality = body.get("quality", "auto")
    background = body.get("background", "auto")
    return Asked(
        width,
        height,
        "medium" if quality == "auto" else quality,
        body.get("n", 1),
        body.get("output_format", "png"),
        "opaque" if background == "auto" else background,
        body.get("partial_images", 0) if body.get("stream") else None,
    )


def check_key(seen: Seen, key: str) -> Reply | None:
    if seen.headers.get("authorization") == f"Bearer {key}":
        return None
    told = seen.headers.get("authorization", "nothing").removeprefix("Bearer ")
    return error(401, f"Incorrect API key provided: {told}.", code="invalid_api_key")


def listing(models: Iterable[str]) -> dict[str, Any]:
    """List models as ``GET /models`` does."""
    data = [{"id": name, "object": "model", "owned_by": "system"} for name in models]
    return {"object": "list", "data": data}


def check(seen: Seen, key: str) -> Reply | None:
    unknown = check_key(seen, key)
    if unknown is not None:
        return unknown
    try:
        body = fields_of(seen)
    except ValueError:
        return error(400, "We could not parse the JSON body of your request.")
    edit = OPERATIONS[seen.path] == "edit"
    return (
        check_names(body, EDIT_FIELDS if edit else FIELDS)
        or check_values(body)
        or (check_files(seen) if edit else None)
        or check_prompt(body)
    )


def check_names(body: dict[str, Any], fields: set[str]) -> Reply | None:
    model = body.get("model")
    if model not in MODELS:
        return error(
            404, f"The model '{model}' does not exist.", code="model_not_found"
        )
    known = fields | (set() if model.startswith("gpt-image-") else {"response_format"})
    if model.startswith("gpt-image-2") and "input_fidelity" in body:
        return error(
            400,
            f"The model '{model}' does not take 'input_fidelity'.",
            code="invalid_input_fidelity_model",
            param="input_fidelity",
        )
    for name in body:
        if name not in known:
            return error(
                400,
                f"Unknown parameter: '{name}'.",
                code="unknown_parameter",
                param=name,
            )
    return None


def check_values(body: dict[str, Any]) -> Reply | None:
    rules = {
        "size": is_size(body.get("size", "auto")),
        "quality": body.get("quality", "auto") in {"auto", *MODELS[body["model"]]},
        "n": type(body.get("n", 1)) is int and 1 <= body.get("n", 1) <= 10,
        "output_format": body.get("output_format", "png") in {"png", "jpeg", "webp"},
        "output_compression": body.get("output_format") in {"jpeg", "webp"}
        or "output_compression" not in body,
        "moderation": body.get("moderation", "auto") in {"auto", "low"},
        "stream": type(body.get("stream", False)) is bool,
        "partial_images": type(body.get("partial_images", 0)) is int
        and 0 <= body.get("partial_images", 0) <= (3 if body.get("stream") else 0),
        "background": body.get("background", "auto") in {"auto", "opaque"}
        or (body["background"] == "transparent" and body["output_format"] != "jpeg"),
    }
    for name, right in rules.items():
        if not right:
            return error(
                400, f"Invalid value for '{name}'.", code="invalid_value", param=name
            )
    return None


def is_size(size: Any) -> bool:
    # Smaller pictures than OpenAI's are allowed, and keep the tests fast.
    return size == "auto" or bool(
        isinstance(size, str) and re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", size)
    )


def check_files(seen: Seen) -> Reply | None:
    names = [part.name for part in seen.images]
    several = names == ["image[]"] * len(names) and 1 <= len(names) <= IMAGES_MAX
    masks = [part for part in seen.form if part.name == "mask"]
    if not (several or names == ["image"]) or len(masks) > 1:
        return error(400, f"Wrong files: {names}.", code="invalid_value", param="image")
    for part in (*seen.images, *masks):
        if opened(part) is None:
            return error(
                400,
                f"Invalid image file: {part.filename}.",
                code="invalid_image_file",
                param=part.name,
            )
    if masks and not fits(masks[0], seen.images[0]):
        return error(
            400,
            "The mask must be a PNG with alpha of the same size as the first image.",
            code="invalid_value",
            param="mask",
        )
    return None


def fits(mask: Part, first: Part) -> bool:
    told, image = opened(mask), opened(first)
    assert told is not None
    assert image is not None
    alpha = "A" in told.mode or "transparency" in told.info
    return told.format == "PNG" and alpha and told.size == image.size


def check_prompt(body: dict[str, Any]) -> Reply | None:
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        return error(
            400,
            "Missing required parameter: 'prompt'.",
            code="missing_required_parameter",
            param="prompt",
        )
    if len(prompt) > PROMPT_MAX_CHARS:
        return error(
            400, "Prompt is too long.", code="string_above_max_length", param="prompt"
        )
    if "[moderate]" in prompt:
        return moderated("input")
    if "[moderate-output]" in prompt:
        return moderated("output")
    return None


def moderated(stage: str) -> Reply:
    return Reply.of_json(
        400,
        {
            "error": {
                "message": "Your request was rejected by the safety system. "
                "safety_violations=[violence].",
                "type": "image_generation_user_error",
                "param": None,
                "code": "moderation_blocked",
                "moderation_details": {
                    "moderation_stage": stage,
                    "categories": ["violence"],
                },
            }
        },
    )


# --- answers ---


def error(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
) -> Reply:
    kind = "invalid_request_error"
    told = {"message": message, "type": kind, "param": param, "code": code}
    return Reply.of_json(status, {"error": told})


def answer_of(asked: Asked, usage: Mapping[str, Any]) -> dict[str, Any]:
    file = picture(asked.width, asked.height, asked.format, asked.background)
    text = base64.b64encode(file).decode()
    return {
        "created": 1_790_000_000,
        "background": asked.background,
        "output_format": asked.format,
        "quality": asked.quality,
        "size": asked.size,
        "data": [{"b64_json": text} for _ in range(asked.n)],
        "usage": dict(usage),
    }


def usage_of(
    model: str, asked: Asked, prompt: str, images: list[Part]
) -> dict[str, Any]:
    text = (len(prompt.split()) + 6) * asked.n
    seen = sum(map(seen_patches, images)) * asked.n
    image = (
        output_tokens(MODELS[model][asked.quality], asked.width, asked.height) * asked.n
    )
    image += PARTIAL_TOKENS * (asked.partials or 0) * asked.n
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": image,
        "output_tokens_details": {"image_tokens": image, "text_tokens": 0},
        "total_tokens": text + seen + image,
    }


def seen_patches(part: Part) -> int:
    image = opened(part)
    assert image is not None
    return patches(image.width, image.height)


def spoil(answer: dict[str, Any], fault: Fault, simulator: OpenAISimulator) -> Reply:
    """Turn a good answer into the broken success that was asked for."""
    whole: dict[str, Reply] = {
        "html": Reply(200, b"<html><body>Bad gateway</body></html>", "text/html"),
        "error": Reply.of_json(
            200, {"error": {"message": "upstream busy", "type": "server_error"}}
        ),
        "gzip": Reply(
            200,
            zlib.compress(json.dumps(answer).encode(), wbits=31),
            headers={"Content-Encoding": "gzip"},
        ),
    }
    if fault.answer in whole:
        return whole[fault.answer]
    usage = answer["usage"]
    text = answer["data"][0]["b64_json"]
    origin = simulator.origin
    changes: dict[str, dict[str, Any]] = {
        "ok": {},
        "plain": {},
        "empty": {"data": []},
        "null": {"data": None},
        "bad_base64": {"data": [{"b64_json": text[:-8] + "!!!!" + text[-4:]}]},
        "text": {"data": [{"b64_json": base64.b64encode(b"I cannot.").decode()}]},
        "no_usage": {"usage": None},
        "negative_usage": {"usage": usage | {"output_tokens": -5}},
        "zero_usage": {"usage": {"input_tokens": 0, "output_tokens": 0}},
        "big": {"data": [{"b64_json": big_picture()}]},
        "one_less": {"data": answer["data"][1:]},
        "data_prefix": {"data": [{"b64_json": f"data:image/png;base64,{text}"}]},
        "url": {"data": [{"url": f"{origin}/pictures/1.png"}]},
        "dead_url": {"data": [{"url": f"{origin}/pictures/none.png"}]},
    }
    return Reply.of_json(200, answer | changes[fault.answer])


def events_of(
    kind: str,
    asked: Asked,
    answer: dict[str, Any],
    fault: Fault,
    simulator: OpenAISimulator,
) -> list[bytes]:
    """Write the frames of a stream: for each picture its partials, then itself."""
    about = {name: answer[name] for name in ("size", "quality", "background")}
    about |= {"output_format": asked.format, "created_at": answer["created"]}
    spoiled: dict[str, Any] = {}
    if fault.answer not in {"error_event", "no_completed"}:
        spoiled = json.loads(spoil(answer, fault, simulator).body)
    frames: list[dict[str, Any]] = []
    for place in range(asked.n):
        for index in range(asked.partials or 0):
            look = png(asked.width, asked.height, padding=index + 1)
            frames.append(
                {
                    "type": f"{kind}.partial_image",
                    "partial_image_index": index,
                    "b64_json": base64.b64encode(look).decode(),
                    **about,
                }
            )
        if place < len(spoiled.get("data") or []):
            last = place == asked.n - 1
            frames.append(
                {
                    "type": f"{kind}.completed",
                    **spoiled["data"][place],
                    **about,
                    **({"usage": spoiled["usage"]} if last else {}),
                }
            )
    if fault.answer == "error_event":
        frames.append({"type": "error", "error": fault.body})
    return [frame(one, fault.line_end) for one in frames] + (
        [b"data: [DONE]\n\n"] if fault.done else []
    )


def frame(event: dict[str, Any], line_end: str) -> bytes:
    lines = [f"event: {event['type']}", f"data: {json.dumps(event)}", "", ""]
    return line_end.join(lines).encode()


if __name__ == "__main__":
    run_by_hand(OpenAISimulator, KEY)
