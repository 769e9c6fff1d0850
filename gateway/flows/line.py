"""The line for slots: whoever finds none free stands here, and is called in turn.

It is kept in the process, beside the board that counts the slots. Nobody who comes
later takes a slot that somebody waits for.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.core import admission
from providers.kit.contract import Operation

T = TypeVar("T", bound=Hashable)

LOOK_AGAIN_S = 1.0
"""Pauses and steps of a re-entry end without anybody telling: so often the first in
line looks whether there is a slot."""


Want = tuple[str, Operation]
"""An offer's id, and what it is wanted for: each has a breaker of its own."""


@dataclass(slots=True, eq=False)
class Place:
    """One request's place: the earlier the ``number``, the sooner among its tenant's.

    ``until_ms`` (monotonic) is when it is given up. ``left`` is called once, when it
    has its first slot or needs none any more.
    """

    tenant_id: str
    number: int
    until_ms: int | None = None
    left: Callable[[], None] | None = None
    called_to: str | None = None
    """The upstream whose slot it was called for, until it has taken one."""
    looks: bool = False
    """It was called to look, not because a slot was given back."""
    of_no_use: frozenset[frozenset[Want]] = frozenset()
    """What those want who could not use the slot before it."""

    def leave_room(self) -> None:
        """Count it no longer among those without a slot."""
        left, self.left = self.left, None
        if left is not None:
            left()


@dataclass(slots=True)
class _Standing:
    place: Place
    wants: frozenset[Want]
    upstreams: frozenset[str]
    call: asyncio.Future[None]


@dataclass(slots=True)
class Line:
    """Implements the order of ``core.admission`` for one process."""

    _standing: dict[Place, _Standing] = field(default_factory=dict)
    _wanted: Counter[Want] = field(default_factory=Counter)
    _calls_out: Counter[str] = field(default_factory=Counter)
    _tenants: Counter[str] = field(default_factory=Counter)
    _running: Counter[str] = field(default_factory=Counter)
    _last_turns: dict[str, int] = field(default_factory=dict)
    _numbers: int = 0
    _turns: int = 0
    _looking: asyncio.TimerHandle | None = None

    @property
    def running(self) -> Mapping[str, int]:
        """How many slots each tenant has."""
        return self._running

    def place(
        self,
        tenant_id: str,
        *,
        until_ms: int | None = None,
        left: Callable[[], None] | None = None,
    ) -> Place:
        """Give out the next place."""
        self._numbers += 1
        return Place(tenant_id, self._numbers, until_ms, left)

    def wanted(self, want: Want) -> bool:
        """Tell whether somebody stands in line for this, or was called to look at it.

        Who waits for another offer of the upstream and could not use its slots is in
        nobody's way.
        """
        return self._wanted[want] > 0 or self._calls_out[_upstream(want)] > 0

    async def stand(
        self, place: Place, wants: Iterable[Want], at_most_s: float
    ) -> bool:
        """Wait to be called; False if that did not happen in time.

        True promises nothing: whoever was called looks, and stands again if need be.
        The call then goes on to the first of those who want something else.
        """
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wanted = frozenset(wants)
        standing = _Standing(place, wanted, frozenset(map(_upstream, wanted)), call)
        self.pass_on(place, wanted)
        self._standing[place] = standing
        self._wanted.update(standing.wants)
        self._tenants[place.tenant_id] += 1
        self._keep_looking()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(at_most_s):
                    await call
        finally:
            del self._standing[place]
            _less(self._wanted, standing.wants)
            _less(self._tenants, [place.tenant_id])
            self._forget(place.tenant_id)
        return place.called_to is not None

    def took(self, place: Place, upstream: str) -> None:
        """Note that a request has taken a slot."""
        self._turns += 1
        self._running[place.tenant_id] += 1
        self._last_turns[place.tenant_id] = self._turns
        place.leave_room()
        if place.called_to == upstream and not place.looks:
            _less(self._calls_out, [upstream])
            place.called_to = None
        self.pass_on(place)  # there may be another one

    def gave_back(self, tenant_id: str, upstream: str) -> None:
        """Note that a slot was given back, and call the next in line for it."""
        _less(self._running, [tenant_id])
        self._forget(tenant_id)
        self._call(upstream)

    def leave(self, place: Place) -> None:
        """Need no slot any more. A call that was not used goes to the next."""
        place.leave_room()
        self.pass_on(place)

    def pass_on(self, place: Place, wants: frozenset[Want] | None = None) -> None:
        """Let the next have the call of a place, if it has one.

        ``wants`` is what the call was of no use for.
        """
        called_to, place.called_to = place.called_to, None
        if called_to is None:
            return
        _less(self._calls_out, [called_to])
        of_no_use = place.of_no_use if wants is None else place.of_no_use | {wants}
        self._call(called_to, looks=True, of_no_use=of_no_use)

    def _call(
        self,
        upstream: str,
        *,
        looks: bool = False,
        of_no_use: frozenset[frozenset[Want]] = frozenset(),
    ) -> None:
        first = min(
            (
                standing
                for standing in self._standing.values()
                if upstream in standing.upstreams
                and standing.wants not in of_no_use
                and (not standing.call.done() or standing.place.looks)
            ),
            key=self._order,
            default=None,
        )
        if first is None:
            return
        place = first.place
        if place.called_to is not None:
            _less(self._calls_out, [place.called_to])
        self._calls_out[upstream] += 1
        place.called_to, place.looks, place.of_no_use = upstream, looks, of_no_use
        if not first.call.done():  # else it is on its way to look, and will find it
            first.call.set_result(None)

    def _order(self, standing: _Standing) -> tuple[int, int, int]:
        place = standing.place
        fewest, longest_ago = admission.turn_of(
            place.tenant_id, self._running, self._last_turns
        )
        return fewest, longest_ago, place.number

    def _keep_looking(self) -> None:
        if self._looking is None:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        self._looking = None
        for upstream in sorted({_upstream(want) for want in self._wanted}):
            self._call(upstream, looks=True)
        if self._standing:
            self._keep_looking()

    def _forget(self, tenant_id: str) -> None:
        if not self._running[tenant_id] and not self._tenants[tenant_id]:
            self._last_turns.pop(tenant_id, None)


def _upstream(want: Want) -> str:
    return want[0].partition("/")[0]


def _less(counts: Counter[T], names: Iterable[T]) -> None:
    # Entries at zero go: there may be any number of tenants in a year.
    for name in names:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
