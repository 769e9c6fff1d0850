"""What every adapter that fetches its pictures from links must do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from providers.kit.contract import Billed, FailureKind, ProviderError
from tests.contract.cases import downloads, those
from tests.contract.upstreams import Case, K, close, file_of
from tests.simulators.server import Fault


@those(downloads)
async def test_a_download_that_fails_is_tried_again(case: Case, tmp_path: Path) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        step = await upstream.submitted()
        upstream.simulator.script(
            Fault(case.file_step, status=503), Fault(case.file_step, close="mid_body")
        )
        (image,) = (await upstream.finished(step)).images
        assert file_of(image).startswith(b"\x89PNG")
        assert not upstream.simulator.faults
        assert upstream.purchases() == 1


@those(downloads)
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(status=503), K.BAD_GATEWAY),
        (Fault(status=429), K.BAD_GATEWAY),
        (Fault(close="reset"), K.BAD_GATEWAY),
        (Fault(close="mid_body"), K.BAD_GATEWAY),
        (Fault(status=403), K.RESULT_LOST),
        (Fault(status=404), K.RESULT_LOST),
        (Fault(status=410), K.RESULT_LOST),
    ],
    ids=["503", "429", "reset", "mid_body", "403", "404", "410"],
)
async def test_a_picture_that_is_gone_is_lost_and_one_out_of_reach_is_not(
    case: Case, fault: Fault, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        step = await upstream.submitted()
        upstream.simulator.suffer(replace(fault, on=case.file_step))
        with pytest.raises(ProviderError) as caught:
            await upstream.finished(step)
        error = caught.value
        assert (error.kind, error.billed) == (kind, Billed.YES)
        assert error.ended is (kind is K.RESULT_LOST)
        assert upstream.files() == 0
        # It is there again, and still the same purchase.
        upstream.simulator.suffer()
        close(await upstream.finished(step))
        assert upstream.purchases() == 1
