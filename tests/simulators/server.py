"""What every simulated upstream is made of: HTTP/1.1 with a hand on every byte.

A simulator keeps a log of what was bought, which is an independent witness, and lets
the next calls go wrong as a script says. Over HTTP: ``POST /_script`` takes a JSON list
of ``Fault`` fields, one for each of the next calls; ``POST /_mode`` takes the fields of
one that befalls every call of its step from then on, or ``null``: all is well again.
``GET /_purchases`` tells what was bought, oldest first, ``GET /_bill`` the sum of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import signal
import socket
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from PIL import Image

HEAD_MAX_BYTES = 64 * 1024
BODY_MAX_BYTES = 64 * 1024 * 1024
FORM_MAX_BYTES = 1024 * 1024 * 1024
PART_HEAD_BYTES = 256 * 1024
"""So much of a file is kept, to look at; the rest is only hashed and counted."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call. Fields may be combined.

    ``on`` names the step of a job's life that it befalls, in the simulator's own words;
    empty: the call that buys.

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

    on: str = ""
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

    @property
    def route(self) -> str:
        """The path without its query."""
        return self.path.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.path.partition("?")[2]))

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def images(self) -> list[Part]:
        return [part for part in self.form if part.name in {"image", "image[]"}]

    @property
    def mask(self) -> Part | None:
        return next((part for part in self.form if part.name == "mask"), None)


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


def scripted(fault: Fault) -> Reply:
    assert fault.status is not None
    if isinstance(fault.body, bytes):
        return Reply(fault.status, fault.body, headers=fault.headers)
    if isinstance(fault.body, str):
        body = fault.body.encode()
        return Reply(fault.status, body, "text/html", headers=fault.headers)
    return Reply.of_json(fault.status, fault.body, fault.headers)


@dataclass
class Simulator(ABC):
    """A running simulator, as tests see it."""

    key: str
    base_url: str = ""
    latency_s: float = 0.0
    percent: int = 100
    """What this account pays, of the list price."""
    purchases: list[Any] = field(default_factory=list)
    requests: list[Seen] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    lasting: dict[str, Fault] = field(default_factory=dict)
    """Faults that stay, by the step that they befall."""
    connections: set[asyncio.Task[None]] = field(default_factory=set)

    prefix = ""
    """The path that its base URL ends in."""

    def script(self, *faults: Fault) -> None:
        """Let the next calls go wrong, in this order."""
        self.faults.extend(faults)

    def suffer(self, *faults: Fault) -> None:
        """Let all calls of these faults' steps go wrong; none: all is well again."""
        if not faults:
            self.lasting.clear()
        self.lasting.update({fault.on: fault for fault in faults})

    @property
    def log(self) -> list[dict[str, Any]]:
        """What was bought, oldest first, each with what it is charged, in USD."""
        return [
            {**dataclasses.asdict(bought), "bill_usd": str(self.bill_usd(bought))}
            for bought in self.purchases
        ]

    @property
    def owed_usd(self) -> Decimal:
        """What the account is charged in all."""
        return sum(map(self.bill_usd, self.purchases), Decimal(0))

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return self.base_url.removesuffix(self.prefix)

    def fault(self, on: str = "") -> Fault:
        """Take the next fault if it is one of this step, else the one that stays."""
        if self.faults and self.faults[0].on == on:
            return self.faults.popleft()
        return self.lasting.get(on, Fault())

    def waits(self, on: str, close: str) -> bool:
        """Tell whether the next call of a step is to be broken off in this way."""
        if self.faults and self.faults[0].on == on:
            return self.faults[0].close == close
        return on in self.lasting and self.lasting[on].close == close

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        try:
            while (seen := await self.read(reader)) is not None:
                if seen.path.startswith("/_"):
                    reply = self.steer(seen)
                    line = dataclasses.replace(reply, body=reply.body + b"\n")
                    if not await send(writer, line):
                        break
                elif not await self.answer(seen, writer):
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

    @abstractmethod
    def bill_usd(self, purchase: Any) -> Decimal:
        """Say what the account is charged for a purchase, exactly; 0: nothing."""

    @abstractmethod
    def sells_at(self, path: str) -> bool:
        """Whether calls of a path buy something."""

    def uploads_at(self, path: str) -> str | None:
        """Name the step whose request may be cut off there; None: none is."""
        return "" if self.sells_at(path) else None

    @abstractmethod
    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""

    async def tell(
        self, refused: Reply | None, body: Any, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer a free question, whose step is ``probe``, unless it is refused."""
        if refused is not None:
            return await send(writer, refused)
        fault = self.fault("probe")
        free = scripted(fault) if fault.status else Reply.of_json(200, body)
        return await deliver(writer, free, fault)

    async def read(self, reader: asyncio.StreamReader) -> Seen | None:
        head = await read_head(reader)
        if head is None:
            return None
        step = self.uploads_at(head.route)
        if step is not None and self.waits(step, "mid_upload"):
            self.fault(step)
            await reader.read(1)
            raise UploadStoppedError
        return await read_body(reader, head)

    def steer(self, seen: Seen) -> Reply:
        """Answer whoever rehearses by hand, or from another process."""
        if seen.method == "POST" and seen.path in {"/_script", "/_mode"}:
            return self.steered(seen)
        if seen.path == "/_purchases":
            return Reply.of_json(200, self.log)
        if seen.path == "/_bill":
            return Reply.of_json(
                200, {"jobs": len(self.log), "usd": str(self.owed_usd)}
            )
        return Reply.of_json(404, {"error": "unknown"})

    def steered(self, seen: Seen) -> Reply:
        try:
            told = seen.json()
            several = told if isinstance(told, list) else [told] if told else []
            faults = [Fault(**fields) for fields in several]
        except (ValueError, TypeError) as wrong:
            return Reply.of_json(400, {"error": f"no fault: {wrong}"})
        if seen.path == "/_script":
            self.script(*faults)
        else:
            self.suffer(*faults)
        told = {"waiting": len(self.faults), "lasting": sorted(self.lasting)}
        return Reply.of_json(200, told)


AnySimulator = TypeVar("AnySimulator", bound=Simulator)


@asynccontextmanager
async def served(
    simulator: AnySimulator, port: int = 0
) -> AsyncGenerator[AnySimulator, None]:
    """Run a simulator on 127.0.0.1, on a free port unless one is given."""
    server = await asyncio.start_server(
        simulator.serve, "127.0.0.1", port, limit=HEAD_MAX_BYTES
    )
    bound = server.sockets[0].getsockname()[1]
    simulator.base_url = f"http://127.0.0.1:{bound}{simulator.prefix}"
    try:
        yield simulator
    finally:
        server.close()
        for connection in list(simulator.connections):
            connection.cancel()
        await asyncio.gather(*simulator.connections, return_exceptions=True)
        await server.wait_closed()


def run_by_hand(kind: type[Simulator], key: str) -> None:
    """Run a simulator from the command line, until it is told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default=key)
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--percent", type=int, default=100, help="of the list price")
    parser.add_argument("--log", type=Path, help="where the purchases go at the end")
    given = parser.parse_args()
    made = kind(given.key, latency_s=given.latency_s, percent=given.percent)
    asyncio.run(_run(made, given.port, given.log))


async def _run(simulator: Simulator, port: int, log: Path | None) -> None:
    async with served(simulator, port):
        print(simulator.base_url, flush=True)  # noqa: T201 - what the caller waits for
        await told_to_stop()
    if log is not None:
        log.write_text(json.dumps(simulator.log))


async def told_to_stop() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


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
