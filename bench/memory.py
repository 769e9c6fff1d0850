"""How much memory big bodies take in a gateway, and how soon it is given back.

A real gateway, its upstreams and its clients are processes of their own. Figures are of
the gateway's process alone; the page cache of spooled files is not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import struct
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.clients import (
    EDITS,
    GENERATIONS,
    PIECE_BYTES,
    Connection,
    PictureCheck,
    generation,
)
from bench.figures import MIB, Table
from bench.processes import Process, Watch
from bench.upstreams import Upstream, gateway, upstream
from tests.e2e.gateways import LiveGateway
from tests.simulators.openai_server import KEY
from tests.simulators.pictures import big_picture

PER_ANSWER_MAX_MIB = 2.0
BACK_MAX_PERCENT = 10.0
BACK_AFTER_S = 5.0
EDIT_MAX_MIB = 64.0

WARM_UP_REQUESTS = 20
SETTLE_S = 1.0
OVERLAP_S = 1.0
"""So long the first upstream waits, so that all calls are there before one breaks."""
PACE_S = 0.02
"""Between two pieces of 64 KiB: an answer of 12 MiB takes its client 4 s and more."""
BOUNDARY = "bench-boundary"
CREDITS = "100000000"


@dataclass(frozen=True)
class Bench:
    """A warm gateway and what it is measured by."""

    table: Table
    live: LiveGateway
    key: str
    idle_bytes: int

    @property
    def process(self) -> Process:
        return Process(self.live.pid)


def measure(answers: int, files: int, file_mib: int) -> None:
    table = Table("memory")
    with tempfile.TemporaryDirectory() as folder, upstream("steady") as steady:
        with warmed(table, Path(folder) / "whole", steady) as bench:
            asyncio.run(big_answers(bench, "whole", answers, steady))
        with (
            upstream("breaking") as breaking,
            warmed(table, Path(folder) / "broken", breaking, steady) as bench,
        ):
            asyncio.run(fill_book(bench))
            asyncio.run(big_answers(bench, "broken off", answers, steady, breaking))
        with warmed(table, Path(folder) / "edit", steady) as bench:
            asyncio.run(big_edit(bench, steady, files, file_mib))
    table.end()


@contextmanager
def warmed(table: Table, folder: Path, *upstreams: Upstream) -> Iterator[Bench]:
    """Run a gateway that has answered a few small requests already."""
    with gateway(folder, *upstreams) as live:
        fresh_bytes = Process(live.pid).resident_bytes()
        key = live.tenant("bench", CREDITS)
        asyncio.run(small_answers(live.url, key))
        time.sleep(SETTLE_S)
        idle_bytes = Process(live.pid).resident_bytes()
        names = " + ".join(u.name for u in upstreams)
        table.line(
            f"idle before {names}: fresh / after {WARM_UP_REQUESTS} requests",
            f"{fresh_bytes / MIB:.1f} / {idle_bytes / MIB:.1f} MiB",
        )
        yield Bench(table, live, key, idle_bytes)


async def small_answers(url: str, key: str, **fields: object) -> None:
    connection = await Connection.to(url, key)
    for _ in range(WARM_UP_REQUESTS):
        assert await connection.send(GENERATIONS, generation(**fields)) == 200
        await connection.body()
    connection.close()


async def fill_book(bench: Bench) -> None:
    """Spend: second purchases may be one percent of what was spent in 24 h."""
    await small_answers(
        bench.live.url, bench.key, n=10, quality="high", size="3840x2160"
    )


# --- answers of 12 MiB, all in flight at once ---


async def big_answers(
    bench: Bench, name: str, answers: int, steady: Upstream, *breaking: Upstream
) -> None:
    """Let slow clients read big answers; the first upstream may break each off."""
    for one in breaking:
        half = {"answer": "big", "close": "mid_body", "delay_s": OVERLAP_S}
        one.script(*[half] * answers)
    steady.script(*[{"answer": "big"}] * answers)
    sent = len(steady.purchases())
    everybody = asyncio.Barrier(answers)
    with Watch(bench.process) as watch:
        same = await asyncio.gather(
            *(slow_reader(bench.live.url, bench.key, everybody) for _ in range(answers))
        )
    await asyncio.sleep(BACK_AFTER_S)
    after_bytes = bench.process.resident_bytes()
    size_mib = len(big_picture()) / MIB

    table, about = bench.table, f"{answers} answers of {size_mib:.0f} MiB, {name}"
    table.all_of(f"{about}: read whole, same bytes", sum(same), answers)
    table.all_of(f"{about}: bought", len(steady.purchases()) - sent, answers)
    report(bench, about, watch, answers)
    table.at_most(
        f"{about}: above idle {BACK_AFTER_S:.0f} s later",
        (after_bytes / bench.idle_bytes - 1) * 100,
        BACK_MAX_PERCENT,
        "%",
    )
    cpu_ms = watch.cpu_s * 1000 / (answers * size_mib)
    table.line(f"{about}: CPU", f"{cpu_ms:.2f} ms/MiB in {watch.took_s:.1f} s")


async def slow_reader(url: str, key: str, everybody: asyncio.Barrier) -> bool:
    """Read an answer slowly, from when all have theirs; tell if it is the picture."""
    text = big_picture().encode()
    check = PictureCheck(hashlib.sha256(text).digest(), len(text))
    connection = await Connection.to(url, key, receive_bytes=PIECE_BYTES)
    status = await connection.send(GENERATIONS, generation())
    await everybody.wait()
    async for piece in connection.pieces():
        check.take(piece)
        await asyncio.sleep(PACE_S)
    connection.close()
    return status == 200 and check.is_same


def report(bench: Bench, about: str, watch: Watch, answers: int) -> None:
    peaks = (watch.sampled_peak_bytes, watch.peak_bytes)
    sampled, exact = ((peak - bench.idle_bytes) / MIB for peak in peaks)
    bench.table.line(
        f"{about}: peak above idle, sampled / exact",
        f"{sampled:.1f} / {exact:.1f} MiB",
    )
    bench.table.at_most(
        f"{about}: peak above idle per answer",
        exact / answers,
        PER_ANSWER_MAX_MIB,
        "MiB",
    )


# --- an edit of many big files ---


async def big_edit(bench: Bench, steady: Upstream, files: int, file_mib: int) -> None:
    """Upload big files as one edit."""
    uploads = [Upload(index, file_mib * MIB) for index in range(files)]
    connection = await Connection.to(bench.live.url, bench.key)
    with Watch(bench.process) as watch:
        status = await send_form(connection, uploads)
        await connection.body()
    arrived = steady.purchases()[-1]["references"]
    same = [
        upload.sha256() == found for upload, found in zip(uploads, arrived, strict=True)
    ]
    spooled = len(list(bench.live.data_dir.rglob("spool-*")))
    await asyncio.sleep(BACK_AFTER_S)
    after_bytes = bench.process.resident_bytes()
    connection.close()
    direct = await Connection.to(steady.origin, KEY)
    begun_s = time.monotonic()
    await send_form(direct, uploads)
    await direct.body()
    direct.close()
    direct_s = time.monotonic() - begun_s

    table, about = bench.table, f"edit of {files} x {file_mib} MiB"
    table.all_of(f"{about}: status", status, 200)
    table.all_of(f"{about}: files that arrived unchanged", sum(same), files)
    growth = (watch.peak_bytes - bench.idle_bytes) / MIB
    table.at_most(f"{about}: peak above idle", growth, EDIT_MAX_MIB, "MiB")
    back = (after_bytes / bench.idle_bytes - 1) * 100
    table.at_most(
        f"{about}: above idle {BACK_AFTER_S:.0f} s later", back, BACK_MAX_PERCENT, "%"
    )
    table.none_of(f"{about}: files left in the spool", spooled)
    table.line(
        f"{about}: time, and straight to the upstream",
        f"{watch.took_s:.1f} s, {direct_s:.1f} s",
    )
    cpu_ms = watch.cpu_s * 1000 / (files * file_mib)
    table.line(f"{about}: CPU", f"{cpu_ms:.2f} ms/MiB")


async def send_form(connection: Connection, uploads: list[Upload]) -> int:
    fields = {"model": "gpt-image-2", "prompt": "all in one", "size": "1024x1024"}
    mark = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name="
    parts_of_text = (f'{mark}"{k}"\r\n\r\n{text}\r\n' for k, text in fields.items())
    texts = "".join(parts_of_text).encode()
    end = f"--{BOUNDARY}--\r\n".encode()
    length = len(texts) + sum(upload.part_bytes for upload in uploads) + len(end)
    media_type = f"multipart/form-data; boundary={BOUNDARY}"
    connection.start(EDITS, length, media_type)
    connection.writer.write(texts)
    async for piece in parts(uploads):
        connection.writer.write(piece)
        await connection.writer.drain()
    connection.writer.write(end)
    return await connection.status()


async def parts(uploads: list[Upload]) -> AsyncIterator[bytes]:
    for upload in uploads:
        yield upload.head
        for piece in upload.pieces():
            yield piece
        yield b"\r\n"


@dataclass(frozen=True)
class Upload:
    """A file with the header of a PNG and noise in place of pixels."""

    index: int
    size_bytes: int

    @property
    def head(self) -> bytes:
        return (
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
            f'name="image[]"; filename="{self.index}.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode()

    @property
    def part_bytes(self) -> int:
        return len(self.head) + self.size_bytes + len(b"\r\n")

    def pieces(self) -> Iterator[bytes]:
        """Yield the file; no two uploads have the same bytes."""
        header = b"IHDR" + struct.pack(
            ">IIBBBBB", 1024, 1024 + self.index, 8, 2, 0, 0, 0
        )
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header) - 4) + header
        start += struct.pack(">I", zlib.crc32(header))
        start += struct.pack(">I", self.size_bytes - len(start) - 12) + b"IDAT"
        yield start
        left_bytes = self.size_bytes - len(start)
        while left_bytes:
            yield NOISE[:left_bytes]
            left_bytes -= min(left_bytes, len(NOISE))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


NOISE = hashlib.shake_256(b"noise").digest(PIECE_BYTES)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--answers", type=int, default=40)
    options.add_argument("--files", type=int, default=16)
    options.add_argument("--file-mib", type=int, default=50)
    chosen = options.parse_args()
    measure(chosen.answers, chosen.files, chosen.file_mib)


if __name__ == "__main__":
    main()
