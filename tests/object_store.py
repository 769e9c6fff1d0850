"""A real S3 server on loopback: moto's, spoken to over HTTP and without a client."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

ACCOUNT, PARTITION = "123456789012", "aws"
SECRET = b"the secret of a gateway"
_NUMBERS = itertools.count(1)


@dataclass
class S3Server:
    """The server. ``requests`` is all it was asked, such as ``GET /bucket/key``."""

    port: int = 0
    requests: list[str] = field(default_factory=list)
    _server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, on the port that it had before; it forgets nothing."""
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

        self._server = ThreadedMotoServer(
            ip_address="127.0.0.1", port=self.port, verbose=False
        )
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        """Stop answering."""
        self._server.stop()

    def new_bucket(self) -> str:
        """Make an empty bucket of a name that nobody has."""
        name = f"pictures-{next(_NUMBERS)}"
        self.call("PUT", f"/{name}")
        return name

    def call(self, method: str, path: str) -> str:
        """Send a request; returns the body of the answer."""
        request = urllib.request.Request(f"{self.url}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: bytes = answer.read()
        return found.decode()

    def keys(self, bucket: str) -> list[str]:
        """List what is in a bucket, but for the sign that a gateway is alive."""
        listed = self.call("GET", f"/{bucket}?list-type=2")
        found = re.findall(r"<Key>([^<]*)</Key>", listed)
        return [key for key in found if not key.endswith("/alive")]

    def unfinished(self, bucket: str) -> list[str]:
        """List the uploads in parts that were begun and not ended or taken back."""
        return re.findall(r"<Key>([^<]*)</Key>", self.call("GET", f"/{bucket}?uploads"))

    def age(self, bucket: str, key: str, written_ms: int) -> None:
        """Let an object have been written at another time."""
        from moto.s3.models import s3_backends  # noqa: PLC0415 - as above

        stored: Any = s3_backends[ACCOUNT][PARTITION].get_object(bucket, key)
        moment = datetime.fromtimestamp(written_ms / 1000, UTC)
        stored.last_modified = moment.replace(tzinfo=None)


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """Run the server; what it is asked is noted rather than printed."""
    server = S3Server()
    log = logging.getLogger("werkzeug")
    noting = _Noting(server.requests)
    before = log.level, log.propagate
    log.addHandler(noting)
    log.propagate = False
    log.setLevel(logging.INFO)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        log.removeHandler(noting)
        log.level, log.propagate = before


class _Noting(logging.Handler):
    def __init__(self, requests: list[str]) -> None:
        super().__init__()
        self._requests = requests

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"([A-Z]+ /\S*) HTTP", record.getMessage())
        if found:
            self._requests.append(found[1])


@asynccontextmanager
async def answering(status: str, code: str) -> AsyncIterator[str]:
    """Run a server that answers everything alike; yields its URL.

    An empty status: it takes requests, and never answers.
    """
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
    head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if status:
                writer.write(f"{head}\r\n".encode() + body)
                await writer.drain()
            else:
                await reader.read()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
