"""What every store of webhooks must do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.adapters.sql.deliveries import SqlOutbox
from gateway.core.webhooks import (
    ROTATION_OVERLAP_MS,
    SECRETS_MAX,
    Answer,
    Delivery,
    Places,
    RotatedTooOftenError,
    after_try,
)
from gateway.ports import Key
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_task,
    a_void,
    an_end,
    open_stores,
)

LEASE_MS = 30_000
A, B = "a.example.com", "b.example.com"
END_MS = NOW_MS + 3_000
"""When the tasks of these stories end."""
ANY = Places(each=1_000, tenant_each=1_000)


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        await opened.fund(10**9)
        yield opened


@pytest.fixture
def outbox(stores: Stores) -> SqlOutbox:
    return SqlOutbox(stores.database)


async def a_finished_task(
    stores: Stores, task_id: str = "task-1", *, host: str = "a.example.com"
) -> str:
    """Finish a task with a callback URL; returns its delivery's id."""
    task = a_task(task_id, callback_url=f"https://{host}/hook")
    await stores.tasks.open(task)
    await stores.tasks.finish(an_end(task_id))
    return f"evt_{task_id}_completed"


async def claim(
    outbox: SqlOutbox, now_ms: int = END_MS, limit: int = 100, places: Places = ANY
) -> Sequence[Delivery]:
    return await outbox.claim(
        now_ms=now_ms, lease_ms=LEASE_MS, limit=limit, places=places
    )


async def test_the_end_of_a_task_is_to_be_told_once(
    stores: Stores, outbox: SqlOutbox
) -> None:
    delivery_id = await a_finished_task(stores)
    await stores.tasks.finish(an_end())
    total, (delivery,) = await outbox.list(
        tenant_id=None, state=None, offset=0, limit=9
    )
    assert total == 1
    assert delivery == Delivery(
        id=delivery_id,
        task_id="task-1",
        tenant_id=TENANT,
        key_id="key-1",
        event="task.completed",
        url="https://a.example.com/hook",
        state="pending",
        tries=0,
        next_ms=END_MS,
        created_ms=END_MS,
    )


async def test_a_failure_is_told_too_and_silence_where_nobody_asked(
    stores: Stores, outbox: SqlOutbox
) -> None:
    await stores.tasks.open(a_task("task-1", callback_url="https://a.example.com/"))
    await stores.tasks.open(a_task("task-2"))
    assert await claim(outbox) == []
    await stores.tasks.finish(a_void("task-1"))
    await stores.tasks.finish(a_void("task-2"))
    assert [each.id for each in await claim(outbox)] == ["evt_task-1_failed"]


async def test_fifty_claimers_at_once_get_each_delivery_once(
    stores: Stores, outbox: SqlOutbox
) -> None:
    ids = [await a_finished_task(stores, f"task-{number}") for number in range(120)]
    claims = await asyncio.gather(*(claim(outbox, limit=4) for _ in range(50)))
    assert sorted(each.id for some in claims for each in some) == sorted(ids)


async def test_a_claim_ends_with_its_lease(stores: Stores, outbox: SqlOutbox) -> None:
    await a_finished_task(stores)
    assert len(await claim(outbox)) == 1
    assert await claim(outbox, END_MS + LEASE_MS - 1) == []
    assert len(await claim(outbox, END_MS + LEASE_MS)) == 1


async def test_nothing_is_due_before_its_time(
    stores: Stores, outbox: SqlOutbox
) -> None:
    await a_finished_task(stores)
    assert await claim(outbox, END_MS - 1) == []
    (claimed,) = await claim(outbox)
    tried = after_try(claimed, Answer(500, "broken"), END_MS, fraction=0.5)
    assert await outbox.note(tried)
    assert await claim(outbox, END_MS + 4_999) == []
    (again,) = await claim(outbox, END_MS + 5_000)
    assert (again.id, again.tries) == (claimed.id, 1)
    assert (again.status, again.error) == (500, "broken")


async def test_what_is_delivered_or_given_up_is_never_claimed(
    stores: Stores, outbox: SqlOutbox
) -> None:
    await a_finished_task(stores, "task-1")
    await a_finished_task(stores, "task-2")
    one, two = await claim(outbox)
    await outbox.note(after_try(one, Answer(200), END_MS, fraction=0.5))
    await outbox.note(after_try(two, Answer(410, "gone"), END_MS, fraction=0.5))
    assert await claim(outbox, END_MS + 10**9) == []
    for state, delivery_id in (("delivered", one.id), ("failed", two.id)):
        total, (found,) = await outbox.list(
            tenant_id=TENANT, state=state, offset=0, limit=9
        )
        assert (total, found.id) == (1, delivery_id)


@pytest.mark.parametrize(
    ("answer", "state"),
    [(Answer(200), "delivered"), (Answer(500, "broken"), "pending")],
)
async def test_a_claimer_who_comes_back_late_changes_nothing(
    stores: Stores, outbox: SqlOutbox, answer: Answer, state: str
) -> None:
    await a_finished_task(stores)
    (late,) = await claim(outbox)
    (prompt,) = await claim(outbox, END_MS + LEASE_MS)
    assert await outbox.note(after_try(prompt, answer, END_MS, fraction=0.5))
    assert not await outbox.note(
        after_try(late, Answer(None, "too late"), END_MS, fraction=0.5)
    )
    found = await outbox.get(prompt.id)
    assert found is not None
    assert (found.state, found.tries, found.status) == (state, 1, answer.status)


async def test_a_host_with_many_stands_in_nobodys_way(
    stores: Stores, outbox: SqlOutbox
) -> None:
    for number in range(20):
        await a_finished_task(stores, f"task-a{number:02}", host="a.example.com")
    last = await a_finished_task(stores, "task-b", host="b.example.com")
    some = await claim(outbox, limit=5, places=replace(ANY, each=4))
    assert [each.id for each in some][4:] == [last]
    more = await claim(outbox, places=replace(ANY, each=4, taken={A: 3}))
    assert len(more) == 1
    assert await claim(outbox, places=replace(ANY, each=4, taken={A: 4})) == []


async def test_a_delivery_can_be_repeated_with_all_its_tries(
    stores: Stores, outbox: SqlOutbox
) -> None:
    delivery_id = await a_finished_task(stores)
    (claimed,) = await claim(outbox)
    failed = replace(claimed, tries=1, state="failed", error="gone")
    assert await outbox.note(failed)
    assert await outbox.redeliver(delivery_id, now_ms=END_MS + 50)
    (again,) = await claim(outbox, END_MS + 50)
    assert (again.id, again.tries, again.state) == (delivery_id, 0, "pending")
    assert not await outbox.redeliver("evt_nothing_completed", now_ms=END_MS)


async def test_a_try_from_before_a_repetition_does_not_count_for_it(
    stores: Stores, outbox: SqlOutbox
) -> None:
    delivery_id = await a_finished_task(stores)
    (under_way,) = await claim(outbox)
    await outbox.redeliver(delivery_id, now_ms=END_MS)
    assert not await outbox.note(
        after_try(under_way, Answer(200), END_MS, fraction=0.5)
    )
    assert [each.id for each in await claim(outbox)] == [delivery_id]


async def test_tenants_are_listed_apart_and_by_pages(
    stores: Stores, outbox: SqlOutbox
) -> None:
    await stores.fund(1_000, "t-2")
    await stores.tasks.open(
        a_task("task-x", tenant_id="t-2", callback_url="https://x.example.com/")
    )
    await stores.tasks.finish(an_end("task-x"))
    for number in range(5):
        await a_finished_task(stores, f"task-{number}")
    total, page = await outbox.list(tenant_id=TENANT, state=None, offset=2, limit=2)
    assert (total, len(page)) == (5, 2)
    assert {each.tenant_id for each in page} == {TENANT}
    total, _ = await outbox.list(tenant_id=None, state="pending", offset=0, limit=1)
    assert total == 6
    assert await outbox.get("evt_nothing_completed") is None


async def test_the_version_of_a_keys_secret_goes_up(stores: Stores) -> None:
    await stores.accounts.add_key(Key("key-1", TENANT, b"d", "iwk", "auto", NOW_MS))
    first = await stores.accounts.signing_key("key-1")
    assert first is not None
    assert (first.version, first.rotated_ms) == (1, ())
    await stores.accounts.rotate_signing_key("key-1", now_ms=NOW_MS + 1)
    second = await stores.accounts.signing_key("key-1")
    assert second is not None
    assert (second.version, second.rotated_ms) == (2, (NOW_MS + 1,))
    third = await stores.accounts.rotate_signing_key("key-1", now_ms=NOW_MS + 2)
    assert third == await stores.accounts.signing_key("key-1")
    assert third is not None
    assert (third.version, third.rotated_ms) == (3, (NOW_MS + 2, NOW_MS + 1))
    assert await stores.accounts.signing_key("key-x") is None
    assert await stores.accounts.rotate_signing_key("key-x", now_ms=NOW_MS) is None


async def test_a_secret_is_not_rotated_before_an_older_one_stops_to_sign(
    stores: Stores,
) -> None:
    await stores.accounts.add_key(Key("key-1", TENANT, b"d", "iwk", "auto", NOW_MS))

    async def rotated(at_ms: int) -> int:
        key = await stores.accounts.rotate_signing_key("key-1", now_ms=at_ms)
        assert key is not None
        return key.version

    for number in range(1, SECRETS_MAX):
        assert await rotated(NOW_MS + number) == number + 1
    free_ms = NOW_MS + 1 + ROTATION_OVERLAP_MS
    with pytest.raises(RotatedTooOftenError) as refused:
        await rotated(free_ms - 1_500)
    assert refused.value.retry_after_s == 2
    kept = await stores.accounts.signing_key("key-1")
    assert kept is not None
    assert kept.version == SECRETS_MAX
    assert await rotated(free_ms) == SECRETS_MAX + 1


async def test_fifty_rotations_at_once_are_as_many_as_may_be(stores: Stores) -> None:
    await stores.accounts.add_key(Key("key-1", TENANT, b"d", "iwk", "auto", NOW_MS))
    told = await asyncio.gather(
        *(
            stores.accounts.rotate_signing_key("key-1", now_ms=NOW_MS + number)
            for number in range(50)
        ),
        return_exceptions=True,
    )
    refused = [each for each in told if isinstance(each, RotatedTooOftenError)]
    assert len(refused) == 50 - (SECRETS_MAX - 1)


async def test_one_tenant_leaves_places_for_others_at_the_same_host_too(
    stores: Stores, outbox: SqlOutbox
) -> None:
    await stores.fund(1_000, "t-2")
    for number in range(20):
        await a_finished_task(stores, f"task-a{number:02}", host=A)
    other = a_task("task-b", tenant_id="t-2", callback_url=f"https://{A}/hook")
    await stores.tasks.open(other)
    await stores.tasks.finish(an_end("task-b"))
    places = replace(ANY, each=4, tenant_each=2, taken={A: 1}, tenant_taken={TENANT: 1})
    some = await claim(outbox, places=places)
    assert [each.task_id for each in some] == ["task-b", "task-a00"]
