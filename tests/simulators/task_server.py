"""A pretend EvoLink on loopback: tasks, their links, and what is charged for them.

It is an independent witness: it shares no code with the gateway, counts credits by its
own reading of the published price card, and keeps a log of every job that was bought.
Tasks live here, so they outlive whoever submitted them.

By hand: ``python -m tests.simulators.task_server --port 9005 --latency-s 2`` (a task
takes so long); faults are scripted with ``POST /_script`` (a JSON list of ``Fault``
fields; ``on`` is empty for the submission, else ``poll``, ``download`` or ``upload``),
purchases read with ``GET /_purchases``.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from tests.simulators.pictures import output_tokens, picture
from tests.simulators.server import (
    Fault,
    Reply,
    Seen,
    Simulator,
    deliver,
    run_by_hand,
    scripted,
    send,
    served,
)

KEY = "sk-evo-simulated-key-0123456789"
MODELS = {
    "gpt-image-2": {"low": 16, "medium": 48, "high": 96},
    "gpt-image-2.5-flare": {
        "low": 16,
        "medium": 24,
        "high": 48,
        "xhigh": 64,
        "max": 96,
    },
}
FIELDS = {
    "model",
    "prompt",
    "size",
    "resolution",
    "quality",
    "n",
    "background",
    "output_format",
    "callback_url",
}
PIXELS = range(655_360, 8_294_400 + 1)
PROMPT_MAX_CHARS = 32_000
IDEMPOTENCY_KEY = re.compile(r"[A-Za-z0-9._-]{16,96}")
UC_PER_CREDIT = 10_000
UC_PER_1K_OUTPUT = 18_360
UC_PER_1K_TEXT = 3_060
LINK_LIFE_S = 24 * 3600
DONE_BY = {"ok", "big", "one_less"}


@dataclass
class Purchase:
    """A job that the account was charged for, or has credits reserved for."""

    task_id: str
    idempotency_key: str | None
    model: str
    size: str
    quality: str
    n: int
    credits: str
    charge: str = "reserved"


@dataclass
class Task:
    """A task as the server keeps it."""

    task_id: str
    body: dict[str, Any]
    width: int
    height: int
    created_s: float
    reserved_uc: int
    fault: Fault
    purchase: Purchase
    states: list[str] = field(default_factory=list)
    """Told by the next looks, whatever the clock says."""
    error: dict[str, Any] | None = None
    expired: bool = False

    @property
    def n(self) -> int:
        return int(self.body.get("n", 1))

    @property
    def format(self) -> str:
        return str(self.body.get("output_format", "png"))


@dataclass
class TaskSimulator(Simulator):
    """A running simulator, as tests see it."""

    tasks: dict[str, Task] = field(default_factory=dict)
    by_key: dict[str, Task] = field(default_factory=dict)

    prefix = "/v1"

    def sells_at(self, path: str) -> bool:
        return path == "/v1/images/generations"

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        if seen.route.startswith("/results/"):
            return await self.result(seen, writer)
        self.requests.append(seen)
        if seen.headers.get("authorization") != f"Bearer {self.key}":
            told = seen.headers.get("authorization", "nothing")
            return await send(
                writer,
                error(
                    401,
                    "unauthorized",
                    f"Invalid token: {told}",
                    "authentication_error",
                ),
            )
        if seen.method == "POST" and self.sells_at(seen.route):
            return await self.submit(seen, writer)
        if seen.method == "GET" and seen.route.startswith("/v1/tasks/"):
            return await self.look(seen, writer)
        return await send(writer, error(404, "not_found", "Unknown URL."))

    async def submit(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault()
        if fault.status is not None:
            await asyncio.sleep(fault.delay_s)
            return await send(writer, scripted(fault))
        refused = check(seen)
        if refused is not None:
            return await send(writer, refused)
        key = seen.headers.get("idempotency-key")
        known = self.by_key.get(key) if key else None
        if known is not None:
            if known.body != seen.json():
                conflict = error(
                    409, "idempotency_conflict", "The key was used for another request."
                )
                return await send(writer, conflict)
            replay = Reply.of_json(
                200, self.created(known), {"Idempotency-Replayed": "true"}
            )
            return await deliver(writer, spoil(replay, fault), fault)
        task = self.sell(seen, key, fault)
        reply = Reply.of_json(200, self.created(task))
        return await deliver(writer, spoil(reply, fault), fault)

    def sell(self, seen: Seen, key: str | None, fault: Fault) -> Task:
        body = seen.json()
        width, height = size_of(body)
        name = f"task-unified-{int(time.time())}-{secrets.token_hex(4)}"
        quality = body.get("quality", "medium")
        tokens = output_tokens(MODELS[body["model"]][quality], width, height)
        words = len(body["prompt"].split()) + 6
        n = body.get("n", 1)
        cost_uc = charged(tokens * n, UC_PER_1K_OUTPUT) + charged(
            words * n, UC_PER_1K_TEXT
        )
        purchase = Purchase(
            name,
            key,
            body["model"],
            f"{width}x{height}",
            quality,
            n,
            credits_of(cost_uc),
        )
        task = Task(
            name, body, width, height, time.monotonic(), cost_uc, fault, purchase
        )
        self.tasks[name] = task
        if key:
            self.by_key[key] = task
        self.purchases.append(purchase)
        return task

    async def look(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault("poll")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        name = seen.route.removeprefix("/v1/tasks/")
        if not name.startswith("task-unified-"):
            told = error(400, "invalid_task_id", "Invalid task id.")
            return await send(writer, told)
        task = self.tasks.get(name)
        if task is None:
            return await send(writer, error(404, "task_not_found", "No such task."))
        reply = Reply.of_json(200, self.told(task, fault))
        return await deliver(writer, spoil(reply, fault), fault)

    async def result(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        fault = self.fault("download")
        if fault.status is not None:
            return await send(writer, scripted(fault))
        name, _, place = seen.route.removeprefix("/results/").partition("/")
        task = self.tasks.get(name)
        if task is None or task.expired or not place.startswith(tuple("0123456789")):
            return await send(writer, Reply(403, b"<Error>Expired</Error>", "text/xml"))
        background = task.body.get("background", "opaque")
        file = picture(task.width, task.height, task.format, background)
        reply = Reply(200, file, f"image/{task.format}")
        return await deliver(writer, reply, fault)

    def created(self, task: Task) -> dict[str, Any]:
        return {
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

    def told(self, task: Task, fault: Fault) -> dict[str, Any]:
        """Tell of a task, as it stands now."""
        answer = fault.answer if fault.answer != "ok" else task.fault.answer
        age_s = time.monotonic() - task.created_s
        done = age_s >= self.latency_s
        state = "completed" if done else "processing"
        if task.states:
            state = task.states.pop(0)
        told = self.created(task) | {"status": state}
        told["progress"] = 100 if done else int(100 * age_s / self.latency_s)
        if state != "completed":
            return told
        task.purchase.charge = "charged"
        place = {"dead_url": "none"}.get(answer)
        links = [
            f"{self.origin}/results/{task.task_id}/{place or index}.{task.format}"
            for index in range(task.n - (answer == "one_less"))
        ]
        told["results"] = [] if answer == "empty" else links
        told["usage"] |= {
            "credits_used": number(task.reserved_uc),
            "cost": {
                "credits": number(task.reserved_uc),
                "usd": round(task.reserved_uc / UC_PER_CREDIT / 68, 4),
            },
        }
        told["billing"] = {
            "refund_scope": "account_balance",
            "charge_status": "charged",
            "refund_status": "not_required",
            "reserved_credits": number(task.reserved_uc),
            "charged_credits": number(task.reserved_uc),
        }
        return told


@asynccontextmanager
async def serve_task_simulator(
    *, key: str = KEY, port: int = 0, latency_s: float = 0.0
) -> AsyncGenerator[TaskSimulator, None]:
    """Run a simulator on 127.0.0.1, on a free port unless one is given."""
    async with served(TaskSimulator(key, latency_s=latency_s), port) as simulator:
        yield simulator


def charged(tokens: int, uc_per_1k: int) -> int:
    """Round each part up to a whole unit, as the price card says."""
    return math.ceil(Fraction(tokens * uc_per_1k, 1000))


def credits_of(uc: int) -> str:
    return f"{uc // UC_PER_CREDIT}.{uc % UC_PER_CREDIT:04d}"


def number(uc: int) -> float:
    return float(credits_of(uc))


def size_of(body: dict[str, Any]) -> tuple[int, int]:
    size = body.get("size", "auto")
    if size == "auto":
        return 1024, 1024
    width, height = map(int, re.split("[x\u00d7]", size))
    return width, height


def check(seen: Seen) -> Reply | None:
    try:
        body = seen.json()
    except ValueError:
        return error(400, "invalid_request", "The body is not JSON.")
    key = seen.headers.get("idempotency-key")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        return error(400, "invalid_request", "Invalid Idempotency-Key.")
    model = body.get("model")
    if model not in MODELS:
        return error(404, "model_not_found", f"Model {model} not found.")
    unknown = set(body) - FIELDS
    if unknown:
        return error(400, "invalid_request", f"Unknown field: {unknown.pop()}")
    n = body.get("n", 1)
    rules = {
        "size": is_size(body.get("size", "auto")),
        "quality": body.get("quality", "medium") in MODELS[model],
        "n": type(n) is int and 1 <= n <= 10,
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
    return None


def is_size(size: Any) -> bool:
    if size == "auto":
        return True
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
