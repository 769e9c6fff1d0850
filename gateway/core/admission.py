"""Who may wait for a slot, who goes next, and how long that takes. Pure.

A slot is a call that an upstream may carry now. Requests that find none wait in the
room of their variant. Tenants are told apart, requests of one tenant are served in the
order of their arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from gateway.core.breaker import Health

ROOM_MAX_REQUESTS = 500
"""How many sync requests may wait for one variant. A tenant may have as many waiting as
places are left: alone at most half, beside n others that ask for more 1 / (n + 2)."""
WAIT_EXPECTED_MAX_MS = 60_000
"""Who would wait longer is told so at once."""
WAIT_MAX_MS = 120_000
"""Who was let in waits no longer than this, whatever was expected."""
IN_FLIGHT_MAX_REQUESTS = 2_000
"""Sync requests under way in a process, all variants together."""
RETRY_AFTER_MIN_S = 1
RETRY_AFTER_MAX_S = 30
"""The longest that every common client library waits for when it is told to."""
RETRY_AFTER_DEFAULT_S = 5
RETRY_SPREAD = 0.25
"""Those refused at the same moment come back at different ones."""


class Reason(Enum):
    """Why a request was refused. A closed set: it labels a metric."""

    TENANT_SHARE = "tenant_share"
    ROOM_FULL = "room_full"
    TENANT_WAIT = "tenant_wait"
    WAIT_TOO_LONG = "wait_too_long"
    WAITED_OUT = "waited_out"
    IN_FLIGHT = "in_flight"
    EVENT_LOOP_LAG = "event_loop_lag"
    MEMORY = "memory"

    @property
    def by_tenant(self) -> bool:
        """Whether the tenant's own requests are what is too many."""
        return self in {Reason.TENANT_SHARE, Reason.TENANT_WAIT}

    @property
    def by_process(self) -> bool:
        """Whether the process is what cannot take more, whatever upstreams can."""
        return self in {Reason.IN_FLIGHT, Reason.EVENT_LOOP_LAG, Reason.MEMORY}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that may not wait. ``wait_ms`` is what it would have waited."""

    reason: Reason
    wait_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Crowd:
    """What a new request finds.

    ``here`` counts, by tenant, the requests in the variant's room: those without a
    slot. ``beside`` counts those of other variants that want the same slots.
    ``running`` counts the slots that each tenant has. ``pace_per_ms`` is how many
    calls end in a millisecond, None while that is not known.
    """

    here: Mapping[str, int]
    running: Mapping[str, int]
    beside: Mapping[str, int]
    slots_free: int
    pace_per_ms: float | None


def refusal(tenant_id: str, crowd: Crowd, within_ms: float) -> Refusal | None:
    """Say why a request may not wait; None if it may.

    ``within_ms`` is how long it can wait at most and still be served.
    """
    wait_ms = expected_wait_ms(tenant_id, crowd)
    left = ROOM_MAX_REQUESTS - max(0, sum(crowd.here.values()) - crowd.slots_free)
    if left <= 0:
        return Refusal(Reason.ROOM_FULL, wait_ms)
    if crowd.here.get(tenant_id, 0) - crowd.slots_free >= left:
        return Refusal(Reason.TENANT_SHARE, wait_ms)
    if wait_ms is None or wait_ms <= within_ms:
        return None
    # Would it be in time if the tenant had not asked for anything before?
    none_here = _without(crowd.here, tenant_id)
    none_beside = _without(crowd.beside, tenant_id)
    first = Crowd(
        none_here, crowd.running, none_beside, crowd.slots_free, crowd.pace_per_ms
    )
    alone_ms = expected_wait_ms(tenant_id, first)
    own = alone_ms is not None and alone_ms <= within_ms
    return Refusal(Reason.TENANT_WAIT if own else Reason.WAIT_TOO_LONG, wait_ms)


def expected_wait_ms(tenant_id: str, crowd: Crowd) -> float | None:
    """Tell how long a new request will wait for its slot; None if nobody knows."""
    waiting = {
        tenant: crowd.here.get(tenant, 0) + crowd.beside.get(tenant, 0)
        for tenant in {*crowd.here, *crowd.beside}
    }
    behind = ahead(tenant_id, waiting, crowd.running) - crowd.slots_free
    if behind < 0:
        return 0.0
    return (behind + 1) / crowd.pace_per_ms if crowd.pace_per_ms else None


def ahead(
    tenant_id: str, waiting: Mapping[str, int], running: Mapping[str, int]
) -> int:
    """Count the requests that get their slot before a new one of this tenant.

    Its own come first. Of another tenant those come before it that would leave that
    tenant with no more slots than this one has by then.
    """
    mine = waiting.get(tenant_id, 0)
    level = running.get(tenant_id, 0) + mine + 1
    others = sum(
        min(count, max(0, level - running.get(tenant, 0)))
        for tenant, count in waiting.items()
        if tenant != tenant_id
    )
    return mine + others


def turn_of(
    tenant_id: str, running: Mapping[str, int], last_turns: Mapping[str, int]
) -> tuple[int, int]:
    """Rank a tenant for the next slot: the smallest is next.

    The one with the fewest slots; of two that have as many, the one whose last turn is
    longer ago. Slots are held for as long as calls take, so a tenant with long calls
    gets no more than one with short ones.
    """
    return running.get(tenant_id, 0), last_turns.get(tenant_id, -1)


def pace_per_ms(healths: Iterable[Health]) -> float | None:
    """Tell how many calls end in a millisecond when every slot is in use.

    None if it is not known of any offer that may be called how long it takes.
    """
    pace = sum(
        (health.slots_free + health.in_flight) / health.usual_ms
        for health in healths
        if health.callable and health.usual_ms
    )
    return pace or None


def retry_after_s(wait_ms: float | None, fraction: float) -> int:
    """Say when to come back: when the line has moved on by what it is now.

    ``fraction`` (0 to 1, by chance) spreads those that were refused together.
    """
    wait_s = RETRY_AFTER_DEFAULT_S if wait_ms is None else wait_ms / 1000
    # What is over the most is spread below it: else all of these come back at once.
    wait_s = min(wait_s, RETRY_AFTER_MAX_S / (1 + RETRY_SPREAD))
    spread = 1 + RETRY_SPREAD * (2 * fraction - 1)
    return max(RETRY_AFTER_MIN_S, round(wait_s * spread))


def _without(counts: Mapping[str, int], tenant_id: str) -> Mapping[str, int]:
    return {tenant: count for tenant, count in counts.items() if tenant != tenant_id}
