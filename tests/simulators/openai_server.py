"""A pretend api.openai.com on loopback: the images API, its refusals, and its faults.

It is an independent witness: it shares no code with the gateway, counts tokens by its
own reading of the published formula, and keeps a log of every picture that was bought.

By hand: ``python -m tests.simulators.openai_server --port 9001``; then faults can be
scripted with ``POST /_script`` (a JSON list of ``Fault`` fields) and purchases read
with ``GET /_purchases``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import signal
import socket
import struct
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

from PIL import Image

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
PATCHES_MAX = 1536
PARTIAL_TOKENS = 100
NO_EVENTS = {"plain", "html", "error", "gzip"}
OPERATIONS = {"/v1/images/generations": "generate", "/v1/images/edits": "edit"}
PROMPT_MAX_CHARS = 32_000
HEAD_MAX_BYTES = 64 * 1024
BODY_MAX_BYTES = 64 * 1024 * 1024
FORM_MAX_BYTES = 1024 * 1024 * 1024
PART_HEAD_BYTES = 256 * 1024
"""So much of a file is kept, to look at; the rest is only hashed and counted."""
BIG_BYTES = 9 * 1024 * 1024
"""Of a picture that is 12 MiB as base64."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call. Fields may be combined.

    ``status`` with ``body`` (bytes, text, or anything for JSON) and ``headers`` answers
    that instead of pictures: nothing is bought. ``answer`` names a broken success,
    which is bought: ``html``, ``error``, ``empty``, ``null``, ``bad_base64``, ``text``,
    ``no_usage``, ``negative_usage``, ``zero_usage``, ``big``, ``one_less``,
    ``data_prefix``, ``gzip``, ``url`` (a link to this server), ``dead_url``.
    ``hang`` never answers; ``close`` is ``mid_upload`` (while the request is being
    read: nothing is bought), ``before_reply``, ``reset`` (no goodbye) or ``mid_body``.

    Of a stream, ``answer`` may also be ``plain`` (an ordinary answer all the same),
    ``error_event`` (after the partial pictures, with ``body`` as the error) or
    ``no_completed``; ``pause_s`` comes before each event, ``line_end`` is how lines
    end, ``done`` adds the ``[DONE]`` of some relays.
    """

    status: int | None = None
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answer: str = "ok"
    delay_s: float = 0.0
    hang: bool = False
    close: str = ""
    pause_s: float = 0.0
    line_end: str = "\n"
    done: bool = False


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


@dataclass
class Part:
    """A field of a form. Of a file only the start is kept."""

    name: str
    filename: str | None
    media_type: str | None
    head: bytes = b""
    size_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def take(self, piece: bytes) -> None:
        self.head += piece[: PART_HEAD_BYTES - len(self.head)]
        self.size_bytes += len(piece)
        self.digest.update(piece)

    @property
    def sha256(self) -> str:
        return str(self.digest.hexdigest())


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    form: tuple[Part, ...] = ()

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def images(self) -> list[Part]:
        return [part for part in self.form if part.name in {"image", "image[]"}]

    @property
    def mask(self) -> Part | None:
        return next((part for part in self.form if part.name == "mask"), None)

    def fields(self) -> dict[str, Any]:
        """Read the fields of either kind of body, typed as in JSON."""
        if OPERATIONS[self.path] == "generate":
            fields: dict[str, Any] = self.json()
            return fields
        return {
            part.name: typed(part.name, part.head.decode())
            for part in self.form
            if part.filename is None
        }


def typed(name: str, text: str) -> Any:
    if name == "stream":
        return {"true": True, "false": False}.get(text, text)
    return int(text) if name in NUMBERS and text.isdecimal() else text


@dataclass
class OpenAISimulator:
    """A running simulator, as tests see it."""

    key: str
    base_url: str = ""
    latency_s: float = 0.0
    purchases: list[Purchase] = field(default_factory=list)
    requests: list[Seen] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    connections: set[asyncio.Task[None]] = field(default_factory=set)

    def script(self, *faults: Fault) -> None:
        """Let the next calls for pictures go wrong, in this order."""
        self.faults.extend(faults)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while (seen := await self.read(reader)) is not None:
                if not await self.answer(seen, writer):
                    break
        except UploadStoppedError:
            abort(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            # The simulator is being stopped: a hanging call ends here.
            pass
        finally:
            self.connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def read(self, reader: asyncio.StreamReader) -> Seen | None:
        head = await read_head(reader)
        if head is None:
            return None
        waiting = self.faults[0].close if self.faults else ""
        if head.path in OPERATIONS and waiting == "mid_upload":
            self.faults.popleft()
            await reader.read(1)
            raise UploadStoppedError
        return await read_body(reader, head)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        if seen.path.startswith("/_"):
            return await send(writer, self.steer(seen))
        if seen.method == "GET" and seen.path == "/pictures/1.png":
            return await send(writer, Reply(200, png(64, 32), "image/png"))
        self.requests.append(seen)
        if seen.path not in OPERATIONS or seen.method != "POST":
            return await send(writer, error(404, "Unknown URL.", code=None))
        fault = self.faults.popleft() if self.faults else Fault()
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
        body = seen.fields()
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

    def steer(self, seen: Seen) -> Reply:
        if seen.path == "/_script" and seen.method == "POST":
            self.script(*(Fault(**fields) for fields in seen.json()))
            return Reply.of_json(200, {"waiting": len(self.faults)})
        if seen.path == "/_purchases":
            bought = [dataclasses.asdict(purchase) for purchase in self.purchases]
            return Reply.of_json(200, bought)
        return error(404, "Unknown URL.", code=None)


@asynccontextmanager
async def serve_openai_simulator(
    *, key: str = KEY, port: int = 0, latency_s: float = 0.0
) -> AsyncGenerator[OpenAISimulator, None]:
    """Run a simulator on 127.0.0.1, on a free port unless one is given."""
    simulator = OpenAISimulator(key, latency_s=latency_s)
    server = await asyncio.start_server(
        simulator.serve, "127.0.0.1", port, limit=HEAD_MAX_BYTES
    )
    bound = server.sockets[0].getsockname()[1]
    simulator.base_url = f"http://127.0.0.1:{bound}/v1"
    try:
        yield simulator
    finally:
        server.close()
        for connection in list(simulator.connections):
            connection.cancel()
        await asyncio.gather(*simulator.connections, return_exceptions=True)
        await server.wait_closed()


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


def check(seen: Seen, key: str) -> Reply | None:
    if seen.headers.get("authorization") != f"Bearer {key}":
        told = seen.headers.get("authorization", "nothing").removeprefix("Bearer ")
        return error(
            401,
            f"Incorrect API key provided: {told}.",
            code="invalid_api_key",
        )
    try:
        body = seen.fields()
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


def opened(part: Part) -> Image.Image | None:
    """Look at a file's head; its name and media type must say the same."""
    try:
        image = Image.open(io.BytesIO(part.head), formats=["PNG", "JPEG", "WEBP"])
    except (OSError, SyntaxError):
        return None
    kind = (image.format or "").lower()
    ends = {"jpeg": (".jpg", ".jpeg")}.get(kind, (f".{kind}",))
    named = (part.filename or "").endswith(ends)
    return image if named and part.media_type == f"image/{kind}" else None


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


@dataclass(frozen=True)
class Reply:
    """An HTTP answer."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(
        cls, status: int, body: Any, headers: Mapping[str, str] | None = None
    ) -> Reply:
        return cls(status, json.dumps(body).encode(), headers=headers or {})


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


def scripted(fault: Fault) -> Reply:
    assert fault.status is not None
    if isinstance(fault.body, bytes):
        return Reply(fault.status, fault.body, headers=fault.headers)
    if isinstance(fault.body, str):
        body = fault.body.encode()
        return Reply(fault.status, body, "text/html", headers=fault.headers)
    return Reply.of_json(fault.status, fault.body, fault.headers)


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
    seen = sum(map(patches, images)) * asked.n
    image = output_tokens(MODELS[model][asked.quality], asked) * asked.n
    image += PARTIAL_TOKENS * (asked.partials or 0) * asked.n
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": image,
        "output_tokens_details": {"image_tokens": image, "text_tokens": 0},
        "total_tokens": text + seen + image,
    }


def patches(part: Part) -> int:
    image = opened(part)
    assert image is not None
    return min(math.ceil(image.width / 32) * math.ceil(image.height / 32), PATCHES_MAX)


def output_tokens(base: int, asked: Asked) -> int:
    """Count by the published formula, in exact fractions."""
    short, long = sorted((asked.width, asked.height))
    across = math.floor(Fraction(base * short, long) + Fraction(1, 2))
    pixels = asked.width * asked.height
    return math.ceil(base * across * Fraction(2_000_000 + pixels, 4_000_000))


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
    origin = simulator.base_url.removesuffix("/v1")
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


# --- pictures ---


@lru_cache(maxsize=64)
def picture(width: int, height: int, file_format: str, background: str) -> bytes:
    if file_format == "png":
        return png(width, height, clear=background == "transparent")
    file = io.BytesIO()
    mode = "RGBA" if background == "transparent" else "RGB"
    Image.new(mode, (width, height)).save(file, file_format)
    return file.getvalue()


def png(width: int, height: int, *, clear: bool = False, padding: int = 0) -> bytes:
    """Write a PNG by hand: one bit per pixel, or 8-bit RGBA."""
    depth, colour, row = (8, 6, 4 * width) if clear else (1, 0, (width + 7) // 8)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = zlib.compress((b"\x00" + bytes(row)) * height, 1)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    if padding:
        chunks.insert(2, (b"paDd", bytes(padding)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


@lru_cache(maxsize=1)
def big_picture() -> str:
    return base64.b64encode(png(64, 32, padding=BIG_BYTES)).decode()


# --- HTTP/1.1, as little as is needed, with a hand on every byte ---


class UploadStoppedError(Exception):
    """A script says to stop reading a request."""


async def read_head(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    start, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = start.split(" ")
    pairs = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return Seen(method, path, headers)


async def read_body(reader: asyncio.StreamReader, head: Seen) -> Seen:
    length = int(head.headers.get("content-length", "0"))
    media_type, _, boundary = head.headers.get("content-type", "").partition(
        "; boundary="
    )
    if media_type == "multipart/form-data":
        assert length <= FORM_MAX_BYTES
        form = await FormReader(reader, length, boundary.strip('"').encode()).read()
        return dataclasses.replace(head, form=tuple(form))
    assert length <= BODY_MAX_BYTES
    return dataclasses.replace(head, body=await reader.readexactly(length))


class FormReader:
    """Reads a form piece by piece: it may be a gigabyte."""

    def __init__(
        self, reader: asyncio.StreamReader, length: int, boundary: bytes
    ) -> None:
        self.reader = reader
        self.left = length
        self.mark = b"\r\n--" + boundary
        self.buffer = b"\r\n"

    async def read(self) -> list[Part]:
        parts: list[Part] = []
        await self.until(self.mark, Part("", None, None))
        while True:
            head = Part("", None, None)
            await self.until(b"\r\n", head)
            if head.head:
                assert head.head == b"--", "the form ends"
                await self.rest()
                return parts
            head = Part("", None, None)
            await self.until(b"\r\n\r\n", head)
            part = part_of(head.head.decode())
            await self.until(self.mark, part)
            parts.append(part)

    async def until(self, mark: bytes, part: Part) -> None:
        while (at := self.buffer.find(mark)) < 0:
            sure = max(len(self.buffer) - len(mark) + 1, 0)
            part.take(self.buffer[:sure])
            self.buffer = self.buffer[sure:] + await self.more()
        part.take(self.buffer[:at])
        self.buffer = self.buffer[at + len(mark) :]

    async def more(self) -> bytes:
        piece = await self.reader.read(min(self.left, 64 * 1024))
        if not piece:
            raise asyncio.IncompleteReadError(b"", None)
        self.left -= len(piece)
        return piece

    async def rest(self) -> None:
        while self.left:
            await self.more()


def part_of(head: str) -> Part:
    fields = dict(re.findall(r'(\w+)="([^"]*)"', head))
    media_type = re.search(r"(?i)content-type: *(\S+)", head)
    return Part(
        fields["name"], fields.get("filename"), media_type[1] if media_type else None
    )


async def is_silent(writer: asyncio.StreamWriter, fault: Fault) -> bool:
    """Tell whether nothing is to be answered at all."""
    if fault.hang:
        await asyncio.Event().wait()
    if fault.close == "reset":
        abort(writer)
    return fault.close in {"before_reply", "reset"}


async def deliver(writer: asyncio.StreamWriter, reply: Reply, fault: Fault) -> bool:
    if await is_silent(writer, fault):
        return False
    if fault.close == "mid_body":
        writer.write(head_of(reply) + reply.body[: len(reply.body) // 2])
        await writer.drain()
        return False
    return await send(writer, reply)


async def deliver_events(
    writer: asyncio.StreamWriter, frames: list[bytes], fault: Fault
) -> bool:
    """Send a stream as it would come: in chunks, with breaks where none should be."""
    if await is_silent(writer, fault):
        return False
    lines = [
        "HTTP/1.1 200 Simulated",
        "Content-Type: text/event-stream; charset=utf-8",
        "Transfer-Encoding: chunked",
        "x-request-id: req_simulated",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    await write_chunk(writer, b": hello\n\n")
    for one in frames:
        await asyncio.sleep(fault.pause_s)
        half = len(one) // 2
        await write_chunk(writer, one[:half])
        if fault.close == "mid_body" and one is frames[-1]:
            return False
        await write_chunk(writer, one[half:])
    await write_chunk(writer, b"")
    return True


async def write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


def abort(writer: asyncio.StreamWriter) -> None:
    """Close without a goodbye."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def send(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    writer.write(head_of(reply) + reply.body)
    await writer.drain()
    return True


def head_of(reply: Reply) -> bytes:
    headers = {
        "Content-Type": reply.media_type,
        "Content-Length": str(len(reply.body)),
        "x-request-id": "req_simulated",
        **reply.headers,
    }
    lines = [f"HTTP/1.1 {reply.status} Simulated"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def run(port: int, key: str, latency_s: float) -> None:
    async with serve_openai_simulator(
        key=key, port=port, latency_s=latency_s
    ) as simulator:
        print(simulator.base_url, flush=True)  # noqa: T201 - what the caller waits for
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--latency-s", type=float, default=0.0)
    given = parser.parse_args()
    asyncio.run(run(given.port, given.key, given.latency_s))


if __name__ == "__main__":
    main()
