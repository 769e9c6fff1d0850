"""What every store of tenants and keys must do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.adapters.sql.tenants import SqlTenants
from gateway.core.errors import ConflictError, NotFoundError
from gateway.core.ledger import Balance
from gateway.core.routing import Preferences, Sort
from gateway.core.statements import NEWEST
from gateway.flows.keys import ManageKeys
from gateway.ports import Key, Tenant
from tests.contract.stores import BACKENDS, NOW_MS, TENANT, Stores, open_stores
from tests.fakes import FakeChance, StillClock


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


def a_key(**changes: Any) -> Key:
    fields: dict[str, Any] = {
        "id": "key-1",
        "tenant_id": TENANT,
        "digest": b"\x00\xff digest 1",
        "display": "igw_live_…abcd",
        "delivery": "auto",
        "created_ms": NOW_MS,
    }
    return Key(**(fields | changes))


async def test_a_tenant_is_found_by_its_name(stores: Stores) -> None:
    await stores.accounts.add_tenant(Tenant("t-1", "Ada's shop"), now_ms=NOW_MS)

    assert await stores.accounts.tenant_named("Ada's shop") == Tenant(
        "t-1", "Ada's shop"
    )
    assert await stores.accounts.tenant_named("ada's shop") is None


async def test_a_new_tenant_has_nothing(stores: Stores) -> None:
    await stores.accounts.add_tenant(Tenant("t-1", "ada"), now_ms=NOW_MS)

    assert await stores.balance("t-1") == Balance()


async def test_a_name_belongs_to_one_tenant(stores: Stores) -> None:
    await stores.accounts.add_tenant(Tenant("t-1", "ada"), now_ms=NOW_MS)

    with pytest.raises(ConflictError):
        await stores.accounts.add_tenant(Tenant("t-2", "ada"), now_ms=NOW_MS)

    assert await stores.ledger.balance("t-2") is None


async def test_tenants_are_listed_by_name_with_their_balances(stores: Stores) -> None:
    await stores.accounts.add_tenant(Tenant("t-1", "zoe"), now_ms=NOW_MS)
    await stores.accounts.add_tenant(Tenant("t-2", "ada"), now_ms=NOW_MS)
    await stores.ledger.grant("t-1", 5, reference="r", now_ms=NOW_MS)

    assert await stores.accounts.tenants() == [
        (Tenant("t-2", "ada"), Balance()),
        (Tenant("t-1", "zoe"), Balance(posted=5)),
    ]


async def test_a_key_is_found_by_its_digest(stores: Stores) -> None:
    await stores.fund(0)
    await stores.accounts.add_key(a_key())

    assert await stores.accounts.key_by_digest(b"\x00\xff digest 1") == a_key()
    assert await stores.accounts.key_by_digest(b"another") is None


async def test_a_key_is_found_by_its_id_with_the_routing_it_was_given(
    stores: Stores,
) -> None:
    routing = Preferences(
        only=("a", "b/c"), sort=Sort.LATENCY, max_nanocredits=1, allow_fallbacks=False
    )
    await stores.fund(0)
    await stores.accounts.add_key(a_key(routing=routing))
    await stores.reopen()

    assert await stores.accounts.key("key-1") == a_key(routing=routing)
    assert await stores.accounts.key_by_digest(a_key().digest) == a_key(routing=routing)
    assert await stores.accounts.key("key-2") is None


async def test_keys_are_listed_oldest_first_and_only_to_their_tenant(
    stores: Stores,
) -> None:
    await stores.fund(0)
    await stores.fund(0, "t-2")
    younger = a_key(id="key-a", digest=b"2", created_ms=NOW_MS + 1)
    await stores.accounts.add_key(younger)
    await stores.accounts.add_key(a_key())
    await stores.accounts.add_key(a_key(id="key-3", digest=b"3", tenant_id="t-2"))

    assert await stores.accounts.keys(TENANT) == [a_key(), younger]


async def test_a_revoked_key_is_still_found_as_revoked(stores: Stores) -> None:
    await stores.fund(0)
    await stores.accounts.add_key(a_key())

    assert await stores.accounts.revoke_key("key-1", now_ms=NOW_MS + 5)
    assert await stores.accounts.revoke_key("key-1", now_ms=NOW_MS + 9)

    found = await stores.accounts.key_by_digest(a_key().digest)
    assert found == a_key(revoked_ms=NOW_MS + 5)


async def test_a_key_that_is_not_there_cannot_be_revoked(stores: Stores) -> None:
    assert not await stores.accounts.revoke_key("nobody's", now_ms=NOW_MS)


async def test_two_keys_never_share_a_digest(stores: Stores) -> None:
    await stores.fund(0)
    await stores.accounts.add_key(a_key())

    with pytest.raises(ConflictError):
        await stores.accounts.add_key(a_key(id="key-2"))

    assert await stores.accounts.keys(TENANT) == [a_key()]


async def test_a_key_needs_its_tenant(stores: Stores) -> None:
    with pytest.raises(NotFoundError):
        await stores.accounts.add_key(a_key(tenant_id="nobody"))


async def test_a_reopened_database_keeps_tenants_and_keys(stores: Stores) -> None:
    await stores.fund(0)
    await stores.accounts.add_key(a_key())

    await stores.reopen()

    assert await stores.accounts.keys(TENANT) == [a_key()]


async def test_every_change_of_a_key_is_in_the_trail_with_how_it_was(
    stores: Stores,
) -> None:
    await stores.fund(0)
    keys = ManageKeys(
        stores.accounts, StillClock(), FakeChance(), b"pepper", who="an admin"
    )
    made = await keys.create(Tenant(TENANT, "acme"))
    key_id = made.key.id

    await keys.change(key_id, {"requests_per_minute": 5})
    new, _ = await keys.rotate(key_id)
    await keys.revoke(new.key.id)
    await keys.revoke(new.key.id)  # the second time changes nothing

    told = await SqlTenants(stores.database).trail(TENANT, after=NEWEST, limit=50)
    steps = {(each.what, each.subject) for each in told}
    assert steps == {
        ("key.create", key_id),
        ("key.change", key_id),
        ("key.rotate", key_id),
        ("key.revoke", new.key.id),
    }
    assert {each.who for each in told} == {"an admin"}
    (change,) = [each for each in told if each.what == "key.change"]
    before, after = (
        json.loads(each or "") for each in (change.before_json, change.after_json)
    )
    assert (before["requests_per_minute"], after["requests_per_minute"]) == (None, 5)
    assert made.secret not in str(told)
