"""Ten thousand random requests at random offers: the cheapest one is chosen, always."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from gateway.core.breaker import BreakerState, Health
from gateway.core.catalogue import Catalogue
from gateway.core.pricing import cost_rule
from gateway.core.requests import parse_generation
from gateway.core.routing import Moment, decide
from gateway.core.sizes import Size
from gateway.flows.generate import wish_of
from gateway.settings import load_settings
from providers.kit.contract import Capabilities, Operation
from tests.unit import cheapest
from tests.unit.cheapest import LEFT_MS, TODAY, Ask, Model, Pixels, Stall

SEED = 20261124
MARKETS = 500
ASKS_PER_MARKET = 20

TILES = Model("gpt-image-2", {"low": 16, "medium": 48, "high": 96})
FINER = Model(
    "gpt-image-2.5-flare", {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96}
)
FIRST = Model("gpt-image-1.5", {})
RATIO_SIZES = {
    ("1:1", "1K"): (1024, 1024),
    ("16:9", "1K"): (1360, 768),
    ("3:1", "1K"): (1776, 592),
    ("4:5", "1K"): (912, 1152),
    ("16:9", "2K"): (2736, 1536),
    ("3:2", "2K"): (2512, 1680),
    ("9:21", "2K"): (1344, 3136),
    ("1:1", "4K"): (2880, 2880),
    ("2:1", "4K"): (3840, 1920),
}
"""What some ratios and tiers come to, by the table of the contract."""
PIXELS = [
    *((1024, 1024), (1536, 1024), (1024, 1536), (1920, 1088), (2048, 2048)),
    *((2560, 1440), (2192, 2000), (2208, 2000), (3840, 2160), (1296, 1312)),
    *((1024, 640), (1632, 1040), (1648, 1040)),
]
REFERENCES = [None, (1, 1), (32, 32), (33, 32), (640, 480), (1024, 1024), (4000, 3000)]
ANYTHING = Capabilities(frozenset(Operation), mask=True, references_max=16)


def some_usd(random: Random, low: float, high: float, places: int) -> str:
    # A few round figures among the odd ones, so that there are ties and near misses.
    if random.random() < 0.3:
        places = min(places, 2)
    return f"{max(random.uniform(low, high), 10.0**-places):.{places}f}"


def some_card(random: Random, model: Model) -> tuple[dict[str, str], dict[str, str]]:
    per = random.choice(["1M tokens", "1K tokens", "image", "image", "megapixel"])
    card = {"per": per}
    if random.random() < 0.2:
        card["unit_usd"] = some_usd(random, 0.001, 0.1, 9)
    if per == "megapixel":
        return card | {"usd": some_usd(random, 0.002, 0.15, 9)}, {}
    if per == "image":
        table = some_table(random, model)
        if not table or random.random() < 0.5:
            card["flat"] = some_usd(random, 0.005, 0.6, 9)
        return card, table
    scale, places = (1, 3) if per == "1M tokens" else (1000, 6)
    classes = {"text_input": 5, "text_cached": 2, "image_input": 8, "image_cached": 3}
    for name, usual in {**classes, "image_output": 30}.items():
        low, high = usual / 4 / scale, usual * 2 / scale
        card[name] = some_usd(random, low, high, max(places, 3))
    return card, {}


def some_table(random: Random, model: Model) -> dict[str, str]:
    qualities = ["*", "auto", *model.qualities]
    sizes = ["*", "1K", "2K", "4K", "auto", "1024x1024", "2048x2048", "1360x768"]
    rows = {
        f"{random.choice(qualities)}/{random.choice(sizes)}"
        for _ in range(random.randint(0, 10))
    } - {"*/*"}
    return {row: some_usd(random, 0.005, 0.6, 9) for row in sorted(rows)}


def some_abilities(random: Random, model: Model) -> dict[str, object]:
    sizes = [f"{w}x{h}" for w, h in (PIXELS if model.bases else PIXELS[:3])]
    limits: dict[str, Callable[[], object]] = {
        "operations": lambda: [random.choice(["generate", "edit"])],
        "n_max": lambda: random.randint(1, 10),
        "sizes": lambda: random.sample(sizes, random.randint(1, len(sizes))),
        "qualities": lambda: random.sample(
            ["auto", *model.qualities], random.randint(1, len(model.qualities))
        ),
        "backgrounds": lambda: [random.choice(["opaque", "transparent"])],
        "mask": lambda: random.random() < 0.5,
        "references_max": lambda: random.randint(0, 16),
    }
    return {name: make() for name, make in limits.items() if random.random() < 0.15}


def some_stall(random: Random, model: Model, name: str) -> Stall:
    card, table = some_card(random, model)
    tiers = [
        f"{quality}/{size}"
        for quality in ("auto", *model.qualities)
        for size in ("1K", "2K", "4K", "auto")
    ]
    return Stall(
        name,
        card,
        table,
        can=some_abilities(random, model),
        sunset=random.choice([None] * 7 + ["2026-11-23", TODAY, "2026-11-25"]),
        open=random.random() < 0.1,
        slots=random.choice([0, 1, 1, 2, 5, 8, 8, 8]),
        busy=random.randint(0, 3),
        usual_ms=random.choice([None, None, 20_000, LEFT_MS, LEFT_MS + 1]),
        ratios={
            tier: random.choice(
                [500_000, 999_999, 2_000_000, random.randint(5, 20) * 10**5]
            )
            for tier in tiers
            if random.random() < 0.3
        },
    )


def some_market(random: Random, model: Model) -> list[Stall]:
    stalls = [some_stall(random, model, f"u{i}") for i in range(random.randint(2, 8))]
    if random.random() < 0.3:
        # Two that only differ in name, or in how busy they are.
        twin = random.choice(stalls)
        stalls.append(
            replace(twin, name="a-twin", busy=random.choice([twin.busy, 9, 0]))
        )
    random.shuffle(stalls)
    return stalls


def some_ask(random: Random, model: Model) -> tuple[Ask, dict[str, object]]:
    """Make a request, and the body that a client writes for it."""
    body: dict[str, object] = {"model": model.name}
    body["prompt"] = random.choice(
        ["a", "a sunset over the sea", "é" * 50, "x" * 20_000]
    )
    size, written = some_size(random, model)
    body |= written
    quality = random.choice(["auto", *model.qualities])
    body["quality"] = quality
    body["n"] = n = random.randint(1, 10)
    background = random.choice([None, None, "auto", "opaque", "transparent"])
    body["background"] = background
    count = random.choice([0, 0, 0, 1, 1, 2, 7, 16])
    references = tuple(random.choice(REFERENCES) for _ in range(count))
    mask = bool(references) and random.random() < 0.3
    if references:
        body["image_urls"] = ["https://a.test/1"] * count
    if mask:
        body["mask_url"] = "https://a.test/m"
    partials = random.choice([0, 0, 0, 1, 3])
    if partials:
        body |= {"stream": True, "partial_images": partials, "n": 1}
        n = 1
    prompt = str(body["prompt"])
    return (
        Ask(model, prompt, size, quality, n, references, mask, background, partials),
        body,
    )


def some_size(random: Random, model: Model) -> tuple[Pixels | None, dict[str, object]]:
    if random.random() < 0.15:
        return None, {"size": "auto"}
    if model.bases and random.random() < 0.4:
        (ratio, tier), size = random.choice(list(RATIO_SIZES.items()))
        return size, {"size": ratio, "resolution": tier}
    width, height = random.choice(PIXELS if model.bases else PIXELS[:3])
    return (width, height), {"size": f"{width}x{height}"}


def as_toml(stalls: Sequence[Stall], model: Model) -> str:
    """Write the offers down as an operator would."""
    lines = []
    for stall in stalls:
        per = stall.card["per"]
        figures = [f'per = "{per}"']
        figures += [f"{n} = {usd}" for n, usd in stall.card.items() if n != "per"]
        rows = ", ".join(f'"{row}" = {usd}' for row, usd in stall.table.items())
        figures += [f"table = {{ {rows} }}"] if rows else []
        lines += ["[[upstream]]", f'name = "{stall.name}"', 'kind = "sandbox"']
        lines += ["[[upstream.offer]]", f'variant = "{model.name}"', 'model = "m"']
        lines += [f"cost = {{ {', '.join(figures)} }}"]
        lines += [f"sunset = {stall.sunset}"] if stall.sunset else []
        lines += [f"{name} = {json.dumps(can)}" for name, can in stall.can.items()]
    return "\n".join(lines)


Market = tuple[list[Stall], Catalogue, list[tuple[Ask, dict[str, object]]]]


def markets(folder: Path) -> Iterator[Market]:
    random = Random(SEED)
    while True:
        model = random.choice([TILES, TILES, FINER, FIRST])
        stalls = some_market(random, model)
        (folder / "gateway.toml").write_text(as_toml(stalls, model))
        settings = load_settings(folder / "gateway.toml", {}, kinds=None)
        catalogue = settings.catalogue(lambda upstream, name: ANYTHING)
        yield (
            stalls,
            catalogue,
            [some_ask(random, model) for _ in range(ASKS_PER_MARKET)],
        )


def chosen(
    stalls: Sequence[Stall], catalogue: Catalogue, ask: Ask, body: dict[str, object]
) -> tuple[str, int] | None:
    """Let the gateway decide, from the body to the first of the ranking."""
    request = parse_generation(body, catalogue)
    sizes = [Size(*each) if each else None for each in ask.references]
    cost_nanousd = cost_rule(request, sizes or None)
    offers = catalogue.offers[request.variant.name]
    health = {
        f"{stall.name}/{request.variant.name}": health_of(stall) for stall in stalls
    }
    priced = [(offer, cost_nanousd(offer, request.n)) for offer in offers]
    decision = decide(wish_of(request), priced, health, Moment(TODAY, LEFT_MS))
    if not decision.ranked:
        return None
    first = decision.ranked[0]
    assert first.cost_nanousd is not None
    return first.offer.upstream, first.cost_nanousd


def health_of(stall: Stall) -> Health:
    return Health(
        state=BreakerState.OPEN if stall.open else BreakerState.CLOSED,
        slots_free=stall.slots,
        in_flight=stall.busy,
        usual_ms=stall.usual_ms,
        cost_ratios=stall.ratios,
    )


def test_the_cheapest_offer_is_chosen_ten_thousand_times(tmp_path: Path) -> None:
    decisions = wins = 0
    for stalls, catalogue, asks in islice(markets(tmp_path), MARKETS):
        for ask, body in asks:
            found = chosen(stalls, catalogue, ask, body)

            assert found == cheapest.cheapest(stalls, ask), (stalls, ask)
            decisions += 1
            wins += found is not None

    assert decisions == 10_000
    assert wins > 8_000


Decided = tuple[Sequence[Stall], Ask, tuple[str, int] | None]


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> list[Decided]:
    folder = tmp_path_factory.mktemp("markets")
    return [
        (stalls, ask, chosen(stalls, catalogue, ask, body))
        for stalls, catalogue, asks in islice(markets(folder), 60)
        for ask, body in asks
    ]


Forgetting = Callable[[Sequence[Stall], Ask], tuple[str, int] | None]


def forgetting(ask_changes: dict[str, object], **changes: object) -> Forgetting:
    def told(stalls: Sequence[Stall], ask: Ask) -> tuple[str, int] | None:
        kept = [replace(stall, **changes) for stall in stalls]  # type: ignore[arg-type]
        return cheapest.cheapest(kept, replace(ask, **ask_changes))  # type: ignore[arg-type]

    return told


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(forgetting({}, ratios={}), id="what was learned"),
        pytest.param(forgetting({}, can={}), id="what an offer can do"),
        pytest.param(forgetting({}, sunset=None), id="what has ended"),
        pytest.param(forgetting({}, open=False), id="open breakers"),
        pytest.param(forgetting({}, slots=1), id="slots"),
        pytest.param(forgetting({}, busy=0), id="who is busy"),
        pytest.param(forgetting({}, usual_ms=None), id="who is slow"),
        pytest.param(forgetting({}, table={}), id="rows"),
        pytest.param(forgetting({"references": ()}), id="references"),
        pytest.param(forgetting({"size": None}), id="the size"),
        pytest.param(forgetting({"quality": "low"}), id="the quality"),
        pytest.param(forgetting({"background": None}), id="the background"),
        pytest.param(forgetting({"mask": False}), id="the mask"),
        pytest.param(forgetting({"prompt": ""}), id="the prompt"),
    ],
)
def test_a_rule_that_is_forgotten_shows(
    decided: list[Decided], told: Forgetting
) -> None:
    # The control: a witness who leaves one thing out names another offer.
    others = [told(stalls, ask) for stalls, ask, _ in decided]

    assert any(
        found and (not other or found[0] != other[0])
        for (_, _, found), other in zip(decided, others, strict=True)
    )
