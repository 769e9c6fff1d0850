"""Connects every adapter to something that behaves like its upstream.

A new adapter adds itself to ``CASES``.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import pytest

from providers.kit.contract import (
    Billed,
    Done,
    FailureKind,
    InputFile,
    MadeImage,
    Partial,
    Provider,
    ProviderError,
)
from providers.kit.spool import SpoolFolder
from providers.kit.wire import Tools, Wire
from providers.registry import PROVIDERS
from providers.sandbox import Sandbox
from tests.builders import a_job, an_account
from tests.simulators.openai_server import (
    KEY,
    Fault,
    OpenAISimulator,
    serve_openai_simulator,
)

K = FailureKind


@dataclass
class Upstream:
    """One adapter, connected to something that behaves like its upstream."""

    provider: Provider
    fail: Callable[[FailureKind], None]
    hang: Callable[[], None]
    purchases: Callable[[], int]
    spools: SpoolFolder

    async def make(self, **changes: Any) -> Done:
        """Run a job, and read the pictures as the gateway would."""
        done = await self.provider.start(a_job(**changes))
        assert isinstance(done, Done)
        return done

    async def failure(self, **changes: Any) -> ProviderError:
        with pytest.raises(ProviderError) as caught:
            await self.make(**changes)
        return caught.value

    async def watch(self, **changes: Any) -> tuple[list[Partial], Done]:
        """Stream a job, to its end."""
        looks: list[Partial] = []
        try:
            async with aclosing(self.provider.stream(a_job(**changes))) as made:
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
    """How to connect an adapter, and which failures its upstream can show."""

    name: str
    connect: Callable[[Path], AbstractAsyncContextManager[Upstream]]
    failures: Mapping[FailureKind, Billed]


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
async def tools(
    folder: Path, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncGenerator[Tools, None]:
    wire = Wire(8, transport=transport, download_pauses_s=(0, 0, 0))
    try:
        yield Tools(wire, SpoolFolder(folder), fraction=lambda: 0.5)
    finally:
        await wire.close()


@asynccontextmanager
async def openai_upstream(
    folder: Path, **options: object
) -> AsyncGenerator[tuple[Upstream, OpenAISimulator], None]:
    async with serve_openai_simulator() as simulator, tools(folder) as given:
        account = an_account(base_url=simulator.base_url, secret=KEY, options=options)

        def fail(kind: FailureKind) -> None:
            simulator.script(OPENAI_FAULTS[kind])

        yield (
            Upstream(
                PROVIDERS["openai"](account, given),
                fail,
                lambda: simulator.script(Fault(hang=True)),
                lambda: sum(purchase.n for purchase in simulator.purchases),
                given.spools,
            ),
            simulator,
        )


@asynccontextmanager
async def connect_openai(folder: Path) -> AsyncGenerator[Upstream, None]:
    async with openai_upstream(folder) as (upstream, _):
        yield upstream


@asynccontextmanager
async def connect_sandbox(folder: Path) -> AsyncGenerator[Upstream, None]:
    async with tools(folder) as given:
        account = an_account(options={"latency_ms": 0})
        provider = PROVIDERS["sandbox"](account, given)
        assert isinstance(provider, Sandbox)
        settings = provider.settings

        def fail(kind: FailureKind) -> None:
            settings.change({"failure_rate": 1, "failure_kind": kind.value})

        def purchases() -> int:
            bought = cast("dict[str, int]", settings.snapshot()["purchases"])
            return bought["images"]

        def hang() -> None:
            settings.change({"latency_ms": 600_000})

        yield Upstream(provider, fail, hang, purchases, given.spools)


def openai_error(status: int, code: str | None, message: str = "no") -> Fault:
    error = {"message": message, "type": "x", "param": None, "code": code}
    return Fault(status=status, body={"error": error})


OPENAI_FAULTS = {
    K.INVALID_REQUEST: openai_error(400, "invalid_value", f"wrong, {KEY}"),
    K.CONTENT_POLICY: openai_error(400, "moderation_blocked", f"refused, {KEY}"),
    K.UNSUPPORTED: openai_error(404, "model_not_found"),
    K.AUTH: openai_error(401, "invalid_api_key", f"Incorrect API key: {KEY}"),
    K.INSUFFICIENT_FUNDS: openai_error(429, "insufficient_quota"),
    K.RATE_LIMITED: openai_error(429, "rate_limit_exceeded"),
    K.OVERLOADED: openai_error(503, "server_is_overloaded"),
    K.BAD_GATEWAY: Fault(status=502, body=f"<html>{KEY}</html>"),
    K.TIMEOUT: Fault(close="before_reply"),
    K.NO_OUTPUT: Fault(answer="empty"),
    K.RESULT_LOST: Fault(answer="dead_url"),
}
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
CASES = [
    Case("openai", connect_openai, USUALLY_BILLED),
    Case("sandbox", connect_sandbox, USUALLY_BILLED | {K.NETWORK: Billed.NO}),
]
each_provider = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_failure = pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in case.failures],
    ids=lambda value: getattr(value, "name", "").lower(),
)
