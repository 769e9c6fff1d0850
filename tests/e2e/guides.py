"""What the guides of the providers say to put into a config."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.gateways import ROOT

GUIDES = sorted((ROOT / "docs" / "providers").glob("*.md"))


def examples_of(guide: Path) -> list[str]:
    """Read the examples that configure an upstream, in their order."""
    blocks = re.findall(r"```toml\n(.*?)```", guide.read_text(), re.DOTALL)
    return [block for block in blocks if "[[upstream]]" in block]


def first_example(provider: str, *, at: str, told: str) -> str:
    """Read a provider's first example, with ``at`` in place of the ``told`` address."""
    (guide,) = (guide for guide in GUIDES if guide.stem == provider)
    example = examples_of(guide)[0]
    assert told in example
    return example.replace(told, at)
