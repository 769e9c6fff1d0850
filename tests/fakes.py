"""Working stand-ins for the ports: plain memory, no mocks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Literal

from gateway.core import ledger
from gateway.core.errors import InsufficientCreditsError, ServiceUnavailableError
from gateway.core.events import Event
from gateway.core.key_limits import KeyUse
from gateway.core.ledger import Balance, Settled
from gateway.core.limits import RiskBook, may_rebuy
from gateway.core.tasks import AttemptState, TaskState
from gateway.ports import (
    AttemptEnd,
    AttemptRecord,
    AuditReport,
    Earlier,
    Key,
    KeyMark,
    NewAttempt,
    NewTask,
    OpenBlob,
    Rebuy,
    Succession,
    TaskEnd,
    TaskRecord,
    Tenant,
)
from providers.kit.contract import (
    Billed,
    Cancelled,
    Capabilities,
    Done,
    ImageJob,
    MadeImage,
    Operation,
    Partial,
    Payload,
    Pending,
    ProviderError,
    Usage,
)


class FakeEvents:
    """Keeps what was emitted."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    def emit(self, event: Event) -> None:
        self.seen.append(event)


class FakeChance:
    """Counts up, and always draws the middle."""

    def __init__(self) -> None:
        self._count = 0

    def token(self, alphabet: str, length: int) -> str:
        self._count += 1
        digits, rest = "", self._count
        for _ in range(length):
            rest, digit = divmod(rest, len(alphabet))
            digits = alphabet[digit] + digits
        return digits

    def fraction(self) -> float:
        return 0.5


@dataclass
class StillClock:
    """Stands still until a test moves it; keeps what it was asked to wait."""

    at_ms: int = 1_790_000_000_000
    slept_s: list[float] = field(default_factory=list)

    def now_ms(self) -> int:
        return self.at_ms

    def monotonic_ms(self) -> int:
        return self.at_ms

    async def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)


@dataclass
class FakePayload:
    """A picture in memory that knows whether it was closed."""

    content: bytes
    encoding: Literal["base64", "raw"] = "raw"
    closed: bool = False

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def chunks(self) -> Iterator[bytes]:
        assert not self.closed
        yield self.content

    def persist(self, path: str) -> None:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(self.content)

    def close(self) -> None:
        self.closed = True


Step = Done | Pending | ProviderError | Callable[[ImageJob], Awaitable[Done | Pending]]


class ScriptedProvider:
    """Answers each call with the next line of its script; the last one repeats."""

    def __init__(self, *script: Step, n_max: int = 10) -> None:
        self._script = deque(script)
        self._n_max = n_max
        self.jobs: list[ImageJob] = []
        self.polled: list[str] = []
        self.streams = False
        self.can_stop = False
        self.idempotent: frozenset[Operation] = frozenset()
        self.stops: Cancelled | None = None
        self.stop_fails: ProviderError | None = None
        self.stopped: list[str] = []
        self.probe_ends: ProviderError | Literal["ok"] | None = "ok"
        self.probed: list[str] = []

    def capabilities(self, model: str) -> Capabilities:
        return Capabilities(
            n_max=self._n_max,
            stream=self.streams,
            cancel=self.can_stop,
            idempotent=self.idempotent,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        self.jobs.append(job)
        return await self._next(job)

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        self.polled.append(job_id)
        return await self._next(job)

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        self.stopped.append(job_id)
        if self.stop_fails is not None:
            raise self.stop_fails
        return self.stops

    async def probe(self, model: str, deadline_s: float) -> None:
        self.probed.append(model)
        if self.probe_ends is None:
            await asyncio.sleep(2 * deadline_s)
        elif isinstance(self.probe_ends, ProviderError):
            raise self.probe_ends

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        self.jobs.append(job)
        for index in range(job.partial_images):
            yield Partial(index, a_picture(b"a glimpse"))
        step = await self._next(job)
        assert isinstance(step, Done)
        yield step

    async def close(self) -> None:
        return

    async def _next(self, job: ImageJob) -> Done | Pending:
        step = self._script.popleft() if len(self._script) > 1 else self._script[0]
        if isinstance(step, ProviderError):
            raise step
        if isinstance(step, Done | Pending):
            return step
        return await step(job)


@dataclass
class FakeProcesses:
    """A ``Processes`` that remembers who is there."""

    seen: dict[str, int] = field(default_factory=dict)

    async def beat(self, process_id: str, *, now_ms: int) -> None:
        self.seen[process_id] = now_ms

    async def leave(self, process_id: str) -> None:
        self.seen.pop(process_id, None)

    async def clear(self) -> None:
        self.seen.clear()

    async def forget_lost(self, *, before_ms: int, but: str) -> int:
        late = [p for p, ms in self.seen.items() if ms < before_ms and p != but]
        for process_id in late:
            del self.seen[process_id]
        return 0


@dataclass
class MemoryAccounts:
    """An ``Accounts`` of keys; what they have used is what a test says."""

    by_id: dict[str, Key] = field(default_factory=dict)
    use: KeyUse = field(default_factory=lambda: KeyUse("2026-11-25"))
    reads: int = 0

    async def add_tenant(self, tenant: Tenant, *, now_ms: int) -> None:
        raise AssertionError(tenant)

    async def tenant_named(self, name: str) -> Tenant | None:
        raise AssertionError(name)

    async def tenants(self) -> Sequence[tuple[Tenant, Balance]]:
        raise AssertionError

    async def add_key(self, key: Key, mark: KeyMark | None = None) -> None:
        del mark
        self.by_id[key.id] = key

    async def key_by_digest(self, digest: bytes) -> Key | None:
        self.reads += 1
        found = (key for key in self.by_id.values() if key.digest == digest)
        return next(found, None)

    async def key(self, key_id: str) -> Key | None:
        return self.by_id.get(key_id)

    async def keys(self, tenant_id: str) -> Sequence[Key]:
        return [key for key in self.by_id.values() if key.tenant_id == tenant_id]

    async def keys_page(
        self, tenant_id: str | None, *, offset: int, limit: int
    ) -> tuple[int, Sequence[Key]]:
        found = [k for k in self.by_id.values() if tenant_id in {None, k.tenant_id}]
        return len(found), found[::-1][offset : offset + limit]

    async def change_key(
        self, key_id: str, change: Callable[[Key], Key], mark: KeyMark | None = None
    ) -> Key | None:
        del mark
        if key_id not in self.by_id:
            return None
        self.by_id[key_id] = change(self.by_id[key_id])
        return self.by_id[key_id]

    async def rotate_key(
        self,
        key_id: str,
        rotate: Callable[[Key, Sequence[Key]], Succession],
        mark: KeyMark | None = None,
    ) -> Succession | None:
        del mark
        key = self.by_id.get(key_id)
        if key is None:
            return None
        family = [k for k in self.by_id.values() if k.meter == key.meter]
        done = rotate(key, family)
        self.by_id |= {done.before.id: done.before, done.after.id: done.after}
        return done

    async def key_use(self, key_id: str) -> KeyUse | None:
        return self.use if key_id in self.by_id else None

    async def revoke_key(
        self, key_id: str, *, now_ms: int, mark: KeyMark | None = None
    ) -> bool:
        del mark
        key = self.by_id.get(key_id)
        if key is None:
            return False
        if key.revoked_ms is None:
            self.by_id[key_id] = replace(key, revoked_ms=now_ms)
        return True


@dataclass
class MemoryStore:
    """A ``TaskStore`` for one tenant, by the rules of ``core.ledger``."""

    balance: Balance = field(default_factory=Balance)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    trail: list[str] = field(default_factory=list)
    risk: RiskBook = field(default_factory=lambda: RiskBook(0, 0, 0))
    waste_nanousd: int = 0
    keys_forgotten: list[str] = field(default_factory=list)
    """Ids of the tasks that let their idempotency keys go."""
    refuse_to_finish: list[Exception] = field(default_factory=list)
    refuse_to_end: list[Exception] = field(default_factory=list)
    refuse_to_begin: list[bool] = field(default_factory=list)

    async def open(self, task: NewTask) -> str | None:
        after = ledger.hold(self.balance, task.hold_nanocredits)
        if after is None:
            raise InsufficientCreditsError("not enough")
        self.balance = after
        self.trail.append(f"open {task.id}")
        self.tasks[task.id] = TaskRecord(
            id=task.id,
            tenant_id=task.tenant_id,
            key_id=task.key_id,
            variant=task.variant,
            operation=task.operation,
            mode=task.mode,
            state=TaskState.PENDING,
            request_json=task.request_json,
            route_json=None,
            answer_json=None,
            error_json=None,
            usage=None,
            usage_source=None,
            hold_nanocredits=task.hold_nanocredits,
            charged_nanocredits=None,
            absorbed_nanocredits=None,
            created_ms=task.created_ms,
            deadline_ms=task.deadline_ms,
            finished_ms=None,
            attempts=(),
            results=(),
        )
        return None

    async def earlier(self, wanted: Earlier) -> str | None:
        raise AssertionError(wanted)

    async def forget_keys(self, before_ms: int) -> int:
        raise AssertionError(before_ms)

    async def begin_attempt(
        self, attempt: NewAttempt, route_json: str | None = None
    ) -> None:
        if self.refuse_to_begin and self.refuse_to_begin.pop(0):
            raise ServiceUnavailableError("busy")
        self.trail.append(f"sending {attempt.offer_id}")
        task = self.tasks.get(attempt.task_id)
        if task is None:
            return
        begun = AttemptRecord(
            seq=attempt.seq,
            offer_id=attempt.offer_id,
            upstream=attempt.upstream,
            state=AttemptState.SENDING,
            estimate_nanousd=attempt.estimate_nanousd,
            started_ms=attempt.started_ms,
            finished_ms=None,
            job_id=None,
            kind=None,
            upstream_status=None,
            upstream_code=None,
            detail=None,
            billed=None,
            cost_nanousd=0,
            n=attempt.n,
        )
        self.tasks[task.id] = replace(
            task,
            state=TaskState.PROCESSING,
            attempts=(*task.attempts, begun),
            route_json=route_json or task.route_json,
        )

    async def accept_attempt(
        self,
        task_id: str,
        seq: int,
        job_id: str,
        order_json: str | None = None,
        *,
        fence: int = 0,
    ) -> None:
        self.trail.append(f"accepted {job_id}")
        task = self.tasks.get(task_id)
        if task is not None:
            attempts = tuple(
                replace(a, job_id=job_id) if a.seq == seq else a for a in task.attempts
            )
            self.tasks[task_id] = replace(task, attempts=attempts)

    async def end_attempt(self, end: AttemptEnd) -> None:
        if self.refuse_to_end:
            raise self.refuse_to_end.pop(0)
        self.trail.append(f"{end.state.value} {end.kind or 'won'}")
        self._end(end)

    def _end(self, end: AttemptEnd) -> None:
        if not end.won:
            self.waste_nanousd += end.cost_nanousd
        self.risk = replace(
            self.risk, spent_nanousd=self.risk.spent_nanousd + end.cost_nanousd
        )
        self._note_end(end)

    async def finish(self, end: TaskEnd) -> Settled:
        assert all(attempt.fence == end.fence for attempt in end.attempts), end
        if self.refuse_to_finish:
            raise self.refuse_to_finish.pop(0)
        task = self.tasks[end.task_id]
        if task.state.final:
            return Settled(
                task.charged_nanocredits or 0,
                task.absorbed_nanocredits or 0,
                again=True,
            )
        self.trail.append(f"finish {end.state.value}")
        if end.forget_key:
            self.keys_forgotten.append(end.task_id)
        self.balance, settled = ledger.settle(
            self.balance, task.hold_nanocredits, end.due_nanocredits
        )
        self.tasks[task.id] = replace(
            task,
            state=end.state,
            finished_ms=end.finished_ms,
            usage=end.usage,
            usage_source=end.usage_source,
            answer_json=end.answer_json,
            error_json=end.error_json,
            route_json=end.route_json or task.route_json,
            charged_nanocredits=settled.charged,
            absorbed_nanocredits=settled.absorbed,
            results=end.results,
        )
        for attempt in end.attempts:
            self._end(attempt)
        for open_still in self.tasks[task.id].attempts:
            if open_still.finished_ms is None:
                self._end(_forgotten(end, open_still))
        return settled

    async def get(self, task_id: str) -> TaskRecord | None:
        return self.tasks.get(task_id)

    async def unfinished(self, limit: int) -> Sequence[TaskRecord]:
        return [t for t in self.tasks.values() if not t.state.final][:limit]

    async def take_up_overdue(self, before_ms: int) -> int:
        return 0

    async def orphaned(self, limit: int) -> Sequence[TaskRecord]:
        return await self.unfinished(limit)

    async def rebuy(self, rebuy: Rebuy, since_ms: int) -> bool:
        allowed = may_rebuy(self.risk, rebuy.risked_nanousd)
        if allowed:
            risked_nanousd = self.risk.risked_nanousd + rebuy.risked_nanousd
            self.risk = replace(
                self.risk, rebuys=self.risk.rebuys + 1, risked_nanousd=risked_nanousd
            )
        return allowed

    def _note_end(self, end: AttemptEnd) -> None:
        task = self.tasks.get(end.task_id)
        if task is None:
            return
        self.tasks[task.id] = replace(
            task,
            attempts=tuple(
                replace(
                    attempt,
                    state=end.state,
                    kind=end.kind,
                    billed=end.billed.value,
                    cost_nanousd=end.cost_nanousd,
                    finished_ms=end.finished_ms,
                )
                if attempt.seq == end.seq and attempt.finished_ms is None
                else attempt
                for attempt in task.attempts
            ),
        )


def _forgotten(end: TaskEnd, attempt: AttemptRecord) -> AttemptEnd:
    return AttemptEnd(
        task_id=end.task_id,
        seq=attempt.seq,
        state=AttemptState.FAILED,
        finished_ms=end.finished_ms,
        won=False,
        billed=Billed.MAYBE,
        cost_nanousd=attempt.estimate_nanousd,
        cost_source="estimate",
        kind="timeout",
    )


@dataclass
class MemoryDrains:
    """``Drains`` in a dictionary."""

    kept: dict[str, int] = field(default_factory=dict)

    async def drained(self) -> Mapping[str, int]:
        return dict(self.kept)

    async def drain(self, upstream: str, *, now_ms: int) -> None:
        self.kept.setdefault(upstream, now_ms)

    async def enable(self, upstream: str) -> None:
        self.kept.pop(upstream, None)


@dataclass
class OneBalance:
    """The ``Ledger`` of a ``MemoryStore``'s only tenant."""

    store: MemoryStore

    async def grant(
        self, tenant_id: str, nanocredits: int, *, reference: str, now_ms: int
    ) -> Balance:
        raise AssertionError(tenant_id)

    async def balance(self, tenant_id: str) -> Balance | None:
        return self.store.balance

    async def audit(self) -> AuditReport:
        raise AssertionError


class RelabellingStudio:
    """Converts by changing the label, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int | None]] = []

    async def convert(
        self, image: MadeImage, output_format: str, compression: int | None
    ) -> MadeImage | None:
        self.asked.append((output_format, compression))
        content = b"".join(image.payload.chunks())
        return replace(
            image,
            payload=FakePayload(content),
            media_type=f"image/{output_format}",
        )


@dataclass
class MemoryBlob:
    """A stored file, open."""

    content: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    async def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]

    def close(self) -> None:
        return


@dataclass
class MemoryBlobs:
    """A ``BlobStore`` in a dictionary; can be told to be full."""

    kept: dict[str, bytes] = field(default_factory=dict)
    full: Exception | None = None

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        if self.full is not None:
            raise self.full
        self.kept[blob] = b"".join(image.payload.chunks())
        return len(self.kept[blob])

    async def keep_file(self, blob: str, content: Payload) -> int:
        self.kept[blob] = b"".join(content.chunks())
        return len(self.kept[blob])

    async def open(self, blob: str) -> OpenBlob | None:
        return MemoryBlob(self.kept[blob]) if blob in self.kept else None

    async def delete(self, blob: str) -> None:
        self.kept.pop(blob, None)

    async def exists(self, blob: str) -> bool:
        return blob in self.kept

    async def expire(self, before_ms: int) -> int:
        return 0


def a_picture(content: bytes = b"a picture") -> MadeImage:
    return MadeImage(FakePayload(content), "image/png", 1024, 1024)


def delivered(images: int = 1, usage: Usage | None = None) -> Done:
    return Done(images=tuple(a_picture() for _ in range(images)), usage=usage)
