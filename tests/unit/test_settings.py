"""The configuration: what is read, and how everything wrong is told at once."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gateway.core.catalogue import (
    Offer,
    Operation,
    PerImage,
    PerMegapixel,
    PerToken,
)
from gateway.core.money import NANO
from gateway.core.pricing import offer_cost_nanousd
from gateway.core.requests import ImageRequest
from gateway.core.sizes import Size
from gateway.core.tokens import expected_usage
from gateway.settings import (
    CATALOGUE_KEYS,
    GATEWAY_KEYS,
    ConfigError,
    ObjectStore,
    Settings,
    json_schema,
    load_settings,
)
from providers.kit.contract import Capabilities

KINDS = {"sandbox", "openai"}
SHIPPED = Path(__file__).parents[2] / "config"
TOKENS = (
    'per = "1M tokens", text_input = 5.0, text_cached = 1.25, '
    "image_input = 8.0, image_cached = 2.0, image_output = 30.0"
)
OFFER = f"""
[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ {TOKENS} }}
"""
UPSTREAM = f"""
[[upstream]]
name = "one"
kind = "sandbox"
{OFFER}
"""
VARIANT = f"""
[[variant]]
name = "gpt-image-2"
price = {{ {TOKENS} }}
tile_bases = {{ low = 16, medium = 48 }}
"""


def load(
    folder: Path,
    config: str = UPSTREAM,
    catalogue: str | None = None,
    env: Mapping[str, str] | None = None,
    **overrides: str,
) -> Settings:
    (folder / "gateway.toml").write_text(config)
    if catalogue is not None:
        (folder / "catalogue.toml").write_text(catalogue)
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(
        folder / "gateway.toml", env or {}, kinds=KINDS, overrides=dotted
    )


def problems(folder: Path, *given: Any, **named: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, *given, **named)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


# --- what is shipped ---


def test_the_shipped_config_runs_as_it_is() -> None:
    settings = load_settings(None, {}, kinds=KINDS)

    assert [upstream.name for upstream in settings.upstreams] == [
        "sandbox-thrifty",
        "sandbox-fair",
        "sandbox-dear",
    ]
    assert [out.upstream for out in settings.left_out] == ["openai"]
    assert "OPENAI_API_KEY is not set" in settings.left_out[0].reason
    assert settings.warnings == ()
    assert settings.nanocredits_per_usd == 68 * NANO
    assert settings.server.admin_key is None
    assert settings.server.port == 8080
    assert settings.storage.data_dir == Path("data")


def test_with_a_key_the_shipped_config_uses_openai_for_real() -> None:
    settings = load_settings(None, {"OPENAI_API_KEY": "sk-test"}, kinds=KINDS)

    assert [upstream.name for upstream in settings.upstreams] == ["openai"]
    assert settings.upstreams[0].account.secret == "sk-test"
    assert {out.upstream for out in settings.left_out} == {
        "sandbox-thrifty",
        "sandbox-fair",
        "sandbox-dear",
    }
    assert "while openai is not in use" in settings.left_out[0].reason
    assert "nothing to fall over to" in settings.warnings[0]


def test_every_live_variant_is_offered_everywhere_and_the_thrifty_is_cheapest() -> None:
    settings = load_settings(None, {}, kinds=KINDS)
    live = {name for name, variant in settings.variants.items() if not variant.retired}

    assert live == {
        "gpt-image-2",
        "gpt-image-2.5-flare",
        "gpt-image-2.5-sunburst",
        "gpt-image-1.5",
        "gpt-image-1-mini",
    }
    for name in live:
        costs = [
            offer.cost.price.image_output
            for offer in settings.offers
            if offer.variant == name and isinstance(offer.cost, PerToken)
        ]
        assert len(costs) == 3
        assert costs == sorted(set(costs))


def test_openai_stops_offering_what_it_ends() -> None:
    settings = load_settings(None, {"OPENAI_API_KEY": "sk-test"}, kinds=KINDS)

    assert {o.variant: o.sunset_on for o in settings.offers if o.sunset_on} == {
        "gpt-image-1.5": "2026-12-01",
        "gpt-image-1-mini": "2026-12-01",
    }


def test_the_tenants_price_is_nine_tenths_of_openais_list() -> None:
    settings = load_settings(None, {"OPENAI_API_KEY": "sk-test"}, kinds=KINDS)

    for offer in settings.offers:
        assert isinstance(offer.cost, PerToken)
        price = settings.variants[offer.variant].price
        for name in price.__slots__:
            listed = getattr(offer.cost.price, name)
            assert getattr(price, name) * 10 == listed * 9 * 68, (offer, name)


def test_every_offer_of_openai_is_priced_by_a_dated_card() -> None:
    settings = load_settings(None, {"OPENAI_API_KEY": "sk-test"}, kinds=KINDS)

    for offer in settings.offers:
        assert (offer.card, offer.as_of) == ("openai", "2026-11")
        assert offer.cost == settings.cards[offer.variant]["openai"].cost


def test_every_card_that_is_shipped_has_its_providers_lifecycle() -> None:
    cards = load_settings(None, {}, kinds=KINDS).cards

    assert {
        (variant, name): card.sunset_on
        for variant, shelf in cards.items()
        for name, card in shelf.items()
    } == {
        ("gpt-image-2", "openai"): None,
        ("gpt-image-2", "azure"): "2027-10-21",
        ("gpt-image-2", "fal"): None,
        ("gpt-image-2", "evolink"): None,
        ("gpt-image-2.5-flare", "openai"): None,
        ("gpt-image-2.5-flare", "azure"): "2027-09-09",
        ("gpt-image-2.5-flare", "fal"): None,
        ("gpt-image-2.5-flare", "evolink"): None,
        ("gpt-image-2.5-sunburst", "openai"): None,
        ("gpt-image-2.5-sunburst", "azure"): "2027-09-09",
        ("gpt-image-2.5-sunburst", "fal"): None,
        ("gpt-image-2.5-sunburst", "evolink"): None,
        ("gpt-image-1.5", "openai"): "2026-12-01",
        ("gpt-image-1.5", "azure"): "2026-12-16",
        ("gpt-image-1-mini", "openai"): "2026-12-01",
        ("gpt-image-1-mini", "azure"): "2027-04-07",
    }
    assert cards["gpt-image-1.5"]["azure"].successor == "gpt-image-2"


FAL_USD = {
    "1024x768": (".005 .037 .145", ".011 .043 .151"),
    "1024x1024": (".006 .053 .211", ".015 .061 .219"),
    "1024x1536": (".005 .042 .165", ".018 .054 .178"),
    "1920x1080": (".005 .040 .158", ".017 .053 .158"),
    "2560x1440": (".007 .056 .222", ".019 .068 .234"),
    "3840x2160": (".012 .101 .401", ".024 .113 .413"),
}
"""What fal publishes for gpt-image-2: low, medium, high; made, and edited from one."""
FAL_ROUNDING_NANOUSD = 1_500_000
"""fal shows three decimals, and an edit as a sum of rounded parts."""
FAL_SLIP = ("1920x1080", "high", 1)
"""An edit at the price of a picture without one: fal's own slip, by all its others."""


def test_fals_card_gives_the_prices_that_fal_publishes() -> None:
    settings = load_settings(None, {}, kinds=KINDS)
    variant = settings.variants["gpt-image-2"]
    cost = settings.cards["gpt-image-2"]["fal"].cost
    offer = Offer("fal", variant.name, "m", cost, Capabilities())
    slips = []
    for text, published in FAL_USD.items():
        size = Size(*map(int, text.split("x")))
        for references, row in enumerate(published):
            for quality, usd in zip(
                ("low", "medium", "high"), row.split(), strict=True
            ):
                request = ImageRequest(
                    variant, "", size, quality, references=("x",) * references
                )
                each = expected_usage(request, [size] * references)
                priced = offer_cost_nanousd(offer, each, size, quality, 1)
                assert priced is not None
                if abs(priced - int(Decimal(usd) * NANO)) > FAL_ROUNDING_NANOUSD:
                    slips.append((text, quality, references))

    assert slips == [FAL_SLIP]


def uncommented(text: str) -> str:
    """Take the ready-made upstreams of the shipped config out of their comments."""
    code = re.compile(r"# ?((\[\[|\w+ = ).*)?")
    return "\n".join(
        (match[1] or "") if (match := code.fullmatch(line)) else line
        for line in text.splitlines()
    )


def test_the_upstreams_that_wait_in_comments_are_ready_to_use(tmp_path: Path) -> None:
    config = uncommented((SHIPPED / "gateway.toml").read_text())
    (tmp_path / "gateway.toml").write_text(config)
    names = re.findall(r'credential = "env:(\w+)"', config)
    kinds = [*KINDS, "azure", "fal", "task_api", "openrouter", "replicate"]
    path = tmp_path / "gateway.toml"

    without = load_settings(path, {}, kinds=kinds)
    settings = load_settings(path, dict.fromkeys(names, "secret"), kinds=kinds)

    assert {out.upstream for out in without.left_out} == {
        *("openai", "azure", "fal", "evolink", "openrouter", "replicate")
    }
    in_use = {upstream.name: upstream.kind for upstream in settings.upstreams}
    assert in_use == {
        "openai": "openai",
        "azure": "azure",
        "fal": "fal",
        "evolink": "task_api",
        "openrouter": "openrouter",
        "replicate": "replicate",
    }
    assert {o.upstream for o in settings.offers if o.card} == {
        "openai",
        "azure",
        "fal",
        "evolink",
    }
    assert all(o.card in ("", o.upstream) for o in settings.offers)


def test_variants_are_read_whole() -> None:
    variants = load_settings(None, {}, kinds=KINDS).variants

    assert variants["gpt-image-2"].price.image_output == 1_836_000
    assert variants["gpt-image-2"].price.text_cached == 76_500
    assert variants["gpt-image-2"].created_s == 1_776_729_600
    assert variants["gpt-image-2.5-flare"].tile_bases["max"] == 96
    assert set(variants["gpt-image-1.5"].tile_bases) == {"low", "medium", "high"}
    assert variants["gpt-image-1.5"].shutdown_on == "2026-12-01"
    assert variants["gpt-image-1"].retired
    assert variants["gpt-image-1"].successor == "gpt-image-2"


def schema_covers(value: object, schema: dict[str, Any], path: str) -> list[str]:
    """List the keys of a file that its schema does not know."""
    if isinstance(value, list):
        items = schema.get("items", {})
        return [miss for item in value for miss in schema_covers(item, items, path)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known: dict[str, Any] = schema["properties"]
    return [f"{path}.{name}" for name in value if name not in known] + [
        miss
        for name in value.keys() & known.keys()
        for miss in schema_covers(value[name], known[name], f"{path}.{name}")
    ]


@pytest.mark.parametrize(
    ("file", "keys"),
    [("gateway.toml", GATEWAY_KEYS), ("catalogue.toml", CATALOGUE_KEYS)],
)
def test_the_schema_knows_every_key_of_the_shipped_files(file: str, keys: Any) -> None:
    tree = tomllib.loads((SHIPPED / file).read_text())
    schema = json_schema(keys)

    assert json.loads(json.dumps(schema)) == schema
    assert schema_covers(tree, schema, "") == []
    assert schema_covers({"strange": 1}, schema, "") == [".strange"]


def test_the_guide_explains_every_key() -> None:
    guide = (SHIPPED.parent / "docs" / "configuration.md").read_text()

    def names(keys: Any) -> list[str]:
        return [key.name for key in keys] + [
            name for key in keys for name in names(key.keys)
        ]

    for name in names((*GATEWAY_KEYS, *CATALOGUE_KEYS)):
        assert f"`{name}`" in guide or f"[{name}]" in guide, name


# --- where a value comes from ---


def test_a_small_config_is_completed_by_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path)

    assert settings.server.host == "127.0.0.1"
    assert settings.storage.database == "sqlite"
    assert settings.upstreams[0].failure_domain == "one"
    assert settings.upstreams[0].max_concurrent == 64
    assert settings.files == (tmp_path / "gateway.toml", SHIPPED / "catalogue.toml")


def test_a_catalogue_beside_the_config_replaces_the_shipped_one(tmp_path: Path) -> None:
    settings = load(tmp_path, UPSTREAM, VARIANT)

    assert list(settings.variants) == ["gpt-image-2"]
    assert settings.variants["gpt-image-2"].price.image_output == 30_000


def test_the_environment_wins_over_the_file_and_an_option_over_both(
    tmp_path: Path,
) -> None:
    config = "[server]\nport = 1\nhost = '::1'" + UPSTREAM
    env = {"IMAGEWAY__SERVER__PORT": "2", "IMAGEWAY__SERVER__HOST": "0.0.0.0"}

    from_env = load(tmp_path, config, env=env).server
    from_option = load(tmp_path, config, env=env, server__port="3").server

    assert (from_env.port, from_env.host) == (2, "0.0.0.0")
    assert (from_option.port, from_option.host) == (3, "0.0.0.0")


def test_an_upstream_is_overridden_by_its_name(tmp_path: Path) -> None:
    config = UPSTREAM.replace('"one"', '"my-one"')
    env = {
        "IMAGEWAY__UPSTREAM__MY_ONE__BASE_URL": "http://127.0.0.1:9/v1/",
        "IMAGEWAY__UPSTREAM__MY_ONE__CREDENTIAL": "sk-from-the-environment",
        "IMAGEWAY__UPSTREAM__MY_ONE__OPTIONS__LATENCY_MS": "5",
        "IMAGEWAY__UPSTREAM__MY_ONE__OPTIONS__MODE": "slow",
    }

    account = load(tmp_path, config, env=env).upstreams[0].account

    assert account.base_url == "http://127.0.0.1:9/v1"
    assert account.secret == "sk-from-the-environment"
    assert account.options == {"latency_ms": 5, "mode": "slow"}


def test_the_data_folder_has_a_short_name(tmp_path: Path) -> None:
    short = {"IMAGEWAY_DATA_DIR": "/a"}
    both = {**short, "IMAGEWAY__STORAGE__DATA_DIR": "/b"}

    assert load(tmp_path, env=short).storage.data_dir == Path("/a")
    assert load(tmp_path, env=both).storage.data_dir == Path("/b")


def test_the_config_may_be_named_by_the_environment(tmp_path: Path) -> None:
    load(tmp_path)
    env = {"IMAGEWAY_CONFIG": str(tmp_path / "gateway.toml")}

    settings = load_settings(None, env, kinds=KINDS)

    assert [upstream.name for upstream in settings.upstreams] == ["one"]


def test_an_unknown_variable_is_an_error_with_a_hint(tmp_path: Path) -> None:
    env = {
        "IMAGEWAY__SERVER__PRT": "1",
        "IMAGEWAY__SERVR__PORT": "1",
        "IMAGEWAY__UPSTREAM__TWO__KIND": "sandbox",
        "IMAGEWAY__UPSTREAM__ONE__OFFER": "x",
        "IMAGEWAY__": "x",
    }

    said = problems(tmp_path, env=env)

    assert len(said) == 5
    assert (
        "environment: IMAGEWAY__SERVER__PRT: names no known key; did you mean port?"
    ) in said


def test_a_wrong_variable_is_blamed_by_its_own_name(tmp_path: Path) -> None:
    env = {"IMAGEWAY__SERVER__PORT": "eighty"}

    assert problems(tmp_path, env=env) == [
        "environment: IMAGEWAY__SERVER__PORT: must be a whole number from 0 to 65535"
    ]
    assert problems(tmp_path, server__port="-1") == [
        "command line: server.port: must be a whole number from 0 to 65535"
    ]


# --- secrets ---


def test_a_secret_may_come_from_a_file_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text("sk-file\n")
    config = UPSTREAM.replace(OFFER, 'credential = "file:key.txt"' + OFFER)

    assert load(tmp_path, config).upstreams[0].account.secret == "sk-file"


def test_a_literal_secret_is_refused_and_not_repeated(tmp_path: Path) -> None:
    config = UPSTREAM.replace(OFFER, 'credential = "sk-literal"' + OFFER)
    config = '[server]\nadmin_key = "adm-literal"' + config

    said = problems(tmp_path, config)

    assert [line.split(": ")[1] for line in said] == [
        "server.admin_key",
        "upstream[0].credential",
    ]
    assert "literal" not in " ".join(said)


def test_trusted_proxies_are_networks(tmp_path: Path) -> None:
    networks = '[server]\ntrusted_proxies = ["10.0.0.0/8", "fd00::1"]\n' + UPSTREAM
    wrong = networks.replace("fd00::1", "10.0.0.1/8")

    assert [str(n) for n in load(tmp_path, networks).server.trusted_proxies] == [
        "10.0.0.0/8",
        "fd00::1/128",
    ]
    (said,) = problems(tmp_path, wrong)
    assert "server.trusted_proxies[1]: is no network" in said


def test_a_missing_credential_leaves_out_or_stops(tmp_path: Path) -> None:
    needs = UPSTREAM.replace(OFFER, 'credential = "env:NOWHERE"' + OFFER)
    spare = needs.replace('"one"', '"two"').replace(
        "credential", "optional = true\ncredential"
    )

    assert problems(tmp_path, needs) == [
        (
            "gateway.toml: upstream[0].credential: the environment variable NOWHERE "
            "is not set; set it, or set optional = true"
        )
    ]
    settings = load(tmp_path, UPSTREAM + spare)
    assert [out.upstream for out in settings.left_out] == ["two"]
    assert {offer.upstream for offer in settings.offers} == {"one"}


def test_a_config_with_nothing_left_is_refused(tmp_path: Path) -> None:
    config = UPSTREAM.replace(
        OFFER, 'optional = true\ncredential = "file:nowhere"' + OFFER
    )

    (said,) = problems(tmp_path, config)

    assert said.startswith("gateway.toml: upstream: none is in use: one has no cred")


def test_nothing_secret_is_shown_when_settings_are_printed(tmp_path: Path) -> None:
    env = {
        "IMAGEWAY__SERVER__ADMIN_KEY": "hidden-1",
        "IMAGEWAY__UPSTREAM__ONE__CREDENTIAL": "hidden-2",
        "IMAGEWAY__STORAGE__DATABASE": "postgresql://u:hidden-3@db/x",
        "IMAGEWAY__STORAGE__REDIS": "redis://:hidden-4@cache",
        "IMAGEWAY__STORAGE__RESULTS": "s3://pictures/gateway",
        "IMAGEWAY__STORAGE__RESULTS_ACCESS_KEY": "hidden-5",
        "IMAGEWAY__STORAGE__RESULTS_SECRET_KEY": "hidden-6",
    }

    settings = load(tmp_path, env=env)

    assert settings.server.admin_key == "hidden-1"
    assert settings.storage.database == "postgresql://u:hidden-3@db/x"
    assert settings.storage.results == ObjectStore(
        "s3://pictures/gateway", "", "", "hidden-5", "hidden-6"
    )
    assert "hidden" not in repr(settings)


@pytest.mark.parametrize(
    ("storage", "path", "said"),
    [
        ('results = "s3://"', "results", "must be s3://bucket"),
        ('results = "s3://b"', "results", "must be s3://bucket"),
        ('results = "s3://key:hidden@bucket"', "results", "holds a password"),
        ('results = "s3://bucket/../x"', "results", "must be s3://bucket"),
        ('results = "s3://bucket?x=1"', "results", "must be s3://bucket"),
        ('results = "http://bucket"', "results", "must be disk, a URL"),
        ('results_endpoint = "http://s3:9"', "results_endpoint", "s3:// only"),
        (
            'results = "gs://bucket"\nresults_region = "eu"',
            "results_region",
            "s3:// only",
        ),
        (
            'results = "s3://bucket"\nresults_access_key = "env:KEY"',
            "results_secret_key",
            "is missing beside the access key",
        ),
        (
            (
                'results = "s3://bucket"\nresults_secret_key = "env:NOT_SET"\n'
                'results_access_key = "env:KEY"'
            ),
            "results_secret_key",
            "the environment variable NOT_SET is not set",
        ),
        (
            'results = "s3://bucket"\nresults_secret_key = "hidden"',
            "results_secret_key",
            "must be env:NAME or file:/path",
        ),
    ],
)
def test_where_pictures_are_kept_is_checked(
    tmp_path: Path, storage: str, path: str, said: str
) -> None:
    config = f"[storage]\n{storage}\n{UPSTREAM}"

    (problem,) = problems(tmp_path, config, env={"KEY": "an id"})

    assert problem.startswith(f"gateway.toml: storage.{path}: ")
    assert said in problem
    assert "hidden" not in problem


@pytest.mark.parametrize("url", ["gs://bucket/a/b", "az://container", "s3://bucket/"])
def test_pictures_may_be_kept_in_any_of_three_stores(tmp_path: Path, url: str) -> None:
    settings = load(tmp_path, f'[storage]\nresults = "{url}"\n{UPSTREAM}')

    assert settings.storage.results == ObjectStore(url, "", "", "", "")


def test_a_password_in_the_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    config = '[storage]\ndatabase = "postgresql://u:hidden@db/x"' + UPSTREAM

    (said,) = problems(tmp_path, config)

    assert "storage.database: holds a password" in said
    assert "hidden" not in said


# --- everything that is wrong, at once ---


def test_all_problems_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    config = """
[server]
prot = 80
port = "80"
[storage]
redis = "http://x"
results = "tape"
[credits]
per_usd = 0
[[upstream]]
name = "A B"
kind = "opnai"
base_url = "ftp://x"
max_concurrent = 0
options = 3
unless = "two"
[[upstream.offer]]
variant = "gpt-image-22"
cost = {}
sunset = "2026-12-01"
sizes = ["big"]
operations = ["dream"]
mask = "yes"
"""
    catalogue = """
[[variant]]
name = "gpt-image-2"
price = { per = "image", flat = 1 }
tile_base = {}
tile_bases = { low = 0 }
"""

    assert sorted(
        ": ".join(line.split(": ")[:2])
        for line in problems(tmp_path, config, catalogue)
    ) == sorted(
        [
            "catalogue.toml: variant[0].price.per",
            "catalogue.toml: variant[0].tile_base",
            "catalogue.toml: variant[0].tile_bases.low",
            "gateway.toml: server.prot",
            "gateway.toml: server.port",
            "gateway.toml: storage.redis",
            "gateway.toml: storage.results",
            "gateway.toml: credits.per_usd",
            "gateway.toml: upstream[0].name",
            "gateway.toml: upstream[0].kind",
            "gateway.toml: upstream[0].base_url",
            "gateway.toml: upstream[0].max_concurrent",
            "gateway.toml: upstream[0].options",
            "gateway.toml: upstream[0].unless",
            "gateway.toml: upstream[0].offer[0].variant",
            "gateway.toml: upstream[0].offer[0].model",
            "gateway.toml: upstream[0].offer[0].cost",
            "gateway.toml: upstream[0].offer[0].sunset",
            "gateway.toml: upstream[0].offer[0].sizes",
            "gateway.toml: upstream[0].offer[0].operations",
            "gateway.toml: upstream[0].offer[0].mask",
        ]
    )


def test_a_slip_of_the_pen_gets_a_hint(tmp_path: Path) -> None:
    said = problems(
        tmp_path,
        UPSTREAM.replace("kind =", "knid =").replace("gpt-image-2", "gpt-imag"),
    )

    assert any(
        "upstream[0].knid: is not a known key; did you mean kind?" in s for s in said
    )
    assert any("did you mean gpt-image-" in line for line in said)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a = 1\nport = ", "line 2"),
        ("[a]\nb = ?\n", "line 2, column 5"),
        ("a = 1e99999999999999999999", ""),
    ],
)
def test_broken_toml_is_told_by_line(tmp_path: Path, text: str, where: str) -> None:
    (said,) = problems(tmp_path, text)

    assert said.startswith(f"gateway.toml: {where}")
    assert "is not valid TOML" in said


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_settings(tmp_path / "none.toml", {}, kinds=KINDS)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_settings(tmp_path, {}, kinds=KINDS)
    (tmp_path / "latin.toml").write_bytes(b"a = 1\nb = '\xe9'")
    with pytest.raises(ConfigError, match="line 2: is not UTF-8"):
        load_settings(tmp_path / "latin.toml", {}, kinds=KINDS)
    (tmp_path / "huge.toml").write_bytes(b"#" * 2_000_000)
    with pytest.raises(ConfigError, match="is over 1,048,576 bytes"):
        load_settings(tmp_path / "huge.toml", {}, kinds=KINDS)


def test_a_broken_catalogue_does_not_hide_what_is_wrong_in_the_config(
    tmp_path: Path,
) -> None:
    said = problems(tmp_path, "[server]\nport = -1" + UPSTREAM, "[[variant]")

    assert [line.split(":")[0] for line in said] == ["catalogue.toml", "gateway.toml"]


def test_twice_the_same_name_or_offer_is_refused(tmp_path: Path) -> None:
    said = problems(tmp_path, UPSTREAM + OFFER + UPSTREAM)

    assert said == [
        (
            "gateway.toml: upstream[0].offer[1].variant: "
            "gpt-image-2 is already offered at upstream[0].offer[0]"
        ),
        "gateway.toml: upstream[1].name: one is also the name of upstream[0]",
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("successor = 'gpt-image-9'", "variant[0].successor: names no other variant"),
        ("retired = true", "variant[0].retired: needs successor and shutdown"),
        ("default_quality = 'max'", "variant[0].default_quality: must be auto or one"),
        (
            "aliases = ['gpt-image-2']",
            "the name gpt-image-2 is also that of variant[0]",
        ),
        ("token_rule = 'table'", "variant[0].tile_bases: has no use"),
        ("token_rule = 'dice'", "variant[0].token_rule: must be one of tiles, table"),
        ("n_max = 11", "variant[0].n_max: must be a whole number from 1 to 10"),
    ],
)
def test_a_variant_that_contradicts_itself_is_refused(
    tmp_path: Path, given: str, says: str
) -> None:
    assert says in "\n".join(problems(tmp_path, UPSTREAM, VARIANT + given))


def test_an_upstream_that_waits_for_itself_is_refused(tmp_path: Path) -> None:
    one = UPSTREAM.replace(OFFER, 'unless = "one"' + OFFER)
    two = UPSTREAM.replace('"one"', '"two"').replace(OFFER, 'unless = "one"' + OFFER)

    said = problems(tmp_path, one + two)

    assert "upstream[0].unless: one does not exist; did you mean" not in said[1]
    assert [line.split(": ")[1] for line in said] == [
        "upstream[0].unless",
        "upstream[1].unless",
        "upstream",
    ]


# --- what an upstream charges ---


def cost_of(folder: Path, cost: str) -> object:
    config = UPSTREAM.replace(f"{{ {TOKENS} }}", cost)
    return load(folder, config).offers[0].cost


def test_a_cost_is_read_as_an_exact_decimal(tmp_path: Path) -> None:
    cost = cost_of(tmp_path, f"{{ {TOKENS} }}".replace("1.25", "0.001"))

    assert isinstance(cost, PerToken)
    assert cost.price.text_cached == 1
    assert cost.price.image_output == 30_000


def test_every_kind_of_cost_is_read(tmp_path: Path) -> None:
    rows = '"low/1024x1024" = 0.006, "high/*" = 0.2, "*/auto" = 1, "*/4K" = 2'

    assert cost_of(tmp_path, '{ per = "image", flat = 0.04 }') == PerImage(40_000_000)
    assert cost_of(tmp_path, f'{{ per = "image", table = {{ {rows} }} }}') == PerImage(
        table={
            "low/1024x1024": 6_000_000,
            "high/*": 200_000_000,
            "*/auto": NANO,
            "*/4K": 2 * NANO,
        }
    )
    assert cost_of(tmp_path, '{ per = "megapixel", usd = 0.000000001 }') == (
        PerMegapixel(1)
    )


@pytest.mark.parametrize(
    "rest",
    ['per = "image", flat = 0.04', 'per = "megapixel", usd = 0.02', TOKENS],
)
def test_every_kind_of_cost_may_say_what_a_billable_unit_costs(
    tmp_path: Path, rest: str
) -> None:
    plain = cost_of(tmp_path, f"{{ {rest} }}")
    cost = cost_of(tmp_path, f"{{ {rest}, unit_usd = 0.000000001 }}")

    assert isinstance(plain, PerToken | PerImage | PerMegapixel)
    assert plain.unit_nanousd is None
    assert cost == replace(plain, unit_nanousd=1)


@pytest.mark.parametrize(
    ("cost", "says"),
    [
        ("0", "cost: must be a table that says what is charged"),
        ("{}", "an unknown cost is never zero"),
        ('{ per = "day" }', 'cost.per: must be one of "1K tokens"'),
        ('{ per = "image" }', "cost: needs flat (USD per image), a table of rows"),
        ('{ per = "image", flat = 0 }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = 0.0 }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = -1 }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = nan }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = inf }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = 1e999999 }', "cost.flat: must be greater than 0"),
        ('{ per = "image", flat = 1e-999999 }', "cost.flat: has too many decimals"),
        ('{ per = "image", flat = 0.0000000001 }', "cost.flat: has too many decimals"),
        ('{ per = "image", flat = true }', "cost.flat: must be a number"),
        ('{ per = "image", flat = "1" }', "cost.flat: must be a number"),
        (
            '{ per = "image", falt = 1 }',
            "cost.falt: is not a known key; did you mean fl",
        ),
        (
            '{ per = "image", table = { "big" = 1 } }',
            "cost.table.big: must be quality/W",
        ),
        (
            '{ per = "image", table = { "*/*" = 1 } }',
            'cost.table."*/*": must be quality',
        ),
        (
            '{ per = "image", table = { "a/*" = 0 } }',
            'cost.table."a/*": must be greater',
        ),
        (
            '{ per = "image", table = { "low/3K" = 1 } }',
            'cost.table."low/3K": must be quality',
        ),
        ('{ per = "image", flat = 1, unit_usd = 0 }', "cost.unit_usd: must be greater"),
        ('{ per = "image", unit_usd = 1 }', "cost: needs flat (USD per image)"),
        ('{ per = "megapixel" }', "cost.usd: is missing"),
        (
            '{ per = "1M tokens", text_input = 5 }',
            "cost: lacks a price for text_cached",
        ),
        (f"{{ {TOKENS} }}".replace("30.0", "0"), "cost.image_output: must be greater"),
        (f"{{ {TOKENS} }}".replace("30.0", "0.0001"), "image_output: has too many dec"),
    ],
)
def test_a_cost_that_is_unknown_or_zero_is_refused(
    tmp_path: Path, cost: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cost_of(tmp_path, cost)

    (problem,) = caught.value.problems
    assert says in str(problem)
    assert problem.path.startswith("upstream[0].offer[0].cost")


# --- price cards ---

CARD = f"""
[[variant.card]]
name = "acme"
cost = {{ {TOKENS} }}
as_of = "2026-11"
source = "acme.test, pricing"
sunset = 2026-12-24
"""
OTHER_VARIANT = VARIANT.replace("gpt-image-2", "gpt-image-3")
BY_CARD = OFFER.replace(f"cost = {{ {TOKENS} }}", 'card = "acme"')


def carded(
    folder: Path, offer: str = BY_CARD, catalogue: str = VARIANT + CARD
) -> Settings:
    config = UPSTREAM.replace(OFFER, offer)
    return load(folder, config, catalogue + OTHER_VARIANT)


def test_an_offer_may_name_a_price_card_in_place_of_a_cost(tmp_path: Path) -> None:
    (offer,) = carded(tmp_path).offers

    assert isinstance(offer.cost, PerToken)
    assert offer.cost.price.image_output == 30_000
    assert (offer.card, offer.as_of, offer.sunset_on) == (
        "acme",
        "2026-11",
        "2026-12-24",
    )


def test_what_the_offer_says_itself_wins_over_its_card(tmp_path: Path) -> None:
    own = 'cost = { per = "image", flat = 1 }\nsunset = 2027-01-01\n'

    (offer,) = carded(tmp_path, BY_CARD + own).offers

    assert offer.cost == PerImage(NANO)
    assert (offer.card, offer.as_of, offer.sunset_on) == ("", "", "2027-01-01")


@pytest.mark.parametrize(
    ("offer", "card", "says"),
    [
        (
            BY_CARD.replace("acme", "acne"),
            CARD,
            ".offer[0].card: acne does not exist; cards of gpt-image-2: acme",
        ),
        (
            BY_CARD.replace("acme", "acne") + f"cost = {{ {TOKENS} }}",
            "",
            ".offer[0].card: acne does not exist; cards of gpt-image-2: none",
        ),
        (
            BY_CARD.replace('card = "acme"', ""),
            CARD,
            "gateway.toml: upstream[0].offer[0].cost: is missing, and so is card",
        ),
        (
            BY_CARD + 'successor = "gpt-image-2"',
            CARD,
            "gateway.toml: upstream[0].offer[0].successor: names no other variant",
        ),
        (
            BY_CARD,
            CARD + 'successor = "gpt-image-9"',
            "catalogue.toml: variant[0].card[0].successor: names no other variant",
        ),
        (
            BY_CARD,
            CARD + CARD,
            "catalogue.toml: variant[0].card[1].name: acme is already a card of it",
        ),
        *[
            (
                BY_CARD,
                CARD.replace('"2026-11"', as_of),
                "catalogue.toml: variant[0].card[0].as_of: must be a month in quotes",
            )
            for as_of in ('"2026-13"', '"2026-1"', '"1999-11"', '"11/2026"', "2026")
        ],
        (
            BY_CARD,
            CARD.replace("as_of", "as_off"),
            "catalogue.toml: variant[0].card[0].as_of: is missing",
        ),
        (
            BY_CARD,
            CARD.replace("30.0", "0"),
            "catalogue.toml: variant[0].card[0].cost.image_output: must be greater",
        ),
    ],
)
def test_a_card_that_cannot_be_used_is_told_by_its_key(
    tmp_path: Path, offer: str, card: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        carded(tmp_path, offer, VARIANT + card)

    told = [str(p).replace(f"{tmp_path}/", "") for p in caught.value.problems]
    assert any(says in line for line in told), told


@pytest.mark.parametrize(
    ("today", "told"),
    [
        ("2026-11-23", ()),
        ("2026-11-24", ("ends on 2026-12-24, in 30 days",)),
        ("2026-12-23", ("ends on 2026-12-24, tomorrow",)),
        ("2026-12-24", ("ended on 2026-12-24 and is never used",)),
        ("2027-04-30", ("ended on 2026-12-24",)),
        ("2027-05-01", ("over 180 days ago", "ended on 2026-12-24")),
    ],
)
def test_prices_that_grow_old_and_offers_that_end_are_warned_of(
    tmp_path: Path, today: str, told: tuple[str, ...]
) -> None:
    warnings = carded(tmp_path).aging(today)

    assert len(warnings) == len(told)
    assert all(part in line for part, line in zip(told, warnings, strict=True))


def test_the_warning_names_what_is_to_follow(tmp_path: Path) -> None:
    settings = carded(tmp_path, catalogue=VARIANT + CARD + 'successor = "gpt-image-3"')

    assert settings.aging("2026-12-01") == (
        "one/gpt-image-2 ends on 2026-12-24, in 23 days; gpt-image-3 is to follow",
    )


def test_a_cost_without_a_date_never_grows_old(tmp_path: Path) -> None:
    assert load(tmp_path).aging("2099-01-01") == ()


# --- what the app makes of it ---


def test_the_operator_overrides_what_the_adapter_says(tmp_path: Path) -> None:
    config = UPSTREAM + (
        'sunset = 2027-01-31\nn_max = 1\nsizes = ["1024x1024"]\nmask = false\n'
        'operations = ["generate", "edit"]\nqualities = ["low"]\n'
    )

    catalogue = load(tmp_path, config).catalogue(
        lambda upstream, model: Capabilities(mask=True, references_max=7)
    )

    (offer,) = catalogue.offers["gpt-image-2"]
    assert offer.capabilities == Capabilities(
        operations=frozenset(Operation),
        n_max=1,
        sizes=frozenset({(1024, 1024)}),
        qualities=frozenset({"low"}),
        mask=False,
        references_max=7,
    )
    assert offer.sunset_on == "2027-01-31"
    assert offer.id == "one/gpt-image-2"


def test_a_catalogue_knows_variants_that_nobody_offers(tmp_path: Path) -> None:
    settings = load(tmp_path)

    catalogue = settings.catalogue(lambda upstream, model: Capabilities())

    assert catalogue.offers["gpt-image-1.5"] == ()
    assert "no upstream in use offers gpt-image-1.5" in settings.warnings


def test_one_failure_domain_for_all_is_warned_of(tmp_path: Path) -> None:
    shared = UPSTREAM.replace(OFFER, 'failure_domain = "dc"' + OFFER)
    two = shared.replace('"one"', '"two"')

    assert "failure domain dc" in load(tmp_path, shared + two, VARIANT).warnings[0]
    assert load(tmp_path, UPSTREAM + two, VARIANT).warnings == ()


def test_pictures_on_the_disk_of_one_of_several_gateways_are_warned_of(
    tmp_path: Path,
) -> None:
    shared = {"IMAGEWAY__STORAGE__DATABASE": "postgresql://u@db/x"}
    bucket = {"IMAGEWAY__STORAGE__RESULTS": "s3://pictures"}
    two = UPSTREAM + UPSTREAM.replace('"one"', '"two"')

    warned = load(tmp_path, two, VARIANT, env=shared).warnings
    assert ["own disk" in warning for warning in warned] == [True]
    assert load(tmp_path, two, VARIANT, env=shared | bucket).warnings == ()
