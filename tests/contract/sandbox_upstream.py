"""The sandbox, which is its own upstream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

from providers.kit.contract import Billed, Capabilities, FailureKind, Operation
from providers.registry import PROVIDERS
from providers.sandbox import Sandbox
from tests.builders import an_account
from tests.contract.upstreams import USUALLY_BILLED, Case, K, Upstream, tools


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

        yield Upstream(provider, fail, hang, purchases, given, account)


SANDBOX = Case(
    "sandbox",
    connect_sandbox,
    USUALLY_BILLED | {K.NETWORK: Billed.NO},
    Capabilities(
        operations=frozenset(Operation), mask=True, references_max=16, stream=True
    ),
    secret=an_account().secret,
    wrong_options=[({"latency_ms": "1"}, "latency_ms"), ({"nope": 1}, "nope")],
    is_remote=False,
)
