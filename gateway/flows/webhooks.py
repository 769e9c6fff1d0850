"""Tells callback URLs what became of tasks, and lets their owners look and repeat."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from gateway.core.errors import GatewayError, InvalidRequestError, NotFoundError
from gateway.core.events import WebhookTried
from gateway.core.webhooks import (
    DELIVERED,
    FAILED,
    PENDING,
    STATES,
    TRIES_AFTER_S,
    Answer,
    Delivery,
    Places,
    SigningKey,
    after_try,
    host_of,
    secret_for,
    secrets_at,
)
from gateway.ports import (
    Chance,
    Clock,
    Events,
    Outbox,
    Post,
    Sender,
    SigningKeys,
)

AT_ONCE = 128
AT_ONCE_PER_HOST = 4
AT_ONCE_PER_TENANT = 64
"""Its share: however many receivers of one tenant hang, others find places."""
AT_ONCE_FAILING = 48
"""To hosts whose last answer was a failure, of all tenants together."""
FAILURES_MAX = 5
"""In a row: then the host is left alone for ``REST_MS``, and tried once after it."""
REST_MS = 60_000
HOSTS_KNOWN_MAX = 10_000
LEASE_MS = 60_000
"""Much longer than a try takes: who has not noted it by then is dead."""
LOOK_EVERY_S = 1.0
LOOK_PAUSE_S = 0.05
"""Between two looks: each costs the store up to 30 ms with 10,000 due."""
SERVER_ERRORS = 500
TOO_MANY = 429

Render = Callable[[Delivery], Awaitable[bytes]]
"""Writes the body of a webhook; NotFoundError: the task is no longer there."""
Crashed = Callable[[BaseException, str], None]
OUTCOMES = {DELIVERED: "delivered", FAILED: "failed", PENDING: "retry"}


@dataclass(slots=True)
class HostBook:
    """How each host has been doing, so that a dead one is left alone for a while."""

    _failures: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _rests_until_ms: dict[str, int] = field(default_factory=dict)

    def note(self, host: str, answer: Answer, now_ms: int) -> None:
        """Count a failure of the host itself; any other answer clears it."""
        if not _host_failed(answer):
            self._forget(host)
            return
        self._failures[host] = self._failures.pop(host, 0) + 1
        if self._failures[host] >= FAILURES_MAX:
            self._rests_until_ms[host] = now_ms + REST_MS
        if len(self._failures) > HOSTS_KNOWN_MAX:
            self._forget(next(iter(self._failures)))

    def places(self, under_way: Collection[Delivery], now_ms: int) -> Places:
        """Tell how many more may be sent where, and for whom."""
        busy = Counter(host_of(each.url) for each in under_way)
        failing_busy = sum(busy[host] for host in busy if host in self._failures)
        taken = dict(busy)
        for host, failures in self._failures.items():
            if self._rests_until_ms.get(host, 0) > now_ms:
                taken[host] = AT_ONCE_PER_HOST
            elif failures >= FAILURES_MAX:
                taken[host] = AT_ONCE_PER_HOST - 1 + busy[host]
        return Places(
            each=AT_ONCE_PER_HOST,
            tenant_each=AT_ONCE_PER_TENANT,
            taken=taken,
            tenant_taken=Counter(each.tenant_id for each in under_way),
            failing=frozenset(self._failures),
            failing_left=AT_ONCE_FAILING - failing_busy,
        )

    def _forget(self, host: str) -> None:
        self._failures.pop(host, None)
        self._rests_until_ms.pop(host, None)


def _host_failed(answer: Answer) -> bool:
    # A refusal is an answer: of one path, on a host that others may share.
    return (
        answer.status is None
        or answer.status >= SERVER_ERRORS
        or answer.status == TOO_MANY
    )


@dataclass(slots=True)
class DeliverWebhooks:
    """Sends what is due. One per process, since it counts what is under way.

    A new configuration changes ``sender``, ``render`` and ``tries_after_s`` in place.

    Fields:
        render: writes the body, anew at each try.
        pepper: the gateway's own secret, which those of the keys follow from.
        crashed: is told of errors that nobody foresaw; the try counts as failed.
    """

    outbox: Outbox
    sender: Sender
    signing_keys: SigningKeys
    render: Render
    clock: Clock
    chance: Chance
    events: Events
    pepper: bytes
    crashed: Crashed
    tries_after_s: Sequence[int] = TRIES_AFTER_S
    _hosts: HostBook = field(default_factory=HostBook, init=False)

    async def __call__(self) -> None:
        """Send until nothing is due and nothing under way; looks for more meanwhile.

        Cancelled, it leaves what is under way to whoever claims it after the lease.
        """
        sending: dict[asyncio.Task[None], Delivery] = {}
        async with asyncio.TaskGroup() as group:
            while True:
                for delivery in await self._claim(sending):
                    work = group.create_task(self._carry_out(delivery))
                    sending[work] = delivery
                if not sending:
                    return
                done, _ = await asyncio.wait(
                    sending,
                    timeout=LOOK_EVERY_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for work in done:
                    del sending[work]
                await self.clock.sleep(LOOK_PAUSE_S)

    async def _claim(
        self, sending: dict[asyncio.Task[None], Delivery]
    ) -> Sequence[Delivery]:
        room = AT_ONCE - len(sending)
        if not room:
            return ()
        now_ms = self.clock.now_ms()
        try:
            return await self.outbox.claim(
                now_ms=now_ms,
                lease_ms=LEASE_MS,
                limit=room,
                places=self._hosts.places(sending.values(), now_ms),
            )
        except GatewayError as error:
            # What is under way goes on; the next look may do.
            self.crashed(error, "claiming webhooks")
            return ()

    async def _carry_out(self, delivery: Delivery) -> None:
        started_ms = self.clock.monotonic_ms()
        try:
            answer = await self._try(delivery)
            self._hosts.note(host_of(delivery.url), answer, self.clock.now_ms())
        except NotFoundError as error:
            answer = Answer(None, f"Nothing was sent: {error}", final=True)
        except Exception as error:  # noqa: BLE001 - a supervisor: others are under way
            self.crashed(error, delivery.id)
            answer = Answer(None, "The gateway itself failed. Tell its operator.")
        try:
            await self._note(delivery, answer, started_ms)
        except GatewayError as error:
            # It is due again when the lease is over.
            self.crashed(error, delivery.id)

    async def _try(self, delivery: Delivery) -> Answer:
        key = await self.signing_keys.signing_key(delivery.key_id)
        if key is None:
            raise NotFoundError(f"There is no key {delivery.key_id}.")
        body = await self.render(delivery)
        now_ms = self.clock.now_ms()
        secrets = secrets_at(self.pepper, key, now_ms)
        return await self.sender.send(
            Post(delivery.id, delivery.url, body, secrets, now_ms)
        )

    async def _note(self, delivery: Delivery, answer: Answer, started_ms: int) -> None:
        tried = after_try(
            delivery,
            answer,
            self.clock.now_ms(),
            fraction=self.chance.fraction(),
            tries_after_s=self.tries_after_s,
        )
        if not await self.outbox.note(tried):
            return
        self.events.emit(
            WebhookTried(
                delivery_id=tried.id,
                task_id=tried.task_id,
                tenant_id=tried.tenant_id,
                host=host_of(tried.url),
                outcome=OUTCOMES[tried.state],
                tries=tried.tries,
                duration_ms=self.clock.monotonic_ms() - started_ms,
                status=tried.status,
                error=tried.error,
            )
        )


@dataclass(frozen=True, slots=True)
class ManageWebhooks:
    """Lists and repeats deliveries; tells and changes the secret of a key.

    ``tenant_id`` None acts as an admin, on any tenant's.
    """

    outbox: Outbox
    signing_keys: SigningKeys
    clock: Clock
    pepper: bytes

    async def list(
        self, tenant_id: str | None, *, state: str | None, offset: int, limit: int
    ) -> tuple[int, Sequence[Delivery]]:
        """List deliveries, newest first, with their number.

        Raises:
            InvalidRequestError: there is no such state.
        """
        if state is not None and state not in STATES:
            raise InvalidRequestError(
                f"state must be one of {', '.join(STATES)}.", param="state"
            )
        return await self.outbox.list(
            tenant_id=tenant_id, state=state, offset=offset, limit=limit
        )

    async def get(self, delivery_id: str, tenant_id: str | None) -> Delivery:
        """Read a delivery.

        Raises:
            NotFoundError: there is none of that id, or it is another tenant's.
        """
        found = await self.outbox.get(delivery_id)
        if found is None or tenant_id not in {None, found.tenant_id}:
            raise NotFoundError(
                "There is no such delivery. Its id is that of the event, such as "
                "evt_task-unified-1700000000-abcd1234_completed.",
                param="delivery_id",
                code="delivery_not_found",
            )
        return found

    async def redeliver(self, delivery_id: str, tenant_id: str | None) -> Delivery:
        """Make a delivery due now, with all its tries.

        Raises:
            NotFoundError: as ``get``.
        """
        await self.get(delivery_id, tenant_id)
        await self.outbox.redeliver(delivery_id, now_ms=self.clock.now_ms())
        return await self.get(delivery_id, tenant_id)

    async def secret(self, key_id: str) -> str:
        """Tell what the webhooks of a key are signed with; shown when it is made.

        Raises:
            NotFoundError: there is no such key.
        """
        return self._secret(key_id, await self.signing_keys.signing_key(key_id))

    async def rotate(self, key_id: str) -> str:
        """Give a key another secret; for 24 h those before it sign too.

        Raises:
            NotFoundError: there is no such key.
            RotatedTooOftenError: as many secrets sign already as may at once.
        """
        key = await self.signing_keys.rotate_signing_key(
            key_id, now_ms=self.clock.now_ms()
        )
        return self._secret(key_id, key)

    def _secret(self, key_id: str, key: SigningKey | None) -> str:
        if key is None:
            raise NotFoundError(f"There is no key {key_id}.", code="key_not_found")
        return secret_for(self.pepper, key.key_id, key.version)
