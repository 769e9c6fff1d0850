"""Turns a LiteLLM proxy's configuration into ours, and says what it left behind. Pure.

Only what makes pictures is carried over: each image model at each provider becomes an
offer, each account (provider, address, credential) an upstream. Figures are read as
the texts that they are written as, never through a float.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

ENTRIES_MAX = 10_000
ENVIRONMENT = "os.environ/"
PER_MILLION = 1_000_000
IMAGE_MODES = frozenset({"image_generation", "image_edit"})
TEXT_MAX_CHARS = 200


@dataclass(frozen=True, slots=True)
class Maker:
    """What a LiteLLM provider is here. ``card`` names its prices in the catalogue."""

    kind: str
    base_url: str
    variable: str
    card: str = ""


MAKERS: Mapping[str, Maker] = {
    "openai": Maker("openai", "https://api.openai.com/v1", "OPENAI_API_KEY", "openai"),
    "azure": Maker("azure", "", "AZURE_API_KEY", "azure"),
    "openrouter": Maker(
        "openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"
    ),
    "fal_ai": Maker("fal", "https://queue.fal.run", "FAL_AI_API_KEY", "fal"),
    "replicate": Maker(
        "replicate", "https://api.replicate.com/v1", "REPLICATE_API_KEY"
    ),
}
_USED = frozenset(
    {
        *("model", "api_key", "api_base", "base_url", "api_version"),
        *("max_parallel_requests", "input_cost_per_token", "output_cost_per_token"),
        *("input_cost_per_image", "output_cost_per_image", "input_cost_per_pixel"),
        *("output_cost_per_pixel", "cache_read_input_token_cost"),
        *("input_cost_per_image_token", "output_cost_per_image_token"),
        *("cache_read_input_image_token_cost", "custom_llm_provider"),
    }
)
_SECTIONS = {
    "router_settings": (
        "requests go to the cheapest healthy upstream, see docs/routing.md"
    ),
    "litellm_settings": "see docs/configuration.md for what can be set",
    "general_settings": (
        "an admin key is server.admin_key, keys are made with imageway keys create"
    ),
    "environment_variables": "set them in the gateway's environment",
}
_FALLBACKS = (
    "fallbacks from one model to another are not carried over: a request stays with "
    "the model that it names, and falls over between its upstreams"
)


@dataclass(slots=True)
class _Upstream:
    name: str
    maker: Maker
    base_url: str
    credential: str
    max_concurrent: int | None = None
    options: dict[str, object] = field(default_factory=dict)
    offers: dict[str, str] = field(default_factory=dict)
    """The text of each, by variant."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it: the text of a gateway.toml, and all that is not in it."""

    text: str
    offers: int
    notes: tuple[str, ...]


def from_litellm(
    config: object, cards: Mapping[str, Collection[str]], aliases: Mapping[str, str]
) -> Imported:
    """Turn a configuration into ours.

    Args:
        config: the YAML as it is, all scalars being texts.
        cards: which price cards the catalogue has, by each variant.
        aliases: variants by their other names.
    """
    work = _Work(cards, aliases)
    if not isinstance(config, dict):
        return Imported("", 0, ("the file is no mapping: it is no LiteLLM config",))
    entries = config.get("model_list")
    if not isinstance(entries, list) or not entries:
        work.note("there is no model_list")
        entries = []
    for place, entry in enumerate(entries[:ENTRIES_MAX]):
        work.take(f"model_list[{place}]", entry)
    if work.others:
        work.note(f"{work.others} models of other modes than pictures were left out")
    for section, value in config.items():
        work.section(str(section), value)
    offers = sum(len(upstream.offers) for upstream in work.upstreams.values())
    return Imported(work.text(), offers, tuple(work.notes))


@dataclass(slots=True)
class _Work:
    cards: Mapping[str, Collection[str]]
    aliases: Mapping[str, str]
    upstreams: dict[tuple[str, str, str], _Upstream] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: int = 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def variant(self, name: object) -> str | None:
        if not isinstance(name, str):
            return None
        known = self.aliases.get(name, name)
        return known if known in self.cards else None

    def take(self, where: str, entry: object) -> None:
        params, info = _part(entry, "litellm_params"), _part(entry, "model_info")
        name = entry.get("model_name") if isinstance(entry, dict) else None
        model = params.get("model")
        if not isinstance(model, str) or not isinstance(name, str):
            self.note(f"{where}: has no model_name or no litellm_params.model")
            return
        provider, given = _split(model, params.get("custom_llm_provider"))
        below = info.get("base_model") or given.rpartition("/")[2]
        found = self.variant(name) or self.variant(below)
        mode = info.get("mode")
        if found is None and mode not in IMAGE_MODES:
            self.others += 1
            return
        title = f"{where} ({name[:TEXT_MAX_CHARS]})"
        maker = MAKERS.get(provider)
        if maker is None:
            self.note(f"{title}: there is no adapter for the provider {provider!r}")
            return
        if found is None:
            self.note(
                f"{title}: the catalogue has no model of that name; add a [[variant]] "
                "to catalogue.toml first, it says what tenants pay"
            )
            return
        if self.variant(name) is None:
            self.note(
                f"{title}: clients have to ask for {found}, or give it the alias "
                f"{name!r} in catalogue.toml"
            )
        self.offer(title, maker, (provider, given, found), {**info, **params})

    def offer(
        self,
        title: str,
        maker: Maker,
        what: tuple[str, str, str],
        params: Mapping[str, object],
    ) -> None:
        provider, model, variant = what
        base_url = self.base_url(title, maker, params)
        cost = self.cost(title, maker, variant, base_url, params)
        if base_url is None or cost is None:
            return
        credential = self.credential(title, maker, params.get("api_key"))
        upstream = self.upstream(provider, maker, base_url, credential)
        if variant in upstream.offers:
            self.note(
                f"{title}: {upstream.name} offers {variant} already; another account "
                "of the provider would be an upstream of its own"
            )
            return
        upstream.offers[variant] = _offer_text(variant, model, cost)
        self.options(title, upstream, model, variant, params)
        unused = sorted(
            key
            for key in params
            if key not in _USED | {"mode", "base_model", "id"} and params[key] != ""
        )
        if unused:
            self.note(f"{title}: not carried over: {', '.join(unused)}")

    def upstream(
        self, provider: str, maker: Maker, base_url: str, credential: str
    ) -> _Upstream:
        account = (provider, base_url, credential)
        if account not in self.upstreams:
            slug = provider.replace("_", "-")
            taken = sum(1 for other, *_ in self.upstreams if other == provider)
            name = slug if not taken else f"{slug}-{taken + 1}"
            self.upstreams[account] = _Upstream(name, maker, base_url, credential)
        return self.upstreams[account]

    def base_url(
        self, title: str, maker: Maker, params: Mapping[str, object]
    ) -> str | None:
        given = params.get("api_base") or params.get("base_url") or maker.base_url
        if not isinstance(given, str) or not given.startswith(("https://", "http://")):
            self.note(f"{title}: api_base must be a URL in the file itself")
            return None
        if maker.kind == "azure":
            return given.partition("/openai")[0].rstrip("/")
        return given.rstrip("/")

    def credential(self, title: str, maker: Maker, given: object) -> str:
        if isinstance(given, str) and given.startswith(ENVIRONMENT):
            return "env:" + given.removeprefix(ENVIRONMENT)
        if given:
            self.note(
                f"{title}: its api_key stands in the file and was not copied: put it "
                f"into the environment variable {maker.variable}"
            )
        return f"env:{maker.variable}"

    def options(
        self,
        title: str,
        upstream: _Upstream,
        model: str,
        variant: str,
        params: Mapping[str, object],
    ) -> None:
        if upstream.maker.kind == "azure":
            version = params.get("api_version")
            if isinstance(version, str) and version and version != "preview":
                upstream.options |= {"form": "deployment", "api_version": version}
            if model != variant:
                models = upstream.options.setdefault("models", {})
                assert isinstance(models, dict)
                models[model] = variant
        parallel = params.get("max_parallel_requests")
        if isinstance(parallel, str) and re.fullmatch(r"[1-9]\d{0,3}", parallel):
            most = upstream.max_concurrent
            upstream.max_concurrent = min(most or int(parallel), int(parallel))
            if most is not None and most != int(parallel):
                self.note(
                    f"{title}: max_parallel_requests is a limit of the whole upstream "
                    f"here: {upstream.max_concurrent}"
                )

    def cost(
        self,
        title: str,
        maker: Maker,
        variant: str,
        base_url: str | None,
        params: Mapping[str, object],
    ) -> str | None:
        given = _cost_text(params)
        if given is not None:
            return given
        own = maker.kind == "azure" or base_url == maker.base_url
        if own and maker.card in self.cards[variant]:
            self.note(f"{title}: priced by the catalogue's card {maker.card}")
            return f"card = {json.dumps(maker.card)}"
        self.note(
            f"{title}: it is not known what it costs, and an unknown cost is never "
            "zero: give output_cost_per_image, or the costs of tokens, and import again"
        )
        return None

    def section(self, name: str, value: object) -> None:
        if name == "model_list" or not value:
            return
        keys = sorted(map(str, value)) if isinstance(value, dict) else []
        if any("fallbacks" in key for key in keys):
            self.note(f"{name}: {_FALLBACKS}")
        rest = [key for key in keys if "fallbacks" not in key]
        if rest or not keys:
            hint = _SECTIONS.get(name, "nothing here is like it")
            listed = f" ({', '.join(rest)})" if rest else ""
            self.note(f"{name}{listed} is not carried over: {hint}")

    def text(self) -> str:
        parts = [_upstream_text(each) for each in self.upstreams.values()]
        return "\n".join(parts)


def _part(entry: object, name: str) -> Mapping[str, object]:
    part = entry.get(name) if isinstance(entry, dict) else None
    return part if isinstance(part, dict) else {}


def _split(model: str, provider: object) -> tuple[str, str]:
    before, slash, after = model.partition("/")
    if isinstance(provider, str) and provider:
        return provider, after if slash and before == provider else model
    return (before, after) if slash else ("openai", model)


def _cost_text(params: Mapping[str, object]) -> str | None:
    def usd(*names: str) -> Decimal | None:
        for name in names:
            try:
                amount = Decimal(str(params[name]))
            except (KeyError, InvalidOperation):
                continue
            if amount.is_finite() and amount > 0:
                return amount
        return None

    image = usd("output_cost_per_image", "input_cost_per_image")
    if image is not None:
        return f'cost = {{ per = "image", flat = {image:f} }}'
    pixel = usd("output_cost_per_pixel", "input_cost_per_pixel")
    if pixel is not None:
        return f'cost = {{ per = "megapixel", usd = {pixel * PER_MILLION:f} }}'
    text = usd("input_cost_per_token")
    out = usd("output_cost_per_image_token", "output_cost_per_token")
    if text is None or out is None:
        return None
    picture = usd("input_cost_per_image_token") or text
    prices = {
        "text_input": text,
        "text_cached": usd("cache_read_input_token_cost") or text,
        "image_input": picture,
        "image_cached": usd("cache_read_input_image_token_cost") or picture,
        "image_output": out,
    }
    listed = ", ".join(f"{k} = {v * PER_MILLION:f}" for k, v in prices.items())
    return f'cost = {{ per = "1M tokens", {listed} }}'


def _offer_text(variant: str, model: str, cost: str) -> str:
    return (
        "[[upstream.offer]]\n"
        f"variant = {json.dumps(variant)}\n"
        f"model = {json.dumps(model)}\n"
        f"{cost}\n"
    )


def _upstream_text(upstream: _Upstream) -> str:
    lines = [
        "[[upstream]]",
        f"name = {json.dumps(upstream.name)}",
        f"kind = {json.dumps(upstream.maker.kind)}",
        f"base_url = {json.dumps(upstream.base_url)}",
        f"credential = {json.dumps(upstream.credential)}",
        f"failure_domain = {json.dumps(upstream.name)}",
    ]
    if upstream.max_concurrent is not None:
        lines.append(f"max_concurrent = {upstream.max_concurrent}")
    if upstream.options:
        lines.append(f"options = {_inline(upstream.options)}")
    return "\n".join([*lines, "", *upstream.offers.values()])


def _inline(table: Mapping[str, object]) -> str:
    parts = (
        f"{json.dumps(key)} = "
        f"{_inline(value) if isinstance(value, dict) else json.dumps(value)}"
        for key, value in table.items()
    )
    return f"{{ {', '.join(parts)} }}"
