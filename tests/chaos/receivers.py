"""A webhook receiver that believes nothing: it checks signatures and the books."""

from __future__ import annotations

import http.server
import json
import sqlite3
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook

from tests.contract.test_fetcher import certificate

ADDRESS = "127.0.0.2"
"""Ours, and not that of anything else: the gateway is told to allow it."""


@dataclass
class Got:
    """One webhook that was signed as it should be."""

    event_id: str
    task: dict[str, Any]
    settled: bool
    """Whether its settlement was to be seen when it came."""


@dataclass
class Receiver:
    """Takes webhooks for one key, and looks into the gateway's database meanwhile."""

    database: Path
    certificate: Path
    port: int = 0
    secret: str = ""
    got: list[Got] = field(default_factory=list)
    unsigned: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://{ADDRESS}:{self.port}/hook"

    def take(self, headers: dict[str, str], body: bytes) -> None:
        try:
            Webhook(self.secret).verify(body, headers)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is remembered
            self.unsigned.append(repr(error))
            return
        task = json.loads(body)
        settled = self.rows(
            "SELECT 1 FROM settlements WHERE task_id = ?", str(task["id"])
        )
        self.got.append(Got(headers["webhook-id"], task, settled=bool(settled)))

    def rows(self, query: str, *values: str) -> list[Any]:
        """Look into the books, as another process would."""
        with sqlite3.connect(f"file:{self.database}?mode=ro", uri=True) as books:
            found = books.execute(query, values).fetchall()
        books.close()
        return found


@contextmanager
def receiving(database: Path, folder: Path) -> Iterator[Receiver]:
    """Run a receiver on a free port, with a certificate of its own."""
    made = certificate(folder, ADDRESS, kind="IP")
    receiver = Receiver(database, made.path)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            named = {name.lower(): value for name, value in self.headers.items()}
            receiver.take(named, body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # whoever is killed hangs up in the middle

    server = Server((ADDRESS, 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(made.path, made.key)
    server.socket = tls.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
