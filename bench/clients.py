"""A client of few instructions, with a hand on how fast an answer is read."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.figures import MIB

PIECE_BYTES = 64 * 1024
GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
PICTURE_STARTS = re.compile(rb'"b64_json": ?"')


def generation(**fields: object) -> bytes:
    """Write the body of a generation."""
    body = {"model": "gpt-image-2", "prompt": "a bench", "quality": "low"}
    return json.dumps(body | {"size": "1024x1024"} | fields).encode()


@dataclass
class Connection:
    """One connection, kept alive from request to request."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str
    key: str
    left_bytes: int = 0

    @classmethod
    async def to(
        cls, origin: str, key: str, *, receive_bytes: int | None = None
    ) -> Connection:
        """Connect; ``receive_bytes`` bounds what the kernel takes ahead of reading."""
        parts = urlsplit(origin)
        assert parts.hostname is not None
        sock = socket.socket()
        sock.settimeout(0)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, (parts.hostname, parts.port or 80))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limit = receive_bytes or MIB
        reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
        return cls(reader, writer, parts.netloc, key)

    async def send(
        self, path: str, body: bytes = b"", *, media_type: str = "application/json"
    ) -> int:
        """Send a request; returns the status of the answer, whose body is to come."""
        self.start(path, len(body), media_type)
        self.writer.write(body)
        return await self.status()

    def start(self, path: str, length: int, media_type: str) -> None:
        """Write the head of a request whose body the caller writes."""
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self.host}",
            f"Authorization: Bearer {self.key}",
            f"Content-Type: {media_type}",
            f"Content-Length: {length}",
        ]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    async def status(self) -> int:
        """Read the head of an answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        assert length, head
        self.left_bytes = int(length[1])
        return int(head.split(b" ", 2)[1])

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body of the answer."""
        while self.left_bytes:
            piece = await self.reader.read(min(self.left_bytes, PIECE_BYTES))
            if not piece:
                raise ConnectionError(f"{self.left_bytes:,} bytes are missing")
            self.left_bytes -= len(piece)
            yield piece

    async def body(self) -> bytes:
        """Read the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        self.writer.close()


@dataclass
class PictureCheck:
    """Tells whether the first picture of an answer is, byte for byte, a known one."""

    digest: bytes
    size_bytes: int
    _start: bytes = b""
    _left_bytes: int = -1
    _found: hashlib._Hash = field(default_factory=hashlib.sha256)

    def take(self, piece: bytes) -> None:
        """Take the next bytes of the answer."""
        if self._left_bytes < 0:
            self._start += piece
            mark = PICTURE_STARTS.search(self._start)
            if mark is None:
                return
            piece = self._start[mark.end() :]
            self._left_bytes = self.size_bytes
        ours = piece[: self._left_bytes]
        self._found.update(ours)
        self._left_bytes -= len(ours)

    @property
    def is_same(self) -> bool:
        return self._left_bytes == 0 and self._found.digest() == self.digest
