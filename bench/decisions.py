"""What it costs to choose where a request goes: six offers, their health, their order.

Processor time of one thread: reading the board and ranking what it says, as the
dispatcher does it for every attempt. The best of several rounds is the figure, since
everything that disturbs a round only adds to it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from random import Random

from bench.figures import Table
from gateway.adapters.hot_memory import MemoryBoard
from gateway.core.breaker import Outcome
from gateway.core.catalogue import Offer, PerImage
from gateway.core.routing import Moment, Wish, decide
from providers.kit.contract import Capabilities, FailureKind, Operation
from tests.fakes import FakeChance, FakeEvents, StillClock

OFFERS = 6
IN_FLIGHT = 200
LIMIT_US = 100.0
WISH = Wish(Operation.GENERATE, (1024, 1024), "low", 1)
CAPABILITIES = Capabilities(
    sizes=frozenset({(1024, 1024), (1024, 1536), (1536, 1024)}),
    qualities=frozenset({"low", "medium", "high"}),
)


async def measure(table: Table, rounds: int, decisions: int) -> None:
    offers = [
        Offer(f"upstream-{i}", "gpt-image-2", "m", PerImage(flat=i), CAPABILITIES)
        for i in range(1, OFFERS + 1)
    ]
    board = await busy_board(offers)
    moment = Moment("2026-11-25", 300_000)
    ids = [offer.id for offer in offers]
    costs = [(offer, 1_000_000 * place) for place, offer in enumerate(offers, 1)]
    took_us = []
    for _ in range(rounds):
        begun_ns = time.process_time_ns()
        for _ in range(decisions):
            health = await board.read(ids, Operation.GENERATE)
            assert len(decide(WISH, costs, health, moment).ranked) == OFFERS
        took_us.append((time.process_time_ns() - begun_ns) / 1000 / decisions)
    name = f"choice among {OFFERS} offers, {IN_FLIGHT} calls in flight at each: CPU"
    table.at_most(name, min(took_us), LIMIT_US, "us")


async def busy_board(offers: list[Offer]) -> MemoryBoard:
    """Make a board as it is on a busy day: two minutes of calls, many under way."""
    clock, dice = StillClock(), Random(1)
    slots = {offer.upstream: 2 * IN_FLIGHT for offer in offers}
    board = MemoryBoard(clock, FakeChance(), FakeEvents(), slots=slots)
    failed = Outcome(kind=FailureKind.BAD_GATEWAY)
    for _ in range(120):
        clock.at_ms += 1000
        for offer in offers:
            permit = await board.admit(offer.id, Operation.GENERATE)
            assert permit is not None
            bad = dice.random() < 0.1
            await board.report(permit, failed if bad else Outcome())
    for offer in offers:
        for _ in range(IN_FLIGHT):
            await board.admit(offer.id, Operation.GENERATE)
    return board


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--decisions", type=int, default=500)
    chosen = options.parse_args()
    table = Table("decisions")
    asyncio.run(measure(table, chosen.rounds, chosen.decisions))
    table.end()


if __name__ == "__main__":
    main()
