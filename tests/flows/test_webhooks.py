"""Webhooks on a clock of their own: a dead receiver delays nobody else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from gateway.core.errors import (
    InvalidRequestError,
    NotFoundError,
    ServiceUnavailableError,
)
from gateway.core.webhooks import (
    Answer,
    Delivery,
    Due,
    Places,
    SigningKey,
    chosen,
    host_of,
)
from gateway.flows.webhooks import (
    AT_ONCE,
    AT_ONCE_FAILING,
    AT_ONCE_PER_HOST,
    AT_ONCE_PER_TENANT,
    FAILURES_MAX,
    REST_MS,
    DeliverWebhooks,
    ManageWebhooks,
)
from gateway.ports import Post
from tests.fakes import FakeChance, FakeEvents
from tests.virtual_time import LoopClock

PEPPER = b"pepper"


@dataclass
class MemoryOutbox:
    """The ``Outbox`` port in memory."""

    rows: dict[str, Delivery] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    broken_ms: range = range(0)

    def add(
        self, number: int, host: str, *, at_ms: int = 0, tenant_id: str = "t-1"
    ) -> Delivery:
        row = Delivery(
            id=f"evt_{number:05}",
            task_id=f"task-{number}",
            tenant_id=tenant_id,
            key_id="key-1",
            event="task.completed",
            url=f"https://{host}/hook",
            state="pending",
            tries=0,
            next_ms=at_ms,
            created_ms=at_ms,
        )
        self.rows[row.id] = row
        return row

    async def claim(
        self, *, now_ms: int, lease_ms: int, limit: int, places: Places
    ) -> Sequence[Delivery]:
        if now_ms - LoopClock.EPOCH_MS in self.broken_ms:
            raise ServiceUnavailableError("The disk is full.")
        due = [
            Due(row.id, host_of(row.url), row.tenant_id, row.next_ms)
            for row in self.rows.values()
            if row.state == "pending"
            and row.next_ms <= now_ms
            and self.leases.get(row.id, 0) <= now_ms
        ]
        ids = chosen(due, limit, places)
        self.leases |= dict.fromkeys(ids, now_ms + lease_ms)
        return [self.rows[each] for each in ids]

    async def note(self, delivery: Delivery) -> bool:
        if self.rows[delivery.id].tries != delivery.tries - 1:
            return False
        self.rows[delivery.id] = delivery
        self.leases.pop(delivery.id, None)
        return True

    async def list(
        self, *, tenant_id: str | None, state: str | None, offset: int, limit: int
    ) -> tuple[int, Sequence[Delivery]]:
        found = [
            row
            for row in self.rows.values()
            if tenant_id in {None, row.tenant_id} and state in {None, row.state}
        ]
        return len(found), found[offset : offset + limit]

    async def get(self, delivery_id: str) -> Delivery | None:
        return self.rows.get(delivery_id)

    async def redeliver(self, delivery_id: str, *, now_ms: int) -> bool:
        row = self.rows[delivery_id]
        self.rows[delivery_id] = replace(row, state="pending", tries=0, next_ms=now_ms)
        return True


@dataclass
class OneKey:
    """The ``SigningKeys`` port, for one key."""

    key: SigningKey = field(default_factory=lambda: SigningKey("key-1", "t-1", 1))

    async def signing_key(self, key_id: str) -> SigningKey | None:
        return self.key if key_id == self.key.key_id else None

    async def rotate_signing_key(
        self, key_id: str, *, now_ms: int
    ) -> SigningKey | None:
        if key_id != self.key.key_id:
            return None
        version, rotated_ms = self.key.version + 1, (now_ms, *self.key.rotated_ms)
        self.key = replace(self.key, version=version, rotated_ms=rotated_ms)
        return self.key


@dataclass
class World:
    """Receivers: each host answers in its own way; the others at once, with 200."""

    hangs: set[str] = field(default_factory=set)
    says: dict[str, Answer] = field(default_factory=dict)
    arrived: list[tuple[str, float]] = field(default_factory=list)
    tried: list[tuple[str, float]] = field(default_factory=list)
    now: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    most_in_all: int = 0

    async def send(self, post: Post) -> Answer:
        host = host_of(post.url)
        self.tried.append((host, asyncio.get_running_loop().time()))
        self.now[host] += 1
        self.most[host] = max(self.most[host], self.now[host])
        self.most_in_all = max(self.most_in_all, self.now.total())
        try:
            hangs = host in self.hangs
            await asyncio.sleep(10 if hangs else 0.05)
            if hangs:
                return Answer(None, "silent")
            answer = self.says.get(host, Answer(200))
            if answer.accepted:
                self.arrived.append((post.id, asyncio.get_running_loop().time()))
            return answer
        finally:
            self.now[host] -= 1


@dataclass
class Desk:
    outbox: MemoryOutbox = field(default_factory=MemoryOutbox)
    world: World = field(default_factory=World)
    keys: OneKey = field(default_factory=OneKey)
    events: FakeEvents = field(default_factory=FakeEvents)
    crashes: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    poisoned: set[str] = field(default_factory=set)

    async def render(self, delivery: Delivery) -> bytes:
        if delivery.id in self.lost:
            raise NotFoundError("There is no such task.")
        if delivery.id in self.poisoned:
            raise ZeroDivisionError
        return b"{}"

    @property
    def deliver(self) -> DeliverWebhooks:
        return DeliverWebhooks(
            outbox=self.outbox,
            sender=self.world,
            signing_keys=self.keys,
            render=self.render,
            clock=LoopClock(),
            chance=FakeChance(),
            events=self.events,
            pepper=PEPPER,
            crashed=lambda _, where: self.crashes.append(where),
        )

    async def run_for(self, seconds: float) -> None:
        """Do as the gateway's loop does: a round per second."""
        deliver = self.deliver
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await asyncio.sleep(1)
                    await deliver()
        except TimeoutError:
            pass

    def state(self, number: int) -> tuple[str, int]:
        row = self.outbox.rows[f"evt_{number:05}"]
        return row.state, row.tries


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_dead_hosts_do_not_delay_healthy_ones(desk: Desk) -> None:
    """A thousand events at once, every other one for a host that hangs."""
    for number in range(1_000):
        dead = number % 2 == 0
        host = f"dead{number % 20}" if dead else f"well{number % 50}"
        desk.outbox.add(number, f"{host}.example.com")
        if dead:
            desk.world.hangs.add(f"{host}.example.com")
    await desk.run_for(30)
    waits_s = sorted(at - 1 for _, at in desk.world.arrived)
    assert len(waits_s) == 500
    assert waits_s[474] <= 2


async def test_one_host_with_a_long_queue_delays_nobody(desk: Desk) -> None:
    desk.world.hangs.add("dead.example.com")
    for number in range(500):
        desk.outbox.add(number, "dead.example.com")
    desk.outbox.add(500, "well.example.com", at_ms=1)
    await desk.run_for(5)
    assert [event_id for event_id, _ in desk.world.arrived] == ["evt_00500"]
    assert desk.world.arrived[0][1] <= 2


async def test_what_comes_while_others_hang_is_sent_within_a_second(
    desk: Desk,
) -> None:
    desk.world.hangs.add("dead.example.com")
    desk.outbox.add(1, "dead.example.com")
    running = asyncio.create_task(desk.run_for(9))
    await asyncio.sleep(3)
    desk.outbox.add(2, "well.example.com")
    await running
    assert desk.world.arrived[0][1] <= 4.1


async def test_no_more_is_under_way_than_may_be(desk: Desk) -> None:
    for number in range(600):
        tenant_id = f"t-{number % 3}"
        desk.outbox.add(number, f"h{number % 60}.example.com", tenant_id=tenant_id)
    await desk.run_for(20)
    assert len(desk.world.arrived) == 600
    assert desk.world.most_in_all == AT_ONCE
    assert max(desk.world.most.values()) <= AT_ONCE_PER_HOST


async def test_a_tenant_whose_receivers_all_hang_delays_no_other(desk: Desk) -> None:
    for number in range(600):
        host = f"dead{number % 60}.example.com"
        desk.world.hangs.add(host)
        desk.outbox.add(number, host, tenant_id="t-bad")
    sent_s: dict[str, float] = {}

    async def post() -> None:
        for number in range(600, 630):
            await asyncio.sleep(2)
            at_s = asyncio.get_running_loop().time()
            row = desk.outbox.add(
                number,
                "well.example.com",
                at_ms=round(at_s * 1000),
                tenant_id="t-good",
            )
            sent_s[row.id] = at_s

    posting = asyncio.create_task(post())
    await desk.run_for(70)
    await posting
    waits_s = [at - sent_s[event_id] for event_id, at in desk.world.arrived]
    assert len(waits_s) == 30
    assert max(waits_s) <= 2
    assert desk.world.most_in_all <= AT_ONCE_PER_TENANT + 1


async def test_hosts_that_failed_leave_places_for_those_that_did_not(
    desk: Desk,
) -> None:
    """Of all tenants together: after a first round nobody waits for the dead."""
    for number in range(1_200):
        tenant, host = number % 6, f"dead{number % 120}.example.com"
        desk.world.hangs.add(host)
        desk.outbox.add(number, host, tenant_id=f"t-{tenant}")
    running = asyncio.create_task(desk.run_for(120))
    await asyncio.sleep(60)
    desk.outbox.add(2_000, "well.example.com", at_ms=60_000, tenant_id="t-good")
    under_way = desk.world.now.total()
    await asyncio.sleep(2)
    assert [event_id for event_id, _ in desk.world.arrived] == ["evt_02000"]
    assert 0 < under_way <= AT_ONCE_FAILING
    await running


async def test_a_dead_host_rests_without_using_up_tries(desk: Desk) -> None:
    host = "dead.example.com"
    desk.world.says[host] = Answer(500, "broken")
    for number in range(30):
        desk.outbox.add(number, host)
    await desk.run_for(50)
    assert FAILURES_MAX <= len(desk.world.tried) <= FAILURES_MAX + AT_ONCE_PER_HOST
    tries = Counter(desk.state(number) for number in range(30))
    assert tries["pending", 0] >= 30 - FAILURES_MAX - AT_ONCE_PER_HOST
    before = len(desk.world.tried)
    await desk.run_for(REST_MS / 1000)
    # A new book, as after a restart, does not know of the rest.
    assert len(desk.world.tried) > before


async def test_after_its_rest_a_host_is_asked_by_one_and_then_gets_all(
    desk: Desk,
) -> None:
    host = "dead.example.com"
    desk.world.says[host] = Answer(500, "broken")
    for number in range(30):
        desk.outbox.add(number, host)

    async def heal() -> None:
        await asyncio.sleep(70)
        del desk.world.says[host]

    healing = asyncio.create_task(heal())
    await desk.run_for(800)
    await healing
    assert {desk.state(number)[0] for number in range(30)} == {"delivered"}
    at_s = [at for _, at in desk.world.tried]
    during = [at for at in at_s if 3 < at < 70]
    assert len(during) == 1


async def test_a_refusal_of_one_path_is_no_failure_of_the_host(desk: Desk) -> None:
    host = "shared.example.com"
    desk.world.says[host] = Answer(404, "no such path")
    for number in range(20):
        desk.outbox.add(number, host)
    await desk.run_for(3)
    assert {desk.state(number) for number in range(20)} == {("pending", 1)}


async def test_a_task_that_is_gone_is_given_up(desk: Desk) -> None:
    desk.outbox.add(1, "a.example.com")
    desk.lost.add("evt_00001")
    await desk.run_for(3)
    assert desk.state(1) == ("failed", 1)
    assert "no such task" in str(desk.outbox.rows["evt_00001"].error)
    assert desk.world.tried == []


async def test_an_error_of_ours_is_told_counted_and_stops_nothing(desk: Desk) -> None:
    desk.outbox.add(1, "a.example.com")
    desk.outbox.add(2, "b.example.com")
    desk.poisoned.add("evt_00001")
    await desk.run_for(1_000)
    assert desk.state(1) == ("failed", 4)
    assert desk.state(2) == ("delivered", 1)
    assert desk.crashes == ["evt_00001"] * 4


async def test_a_store_that_fails_does_not_cut_off_what_is_under_way(
    desk: Desk,
) -> None:
    desk.world.hangs.add("slow.example.com")
    desk.outbox.add(1, "slow.example.com")
    desk.outbox.broken_ms = range(1_500, 8_000)
    await desk.run_for(13)
    assert desk.state(1) == ("pending", 1)
    assert set(desk.crashes) == {"claiming webhooks"}


async def test_events_name_the_host_and_never_the_url(desk: Desk) -> None:
    desk.outbox.add(1, "a.example.com")
    await desk.run_for(3)
    (event,) = desk.events.seen
    assert "a.example.com" in repr(event)
    assert "outcome='delivered'" in repr(event)
    assert "/hook" not in repr(event)


def manager(desk: Desk) -> ManageWebhooks:
    return ManageWebhooks(desk.outbox, desk.keys, LoopClock(), PEPPER)


async def test_a_foreign_delivery_looks_like_none(desk: Desk) -> None:
    row = desk.outbox.add(1, "a.example.com")
    for delivery_id, tenant_id in ((row.id, "t-2"), ("evt_x", "t-1"), ("evt_x", None)):
        with pytest.raises(NotFoundError):
            await manager(desk).redeliver(delivery_id, tenant_id)
    assert (await manager(desk).redeliver(row.id, "t-1")).id == row.id
    assert (await manager(desk).redeliver(row.id, None)).id == row.id


async def test_an_unknown_state_is_refused_and_an_unknown_key_not_found(
    desk: Desk,
) -> None:
    with pytest.raises(InvalidRequestError):
        await manager(desk).list("t-1", state="lost", offset=0, limit=1)
    for ask in (manager(desk).secret, manager(desk).rotate):
        with pytest.raises(NotFoundError):
            await ask("key-x")
