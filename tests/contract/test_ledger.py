"""What every ledger must do: grants, balances, and an audit that misses nothing."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.adapters.sql.database import StoreFailedError, Transaction
from gateway.adapters.sql.ledger import CHECKS, Check
from gateway.core.catalogue import TenantPrice, TokenPrice
from gateway.core.errors import (
    ConflictError,
    InsufficientCreditsError,
    InvalidRequestError,
    NotFoundError,
)
from gateway.core.ledger import (
    Balance,
    Lot,
    Settled,
    drawn,
    expired,
    hold,
    refund,
    settle,
)
from gateway.core.money import NANO_MAX
from gateway.ports import AuditReport, Drift, Mark, NewGrant, NewRefund
from providers.kit.contract import Usage
from tests.contract.stores import (
    BACKENDS,
    NOW_MS,
    TENANT,
    Stores,
    a_mark,
    a_task,
    a_void,
    an_end,
    open_stores,
)
from tests.servers import installed

T = TypeVar("T")
PRICE = TenantPrice(TokenPrice(2, 0, 0, 0, 2))
"""The usage of ``task-5`` costs 60 by it."""
TABLES = ["entries", "grants", "holds", "settlements", "draws", "refunds", "trail"]
SETTLING = """INSERT INTO settlements (task_id, due, charged, absorbed, usage_source,
    created_ms, tenant_id) VALUES ({})"""


@pytest.fixture(params=BACKENDS)
async def stores(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Stores]:
    async with open_stores(request.param, tmp_path) as opened:
        yield opened


async def test_granted_credits_can_be_spent(stores: Stores) -> None:
    await stores.fund(0)

    after = await stores.ledger.grant(TENANT, 70, reference="inv-1", now_ms=NOW_MS)

    assert after == Balance(posted=70)
    assert await stores.balance() == after


async def test_a_repeated_grant_is_one_grant(stores: Stores) -> None:
    await stores.fund(0)

    balances = await asyncio.gather(
        *(
            stores.ledger.grant(TENANT, 70, reference="inv-1", now_ms=NOW_MS)
            for _ in range(20)
        )
    )

    assert set(balances) == {Balance(posted=70)}
    assert await stores.rows("SELECT COUNT(*), SUM(nanocredits) FROM entries") == [
        (2, 0)
    ]


async def test_a_reference_names_one_amount(stores: Stores) -> None:
    await stores.fund(0)
    await stores.ledger.grant(TENANT, 70, reference="inv-1", now_ms=NOW_MS)

    with pytest.raises(ConflictError, match=r"0\.00000007 credits"):
        await stores.ledger.grant(TENANT, 71, reference="inv-1", now_ms=NOW_MS)

    assert await stores.balance() == Balance(posted=70)


async def test_references_of_two_tenants_are_apart(stores: Stores) -> None:
    await stores.fund(70)
    await stores.fund(71, "t-2")

    assert await stores.balance("t-2") == Balance(posted=71)
    assert await stores.broken() == set()


@pytest.mark.parametrize("nanocredits", [0, -1])
async def test_a_grant_adds_something(stores: Stores, nanocredits: int) -> None:
    await stores.fund(5)

    with pytest.raises(InvalidRequestError):
        await stores.ledger.grant(TENANT, nanocredits, reference="x", now_ms=NOW_MS)

    assert await stores.balance() == Balance(posted=5)


async def test_a_balance_never_outgrows_its_integer(stores: Stores) -> None:
    await stores.fund(NANO_MAX)

    with pytest.raises(InvalidRequestError, match="at most"):
        await stores.ledger.grant(TENANT, 1, reference="more", now_ms=NOW_MS)

    assert await stores.balance() == Balance(posted=NANO_MAX)
    assert await stores.rows("SELECT COUNT(*) FROM grants") == [(1,)]


async def test_nobody_has_no_balance(stores: Stores) -> None:
    assert await stores.ledger.balance("nobody") is None
    with pytest.raises(NotFoundError):
        await stores.ledger.grant("nobody", 1, reference="x", now_ms=NOW_MS)


# --- rows that cannot be changed ---


async def lived_in(stores: Stores) -> None:
    """Leave one of everything: charged, voided, open, and charged beyond the hold."""
    await stores.fund(1_000)
    await stores.fund(100, "t-2")
    for task_id in ("task-1", "task-2", "task-3"):
        await stores.tasks.open(a_task(task_id))
    await stores.tasks.open(a_task("task-4", tenant_id="t-2"))
    await stores.tasks.finish(an_end("task-1"))
    await stores.tasks.finish(a_void("task-2"))
    await stores.tasks.finish(an_end("task-4", due_nanocredits=130))
    await grants_that_end(stores)
    await stores.change(
        """INSERT INTO cost_book VALUES
        ('task-1', 1, 'openai', 'gpt-image-2', 'cost', 'usage', 5, 0, 7, NULL)"""
    )


async def grants_that_end(stores: Stores) -> None:
    """Give a tenant a grant that is over, one that ends, a charge and a refund."""
    await stores.fund(0, "t-3")
    for reference, expires_ms in (("ended", NOW_MS + 5), ("ends", NOW_MS + 10_000)):
        grant = NewGrant("t-3", 100, reference, expires_ms)
        await stores.ledger.give(grant, a_mark(f"give {reference}"))
    await stores.ledger.expire(NOW_MS + 6, 10)
    await stores.tasks.open(a_task("task-5", tenant_id="t-3"))
    await stores.tasks.finish(
        an_end("task-5", usage=Usage(text_input=10, image_output=20), price=PRICE)
    )
    refund = NewRefund("t-3", "task-5", "r-1", 20)
    await stores.ledger.refund(refund, a_mark("refund"))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "sql", ["UPDATE {} SET {} = 0", "DELETE FROM {}"], ids=["update", "delete"]
)
async def test_what_is_booked_stays_booked(
    stores: Stores, table: str, sql: str
) -> None:
    await lived_in(stores)
    before = await stores.rows(f"SELECT * FROM {table}")

    when = "at_ms" if table == "trail" else "created_ms"
    with pytest.raises(StoreFailedError):
        await stores.change(sql.format(table, when))

    assert await stores.rows(f"SELECT * FROM {table}") == before != []


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE cost_book SET nanousd = 0",
        "DELETE FROM cost_book",
        "UPDATE accounts SET held = -1",
        "UPDATE accounts SET held = posted + 1",
        "UPDATE accounts SET spent = -1",
        "UPDATE tasks SET state = 'completed' WHERE id = 'task-3'",
        SETTLING.format("'task-3', 10, 5, 4, 'x', 0, 't-1'"),
        SETTLING.format("'task-1', 0, 0, 0, 'x', 0, 't-1'"),
        SETTLING.format("'ghost', 0, 0, 0, 'x', 0, 't-1'"),
    ],
)
async def test_the_schema_itself_refuses_what_is_wrong(
    stores: Stores, sql: str
) -> None:
    await lived_in(stores)

    with pytest.raises(StoreFailedError):
        await stores.change(sql)

    assert await stores.broken() == set()


# --- the audit ---


async def test_an_audit_says_what_it_looked_at(stores: Stores) -> None:
    await lived_in(stores)

    assert await stores.ledger.audit() == AuditReport(
        tenants=3, entries=19, holds_open=1, settlements=4, drifts=()
    )


async def test_an_empty_ledger_is_clean(stores: Stores) -> None:
    assert await stores.ledger.audit() == AuditReport(0, 0, 0, 0, ())


async def test_the_ledger_outlives_what_is_known_of_a_task(stores: Stores) -> None:
    await lived_in(stores)

    await stores.change("DELETE FROM tasks WHERE finished_ms IS NOT NULL")

    assert await stores.broken() == set()


PLANTED = {
    "every tenant has an account": (
        "t-1",
        "DELETE FROM accounts WHERE tenant_id = 't-1'",
    ),
    "posted is the sum of the tenant's entries": (
        "t-1",
        "UPDATE accounts SET posted = posted + 1 WHERE tenant_id = 't-1'",
    ),
    "held is the sum of the tenant's open holds": (
        "t-1",
        "UPDATE accounts SET held = held - 1 WHERE tenant_id = 't-1'",
    ),
    "spent is the sum of the tenant's charges less refunds": (
        "t-2",
        "UPDATE accounts SET spent = spent + 1 WHERE tenant_id = 't-2'",
    ),
    "a balance is never negative": (
        "t-1",
        "UPDATE accounts SET held = posted + 1 WHERE tenant_id = 't-1'",
    ),
    "all entries sum to zero": (
        "ledger",
        "UPDATE entries SET nanocredits = nanocredits + 1 WHERE account = 'absorbed'",
    ),
    "every transaction sums to zero": (
        "charge:task-1",
        """UPDATE entries SET nanocredits = nanocredits
            + CASE txn_id WHEN 'charge:task-1' THEN 1 ELSE -1 END
        WHERE account = 'revenue'""",
    ),
    "every entry is on a known account": (
        "tenant:ghost",
        "UPDATE entries SET account = 'tenant:ghost' WHERE account = 'tenant:t-2'",
    ),
    "a hold is settled once": (
        "task-1",
        # With its rules gone, a table takes what it is given.
        "INSERT INTO settlements SELECT * FROM settlements WHERE task_id = 'task-1'",
    ),
    "a settlement closes a hold": (
        "ghost",
        SETTLING.format("'ghost', 0, 0, 0, 'none', 0, 't-1'"),
    ),
    "charged and absorbed make up what is due": (
        "task-1",
        "UPDATE settlements SET due = due + 1 WHERE task_id = 'task-1'",
    ),
    "nothing is absorbed before the hold is used up": (
        "task-1",
        """UPDATE settlements SET charged = charged - 1, absorbed = 1
        WHERE task_id = 'task-1'""",
    ),
    "the tenant's entry is the charge": (
        "task-1",
        "DELETE FROM entries WHERE txn_id = 'charge:task-1'",
    ),
    "the revenue entry is what was due": (
        "task-4",
        "DELETE FROM entries WHERE txn_id = 'charge:task-4' AND account = 'revenue'",
    ),
    "every charge entry has its settlement": (
        "charge:task-1",
        "DELETE FROM settlements WHERE task_id = 'task-1'",
    ),
    "a grant is entered as it was made": (
        "t-1:first",
        "UPDATE grants SET nanocredits = nanocredits + 1 WHERE tenant_id = 't-1'",
    ),
    "every grant entry has its grant": (
        "grant:t-1:first",
        "DELETE FROM grants WHERE tenant_id = 't-1'",
    ),
    "a task has a hold": ("task-3", "DELETE FROM holds WHERE task_id = 'task-3'"),
    "an open hold belongs to a task": (
        "task-3",
        "DELETE FROM tasks WHERE id = 'task-3'",
    ),
    "a final task has no open hold": (
        "task-3",
        "UPDATE tasks SET state = 'completed', finished_ms = 1 WHERE id = 'task-3'",
    ),
    "a final task has no open attempt": (
        "task-1 #9",
        """INSERT INTO attempts (task_id, seq, offer_id, upstream, state,
            estimate_nanousd, started_ms)
        VALUES ('task-1', 9, 'a/b', 'a', 'sending', 7, 1)""",
    ),
    "a settled task is final": (
        "task-1",
        "UPDATE tasks SET state = 'processing', finished_ms = NULL WHERE id = 'task-1'",
    ),
    "a failed task costs nothing": (
        "task-1",
        "UPDATE tasks SET state = 'failed' WHERE id = 'task-1'",
    ),
    "what a key has used is the sum of its holds and charges": (
        "ghost total, tasks in flight: 0 expected, 2 found",
        "INSERT INTO key_use VALUES ('ghost', 'total', 7, 2)",
    ),
    "what is left of a grant is the grant less what was drawn": (
        "t-3:ends",
        "UPDATE lots SET nanocredits = nanocredits + 1",
    ),
    "what is kept of a grant that ends is of a grant that ends": (
        "t-3:ends",
        "UPDATE lots SET expires_ms = expires_ms + 1",
    ),
    "an account knows how many grants that end it has": (
        "t-3",
        "UPDATE accounts SET lots = 0 WHERE tenant_id = 't-3'",
    ),
    "a charge draws no more of grants that end than it is": (
        "charge:task-5",
        "UPDATE draws SET nanocredits = 61 WHERE kind = 'charge'",
    ),
    "what ended is entered as it was drawn": (
        "expiry:t-3:ended#1",
        "UPDATE draws SET nanocredits = nanocredits + 1 WHERE kind = 'expiry'",
    ),
    "every entry of an end has its draw": (
        "expiry:t-3:ended#1",
        "DELETE FROM draws WHERE kind = 'expiry'",
    ),
    "a webhook follows its settlement": (
        "evt_ghost_completed",
        """INSERT INTO deliveries (id, task_id, tenant_id, key_id, event, url, host,
            state, next_ms, created_ms)
        VALUES ('evt_ghost_completed', 'ghost', 't-1', 'key-1', 'task.completed',
            'https://x', 'x', 'pending', 0, 0)""",
    ),
    "a charge is what its usage costs": (
        "task-5",
        "UPDATE settlements SET text_input = text_input + 1 WHERE task_id = 'task-5'",
    ),
    "a task is charged once": (
        "task-1",
        """INSERT INTO entries (txn_id, account, nanocredits, kind, reference,
            created_ms)
        VALUES ('charge:task-1', 'tenant:t-2', -60, 'charge', 'task-1', 0)""",
    ),
    "refunds are at most the charge": (
        "task-5",
        "UPDATE refunds SET nanocredits = 61",
    ),
    "a refund is entered as it was made": (
        "t-3:r-1",
        "DELETE FROM entries WHERE kind = 'refund' AND account = 'tenant:t-3'",
    ),
    "every refund entry has its refund": ("refund:t-3:r-1", "DELETE FROM refunds"),
    "every cost has a source that is known": (
        "task-1 #9",
        """INSERT INTO cost_book (task_id, seq, upstream, variant, kind, source,
            nanousd, unknown_outcome, created_ms)
        VALUES ('task-1', 9, 'a', 'gpt-image-2', 'cost', 'guess', 7, 0, 1)""",
    ),
}
"""How each invariant is broken: (the subject the audit must name, the change)."""


@pytest.mark.parametrize("broken", PLANTED)
async def test_the_audit_finds_planted_corruption(stores: Stores, broken: str) -> None:
    await lived_in(stores)
    subject, sql = PLANTED[broken]

    if broken == "a hold is settled once":
        await stores.corrupt("ALTER TABLE settlements RENAME TO old_settlements")
        await stores.change("CREATE TABLE settlements AS SELECT * FROM old_settlements")
    await stores.corrupt(sql)

    assert (broken, subject) in await stores.broken()


WHOLE = "money is whole numbers"


async def test_every_invariant_has_been_broken_once() -> None:
    assert set(PLANTED) | {WHOLE} == {check.invariant for check in CHECKS}


async def test_every_rule_of_the_books_is_looked_at() -> None:
    assert {check.rule for check in CHECKS} == {f"I{n}" for n in range(1, 11)}


async def test_a_fraction_that_sqlite_would_keep_is_found(tmp_path: Path) -> None:
    async with open_stores("sqlite", tmp_path) as stores:
        await lived_in(stores)

        await stores.corrupt(
            "UPDATE holds SET nanocredits = 99.5 WHERE task_id = 'task-2'"
        )

        assert (WHOLE, "holds task-2") in await stores.broken()


async def test_the_audit_of_a_large_ledger_asks_nothing_row_by_row(
    tmp_path: Path,
) -> None:
    async with open_stores("postgres", tmp_path) as stores:
        plans = {
            check.invariant: await stores.database.read(partial(planned, check))
            for check in CHECKS
        }

    assert [name for name, plan in plans.items() if "SubPlan" in plan] == []
    assert all("Scan" in plan for plan in plans.values())


async def planned(check: Check, tx: Transaction) -> str:
    given = [f"'{param}'" for param in check.params]
    sql = re.sub(r"\$(\d+)", lambda found: given[int(found[1]) - 1], check.sql)
    return "\n".join(row[0] for row in await tx.all(f"EXPLAIN {sql}"))


async def test_a_drift_says_by_how_much(stores: Stores) -> None:
    await lived_in(stores)

    await stores.corrupt("UPDATE accounts SET posted = posted - 40 WHERE posted = 940")

    assert (await stores.ledger.audit()).drifts == (
        Drift(
            invariant="posted is the sum of the tenant's entries",
            subject="t-1",
            detail="expected 0.00000094, found 0.0000009",
            drift_nanocredits=-40,
            rule="I2",
        ),
    )


# --- the store against the pure rules ---

TENANTS = st.sampled_from(["t-1", "t-2"])
REFERENCES = st.sampled_from("abcdef")


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the store does as ``core.ledger`` says."""

    backend = ""
    tasks: Bundle[str] = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.exits = AsyncExitStack()
        self.stores = self.do(
            self.exits.enter_async_context(open_stores(self.backend, self.directory))
        )
        self.now_ms = NOW_MS
        self.marks = 0
        self.balances: dict[str, Balance] = {}
        self.grants: dict[tuple[str, str], tuple[int, int | None]] = {}
        self.lots: dict[tuple[str, str], Lot] = {}
        self.holds: dict[str, tuple[str, int]] = {}
        self.settled: dict[str, Settled] = {}
        self.refunds: dict[tuple[str, str], tuple[str, int]] = {}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def mark(self) -> Mark:
        self.marks += 1
        return a_mark(f"chg-{self.marks}", self.now_ms)

    @initialize()
    def two_tenants(self) -> None:
        for tenant_id in ("t-1", "t-2"):
            self.do(self.stores.fund(0, tenant_id))
            self.balances[tenant_id] = Balance()

    @rule(
        tenant_id=TENANTS,
        reference=REFERENCES,
        nanocredits=st.sampled_from([1, 100, 250]),
        ends_ms=st.sampled_from([None, None, NOW_MS + 20, NOW_MS + 40]),
    )
    def grant(
        self, tenant_id: str, reference: str, nanocredits: int, ends_ms: int | None
    ) -> None:
        grant = NewGrant(tenant_id, nanocredits, reference, ends_ms)
        giving = self.stores.ledger.give(grant, self.mark())
        before = self.balances[tenant_id]
        known = self.grants.get((tenant_id, reference))
        if known is not None and known != (nanocredits, ends_ms):
            with pytest.raises(ConflictError):
                self.do(giving)
            return
        if known is None:
            self.grants[tenant_id, reference] = (nanocredits, ends_ms)
            self.balances[tenant_id] = replace(
                before, posted=before.posted + nanocredits
            )
            if ends_ms is not None:
                lot = Lot(reference, ends_ms, nanocredits)
                self.lots[tenant_id, reference] = lot
        assert self.do(giving) == self.balances[tenant_id]

    @rule(target=tasks, tenant_id=TENANTS, nanocredits=st.integers(1, 150))
    def open(self, tenant_id: str, nanocredits: int) -> str:
        task_id = f"task-{len(self.holds)}"
        task = a_task(task_id, tenant_id=tenant_id, hold_nanocredits=nanocredits)
        after = hold(self.balances[tenant_id], nanocredits)
        if after is None:
            with pytest.raises(InsufficientCreditsError):
                self.do(self.stores.tasks.open(task))
            return "refused"
        self.do(self.stores.tasks.open(task))
        self.balances[tenant_id] = after
        self.holds[task_id] = (tenant_id, nanocredits)
        return task_id

    @precondition(lambda self: self.holds)
    @rule(task_id=tasks, due=st.integers(0, 400), again=st.booleans())
    def finish(self, task_id: str, due: int, again: bool) -> None:
        end = an_end(task_id, due_nanocredits=due) if due else a_void(task_id)
        if task_id not in self.holds:
            with pytest.raises(NotFoundError):
                self.do(self.stores.tasks.finish(end))
            return
        if task_id not in self.settled:
            tenant_id, held = self.holds[task_id]
            self.balances[tenant_id], settled = settle(
                self.balances[tenant_id], held, due
            )
            self.settled[task_id] = settled
            mine = [lot for (owner, _), lot in self.lots.items() if owner == tenant_id]
            for reference, part in drawn(mine, settled.charged).items():
                self.draw(tenant_id, reference, part)
        assert self.do(self.stores.tasks.finish(end)) == self.settled[task_id]
        if again:
            assert self.do(self.stores.tasks.finish(end)) == self.settled[task_id]

    @precondition(lambda self: self.settled)
    @rule(
        task_id=tasks,
        reference=REFERENCES,
        nanocredits=st.one_of(st.none(), st.integers(1, 200)),
    )
    def refund(self, task_id: str, reference: str, nanocredits: int | None) -> None:
        tenant_id = self.holds[task_id][0] if task_id in self.holds else "t-1"
        asked = NewRefund(tenant_id, task_id, reference, nanocredits)
        refunding = self.stores.ledger.refund(asked, self.mark())
        known = self.refunds.get((tenant_id, reference))
        if task_id not in self.settled:
            with pytest.raises(NotFoundError):
                self.do(refunding)
            return
        charged = self.settled[task_id].charged
        left = charged - sum(n for task, n in self.refunds.values() if task == task_id)
        amount = left if nanocredits is None else nanocredits
        replayed = known is not None and known[0] == task_id
        replayed = replayed and known is not None and nanocredits in {None, known[1]}
        if not replayed and (known is not None or not 0 < amount <= left):
            with pytest.raises(ConflictError):
                self.do(refunding)
            return
        if not replayed:
            self.refunds[tenant_id, reference] = (task_id, amount)
            self.balances[tenant_id] = refund(self.balances[tenant_id], amount)
        assert self.do(refunding) == self.balances[tenant_id]

    @rule(by_ms=st.sampled_from([1, 15, 30]))
    def time_passes(self, by_ms: int) -> None:
        self.now_ms += by_ms

    @rule()
    def expire(self) -> None:
        due = [key for key, lot in self.lots.items() if lot.expires_ms <= self.now_ms]
        wanted = {}
        for tenant_id, reference in sorted(
            due, key=lambda key: (self.lots[key].expires_ms, key)
        ):
            lot = self.lots[tenant_id, reference]
            before = self.balances[tenant_id]
            part = expired(before, lot)
            if part:
                wanted[tenant_id, reference] = part
                self.balances[tenant_id] = replace(before, posted=before.posted - part)
                self.draw(tenant_id, reference, part)
        found = self.do(self.stores.ledger.expire(self.now_ms, 100))
        assert {(e.tenant_id, e.reference): e.nanocredits for e in found} == wanted

    def draw(self, tenant_id: str, reference: str, part: int) -> None:
        lot = self.lots.pop((tenant_id, reference))
        if part < lot.nanocredits:
            left = replace(lot, nanocredits=lot.nanocredits - part)
            self.lots[tenant_id, reference] = left

    @rule()
    def crash(self) -> None:
        self.do(self.stores.reopen())

    @invariant()
    def balances_agree(self) -> None:
        for tenant_id, balance in self.balances.items():
            assert self.do(self.stores.balance(tenant_id)) == balance
            grants = self.do(self.stores.ledger.grants(tenant_id, offset=0, limit=99))
            left = {g.reference: g.left_nanocredits for g in grants if g.expires_ms}
            assert {name: n for name, n in left.items() if n} == {
                lot.reference: lot.nanocredits
                for (owner, _), lot in self.lots.items()
                if owner == tenant_id
            }

    def teardown(self) -> None:
        try:
            report = self.do(self.stores.ledger.audit())
            assert report.drifts == ()
            assert report.settlements == len(self.settled)
            assert report.holds_open == len(self.holds) - len(self.settled)
        finally:
            self.do(self.exits.aclose())
            self.runner.close()
            shutil.rmtree(self.directory)


class SqliteLedgerMachine(LedgerMachine):
    """The machine over SQLite."""

    backend = "sqlite"


class PostgresLedgerMachine(LedgerMachine):
    """The machine over PostgreSQL."""

    backend = "postgres"


@pytest.mark.timeout(7_200)
@pytest.mark.parametrize(
    ("machine", "runs"), [(SqliteLedgerMachine, 25), (PostgresLedgerMachine, 6)]
)
def test_the_books_are_as_the_rules_say(
    machine: type[LedgerMachine], runs: int, whole: bool
) -> None:
    if machine is PostgresLedgerMachine and installed("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=1_000 if whole else runs,
            stateful_step_count=50 if whole else 30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
