"""A LiteLLM configuration becomes ours, and what is left behind is said."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gateway.core.litellm import Imported, from_litellm
from gateway.settings import load_settings
from providers.registry import PROVIDERS

yaml: Any = import_module("yaml")
SHIPPED = load_settings(None, {}, kinds=None)
CARDS = {name: SHIPPED.cards.get(name, {}) for name in SHIPPED.variants}
ALIASES = {a: v.name for v in SHIPPED.variants.values() for a in v.aliases}

CONFIG = """
model_list:
  - model_name: gpt-image-2
    litellm_params:
      model: openai/gpt-image-2
      api_key: os.environ/OPENAI_API_KEY
      rpm: 60
      max_parallel_requests: 12
    model_info: {mode: image_generation}
  - model_name: gpt-image-2
    litellm_params:
      model: azure/prod-pictures
      api_base: https://my-resource.openai.azure.com/
      api_key: os.environ/AZURE_KEY
      api_version: 2025-04-01-preview
    model_info: {mode: image_generation, base_model: gpt-image-2}
  - model_name: pictures
    litellm_params:
      model: openai/gpt-image-2-2026-04-21
      api_base: https://images.example.com/v1
      api_key: sk-this-is-a-secret
      input_cost_per_token: 1e-05
      output_cost_per_token: 0.00004
      cache_read_input_token_cost: 2.5e-06
  - model_name: gpt-image-1.5
    litellm_params:
      model: openrouter/openai/gpt-image-1.5
      output_cost_per_image: 0.04
  - model_name: gpt-4o
    litellm_params: {model: openai/gpt-4o}
  - model_name: sd3
    litellm_params: {model: stability/sd3.5-large}
    model_info: {mode: image_generation}
  - model_name: gpt-image-2.5-flare
    litellm_params: {model: replicate/openai/gpt-image-2.5-flare}
  - model_name: local-image
    litellm_params: {model: openai/z-image, api_base: "http://127.0.0.1:1/v1"}
    model_info: {mode: image_generation}
litellm_settings:
  drop_params: true
  fallbacks: [{gpt-image-2: [gpt-image-1.5]}]
router_settings: {routing_strategy: least-busy}
general_settings: {master_key: sk-master}
"""


def imported(text: str) -> Imported:
    return from_litellm(yaml.load(text, Loader=yaml.BaseLoader), CARDS, ALIASES)


def test_image_models_become_offers_of_upstreams() -> None:
    found = imported(CONFIG)

    upstreams = tomllib.loads(found.text, parse_float=Decimal)["upstream"]
    assert [(u["name"], u["kind"], u["credential"]) for u in upstreams] == [
        ("openai", "openai", "env:OPENAI_API_KEY"),
        ("azure", "azure", "env:AZURE_KEY"),
        ("openai-2", "openai", "env:OPENAI_API_KEY"),
        ("openrouter", "openrouter", "env:OPENROUTER_API_KEY"),
    ]
    openai, azure, other, openrouter = upstreams
    assert openai["max_concurrent"] == 12
    assert openai["offer"] == [
        {"variant": "gpt-image-2", "model": "gpt-image-2", "card": "openai"}
    ]
    assert azure["base_url"] == "https://my-resource.openai.azure.com"
    assert azure["options"] == {
        "form": "deployment",
        "api_version": "2025-04-01-preview",
        "models": {"prod-pictures": "gpt-image-2"},
    }
    assert other["offer"][0]["cost"] == {
        "per": "1M tokens",
        "text_input": 10,
        "text_cached": Decimal("2.5"),
        "image_input": 10,
        "image_cached": 10,
        "image_output": 40,
    }
    assert openrouter["offer"][0]["cost"] == {"per": "image", "flat": Decimal("0.04")}
    assert found.offers == 4


def test_all_that_is_left_behind_is_said() -> None:
    notes = imported(CONFIG).notes

    for part in (
        "model_list[0] (gpt-image-2): not carried over: rpm",
        "model_list[2] (pictures): clients have to ask for gpt-image-2",
        "model_list[2] (pictures): its api_key stands in the file and was not copied",
        "1 models of other modes than pictures were left out",
        "model_list[5] (sd3): there is no adapter for the provider 'stability'",
        "model_list[6] (gpt-image-2.5-flare): it is not known what it costs",
        "model_list[7] (local-image): the catalogue has no model of that name",
        "litellm_settings: fallbacks from one model to another are not carried over",
        "litellm_settings (drop_params) is not carried over",
        "router_settings (routing_strategy) is not carried over",
        "general_settings (master_key) is not carried over",
    ):
        assert any(note.startswith(part) for note in notes), (part, notes)
    assert not any("sk-" in note for note in notes)
    assert "sk-" not in imported(CONFIG).text


def test_what_comes_of_it_is_a_configuration_that_starts(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(imported(CONFIG).text)
    env = dict.fromkeys(("OPENAI_API_KEY", "AZURE_KEY", "OPENROUTER_API_KEY"), "x")

    settings = load_settings(path, env, kinds=frozenset(PROVIDERS))

    assert [u.name for u in settings.upstreams] == [
        "openai",
        "azure",
        "openai-2",
        "openrouter",
    ]
    assert len(settings.offers) == 4


def test_a_second_price_for_the_same_offer_is_said() -> None:
    entry = """
  - model_name: gpt-image-2
    litellm_params: {model: gpt-image-2, api_key: os.environ/OPENAI_API_KEY}"""

    found = imported(f"model_list:{entry}{entry}")

    assert found.offers == 1
    assert any("offers gpt-image-2 already" in note for note in found.notes)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "text", "model_list:", "model_list: text", "{1: 2, [a]: 3}"),
        "model_list: [1, {}, []]",
        "model_list: [{model_name: {}, litellm_params: {model: []}}]",
        "model_list: [{model_name: a, litellm_params: []}]",
    ],
)
def test_what_is_no_such_configuration_is_said_too(text: str) -> None:
    try:
        config: Any = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        config = None

    found = from_litellm(config, CARDS, ALIASES)

    assert (found.offers, found.text) == (0, "")
    assert found.notes
