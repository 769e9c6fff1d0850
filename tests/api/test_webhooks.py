"""The routes of webhooks: a tenant's own, and an operator's."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.adapters.logs import LogListener
from gateway.adapters.rates import MemoryRates
from gateway.adapters.sql.deliveries import SqlOutbox
from gateway.api.admin import AdminGate
from gateway.api.front import Front
from gateway.api.webhooks import webhook_admin_routes, webhook_routes
from gateway.app import routed
from gateway.core.webhooks import ROTATION_OVERLAP_MS, SECRETS_MAX, secret_for
from gateway.flows.keys import Authenticate, ManageKeys, NewKey
from gateway.flows.webhooks import ManageWebhooks
from gateway.ports import Tenant
from tests.contract.stores import TENANT, Stores, a_task, an_end, open_stores
from tests.fakes import FakeChance, FakeEvents, StillClock

PEPPER = b"pepper"
ADMIN = "the admin key"


@dataclass
class Counter:
    """A client of the routes, over a real store with two tenants."""

    stores: Stores
    mine: NewKey
    other: NewKey
    client: httpx.AsyncClient

    async def ask(self, method: str, path: str, key: str | None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.request(method, path, headers=headers)

    async def finish(self, task_id: str, tenant_id: str = TENANT) -> str:
        url = "https://hooks.example.com/"
        task = a_task(task_id, tenant_id=tenant_id, callback_url=url)
        await self.stores.tasks.open(task)
        await self.stores.tasks.finish(an_end(task_id))
        return f"evt_{task_id}_completed"


@pytest.fixture
async def counter(tmp_path: Path) -> AsyncGenerator[Counter, None]:
    clock, chance = StillClock(), FakeChance()
    async with open_stores("sqlite", tmp_path) as stores:
        accounts = stores.accounts
        keys = ManageKeys(accounts, clock, chance, PEPPER)
        for tenant_id in (TENANT, "t-2"):
            await stores.fund(10**6, tenant_id)
        mine = await keys.create(Tenant(TENANT, "mine"))
        other = await keys.create(Tenant("t-2", "other"))
        outbox = SqlOutbox(stores.database)
        webhooks = ManageWebhooks(outbox, accounts, clock, PEPPER)
        rates, log = MemoryRates(clock), LogListener()
        authenticate = Authenticate(accounts, clock, PEPPER, rates, rates)
        inner = routed(
            [
                *webhook_routes(authenticate, webhooks, clock),
                *webhook_admin_routes(AdminGate(ADMIN), webhooks),
            ],
            log,
        )
        app = Front(inner, clock, chance, FakeEvents(), log.on_crash)
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # litestar's own ASGI types
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test"
        ) as client:
            yield Counter(stores, mine, other, client)


async def test_a_tenant_sees_its_own_deliveries_by_pages(counter: Counter) -> None:
    for number in range(3):
        await counter.finish(f"task-{number}")
    await counter.finish("task-x", "t-2")
    path = "/v1/webhooks/deliveries?state=pending&page=2&page_size=2"
    body = (await counter.ask("GET", path, counter.mine.secret)).json()
    assert (body["total"], body["has_more"], len(body["data"])) == (3, False, 1)
    (row,) = body["data"]
    assert (row["state"], row["tries"], row["event"]) == (
        "pending",
        0,
        "task.completed",
    )
    assert "tenant_id" not in row


@pytest.mark.parametrize(
    "query",
    [
        "state=lost",
        "page=0",
        "page=x",
        "page_size=101",
        "page=99999999999",
        "page=" + "0" * 20 + "1",
        "page_size=00000000199999",
        "page=" + "9" * 5_000,
    ],
)
async def test_a_wrong_filter_is_named(counter: Counter, query: str) -> None:
    path = f"/v1/webhooks/deliveries?{query}"
    answer = await counter.ask("GET", path, counter.mine.secret)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


async def test_a_delivery_is_repeated_by_its_tenant_or_an_admin_only(
    counter: Counter,
) -> None:
    event_id = await counter.finish("task-1")
    own = f"/v1/webhooks/deliveries/{event_id}/redeliver"
    any_ones = f"/admin/v1/deliveries/{event_id}/redeliver"
    for path, key, status in (
        (own, counter.mine.secret, 200),
        (own, counter.other.secret, 404),
        (own, None, 401),
        (any_ones, ADMIN, 200),
        (any_ones, counter.mine.secret, 401),
        ("/admin/v1/deliveries/evt_x/redeliver", ADMIN, 404),
    ):
        assert (await counter.ask("POST", path, key)).status_code == status, path


async def test_an_admin_sees_whose_each_delivery_is(counter: Counter) -> None:
    await counter.finish("task-1")
    await counter.finish("task-2", "t-2")
    answer = await counter.ask("GET", "/admin/v1/deliveries", ADMIN)
    assert {row["tenant_id"] for row in answer.json()["data"]} == {TENANT, "t-2"}
    refused = await counter.ask("GET", "/admin/v1/deliveries", counter.mine.secret)
    assert refused.status_code == 401


async def test_one_rotation_too_many_is_told_when_to_come_back(
    counter: Counter,
) -> None:
    path = "/v1/webhooks/secret/rotate"
    for _ in range(SECRETS_MAX - 1):
        assert (await counter.ask("POST", path, counter.mine.secret)).is_success
    refused = await counter.ask("POST", path, counter.mine.secret)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "secret_rotated_too_often"
    assert refused.headers["retry-after"] == str(ROTATION_OVERLAP_MS // 1000)
    assert refused.headers["x-should-retry"] == "false"
    assert (await counter.ask("POST", path, counter.other.secret)).is_success


async def test_a_new_secret_is_shown_when_it_is_made_and_never_again(
    counter: Counter,
) -> None:
    path = "/v1/webhooks/secret/rotate"
    body = (await counter.ask("POST", path, counter.mine.secret)).json()
    assert body["webhook_secret"] == secret_for(PEPPER, counter.mine.key.id, 2)
    assert body["key_id"] == counter.mine.key.id
    shown = await counter.ask("GET", "/v1/webhooks/secret", counter.mine.secret)
    assert shown.status_code == 404
    other = await counter.stores.accounts.signing_key(counter.other.key.id)
    assert other is not None
    assert other.version == 1
