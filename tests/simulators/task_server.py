"""A pretend EvoLink on loopback: tasks, their links, and what is charged for them.

It is an independent witness: it shares no code with the gateway, counts credits by its
own reading of the published price card, and keeps a log of every job that was bought.
Tasks live here, so they outlive whoever submitted them. Its look-alikes, APIMart and
new-api, put the same in other words.

By hand: ``python -m tests.simulators.task_server --port 9005 --latency-s 2`` (a task
takes so long); faults are scripted with ``POST /_script`` (a JSON list of ``Fault``
fields), purchases read with ``GET /_purchases``.

A fault's ``on`` is empty for the submission, else ``poll``, ``download`` or ``upload``.
Its ``answer`` may also be, of a submission or a poll: ``failed`` or ``cancelled`` (the
task ends so, ``body`` is laid over what is told of it), ``state`` (``body`` is told as
the state, once), ``foreign_url``, ``expired`` (links to files that are gone),
``other_picture`` (a small WebP), ``no_id``, ``huge``.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from PIL import Image

from tests.simulators.pictures import big_picture, output_tokens, patches, picture
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

KEY = "sk-evo-simulated-key-0123456789"
MODELS = {
    "gpt-image-2": {"low": 16, "medium": 48, "high": 96},
    "gpt-image-2-beta": {"": 48},
    "gpt-image-1.5": {"low": 16, "medium": 48, "high": 96},
    "gpt-image-2.5-flare": {
        "low": 16,
        "medium": 24,
        "high": 48,
        "xhigh": 64,
        "max": 96,
    },
}
BASIC_FIELDS = {"model", "prompt", "size", "n", "callback_url", "image_urls"}
FIELDS = {
    "gpt-image-2-beta": BASIC_FIELDS,
    "gpt-image-1.5": BASIC_FIELDS | {"quality"},
    "": BASIC_FIELDS
    | {"quality", "resolution", "background", "output_format", "mask_url"},
}
RATIOS = {"1:1": (1024, 1024), "16:9": (1360, 768), "9:16": (768, 1360)}
"""At 1K; enough of EvoLink's fifteen."""
SIZES_15 = {"1:1", "2:3", "3:2", "1024x1024", "1024x1536", "1536x1024"}
NEW_API_STATES = {
    "processing": "IN_PROGRESS",
    "completed": "SUCCESS",
    "failed": "FAILURE",
}
PIXELS = range(655_360, 8_294_400 + 1)
PROMPT_MAX_CHARS = 32_000
IMAGES_MAX = 16
IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")
UC_PER_CREDIT = 10_000
CREDITS_PER_USD = 68
UC_PER_1K_OUTPUT = 18_360
UC_PER_1K_IMAGE = 4_896
UC_PER_1K_TEXT = 3_060
UPLOAD_PATH = "/api/v1/files/upload/stream"
FILE_URL_LIFE_S = 72 * 3600


@dataclass
class Purchase:
    """A job that the account was charged for, or has credits reserved for.

    ``charge`` is ``reserved``, ``charged`` or ``released``; ``references`` and ``mask``
    are the SHA-256 of the files that arrived.
    """

    task_id: str
    idempotency_key: str | None
    model: str
    size: str
    quality: str
    n: int
    credits: str
    charge: str = "reserved"
    operation: str = "generate"
    references: tuple[str, ...] = ()
    mask: str | None = None
    prompt: str = field(default="", compare=False)


@dataclass
class Task:
    """A task as the server keeps it."""

    task_id: str
    body: dict[str, Any]
    width: int
    height: int
    created_s: float
    reserved_uc: int
    answer: str
    purchase: Purchase
    ended: str = ""
    """``failed`` or ``cancelled``, when it is."""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def format(self) -> str:
        return str(self.body.get("output_format", "png"))


@dataclass
class TaskSimulator(Simulator):
    """A running simulator, as tests see it."""

    key: str = KEY
    tasks: dict[str, Task] = field(default_factory=dict)
    by_key: dict[str, Task] = field(default_factory=dict)
    files: dict[str, Part] = field(default_factory=dict)
    """What was uploaded, by its URL."""
    credits_left: float = 1000.0

    prefix = "/v1"
    submit_path = "/v1/images/generations"
    tasks_path = "/v1/tasks/"
    id_prefix = "task-unified-"
    honours_keys = True

    def bill_usd(self, purchase: Purchase) -> Decimal:
        # Credits; what is still reserved is not charged yet.
        charged = Decimal(purchase.credits) if purchase.charge == "charged" else 0
        return Decimal(charged) / CREDITS_PER_USD

    def sells_at(self, path: str) -> bool:
        # An upload can be cut off as well, though it buys nothing.
        return path in {self.submit_path, UPLOAD_PATH}

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.route.startswith("/results/"):
            return await self.result(seen, writer)
        self.requests.append(seen)
        if seen.headers.get("authorization") != f"Bearer {self.key}":
            told = seen.headers.get("authorization", "nothing")
            return await send(
                writer,
                error(401, "unauthorized", f"Invalid: {told}", "authentication_error"),
            )
        if seen.method == "POST" and seen.route == self.submit_path:
            return await self.submit(seen, writer)
        if seen.method == "POST" and seen.route == UPLOAD_PATH and self.honours_keys:
            return await self.upload(seen, writer)
        return await self.ask(seen, writer)

    async def ask(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.method == "GET" and seen.route.startswith(self.tasks_path):
            return await self.look(seen, writer)
        if seen.method == "GET" and seen.route == "/v1/credits" and self.honours_keys:
            return await self.tell(None, self.account(), writer)
        return await send(writer, error(404, "not_found", "Unknown URL."))

    def account(self) -> dict[str, Any]:
        """Tell what is left, of the account and of the key."""
        used = {"used_credits": 1.5}
        user = {"remaining_credits": self.credits_left, **used}
        token = {"remaining_credits": 0, **used, "unlimited_credits": True}
        return {"success": True, "message": "", "data": {"token": token, "user": user}}

    async def submit(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault()
        refused = self.check(seen)
        if refused is not None:
            return await send(writer, refused)
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await send(writer, scripted(fault))
        key = seen.headers.get("idempotency-key") if self.honours_keys else None
        known = self.by_key.get(key) if key else None
        if known is not None and known.body != seen.json():
            told = "The key was used for another request."
            return await send(writer, error(409, "idempotency_conflict", told))
        task = known or self.sell(seen, key, fault)
        headers = {"Idempotency-Replayed": "true"} if known else {}
        reply = Reply.of_json(200, self.created(task), headers)
        return await deliver(writer, spoil(reply, fault), fault)

    async def upload(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault("upload")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        files = [part for part in seen.form if part.filename is not None]
        if [part.name for part in files] != ["file"] or opened(files[0]) is None:
            return await send(writer, file_error(400, "Unsupported file type"))
        name = f"{secrets.token_hex(8)}-{files[0].filename}"
        url = f"{self.origin}/files/{name}"
        self.files[url] = files[0]
        now_s = int(time.time())
        data = {
            "file_id": f"file_{secrets.token_hex(8)}",
            "file_name": name,
            "original_name": files[0].filename,
            "file_size": files[0].size_bytes,
            "mime_type": files[0].media_type,
            "upload_path": "",
            "file_url": url,
            "download_url": f"{url}?download=1",
            "upload_time": stamp(now_s),
            "expires_at": stamp(now_s + FILE_URL_LIFE_S),
        }
        told = {"success": True, "code": 200, "msg": "ok", "data": data}
        return await deliver(writer, spoil(Reply.of_json(200, told), fault), fault)

    def sell(self, seen: Seen, key: str | None, fault: Fault) -> Task:
        body = seen.json()
        width, height = size_of(body)
        name = f"{self.id_prefix}{int(time.time())}-{secrets.token_hex(4)}"
        quality = body.get("quality", "medium")
        bases = MODELS[body["model"]]
        n = body.get("n", 1)
        images = [self.file_at(url) for url in body.get("image_urls", [])]
        mask = self.file_at(body["mask_url"]) if "mask_url" in body else None
        cost_uc = (
            charged(
                n * output_tokens(bases.get(quality, 48), width, height),
                UC_PER_1K_OUTPUT,
            )
            + charged(n * (len(body["prompt"].split()) + 6), UC_PER_1K_TEXT)
            + charged(n * sum(map(seen_patches, images)), UC_PER_1K_IMAGE)
        )
        purchase = Purchase(
            name,
            key,
            body["model"],
            f"{width}x{height}",
            quality,
            n,
            credits_of(cost_uc),
            operation="edit" if images else "generate",
            references=tuple(part.sha256 for part in images),
            mask=mask.sha256 if mask else None,
            prompt=body["prompt"],
        )
        task = Task(
            name,
            body,
            width,
            height,
            time.monotonic(),
            cost_uc,
            fault.answer,
            purchase,
        )
        if fault.answer in {"failed", "cancelled"}:
            end(task, fault)
        self.tasks[name] = task
        if key:
            self.by_key[key] = task
        self.purchases.append(purchase)
        return task

    def file_at(self, url: str) -> Part:
        """Fetch a reference: a data URI, or what was uploaded here."""
        if not url.startswith("data:"):
            return self.files[url]
        head, _, text = url.removeprefix("data:").partition(";base64,")
        part = Part("image", f"image.{head.removeprefix('image/')}", head)
        part.take(base64.b64decode(text, validate=True))
        return part

    async def look(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault("poll")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        name = seen.route.removeprefix(self.tasks_path)
        if not name.startswith(self.id_prefix):
            told = error(400, "invalid_task_id", "Invalid task id.")
            return await send(writer, told)
        task = self.tasks.get(name)
        if task is None:
            return await send(writer, error(404, "task_not_found", "No such task."))
        if fault.answer in {"failed", "cancelled"}:
            end(task, fault)
        elif fault.answer not in {"ok", "state", "html", "error", "huge"}:
            task.answer = fault.answer
        reply = Reply.of_json(200, self.told(task, self.state_of(task, fault)))
        return await deliver(writer, spoil(reply, fault), fault)

    def state_of(self, task: Task, fault: Fault) -> str:
        if fault.answer == "state":
            return str(fault.body)
        if task.ended:
            return task.ended
        age_s = time.monotonic() - task.created_s
        if age_s < self.latency_s:
            return "processing"
        task.purchase.charge = "charged"
        return "completed"

    async def result(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault("download")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        name, _, place = seen.route.removeprefix("/results/").partition("/")
        task = self.tasks.get(name)
        if task is None or task.answer == "expired" or not place[:1].isdecimal():
            return await send(writer, Reply(403, b"<Error>Expired</Error>", "text/xml"))
        return await deliver(writer, file_of(task), fault)

    def links_of(self, task: Task) -> list[str]:
        place = {"dead_url": "none"}.get(task.answer)
        count = task.n - (task.answer == "one_less")
        count = 0 if task.answer == "empty" else count
        origin = self.origin
        if task.answer == "foreign_url":
            origin = "http://elsewhere.test"
        return [
            f"{origin}/results/{task.task_id}/{place or index}.{task.format}"
            for index in range(count)
        ]

    # --- in EvoLink's words ---

    def check(self, seen: Seen) -> Reply | None:
        key = seen.headers.get("idempotency-key")
        if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
            return error(400, "invalid_request", "Invalid Idempotency-Key.")
        return check(seen) or self.check_images(seen.json())

    def check_images(self, body: dict[str, Any]) -> Reply | None:
        # The real one looks at them later, when the task runs.
        urls = body.get("image_urls", [])
        masked = [body["mask_url"]] if "mask_url" in body else []
        if "image_urls" in body and not 1 <= len(urls) <= IMAGES_MAX:
            return error(400, "invalid_request", "1 to 16 image_urls.")
        if any(url not in self.files for url in (*urls, *masked)):
            return error(400, "invalid_request", "An image cannot be fetched.")
        return None

    def created(self, task: Task) -> dict[str, Any]:
        told = {
            "created": int(time.time()),
            "id": task.task_id,
            "model": task.body["model"],
            "object": "image.generation.task",
            "progress": 0,
            "status": "pending",
            "task_info": {"can_cancel": True, "estimated_time": 100},
            "type": "image",
            "usage": {
                "billing_rule": "per_token",
                "credits_reserved": number(task.reserved_uc),
                "user_group": "default",
            },
        }
        if task.answer == "no_id":
            del told["id"]
        return told

    def told(self, task: Task, state: str) -> dict[str, Any]:
        """Tell of a task, as it stands now."""
        told = self.created(task) | {"status": state}
        del told["usage"]
        told["progress"] = 100 if state == "completed" else 50
        told["billing"] = {
            "refund_scope": "account_balance",
            "charge_status": task.purchase.charge,
            "refund_status": "not_required",
            "reserved_credits": number(task.reserved_uc),
        }
        if state == "completed":
            told["results"] = self.links_of(task)
            told["billing"]["charged_credits"] = number(task.reserved_uc)
            told["usage"] = self.usage_of(task)
        return told | task.more

    def usage_of(self, task: Task) -> dict[str, Any]:
        used = number(task.reserved_uc)
        usd = round(task.reserved_uc / UC_PER_CREDIT / 68, 4)
        return {"credits_used": used, "cost": {"credits": used, "usd": usd}}


class ApimartSimulator(TaskSimulator):
    """The same in APIMart's words: everything in ``data``, and an array per link."""

    id_prefix = "task_"
    honours_keys = False

    def check(self, seen: Seen) -> Reply | None:
        body = seen.json()
        unknown = set(body) - (BASIC_FIELDS | {"quality", "resolution", "mask_url"})
        urls = body.get("image_urls", [])
        if unknown or body.get("model") not in MODELS or body.get("n", 1) != 1:
            return error(400, "invalid_request_error", f"Wrong: {unknown}")
        if any(opened(self.file_at(url)) is None for url in urls):
            return error(400, "invalid_request_error", "invalid image content")
        return None

    def created(self, task: Task) -> dict[str, Any]:
        one = {"status": "submitted", "task_id": task.task_id}
        return {"code": 200, "data": [one]}

    def told(self, task: Task, state: str) -> dict[str, Any]:
        data: dict[str, Any] = {
            "id": task.task_id,
            "status": state,
            "progress": 100 if state == "completed" else 50,
            "created": int(time.time()),
            "estimated_time": 100,
        }
        if state == "completed":
            data["cost"] = round(task.reserved_uc / UC_PER_CREDIT / 68, 5)
            data["credits_cost"] = number(task.reserved_uc)
            data["result"] = {
                "images": [
                    {"url": [link], "expires_at": int(time.time()) + 86_400}
                    for link in self.links_of(task)
                ]
            }
        return {"code": 200, "data": data | task.more}


class NewApiSimulator(TaskSimulator):
    """The same in new-api's words: OpenAI's answer inside a task, in capitals."""

    id_prefix = "imgtask-"
    tasks_path = "/v1/images/tasks/"
    honours_keys = False
    inline = False
    """Whether pictures come as base64."""

    def check(self, seen: Seen) -> Reply | None:
        if seen.query.get("async") != "true":
            return error(400, "invalid_request", "Synchronous here.")
        return check(seen)

    def created(self, task: Task) -> dict[str, Any]:
        one = {
            "task_id": task.task_id,
            "status": "queued",
            "poll_url": f"http://elsewhere.test/v1/images/tasks/{task.task_id}",
        }
        return {"code": "success", "message": "", "data": one}

    def told(self, task: Task, state: str) -> dict[str, Any]:
        data: dict[str, Any] = {
            "task_id": task.task_id,
            "platform": "image",
            "action": "GENERATE",
            "status": NEW_API_STATES.get(state, state),
            "fail_reason": "",
            "progress": "100%" if state == "completed" else "50%",
            "data": None,
        }
        if state == "completed":
            text = base64.b64encode(file_of(task).body).decode()
            data["data"] = {
                "created": int(time.time()),
                "data": [
                    {"b64_json": text} if self.inline else {"url": link}
                    for link in self.links_of(task)
                ],
                "usage": self.usage_of(task),
            }
        return {"code": "success", "message": "", "data": data | task.more}

    def usage_of(self, task: Task) -> dict[str, Any]:
        bases = MODELS[task.body["model"]]
        image = output_tokens(bases[task.purchase.quality], task.width, task.height)
        text = len(task.body["prompt"].split()) + 6
        return {
            "input_tokens": text * task.n,
            "input_tokens_details": {"text_tokens": text * task.n, "image_tokens": 0},
            "output_tokens": image * task.n,
            "total_tokens": (text + image) * task.n,
        }


def end(task: Task, fault: Fault) -> None:
    """Let a task fail: what was reserved is released, unless the script says else."""
    task.ended = fault.answer
    task.more = fault.body or {}
    charge = task.more.get("billing", {}).get("charge_status", "released")
    task.purchase.charge = charge


def file_of(task: Task) -> Reply:
    if task.answer == "text":
        return Reply(200, b"I cannot.", "text/plain")
    if task.answer == "big":
        return Reply(200, base64.b64decode(big_picture()), "image/png")
    if task.answer == "other_picture":
        return Reply(200, picture(64, 32, "webp", "opaque"), "image/webp")
    background = task.body.get("background", "opaque")
    file = picture(task.width, task.height, task.format, background)
    return Reply(200, file, f"image/{task.format}")


def stamp(at_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


def charged(tokens: int, uc_per_1k: int) -> int:
    """Round each part up to a whole unit, as the price card says."""
    return math.ceil(Fraction(tokens * uc_per_1k, 1000))


def credits_of(uc: int) -> str:
    return f"{uc // UC_PER_CREDIT}.{uc % UC_PER_CREDIT:04d}"


def number(uc: int) -> float:
    return float(credits_of(uc))


def seen_patches(part: Part) -> int:
    with Image.open(io.BytesIO(part.head)) as image:
        return patches(image.width, image.height)


def size_of(body: dict[str, Any]) -> tuple[int, int]:
    size = body.get("size", "auto")
    if size == "auto":
        return 1024, 1024
    if size in RATIOS:
        return RATIOS[size]
    width, height = map(int, re.split("[x\u00d7]", size))
    return width, height


def check(seen: Seen) -> Reply | None:
    try:
        body = seen.json()
    except ValueError:
        return error(400, "invalid_request", "The body is not JSON.")
    model = body.get("model")
    if model not in MODELS:
        return error(404, "model_not_found", f"Model {model} not found.")
    unknown = set(body) - FIELDS.get(model, FIELDS[""])
    if unknown:
        return error(400, "invalid_request", f"Unknown field: {unknown.pop()}")
    n = body.get("n", 1)
    rules = {
        "size": "size" not in body or is_size(body["size"], model),
        "quality": "quality" not in body or body["quality"] in MODELS[model],
        "n": type(n) is int and 1 <= n <= (10 if model not in FIELDS else 1),
        "output_format": body.get("output_format", "png") in {"png", "jpeg", "webp"},
        "background": body.get("background", "opaque") == "opaque"
        or (
            body["background"] == "transparent" and body.get("output_format") != "jpeg"
        ),
        "prompt": isinstance(body.get("prompt"), str)
        and 0 < len(body["prompt"]) <= PROMPT_MAX_CHARS,
    }
    for name, right in rules.items():
        if not right:
            return error(400, "invalid_request", f"Invalid value for {name}.")
    if "[moderate]" in body["prompt"]:
        return error(400, "content_policy_violation", "Blocked by safety filters.")
    return None


def is_size(size: Any, model: str) -> bool:
    if size == "auto":
        return model != "gpt-image-1.5"
    if model == "gpt-image-1.5":
        return size in SIZES_15
    if size in RATIOS or model == "gpt-image-2-beta":
        return size in RATIOS
    if not isinstance(size, str) or not re.fullmatch(r"\d{2,4}[x\u00d7]\d{2,4}", size):
        return False
    width, height = size_of({"size": size})
    short, long = sorted((width, height))
    return (
        width * height in PIXELS
        and width % 16 == 0 == height % 16
        and long <= 3840
        and long <= 3 * short
    )


def error(
    status: int, code: str, message: str, kind: str = "invalid_request_error"
) -> Reply:
    return Reply.of_json(
        status, {"error": {"code": code, "message": message, "type": kind}}
    )


def file_error(status: int, message: str) -> Reply:
    return Reply.of_json(status, {"success": False, "code": status, "msg": message})


def spoil(reply: Reply, fault: Fault) -> Reply:
    """Turn a good answer into the broken success that was asked for."""
    if fault.answer == "html":
        return Reply(200, b"<html><body>Bad gateway</body></html>", "text/html")
    if fault.answer == "error":
        return Reply.of_json(
            200, {"error": {"message": "upstream busy", "type": "server_error"}}
        )
    if fault.answer == "huge":
        told = json.loads(reply.body) | {"padding": "x" * 10_000_000}
        return Reply.of_json(200, told)
    return reply


if __name__ == "__main__":
    run_by_hand(TaskSimulator, KEY)
