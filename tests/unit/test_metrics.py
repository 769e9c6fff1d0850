"""What is shown of upstreams while configurations come and go."""

from __future__ import annotations

from gateway.adapters.metrics import Metrics
from gateway.core.catalogue import Catalogue
from gateway.core.events import BreakerChanged, UpstreamChanged
from tests.unit.test_routing import offer

STATE = "imageway_circuit_state"
DRAINED = "imageway_upstream_drained"
MODEL, OPERATION = "gpt-image-2", "generate"


def offering(*upstreams: str) -> Catalogue:
    return Catalogue({}, {MODEL: tuple(offer(name) for name in upstreams)})


def opened(upstream: str) -> BreakerChanged:
    return BreakerChanged(f"{upstream}/{MODEL}", upstream, OPERATION, "open", "auth")


async def states(metrics: Metrics, upstream: str) -> set[str]:
    """The states that the circuit for generations of an upstream is shown in."""
    text, _ = await metrics.render()
    return {
        line.partition('state="')[2].partition('"')[0]
        for line in text.decode().splitlines()
        if line.startswith(STATE)
        and f'upstream="{upstream}"' in line
        and f'operation="{OPERATION}"' in line
        and not line.endswith(" 0.0")
    }


async def test_a_breaker_that_is_open_is_shown_so_after_a_reload_too() -> None:
    metrics = Metrics()
    metrics.known(offering("a"))
    metrics.on_event(opened("a"))

    metrics.known(offering("a", "b"))

    assert await states(metrics, "a") == {"open"}
    assert await states(metrics, "b") == {"closed"}


async def test_of_an_offer_that_is_gone_nothing_is_shown_however_its_calls_end() -> (
    None
):
    metrics = Metrics()
    metrics.known(offering("a", "b"))
    metrics.on_event(UpstreamChanged("a", "drained"))

    metrics.known(offering("b"))
    metrics.on_event(opened("a"))

    text = (await metrics.render())[0].decode()
    assert await states(metrics, "a") == set()
    assert f'{DRAINED}{{upstream="a"}}' not in text

    metrics.known(offering("a", "b"))

    assert await states(metrics, "a") == {"open"}


async def test_an_upstream_that_was_drained_before_it_was_known_is_shown_so() -> None:
    metrics = Metrics()
    metrics.known(offering("a"))
    metrics.on_event(UpstreamChanged("b", "drained"))

    metrics.known(offering("a", "b"))

    text = (await metrics.render())[0].decode()
    assert f'{DRAINED}{{upstream="a"}} 0.0' in text
    assert f'{DRAINED}{{upstream="b"}} 1.0' in text
