"""Connects adapters to something that behaves like their upstream, to be tested."""

from __future__ import annotations

import asyncio
import base64
import socket
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from providers.kit.contract import (
    Account,
    Billed,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    InputFile,
    MadeImage,
    Partial,
    Pending,
    Provider,
    ProviderError,
)
from providers.kit.spool import SpoolFolder
from providers.kit.wire import READ_MAX_S, Tools, Wire
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.simulators.server import Fault, Simulator

K = FailureKind


@dataclass
class Upstream:
    """One adapter, connected to something that behaves like its upstream."""

    provider: Provider
    fail: Callable[[FailureKind], None]
    hang: Callable[[], None]
    purchases: Callable[[], int]
    tools: Tools
    account: Account
    simulator: Simulator | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)
    """What a plain job asks for here, where ``a_job`` asks for what it cannot do."""

    @property
    def spools(self) -> SpoolFolder:
        return self.tools.spools

    def job(self, **changes: Any) -> ImageJob:
        return a_job(**{**self.usual, **changes})

    async def make(self, **changes: Any) -> Done:
        """Run a job to its end, as the gateway would; ``deadline_s`` is for all."""
        job = self.job(**changes)
        step: Done | Pending | None = None
        try:
            async with asyncio.timeout(job.deadline_s):
                step = await self.provider.start(job)
                while isinstance(step, Pending):
                    await asyncio.sleep(0.001)
                    step = await self.provider.poll(job, step.job_id)
        except TimeoutError:
            raise ProviderError(FailureKind.TIMEOUT, "the deadline passed") from None
        return step

    async def submitted(self, **changes: Any) -> Pending:
        """Start a job that does not end at once."""
        step = await self.provider.start(self.job(**changes))
        assert isinstance(step, Pending)
        return step

    async def look(self, job_id: str) -> Done | Pending:
        return await self.provider.poll(self.job(), job_id)

    async def failed_look(self, job_id: str) -> ProviderError:
        with pytest.raises(ProviderError) as caught:
            await self.look(job_id)
        return caught.value

    async def finished(self, step: Done | Pending) -> Done:
        """Look again and again, until there are pictures."""
        while isinstance(step, Pending):
            step = await self.look(step.job_id)
        return step

    async def failure(self, **changes: Any) -> ProviderError:
        with pytest.raises(ProviderError) as caught:
            await self.make(**changes)
        return caught.value

    async def watch(self, **changes: Any) -> tuple[list[Partial], Done]:
        """Stream a job, to its end."""
        looks: list[Partial] = []
        try:
            async with aclosing(self.provider.stream(self.job(**changes))) as made:
                *items, done = [item async for item in noted(made, looks)]
        except ProviderError as error:
            for look in looks:
                look.image.payload.close()
            error.add_note(f"looks: {len(looks)}")
            raise
        assert items == looks
        assert isinstance(done, Done)
        return looks, done

    async def stream_failure(self, *, looks: int = 0, **changes: Any) -> ProviderError:
        """Stream a job that fails after so many looks."""
        with pytest.raises(ProviderError) as caught:
            await self.watch(**changes)
        assert caught.value.__notes__ == [f"looks: {looks}"]
        return caught.value

    def files(self) -> int:
        return len(list(self.spools.path.iterdir()))


@dataclass(frozen=True)
class Case:
    """How to connect an adapter, what it can do, and how its upstream can fail.

    ``capable`` is what its capabilities must be. ``size_px`` is a size that it can
    make, ``auto_px`` what it makes when the size is left to it, ``counts_tokens``
    whether it reports a usage, ``secret`` what must never be shown. ``look_step`` is
    what its simulator calls a look at a job, where jobs are left pending,
    ``file_step`` what it calls the fetching of a picture, where answers hold links,
    and ``probe_step`` what it calls a probe.
    ``wrong_options`` are each refused by a message that names what is wrong.
    ``is_remote`` tells that there is a host and a credential. ``bad_file`` is what a
    reference that is no picture fails with: where files are uploaded before the job,
    the refusal is of the upload alone, and another upstream is tried.
    """

    name: str
    connect: Callable[[Path], AbstractAsyncContextManager[Upstream]]
    failures: Mapping[FailureKind, Billed]
    capable: Capabilities
    secret: str
    model: str = "gpt-image-2"
    size_px: tuple[int, int] = (592, 176)
    auto_px: tuple[int, int] = (1024, 1024)
    counts_tokens: bool = True
    look_step: str = ""
    file_step: str = ""
    probe_step: str = "probe"
    wrong_options: Sequence[tuple[Mapping[str, object], str]] = ()
    is_remote: bool = True
    bad_file: FailureKind = FailureKind.INVALID_REQUEST


async def noted(
    made: AsyncGenerator[Partial | Done, None], looks: list[Partial]
) -> AsyncGenerator[Partial | Done, None]:
    """Keep the looks, for when the stream breaks."""
    async for item in made:
        if isinstance(item, Partial):
            looks.append(item)
        yield item


def file_of(image: MadeImage) -> bytes:
    text = b"".join(image.payload.chunks())
    assert len(text) == image.payload.size_bytes
    image.payload.close()
    return base64.b64decode(text) if image.payload.encoding == "base64" else text


def close(done: Done) -> None:
    for made in done.images:
        made.payload.close()


def nobody_at() -> str:
    """Name a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def an_input(
    spools: SpoolFolder,
    file: bytes,
    *,
    size_px: tuple[int, int] = (64, 32),
    media_type: str = "image/png",
    encoding: Literal["raw", "base64"] = "raw",
) -> InputFile:
    """Spool a reference or mask as the gateway would."""
    content = base64.b64encode(file) if encoding == "base64" else file
    spool = spools.from_bytes(content, encoding)
    return InputFile(spool, media_type, *size_px)


@asynccontextmanager
async def connected(
    kind: str,
    simulator: Simulator,
    folder: Path,
    faults: Mapping[FailureKind, Sequence[Fault]],
    *,
    options: Mapping[str, object],
    purchases: Callable[[], int] | None = None,
    hang: Fault = Fault(hang=True),  # noqa: B008 - it is frozen
    secret: str | None = None,
    usual: Mapping[str, Any] | None = None,
) -> AsyncGenerator[Upstream, None]:
    """Connect an adapter to its simulator; ``faults`` make it fail."""
    async with tools(folder) as given:
        account = an_account(
            base_url=simulator.base_url,
            secret=simulator.key if secret is None else secret,
            options=options,
        )
        provider = PROVIDERS[kind](account, given)
        try:
            yield Upstream(
                provider,
                lambda kind: simulator.script(*faults[kind]),
                lambda: simulator.script(hang),
                purchases or (lambda: sum(one.n for one in simulator.purchases)),
                given,
                account,
                simulator,
                usual or {},
            )
        finally:
            await provider.close()


def alone(
    connect: Callable[[Path], AbstractAsyncContextManager[tuple[Upstream, Any]]],
) -> Callable[[Path], AbstractAsyncContextManager[Upstream]]:
    """Connect as ``connect`` does, for tests that know no simulator."""

    @asynccontextmanager
    async def connect_alone(folder: Path) -> AsyncGenerator[Upstream, None]:
        async with connect(folder) as (upstream, _):
            yield upstream

    return connect_alone


@asynccontextmanager
async def tools(
    folder: Path,
    transport: httpx.AsyncBaseTransport | None = None,
    *,
    read_max_s: float = READ_MAX_S,
) -> AsyncGenerator[Tools, None]:
    wire = Wire(
        8, transport=transport, read_max_s=read_max_s, download_pauses_s=(0, 0, 0)
    )
    try:
        yield Tools(wire, SpoolFolder(folder), fraction=lambda: 0.5)
    finally:
        await wire.close()


USUALLY_BILLED = {
    K.INVALID_REQUEST: Billed.NO,
    K.CONTENT_POLICY: Billed.NO,
    K.UNSUPPORTED: Billed.NO,
    K.AUTH: Billed.NO,
    K.INSUFFICIENT_FUNDS: Billed.NO,
    K.RATE_LIMITED: Billed.NO,
    K.OVERLOADED: Billed.NO,
    K.BAD_GATEWAY: Billed.NO,
    K.TIMEOUT: Billed.MAYBE,
    K.NO_OUTPUT: Billed.MAYBE,
    K.RESULT_LOST: Billed.YES,
}
