"""A real Prometheus reads a live gateway: panels have data, and the pager goes off."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.gateways import ROOT, LiveGateway
from tests.servers import free_port, program

WAIT_MAX_S = 60
PACE_S = 0.1
RATE = "5s"
BODY = {"model": "gpt-image-2", "prompt": "x", "quality": "low", "size": "1024x1024"}
UPSTREAMS = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
SHORT = {"5m": "5s", "10m": "6s", "15m": "6s", "30m": "6s", "1h": "8s", "2h": "8s"}
SHORT |= {"6h": "10s", "1d": "12s", "3d": "12s", "30d": "15s"}
"""What stands for a window: the expressions are the shipped ones but for that."""


def hurried(rules: str) -> str:
    """The shipped rules, by windows of seconds, and without waiting to fire."""
    rules = re.sub(r"\[(\w+)\]", lambda found: f"[{SHORT[found[1]]}]", rules)
    rules = re.sub(r"\binterval: \w+", "interval: 1s", rules)
    return re.sub(r"\bfor: \w+", "for: 0s", rules)


@dataclass
class Watched:
    """A gateway, and the Prometheus that reads it every second."""

    gateway: LiveGateway
    url: str

    def ask(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expr: str) -> list[Any]:
        return list(self.ask("query", query=expr)["result"])

    def firing(self) -> set[tuple[str, str]]:
        """Which alerts fire, for which model."""
        alerts = self.ask("alerts")["alerts"]
        found = [each["labels"] for each in alerts if each["state"] == "firing"]
        return {(each["alertname"], each.get("model", "")) for each in found}

    def until(self, true: Callable[[], object], what: str) -> None:
        end_s = time.monotonic() + WAIT_MAX_S
        while not true():
            assert time.monotonic() < end_s, what
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    binary, port = program("prometheus"), free_port()
    for name in ("slo", "alerts"):
        text = (ROOT / "grafana" / "rules" / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(hurried(text))
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["slo.yaml", "alerts.yaml"],
        "scrape_configs": [
            {"job_name": "imageway", "static_configs": [{"targets": [target]}]}
        ],
    }
    (folder / "prometheus.yaml").write_text(json.dumps(config))
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    with LiveGateway(folder / "data") as gateway:
        for name in UPSTREAMS:
            gateway.sandbox(name, latency_ms=0)
        target = urlsplit(gateway.url).netloc
        with prometheus(folder, target) as url:
            it = Watched(gateway, url)
            it.until(lambda: ready(url), "Prometheus is ready")
            yield it


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def clients(gateway: LiveGateway) -> Iterator[None]:
    """Somebody who asks at a steady pace, whatever the answers are."""
    over = threading.Event()

    def ask() -> None:
        with gateway.client() as client:
            headers = {"prefer": "respond-async"}
            client.post("/v1/images/generations", json=BODY, headers=headers)
            while not over.wait(PACE_S):
                client.post("/v1/images/generations", json=BODY)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


def panels() -> list[tuple[str, str]]:
    """Every query of every dashboard, by the panel's name."""
    found = []
    for path in sorted((ROOT / "grafana" / "dashboards").glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            inner = [panel, *panel.get("panels", [])]
            for each in inner:
                name = f"{path.stem}: {each['title']}"
                found += [(name, target["expr"]) for target in each.get("targets", [])]
    return found


def test_a_failing_model_reaches_the_pager_and_every_panel_has_data(
    watched: Watched,
) -> None:
    burning = ("ImagewayErrorBudgetBurnsFast", "gpt-image-2")
    gateway = watched.gateway
    with clients(gateway):
        watched.until(
            lambda: watched.query("imageway:errors:ratio30d == 0"), "it is well"
        )
        before = watched.firing()
        for name in UPSTREAMS:
            gateway.sandbox(name, failure_rate=1, failure_kind="overloaded")
        watched.until(lambda: burning in watched.firing(), "the page")
        down = ("ImagewayModelDown", "gpt-image-2")
        watched.until(lambda: down in watched.firing(), "the model is down")
        empty = [
            (name, expr)
            for name, expr in panels()
            if not watched.query(expr.replace("$__rate_interval", RATE))
        ]

    assert before == set()
    assert len(panels()) > 50
    assert empty == []


def test_an_exemplar_leads_to_the_lines_of_its_task(watched: Watched) -> None:
    with watched.gateway.client(watched.gateway.first_key) as client:
        for name in UPSTREAMS:
            watched.gateway.sandbox(name, failure_rate=0)
        client.post("/v1/images/generations", json=BODY)

    found = watched.ask(
        "query_exemplars",
        query="imageway_request_duration_seconds_bucket",
        start=str(time.time() - 120),
        end=str(time.time()),
    )
    traces = {e["labels"]["trace_id"] for each in found for e in each["exemplars"]}

    lines = [json.loads(line) for line in watched.gateway.logs]
    told = {line["trace_id"] for line in lines if line["event"] == "task"}
    assert traces
    assert traces <= told


def test_every_rule_was_evaluated_without_an_error(watched: Watched) -> None:
    groups = watched.ask("rules")["groups"]

    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 35
    assert {rule["health"] for rule in rules} == {"ok"}
    targets = watched.ask("targets")["activeTargets"]
    assert [target["lastError"] for target in targets] == [""]
