"""What a process remembers of keys, and how it is made to forget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from gateway.adapters.rates import MemoryRates
from gateway.core import keys as rules
from gateway.core.errors import UnauthorizedError
from gateway.flows.keys import Authenticate
from gateway.ports import Key
from tests.fakes import FakeChance, StillClock

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
