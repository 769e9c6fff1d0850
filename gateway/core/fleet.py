"""What the processes of a fleet tell each other of their breakers. Pure.

Clocks of machines differ, so every time in here is a distance from now: ``..._ms`` is
how long until then, ``..._ago_ms`` how long since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from gateway.core.breaker import Others, Record
from providers.kit.contract import Operation

GROWS_AFTER_MS = 5_000
"""A fleet that seems to have shrunk is believed so much later: others may only be
slow, or the shared store was emptied and they have not said yet that they are there."""
ALONE_AFTER_MS = 30_000
"""So long after the shared store was lost each process takes all slots: a restart of
the store must not send an upstream as many times its load as there are processes."""


class Topic(Enum):
    """What a notice is about."""

    BOARD = "board"
    TASKS = "tasks"
    KEYS = "keys"
    CONFIG = "config"


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that other processes should look at; ``subject`` says which one.

    An empty ``subject`` stands for all. It may come twice, or get lost.
    """

    topic: Topic
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Stance:
    """Where a breaker stands. ``open_ms`` None: it is closed; negative: half open."""

    open_ms: int | None
    opened_ago_ms: int | None
    openings: int
    probes_good: int
    closed_ago_ms: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Telling:
    """What a board has to tell, by the names of its breakers.

    ``pauses`` is how long each rests, 0 for one that was ended by hand. ``counts`` is
    how many calls ended well and badly since the last telling. ``streaks`` is how many
    went bad in a row and how long ago the first of them began; ``proofs`` how long ago
    the last good call began. ``probing`` are breakers that a call under way probes,
    ``probed`` those that none does any more. Of the ``stances`` those ``by_hand`` count
    whatever others told meanwhile.
    """

    stances: Mapping[str, Stance] = field(default_factory=dict)
    by_hand: frozenset[str] = frozenset()
    pauses: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    streaks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    proofs: Mapping[str, int] = field(default_factory=dict)
    probing: frozenset[str] = frozenset()
    probed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Size:
    """How many processes there are, and which of them this one is, from 0.

    ``fewer_since_ms`` is since when there seem to be fewer.
    """

    processes: int = 1
    rank: int = 0
    fewer_since_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Hearing:
    """What a board is told: what changed elsewhere, and all counts of the others."""

    size: Size = field(default_factory=Size)
    stances: Mapping[str, Stance] = field(default_factory=dict)
    pauses: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, Others] = field(default_factory=dict)


def route_name(offer_id: str, operation: Operation) -> str:
    """Name the breaker of an offer and operation; an upstream's is its own name."""
    return f"{offer_id}|{operation.value}"


def route_named(name: str) -> tuple[str, Operation] | None:
    """Tell the offer and operation of a breaker; None for an upstream's."""
    offer_id, _, operation = name.partition("|")
    known = operation in Operation._value2member_map_
    return (offer_id, Operation(operation)) if known else None


def stance_of(record: Record, now_ms: int) -> Stance:
    """Tell where a breaker stands."""
    until_ms, closed_ms = record.open_until_ms, record.closed_at_ms
    return Stance(
        open_ms=None if until_ms is None else until_ms - now_ms,
        opened_ago_ms=now_ms - record.opened_at_ms
        if record.opened_at_ms >= 0
        else None,
        openings=record.openings,
        probes_good=record.probes_good,
        closed_ago_ms=None if closed_ms is None else now_ms - closed_ms,
        reason=record.reason,
    )


def aged(stance: Stance, by_ms: int) -> Stance:
    """Tell where a breaker stands that stood there a while ago."""
    opened, closed = stance.opened_ago_ms, stance.closed_ago_ms
    return replace(
        stance,
        open_ms=None if stance.open_ms is None else stance.open_ms - by_ms,
        opened_ago_ms=None if opened is None else opened + by_ms,
        closed_ago_ms=None if closed is None else closed + by_ms,
    )


def moved(before: Record, after: Record) -> bool:
    """Tell whether a breaker stands elsewhere than before; pauses aside."""
    return (
        before.open_until_ms != after.open_until_ms
        or before.probes_good != after.probes_good
        or before.closed_at_ms != after.closed_at_ms
    )


def adopted(record: Record, stance: Stance, now_ms: int) -> Record:
    """Take over where a breaker stands elsewhere; what was learned stays.

    One that is closed by it forgets the trouble, as one that closes by itself does.
    """
    opened, closed = stance.opened_ago_ms, stance.closed_ago_ms
    after = replace(
        record,
        open_until_ms=None if stance.open_ms is None else now_ms + stance.open_ms,
        opened_at_ms=-1 if opened is None else now_ms - opened,
        openings=stance.openings,
        probes_good=stance.probes_good,
        closed_at_ms=None if closed is None else now_ms - closed,
        reason=stance.reason or record.reason,
    )
    if record.open_until_ms is None or stance.open_ms is not None:
        return after
    return replace(after, buckets=(), bad_streak=0, reason="")


def rested(record: Record, pause_ms: int, now_ms: int) -> Record:
    """Take over a pause; the longer one counts, and 0 ends it."""
    if pause_ms <= 0:
        return replace(record, paused_until_ms=0)
    until_ms = max(record.paused_until_ms, now_ms + pause_ms)
    closed = record.open_until_ms is None
    reason = "rate_limited" if closed else record.reason
    return replace(record, paused_until_ms=until_ms, reason=reason)


def sized(size: Size, seen: Size, now_ms: int, patience_ms: int) -> Size:
    """Note how many processes were seen; fewer are believed after ``patience_ms``."""
    if seen.processes >= size.processes:
        return seen
    if size.fewer_since_ms is None:
        return replace(size, fewer_since_ms=now_ms)
    if now_ms - size.fewer_since_ms < patience_ms:
        return size
    return seen
