"""The sandbox: its settings, and what its pictures show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from providers.kit.contract import Billed, Done, ProviderError
from providers.kit.spool import SpoolFolder
from providers.sandbox import Sandbox, SandboxSettings
from tests.builders import a_job
from tests.contract.upstreams import K, file_of


def a_sandbox(folder: Path, fraction: float = 0.5, **options: object) -> Sandbox:
    settings = SandboxSettings({"latency_ms": 0} | options)
    return Sandbox("cheap", SpoolFolder(folder), lambda: fraction, settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"latency_ms": -1},
        {"latency_ms": 600_001},
        {"latency_ms": 1.5},
        {"latency_ms": True},
        {"failure_rate": 1.1},
        {"failure_rate": "0.5"},
        {"failure_rate": float("nan")},
        {"failure_kind": "broken"},
        {"usage": "maybe"},
        {"images_short": -1},
        {"purchases": {}},
        {"stream": "no"},
        {"nope": 1},
    ],
)
def test_a_wrong_setting_is_named_and_changes_nothing(changes: dict[str, Any]) -> None:
    settings = SandboxSettings()
    before = settings.snapshot()
    with pytest.raises(ValueError, match=next(iter(changes))):
        settings.change({"usage": "missing"} | changes)
    assert settings.snapshot() == before


def test_settings_are_read_as_they_are_written() -> None:
    settings = SandboxSettings({"failure_kind": "none"})
    settings.change({"latency_ms": 5, "failure_rate": 1, "images_short": 2})
    assert settings.snapshot() == {
        "latency_ms": 5,
        "failure_rate": 1.0,
        "failure_kind": "none",
        "usage": "reported",
        "images_short": 2,
        "stream": True,
        "purchases": {"jobs": 0, "images": 0},
    }
    assert SandboxSettings().snapshot()["latency_ms"] == 200


async def test_the_failure_rate_is_a_share_of_the_jobs(tmp_path: Path) -> None:
    for drawn, fails in ((0.29, True), (0.3, False)):
        sandbox = a_sandbox(tmp_path, drawn, failure_rate=0.3)
        try:
            done = await sandbox.start(a_job())
        except ProviderError:
            assert fails
        else:
            assert not fails
            assert isinstance(done, Done)
            done.images[0].payload.close()


async def test_no_failure_is_a_kind_too(tmp_path: Path) -> None:
    sandbox = a_sandbox(tmp_path, 0, failure_rate=1, failure_kind="none")
    done = await sandbox.start(a_job())
    assert isinstance(done, Done)
    done.images[0].payload.close()


async def test_a_sandbox_can_keep_its_usage_and_some_pictures(tmp_path: Path) -> None:
    sandbox = a_sandbox(tmp_path, usage="missing", images_short=1)
    done = await sandbox.start(a_job(n=3))
    assert isinstance(done, Done)
    assert done.usage is None
    assert len(done.images) == 2
    for made in done.images:
        made.payload.close()
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job(n=1))
    assert caught.value.kind is K.NO_OUTPUT


async def test_a_rate_limit_of_the_sandbox_says_when_to_come_back(
    tmp_path: Path,
) -> None:
    sandbox = a_sandbox(tmp_path, failure_rate=1, failure_kind="rate_limited")
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job())
    assert caught.value.retry_after_s == 5


async def test_a_slow_sandbox_runs_into_the_deadline_and_has_sold(
    tmp_path: Path,
) -> None:
    sandbox = a_sandbox(tmp_path, latency_ms=60_000)
    with pytest.raises(ProviderError) as caught:
        await sandbox.start(a_job(deadline_s=0.02))
    assert (caught.value.kind, caught.value.billed) == (K.TIMEOUT, Billed.MAYBE)
    assert sandbox.settings.snapshot()["purchases"] == {"jobs": 1, "images": 1}


@pytest.mark.parametrize(
    ("width_px", "height_px"), [(16, 16), (3840, 1280), (1280, 3840), (2880, 2880)]
)
async def test_the_sandbox_paints_any_shape(
    width_px: int, height_px: int, tmp_path: Path
) -> None:
    done = await a_sandbox(tmp_path).start(
        a_job(width_px=width_px, height_px=height_px)
    )
    assert isinstance(done, Done)
    with Image.open(io.BytesIO(file_of(done.images[0]))) as image:
        image.load()
        assert image.size == (width_px, height_px)
        colours = image.convert("RGB").getcolors(300)
        assert colours is not None
        assert len(colours) > 8
