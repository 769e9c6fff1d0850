"""What is shown of upstreams while configurations come and go."""

from __future__ import annotations

from gateway.adapters.metrics import Metrics
from gateway.core.events import BreakerChanged, UpstreamChanged

STATE = "imageway_breaker_state"
DRAINED = "imageway_upstream_drained"


def breaker(offer_id: str, state: str) -> BreakerChanged:
    return BreakerChanged(offer_id, offer_id.partition("/")[0], state, "auth")


async def shown(metrics: Metrics, name: str) -> list[str]:
    """The labels of a metric that are not at 0."""
    text, _ = await metrics.render()
    lines = [line for line in text.decode().splitlines() if line.startswith(name)]
    return [line.partition(" ")[0] for line in lines if not line.endswith(" 0.0")]


def state(offer_id: str, state: str) -> str:
    return f'{STATE}{{offer="{offer_id}",state="{state}"}}'


async def test_a_breaker_that_is_open_is_shown_so_after_a_reload_too() -> None:
    metrics = Metrics()
    metrics.known(["a/m"], [])
    metrics.on_event(breaker("a/m", "open"))

    metrics.known(["a/m", "b/m"], [])

    assert await shown(metrics, STATE) == [state("a/m", "open"), state("b/m", "closed")]


async def test_of_an_offer_that_is_gone_nothing_is_shown_however_its_calls_end() -> (
    None
):
    metrics = Metrics()
    metrics.known(["a/m", "b/m"], [])
    metrics.on_event(UpstreamChanged("a", "drained"))

    metrics.known(["b/m"], [])
    metrics.on_event(breaker("a/m", "open"))

    text = (await metrics.render())[0].decode()
    assert 'offer="a/m",state=' not in text
    assert f'{DRAINED}{{upstream="a"}}' not in text

    metrics.known(["a/m", "b/m"], [])

    assert state("a/m", "open") in await shown(metrics, STATE)
