"""Redis is lost in every way there is, under load: nobody notices."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.outages import outages, stream
from tests.servers import RedisServer

EACH_S, CALM_S = 5.0, 2.0
"""A freeze is noticed after three exchanges, one a second."""
WHOLE_EACH_S = 30.0


def test_no_request_fails_while_redis_is_killed_frozen_and_emptied(
    tmp_path: Path, own_redis: RedisServer, *, whole: bool
) -> None:
    times_s = (WHOLE_EACH_S, WHOLE_EACH_S) if whole else (EACH_S, CALM_S)
    phases = outages(own_redis, *times_s)

    gateways = stream(tmp_path, own_redis, phases)

    assert {phase.name: phase.failed for phase in phases} == {
        phase.name: 0 for phase in phases
    }
    for gateway in gateways:
        lines = [json.loads(line) for line in gateway.logs if line.startswith("{")]
        told = [x["degraded"] for x in lines if x["event"] == "shared_state"]
        # A starved machine may lose it in between, too.
        assert len(told) >= 4
        assert told == [True, False] * (len(told) // 2)
        crashes = [x for x in lines if x["event"] == "crash"]
        assert not crashes, crashes
