"""Every name of a metric that is written down anywhere is one that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.adapters.metrics import COUNTERS, GAUGES, HISTOGRAMS

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"\bimageway_[a-z0-9_]+")
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
