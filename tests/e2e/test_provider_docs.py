"""What the guides say to put into a config can be put into a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.app import checked_catalogue, read_settings
from providers.registry import PROVIDERS
from tests.e2e.gateways import ROOT
from tests.e2e.guides import GUIDES, examples_of


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_every_example_of_an_upstream_is_a_good_config(
    guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(examples_of(guide))
    for name in re.findall(r"env:(\w+)", text):
        monkeypatch.setenv(name, "a-secret")
    config = tmp_path / "gateway.toml"
    config.write_text(text)

    settings = read_settings(config, {"storage.data_dir": str(tmp_path)})

    assert checked_catalogue(settings).offers["gpt-image-2"]
    assert {upstream.kind for upstream in settings.upstreams} == {guide.stem}


def test_every_kind_is_in_the_index() -> None:
    index = (ROOT / "docs" / "providers.md").read_text()
    rows = re.findall(r"^\| \[?`(\w+)`", index, re.MULTILINE)
    assert {kind: rows.count(kind) for kind in PROVIDERS} == dict.fromkeys(PROVIDERS, 3)
