"""Probe upstreams: a free question to each, to see whether its credential is good."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from providers.kit.contract import FailureKind, Provider, ProviderError

PROBE_MAX_S = 20.0
"""For one upstream; a program that fetches its token included."""
PROBES_AT_ONCE_MAX = 16

ADVICE: Mapping[FailureKind, str] = {
    FailureKind.AUTH: "check the credential, what it may do, and base_url",
    FailureKind.INSUFFICIENT_FUNDS: "top the account up, or raise its spend limit",
    FailureKind.NETWORK: "check base_url, and whether this machine can reach it",
    FailureKind.TIMEOUT: f"no answer in {PROBE_MAX_S:.0f} s: check base_url, try again",
    FailureKind.RATE_LIMITED: "try again later",
    FailureKind.OVERLOADED: "try again later",
    FailureKind.BAD_GATEWAY: "check base_url, or try again later",
}
_ADVICE_ELSE = "check base_url and options"


@dataclass(frozen=True, slots=True)
class Probe:
    """What asking one upstream told; without a ``kind`` its credential is good."""

    upstream: str
    kind: FailureKind | None = None
    detail: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether there is something to put right; not where nothing can be asked."""
        return self.kind not in {None, FailureKind.UNSUPPORTED}

    @property
    def text(self) -> str:
        """One line that a terminal can show, with what to do."""
        if self.kind is None:
            return f"{self.upstream}: ok"
        shown = "".join(c if c.isprintable() else " " for c in self.detail)
        detail = " ".join(shown.split())
        if self.kind is FailureKind.UNSUPPORTED:
            return f"{self.upstream}: not tested: {detail}"
        todo = ADVICE.get(self.kind, _ADVICE_ELSE)
        return f"{self.upstream}: {self.kind.value}: {todo} ({detail})"


async def probe_all(
    providers: Mapping[str, Provider],
    models: Mapping[str, str],
    *,
    limit_s: float = PROBE_MAX_S,
) -> list[Probe]:
    """Ask all upstreams at once, each for a model of its own; in their order."""
    free = asyncio.Semaphore(PROBES_AT_ONCE_MAX)

    async def asked(name: str, provider: Provider) -> Probe:
        async with free:
            return await _probed(name, provider, models[name], limit_s)

    return list(await asyncio.gather(*(asked(*each) for each in providers.items())))


async def _probed(name: str, provider: Provider, model: str, limit_s: float) -> Probe:
    try:
        async with asyncio.timeout(limit_s):
            await provider.probe(model, limit_s)
    except ProviderError as error:
        return Probe(name, error.kind, error.detail)
    except TimeoutError:
        return Probe(name, FailureKind.TIMEOUT, "the deadline passed")
    return Probe(name)
