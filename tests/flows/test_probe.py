"""All upstreams are probed at once, and none can hold up the others."""

from __future__ import annotations

import pytest

from gateway.flows.probe import ADVICE, Probe, probe_all
from providers.kit.contract import FailureKind, ProviderError
from tests.fakes import ScriptedProvider

K = FailureKind


def a_provider(ends: ProviderError | None) -> ScriptedProvider:
    provider = ScriptedProvider(ProviderError(K.BAD_GATEWAY, "not scripted"))
    provider.probe_ends = ends
    return provider


async def test_each_upstream_is_asked_for_a_model_of_its_own() -> None:
    good = ScriptedProvider(ProviderError(K.BAD_GATEWAY, "not scripted"))
    bad = a_provider(ProviderError(K.AUTH, "401: no"))
    open_ = a_provider(ProviderError(K.UNSUPPORTED, "nothing to ask"))
    hangs = a_provider(None)
    providers = {"good": good, "bad": bad, "hangs": hangs, "open": open_}

    probes = await probe_all(providers, {name: f"{name}-model" for name in providers})

    assert [(probe.upstream, probe.kind) for probe in probes] == [
        ("good", None),
        ("bad", K.AUTH),
        ("hangs", K.TIMEOUT),
        ("open", K.UNSUPPORTED),
    ]
    assert [probe.has_failed for probe in probes] == [False, True, True, False]
    assert good.probed == ["good-model"]
    assert not any(provider.jobs for provider in providers.values())


@pytest.mark.parametrize("kind", FailureKind)
def test_every_failure_says_what_to_do_in_one_line(kind: FailureKind) -> None:
    text = Probe("one", kind, "two\nlines \x1b[31mof it").text
    assert text.isprintable()
    assert "two lines" in text
    if kind is not K.UNSUPPORTED:
        assert text.startswith(f"one: {kind.value}: ")
        assert ADVICE.get(kind, "check base_url") in text
