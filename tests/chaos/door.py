"""The gateway's own command line, with a part of its admission taken out.

``DOOR`` in the environment says which, by commas: ``room=N`` makes the rooms smaller,
``unfair`` lets requests wait in the order of their arrival whoever sent them,
``unbounded`` refuses nobody. The last two are what the experiments are compared with.
"""

from __future__ import annotations

import os

from gateway.cli import main
from gateway.core import admission
from gateway.core.admission import Crowd, Reason, Refusal

FAR_MS = 300_000


def by_arrival(tenant_id: str, crowd: Crowd, within_ms: float) -> Refusal | None:
    """The rules of the room, for requests that all come from one place."""
    waiting = sum(crowd.here.values()) - crowd.slots_free
    if waiting >= admission.ROOM_MAX_REQUESTS:
        return Refusal(Reason.ROOM_FULL)
    if crowd.pace_per_ms and waiting / crowd.pace_per_ms > within_ms:
        return Refusal(Reason.WAIT_TOO_LONG)
    return None


def change(switch: str) -> None:
    name, _, value = switch.partition("=")
    if name == "room":
        admission.ROOM_MAX_REQUESTS = int(value)
    elif name == "unfair":
        admission.turn_of = lambda tenant_id, running, last_turns: (0, 0)
        admission.refusal = by_arrival
    elif name == "unbounded":
        admission.refusal = lambda tenant_id, crowd, within_ms: None
        admission.WAIT_MAX_MS = FAR_MS
        admission.IN_FLIGHT_MAX_REQUESTS = 1_000_000
    else:
        raise ValueError(switch)


if __name__ == "__main__":
    for switch in os.environ["DOOR"].split(","):
        change(switch)
    main()
