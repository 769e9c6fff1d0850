"""Whose a key is, what it may do, and how keys are made, changed and rotated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.adapters.rates import MemoryRates
from gateway.core import keys as rules
from gateway.core.errors import (
    ConflictError,
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    RateLimitedError,
    UnauthorizedError,
)
from gateway.core.fleet import Notice
from gateway.core.key_limits import KeyScope, KeyUse
from gateway.core.money import NANO
from gateway.flows.keys import (
    Authenticate,
    KeyNames,
    ManageKeys,
    NewKey,
    check_rate,
    use_facts,
)
from gateway.ports import Key, Tenant
from tests.fakes import FakeChance, MemoryAccounts, StillClock

PEPPER = b"pepper"


@dataclass
class OneKey:
    """The accounts of one key; ``on_read`` is called while it is read."""

    key: Key
    reads: int = 0
    on_read: Any = None

    async def key_by_digest(self, digest: bytes) -> Key | None:
        self.reads += 1
        found = self.key if digest == self.key.digest else None
        if self.on_read is not None:
            self.on_read()
        return found


def a_door() -> tuple[Authenticate, OneKey, str]:
    chance = FakeChance()
    secret = rules.key_from(chance.token(rules.ALPHABET, rules.RANDOM_CHARS))
    key = Key("key_1", "t-1", rules.digest(secret, PEPPER), "iwk", "auto", 0)
    accounts = OneKey(key)
    stands_in: Any = accounts
    clock = StillClock()
    rates = MemoryRates(clock)
    door = Authenticate(stands_in, clock, PEPPER, rates, MemoryRates(clock))
    return door, accounts, f"Bearer {secret}"


@pytest.mark.parametrize("subject", ["key_1", ""])
async def test_a_key_that_is_forgotten_is_read_anew(subject: str) -> None:
    door, accounts, header = a_door()
    await door(header)
    await door(header)
    assert accounts.reads == 1
    accounts.key = replace(accounts.key, revoked_ms=1)

    door.forget("key_2")
    await door(header)
    door.forget(subject)

    with pytest.raises(UnauthorizedError, match="revoked"):
        await door(header)


async def test_what_was_being_read_while_it_changed_is_not_remembered() -> None:
    door, accounts, header = a_door()

    def revoked() -> None:
        accounts.on_read = None
        accounts.key = replace(accounts.key, revoked_ms=1)
        door.forget("key_1")

    accounts.on_read = revoked
    await door(header)

    with pytest.raises(UnauthorizedError, match="revoked"):
        await door(header)


# --- who is let in ---


@dataclass
class Desk:
    """Keys of two tenants, and the door that they open."""

    clock: StillClock = field(default_factory=StillClock)
    accounts: MemoryAccounts = field(default_factory=MemoryAccounts)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = KeyNames({"gpt-image-2": "gpt-image-2"}.get, frozenset({"openai"}))
        self.keys = ManageKeys(
            self.accounts, self.clock, FakeChance(), PEPPER, self.announce, names
        )
        self.rates = MemoryRates(self.clock)
        self.door = Authenticate(
            self.accounts, self.clock, PEPPER, self.rates, MemoryRates(self.clock)
        )

    async def announce(self, notice: Notice) -> None:
        self.told.append(notice.subject)
        self.door.forget(notice.subject)

    async def make(self, tenant_id: str = "t-1", **given: Any) -> NewKey:
        return await self.keys.create(Tenant(tenant_id, ""), given)

    async def enters(self, secret: str, **asked: Any) -> str:
        try:
            return (await self.door(f"Bearer {secret}", **asked)).id
        except GatewayError as error:
            return error.code


def unknown_key(number: int) -> str:
    return rules.key_from(f"{number:030}")


async def test_twenty_unknown_keys_a_minute_are_told_so_and_the_next_to_wait() -> None:
    desk = Desk()

    told = [await desk.enters(unknown_key(n), address="203.0.113.7") for n in range(25)]

    assert told == ["invalid_api_key"] * 20 + ["rate_limit_exceeded"] * 5
    with pytest.raises(RateLimitedError) as refused:
        await desk.door("Bearer nothing like a key", address="203.0.113.7")
    assert refused.value.retry_after_s == 60
    desk.clock.at_ms += 60_000
    assert await desk.enters("iwk", address="203.0.113.7") == "invalid_api_key"


async def test_a_valid_key_is_let_in_from_where_unknown_ones_came() -> None:
    desk = Desk()
    made = await desk.make()
    for number in range(500):
        await desk.enters(unknown_key(number), address="203.0.113.7")

    desk.door.forget("")
    entered = await desk.enters(made.secret, address="203.0.113.7")

    assert entered == made.key.id
    assert await desk.enters("iwk", address="203.0.113.8") == "invalid_api_key"


async def test_somebody_who_changes_addresses_within_a_network_is_one() -> None:
    desk = Desk()

    told = [
        await desk.enters(unknown_key(n), address=f"2001:db8::{n:x}") for n in range(21)
    ]

    assert told[-1] == "rate_limit_exceeded"


async def test_known_keys_that_are_over_are_not_counted_as_unknown() -> None:
    desk = Desk()
    made = await desk.make()
    await desk.keys.revoke(made.key.id)

    told = {await desk.enters(made.secret, address="203.0.113.7") for _ in range(30)}

    assert told == {"key_disabled"}


async def test_a_key_expires_by_itself_though_it_is_remembered() -> None:
    desk = Desk()
    made = await desk.make(expires_at=desk.clock.now_ms() // 1000 + 1)
    assert await desk.enters(made.secret) == made.key.id

    desk.clock.at_ms += 1_000

    assert await desk.enters(made.secret) == "key_expired"
    assert desk.accounts.reads == 1


async def test_a_key_is_for_its_scopes_and_from_its_networks() -> None:
    desk = Desk()
    made = await desk.make(scopes=["tasks"], addresses=["203.0.113.0/24"])
    near, far = {"address": "203.0.113.7"}, {"address": "198.51.100.1"}

    assert await desk.enters(made.secret, needs=KeyScope.TASKS, **near) == made.key.id
    images = await desk.enters(made.secret, needs=KeyScope.IMAGES, **near)
    assert images == "key_scope_missing"
    abroad = await desk.enters(made.secret, needs=KeyScope.TASKS, **far)
    assert abroad == "key_address_not_allowed"


async def test_requests_are_counted_for_keys_with_a_rate_only() -> None:
    desk = Desk()
    free, limited = await desk.make(), await desk.make(requests_per_minute=2)

    assert await desk.door.rate_of(free.key) is None
    rates = [await desk.door.rate_of(limited.key) for _ in range(3)]

    assert [rate.allowed for rate in rates if rate is not None] == [True, True, False]
    assert desk.rates._minutes.keys() == {limited.key.id}
    assert rates[2] is not None
    with pytest.raises(RateLimitedError, match="2 requests a minute") as refused:
        check_rate(rates[2])
    assert refused.value.retry_after_s == 60


# --- making, changing, rotating ---


async def test_a_key_that_is_changed_is_changed_for_who_remembers_it() -> None:
    desk = Desk()
    made = await desk.make()
    await desk.enters(made.secret)

    changed = await desk.keys.change(made.key.id, {"scopes": ["billing"]})

    assert changed.limits.scopes == {KeyScope.BILLING}
    assert desk.told == [made.key.id]
    refused = await desk.enters(made.secret, needs=KeyScope.IMAGES)
    assert refused == "key_scope_missing"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"delivery": "pigeon"}, "delivery"),
        ({"delivery": None}, "delivery"),
        ({"routing": {"only": ["nobody"]}}, "routing"),
        ({"routing": {"speed": 1}}, "routing.speed"),
        ({"models": ["nothing"]}, "models[0]"),
        ({"key": "x"}, "key"),
    ],
)
async def test_what_breaks_a_rule_changes_nothing(
    given: dict[str, object], param: str
) -> None:
    desk = Desk()
    made = await desk.make()

    with pytest.raises(InvalidRequestError) as refused:
        await desk.keys.change(made.key.id, given | {"requests_per_minute": 5})

    assert refused.value.param == param
    assert desk.accounts.by_id[made.key.id] == made.key


async def test_a_rotated_key_and_its_successor_are_both_valid_for_a_while() -> None:
    desk = Desk()
    old = await desk.make(
        requests_per_minute=5,
        daily_credits="7",
        delivery="async",
        routing={"only": ["openai"]},
    )

    new, before = await desk.keys.rotate(old.key.id)

    assert new.secret != old.secret
    assert before.rotated_to == new.key.id
    assert new.key.limits == old.key.limits
    assert new.key.tenant_id == old.key.tenant_id
    assert (new.key.delivery, new.key.routing) == ("async", old.key.routing)
    assert new.key.meter == old.key.meter == old.key.id
    desk.clock.at_ms += 24 * 3600 * 1000 - 1
    assert await desk.enters(old.secret) == old.key.id
    assert await desk.enters(new.secret) == new.key.id
    desk.clock.at_ms += 1
    assert await desk.enters(old.secret) == "key_expired"
    assert await desk.enters(new.secret) == new.key.id


async def test_two_keys_are_valid_at_once_and_no_third() -> None:
    desk = Desk()
    first = await desk.make()
    second, _ = await desk.keys.rotate(first.key.id, overlap_s=60)

    for key_id in (first.key.id, second.key.id):
        with pytest.raises(ConflictError, match="Two keys are valid"):
            await desk.keys.rotate(key_id)
    desk.clock.at_ms += 60_000
    third, _ = await desk.keys.rotate(second.key.id)

    assert third.key.meter == first.key.id
    assert len(desk.accounts.by_id) == 3


async def test_a_successor_lives_no_longer_than_the_limits_say() -> None:
    desk = Desk()
    ends_s = desk.clock.now_ms() // 1000 + 10
    old = await desk.make(expires_at=ends_s)

    new, before = await desk.keys.rotate(old.key.id)

    assert before.limits.expires_ms == new.key.limits.expires_ms == ends_s * 1000


async def test_a_key_that_is_over_is_not_rotated() -> None:
    desk = Desk()
    made = await desk.make()
    await desk.keys.revoke(made.key.id)

    with pytest.raises(ConflictError) as refused:
        await desk.keys.rotate(made.key.id)

    assert refused.value.code == "key_not_active"
    assert len(desk.accounts.by_id) == 1


async def test_keys_of_others_are_not_there() -> None:
    desk = Desk()
    mine, other = await desk.make("t-1"), await desk.make("t-2")

    for ask in (
        desk.keys.show(other.key.id, "t-1"),
        desk.keys.change(other.key.id, {"requests_per_minute": 1}, "t-1"),
        desk.keys.rotate(other.key.id, "t-1"),
        desk.keys.revoke(other.key.id, "t-1"),
        desk.keys.show("key_nowhere", None),
    ):
        with pytest.raises(NotFoundError) as refused:
            await ask
        assert refused.value.code == "key_not_found"

    assert desk.accounts.by_id[other.key.id] == other.key
    assert await desk.keys.page("t-1", page=1, page_size=9) == (1, [mine.key])
    everyone = await desk.keys.page(None, page=1, page_size=9)
    assert everyone == (2, [other.key, mine.key])


async def test_a_key_is_shown_without_its_secret_and_with_what_it_used() -> None:
    desk = Desk()
    desk.accounts.use = KeyUse("2026-11-25", 3, 9 * NANO, 4 * NANO, 8 * NANO)
    made = await desk.make(daily_credits="5", monthly_credits="8.5")

    view = await desk.keys.show(made.key.id)

    assert made.secret not in str(desk.keys.facts(view.key)) + repr(made)
    assert use_facts(view) == {
        "tasks_in_flight": 3,
        "total_credits": "9",
        "daily_credits": "4",
        "monthly_credits": "8",
        "remaining_credits": "0.5",
        "day": "2026-11-25",
    }
