"""What every ledger must do: grants, balances, and an audit that misses nothing."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
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
)

from gateway.adapters.sql.database import StoreFailedError
from gateway.adapters.sql.ledger import CHECKS
from gateway.core.errors import (
    ConflictError,
    InsufficientCreditsError,
    InvalidRequestError,
    NotFoundError,
)
from gateway.core.ledger import Balance, Settled, hold, settle
from gateway.core.money import NANO_MAX
from gateway.ports import AuditReport, Drift
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

T = TypeVar("T")
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
    await stores.change(
        """INSERT INTO cost_book VALUES
        ('task-1', 1, 'openai', 'gpt-image-2', 'cost', 'usage', 5, 0, 7)"""
    )


@pytest.mark.parametrize("table", ["entries", "grants", "holds", "settlements"])
@pytest.mark.parametrize(
    "sql", ["UPDATE {} SET created_ms = 0", "DELETE FROM {}"], ids=["update", "delete"]
)
async def test_what_is_booked_stays_booked(
    stores: Stores, table: str, sql: str
) -> None:
    await lived_in(stores)
    before = await stores.rows(f"SELECT * FROM {table}")

    with pytest.raises(StoreFailedError):
        await stores.change(sql.format(table))

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
        tenants=2, entries=9, holds_open=1, settlements=3, drifts=()
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
    "spent is the sum of the tenant's charges": (
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


async def test_every_invariant_has_been_broken_once() -> None:
    assert set(PLANTED) == {check.invariant for check in CHECKS}


async def test_a_drift_says_by_how_much(stores: Stores) -> None:
    await lived_in(stores)

    await stores.corrupt("UPDATE accounts SET posted = posted - 40 WHERE posted = 940")

    assert (await stores.ledger.audit()).drifts == (
        Drift(
            invariant="posted is the sum of the tenant's entries",
            subject="t-1",
            detail="expected 0.00000094, found 0.0000009",
            drift_nanocredits=-40,
        ),
    )


# --- the store against the pure rules ---


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
        self.balances: dict[str, Balance] = {}
        self.grants: dict[tuple[str, str], int] = {}
        self.holds: dict[str, tuple[str, int]] = {}
        self.settled: dict[str, Settled] = {}

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def two_tenants(self) -> None:
        for tenant_id in ("t-1", "t-2"):
            self.do(self.stores.fund(0, tenant_id))
            self.balances[tenant_id] = Balance()

    @rule(
        tenant_id=st.sampled_from(["t-1", "t-2"]),
        reference=st.sampled_from("abcdef"),
        nanocredits=st.sampled_from([1, 100, 250]),
    )
    def grant(self, tenant_id: str, reference: str, nanocredits: int) -> None:
        granting = self.stores.ledger.grant(
            tenant_id, nanocredits, reference=reference, now_ms=NOW_MS
        )
        earlier = self.grants.setdefault((tenant_id, reference), 0)
        if earlier not in {0, nanocredits}:
            with pytest.raises(ConflictError):
                self.do(granting)
            return
        before = self.balances[tenant_id]
        self.grants[tenant_id, reference] = nanocredits
        self.balances[tenant_id] = replace(
            before, posted=before.posted + nanocredits - earlier
        )
        assert self.do(granting) == self.balances[tenant_id]

    @rule(
        target=tasks,
        tenant_id=st.sampled_from(["t-1", "t-2"]),
        nanocredits=st.integers(1, 150),
    )
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
    @rule(task_id=tasks, due=st.integers(0, 400))
    def finish(self, task_id: str, due: int) -> None:
        end = an_end(task_id, due_nanocredits=due) if due else a_void(task_id)
        if task_id not in self.holds:
            with pytest.raises(NotFoundError):
                self.do(self.stores.tasks.finish(end))
            return
        if task_id not in self.settled:
            tenant_id, held = self.holds[task_id]
            self.balances[tenant_id], self.settled[task_id] = settle(
                self.balances[tenant_id], held, due
            )
        assert self.do(self.stores.tasks.finish(end)) == self.settled[task_id]

    @rule()
    def reopen(self) -> None:
        self.do(self.stores.reopen())

    @invariant()
    def balances_agree(self) -> None:
        for tenant_id, balance in self.balances.items():
            assert self.do(self.stores.balance(tenant_id)) == balance

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


TestSqliteLedger = SqliteLedgerMachine.TestCase
TestSqliteLedger.settings = settings(
    max_examples=30,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
