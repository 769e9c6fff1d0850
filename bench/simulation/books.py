"""The truth in memory, by the rules of ``core.ledger``, for a million tasks and more.

Only what is still open is kept whole. What is over lives on in sums, and the audit
adds these up in other ways than they were booked.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.core import ledger, limits
from gateway.core.errors import InsufficientCreditsError
from gateway.core.ledger import Balance, Settled
from gateway.core.limits import REBUY_WINDOW_MS, RiskBook
from gateway.core.money import decimal_text
from gateway.ports import (
    AttemptEnd,
    AuditReport,
    Drift,
    Earlier,
    NewAttempt,
    NewTask,
    Rebuy,
    TaskEnd,
    TaskRecord,
)
from providers.kit.contract import Billed, FailureKind

BUCKET_MS = 60_000


@dataclass(slots=True)
class _Open:
    """A task that holds credits."""

    hold_nanocredits: int
    attempts: dict[int, NewAttempt] = field(default_factory=dict)


@dataclass(slots=True)
class _Spend:
    """What was spent in one minute."""

    minute: int
    rebuys: int = 0
    risked_nanousd: int = 0
    spent_nanousd: int = 0


@dataclass(slots=True)
class Books:
    """A ``TaskStore`` and ``Ledger`` of one tenant; every call is one transaction."""

    tenant_id: str
    balance_now: Balance = field(default_factory=Balance)
    accounts: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    opened: int = 0
    settlements: int = 0
    settled_again: int = 0
    charged_nanocredits: int = 0
    granted_nanocredits: int = 0
    cost_nanousd: int = 0
    waste_nanousd: int = 0
    unknown_outcomes: int = 0
    _open: dict[str, _Open] = field(default_factory=dict)
    _day: deque[_Spend] = field(default_factory=deque)

    async def grant(
        self, tenant_id: str, nanocredits: int, *, reference: str, now_ms: int
    ) -> Balance:
        """See ``Ledger``; granted once, at the start."""
        assert not self.granted_nanocredits, reference
        self.granted_nanocredits = nanocredits
        self._write(ledger.grant_entries(tenant_id, nanocredits))
        self.balance_now = Balance(posted=self.balance_now.posted + nanocredits)
        return self.balance_now

    def remember_spend(self, nanousd: int, now_ms: int) -> None:
        """Note what was spent in the 24 h before; the sums do not count it."""
        self._day.append(_Spend(now_ms // BUCKET_MS, spent_nanousd=nanousd))

    async def balance(self, tenant_id: str) -> Balance | None:
        """See ``Ledger``."""
        return self.balance_now if tenant_id == self.tenant_id else None

    async def open(self, task: NewTask) -> str | None:
        """See ``TaskStore``."""
        assert task.id not in self._open, task.id
        after = ledger.hold(self.balance_now, task.hold_nanocredits)
        if after is None:
            raise InsufficientCreditsError("the simulated tenant is out of credits")
        self.balance_now = after
        self._open[task.id] = _Open(task.hold_nanocredits)
        self.opened += 1
        return None

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        """See ``TaskStore``."""
        self._open[attempt.task_id].attempts[attempt.seq] = attempt

    async def accept_attempt(
        self,
        task_id: str,
        seq: int,
        job_id: str,
        order_json: str | None = None,
        *,
        fence: int = 0,
    ) -> None:
        """See ``TaskStore``; the simulated upstreams answer at once or not at all."""
        raise AssertionError(job_id)

    async def end_attempt(self, end: AttemptEnd) -> None:
        """See ``TaskStore``."""
        del self._open[end.task_id].attempts[end.seq]
        self._spend(end)

    async def finish(self, end: TaskEnd) -> Settled:
        """See ``TaskStore``. A task that is over, or never was, is a drift."""
        task = self._open.pop(end.task_id, None)
        if task is None:
            self.settled_again += 1
            return Settled(charged=0)
        for attempt in end.attempts:
            del task.attempts[attempt.seq]
            self._spend(attempt)
        assert not task.attempts, task
        self.balance_now, settled = ledger.settle(
            self.balance_now, task.hold_nanocredits, end.due_nanocredits
        )
        self._write(ledger.settlement_entries(self.tenant_id, settled))
        self.settlements += 1
        self.charged_nanocredits += settled.charged
        return settled

    async def rebuy(self, rebuy: Rebuy, since_ms: int) -> bool:
        """See ``TaskStore``; to the minute."""
        live = [s for s in self._day if s.minute >= since_ms // BUCKET_MS]
        book = RiskBook(
            sum(s.rebuys for s in live),
            sum(s.risked_nanousd for s in live),
            sum(s.spent_nanousd for s in live),
        )
        allowed = limits.may_rebuy(book, rebuy.risked_nanousd)
        if allowed:
            now = self._minute(rebuy.created_ms)
            now.rebuys += 1
            now.risked_nanousd += rebuy.risked_nanousd
        return allowed

    async def audit(self) -> AuditReport:
        """See ``Ledger``."""
        mine = ledger.tenant_account(self.tenant_id)
        now = self.balance_now
        held = sum(task.hold_nanocredits for task in self._open.values())
        checks = {
            "all entries sum to zero": (0, sum(self.accounts.values())),
            "the balance is the sum of its entries": (self.accounts[mine], now.posted),
            "held is the sum of open holds": (held, now.held),
            "spent is the sum of charges": (self.charged_nanocredits, now.spent),
            "what was granted is there or spent": (
                self.granted_nanocredits,
                now.posted + now.spent,
            ),
            "one settlement per hold": (
                self.opened,
                self.settlements + len(self._open),
            ),
            "nothing is settled twice": (0, self.settled_again),
        }
        return AuditReport(
            tenants=1,
            entries=self.entries,
            holds_open=len(self._open),
            settlements=self.settlements,
            drifts=tuple(
                Drift(
                    name,
                    mine,
                    f"expected {decimal_text(want)}, found {decimal_text(found)}",
                    found - want,
                )
                for name, (want, found) in checks.items()
                if found != want
            ),
        )

    async def earlier(self, wanted: Earlier) -> str | None:
        """See ``TaskStore``; nobody repeats a request here."""
        raise AssertionError(wanted)

    async def forget_keys(self, before_ms: int) -> int:
        """See ``TaskStore``; there are no keys."""
        raise AssertionError(before_ms)

    async def get(self, task_id: str) -> TaskRecord | None:
        """See ``TaskStore``; nobody reads a task here."""
        raise AssertionError(task_id)

    async def unfinished(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``; no process dies here."""
        raise AssertionError(limit)

    async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
        """See ``TaskStore``; no process dies here."""
        raise AssertionError(limit)

    async def take_up_overdue(self, before_ms: int) -> int:
        """See ``TaskStore``; no process dies here."""
        raise AssertionError(before_ms)

    def _write(self, lines: dict[str, int]) -> None:
        self.accounts.update(lines)
        self.entries += len(lines)

    def _minute(self, now_ms: int) -> _Spend:
        minute = now_ms // BUCKET_MS
        if not self._day or self._day[-1].minute != minute:
            self._day.append(_Spend(minute))
            oldest = minute - REBUY_WINDOW_MS // BUCKET_MS
            while self._day[0].minute < oldest:
                self._day.popleft()
        return self._day[-1]

    def _spend(self, end: AttemptEnd) -> None:
        timeout = end.kind == FailureKind.TIMEOUT.value
        self.unknown_outcomes += end.billed is Billed.MAYBE and timeout
        self._minute(end.finished_ms).spent_nanousd += end.cost_nanousd
        self.cost_nanousd += end.cost_nanousd
        self.waste_nanousd += 0 if end.won else end.cost_nanousd
