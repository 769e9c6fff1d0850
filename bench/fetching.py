"""How references are fetched: how many at a time, and how soon the upstream is asked.

The files stand on a server of this process, over TLS if the openssl command is there
to make a certificate. Times are of the machine's monotonic clock: from when the last
byte of the last file went into the server's socket to when the first bytes of the call
came out of the upstream's.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.clients import GENERATIONS, Connection, generation
from bench.figures import MIB, Table
from bench.memory import Upload
from bench.processes import Process, Watch
from bench.upstreams import Upstream, gateway, upstream
from tests.e2e.gateways import LiveGateway

AT_A_TIME_MAX = 4
FIRST_BYTE_MAX_MS = 50.0
LAST_PIECE_AFTER_S = 0.3
"""Each file pauses before its end: fetches overlap whatever their speed, and the
gateway has read by then what the kernel held of the rest."""
CREDITS = "100000000"
CONFIG = """
[inputs]
allow_networks = ["127.0.0.0/8"]
allow_http = {allow_http}
ports = ["{port}"]
"""


@dataclass
class FileServer:
    """Serves noise with the header of a PNG at ``/0.png``, ``/1.png`` and so on."""

    size_bytes: int
    open_now: int = 0
    open_most: int = 0
    served: int = 0
    last_byte_s: float = 0.0

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.open_now += 1
        self.open_most = max(self.open_most, self.open_now)
        # Drained means then: in the kernel (with a limit of 0, TLS waits for ever).
        writer.transport.set_write_buffer_limits(high=1, low=0)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            await self._send(int(head.split(b"/")[1].split(b".")[0]), writer)
        finally:
            self.open_now -= 1
            writer.close()

    async def _send(self, index: int, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {self.size_bytes}\r\n"
        writer.write(f"{head}Content-Type: image/png\r\n\r\n".encode())
        left_bytes = self.size_bytes
        for piece in Upload(index, self.size_bytes).pieces():
            left_bytes -= len(piece)
            if not left_bytes:
                await asyncio.sleep(LAST_PIECE_AFTER_S)
            writer.write(piece)
            await writer.drain()
        self.last_byte_s = time.monotonic()
        self.served += 1


@dataclass(frozen=True)
class Round:
    """One request with references by URL."""

    status: int
    at_once: int
    served: int
    same: int
    first_byte_ms: float
    took_s: float
    growth_mib: float


def measure(rounds: int, files: int, file_mib: int) -> None:
    with tempfile.TemporaryDirectory() as folder, upstream("steady") as steady:
        found, scheme = asyncio.run(
            run_rounds(Path(folder), steady, rounds, files, file_mib)
        )
    table = Table("fetching")
    about = f"{files} references of {file_mib} MiB, {scheme}"
    table.all_of(f"{about}: answered", sum(r.status == 200 for r in found), rounds)
    table.all_of(f"{about}: fetched", sum(r.served for r in found), files * rounds)
    same = sum(r.same for r in found)
    table.all_of(f"{about}: arrived unchanged", same, files * rounds)
    most = max(r.at_once for r in found)
    table.at_most(f"{about}: connections at a time", most, AT_A_TIME_MAX, "")
    waits_ms = [r.first_byte_ms for r in found]
    middle_ms, worst_ms = statistics.median(waits_ms), max(waits_ms)
    table.at_most(
        "last byte fetched to first byte of the call, median",
        middle_ms,
        FIRST_BYTE_MAX_MS,
        "ms",
    )
    table.at_most(f"the same, worst of {rounds}", worst_ms, FIRST_BYTE_MAX_MS, "ms")
    took_s = statistics.median(r.took_s for r in found)
    table.line("the whole request, median", f"{took_s:.2f} s")
    growth = max(r.growth_mib for r in found)
    table.line("peak above idle, worst", f"{growth:.1f} MiB")
    table.end()


async def run_rounds(
    folder: Path, steady: Upstream, rounds: int, files: int, file_mib: int
) -> tuple[list[Round], str]:
    server = FileServer(file_mib * MIB)
    async with listening(server, folder) as (origin, port, trusted):
        config = CONFIG.format(allow_http="false" if trusted else "true", port=port)
        env = {"SSL_CERT_FILE": str(trusted)} if trusted else {}
        opened = gateway(folder / "gateway", steady, more_config=config, env=env)
        live = await asyncio.to_thread(opened.__enter__)
        try:
            key = await asyncio.to_thread(sync_key, live)
            connection = await Connection.to(live.url, key)
            # The first one imports what the others find there.
            assert await connection.send(GENERATIONS, generation()) == 200
            await connection.body()
            urls = [f"{origin}/{index}.png" for index in range(files)]
            process = Process(live.pid)
            found = [
                await one_round(connection, process, steady, server, urls)
                for _ in range(rounds)
            ]
            connection.close()
        finally:
            await asyncio.to_thread(opened.__exit__, None, None, None)
    return found, origin.partition(":")[0]


def sync_key(live: LiveGateway) -> str:
    """Make a key whose requests are answered with the picture.

    With references by URL, others are answered with a task.
    """
    live.tenant("bench", CREDITS)
    made = live.cli(
        *("keys", "create", "--tenant", "bench", "--delivery", "sync", "--json")
    )
    return str(made.json["key"])


async def one_round(
    connection: Connection,
    process: Process,
    steady: Upstream,
    server: FileServer,
    urls: list[str],
) -> Round:
    server.open_most = server.served = 0
    with Watch(process) as watch:
        status = await connection.send(GENERATIONS, generation(image_urls=urls))
        await connection.body()
    called_s = (await asyncio.to_thread(steady.times_s))[-1]
    bought = (await asyncio.to_thread(steady.purchases))[-1]
    sent = [Upload(i, server.size_bytes).sha256() for i in range(len(urls))]
    same = sum(a == b for a, b in zip(sent, bought["references"], strict=False))
    return Round(
        status,
        server.open_most,
        server.served,
        same,
        (called_s - server.last_byte_s) * 1000,
        watch.took_s,
        (watch.peak_bytes - watch.before_bytes) / MIB,
    )


@asynccontextmanager
async def listening(
    server: FileServer, folder: Path
) -> AsyncIterator[tuple[str, int, Path | None]]:
    """Listen on loopback; gives origin, port, and the certificate to be trusted."""
    certificate, tls = secured(folder)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    scheme = "http" if tls is None else "https"
    try:
        yield f"{scheme}://127.0.0.1:{port}", port, certificate
    finally:
        listener.close()
        await listener.wait_closed()


def secured(folder: Path) -> tuple[Path | None, ssl.SSLContext | None]:
    openssl = shutil.which("openssl")
    if openssl is None:
        return None, None
    certificate, private = folder / "loopback.pem", folder / "loopback.key"
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        f"-subj /CN=loopback -addext subjectAltName=IP:127.0.0.1 "
        f"-out {certificate} -keyout {private}"
    )
    subprocess.run([openssl, *command.split()], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return certificate, context


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--files", type=int, default=16)
    options.add_argument("--file-mib", type=int, default=4)
    chosen = options.parse_args()
    measure(chosen.rounds, chosen.files, chosen.file_mib)


if __name__ == "__main__":
    main()
