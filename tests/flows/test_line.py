"""Waiting for a slot, told as stories: who gets the next one, and who gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from gateway.core import admission
from gateway.core.breaker import Outcome
from gateway.flows.dispatch import Purchase
from gateway.flows.line import Place
from providers.kit.contract import Done, FailureKind, ImageJob, Operation
from tests.fakes import ScriptedProvider, delivered
from tests.flows.stories import Shop

CALL_S = 10.0
WANT = ("only/gpt-image-2", Operation.GENERATE)


@dataclass
class Counter:
    """A shop with few slots, at which tenants ask; notes whom it served, in order."""

    slots: int = 1
    served: list[str] = field(default_factory=list)
    n_max: int = 10

    def __post_init__(self) -> None:
        async def step(job: ImageJob) -> Done:
            self.served.append(job.prompt)
            await asyncio.sleep(CALL_S)
            return delivered(job.n)

        provider = ScriptedProvider(step, n_max=self.n_max)
        self.shop = Shop({"only": provider}, slots=self.slots)

    async def take_slot(self) -> Callable[[], Awaitable[None]]:
        """Take a slot for a tenant; returns what gives it back."""
        board, line = self.shop.board, self.shop.dispatcher.line
        permit = await board.admit(self.shop.offers[0].id, Operation.GENERATE)
        assert permit is not None
        line.took(line.place("a"), "only")

        async def give_back() -> None:
            await board.report(permit, Outcome())
            line.gave_back("a", "only")

        return give_back

    def ask(
        self, tenant: str, n: int = 1, *, wait_ms: int | None = None
    ) -> asyncio.Task[Purchase]:
        order = self.shop.order(n)
        line = self.shop.dispatcher.line
        until_ms = None
        if wait_ms is not None:
            until_ms = self.shop.clock.monotonic_ms() + wait_ms
        return asyncio.create_task(
            self.shop.dispatcher.buy(
                replace(
                    order,
                    job=replace(order.job, prompt=tenant),
                    tenant_id=tenant,
                    place=line.place(tenant, until_ms=until_ms),
                )
            )
        )


async def test_tenants_take_turns_however_many_requests_one_of_them_has() -> None:
    counter = Counter()
    noisy = [counter.ask("noisy") for _ in range(20)]
    await asyncio.sleep(1)
    quiet = [counter.ask("quiet") for _ in range(3)]

    await asyncio.gather(*noisy, *quiet)

    assert counter.served[:7] == [*["noisy", "quiet"] * 3, "noisy"]


async def test_requests_of_one_tenant_are_served_in_the_order_of_their_arrival() -> (
    None
):
    counter = Counter(slots=2)
    line = counter.shop.dispatcher.line
    done: list[int] = []

    async def ask(number: int) -> None:
        await counter.ask("a")
        done.append(number)

    await asyncio.gather(*(ask(number) for number in range(9)))

    assert done == sorted(done)
    assert not line.running
    assert not line.wanted(WANT)


async def test_nobody_who_comes_later_takes_the_slot_of_one_that_waits() -> None:
    counter = Counter()
    give_back = await counter.take_slot()
    second = counter.ask("b")
    await asyncio.sleep(0.5)
    third = counter.ask("c")  # is about to look, and sees the slot come back

    await give_back()
    await asyncio.gather(second, third)

    assert counter.served == ["b", "c"]


async def test_a_request_for_many_pictures_leaves_the_slots_that_others_wait_for() -> (
    None
):
    counter = Counter(slots=2, n_max=1)
    both = [await counter.take_slot(), await counter.take_slot()]
    greedy = counter.ask("greedy", n=4)
    others = [counter.ask("b"), counter.ask("c")]
    await asyncio.sleep(0.5)

    for give_back in both:
        await give_back()
    await asyncio.gather(greedy, *others)

    assert sorted(counter.served[:3]) == ["b", "c", "greedy"]
    assert counter.served.count("greedy") == 4


async def test_who_waits_longer_than_it_may_gives_up_and_buys_nothing() -> None:
    counter = Counter()
    first = counter.ask("a")
    await asyncio.sleep(0)
    late = counter.ask("b", wait_ms=4_000)

    purchase = await late

    assert purchase.waited_out
    assert purchase.attempts == 0
    assert counter.shop.clock.monotonic_ms() == 4_000
    await first
    assert counter.served == ["a"]


async def test_a_slot_that_somebody_was_called_for_and_does_not_use_goes_on() -> None:
    counter = Counter()
    give_back = await counter.take_slot()
    gone, last = counter.ask("b"), counter.ask("c")
    await asyncio.sleep(0.5)
    await give_back()
    gone.cancel()  # called already

    await last

    assert counter.served == ["c"]
    assert counter.shop.clock.monotonic_ms() == 500 + CALL_S * 1000


async def test_slots_that_come_back_by_themselves_are_found_within_a_second() -> None:
    # A rest ends, or a returning upstream takes more: nobody gives a slot back then.
    counter = Counter()
    line = counter.shop.dispatcher.line
    place = line.place("a")

    assert await line.stand(place, [WANT], 60)

    assert place.looks
    assert counter.shop.clock.monotonic_ms() <= 1_000


async def test_the_room_is_left_with_the_first_slot() -> None:
    counter = Counter()
    left: list[int] = []
    line = counter.shop.dispatcher.line
    place = line.place("a", left=lambda: left.append(1))

    line.took(place, "only")
    assert left == [1]
    line.leave(place)
    assert left == [1]
    assert admission.turn_of("a", line.running, {})[0] == 1


async def test_who_cannot_use_a_slot_does_not_keep_it_from_others() -> None:
    # One upstream, two variants. The first is just back: it takes no more calls yet.
    provider = ScriptedProvider(delivered())
    shop = Shop({"only": provider}, slots=20)
    returning, other = shop.offers[0].id, "only/other-variant"
    line, board = shop.dispatcher.line, shop.board
    for _ in range(5):
        permit = await board.admit(returning, Operation.GENERATE)
        assert permit is not None
        await board.report(permit, Outcome(kind=FailureKind.OVERLOADED))
    await shop.clock.sleep(20)
    for _ in range(2):  # two good probes close it
        permit = await board.admit(returning, Operation.GENERATE)
        assert permit is not None
        await board.report(permit, Outcome())
    busy = [await board.admit(returning, Operation.GENERATE) for _ in range(2)]
    assert None not in busy

    waiting = asyncio.create_task(shop.buy())
    await shop.clock.sleep(2)
    assert line.wanted((returning, Operation.GENERATE))
    order = shop.order()
    offer = replace(order.offers[0], variant="other-variant")
    assert offer.id == other
    served = await asyncio.wait_for(
        shop.dispatcher.buy(replace(order, tenant_id="b", offers=(offer,))), 1.5
    )

    assert len(served.lots) == 1
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert not line.running
    assert not line.wanted((other, Operation.GENERATE))


async def test_a_call_that_is_of_no_use_goes_to_the_next_who_wants_something_else() -> (
    None
):
    line = Shop({"only": ScriptedProvider(delivered())}).dispatcher.line
    loop = asyncio.get_running_loop()
    first, alike, last = (line.place(tenant) for tenant in "abc")
    called: list[str] = []

    async def useless(place: Place, variant: str) -> None:
        while await line.stand(place, [(f"only/{variant}", Operation.GENERATE)], 30):
            called.append(variant)
            assert len(called) < 100

    standing = [
        asyncio.create_task(useless(first, "returning")),
        asyncio.create_task(useless(alike, "returning")),
    ]
    await asyncio.sleep(0.1)
    begun_s = loop.time()
    assert await line.stand(last, [("only/other", Operation.GENERATE)], 30)

    assert loop.time() - begun_s <= 1.0
    assert called == ["returning"]  # not again for one who wants the same
    line.leave(last)
    for each in standing:
        each.cancel()
    await asyncio.wait(standing)


async def test_a_round_that_is_cancelled_before_it_began_gives_every_slot_back() -> (
    None
):
    shop = Shop({"only": ScriptedProvider(delivered(), n_max=1)}, slots=4)
    for steps in range(12):
        buying = asyncio.create_task(shop.buy(4))
        for _ in range(steps):
            await asyncio.sleep(0)
        buying.cancel()
        await asyncio.wait({buying})

        health = await shop.board.read([shop.offers[0].id], Operation.GENERATE)
        assert health[shop.offers[0].id].in_flight == 0
        assert not shop.dispatcher.line.running
