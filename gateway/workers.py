"""Supervised work: tasks that outlive their request, and loops that keep house."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from gateway.core.errors import GatewayError, ServiceUnavailableError
from gateway.flows.generate import Accepted, Generate
from gateway.flows.tasks import TaskView
from gateway.ports import Clock
from providers.kit.contract import Partial

IN_FLIGHT_MAX_TASKS = 2_000
DRAIN_MAX_S = 180.0

Crashed = Callable[[BaseException, str], None]


@dataclass(slots=True)
class TaskRunner:
    """Carries tasks out to their end, whoever waits for them."""

    generate: Generate
    crashed: Crashed
    _running: set[asyncio.Task[TaskView]] = field(default_factory=set)

    def start(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None = None,
    ) -> asyncio.Task[TaskView]:
        """Start carrying a task out."""
        work = asyncio.create_task(
            self._guarded(accepted, on_partial=on_partial, links=links)
        )
        self._running.add(work)
        work.add_done_callback(self._over)
        return work

    @property
    def in_flight(self) -> int:
        """How many tasks are under way."""
        return len(self._running)

    def check_room(self) -> None:
        """Refuse new work while as much as may be is under way.

        Raises:
            ServiceUnavailableError: too many tasks are under way.
        """
        if len(self._running) >= IN_FLIGHT_MAX_TASKS:
            raise ServiceUnavailableError(
                "The gateway is working on as many requests as it may. Try again "
                "after the time in Retry-After.",
                code="overloaded",
                retry_after_s=5,
            )

    async def drain(self) -> int:
        """Wait for what is under way; returns how many did not end in time."""
        if not self._running:
            return 0
        _, late = await asyncio.wait(self._running, timeout=DRAIN_MAX_S)
        return len(late)

    def _over(self, work: asyncio.Task[TaskView]) -> None:
        self._running.discard(work)
        if not work.cancelled():
            work.exception()  # read here, since the client may be gone

    async def _guarded(
        self,
        accepted: Accepted,
        *,
        links: bool,
        on_partial: Callable[[Partial], None] | None,
    ) -> TaskView:
        try:
            return await self.generate.carry_out(
                accepted, links=links, on_partial=on_partial
            )
        except GatewayError:
            raise
        except Exception as error:
            internal = GatewayError(
                "Something went wrong in the gateway itself. You were not charged. "
                "Send the task id to the operator.",
                client_may_retry=False,
            )
            await self.generate.give_up(accepted, internal)
            self.crashed(error, accepted.task.id)
            raise internal from error


@dataclass(frozen=True, slots=True)
class Loops:
    """Runs chores again and again: each by its own period, none stops another."""

    clock: Clock
    crashed: Crashed
    chores: Mapping[str, tuple[float, Callable[[], Awaitable[object]]]]

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            for name, (period_s, chore) in self.chores.items():
                group.create_task(self._repeat(name, period_s, chore))

    async def _repeat(
        self, name: str, period_s: float, chore: Callable[[], Awaitable[object]]
    ) -> None:
        while True:
            await self.clock.sleep(period_s)
            try:
                await chore()
            except Exception as error:  # noqa: BLE001 - a supervisor: the next run may do
                self.crashed(error, name)
