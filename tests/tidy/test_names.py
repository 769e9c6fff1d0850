"""Every name of a metric that is written down anywhere is one that there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from gateway.adapters.metrics import COUNTERS, GAUGES, HISTOGRAMS

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"\bimageway_[a-z0-9_]+")
_RECORDED = re.compile(r"\bimageway:[a-z0-9_]+:[a-z0-9_]+")
NO_METRICS = frozenset({"imageway_api"})
"""Words in texts that only look like one."""


def shown() -> set[str]:
    """The names of all series, as Prometheus stores them."""
    names = {f"imageway_{name}_total" for name in COUNTERS}
    names |= {f"imageway_{name}" for name in GAUGES}
    for name in HISTOGRAMS:
        names |= {f"imageway_{name}{end}" for end in ("_bucket", "_count", "_sum")}
    return names


def explained() -> set[str]:
    """The names as the docs have them: a histogram by one name."""
    return {f"imageway_{name}_total" for name in COUNTERS} | {
        f"imageway_{name}" for name in (*GAUGES, *HISTOGRAMS)
    }


def files() -> list[Path]:
    """Whatever is written for people or for Prometheus and Grafana."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    found += sorted((ROOT / "docs").rglob("*.md"))
    found += sorted(p for p in (ROOT / "grafana").rglob("*") if p.is_file())
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_whatever_is_named_is_there(path: Path) -> None:
    named = set(_NAME.findall(path.read_text())) - NO_METRICS

    assert named <= shown() | explained()


def test_whatever_is_there_is_explained_with_its_labels() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(imageway_\w+)(\{[^}]*\})?`", text, re.MULTILINE))
    labels = {f"imageway_{n}_total": labels for n, (_, labels) in COUNTERS.items()}
    labels |= {f"imageway_{n}": each[1] for n, each in GAUGES.items()}
    labels |= {f"imageway_{n}": each[1] for n, each in HISTOGRAMS.items()}

    assert rows.keys() == explained()
    for name, wanted in labels.items():
        assert rows[name] == (f"{{{','.join(wanted)}}}" if wanted else ""), name


# --- rules ---


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted((ROOT / "grafana" / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def recorded() -> set[str]:
    """The names that recording rules make."""
    return {rule["record"] for rule in rules() if "record" in rule}


def test_whatever_a_rule_or_a_panel_takes_from_a_rule_is_recorded() -> None:
    for path in sorted((ROOT / "grafana").rglob("*")):
        if path.is_file():
            named = set(_RECORDED.findall(path.read_text()))
            assert named <= recorded(), path


def test_every_alert_has_a_section_in_the_runbook_and_every_section_an_alert() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    sections = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    alerts = [rule for rule in rules() if "alert" in rule]

    assert len(sections) == len(set(sections))
    assert set(sections) == {rule["alert"] for rule in alerts}
    for rule in alerts:
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{anchor}"
        assert rule["labels"]["severity"] in {"page", "ticket"}


def test_every_alert_is_seen_to_fire() -> None:
    fired = set()
    for path in sorted((ROOT / "grafana" / "rules" / "tests").glob("*.yaml")):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                if case["exp_alerts"]:
                    fired.add(case["alertname"])

    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}
