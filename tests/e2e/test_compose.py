"""What compose.yaml promises, and that it agrees with image, settings and config."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from gateway.serving import DRAIN_MAX_S
from gateway.settings import ObjectStore, Settings, load_settings
from providers.registry import PROVIDERS
from tests.e2e.gateways import LiveGateway, command
from tests.e2e.images import ROOT, Step, read_steps
from tests.object_store import S3Server
from tests.servers import RedisServer, postgres_database

_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
_SECRET = re.compile(r"PASSWORD|SECRET|KEY|AUTH$|DATABASE|REDIS")
ROOTED = {"s3"}
"""Its volume belongs to root; it has no capability all the same."""


@cache
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


SERVICES = tuple(compose()["services"])


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"][name]
    return found


def filled(text: str, values: dict[str, str]) -> str:
    """Fill in variables as compose does; a required one must be there."""

    def value(match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        if values.get(name):
            return values[name]
        assert how == "-", f"{name} is required"
        return str(rest)

    return _VARIABLE.sub(value, text).replace("$$", "$")


def asked_for() -> dict[str, str]:
    """The variables in ``.env.example``."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and line[0] != "#")
    return dict(pairs)


def operators_env() -> dict[str, str]:
    """What the gateway is given once ``.env`` is filled."""
    values = {name: f"{name.lower().replace('_', '')}0123" for name in asked_for()}
    values |= {"OPENAI_API_KEY": "", "PUBLIC_URL": "", "IMAGEWAY_SECRET": "0123" * 12}
    given = service("gateway")["environment"]
    env = {name: filled(str(text), values) for name, text in given.items()}
    inside = Path(env["IMAGEWAY_CONFIG"])
    outside = ROOT / mounted()[str(inside.parent)] / inside.name
    return env | {"IMAGEWAY_CONFIG": str(outside)}


def mounted() -> dict[str, str]:
    """What the gateway has mounted, by where."""
    volumes = [text.split(":") for text in service("gateway")["volumes"]]
    return {parts[1]: parts[0] for parts in volumes}


def settings() -> Settings:
    return load_settings(None, operators_env(), kinds=frozenset(PROVIDERS))


# --- secrets ---


def test_no_secret_is_in_it_and_each_is_asked_for() -> None:
    text = (ROOT / "compose.yaml").read_text()
    required = {name for name, how, _ in _VARIABLE.findall(text) if how == "?"}
    optional = {name for name, how, _ in _VARIABLE.findall(text) if how == "-"}

    for name in SERVICES:
        for variable, value in service(name).get("environment", {}).items():
            if _SECRET.search(variable) and not isinstance(value, bool):
                assert "${" in str(value) or "false" in str(value), (name, variable)
    assert {"", *asked_for().values()} == {""}
    assert required <= asked_for().keys()
    assert asked_for().keys() <= required | optional
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored


def test_a_missing_secret_stops_it_and_says_where_to_look() -> None:
    text = (ROOT / "compose.yaml").read_text()

    messages = {rest for _, how, rest in _VARIABLE.findall(text) if how == "?"}

    assert messages == {"fill .env, see docs/containers.md"}
    assert (ROOT / "docs" / "containers.md").is_file()
    with pytest.raises(AssertionError, match="POSTGRES_PASSWORD is required"):
        filled("${POSTGRES_PASSWORD:?fill .env}", {})


# --- every service ---


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_bounded_and_may_do_little(name: str) -> None:
    it = service(name)

    assert it["read_only"] is True
    assert it["cap_drop"] == ["ALL"]
    assert it["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in it
    assert "cap_add" not in it
    assert it["restart"] == "unless-stopped"
    assert set(it["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert it["logging"]["options"].keys() == {"max-size", "max-file"}
    assert (it.get("user", "0").partition(":")[0] == "0") == (name in ROOTED)
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*", it["image"]), it["image"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_says_whether_it_is_well(name: str) -> None:
    if name == "gateway":
        steps = {step.word: step.rest for step in dockerfile()}
        assert "imageway" in steps["HEALTHCHECK"]
        return
    check = service(name)["healthcheck"]

    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()


def test_only_this_machine_reaches_what_is_published_and_nobody_the_stores() -> None:
    for name in SERVICES:
        for port in service(name).get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
    assert compose()["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "redis", "s3"):
        assert service(name)["networks"] == ["inside"]
        assert "ports" not in service(name)


def test_nothing_starts_before_what_it_needs_is_well() -> None:
    waits = {name: service(name).get("depends_on", {}) for name in SERVICES}

    assert set(waits["gateway"]) == {"postgres", "redis", "s3"}
    assert waits["prometheus"] == {}  # it is to see a gateway that does not start
    for needs in waits.values():
        assert {need["condition"] for need in needs.values()} <= {"service_healthy"}


def test_whatever_is_mounted_is_there() -> None:
    for name in SERVICES:
        for volume in service(name).get("volumes", []):
            source, _, options = volume.partition(":")
            if source.startswith("."):
                assert (ROOT / source).exists(), (name, source)
                assert options.endswith(":ro"), (name, volume)
            else:
                assert source in compose()["volumes"], (name, source)


# --- agreement ---


def dockerfile() -> list[Step]:
    return read_steps((ROOT / "Dockerfile").read_text())


def test_it_runs_the_image_as_the_image_is_made() -> None:
    it, steps = service("gateway"), dockerfile()
    said = {step.word: step.rest for step in steps}
    env = " ".join(step.rest for step in steps if step.word == "ENV")

    assert it["user"] == said["USER"]
    assert f"IMAGEWAY_DATA_DIR={said['VOLUME']}" in env
    assert mounted()[said["VOLUME"]] in compose()["volumes"]
    assert it["ports"][0].endswith(f":{said['EXPOSE']}")
    assert int(it["stop_grace_period"].removesuffix("s")) > DRAIN_MAX_S
    assert it["build"] == "."


def test_the_gateway_understands_all_that_it_is_given() -> None:
    found = settings()

    assert found.server.port == 8080
    assert found.server.admin_key == "imagewayadminkey0123"
    assert found.storage.results == ObjectStore(
        "s3://pictures/gateway",
        "http://s3:7070",
        "us-east-1",
        "s3accesskey0123",
        "s3secretkey0123",
    )
    assert [upstream.kind for upstream in found.upstreams] == ["sandbox"] * 3


def test_what_the_gateway_is_told_of_the_stores_is_what_they_are() -> None:
    storage = settings().storage
    assert storage.results is not None
    database, redis = urlsplit(storage.database), urlsplit(storage.redis)
    endpoint = urlsplit(storage.results.endpoint)
    postgres_env = service("postgres")["environment"]

    assert (database.hostname, database.port) == ("postgres", 5432)
    assert database.username == postgres_env["POSTGRES_USER"]
    assert database.path == f"/{postgres_env['POSTGRES_DB']}"
    assert database.password == "postgrespassword0123"
    assert (redis.hostname, redis.port) == ("redis", 6379)
    assert redis.password == "redispassword0123"
    assert endpoint.hostname == "s3"
    assert service("s3")["environment"]["VGW_PORT"] == f":{endpoint.port}"
    assert service("s3")["environment"]["VGW_REGION"] == storage.results.region
    bucket = storage.results.url.split("/")[2]
    assert service("s3")["volumes"][0].endswith(f":/data/{bucket}")


def test_prometheus_finds_the_gateway_and_grafana_finds_prometheus() -> None:
    prometheus = yaml.safe_load((ROOT / "grafana" / "prometheus.yaml").read_text())
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    found = jobs["imageway"]["dns_sd_configs"][0]
    alerts = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    alertmanager = yaml.safe_load((ROOT / "grafana" / "alertmanager.yaml").read_text())
    sources = ROOT / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]

    assert (found["names"], found["port"]) == (["gateway"], 8080)
    for host in ("gateway", "alertmanager"):
        assert set(service(host)["networks"]) & set(service("prometheus")["networks"])
    assert alerts == ["alertmanager:9093"]
    receivers = [receiver["name"] for receiver in alertmanager["receivers"]]
    assert alertmanager["route"]["receiver"] in receivers
    assert urlsplit(source["url"]).hostname in SERVICES
    for mount in service("prometheus")["volumes"] + service("alertmanager")["volumes"]:
        name = mount.split(":")[1]
        if name.endswith(".yaml"):
            commands = (
                service("prometheus")["command"] + service("alertmanager")["command"]
            )
            assert f"--config.file={name}" in commands


# --- what takes PostgreSQL and Redis ---


def test_a_gateway_starts_with_what_compose_gives_it(
    tmp_path: Path, redis: RedisServer, s3: S3Server
) -> None:
    stores = {
        "IMAGEWAY__STORAGE__DATABASE": postgres_database(),
        "IMAGEWAY__STORAGE__REDIS": redis.url,
        "IMAGEWAY__STORAGE__RESULTS": f"s3://{s3.new_bucket()}/gateway",
        "IMAGEWAY__STORAGE__RESULTS_ENDPOINT": s3.url,
    }
    env = operators_env()
    assert stores.keys() <= env.keys()

    with LiveGateway(tmp_path / "data", env=env | stores) as gateway:
        assert httpx.get(f"{gateway.url}/health/ready").status_code == 200
        assert gateway.tenant("acme")


def test_a_gateway_of_this_version_takes_the_configuration_of_compose(
    tmp_path: Path,
) -> None:
    env = operators_env()

    checked = command("check", "--data-dir", str(tmp_path), cwd=None, **env)

    assert checked.code == 0, checked.err
    assert "ok: 3 upstreams" in checked.out
