"""Being let in or refused, told as stories."""

from __future__ import annotations

import pytest

from gateway.core import admission, pressure
from gateway.core.admission import Reason
from gateway.core.breaker import Outcome
from gateway.core.catalogue import Catalogue
from gateway.core.errors import RateLimitedError, ServiceUnavailableError
from gateway.core.events import PressureChanged, RequestShed
from gateway.flows.admission import ANY_VARIANT, Admission
from gateway.flows.line import Place
from providers.kit.contract import Operation
from tests.fakes import FakeChance, ScriptedProvider, delivered
from tests.flows.stories import Shop, a_wish

VARIANT = "gpt-image-2"
HALF = admission.ROOM_MAX_REQUESTS // 2


class Door:
    """The admission of a shop with ten slots, all of which are taken."""

    def __init__(self) -> None:
        self.shop = Shop({"only": ScriptedProvider(delivered())}, slots=10)
        self.in_flight = 0
        self.memory_share = 0.5
        self.admission = Admission(
            board=self.shop.board,
            line=self.shop.dispatcher.line,
            catalogue=Catalogue(variants={}, offers={VARIANT: self.shop.offers}),
            clock=self.shop.clock,
            chance=FakeChance(),
            events=self.shop.events,
            in_flight=lambda: self.in_flight,
            memory_share=lambda: self.memory_share,
        )

    async def take_all_slots(self, *, calls_take_s: float) -> None:
        """Let a call of another time tell how long one takes; then take every slot."""
        board, offer = self.shop.board, self.shop.offers[0].id
        first = await board.admit(offer, Operation.GENERATE)
        assert first is not None
        await self.shop.clock.sleep(calls_take_s)
        await board.report(first, Outcome())
        while await board.admit(offer, Operation.GENERATE) is not None:
            pass

    async def enter(self, tenant: str = "a") -> Place:
        return await self.admission.enter(tenant, VARIANT, a_wish())

    async def enter_many(self, count: int, tenant: str = "a") -> list[Place]:
        return [await self.enter(tenant) for _ in range(count)]

    def sheds(self) -> list[tuple[str, str]]:
        seen = [e for e in self.shop.events.seen if isinstance(e, RequestShed)]
        return [(event.variant, event.reason) for event in seen]

    async def look(self, times: int, *, every_ms: int = pressure.LAG_EVERY_MS) -> None:
        for _ in range(times):
            await self.shop.clock.sleep(every_ms / 1000)
            await self.admission.watch()


async def test_a_tenant_with_half_of_the_room_is_told_to_come_back_later() -> None:
    door = Door()
    await door.take_all_slots(calls_take_s=1)
    places = await door.enter_many(HALF)

    with pytest.raises(RateLimitedError) as refused:
        await door.enter()

    # 251 waiting, ten a second: 25 s, which leaves less than a fourth of it to 30 s
    assert refused.value.retry_after_s == 24
    assert refused.value.code == "rate_limit_exceeded"
    assert door.sheds() == [(VARIANT, "tenant_share")]
    assert door.admission.waiting(VARIANT) == HALF

    await door.enter("b")
    door.admission.line.leave(places[0])
    assert door.admission.waiting(VARIANT) == HALF


async def test_who_would_wait_over_a_minute_is_refused_at_once() -> None:
    door = Door()
    await door.take_all_slots(calls_take_s=60)
    others = [await door.enter(f"t{n}") for n in range(10)]

    with pytest.raises(ServiceUnavailableError) as refused:
        await door.enter("late")

    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_s == 24
    assert refused.value.client_may_retry is None
    assert door.sheds() == [(VARIANT, "wait_too_long")]
    door.admission.line.leave(others[0])
    await door.enter("late")


async def test_a_tenant_is_not_refused_for_what_another_has_waiting() -> None:
    door = Door()
    await door.take_all_slots(calls_take_s=10)
    line = door.shop.dispatcher.line
    running = await door.enter_many(10, "noisy")
    for place in running:
        line.took(place, "only")
    await door.enter_many(50, "noisy")

    with pytest.raises(RateLimitedError):
        await door.enter_many(11, "noisy")
    await door.enter("quiet")

    assert set(door.sheds()) == {(VARIANT, "tenant_wait")}


async def test_a_large_body_is_refused_unread_if_no_variant_would_take_it() -> None:
    door = Door()
    await door.take_all_slots(calls_take_s=1)
    await door.admission.check_any("a", Operation.GENERATE)
    await door.enter_many(HALF)

    with pytest.raises(RateLimitedError):
        await door.admission.check_any("a", Operation.GENERATE)
    await door.admission.check_any("b", Operation.GENERATE)

    assert door.sheds() == [(ANY_VARIANT, "tenant_share")]


async def test_as_many_requests_under_way_as_may_be_are_enough() -> None:
    door = Door()
    door.in_flight = admission.IN_FLIGHT_MAX_REQUESTS

    with pytest.raises(ServiceUnavailableError):
        await door.enter()

    assert door.sheds() == [(VARIANT, "in_flight")]


async def test_a_loop_that_lags_for_long_takes_no_new_work_until_it_has_recovered() -> (
    None
):
    door = Door()
    await door.look(20, every_ms=600)  # half a second late, for twelve
    assert door.admission.lag_ms > 400

    with pytest.raises(ServiceUnavailableError) as refused:
        door.admission.check_new(VARIANT, "a")
    assert refused.value.code == "overloaded"
    assert set(door.sheds()) == {(VARIANT, Reason.EVENT_LOOP_LAG.value)}

    await door.look(40)
    with pytest.raises(ServiceUnavailableError):
        await door.enter()
    await door.look(60)
    await door.enter()

    changes = [e for e in door.shop.events.seen if isinstance(e, PressureChanged)]
    assert [(e.signal, e.on) for e in changes] == [
        ("event_loop_lag", True),
        ("event_loop_lag", False),
    ]


async def test_memory_that_runs_out_stops_new_work_too() -> None:
    door = Door()
    door.memory_share = 0.95

    await door.look(60)

    with pytest.raises(ServiceUnavailableError):
        await door.enter()
    assert door.sheds() == [(VARIANT, "memory")]
