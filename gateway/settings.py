"""Reads the two configuration files and the environment; nothing else does.

One table of keys (``GATEWAY_KEYS``, ``CATALOGUE_KEYS``) drives reading, checking,
environment overrides and the JSON schema, so that they cannot drift apart. Every
problem is collected and reported at once, with its file and path.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from enum import Enum
from fractions import Fraction
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from gateway.core.catalogue import (
    Capabilities,
    Catalogue,
    CostCard,
    Offer,
    Operation,
    PerImage,
    PerMegapixel,
    PerToken,
    TokenPrice,
    TokenRule,
    Variant,
)
from gateway.core.money import NANO
from gateway.core.sizes import CLASS_MAX_PX
from gateway.core.tokens import TABLE_QUALITIES
from gateway.core.webhooks import TRIES_AFTER_S
from providers.kit.contract import Account

ENV_PREFIX = "IMAGEWAY__"
ENV_CONFIG = "IMAGEWAY_CONFIG"
ENV_DATA_DIR = "IMAGEWAY_DATA_DIR"
FILE_MAX_BYTES = 1_048_576
SECRET_MAX_BYTES = 65_536
SECRET_MIN_CHARS = 32
AMOUNT_MAX = 1_000_000
"""No price and no rate is over this; a bigger one is a slip."""
DECIMAL_PLACES_MAX = 15
PORT_MAX = 65_535
NUMBERS_MAX = 10
CARD_FRESH_DAYS = 180
"""A price card is warned of when the month it is of began longer ago."""
SUNSET_WARNED_DAYS = 30
TOKEN_CLASSES = (
    "text_input",
    "text_cached",
    "image_input",
    "image_cached",
    "image_output",
)
PER_TOKENS = {"1K tokens": 1_000, "1M tokens": 1_000_000}

_NOTHING: Mapping[str, str] = MappingProxyType({})
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_COST_ROW = re.compile(
    rf"(?:[a-z]+|\*)/(?:[1-9]\d{{1,4}}x[1-9]\d{{1,4}}|{'|'.join(CLASS_MAX_PX)}|auto|\*)"
)
_BUCKET = re.compile(
    r"[a-z0-9]+://[A-Za-z0-9][A-Za-z0-9._-]{1,62}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}){0,9}/?"
)
_MONTH = re.compile(r"20\d\d-(?:0[1-9]|1[0-2])")
_PIXELS = re.compile(r"([1-9]\d{1,4})x([1-9]\d{1,4})")
_TOML_LINE = re.compile(
    r"^(?P<what>.*) \(at line (?P<line>\d+), column (?P<column>\d+)\)$"
)


LOG_LEVELS = ("info", "warning", "error")

# --- what comes out ---


@dataclass(frozen=True, slots=True)
class Server:
    """Where the gateway listens. ``admin_key`` None: admin routes are off."""

    host: str
    port: int
    public_url: str
    admin_key: str | None = field(repr=False)
    leaving_s: int = 5
    """How long requests are still taken once the process is about to stop."""
    secret: str | None = field(repr=False, default=None)
    """What keys and links depend on; None: made in the data folder."""
    trusted_proxies: tuple[IPv4Network | IPv6Network, ...] = ()
    """Whose ``X-Forwarded-For`` is believed."""


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A bucket for pictures. What is empty its client finds as the platform has it."""

    url: str
    endpoint: str
    region: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the gateway remembers. Locators may hold a password: never printed."""

    data_dir: Path
    database: str = field(repr=False)
    redis: str = field(repr=False)
    results: ObjectStore | None
    """Where pictures are kept; None: in the data folder."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where spans are sent. ``endpoint`` empty: nowhere, and nothing is loaded."""

    endpoint: str = ""
    one_in: int = 1
    """Of so many tasks and requests one is traced."""


@dataclass(frozen=True, slots=True)
class InputSettings:
    """Where reference images may be fetched from."""

    allow_networks: tuple[IPv4Network | IPv6Network, ...]
    allow_http: bool
    ports: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """Where webhooks may be sent, and how long after a failed try the next follows."""

    allow_networks: tuple[IPv4Network | IPv6Network, ...]
    ports: tuple[int, ...]
    tries_after_s: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """An account at a provider that is in use."""

    name: str
    kind: str
    account: Account
    failure_domain: str
    max_concurrent: int


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the operator knows better than the adapter; None keeps its answer."""

    operations: frozenset[Operation] | None = None
    n_max: int | None = None
    sizes: frozenset[tuple[int, int]] | None = None
    qualities: frozenset[str] | None = None
    output_formats: frozenset[str] | None = None
    backgrounds: frozenset[str] | None = None
    mask: bool | None = None
    references_max: int | None = None

    def applied_to(self, capabilities: Capabilities) -> Capabilities:
        """Return the capabilities with what is set here in their place."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return replace(
            capabilities,
            **{k: value for k, value in given.items() if value is not None},
        )


@dataclass(frozen=True, slots=True)
class PriceCard:
    """What a provider charges for a variant, by public sources, and until when."""

    cost: CostCard
    as_of: str
    source: str
    sunset_on: str | None
    successor: str


@dataclass(frozen=True, slots=True)
class OfferSettings:
    """One variant at one upstream that is in use, before its adapter was asked.

    ``card`` names the price card that the cost is from, and ``as_of`` its month; both
    are empty where the offer says the cost itself.
    """

    upstream: str
    variant: str
    model: str
    cost: CostCard
    failure_domain: str
    sunset_on: str | None
    overrides: Overrides
    card: str = ""
    as_of: str = ""
    successor: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An upstream that the config names and that is not in use."""

    upstream: str
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration, checked."""

    server: Server
    storage: Storage
    inputs: InputSettings
    webhooks: WebhookSettings
    nanocredits_per_usd: int
    tenants_may_choose: bool
    log_level: str
    tracing: Tracing
    variants: Mapping[str, Variant]
    cards: Mapping[str, Mapping[str, PriceCard]]
    """Price cards by name, by the variant that they are of."""
    upstreams: tuple[UpstreamSettings, ...]
    offers: tuple[OfferSettings, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]
    files: tuple[Path, ...]

    def catalogue(self, capabilities: Callable[[str, str], Capabilities]) -> Catalogue:
        """Complete the catalogue.

        Args:
            capabilities: asks the adapter of an upstream (by name) about a model.
        """
        offers: dict[str, tuple[Offer, ...]] = dict.fromkeys(self.variants, ())
        for offer in self.offers:
            offers[offer.variant] += (
                Offer(
                    upstream=offer.upstream,
                    variant=offer.variant,
                    model=offer.model,
                    cost=offer.cost,
                    capabilities=offer.overrides.applied_to(
                        capabilities(offer.upstream, offer.model)
                    ),
                    failure_domain=offer.failure_domain,
                    sunset_on=offer.sunset_on,
                ),
            )
        return Catalogue(variants=self.variants, offers=offers)

    def aging(self, today: str) -> tuple[str, ...]:
        """Tell which prices have grown old and which offers end, as of a day."""
        day = date.fromisoformat(today)
        return tuple(
            dict.fromkeys(
                warning
                for offer in self.offers
                for warning in (_old_price(offer, day), _near_end(offer, day))
                if warning
            )
        )


def _old_price(offer: OfferSettings, today: date) -> str:
    if not offer.as_of:
        return ""
    age = today - date.fromisoformat(f"{offer.as_of}-01")
    if age.days <= CARD_FRESH_DAYS:
        return ""
    return (
        f"the price card {offer.card} of {offer.variant} is of {offer.as_of}, over "
        f"{CARD_FRESH_DAYS} days ago: compare it with what the provider charges now"
    )


def _near_end(offer: OfferSettings, today: date) -> str:
    if offer.sunset_on is None:
        return ""
    days = (date.fromisoformat(offer.sunset_on) - today).days
    if days > SUNSET_WARNED_DAYS:
        return ""
    what = f"{offer.upstream}/{offer.variant}"
    then = f"; {offer.successor} is to follow" if offer.successor else ""
    if days > 0:
        left = "tomorrow" if days == 1 else f"in {days} days"
        return f"{what} ends on {offer.sunset_on}, {left}{then}"
    return f"{what} ended on {offer.sunset_on} and is never used{then}"


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong: in which file, at which key, and what to do."""

    file: str
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.path, self.message) if part)


class ConfigError(Exception):
    """The configuration cannot be used. ``problems`` has all that is wrong with it."""

    def __init__(self, problems: Collection[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


# --- the table of keys ---


class Kind(Enum):
    """What a key may hold."""

    TEXT = "text"
    SLUG = "slug"
    INTEGER = "integer"
    AMOUNT = "amount"
    FLAG = "flag"
    DATE = "date"
    MONTH = "month"
    HTTP_URL = "http_url"
    REFERENCE = "reference"
    LOCATOR = "locator"
    TEXTS = "texts"
    SIZES = "sizes"
    INTEGERS = "integers"
    NUMBERS = "numbers"
    FREE = "free"
    COST = "cost"
    PRICE = "price"
    TABLE = "table"
    TABLES = "tables"


class _Required(Enum):
    REQUIRED = "required"


REQUIRED = _Required.REQUIRED


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a configuration file."""

    name: str
    kind: Kind
    doc: str
    default: object = REQUIRED
    low: int = 0
    high: int = 2**31 - 1
    choices: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()


OFFER_KEYS: tuple[Key, ...] = (
    Key("variant", Kind.TEXT, "Name of the variant, as in catalogue.toml."),
    Key("model", Kind.TEXT, "Id of the model at the upstream."),
    Key("cost", Kind.COST, "What the upstream charges, in USD.", _NOTHING),
    Key("card", Kind.TEXT, "Price card of the variant, in place of cost.", ""),
    Key("sunset", Kind.DATE, "Day from which the upstream stops serving it.", None),
    Key("successor", Kind.TEXT, "The variant to offer there instead.", ""),
    Key(
        "operations",
        Kind.TEXTS,
        "What it can do here.",
        None,
        choices=tuple(operation.value for operation in Operation),
    ),
    Key("n_max", Kind.INTEGER, "Most pictures per call.", None, low=1, high=10),
    Key("sizes", Kind.SIZES, "The only sizes it makes, such as 1024x1024.", None),
    Key("qualities", Kind.TEXTS, "The only qualities it knows.", None),
    Key(
        "output_formats",
        Kind.TEXTS,
        "File formats it makes.",
        None,
        choices=("png", "jpeg", "webp"),
    ),
    Key(
        "backgrounds",
        Kind.TEXTS,
        "Backgrounds it makes.",
        None,
        choices=("opaque", "transparent"),
    ),
    Key("mask", Kind.FLAG, "Whether it takes a mask.", None),
    Key("references_max", Kind.INTEGER, "Most reference images.", None, high=16),
)

UPSTREAM_KEYS: tuple[Key, ...] = (
    Key("name", Kind.SLUG, "Its name in logs, metrics and commands."),
    Key("kind", Kind.TEXT, "The adapter that speaks to it."),
    Key("base_url", Kind.HTTP_URL, "Where its API begins.", ""),
    Key("credential", Kind.REFERENCE, "Its key, as env:NAME or file:/path.", ""),
    Key("optional", Kind.FLAG, "Leave it out while it has no key.", default=False),
    Key("unless", Kind.TEXT, "Leave it out while this upstream is in use.", ""),
    Key("failure_domain", Kind.TEXT, "Upstreams that fall together share one.", ""),
    Key("max_concurrent", Kind.INTEGER, "Calls at once.", 64, low=1, high=10_000),
    Key("options", Kind.FREE, "The adapter's own settings.", _NOTHING),
    Key("offer", Kind.TABLES, "What can be bought there.", keys=OFFER_KEYS),
)

GATEWAY_KEYS: tuple[Key, ...] = (
    Key(
        "server",
        Kind.TABLE,
        "Where the gateway listens.",
        keys=(
            Key("host", Kind.TEXT, "Address to listen on.", "127.0.0.1"),
            Key(
                "port", Kind.INTEGER, "TCP port; 0 takes a free one.", 8080, high=65_535
            ),
            Key(
                "public_url",
                Kind.HTTP_URL,
                "Origin of links; empty: taken from the request.",
                "",
            ),
            Key(
                "admin_key", Kind.REFERENCE, "Key of the admin routes; unset: off.", ""
            ),
            Key(
                "leaving_s",
                Kind.INTEGER,
                "Seconds that requests are still taken after SIGTERM.",
                5,
                high=120,
            ),
            Key(
                "secret",
                Kind.REFERENCE,
                "What keys and links depend on; unset: made in the data folder.",
                "",
            ),
            Key(
                "trusted_proxies",
                Kind.TEXTS,
                "Networks of proxies whose X-Forwarded-For is believed.",
                (),
            ),
        ),
    ),
    Key(
        "storage",
        Kind.TABLE,
        "Where the gateway remembers.",
        keys=(
            Key("data_dir", Kind.TEXT, "Folder of everything on disk.", "data"),
            Key("database", Kind.LOCATOR, "sqlite, or postgresql://...", "sqlite"),
            Key(
                "redis",
                Kind.LOCATOR,
                "What several processes share: empty, or redis://...",
                "",
            ),
            Key("results", Kind.LOCATOR, "disk, or s3://bucket/prefix.", "disk"),
            Key(
                "results_endpoint",
                Kind.HTTP_URL,
                "Where the S3-compatible store answers; empty: Amazon's.",
                "",
            ),
            Key("results_region", Kind.TEXT, "Region of the bucket.", ""),
            Key(
                "results_access_key",
                Kind.REFERENCE,
                "Id of the store's credential; unset: as the platform has it.",
                "",
            ),
            Key(
                "results_secret_key",
                Kind.REFERENCE,
                "Secret of the store's credential; unset: as the platform has it.",
                "",
            ),
        ),
    ),
    Key(
        "log",
        Kind.TABLE,
        "What is written to stderr.",
        keys=(
            Key(
                "level",
                Kind.TEXT,
                "The least that a line must be to be written.",
                "info",
                choices=LOG_LEVELS,
            ),
        ),
    ),
    Key(
        "tracing",
        Kind.TABLE,
        "Where spans of requests and calls are sent.",
        keys=(
            Key(
                "endpoint",
                Kind.HTTP_URL,
                "An OTLP/HTTP collector's URL for traces; empty: tracing is off.",
                "",
            ),
            Key("one_in", Kind.INTEGER, "One of so many is traced.", 1, low=1),
        ),
    ),
    Key(
        "credits",
        Kind.TABLE,
        "The unit of the tenants' money.",
        keys=(Key("per_usd", Kind.AMOUNT, "Credits per US dollar.", 68),),
    ),
    Key(
        "routing",
        Kind.TABLE,
        "Who says where requests go.",
        keys=(
            Key(
                "tenants_may_choose",
                Kind.FLAG,
                "Whether requests may name upstreams, and so learn their names.",
                default=False,
            ),
        ),
    ),
    Key(
        "inputs",
        Kind.TABLE,
        "Where reference images may be fetched from.",
        keys=(
            Key(
                "allow_networks",
                Kind.TEXTS,
                "Networks of your own that may be reached though not public.",
                (),
            ),
            Key("allow_http", Kind.FLAG, "Fetch http:// URLs too.", default=False),
            Key("ports", Kind.TEXTS, "TCP ports that URLs may name.", ("443", "80")),
        ),
    ),
    Key(
        "webhooks",
        Kind.TABLE,
        "Where webhooks may be sent, and how often.",
        keys=(
            Key(
                "allow_networks",
                Kind.TEXTS,
                "Networks of your own that may be reached though not public.",
                (),
            ),
            Key(
                "ports", Kind.TEXTS, "TCP ports that callback URLs may name.", ("443",)
            ),
            Key(
                "tries_after_s",
                Kind.NUMBERS,
                "Seconds from a failed try to the next one.",
                TRIES_AFTER_S,
                low=1,
                high=86_400,
            ),
        ),
    ),
    Key("upstream", Kind.TABLES, "Accounts at providers.", keys=UPSTREAM_KEYS),
)

CARD_KEYS: tuple[Key, ...] = (
    Key("name", Kind.SLUG, "What offers call it: the provider."),
    Key("cost", Kind.COST, "What the provider charges, in USD."),
    Key("as_of", Kind.MONTH, 'Month that the figures are of, such as "2026-11".'),
    Key("source", Kind.TEXT, "Where the figures are from."),
    Key("sunset", Kind.DATE, "Day from which the provider stops serving it.", None),
    Key("successor", Kind.TEXT, "The variant to offer there instead.", ""),
)

VARIANT_KEYS: tuple[Key, ...] = (
    Key("name", Kind.SLUG, "What clients ask for."),
    Key("aliases", Kind.TEXTS, "Other names of it.", ()),
    Key("created", Kind.DATE, "Day it appeared.", None),
    Key("price", Kind.PRICE, "The tenant's price, in credits."),
    Key(
        "token_rule",
        Kind.TEXT,
        "How output tokens follow from size and quality.",
        "tiles",
        choices=tuple(rule.value for rule in TokenRule),
    ),
    Key(
        "tile_bases",
        Kind.INTEGERS,
        "Base of the tile formula per quality; only with token_rule tiles.",
        _NOTHING,
        low=1,
        high=1024,
    ),
    Key("default_quality", Kind.TEXT, "Quality of a request without one.", "medium"),
    Key("n_max", Kind.INTEGER, "Most pictures per request.", 10, low=1, high=10),
    Key("references_max", Kind.INTEGER, "Most reference images.", 16, low=1, high=16),
    Key("shutdown", Kind.DATE, "Day its maker ends it.", None),
    Key("successor", Kind.TEXT, "The variant to use instead.", ""),
    Key("retired", Kind.FLAG, "Answer 404, name the successor.", default=False),
    Key("card", Kind.TABLES, "What providers charge for it.", (), keys=CARD_KEYS),
)

CATALOGUE_KEYS: tuple[Key, ...] = (
    Key("variant", Kind.TABLES, "Model names that clients ask for.", keys=VARIANT_KEYS),
)


# --- loading ---


def load_settings(
    config_path: Path | None,
    env: Mapping[str, str] | None = None,
    *,
    kinds: Collection[str] | None,
    overrides: Mapping[str, str] = _NOTHING,
) -> Settings:
    """Read and check the whole configuration.

    A value is taken from ``overrides``, else from ``IMAGEWAY__SECTION__KEY``, else
    from ``IMAGEWAY_DATA_DIR``, else from the file, else it is the default.

    Args:
        config_path: the config file; None: that of ``IMAGEWAY_CONFIG``, else the one
            that is shipped. ``catalogue.toml`` is looked for beside it.
        env: the environment; None: that of the process.
        kinds: the adapters there are; None: any kind will do.
        overrides: values by path, such as ``{"server.port": "9000"}``.

    Raises:
        ConfigError: with everything that is wrong, at once.
    """
    env = os.environ if env is None else env
    path = config_path or Path(env.get(ENV_CONFIG) or _shipped() / "gateway.toml")
    beside = path.parent / "catalogue.toml"
    catalogue_path = beside if beside.is_file() else _shipped() / "catalogue.toml"

    desk = _Desk(file=str(path), env=env, folder=path.parent)
    tree = _read_file(path, desk)
    if tree is not None:
        _override(tree, env, overrides, desk)
    shelf = _Desk(
        file=str(catalogue_path),
        env=env,
        folder=catalogue_path.parent,
        problems=desk.problems,
    )
    variant_tree = _read_file(catalogue_path, shelf)
    variants: Mapping[str, Variant] = {}
    cards: _Cards = {}
    if variant_tree is not None:
        listed = _table(variant_tree, CATALOGUE_KEYS, "", shelf)
        variants, cards = _variants(listed, shelf), _cards(listed, shelf)
    if tree is None:
        raise ConfigError(desk.problems)

    values = _table(tree, GATEWAY_KEYS, "", desk)
    settings = _settings(values, variants or None, cards, kinds, desk)
    if settings is None or desk.problems:
        raise ConfigError(desk.problems)
    return replace(settings, files=(path, catalogue_path))


def environment_with(**more: str) -> dict[str, str]:
    """Copy the environment, for a process that is started by this one."""
    return dict(os.environ) | more


def json_schema(keys: tuple[Key, ...] = GATEWAY_KEYS) -> dict[str, object]:
    """Describe a config file (``GATEWAY_KEYS`` or ``CATALOGUE_KEYS``) for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "imageway catalogue" if keys is CATALOGUE_KEYS else "imageway",
        **_table_schema(keys),
    }


def _shipped() -> Path:
    """Find the config that is shipped: inside a wheel, or at the root of a checkout."""
    here = Path(__file__).parent
    packaged = here / "default_config"
    return packaged if packaged.is_dir() else here.parent / "config"


# --- reading one file ---

_Values = dict[str, Any]
"""Checked values by key. Any: the key's kind says what each holds."""


@dataclass(frozen=True, slots=True)
class _Desk:
    """One file on the desk, and what was found to be wrong so far.

    ``given_by`` tells which variable or option gave the value at a path.
    """

    file: str
    env: Mapping[str, str]
    folder: Path
    problems: list[Problem] = field(default_factory=list)
    given_by: dict[str, str] = field(default_factory=dict)

    def wrong(self, path: str, message: str) -> None:
        """Note a problem; reading goes on."""
        source = self.given_by.get(path)
        self.problems.append(
            _outside(source, message) if source else Problem(self.file, path, message)
        )


def _read_file(path: Path, desk: _Desk) -> dict[str, object] | None:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        desk.wrong("", f"cannot be read: {error.strerror or type(error).__name__}")
        return None
    if len(raw) > FILE_MAX_BYTES:
        desk.wrong("", f"is over {FILE_MAX_BYTES:,} bytes")
        return None
    try:
        return tomllib.loads(raw.decode(), parse_float=Decimal)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        desk.wrong(f"line {line}", "is not UTF-8")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        desk.wrong(*_toml_problem(str(error), raw.count(b"\n") + 1))
    except InvalidOperation:
        desk.wrong("", "is not valid TOML: it holds a number that is out of range")
    return None


def _toml_problem(message: str, lines: int) -> tuple[str, str]:
    """Split a parser's message into (where, what)."""
    at = _TOML_LINE.match(message)
    where = f"line {at['line']}, column {at['column']}" if at else f"line {lines}"
    return where, f"is not valid TOML: {at['what'] if at else message}"


# --- overrides ---


def _override(
    tree: dict[str, object],
    env: Mapping[str, str],
    overrides: Mapping[str, str],
    desk: _Desk,
) -> None:
    if env.get(ENV_DATA_DIR):
        _put(tree, ["storage", "data_dir"], ENV_DATA_DIR, env[ENV_DATA_DIR], desk)
    for name in sorted(env):
        if name.startswith(ENV_PREFIX):
            words = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(tree, words, name, env[name], desk)
    for path, text in overrides.items():
        _put(tree, path.split("."), path, text, desk)


def _put(
    tree: dict[str, object], words: list[str], source: str, text: str, desk: _Desk
) -> None:
    """Write a text into the tree, as what its key wants."""
    if words[0] == "upstream":
        table, path = _upstream_named(tree, words[1:2])
        keys, words = UPSTREAM_KEYS, words[2:]
    else:
        section = next((k for k in GATEWAY_KEYS if k.name == words[0]), None)
        keys = section.keys if section else ()
        table, path = tree.setdefault(words[0], {}) if section else None, words[0]
        words = words[1:]
    if words[:1] == ["options"] and len(words) > 1 and isinstance(table, dict):
        table, path = table.setdefault("options", {}), f"{path}.options"
        keys, words = (Key(words[1], Kind.FREE, ""),), words[1:]
    key = next((k for k in keys if [k.name] == words), None)
    if key is None or key.kind is Kind.TABLES or not isinstance(table, dict):
        known = [k.name for k in keys if k.kind is not Kind.TABLES]
        hint = f"; {_hint(words[-1] if words else '', known)}" if keys else ""
        desk.problems.append(_outside(source, f"names no known key{hint}"))
        return
    table[key.name] = _from_text(key, source, text)
    desk.given_by[f"{path}.{key.name}"] = source


def _outside(source: str, message: str) -> Problem:
    variable = source.startswith("IMAGEWAY_")
    return Problem("environment" if variable else "command line", source, message)


def _upstream_named(tree: dict[str, object], words: list[str]) -> tuple[object, str]:
    upstreams = tree.get("upstream")
    for index, table in enumerate(upstreams if isinstance(upstreams, list) else ()):
        name = table.get("name") if isinstance(table, dict) else None
        if isinstance(name, str) and [re.sub(r"\W", "_", name).lower()] == words:
            return table, f"upstream[{index}]"
    return None, ""


def _from_text(key: Key, source: str, text: str) -> object:
    """Read an environment variable as a key wants it; a wrong one stays a text."""
    if key.kind in {Kind.REFERENCE, Kind.LOCATOR}:
        named = text.startswith(("env:", "file:")) or not source.startswith(ENV_PREFIX)
        return text if named or not text else f"env:{source}"
    if key.kind in {Kind.TEXT, Kind.SLUG, Kind.HTTP_URL}:
        return text
    try:
        return tomllib.loads(f"value = {text}", parse_float=Decimal)["value"]
    except (tomllib.TOMLDecodeError, InvalidOperation):
        return text


# --- checking against the table ---


def _table(value: object, keys: tuple[Key, ...], path: str, desk: _Desk) -> _Values:
    """Check a table; what is wrong or missing is noted, and None in the result."""
    if not isinstance(value, dict):
        desk.wrong(path, "must be a table")
        value = {}
    names = [key.name for key in keys]
    for name in value:
        if name not in names:
            message = f"is not a known key; {_hint(name, names)}"
            desk.wrong(_join(path, name), message)
    return {key.name: _value(value, key, _join(path, key.name), desk) for key in keys}


def _value(table: dict[str, object], key: Key, path: str, desk: _Desk) -> object:
    if key.kind is Kind.TABLE:
        return _table(table.get(key.name, {}), key.keys, path, desk)
    if key.name not in table:
        return _default(key, path, desk)
    if key.kind is Kind.TABLES:
        return _tables(table[key.name], key, path, desk)
    try:
        return _READERS[key.kind](table[key.name], key)
    except _WrongValueError as error:
        desk.wrong(f"{path}.{error.below}" if error.below else path, str(error))
        return None


def _default(key: Key, path: str, desk: _Desk) -> object:
    if key.default is not REQUIRED:
        return _nano(key.default, 1) if key.kind is Kind.AMOUNT else key.default
    desk.wrong(path, f"is missing: {key.doc}")
    return [] if key.kind is Kind.TABLES else None


def _tables(value: object, key: Key, path: str, desk: _Desk) -> list[_Values]:
    if not isinstance(value, list) or not value:
        desk.wrong(path, f"must be written as one or more [[{key.name}]] tables")
        return []
    return [
        _table(item, key.keys, f"{path}[{index}]", desk)
        for index, item in enumerate(value)
    ]


def _join(path: str, name: str) -> str:
    shown = name if _BARE.fullmatch(name) else json.dumps(name)
    return f"{path}.{shown}" if path else shown


class _WrongValueError(Exception):
    """A value is wrong; ``below`` is the path from its key to where."""

    def __init__(self, message: str, below: str = "") -> None:
        super().__init__(message)
        self.below = below


def _read_text(value: object, key: Key) -> str:
    if not isinstance(value, str):
        raise _WrongValueError('must be a text in quotes, such as "openai"')
    if key.default is REQUIRED and not value.strip():
        raise _WrongValueError("must not be empty")
    if key.choices and value not in key.choices:
        raise _WrongValueError(f"must be one of {', '.join(key.choices)}")
    return value


def _read_slug(value: object, key: Key) -> str:
    text = _read_text(value, key)
    if not _SLUG.fullmatch(text):
        raise _WrongValueError(
            "must be lower case letters, digits, dot, dash or underscore, "
            "64 characters at most"
        )
    return text


def _read_integer(value: object, key: Key) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or not isinstance(value, int) or not key.low <= value <= key.high:
        raise _WrongValueError(f"must be a whole number from {key.low} to {key.high}")
    return value


def _read_amount(value: object, _key: Key) -> int:
    return _nano(value, 1)


def _read_flag(value: object, _key: Key) -> bool:
    if not isinstance(value, bool):
        raise _WrongValueError("must be true or false")
    return value


def _read_date(value: object, _key: Key) -> str:
    if not isinstance(value, date) or isinstance(value, datetime):
        raise _WrongValueError("must be a date without quotes, such as 2026-12-01")
    return value.isoformat()


def _read_month(value: object, _key: Key) -> str:
    if not isinstance(value, str) or not _MONTH.fullmatch(value):
        raise _WrongValueError('must be a month in quotes, such as "2026-11"')
    return value


def _read_http_url(value: object, key: Key) -> str:
    text = _read_text(value, key)
    try:
        parts = urlsplit(text)
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname)
        has_password = bool(parts.username or parts.password)
    except ValueError:
        fits, has_password = False, False
    if text and (not fits or "?" in text or "#" in text):
        raise _WrongValueError("must be a URL such as https://api.example.com/v1")
    if has_password:
        raise _WrongValueError("must not hold a user name or password")
    return text.rstrip("/")


def _read_reference(value: object, _key: Key) -> str:
    if value == "":
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"(env|file):.+", value):
        raise _WrongValueError(
            "must be env:NAME or file:/path; a secret itself is never written here"
        )
    return value


def _read_locator(value: object, key: Key) -> str:
    text = _read_text(value, key)
    if text.startswith(("env:", "file:")):
        return text
    return _check_locator(text, key, password_allowed=False)


def _check_locator(text: str, key: Key, *, password_allowed: bool) -> str:
    schemes = _LOCATOR_SCHEMES[key.name]
    if text == key.default:
        return text
    try:
        parts = urlsplit(text)
        fits = parts.scheme in schemes
        has_password = bool(parts.password)
    except ValueError:
        fits, has_password = False, False
    if not fits:
        usual = f"{key.default}, " if key.default else ""
        raise _WrongValueError(
            f"must be {usual}a URL that starts with {schemes[0]}://, "
            "or env:NAME or file:/path of one"
        )
    if has_password and not password_allowed:
        raise _WrongValueError(
            "holds a password: give the whole URL as env:NAME or file:/path"
        )
    if key.name == "results" and not _BUCKET.fullmatch(text):
        raise _WrongValueError(
            "must be s3://bucket or s3://bucket/prefix, of letters, digits, dot, dash "
            "and underscore"
        )
    return text


_LOCATOR_SCHEMES = {
    "database": ("postgresql", "postgres"),
    "redis": (
        *("redis", "rediss", "unix"),
        *("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"),
    ),
    "results": ("s3", "gs", "az"),
}


def _read_texts(value: object, key: Key) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise _WrongValueError('must be an array of texts, such as ["png", "webp"]')
    strange = [v for v in value if key.choices and v not in key.choices]
    if strange:
        raise _WrongValueError(
            f"may only hold {', '.join(key.choices)}, not {', '.join(strange)}"
        )
    return tuple(value)


def _read_sizes(value: object, key: Key) -> tuple[tuple[int, int], ...]:
    matches = [_PIXELS.fullmatch(text) for text in _read_texts(value, key)]
    sizes = tuple((int(m[1]), int(m[2])) for m in matches if m)
    if len(sizes) != len(matches):
        raise _WrongValueError('must be an array of sizes, such as ["1024x1024"]')
    return sizes


def _read_numbers(value: object, key: Key) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > NUMBERS_MAX:
        raise _WrongValueError(
            f"must be an array of at most {NUMBERS_MAX} whole numbers, such as [5, 60]"
        )
    return tuple(_read_integer(each, key) for each in value)


def _read_integers(value: object, key: Key) -> dict[str, int]:
    if not isinstance(value, dict) or not value:
        raise _WrongValueError("must be a table such as { low = 16, high = 96 }")
    return {n: _below(_join("", n), _read_integer, v, key) for n, v in value.items()}


def _read_free(value: object, key: Key) -> object:
    """Adapters count in floats; nothing here is money."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: _read_free(item, key) for name, item in value.items()}
    if isinstance(value, list):
        return [_read_free(item, key) for item in value]
    return value


def _read_options(value: object, key: Key) -> object:
    if not isinstance(value, dict):
        raise _WrongValueError("must be a table")
    return _read_free(value, key)


# --- prices ---


def _read_price(value: object, _key: Key) -> TokenPrice:
    table = _read_card(value)
    if table.get("per") not in PER_TOKENS:
        raise _WrongValueError(f"must be one of {_quoted(PER_TOKENS)}", "per")
    return _token_price(table)


def _read_cost(value: object, key: Key) -> CostCard:
    table = _read_card(value)
    per = table.get("per")
    if per in PER_TOKENS:
        return PerToken(_token_price(table, "unit_usd"), _unit_nanousd(table))
    if per == "image":
        return _per_image(table)
    if per == "megapixel":
        _only(table, ("usd", "unit_usd"))
        if "usd" not in table:
            raise _WrongValueError("is missing: USD per 1,000,000 pixels", "usd")
        area_nanousd = _below("usd", _read_amount, table["usd"], key)
        return PerMegapixel(area_nanousd, _unit_nanousd(table))
    raise _WrongValueError(
        f"must be one of {_quoted([*PER_TOKENS, 'image', 'megapixel'])}", "per"
    )


def _read_card(value: object) -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        raise _WrongValueError(
            "must be a table that says what is charged; an unknown cost is never zero"
        )
    return value


def _unit_nanousd(table: dict[str, object]) -> int | None:
    if "unit_usd" not in table:
        return None
    found: int = _below("unit_usd", _read_amount, table["unit_usd"])
    return found


def _token_price(table: dict[str, object], *more: str) -> TokenPrice:
    _only(table, (*TOKEN_CLASSES, *more))
    missing = [name for name in TOKEN_CLASSES if name not in table]
    if missing:
        raise _WrongValueError(f"lacks a price for {', '.join(missing)}")
    tokens = PER_TOKENS[str(table["per"])]
    return TokenPrice(
        **{n: _below(n, lambda v, _: _nano(v, tokens), table[n]) for n in TOKEN_CLASSES}
    )


def _per_image(table: dict[str, object]) -> PerImage:
    _only(table, ("flat", "table", "unit_usd"))
    rows = table.get("table", {})
    if not isinstance(rows, dict) or ("flat" not in table and not rows):
        raise _WrongValueError("needs flat (USD per image), a table of rows, or both")
    for row in rows:
        if not _COST_ROW.fullmatch(row) or row == "*/*":
            raise _WrongValueError(
                "must be quality/WxH, quality/1K (or 2K, 4K), quality/*, */WxH or */1K",
                _join("table", row),
            )
    return PerImage(
        flat=_below("flat", _read_amount, table["flat"]) if "flat" in table else None,
        table={r: _below(_join("table", r), _read_amount, v) for r, v in rows.items()},
        unit_nanousd=_unit_nanousd(table),
    )


def _only(table: dict[str, object], names: tuple[str, ...]) -> None:
    strange = [name for name in table if name not in {"per", *names}]
    if strange:
        raise _WrongValueError(
            f"is not a known key; {_hint(strange[0], names)}", _join("", strange[0])
        )


def _nano(value: object, per: int) -> int:
    """Read an amount for ``per`` units as a whole number of 1e-9 for one. Exact."""
    if not isinstance(value, int | Decimal) or isinstance(value, bool):
        raise _WrongValueError("must be a number such as 1.836")
    number = Decimal(value)
    if not number.is_finite() or not 0 < number <= AMOUNT_MAX:
        raise _WrongValueError(f"must be greater than 0 and at most {AMOUNT_MAX:,}")
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    nano = Fraction(number) * NANO / per if exponent >= -DECIMAL_PLACES_MAX else None
    if nano is None or nano.denominator != 1:
        raise _WrongValueError("has too many decimals to be counted in whole 1e-9")
    return nano.numerator


_Reader = Callable[[object, Key], Any]
_ANY_KEY = Key("", Kind.FREE, "")


def _below(name: str, reader: _Reader, value: object, key: Key = _ANY_KEY) -> Any:  # noqa: ANN401 - whatever the reader returns
    """Read a part of a value, so that a problem says which part."""
    try:
        return reader(value, key)
    except _WrongValueError as error:
        raise _WrongValueError(str(error), name) from error


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


_READERS: Mapping[Kind, _Reader] = {
    Kind.TEXT: _read_text,
    Kind.SLUG: _read_slug,
    Kind.INTEGER: _read_integer,
    Kind.AMOUNT: _read_amount,
    Kind.FLAG: _read_flag,
    Kind.DATE: _read_date,
    Kind.MONTH: _read_month,
    Kind.HTTP_URL: _read_http_url,
    Kind.REFERENCE: _read_reference,
    Kind.LOCATOR: _read_locator,
    Kind.TEXTS: _read_texts,
    Kind.SIZES: _read_sizes,
    Kind.INTEGERS: _read_integers,
    Kind.NUMBERS: _read_numbers,
    Kind.FREE: _read_options,
    Kind.COST: _read_cost,
    Kind.PRICE: _read_price,
}


# --- variants ---


def _variants(values: _Values, desk: _Desk) -> dict[str, Variant]:
    rows = [(f"variant[{i}]", row) for i, row in enumerate(values["variant"])]
    taken: dict[str, str] = {}
    for path, row in rows:
        for name in [row["name"], *(row["aliases"] or ())]:
            if name in taken:
                desk.wrong(path, f"the name {name} is also that of {taken[name]}")
            if name is not None:
                taken.setdefault(name, path)
    names = {row["name"] for _, row in rows}
    for path, row in rows:
        _check_variant(path, row, names, desk)
    return {row["name"]: _variant(row) for _, row in rows if row["name"]}


def _check_variant(path: str, row: _Values, names: set[str], desk: _Desk) -> None:
    tiles = row["token_rule"] == TokenRule.TILES.value
    if tiles and row["tile_bases"] == {}:
        desk.wrong(f"{path}.tile_bases", "is missing: token_rule is tiles")
    if row["token_rule"] == TokenRule.TABLE.value and row["tile_bases"]:
        desk.wrong(f"{path}.tile_bases", "has no use: token_rule is table")
    qualities = tuple(row["tile_bases"] or ()) if tiles else TABLE_QUALITIES
    if "auto" in qualities:
        desk.wrong(f"{path}.tile_bases", "must not name auto: it stands for any")
    if qualities and row["default_quality"] not in ("auto", *qualities):
        known = ", ".join(qualities)
        desk.wrong(f"{path}.default_quality", f"must be auto or one of {known}")
    if row["successor"] and row["successor"] not in names - {row["name"]}:
        desk.wrong(f"{path}.successor", "names no other variant")
    if row["retired"] and not (row["successor"] and row["shutdown"]):
        desk.wrong(f"{path}.retired", "needs successor and shutdown beside it")


def _variant(row: _Values) -> Variant:
    tiles = row["token_rule"] == TokenRule.TILES.value
    created = date.fromisoformat(row["created"]) if row["created"] else None
    return Variant(
        name=row["name"],
        price=row["price"],
        tile_bases=row["tile_bases"] or {}
        if tiles
        else dict.fromkeys(TABLE_QUALITIES, 0),
        token_rule=TokenRule.TILES if tiles else TokenRule.TABLE,
        default_quality=row["default_quality"],
        aliases=frozenset(row["aliases"] or ()),
        n_max=row["n_max"],
        references_max=row["references_max"],
        shutdown_on=row["shutdown"],
        successor=row["successor"] or None,
        retired=row["retired"],
        created_s=_midnight_s(created) if created else 0,
    )


_Cards = Mapping[str, Mapping[str, PriceCard]]


def _cards(values: _Values, desk: _Desk) -> _Cards:
    names = {row["name"] for row in values["variant"]}
    cards: dict[str, dict[str, PriceCard]] = {}
    for place, row in enumerate(values["variant"]):
        shelf = cards.setdefault(row["name"], {})
        for index, card in enumerate(row["card"]):
            path = f"variant[{place}].card[{index}]"
            if card["name"] in shelf:
                desk.wrong(f"{path}.name", f"{card['name']} is already a card of it")
            if card["successor"] and card["successor"] not in names - {row["name"]}:
                desk.wrong(f"{path}.successor", "names no other variant")
            shelf[card["name"]] = PriceCard(
                cost=card["cost"],
                as_of=card["as_of"],
                source=card["source"],
                sunset_on=card["sunset"],
                successor=card["successor"],
            )
    return cards


def _midnight_s(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


# --- upstreams and offers ---


def _settings(
    values: _Values,
    variants: Mapping[str, Variant] | None,
    cards: _Cards,
    kinds: Collection[str] | None,
    desk: _Desk,
) -> Settings | None:
    """Put it together; None when a problem leaves nothing to put together.

    ``variants`` None: the catalogue could not be read, so no name is checked by it.
    """
    rows = [(f"upstream[{i}]", row) for i, row in enumerate(values["upstream"])]
    for path, row in rows:
        _check_upstream(path, row, rows, kinds, desk)
        _check_offers(path, row, variants, cards, desk)
    server, storage = _server(values, desk), _storage(values, desk)
    inputs, webhooks = _inputs(values, desk), _webhooks(values, desk)
    active, left_out = _active(rows, desk)
    if rows and len(left_out) == len(rows):
        reasons = "; ".join(f"{out.upstream} {out.reason}" for out in left_out)
        desk.wrong("upstream", f"none is in use: {reasons}")
    if desk.problems or server is None or storage is None:
        return None
    assert inputs is not None
    assert webhooks is not None
    upstreams = tuple(_upstream(row, secret) for row, secret in active)
    offers = tuple(
        _offer(
            row,
            offer,
            cards.get(offer["variant"], {}).get(offer["card"]),
            (variants or {})[offer["variant"]].successor,
        )
        for row, _ in active
        for offer in row["offer"]
    )
    return Settings(
        server=server,
        storage=storage,
        inputs=inputs,
        webhooks=webhooks,
        nanocredits_per_usd=values["credits"]["per_usd"],
        tenants_may_choose=values["routing"]["tenants_may_choose"],
        log_level=values["log"]["level"],
        tracing=Tracing(**values["tracing"]),
        variants=variants or {},
        cards=cards,
        upstreams=upstreams,
        offers=offers,
        left_out=left_out,
        warnings=(
            *_storage_warnings(storage),
            *_warnings(variants or {}, upstreams, offers),
        ),
        files=(),
    )


_Row = tuple[str, _Values]


def _check_upstream(
    path: str,
    row: _Values,
    rows: list[_Row],
    kinds: Collection[str] | None,
    desk: _Desk,
) -> None:
    first = next(p for p, r in rows if r["name"] == row["name"])
    if row["name"] is not None and first != path:
        desk.wrong(f"{path}.name", f"{row['name']} is also the name of {first}")
    _check_kind(path, row["kind"], kinds, desk)
    if row["optional"] and row["credential"] == "":
        desk.wrong(f"{path}.optional", "has no use without a credential")
    if row["unless"]:
        named = next((r for _, r in rows if r["name"] == row["unless"]), None)
        if named is None or named is row:
            others = [r["name"] for _, r in rows if r["name"] and r is not row]
            desk.wrong(f"{path}.unless", _unknown(row["unless"], others))
        elif named["unless"]:
            desk.wrong(f"{path}.unless", "names an upstream that has an unless itself")


def _check_kind(
    path: str, kind: str | None, kinds: Collection[str] | None, desk: _Desk
) -> None:
    if kind is not None and kinds is not None and kind not in kinds:
        desk.wrong(f"{path}.kind", _unknown(kind, kinds))


def _check_offers(
    path: str,
    row: _Values,
    variants: Mapping[str, Variant] | None,
    cards: _Cards,
    desk: _Desk,
) -> None:
    seen: dict[str, str] = {}
    for index, offer in enumerate(row["offer"]):
        name, where = offer["variant"], f"{path}.offer[{index}]"
        if offer["cost"] is _NOTHING and offer["card"] == "":
            desk.wrong(f"{where}.cost", "is missing, and so is card: one must be there")
        if name is None:
            continue
        if variants is not None:
            _check_names(where, offer, variants, cards, desk)
        if name in seen:
            desk.wrong(f"{where}.variant", f"{name} is already offered at {seen[name]}")
        seen.setdefault(name, where)


def _check_names(
    where: str,
    offer: _Values,
    variants: Mapping[str, Variant],
    cards: _Cards,
    desk: _Desk,
) -> None:
    name = offer["variant"]
    if name not in variants:
        desk.wrong(f"{where}.variant", _unknown(name, variants))
        return
    known = cards.get(name, {})
    if offer["card"] and offer["card"] not in known:
        has = ", ".join(sorted(known)) or "none"
        desk.wrong(
            f"{where}.card", f"{offer['card']} does not exist; cards of {name}: {has}"
        )
    if offer["successor"] and offer["successor"] not in variants.keys() - {name}:
        desk.wrong(f"{where}.successor", "names no other variant")


def _unknown(name: str, known: Collection[str]) -> str:
    return f"{name} does not exist; {_hint(name, sorted(known))}"


def _hint(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(known)}" if known else "there is no other"


def _active(
    rows: list[_Row], desk: _Desk
) -> tuple[list[tuple[_Values, str]], tuple[LeftOut, ...]]:
    """Decide which upstreams are in use, each with its secret."""
    ready: list[tuple[_Values, str]] = []
    left_out: list[LeftOut] = []
    for path, row in rows:
        secret, why = _resolve(row["credential"] or "", desk)
        if not why:
            ready.append((row, secret))
        elif row["optional"]:
            left_out.append(LeftOut(row["name"] or path, f"has no credential: {why}"))
        else:
            desk.wrong(f"{path}.credential", f"{why}; set it, or set optional = true")
    names = {row["name"] for row, _ in ready}
    left_out += [
        LeftOut(row["name"], f"stands in only while {row['unless']} is not in use")
        for row, _ in ready
        if row["unless"] in names
    ]
    return [pair for pair in ready if pair[0]["unless"] not in names], tuple(left_out)


def _resolve(reference: str, desk: _Desk) -> tuple[str, str]:
    """Look a secret up: (secret, why it is not there). One of them is empty."""
    if not reference:
        return "", ""
    scheme, _, name = reference.partition(":")
    if scheme == "env":
        found = desk.env.get(name, "").strip()
        return found, "" if found else f"the environment variable {name} is not set"
    try:
        with (desk.folder / name).open("rb") as file:
            found = file.read(SECRET_MAX_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        return "", f"the file {name} cannot be read"
    return found, "" if found else f"the file {name} is empty"


def _server(values: _Values, desk: _Desk) -> Server | None:
    server = values["server"]
    if None in server.values():
        return None
    admin_key, _ = _resolve(server["admin_key"], desk)
    secret, problem = _resolve(server["secret"], desk)
    if server["secret"] and problem:
        desk.wrong("server.secret", problem)
    if secret and len(secret) < SECRET_MIN_CHARS:
        desk.wrong("server.secret", f"must have at least {SECRET_MIN_CHARS} characters")
    trusted = _networks("server.trusted_proxies", server["trusted_proxies"], desk)
    return Server(
        host=server["host"],
        port=server["port"],
        public_url=server["public_url"],
        admin_key=admin_key or None,
        leaving_s=server["leaving_s"],
        secret=secret or None,
        trusted_proxies=trusted,
    )


def _storage(values: _Values, desk: _Desk) -> Storage | None:
    storage = values["storage"]
    keys = {
        k.name: k for k in next(k.keys for k in GATEWAY_KEYS if k.name == "storage")
    }
    for name in _LOCATOR_SCHEMES:
        storage[name] = _locate(storage[name], keys[name], desk)
    if None in storage.values():
        return None
    results = _object_store(storage, desk)
    return Storage(
        data_dir=Path(storage["data_dir"]),
        database=storage["database"],
        redis=storage["redis"],
        results=results,
    )


def _object_store(storage: _Values, desk: _Desk) -> ObjectStore | None:
    url = storage["results"]
    given = {name: storage[f"results_{name}"] for name in _S3_ONLY}
    if not url.startswith("s3://"):
        for name in (name for name in _S3_ONLY if given[name]):
            desk.wrong(f"storage.results_{name}", "has a use with s3:// only")
        return None if url == "disk" else ObjectStore(url, "", "", "", "")
    keys = {}
    for name in ("access_key", "secret_key"):
        keys[name], why = _resolve(given[name], desk)
        if why:
            desk.wrong(f"storage.results_{name}", why)
        elif given["access_key"] and not given[name]:
            desk.wrong(f"storage.results_{name}", "is missing beside the access key")
        elif given["secret_key"] and not given[name]:
            desk.wrong(f"storage.results_{name}", "is missing beside the secret key")
    return ObjectStore(url, given["endpoint"], given["region"], **keys)


_S3_ONLY = ("endpoint", "region", "access_key", "secret_key")


def _inputs(values: _Values, desk: _Desk) -> InputSettings | None:
    networks, ports = _reach("inputs", values["inputs"], desk)
    if desk.problems:
        return None
    return InputSettings(networks, values["inputs"]["allow_http"], ports)


def _webhooks(values: _Values, desk: _Desk) -> WebhookSettings | None:
    networks, ports = _reach("webhooks", values["webhooks"], desk)
    if desk.problems:
        return None
    return WebhookSettings(networks, ports, values["webhooks"]["tries_after_s"])


def _reach(
    section: str, values: _Values, desk: _Desk
) -> tuple[tuple[IPv4Network | IPv6Network, ...], tuple[int, ...]]:
    """Read where URLs of callers may lead to; without what is wrong."""
    where = f"{section}.allow_networks"
    networks = _networks(where, values["allow_networks"] or (), desk)
    ports: list[int] = []
    for index, text in enumerate(values["ports"] or ()):
        if text.isascii() and text.isdigit() and 0 < int(text) <= PORT_MAX:
            ports.append(int(text))
        else:
            where = f"{section}.ports[{index}]"
            desk.wrong(where, f"must be 1 to {PORT_MAX}, as text")
    return networks, tuple(ports)


def _networks(
    where: str, texts: Iterable[str], desk: _Desk
) -> tuple[IPv4Network | IPv6Network, ...]:
    """Read networks; without what is wrong."""
    networks: list[IPv4Network | IPv6Network] = []
    for index, text in enumerate(texts):
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            desk.wrong(f"{where}[{index}]", f"is no network: {error}")
    return tuple(networks)


def _locate(text: str | None, key: Key, desk: _Desk) -> str | None:
    if text is None or not text.startswith(("env:", "file:")):
        return text
    found, why = _resolve(text, desk)
    try:
        if not why:
            return _check_locator(found, key, password_allowed=True)
    except _WrongValueError as error:
        why = str(error)
    desk.wrong(f"storage.{key.name}", why)
    return None


def _upstream(row: _Values, secret: str) -> UpstreamSettings:
    return UpstreamSettings(
        name=row["name"],
        kind=row["kind"],
        account=Account(
            name=row["name"],
            base_url=row["base_url"],
            secret=secret,
            options=row["options"],
        ),
        failure_domain=row["failure_domain"] or row["name"],
        max_concurrent=row["max_concurrent"],
    )


def _offer(
    row: _Values, offer: _Values, card: PriceCard | None, successor: str | None
) -> OfferSettings:
    # The offer's own word wins, key by key.
    priced_by = None if offer["cost"] else card
    return OfferSettings(
        upstream=row["name"],
        variant=offer["variant"],
        model=offer["model"],
        cost=priced_by.cost if priced_by else offer["cost"],
        failure_domain=row["failure_domain"] or row["name"],
        sunset_on=offer["sunset"] or (card.sunset_on if card else None),
        card=offer["card"] if priced_by else "",
        as_of=priced_by.as_of if priced_by else "",
        successor=offer["successor"]
        or (card.successor if card else "")
        or (successor or ""),
        overrides=Overrides(
            operations=_set(offer["operations"], Operation),
            n_max=offer["n_max"],
            sizes=_set(offer["sizes"], tuple),
            qualities=_set(offer["qualities"], str),
            output_formats=_set(offer["output_formats"], str),
            backgrounds=_set(offer["backgrounds"], str),
            mask=offer["mask"],
            references_max=offer["references_max"],
        ),
    )


def _set(given: Collection[Any] | None, build: Callable[[Any], Any]) -> Any:  # noqa: ANN401 - a frozenset of what build makes
    return None if given is None else frozenset(map(build, given))


def _storage_warnings(storage: Storage) -> list[str]:
    if storage.database == "sqlite" or storage.results is not None:
        return []
    told = (
        "pictures are on this gateway's own disk: another gateway on the same database "
        'cannot show them. Several need storage.results = "s3://..."'
    )
    return [told]


def _warnings(
    variants: Mapping[str, Variant],
    upstreams: tuple[UpstreamSettings, ...],
    offers: tuple[OfferSettings, ...],
) -> list[str]:
    warnings = []
    domains = {upstream.failure_domain for upstream in upstreams}
    if len(domains) == 1:
        warnings.append(
            f"all upstreams in use share the failure domain {domains.pop()}: "
            "when it falls there is nothing to fall over to"
        )
    offered = {offer.variant for offer in offers}
    for variant in variants.values():
        if not variant.retired and variant.name not in offered:
            warnings.append(f"no upstream in use offers {variant.name}")
        if variant.retired and variant.name in offered:
            warnings.append(f"offers of {variant.name} are never used: it is retired")
    return warnings


# --- the JSON schema ---


def _table_schema(keys: tuple[Key, ...]) -> dict[str, object]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {key.name: _key_schema(key) for key in keys},
        "required": [
            key.name
            for key in keys
            if key.kind is not Kind.TABLE and key.default is REQUIRED
        ],
    }


def _key_schema(key: Key) -> dict[str, object]:
    schema: dict[str, object] = {"description": key.doc}
    if key.default not in (REQUIRED, None, _NOTHING):
        schema["default"] = (
            list(key.default) if isinstance(key.default, tuple) else key.default
        )
    return schema | _SCHEMAS[key.kind](key)


def _text_schema(key: Key) -> dict[str, object]:
    choices: dict[str, object] = {"enum": list(key.choices)} if key.choices else {}
    return {"type": "string"} | choices


def _integer_schema(key: Key) -> dict[str, object]:
    return {"type": "integer", "minimum": key.low, "maximum": key.high}


def _amount_schema(_: Key) -> dict[str, object]:
    return {"type": "number", "exclusiveMinimum": 0, "maximum": AMOUNT_MAX}


def _card_schema(
    per: Collection[str], amounts: Collection[str], optional: Collection[str] = ()
) -> dict[str, object]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "per": {"enum": list(per)},
            **{name: _amount_schema(_ANY_KEY) for name in (*amounts, *optional)},
        },
        "required": ["per", *amounts],
    }


def _cost_schema(_: Key) -> dict[str, object]:
    by_image = _card_schema(["image"], [])
    by_image["properties"] = {
        "per": {"enum": ["image"]},
        "flat": _amount_schema(_ANY_KEY),
        "unit_usd": _amount_schema(_ANY_KEY),
        "table": {
            "type": "object",
            "propertyNames": {"pattern": f"^{_COST_ROW.pattern}$"},
            "additionalProperties": _amount_schema(_ANY_KEY),
        },
    }
    by_image["anyOf"] = [{"required": ["flat"]}, {"required": ["table"]}]
    return {
        "oneOf": [
            _card_schema(PER_TOKENS, TOKEN_CLASSES, ["unit_usd"]),
            by_image,
            _card_schema(["megapixel"], ["usd"], ["unit_usd"]),
        ]
    }


_SCHEMAS: Mapping[Kind, Callable[[Key], dict[str, object]]] = {
    Kind.TEXT: _text_schema,
    Kind.SLUG: lambda _: {"type": "string", "pattern": f"^{_SLUG.pattern}$"},
    Kind.INTEGER: _integer_schema,
    Kind.AMOUNT: _amount_schema,
    Kind.FLAG: lambda _: {"type": "boolean"},
    Kind.DATE: lambda _: {"type": "string", "format": "date"},
    Kind.MONTH: lambda _: {"type": "string", "pattern": f"^{_MONTH.pattern}$"},
    Kind.HTTP_URL: lambda _: {"type": "string", "pattern": "^(https?://.*)?$"},
    Kind.REFERENCE: lambda _: {"type": "string", "pattern": "^((env|file):.+)?$"},
    Kind.LOCATOR: _text_schema,
    Kind.TEXTS: lambda key: {"type": "array", "items": _text_schema(key)},
    Kind.SIZES: lambda _: {
        "type": "array",
        "items": {"type": "string", "pattern": f"^{_PIXELS.pattern}$"},
    },
    Kind.INTEGERS: lambda key: {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": _integer_schema(key),
    },
    Kind.NUMBERS: lambda key: {
        "type": "array",
        "maxItems": NUMBERS_MAX,
        "items": _integer_schema(key),
    },
    Kind.FREE: lambda _: {"type": "object"},
    Kind.COST: _cost_schema,
    Kind.PRICE: lambda _: _card_schema(PER_TOKENS, TOKEN_CLASSES),
    Kind.TABLE: lambda key: _table_schema(key.keys),
    Kind.TABLES: lambda key: {
        "type": "array",
        "minItems": 1,
        "items": _table_schema(key.keys),
    },
}
