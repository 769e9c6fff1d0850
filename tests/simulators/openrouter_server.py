"""A pretend openrouter.ai on loopback: its image API, its refusals, and its faults.

It is an independent witness: it shares no code with the gateway, counts tokens by its
own reading of the published formula, prices them in exact decimals, and keeps a log of
every picture that was bought.

By hand: ``python -m tests.simulators.openrouter_server --port 9005``; see
``tests.simulators.server`` for how to script faults and read the purchases.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec
from PIL import Image

from tests.simulators.pictures import big_picture, output_tokens, patches, picture, png
from tests.simulators.server import (
    Fault,
    Reply,
    Seen,
    Simulator,
    deliver,
    deliver_events,
    run_by_hand,
    scripted,
    send,
)

KEY = "sk-or-v1-simulated-0123456789abcdef"
PATH = "/api/v1/images"
RATIOS = {
    *("1:1", "1:2", "1:4", "1:8", "2:1", "2:3", "2.35:1", "3:2", "3:4", "4:1", "4:3"),
    *("4:5", "5:2", "5:4", "5:7", "7:5", "8:1", "9:16", "16:9", "9:19.5", "19.5:9"),
    *("9:20", "20:9", "9:21", "21:9", "auto"),
}
REFERENCES_MAX = 16
PARTIALS = 3
"""Of each streamed picture: nobody can ask for a number of them."""
PER_TOKEN_USD = {
    "text": Decimal("0.000005"),
    "image": Decimal("0.000008"),
    "output": Decimal("0.00003"),
}
FLAT_USD = Decimal("0.0400000001")
"""More digits than a float is good for when many are added up."""
NO_EVENTS = {"plain", "html", "error", "gzip"}
FREE = {"error", "error_event"}
"""A generation that fails is not billed, says OpenRouter: all or nothing."""
ENCODER = msgspec.json.Encoder(decimal_format="number")


@dataclass(frozen=True)
class Model:
    """What one model can do. Without ``bases`` it is paid per picture."""

    bases: Mapping[str, int] = dataclasses.field(default_factory=dict)
    backgrounds: frozenset[str] = frozenset({"auto", "opaque"})
    streams: bool = True
    n_max: int = 10


MODELS = {
    "openai/gpt-image-2": Model({"low": 16, "medium": 48, "high": 96}),
    "openai/gpt-image-1.5": Model(
        {"low": 16, "medium": 48, "high": 96},
        backgrounds=frozenset({"auto", "opaque", "transparent"}),
    ),
    "bytedance-seed/seedream-4.5": Model(streams=False, n_max=1),
}


@dataclass(frozen=True)
class Purchase:
    """Pictures that the account was charged for, all or none.

    ``references`` are the SHA-256 of the files that arrived.
    """

    model: str
    size: str
    quality: str
    n: int
    cost_usd: str
    references: tuple[str, ...] = ()
    stream: bool = False
    prompt: str = dataclasses.field(default="", compare=False)


@dataclass
class OpenRouterSimulator(Simulator):
    """A running simulator, as tests see it.

    ``limit_left_usd`` is what the key may still spend; None: it has no limit.
    """

    key: str = KEY
    limit_left_usd: float | None = 74.5

    prefix = "/api/v1"

    def bill_usd(self, purchase: Purchase) -> Decimal:
        return Decimal(purchase.cost_usd)

    def sells_at(self, path: str) -> bool:
        return path == PATH

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        self.requests.append(seen)
        if (seen.method, seen.path) == ("GET", f"{self.prefix}/key"):
            limit = {"limit": 100, "limit_remaining": self.limit_left_usd}
            told = {"label": "sk-or-v1-sim...789", **limit, "is_free_tier": False}
            return await self.tell(check_key(seen, self.key), {"data": told}, writer)
        if (seen.method, seen.path) != ("POST", PATH):
            return await send(writer, error(404, "Not Found"))
        fault = self.fault()
        refused = check(seen, self.key)
        if refused is not None:
            return await send(writer, refused)
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await send(writer, scripted(fault))
        return await self.sell(seen.json(), fault, writer)

    async def sell(
        self, body: dict[str, Any], fault: Fault, writer: asyncio.StreamWriter
    ) -> bool:
        model = MODELS[body["model"]]
        files = [data_of(one) for one in body.get("input_references", [])]
        asked = asked_for(body)
        usage = usage_of(model, asked, body["prompt"], files)
        usage |= {"cost": usage["cost"] * self.percent / 100}
        streams = body.get("stream", False) and model.streams
        if fault.answer not in FREE:
            self.purchases.append(
                Purchase(
                    body["model"],
                    asked.size,
                    asked.quality,
                    asked.n,
                    str(usage["cost"]),
                    references=tuple(hashlib.sha256(f).hexdigest() for f in files),
                    stream=streams,
                    prompt=body["prompt"],
                )
            )
        answer = answer_of(asked, usage)
        await asyncio.sleep(fault.delay_s or self.latency_s)
        if not streams or fault.answer in NO_EVENTS:
            return await deliver(writer, spoil(answer, fault), fault)
        return await deliver_events(writer, events_of(asked, answer, fault), fault)


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

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


def asked_for(body: dict[str, Any]) -> Asked:
    width, height = size_of(body)
    quality = body.get("quality", "auto")
    background = body.get("background", "auto")
    return Asked(
        width,
        height,
        "medium" if quality == "auto" else quality,
        body.get("n", 1),
        body.get("output_format", "png"),
        "opaque" if background == "auto" else background,
    )


def size_of(body: dict[str, Any]) -> tuple[int, int]:
    """Take the size as it was told: as pixels, or as a ratio of about a megapixel."""
    if "x" in body.get("size", ""):
        width, height = body["size"].split("x")
        return int(width), int(height)
    ratio = body.get("aspect_ratio", "auto")
    across, down = (1.0, 1.0) if ratio == "auto" else map(float, ratio.split(":"))
    if across >= down:
        return (1024, 1024) if across == down else (1536, round(1536 * down / across))
    return round(1536 * across / down), 1536


def check(seen: Seen, key: str) -> Reply | None:
    """Refuse in the order of the real one: the schema, the key, the model, the rest."""
    try:
        body = seen.json()
    except ValueError:
        return error(400, "Invalid JSON")
    return (
        check_schema(body)
        or check_key(seen, key)
        or check_model(body)
        or check_moderation(body)
        or check_references(body)
    )


def is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def is_text(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and least <= len(value) <= most


def is_one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


RULES: Mapping[str, Callable[[Any], bool]] = {
    "model": is_text(1, 200),
    "prompt": is_text(1, 10**6),
    "n": is_whole(1, 10),
    "size": lambda size: (
        isinstance(size, str)
        and bool(
            re.fullmatch(r"512|768|1K|1\.5K|2K|4K|[1-9]\d{0,4}x[1-9]\d{0,4}", size)
        )
    ),
    "resolution": is_one_of("512", "768", "1K", "1.5K", "2K", "4K"),
    "aspect_ratio": is_one_of(*RATIOS),
    "quality": is_one_of("auto", "low", "medium", "high", "xhigh", "max"),
    "output_format": is_one_of("png", "jpeg", "webp", "svg"),
    "output_compression": is_whole(0, 100),
    "background": is_one_of("auto", "transparent", "opaque"),
    "seed": is_whole(-(2**63), 2**63),
    "stream": lambda value: type(value) is bool,
    "user": is_text(0, 256),
    "session_id": is_text(0, 256),
    "provider": lambda value: isinstance(value, dict),
    "input_references": lambda value: (
        isinstance(value, list)
        and len(value) <= REFERENCES_MAX
        and all(is_reference(one) for one in value)
    ),
}


def is_reference(one: Any) -> bool:
    match one:
        case {"type": "image_url", "image_url": {"url": str()}}:
            return True
        case _:
            return False


def check_schema(body: Any) -> Reply | None:
    """Refuse what does not fit; names that nobody knows are passed over in silence."""
    issues = [
        {"code": "invalid_value", "path": [name], "message": f"Invalid {name}"}
        for name, fits in RULES.items()
        if (name in body or name in {"model", "prompt"}) and not fits(body.get(name))
    ]
    if not issues:
        return None
    told = {"name": "ZodError", "message": msgspec.json.encode(issues).decode()}
    return Reply.of_json(400, {"success": False, "error": told})


def check_key(seen: Seen, key: str) -> Reply | None:
    if seen.headers.get("authorization") != f"Bearer {key}":
        return error(401, "User not found.")
    return None


def check_model(body: dict[str, Any]) -> Reply | None:
    name = body["model"]
    model = MODELS.get(name)
    if model is None:
        return error(400, f"{name} is not a valid model ID")
    known = {"auto", *model.bases}
    if model.bases and body.get("quality", "auto") not in known:
        return provider_error(f"Invalid value: '{body['quality']}'.")
    if body.get("background", "auto") not in model.backgrounds:
        return provider_error("Transparent background is not supported for this model.")
    if body.get("n", 1) > model.n_max:
        return error(400, f"{name} does not support n > {model.n_max}")
    if "x" in body.get("size", "") and {"resolution", "aspect_ratio"} & set(body):
        return error(400, "size conflicts with resolution or aspect_ratio")
    return None


def check_moderation(body: dict[str, Any]) -> Reply | None:
    prompt = body["prompt"]
    if "[moderate]" in prompt:
        return error(
            403,
            "openai/gpt-image-2 requires moderation on OpenAI. Your input was flagged "
            'for "violence".',
            reasons=["violence"],
            flagged_input=prompt[:100],
            provider_name="OpenAI",
            model_slug=body["model"],
        )
    return None


def check_references(body: dict[str, Any]) -> Reply | None:
    for one in body.get("input_references", []):
        url = one["image_url"]["url"]
        if not url.startswith("data:"):
            return error(
                400, "Could not download image", error_type="image_download_failed"
            )
        try:
            image = Image.open(io.BytesIO(data_of(one)))
        except (OSError, SyntaxError, ValueError):
            return provider_error("Invalid image data.", error_type="invalid_image")
        if not url.startswith(f"data:image/{(image.format or '').lower()};base64,"):
            return provider_error("Invalid image type.", error_type="invalid_image")
    return None


def data_of(reference: dict[str, Any]) -> bytes:
    text = reference["image_url"]["url"].partition(",")[2]
    return binascii.a2b_base64(text, strict_mode=True)


# --- answers ---


def error(status: int, message: str, **metadata: Any) -> Reply:
    told: dict[str, Any] = {"code": status, "message": message}
    if metadata:
        told["metadata"] = metadata
    return Reply.of_json(status, {"error": told})


def provider_error(message: str, *, error_type: str = "invalid_request") -> Reply:
    return error(
        400,
        message,
        error_type=error_type,
        provider_code="invalid_value",
        provider_name="OpenAI",
    )


def usage_of(
    model: Model, asked: Asked, prompt: str, files: list[bytes]
) -> dict[str, Any]:
    if not model.bases:
        made = 4175 * asked.n
        counts = {"prompt_tokens": 0, "completion_tokens": made, "total_tokens": made}
        return {**counts, "cost": FLAT_USD * asked.n, "is_byok": False}
    text = (len(prompt.split()) + 6) * asked.n
    seen = sum(patches(*Image.open(io.BytesIO(f)).size) for f in files) * asked.n
    made = output_tokens(model.bases[asked.quality], asked.width, asked.height)
    made *= asked.n
    prompt_usd = text * PER_TOKEN_USD["text"] + seen * PER_TOKEN_USD["image"]
    made_usd = made * PER_TOKEN_USD["output"]
    return {
        "prompt_tokens": text + seen,
        "completion_tokens": made,
        "total_tokens": text + seen + made,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"image_tokens": made, "reasoning_tokens": 0},
        "cost": prompt_usd + made_usd,
        "cost_details": {
            "upstream_inference_cost": None,
            "upstream_inference_prompt_cost": prompt_usd,
            "upstream_inference_completions_cost": made_usd,
        },
        "is_byok": False,
    }


def answer_of(asked: Asked, usage: Mapping[str, Any]) -> dict[str, Any]:
    file = picture(asked.width, asked.height, asked.format, asked.background)
    text = base64.b64encode(file).decode()
    one = {"b64_json": text, "media_type": f"image/{asked.format}"}
    return {"created": 1_790_000_000, "data": [one] * asked.n, "usage": dict(usage)}


def spoil(answer: dict[str, Any], fault: Fault) -> Reply:
    """Turn a good answer into the broken success that was asked for."""
    unavailable = {
        "code": 502,
        "message": "Provider returned error",
        "metadata": {"error_type": "provider_unavailable"},
    }
    headers = {"X-Generation-Id": "gen-img-simulated"}
    whole: dict[str, Reply] = {
        "html": Reply(200, b"<html><body>Bad gateway</body></html>", "text/html"),
        "error": Reply.of_json(
            200, {"error": fault.body or unavailable, "user_id": "user_1"}
        ),
        "gzip": Reply(
            200,
            zlib.compress(ENCODER.encode(answer), wbits=31),
            headers={"Content-Encoding": "gzip"},
        ),
    }
    if fault.answer in whole:
        return whole[fault.answer]
    return Reply(
        200, ENCODER.encode(answer | changes_of(answer, fault)), headers=headers
    )


def changes_of(answer: dict[str, Any], fault: Fault) -> dict[str, Any]:
    usage = answer["usage"]
    text = answer["data"][0]["b64_json"]
    vector = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
    small = base64.b64encode(png(64, 32)).decode()
    bill = {"is_byok": True, "cost": Decimal("0.0001")}
    changes: dict[str, dict[str, Any]] = {
        "ok": {},
        "plain": {},
        "empty": {"data": []},
        "null": {"data": None},
        "bad_base64": {"data": [{"b64_json": text[:-8] + "!!!!" + text[-4:]}]},
        "text": {"data": [{"b64_json": base64.b64encode(b"I cannot.").decode()}]},
        "svg": {"data": [{"b64_json": vector, "media_type": "image/svg+xml"}]},
        "other_size": {"data": [{"b64_json": small}]},
        "no_usage": {"usage": None},
        "negative_usage": {
            "usage": usage | {"completion_tokens": -5, "cost": Decimal("-0.01")}
        },
        "zero_usage": {
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "cost": None}
        },
        "byok": {
            "usage": usage
            | bill
            | {"cost_details": {"upstream_inference_cost": usage["cost"]}}
        },
        "big": {"data": [{"b64_json": big_picture(), "media_type": "image/png"}]},
        "one_less": {"data": answer["data"][1:]},
        "url": {"data": [{"url": "https://elsewhere.test/1.png"}]},
    }
    return changes[fault.answer]


def events_of(asked: Asked, answer: dict[str, Any], fault: Fault) -> list[bytes]:
    """Write the frames of a stream: for each picture its partials, then itself."""
    broken = fault.answer in {"error_event", "no_completed"}
    spoiled = answer | ({"data": []} if broken else changes_of(answer, fault))
    items = spoiled["data"] or []
    frames: list[dict[str, Any]] = []
    for place in range(asked.n):
        frames += [
            {
                "type": "image_generation.partial_image",
                "partial_image_index": index,
                "b64_json": base64.b64encode(
                    png(asked.width, asked.height, padding=index + 1)
                ).decode(),
            }
            for index in range(PARTIALS)
        ]
        frames.append(
            {"type": "image_generation.text_chunk", "phase": "reasoning", "text": "hm"}
        )
        if place < len(items):
            last = place == len(items) - 1
            frames.append(
                {
                    "type": "image_generation.completed",
                    **items[place],
                    "created": answer["created"],
                    **({"usage": spoiled["usage"]} if last else {}),
                }
            )
    if fault.answer == "error_event":
        frames = [frames[0], {"type": "error", "error": fault.body}]
    end = [] if fault.close == "mid_body" else [b"data: [DONE]\n\n"]
    return [frame(one, fault.line_end) for one in frames] + end


def frame(event: dict[str, Any], line_end: str) -> bytes:
    """There is no ``event:`` line: the type is in the data."""
    return b"data: " + ENCODER.encode(event) + 2 * line_end.encode()


if __name__ == "__main__":
    run_by_hand(OpenRouterSimulator, KEY)
