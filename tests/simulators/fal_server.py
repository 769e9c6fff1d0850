"""A pretend queue.fal.run on loopback: submit, status, result, cancel, and the CDN.

It is an independent witness: it shares no code with the gateway, counts billable units
by its own reading of the price list, and keeps a log of every job that would be billed.
Jobs live here, whoever asks for them. A job starts as soon as it is accepted, unless
the simulator is ``busy``; each look at it then takes it one step on.

Steps that a ``Fault`` may name in ``on``: none (submit), ``run`` (how the job ends),
``status``, ``result``, ``file`` (a picture's download) and ``cancel``.

By hand: ``python -m tests.simulators.fal_server --port 9002``; ``POST /_set`` takes
JSON with ``busy`` or ``shy``, ``GET /_jobs`` tells of each job its state, and how often
it was asked for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import itertools
import json
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Decimal
from hashlib import sha256
from typing import Any

from PIL import Image

from tests.simulators.pictures import (
    BIG_BYTES,
    output_tokens,
    patches,
    picture,
    png,
)
from tests.simulators.server import (
    Fault,
    Reply,
    Seen,
    Simulator,
    deliver,
    run_by_hand,
    scripted,
    send,
)

KEY = "0f1e2d3c-simulated:4b5a69788796a5b4c3d2e1f0"
BASES_2 = {"low": 16, "medium": 48, "high": 96}
BASES_25 = {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96, "auto": 48}
FREE = {"prompt", "image_size", "quality", "num_images", "output_format", "sync_mode"}
EDIT = {"image_urls", "mask_url"}
WORDS = FREE | {"background"}
WORDS_EDIT = {"image_urls", "mask_image_url", "input_fidelity"}
PRESETS = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
WORD_SIZES = {"1024x1024", "1536x1024", "1024x1536"}
REFERENCES_MAX = 16
PROMPT_MAX_CHARS = 32_000
DOLLARS_PER_MILLION = {"text": 5, "image": 8, "output": 30}
MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
BIG_BODY_BYTES = 10 * 1024 * 1024


@dataclass(frozen=True)
class Endpoint:
    """What one endpoint takes."""

    fields: frozenset[str]
    bases: Mapping[str, int]
    sizes_are_words: bool = False

    @property
    def edit(self) -> bool:
        return "image_urls" in self.fields


def endpoints() -> dict[str, Endpoint]:
    free, words = frozenset(FREE), frozenset(WORDS)
    free_edit, words_edit = free | EDIT, words | WORDS_EDIT
    flare, first = "openai/gpt-image-2.5/flare", "fal-ai/gpt-image-1"
    return {
        "openai/gpt-image-2": Endpoint(free, BASES_2),
        "openai/gpt-image-2/edit": Endpoint(free_edit, BASES_2),
        f"{flare}/text-to-image": Endpoint(free, BASES_25),
        f"{flare}/edit": Endpoint(free_edit, BASES_25),
        f"{first}.5": Endpoint(words, BASES_2, sizes_are_words=True),
        f"{first}.5/edit": Endpoint(words_edit, BASES_2, sizes_are_words=True),
        f"{first}/text-to-image": Endpoint(words, BASES_2, sizes_are_words=True),
        f"{first}/edit-image": Endpoint(words_edit, BASES_2, sizes_are_words=True),
    }


ENDPOINTS = endpoints()


@dataclass(frozen=True)
class Purchase:
    """A job that the account would be billed for.

    ``references`` and ``mask`` are the SHA-256 of the files that arrived.
    """

    endpoint: str
    size: str
    quality: str
    n: int
    units: str
    usage: Mapping[str, Any]
    operation: str
    request_id: str
    references: tuple[str, ...] = ()
    mask: str | None = None
    prompt: str = field(default="", compare=False)


@dataclass
class Job:
    """One request of the queue. ``told`` are states that it pretends to be in."""

    request_id: str
    endpoint: str
    body: bytes
    state: str = "IN_QUEUE"
    fault: Fault = field(default_factory=Fault)
    result: Reply | None = None
    files: list[Reply] = field(default_factory=list)
    told: deque[str] = field(default_factory=deque)
    error: Mapping[str, Any] = field(default_factory=dict)
    done_at_s: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def app(self) -> str:
        """Owner and app: the path of an endpoint is not part of a request's URL."""
        return "/".join(self.endpoint.split("/")[:2])


@dataclass
class FalSimulator(Simulator):
    """A running simulator, as tests see it."""

    key: str = KEY
    busy: bool = False
    """Whether all runners are taken: jobs wait in the queue, unbilled."""
    shy: bool = False
    """Whether a look is told of a job that has ended that it is still at work."""
    jobs: dict[str, Job] = field(default_factory=dict)
    numbers: Iterable[int] = field(default_factory=lambda: itertools.count(1))

    def bill_usd(self, purchase: Purchase) -> Decimal:
        return Decimal(purchase.units)

    def sells_at(self, path: str) -> bool:
        return path.removeprefix("/") in ENDPOINTS

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.route.startswith("/files/"):
            fault = self.fault("file")
            reply = self.file(seen) if fault.status is None else scripted(fault)
            return await deliver(writer, reply, fault)
        self.requests.append(seen)
        if seen.headers.get("authorization") != f"Key {self.key}":
            told = seen.headers.get("authorization", "nothing")
            return await send(writer, says(401, f"Invalid key: {told}"))
        if seen.method == "POST":
            return await self.submit(seen, writer)
        return await self.ask(seen, writer)

    async def submit(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        name = seen.route.removeprefix("/")
        if name not in ENDPOINTS:
            app = "/".join(name.split("/")[:2])
            return await send(writer, says(404, f"Application '{app}' not found"))
        fault = self.fault()
        if fault.status is not None:
            return await send(writer, scripted(fault))
        start_s = float(seen.headers.get("x-fal-request-timeout", "60"))
        if start_s <= 1:
            return await send(writer, says(400, "Invalid timeout", "bad_request"))
        number = next(iter(self.numbers))
        job = Job(f"{number:08d}-5ca1-4b1e-9d0c-000000000000", name, seen.body)
        self.jobs[job.request_id] = job
        job.calls["submit"] += 1
        if not self.busy:
            self.run(job)
        accepted = {**self.links(job), "status": "IN_QUEUE", "queue_position": 0}
        await asyncio.sleep(fault.delay_s)
        return await deliver(writer, spoiled(accepted, fault, self), fault)

    async def ask(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        found = re.fullmatch(r"/([^/]+/[^/]+)/requests/([^/]+?)(?:/(\w+))?", seen.route)
        step = (found[3] or "") if found else "?"
        methods = {"status": "GET", "": "GET", "cancel": "PUT"}
        if not found or methods.get(step) != seen.method:
            return await send(writer, says(404, "Path not found"))
        fault = self.fault(step or "result")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        job = self.jobs.get(found[2])
        if job is None or job.app != found[1]:
            reply = Reply.of_json(404, {"status": "NOT_FOUND"})
        else:
            job.calls[step or "result"] += 1
            steps = {"status": self.status, "cancel": self.stop, "": self.kept}
            reply = steps[step](job)
        if fault.answer == "html":
            reply = Reply(200, b"<html>nginx</html>", "text/html")
        if fault.answer == "big":
            reply = Reply.of_json(200, {"status": "x" * BIG_BODY_BYTES})
        return await deliver(writer, reply, fault)

    def steer(self, seen: Seen) -> Reply:
        if seen.path == "/_set" and seen.method == "POST":
            told = seen.json()
            self.busy = told.get("busy", self.busy)
            self.shy = told.get("shy", self.shy)
            return Reply.of_json(200, {})
        if seen.path == "/_jobs":
            told = [
                {
                    "id": j.request_id,
                    "state": j.state,
                    "error": j.error,
                    "calls": j.calls,
                }
                for j in self.jobs.values()
            ]
            return Reply.of_json(200, told)
        return super().steer(seen)

    # --- a job's life ---

    def run(self, job: Job) -> None:
        job.state = "IN_PROGRESS"
        job.fault = self.fault("run")
        job.told.extend(job.fault.body if job.fault.answer == "states" else ())
        job.done_at_s = asyncio.get_running_loop().time() + self.latency_s
        fault = job.fault
        if fault.status is not None:
            job.result = scripted(fault)
            if isinstance(fault.body, dict) and "error_type" in fault.body:
                word = fault.body["error_type"]
                job.error = {"error": fault.body["detail"], "error_type": word}
            return
        wrong = wrong_with(job.body, ENDPOINTS[job.endpoint])
        if wrong is not None:
            job.result = wrong
            return
        self.sell(job)

    def sell(self, job: Job) -> None:
        endpoint = ENDPOINTS[job.endpoint]
        asked = asked_for(json.loads(job.body), endpoint)
        usage = usage_of(asked, endpoint)
        units = dollars(usage)
        self.purchases.append(
            Purchase(
                job.endpoint,
                f"{asked.width}x{asked.height}",
                asked.quality,
                asked.n,
                units,
                usage,
                "edit" if endpoint.edit else "generate",
                job.request_id,
                tuple(sha256(file).hexdigest() for file in asked.references),
                sha256(asked.mask).hexdigest() if asked.mask else None,
                prompt=asked.prompt,
            )
        )
        job.files = files_of(asked, job.fault)
        places = [
            f"{self.origin}/files/{job.request_id}/{index}.{asked.format}"
            for index in range(len(job.files))
        ]
        job.result = result_of(asked, job, places, usage, units)

    def step(self, job: Job) -> None:
        """Go on by one look."""
        if job.state == "IN_QUEUE" and not self.busy:
            self.run(job)
        elif (
            job.state == "IN_PROGRESS"
            and not job.told
            and asyncio.get_running_loop().time() >= job.done_at_s
            and not job.fault.hang
        ):
            job.state = "COMPLETED"

    # --- what is answered ---

    def links(self, job: Job) -> dict[str, Any]:
        url = f"{self.origin}/{job.app}/requests/{job.request_id}"
        return {
            "request_id": job.request_id,
            "response_url": url,
            "status_url": f"{url}/status",
            "cancel_url": f"{url}/cancel",
        }

    def status(self, job: Job) -> Reply:
        if job.state == "GONE":
            return Reply.of_json(404, {"status": "NOT_FOUND"})
        state = job.told.popleft() if job.told else job.state
        if self.shy and state == "COMPLETED":
            state = "IN_PROGRESS"
        told: dict[str, Any] = {"status": state, **self.links(job)}
        if state == "IN_QUEUE":
            told |= {"queue_position": 0}
        if state == "IN_PROGRESS":
            told |= {"logs": None}
        if state == "COMPLETED":
            told |= {"logs": None, "metrics": {"inference_time": 0.1}, **job.error}
        self.step(job)
        return Reply.of_json(200 if state == "COMPLETED" else 202, told)

    def kept(self, job: Job) -> Reply:
        if job.state == "GONE":
            return Reply.of_json(404, {"status": "NOT_FOUND"})
        if job.state != "COMPLETED" or job.result is None:
            return says(400, "Request is still in progress")
        request_id = {"x-fal-request-id": job.request_id}
        return replace(job.result, headers={**job.result.headers, **request_id})

    def stop(self, job: Job) -> Reply:
        if job.state == "GONE":
            return Reply.of_json(404, {"status": "NOT_FOUND"})
        if job.state == "COMPLETED":
            return Reply.of_json(400, {"status": "ALREADY_COMPLETED"})
        if job.state == "IN_QUEUE":
            job.state = "GONE"
        else:
            job.state = "COMPLETED"
            job.error = {"error": "Cancelled", "error_type": "client_cancelled"}
            job.result = says(499, "Request cancelled", "client_cancelled")
        return Reply.of_json(202, {"status": "CANCELLATION_REQUESTED"})

    def file(self, seen: Seen) -> Reply:
        assert "authorization" not in seen.headers, "the CDN needs no key"
        _, _, request_id, name = seen.route.split("/")
        job = self.jobs.get(request_id)
        index = int(name.partition(".")[0])
        if job is None or index >= len(job.files):
            return Reply(404, b"", "text/plain")
        return job.files[index]


# --- what was asked, and what is wrong with it ---


@dataclass(frozen=True)
class Asked:
    """An input with its gaps filled in as the model would."""

    prompt: str
    width: int
    height: int
    quality: str
    n: int
    format: str
    background: str
    inline: bool
    references: tuple[bytes, ...]
    mask: bytes | None


def asked_for(body: dict[str, Any], endpoint: Endpoint) -> Asked:
    default = "auto" if endpoint.edit else "landscape_4_3"
    size = body.get("image_size", default)
    if isinstance(size, dict):
        width, height = size["width"], size["height"]
    elif size in PRESETS:
        width, height = PRESETS[size]
    else:
        width, height = (
            (1024, 1024) if size == "auto" else tuple(map(int, size.split("x")))
        )
    mask = body.get("mask_url") or body.get("mask_image_url")
    return Asked(
        body["prompt"],
        width,
        height,
        body.get("quality", "high"),
        body.get("num_images", 1),
        body.get("output_format", "png"),
        body.get("background", "auto"),
        body.get("sync_mode", False),
        tuple(file_in(url) for url in body.get("image_urls", [])),
        file_in(mask) if mask else None,
    )


def wrong_with(raw: bytes, endpoint: Endpoint) -> Reply | None:
    try:
        body = json.loads(raw)
        assert isinstance(body, dict)
    except (ValueError, AssertionError):
        return faulty("json_invalid", [], "Invalid JSON")
    return (
        wrong_names(body, endpoint)
        or wrong_values(body, endpoint)
        or (wrong_files(body) if endpoint.edit else None)
        or wrong_prompt(body["prompt"])
    )


def wrong_names(body: dict[str, Any], endpoint: Endpoint) -> Reply | None:
    for name in body:
        if name not in endpoint.fields:
            return faulty("extra_forbidden", [name], "Extra inputs are not permitted")
    needed = ["prompt", *(["image_urls"] if endpoint.edit else [])]
    for name in needed:
        if name not in body:
            return faulty("missing", [name], "Field required")
    return None


def wrong_values(body: dict[str, Any], endpoint: Endpoint) -> Reply | None:
    count = body.get("num_images", 1)
    if type(count) is not int or count < 1:
        return faulty("greater_than_equal", ["num_images"], "Input should be >= 1")
    if count > 4:
        return faulty("less_than_equal", ["num_images"], "Input should be <= 4")
    fine = {
        "image_size": is_size(body.get("image_size", "landscape_4_3"), endpoint),
        "quality": body.get("quality", "high") in endpoint.bases,
        "output_format": body.get("output_format", "png") in {"png", "jpeg", "webp"},
        "background": body.get("background", "auto")
        in {"auto", "opaque", "transparent"},
        "input_fidelity": body.get("input_fidelity", "high") in {"low", "high"},
    }
    for name, right in fine.items():
        if not right:
            return faulty("literal_error", [name], "Input should be one of ...")
    return None


def is_size(size: Any, endpoint: Endpoint) -> bool:
    if size == "auto":
        return endpoint.edit
    if endpoint.sizes_are_words:
        return size in WORD_SIZES
    if isinstance(size, dict):
        # Smaller pictures than fal's are allowed, and keep the tests fast.
        return set(size) == {"width", "height"} and all(
            type(side) is int and 0 < side <= 3840 for side in size.values()
        )
    return size in PRESETS


def wrong_files(body: dict[str, Any]) -> Reply | None:
    urls = body["image_urls"]
    if not isinstance(urls, list) or not urls:
        return faulty("sequence_too_short", ["image_urls"], "At least 1 image")
    if len(urls) > REFERENCES_MAX:
        return faulty("sequence_too_long", ["image_urls"], "At most 16 images")
    mask = body.get("mask_url") or body.get("mask_image_url")
    for url in [*urls, *([mask] if mask else [])]:
        if opened(url) is None:
            return faulty("image_load_error", ["image_urls"], "Failed to load image")
    first = opened(urls[0])
    drawn = opened(mask) if mask else None
    if first and drawn and ("A" not in drawn.mode or drawn.size != first.size):
        return faulty("value_error", ["mask_url"], "The mask does not fit")
    return None


def wrong_prompt(prompt: Any) -> Reply | None:
    if not isinstance(prompt, str) or not prompt:
        return faulty("string_too_short", ["prompt"], "At least 1 character")
    if len(prompt) > PROMPT_MAX_CHARS:
        return faulty("string_too_long", ["prompt"], "At most 32000 characters")
    if "[moderate]" in prompt:
        return faulty(
            "content_policy_violation",
            ["prompt"],
            "The content could not be processed: flagged by a content checker.",
        )
    return None


def file_in(url: str) -> bytes:
    head, _, text = url.partition(",")
    if not re.fullmatch(r"data:image/(png|jpeg|webp);base64", head):
        raise ValueError("this simulator reads data URIs only")
    return base64.b64decode(text, validate=True)


def opened(url: Any) -> Image.Image | None:
    """Look at a data URI's picture; its media type must say the same."""
    try:
        image = Image.open(io.BytesIO(file_in(url)), formats=["PNG", "JPEG", "WEBP"])
    except (ValueError, binascii.Error, OSError, SyntaxError):
        return None
    return image if url.startswith(f"data:{MEDIA_TYPES[str(image.format)]};") else None


# --- answers ---


def says(status: int, detail: str, error_type: str | None = None) -> Reply:
    """Write an error of the queue or of a runner."""
    if error_type is None:
        return Reply.of_json(status, {"detail": detail})
    body = {"detail": detail, "error_type": error_type}
    return Reply.of_json(status, body, {"X-Fal-Error-Type": error_type})


def faulty(kind: str, place: list[str], message: str) -> Reply:
    """Write an error of a model: what is wrong with its input."""
    told = {"loc": ["body", *place], "msg": message, "type": kind, "input": None}
    told["url"] = f"https://docs.fal.ai/errors/#{kind}"
    return Reply.of_json(422, {"detail": [told]}, {"X-Fal-Retryable": "false"})


def usage_of(asked: Asked, endpoint: Endpoint) -> dict[str, Any]:
    text = (len(asked.prompt.split()) + 6) * asked.n
    looked_at = [Image.open(io.BytesIO(file)) for file in asked.references]
    seen = sum(patches(image.width, image.height) for image in looked_at) * asked.n
    base = endpoint.bases[asked.quality]
    output = output_tokens(base, asked.width, asked.height) * asked.n
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": output,
        "total_tokens": text + seen + output,
    }


def dollars(usage: Mapping[str, Any]) -> str:
    """Price the tokens, up to the next cent: one unit is one dollar."""
    details = usage["input_tokens_details"]
    per = DOLLARS_PER_MILLION
    total = (
        details["text_tokens"] * per["text"] + details["image_tokens"] * per["image"]
    )
    total += usage["output_tokens"] * per["output"]
    cents = (Decimal(total) / 10_000).to_integral_value(ROUND_CEILING)
    return str(cents / 100)


def files_of(asked: Asked, fault: Fault) -> list[Reply]:
    media_type = f"image/{asked.format}"
    usual = picture(asked.width, asked.height, asked.format, asked.background)
    made = {
        "text": b"I cannot.",
        "wrong_size": png(asked.width * 2, asked.height),
        "wrong_type": picture(asked.width, asked.height, "webp", "opaque"),
    }
    file = made.get(fault.answer, usual)
    if fault.answer == "big":
        file = png(64, 32, padding=BIG_BYTES)
    count = asked.n + {"one_less": -1, "one_more": 1}.get(fault.answer, 0)
    return [Reply(200, file, media_type) for _ in range(count)]


def result_of(
    asked: Asked, job: Job, places: list[str], usage: dict[str, Any], units: str
) -> Reply:
    fault = job.fault
    if asked.inline or fault.answer in {"inline", "bad_base64"}:
        places = [data_uri(file, fault) for file in job.files]
    host = places[0].split("/files/")[0] if places else ""
    broken = {
        "dead_url": [url.replace("/0.", "/99.") for url in places],
        "foreign_url": [url.replace(host, "http://elsewhere.test") for url in places],
        "file_url": ["file:///etc/passwd"],
    }
    places = broken.get(fault.answer, places)
    images = [
        {
            "url": url,
            "content_type": f"image/{asked.format}",
            "file_name": "image.png",
            "file_size": None,
            "width": asked.width,
            "height": asked.height,
        }
        for url in places
    ]
    changes: dict[str, dict[str, Any]] = {
        "empty": {"images": []},
        "null": {"images": None},
        "error": {"images": None, "detail": "the model is busy"},
        "nothing": {"images": None, "detail": None},
        "no_usage": {"usage": None},
        "negative_usage": {"usage": usage | {"output_tokens": -5}},
    }
    body = {"images": images, "usage": usage} | changes.get(fault.answer, {})
    headers = {"x-fal-billable-units": units, **fault.headers}
    if fault.answer == "gzip":
        packed = zlib.compress(json.dumps(body).encode(), wbits=31)
        return Reply(200, packed, headers=headers | {"Content-Encoding": "gzip"})
    return Reply.of_json(200, body, headers)


def data_uri(file: Reply, fault: Fault) -> str:
    text = base64.b64encode(file.body).decode()
    if fault.answer == "bad_base64":
        text = text[:-8] + "!!!!" + text[-4:]
    return f"data:{file.media_type};base64,{text}"


def spoiled(accepted: dict[str, Any], fault: Fault, simulator: FalSimulator) -> Reply:
    """Turn the answer of a submit into the broken success that was asked for."""
    elsewhere = {
        name: str(value).replace(simulator.origin, "http://elsewhere.test")
        for name, value in accepted.items()
    }
    whole: dict[str, Reply] = {
        "html": Reply(200, b"<html>welcome</html>", "text/html"),
        "error": says(200, "the queue is full"),
        "foreign": Reply.of_json(200, elsewhere),
        "no_links": Reply.of_json(200, {"request_id": accepted["request_id"]}),
        "foreign_id": Reply.of_json(200, elsewhere | {"request_id": "../../x"}),
        "nothing": Reply.of_json(200, {}),
    }
    if fault.answer == "big":
        return Reply.of_json(200, {"request_id": "x" * BIG_BODY_BYTES})
    return whole.get(fault.answer) or Reply.of_json(200, accepted)


if __name__ == "__main__":
    run_by_hand(FalSimulator, KEY)
