"""``imageway check --probe``: are the credentials good?"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.e2e.gateways import command
from tests.simulators.fal_server import KEY as FAL_KEY
from tests.simulators.fal_server import FalSimulator
from tests.simulators.openai_server import KEY as OPENAI_KEY
from tests.simulators.openai_server import OpenAISimulator
from tests.simulators.server import served

UPSTREAM = """
[[upstream]]
name = "{kind}"
kind = "{kind}"
base_url = "{base_url}"
credential = "{credential}"

[[upstream.offer]]
variant = "gpt-image-2"
model = "openai/gpt-image-2"
cost = {{ per = "image", flat = 0.04 }}
"""


async def test_all_credentials_are_tested_and_nothing_is_bought(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    async with served(OpenAISimulator()) as openai, served(FalSimulator()) as fal:
        config.write_text(
            UPSTREAM.format(
                kind="openai", base_url=openai.base_url, credential="env:ONE"
            )
            + UPSTREAM.format(kind="fal", base_url=fal.base_url, credential="env:TWO")
            + UPSTREAM.format(kind="sandbox", base_url="", credential="")
        )
        data_dir = tmp_path / "data"
        check = ("check", "--config", str(config), "--data-dir", str(data_dir))

        plain = await asyncio.to_thread(command, *check, ONE=OPENAI_KEY, TWO="wrong-1")
        assert plain.code == 0
        assert not openai.requests + fal.requests

        wrong = await asyncio.to_thread(
            command, *check, "--probe", ONE=OPENAI_KEY, TWO="wrong-1"
        )
        assert wrong.code == 1, wrong.err
        lines = wrong.out.splitlines()
        assert "probe openai: ok" in lines
        assert any(line.startswith("probe fal: auth: check") for line in lines)
        assert any(line.startswith("probe sandbox: not tested") for line in lines)
        assert "wrong-1" not in wrong.out + wrong.err

        good = await asyncio.to_thread(
            command, *check, "--probe", ONE=OPENAI_KEY, TWO=FAL_KEY
        )
        assert good.code == 0, good.out
        assert "probe fal: ok" in good.out.splitlines()
        assert not openai.purchases + fal.purchases
        assert not data_dir.exists()
