"""A pretend api.replicate.com on loopback: predictions, files, and what is delivered.

It is an independent witness: it shares no code with the gateway, checks inputs by its
own reading of the model's schema, and keeps a log of every prediction that was begun,
with whether it is charged. A prediction moves on by one state with each look at it; it
lives as long as the simulator, whoever asks.

Steps that a fault may befall: "" (creating), ``poll``, ``cancel``, ``file``,
``output``.

By hand: ``python -m tests.simulators.replicate_server --port 9004``; then faults can be
scripted with ``POST /_script`` (a JSON list of ``Fault`` fields), purchases read with
``GET /_purchases``, and an hour let go by with ``POST /_hour``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tests.simulators.pictures import big_picture, picture, png
from tests.simulators.server import (
    Fault,
    Part,
    Reply,
    Seen,
    Simulator,
    deliver,
    opened,
    run_by_hand,
    scripted,
    send,
)

KEY = "r8_SimulatedTokenOfTheAccount0123456789"
MODELS = {"openai/gpt-image-2", "openai/gpt-image-1.5"}
CREATE = re.compile(r"/v1/models/([^/]+/[^/]+)/predictions")
PREDICTION = re.compile(r"/v1/predictions/([^/]+)")
CANCEL = re.compile(r"/v1/predictions/([^/]+)/cancel")
FILE = re.compile(r"/v1/files/([^/]+)")
OUTPUT = re.compile(r"/delivery/([^/]+)/(\d+)\.(\w+)")
BODY_FIELDS = {"input", "webhook", "webhook_events_filter", "stream"}
SIZES = {
    "auto": (1024, 1024),
    "1:1": (1024, 1024),
    "3:2": (1536, 1024),
    "2:3": (1024, 1536),
    "16:9": (2048, 1152),
    "9:16": (1152, 2048),
    "1024x1024": (1024, 1024),
    "1536x1024": (1536, 1024),
    "1024x1536": (1024, 1536),
    "2048x2048": (2048, 2048),
    "2048x1152": (2048, 1152),
    "1152x2048": (1152, 2048),
    "3840x2160": (3840, 2160),
    "2160x3840": (2160, 3840),
}
CHOICES = {
    "quality": {"low", "medium", "high", "auto"},
    "aspect_ratio": set(SIZES),
    "background": {"auto", "opaque"},
    "moderation": {"auto", "low"},
    "output_format": {"webp", "png", "jpeg"},
}
FREE = {"prompt", "user_id", "openai_api_key", "input_images"}
NUMBERS = {"number_of_images": (1, 10), "output_compression": (0, 100)}
PRICES_USD = {"low": "0.02", "medium": "0.07", "high": "0.25", "auto": "0.25"}
"""Of each picture, by quality; made up, nobody publishes them."""
DATA_URI_MAX_BYTES = 256 * 1024
IMAGES_MAX = 16
RUNNING = {"starting", "processing"}
USUAL = ("starting", "processing", "succeeded")
COURSES = {
    "failed": ("starting", "processing", "failed"),
    "canceled": ("starting", "processing", "canceled"),
    "aborted": ("starting", "aborted"),
    "stuck": ("starting", "processing"),
    "waiting": ("starting",),
    "backwards": ("processing", "starting", "processing", "succeeded"),
    "unknown_state": ("starting", "pondering", "succeeded"),
}
"""The states that a prediction goes through, by the answer that a fault asks for."""


@dataclass
class Purchase:
    """Pictures that the account is billed for, unless the job ended without charge.

    ``references`` are the SHA-256 of the pictures as the model got them.
    """

    prediction: str
    model: str
    aspect_ratio: str
    quality: str
    n: int
    operation: str
    references: tuple[str, ...] = ()
    billed: bool = True
    prompt: str = field(default="", compare=False)


@dataclass
class Job:
    """A prediction as Replicate keeps it."""

    id: str
    model: str
    input: Mapping[str, Any]
    purchase: Purchase
    fault: Fault
    states: list[str]
    error: str | None = None
    cancel_at_s: float | None = None
    ready_at_s: float = 0.0
    removed: bool = False
    files: list[tuple[bytes, str]] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.states[0]

    def step(self, now_s: float) -> None:
        """Move on by one state, if time allows."""
        if self.state not in {*RUNNING, "pondering"}:
            return
        if self.cancel_at_s is not None and now_s >= self.cancel_at_s:
            self.end("aborted" if self.state == "starting" else "canceled")
        elif len(self.states) > 1 and not (
            self.states[1] not in RUNNING and now_s < self.ready_at_s
        ):
            self.states.pop(0)
        self.settle()

    def end(self, state: str) -> None:
        self.states = [state]
        self.settle()

    def settle(self) -> None:
        if self.state in {"failed", "aborted"}:
            self.purchase.billed = False


@dataclass
class ReplicateSimulator(Simulator):
    """A running simulator, as tests see it."""

    key: str = KEY
    jobs: dict[str, Job] = field(default_factory=dict)
    uploads: dict[str, Part] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    prefix = "/v1"

    def bill_usd(self, purchase: Purchase) -> Decimal:
        each = Decimal(PRICES_USD[purchase.quality]) * purchase.n
        return each if purchase.billed else Decimal(0)

    @property
    def billed(self) -> int:
        """How many pictures the account is charged for."""
        return sum(bought.n for bought in self.purchases if bought.billed)

    def let_an_hour_pass(self) -> None:
        """Delete all data, as Replicate does an hour after the end."""
        for job in self.jobs.values():
            job.removed = True
            job.files = []
        self.uploads.clear()

    def sells_at(self, path: str) -> bool:
        return CREATE.fullmatch(path) is not None

    def uploads_at(self, path: str) -> str | None:
        return step_of("POST", path)

    def steer(self, seen: Seen) -> Reply:
        if seen.path == "/_hour" and seen.method == "POST":
            self.let_an_hour_pass()
            return Reply.of_json(200, {})
        return super().steer(seen)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        self.requests.append(seen)
        step = step_of(seen.method, seen.route)
        if step is None:
            return await send(writer, problem(404, "Not found", NOT_FOUND))
        if step == "output":
            refused = check_no_credential(seen)
        else:
            refused = check_credential(seen, self.key)
        if refused is not None:
            return await send(writer, refused)
        if step == "":
            return await self.create(seen, writer)
        if step == "probe":
            return await self.tell(None, {"type": "user", "username": "sim"}, writer)
        fault = self.fault(step)
        await asyncio.sleep(fault.delay_s)
        if fault.status is not None:
            return await deliver(writer, scripted(fault), fault)
        steps = {
            "poll": self.look,
            "cancel": self.cancel,
            "file": self.keep,
            "output": self.hand_out,
        }
        return await deliver(writer, spoiled(steps[step](seen), fault), fault)

    async def create(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault()
        refused = check_headers(seen) or check_body(seen)
        if refused is not None:
            return await send(writer, refused)
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await deliver(writer, scripted(fault), fault)
        job = self.begin(seen, fault)
        await asyncio.sleep(fault.delay_s)
        wait_s = waits(seen)
        if wait_s and fault.answer != "overrun":
            # Held open: the answer shows where the prediction has got to.
            await asyncio.sleep(min(wait_s, self.latency_s))
            while len(job.states) > 1 and job.state != "pondering":
                job.step(self.now_s())
                if self.now_s() < job.ready_at_s:
                    break
        whole = {
            "html": Reply(200, b"<html><body>Bad gateway</body></html>", "text/html"),
            "error": Reply.of_json(200, {"detail": "upstream busy", "status": 500}),
            "no_id": Reply.of_json(201, {"status": "starting"}),
        }
        status = 201 if job.state not in RUNNING else 202
        logs = {"logs": "x" * 10_000_000} if fault.answer == "long" else {}
        usual = Reply.of_json(status, self.shown(job) | logs)
        told = whole.get(fault.answer, usual)
        return await deliver(writer, told, fault)

    def begin(self, seen: Seen, fault: Fault) -> Job:
        match = CREATE.fullmatch(seen.route)
        assert match is not None
        given: dict[str, Any] = seen.json()["input"]
        number = len(self.jobs) + 1
        sources = [self.source(link) for link in given.get("input_images", [])]
        purchase = Purchase(
            f"p{number:025d}",
            match[1],
            given.get("aspect_ratio", "1:1"),
            given.get("quality", "auto"),
            given.get("number_of_images", 1),
            "edit" if sources else "generate",
            references=tuple(part.sha256 for part in sources if part is not None),
            prompt=given["prompt"],
        )
        states = list(COURSES.get(fault.answer, USUAL))
        error = str(fault.body) if fault.answer == "failed" else None
        if any(part is None or opened(part) is None for part in sources):
            states, error = ["starting", "failed"], INVALID
        elif "[moderate]" in given["prompt"]:
            states, error = ["starting", "failed"], FLAGGED
        now_s = self.now_s()
        job = Job(
            purchase.prediction,
            purchase.model,
            given,
            purchase,
            fault,
            states,
            error=error,
            cancel_at_s=now_s + seconds_of(seen.headers["cancel-after"])
            if "cancel-after" in seen.headers
            else None,
            ready_at_s=now_s + self.latency_s,
            files=made(given, fault),
        )
        self.jobs[job.id] = job
        self.purchases.append(purchase)
        return job

    def source(self, link: str) -> Part | None:
        """Get a reference as the model would: out of the link, or from our files."""
        if link.startswith("data:"):
            head, _, text = link.removeprefix("data:").partition(",")
            kind = head.removesuffix(";base64")
            content = base64.b64decode(text)
            part = Part("content", f"x.{kind.removeprefix('image/')}", kind)
            part.take(content)
            return part
        return self.uploads.get(link.removeprefix(f"{self.base_url}/files/"))

    def look(self, seen: Seen) -> Reply:
        match = PREDICTION.fullmatch(seen.route)
        assert match is not None
        job = self.jobs.get(match[1])
        if job is None:
            return problem(404, "Not found", NOT_FOUND)
        job.step(self.now_s())
        return Reply.of_json(200, self.shown(job))

    def cancel(self, seen: Seen) -> Reply:
        match = CANCEL.fullmatch(seen.route)
        assert match is not None
        job = self.jobs.get(match[1])
        if job is None:
            return problem(404, "Not found", NOT_FOUND)
        if job.state in RUNNING:
            job.end("aborted" if job.state == "starting" else "canceled")
        return Reply.of_json(200, self.shown(job))

    def keep(self, seen: Seen) -> Reply:
        if seen.method == "GET":
            match = FILE.fullmatch(seen.route)
            part = self.uploads.get(match[1]) if match else None
            if match is None or part is None:
                return problem(404, "Not found", NOT_FOUND)
            return Reply.of_json(200, self.file_shown(match[1], part))
        (part,) = [part for part in seen.form if part.name == "content"]
        name = f"f{len(self.uploads) + 1:025d}"
        self.uploads[name] = part
        return Reply.of_json(201, self.file_shown(name, part))

    def hand_out(self, seen: Seen) -> Reply:
        match = OUTPUT.fullmatch(seen.route)
        assert match is not None
        job = self.jobs.get(match[1])
        files = job.files if job is not None else []
        if int(match[2]) >= len(files):
            return Reply(404, b"Not found", "text/plain")
        content, kind = files[int(match[2])]
        return Reply(200, content, kind)

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def shown(self, job: Job) -> dict[str, Any]:
        """Write a prediction as Replicate does."""
        over = job.state not in {*RUNNING, "pondering"}
        get = f"{self.base_url}/predictions/{job.id}"
        if job.fault.answer == "foreign_urls":
            get = f"http://localhost.example/v1/predictions/{job.id}"
        times = {"predict_time": 12.5, "total_time": 13.25}
        told: dict[str, Any] = {
            "id": job.id,
            "model": job.model,
            "version": "hidden",
            "input": {} if job.removed else dict(job.input),
            "logs": "",
            "output": self.output(job) if job.state == "succeeded" else None,
            "data_removed": job.removed,
            "error": job.error if job.state == "failed" else None,
            "status": job.state,
            "created_at": "2026-11-25T00:00:00.000Z",
            "started_at": None if job.state == "starting" else "2026-11-25T00:00:01Z",
            "completed_at": "2026-11-25T00:00:13Z" if over else None,
            "urls": {
                "get": get,
                "cancel": f"{get}/cancel",
                "web": f"https://replicate.com/p/{job.id}",
            },
            "metrics": times if over else {},
        }
        if job.fault.answer == "negative_usage":
            told["metrics"] = {"input_token_count": -5, "output_token_count": -5}
        if job.fault.answer == "no_urls":
            del told["urls"]
        return told

    def output(self, job: Job) -> Any:
        if job.removed:
            return None
        links = [
            f"{self.origin}/delivery/{job.id}/{index}.{kind.partition('/')[2]}"
            for index, (_, kind) in enumerate(job.files)
        ]
        content, kind = job.files[0] if job.files else (b"", "")
        text = base64.b64encode(content).decode()
        changed: dict[str, Any] = {
            "empty": [],
            "null": None,
            "one_link": links[0],
            "one_less": links[1:],
            "one_more": [*links, links[0]],
            "dead_link": [f"{self.origin}/delivery/{job.id}/99.png"],
            "foreign_link": ["http://localhost.example/delivery/1.png"],
            "data_uri": [f"data:{kind};base64,{text}"],
            "bad_base64": [f"data:{kind};base64,{text[:-8]}!!!!{text[-4:]}"],
            "objects": [{"nothing": 1}],
        }
        return changed.get(job.fault.answer, links)

    def file_shown(self, name: str, part: Part) -> dict[str, Any]:
        return {
            "id": name,
            "name": part.filename,
            "content_type": part.media_type,
            "size": part.size_bytes,
            "etag": part.sha256[:32],
            "checksums": {"sha256": part.sha256},
            "metadata": {},
            "created_at": "2026-11-25T00:00:00.000Z",
            "expires_at": "2026-11-26T00:00:00.000Z",
            "urls": {"get": f"{self.base_url}/files/{name}"},
        }


NOT_FOUND = "The requested resource could not be found."
INVALID = "The input was invalid. (E006)"
FLAGGED = (
    "The input or output was flagged as sensitive. "
    "Please try again with different inputs. (E005) (aB3dE5fG7h)"
)


def step_of(method: str, path: str) -> str | None:
    """Name the step that a request belongs to."""
    steps = {
        ("POST", CREATE): "",
        ("GET", PREDICTION): "poll",
        ("POST", CANCEL): "cancel",
        ("POST", re.compile("/v1/files")): "file",
        ("GET", FILE): "file",
        ("GET", OUTPUT): "output",
        ("GET", re.compile("/v1/account")): "probe",
    }
    return next(
        (
            step
            for (verb, pattern), step in steps.items()
            if verb == method and pattern.fullmatch(path)
        ),
        None,
    )


# --- what is wrong with a request ---


def check_credential(seen: Seen, key: str) -> Reply | None:
    told = seen.headers.get("authorization", "")
    if told in {f"Bearer {key}", f"Token {key}"}:
        return None
    return problem(
        401, "Unauthenticated", "You did not pass a valid authentication token"
    )


def check_no_credential(seen: Seen) -> Reply | None:
    """Deliver to anybody, and to nobody who shows a credential: it is not for us."""
    return (
        Reply(400, b"no credentials here") if "authorization" in seen.headers else None
    )


def check_headers(seen: Seen) -> Reply | None:
    wait = re.fullmatch(r"wait(?:=(\d+))?", seen.headers.get("prefer", "wait"))
    if wait is None or not 1 <= int(wait[1] or 60) <= 60:
        return problem(422, "Invalid header", "Prefer must be wait or wait=1..60")
    after = seen.headers.get("cancel-after")
    if after is not None and not 5 <= seconds_of(after) <= 24 * 3600:
        return problem(422, "Invalid header", "Cancel-After must be 5s to 24h")
    return None


def check_body(seen: Seen) -> Reply | None:
    match = CREATE.fullmatch(seen.route)
    if match is None or match[1] not in MODELS:
        return problem(404, "Not found", NOT_FOUND)
    try:
        body = seen.json()
    except ValueError:
        return problem(400, "Bad request", "The request body is not valid JSON.")
    if not isinstance(body, dict) or set(body) - BODY_FIELDS:
        return invalid("input", "additional properties are not allowed")
    given = body.get("input")
    if not isinstance(given, dict):
        return invalid("input", "input is required")
    return check_input(given) or check_images(given.get("input_images", []))


def check_input(given: dict[str, Any]) -> Reply | None:
    if not isinstance(given.get("prompt"), str) or not given["prompt"]:
        return invalid("input", "prompt is required")
    for name, value in given.items():
        if name in CHOICES and value not in CHOICES[name]:
            listed = ", ".join(f'"{one}"' for one in sorted(CHOICES[name]))
            return invalid(
                f"input.{name}", f"{name} must be one of the following: {listed}"
            )
        if name in NUMBERS:
            low, high = NUMBERS[name]
            if type(value) is not int or not low <= value <= high:
                return invalid(f"input.{name}", f"{name} must be {low} to {high}")
        if name not in {*CHOICES, *NUMBERS, *FREE}:
            return invalid("input", f"Additional property {name} is not allowed")
    return None


def check_images(links: Any) -> Reply | None:
    if not isinstance(links, list) or len(links) > IMAGES_MAX:
        return invalid("input.input_images", f"at most {IMAGES_MAX} images")
    for link in links:
        if not isinstance(link, str) or not re.match("data:|https?://", link):
            return invalid("input.input_images", "Does not match format 'uri'")
        if link.startswith("data:"):
            try:
                content = base64.b64decode(link.partition(",")[2], validate=True)
            except binascii.Error:
                return invalid("input.input_images", "Does not match format 'uri'")
            if len(content) > DATA_URI_MAX_BYTES:
                return invalid("input.input_images", "data URIs are for small files")
    return None


def invalid(place: str, why: str) -> Reply:
    told = {
        "title": "Input validation failed",
        "detail": f"- {place}: {why}\n",
        "status": 422,
        "invalid_fields": [{"field": place, "description": why}],
    }
    return Reply.of_json(422, told)


def problem(status: int, title: str, detail: str) -> Reply:
    return Reply.of_json(status, {"title": title, "detail": detail, "status": status})


def throttled(seconds: int) -> Fault:
    """Refuse as Replicate does: the time to wait stands in the text only."""
    detail = f"Request was throttled. Your rate limit resets in ~{seconds}s."
    return Fault(status=429, body={"detail": detail, "status": 429})


# --- answers ---


def waits(seen: Seen) -> int:
    if "prefer" not in seen.headers:
        return 0
    return int(seen.headers["prefer"].partition("=")[2] or 60)


def seconds_of(text: str) -> int:
    """Read a duration such as 90s or 1h30m; 0 when it is none."""
    if re.fullmatch(r"(?:\d+h)?(?:\d+m)?(?:\d+s)?", text) is None:
        return 0
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([hms])", text))


def made(given: Mapping[str, Any], fault: Fault) -> list[tuple[bytes, str]]:
    """Make the pictures, or what a fault puts in their place."""
    kind = given.get("output_format", "webp")
    count = given.get("number_of_images", 1)
    width, height = SIZES[given.get("aspect_ratio", "1:1")]
    if fault.answer == "text":
        return [(b"I cannot.", "text/plain")]
    if fault.answer == "big":
        return [(base64.b64decode(big_picture()), "image/png")] * count
    if fault.answer == "other_size":
        return [(png(64, 32), "image/png")]
    if fault.answer == "other_type":
        kind = "webp" if kind == "png" else "png"
    file = picture(width, height, kind, "opaque")
    return [(file, f"image/{kind}")] * count


def spoiled(reply: Reply, fault: Fault) -> Reply:
    """Turn a good answer of a later step into the broken one that was asked for."""
    if fault.answer == "html":
        return Reply(200, b"<html><body>Bad gateway</body></html>", "text/html")
    if fault.answer == "error":
        return Reply.of_json(200, {"detail": "upstream busy", "status": 500})
    if fault.answer == "foreign_urls":
        told = json.loads(reply.body)
        told["urls"] = {"get": "http://localhost.example/v1/files/1"}
        return Reply.of_json(reply.status, told)
    return reply


if __name__ == "__main__":
    run_by_hand(ReplicateSimulator, KEY)
