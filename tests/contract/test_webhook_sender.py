"""Webhooks over real sockets: what a receiver gets, and what it cannot do to us.

Receivers speak TLS on 127.0.0.2, which the operator allows here; a canary listens on
127.0.0.1, which nobody allows.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore
import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from gateway.adapters.sql.deliveries import SqlOutbox
from gateway.adapters.webhooks import SEND_MAX_S, GuardedSender
from gateway.core.webhooks import (
    ROTATION_OVERLAP_MS,
    CallbackRules,
    Delivery,
    secret_for,
)
from gateway.flows.webhooks import DeliverWebhooks, ManageWebhooks
from gateway.ports import Key, Post
from tests.contract.stores import TENANT, Stores, a_task, an_end, open_stores
from tests.contract.test_fetcher import (
    ALLOWED,
    HOME,
    Canary,
    Witness,
    Zone,
    certificate,
    listening,
    shared_port,
)
from tests.fakes import FakeChance, FakeEvents, StillClock
from tests.virtual_time import LoopClock, VirtualTimeLoop

NAME = "hooks.example.com"
SECRET = secret_for(b"pepper", "key-1", 1)
BODY = json.dumps({"id": "task-1", "prompt": "狐"}, ensure_ascii=False).encode()
TASK_ID = "task-1"
EVENT_ID = f"evt_{TASK_ID}_completed"

Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Got:
    """One request that a receiver read whole."""

    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Answers each request with the next of its replies; the last one repeats."""

    replies: list[Reply]
    got: list[Got] = field(default_factory=list)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = [line.split(": ", 1) for line in head[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers["content-length"]))
            self.got.append(Got(head[0], headers, body))
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            await reply(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def answering(status: int, *headers: str) -> Reply:
    async def reply(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} X", "Content-Length: 2", *headers, "", "ok"]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()

    return reply


@dataclass
class Place:
    """A receiver, a canary beside it, and the sender that is led astray."""

    receiver: Receiver
    canary: Canary
    zone: Zone
    witness: Witness
    clock: StillClock
    sender: GuardedSender
    port: int

    def url(self, name: str = NAME) -> str:
        return f"https://{name}:{self.port}/hook?a=1"

    def post(self, **changes: Any) -> Post:
        fields: dict[str, Any] = {
            "id": EVENT_ID,
            "url": self.url(),
            "body": BODY,
            "secrets": (SECRET,),
            "now_ms": self.clock.at_ms,
        }
        return Post(**(fields | changes))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncGenerator[Place, None]:
    receiver, canary = Receiver([answering(200)]), Canary()
    made = certificate(tmp_path, NAME)
    zone, witness = Zone({NAME: [[HOME]]}), Witness()
    # The library verifies by the machine's own time.
    clock = StillClock(int(time.time()) * 1000)
    async with AsyncExitStack() as stack:
        canary.port = port = shared_port(HOME, "127.0.0.1")
        await stack.enter_async_context(
            listening(receiver.serve, HOME, port, tls=made.server([]))
        )
        await stack.enter_async_context(listening(canary.serve, "127.0.0.1", port))
        sender = GuardedSender(
            clock,
            zone.resolve,
            CallbackRules((port,), (ALLOWED,)),
            tls=ssl.create_default_context(cafile=str(made.path)),
            network=witness,
        )
        yield Place(receiver, canary, zone, witness, clock, sender, port)


# --- one try ---


async def test_a_webhook_arrives_signed(place: Place) -> None:
    answer = await place.sender.send(place.post())
    assert (answer.status, answer.error) == (200, None)
    (got,) = place.receiver.got
    assert got.target == "POST /hook?a=1 HTTP/1.1"
    assert got.headers["host"] == f"{NAME}:{place.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["user-agent"] == "imageway"
    assert got.headers["webhook-id"] == EVENT_ID
    assert Webhook(SECRET).verify(got.body, got.headers) == json.loads(BODY)


async def test_what_was_tampered_with_does_not_verify(place: Place) -> None:
    await place.sender.send(place.post())
    (got,) = place.receiver.got
    another = secret_for(b"pepper", "key-2", 1)
    later = str(int(got.headers["webhook-timestamp"]) + 1)
    for secret, body, changed in (
        (SECRET, got.body.replace(b"task-1", b"task-2"), {}),
        (SECRET, got.body, {"webhook-timestamp": later}),
        (SECRET, got.body, {"webhook-id": "evt_task-2_completed"}),
        (another, got.body, {}),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, got.headers | changed)


async def test_both_secrets_of_a_rotation_sign(place: Place) -> None:
    new = secret_for(b"pepper", "key-1", 2)
    await place.sender.send(place.post(secrets=(new, SECRET)))
    (got,) = place.receiver.got
    for secret in (new, SECRET):
        Webhook(secret).verify(got.body, got.headers)


async def test_a_redirect_is_not_followed(place: Place) -> None:
    inside = f"Location: http://127.0.0.1:{place.canary.port}/"
    place.receiver.replies = [answering(302, inside)]
    answer = await place.sender.send(place.post())
    assert answer.status == 302
    assert not answer.accepted
    assert place.witness.dialled == [HOME]
    assert place.canary.visits == 0


async def test_the_wait_that_is_asked_for_is_heard(place: Place) -> None:
    place.receiver.replies = [answering(429, "Retry-After: 3000")]
    answer = await place.sender.send(place.post())
    assert (answer.status, answer.retry_after_s) == (429, 3_000)


async def test_a_hundred_megabytes_are_not_read(place: Place) -> None:
    written_bytes = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal written_bytes
        writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 104857600\r\n\r\n")
        for _ in range(1_600):
            writer.write(bytes(65_536))
            await writer.drain()
            written_bytes += 65_536

    place.receiver.replies = [flood]
    answer = await place.sender.send(place.post())
    assert answer.status == 500
    assert written_bytes < 20 * 2**20


async def test_an_answer_that_breaks_off_is_a_failure(place: Place) -> None:
    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf")

    async def nonsense(writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\r\n\r\n")

    for reply in (half, nonsense):
        place.receiver.replies = [reply]
        answer = await place.sender.send(place.post())
        assert answer.status is None
        assert "broke off" in str(answer.error)


async def test_a_certificate_for_another_name_is_refused(place: Place) -> None:
    place.zone.names["other.example.com"] = [[HOME]]
    answer = await place.sender.send(place.post(url=place.url("other.example.com")))
    assert "certificate" in str(answer.error)
    assert place.receiver.got == []


async def test_a_name_that_has_moved_inside_is_not_sent_to(place: Place) -> None:
    place.zone.names[NAME] = [[HOME], ["127.0.0.1"], [HOME, "127.0.0.1"]]
    assert (await place.sender.send(place.post())).accepted
    for _ in range(2):
        answer = await place.sender.send(place.post())
        assert "could not be reached" in str(answer.error)
    assert place.witness.dialled == [HOME]
    assert place.canary.visits == 0


async def test_a_url_is_checked_again_at_each_send(place: Place) -> None:
    for url in (f"https://127.0.0.1:{place.port}/", f"http://{NAME}:{place.port}/"):
        answer = await place.sender.send(place.post(url=url))
        assert answer.status is None
        assert not answer.accepted
    assert place.witness.dialled == []


@dataclass
class Dripping(httpcore.AsyncNetworkStream):
    """Says ``start``, then a byte per second, for ever."""

    start: bytes
    closed: bool = False

    async def read(self, *_: Any, **__: Any) -> bytes:
        if self.start:
            said, self.start = self.start, b""
            return said
        await asyncio.sleep(1)
        return b"x"

    async def write(self, *_: Any, **__: Any) -> None:
        pass

    async def aclose(self) -> None:
        self.closed = True

    async def start_tls(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        return self


@dataclass
class OneStream(httpcore.AsyncNetworkBackend):
    stream: Dripping

    async def connect_tcp(
        self, host: str, port: int, *_: Any, **__: Any
    ) -> httpcore.AsyncNetworkStream:
        return self.stream


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Drip: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n",
    ],
)
def test_a_receiver_that_drips_is_cut_off_after_ten_seconds(start: bytes) -> None:
    stream = Dripping(start)

    async def story() -> tuple[Any, float]:
        sender = GuardedSender(
            LoopClock(),
            Zone({NAME: [["93.184.215.14"]]}).resolve,
            network=OneStream(stream),
        )
        post = Post(EVENT_ID, f"https://{NAME}/", BODY, (SECRET,), 0)
        return await sender.send(post), asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        answer, took_s = runner.run(story())
    assert took_s == SEND_MAX_S
    assert answer.status is None
    assert "within 10 s" in answer.error
    assert stream.closed


# --- from the settlement to the receiver ---


@dataclass
class Office:
    """All that delivers webhooks, over a real store."""

    place: Place
    stores: Stores
    deliver: DeliverWebhooks
    manage: ManageWebhooks
    events: FakeEvents

    async def finish(self, task_id: str = TASK_ID) -> None:
        task = a_task(task_id, callback_url=self.place.url())
        await self.stores.tasks.open(task)
        now_ms = self.place.clock.at_ms
        await self.stores.tasks.finish(an_end(task_id, finished_ms=now_ms))

    async def run_s(self, *waits_s: int) -> list[int]:
        """Deliver, at once and after each wait; returns the tries made each time."""
        tries = []
        for wait_s in (0, *waits_s):
            self.place.clock.at_ms += wait_s * 1000
            before = len(self.place.receiver.got)
            await self.deliver()
            tries.append(len(self.place.receiver.got) - before)
        return tries

    async def delivery(self) -> Delivery:
        return await self.manage.get(EVENT_ID, None)

    def outcomes(self) -> list[str]:
        return [getattr(event, "outcome", "") for event in self.events.seen]


@asynccontextmanager
async def an_office(place: Place, folder: Path) -> AsyncIterator[Office]:
    async def render(delivery: Delivery) -> bytes:
        return json.dumps({"id": delivery.task_id}).encode()

    def crashed(error: BaseException, where: str) -> None:
        raise AssertionError(where) from error

    async with open_stores("sqlite", folder) as stores:
        await stores.fund(10**6)
        made_ms = place.clock.at_ms
        key = Key("key-1", TENANT, b"digest", "iwk", "auto", made_ms)
        await stores.accounts.add_key(key)
        outbox, events = SqlOutbox(stores.database), FakeEvents()
        deliver = DeliverWebhooks(
            outbox=outbox,
            sender=place.sender,
            signing_keys=stores.accounts,
            render=render,
            clock=place.clock,
            chance=FakeChance(),
            events=events,
            pepper=b"pepper",
            crashed=crashed,
        )
        manage = ManageWebhooks(outbox, stores.accounts, place.clock, b"pepper")
        yield Office(place, stores, deliver, manage, events)


@pytest.fixture
async def office(place: Place, tmp_path: Path) -> AsyncGenerator[Office, None]:
    async with an_office(place, tmp_path) as opened:
        yield opened


async def test_a_receiver_that_recovers_gets_the_same_event_again(
    office: Office,
) -> None:
    office.place.receiver.replies = [answering(500), answering(500), answering(200)]
    await office.finish()
    assert await office.run_s(4, 1, 59, 1, 600, 6_000) == [1, 0, 1, 0, 1, 0, 0]
    got = office.place.receiver.got
    assert {each.headers["webhook-id"] for each in got} == {EVENT_ID}
    assert len({each.headers["webhook-timestamp"] for each in got}) == 3
    assert office.outcomes() == ["retry", "retry", "delivered"]
    done = await office.delivery()
    assert (done.state, done.tries, done.error) == ("delivered", 3, None)


async def test_a_receiver_that_never_does_is_tried_four_times(office: Office) -> None:
    office.place.receiver.replies = [answering(500)]
    await office.finish()
    assert await office.run_s(5, 60, 600, 6_000, 60_000) == [1, 1, 1, 1, 0, 0]
    assert office.outcomes() == ["retry"] * 3 + ["failed"]
    assert (await office.delivery()).state == "failed"


async def test_gone_is_taken_at_its_word(office: Office) -> None:
    office.place.receiver.replies = [answering(410)]
    await office.finish()
    assert await office.run_s(5, 60, 600) == [1, 0, 0, 0]
    assert (await office.delivery()).state == "failed"


async def test_a_receiver_is_left_alone_as_long_as_it_asks(office: Office) -> None:
    busy = answering(503, "Retry-After: 300")
    office.place.receiver.replies = [busy, answering(200)]
    await office.finish()
    assert await office.run_s(5, 294, 1) == [1, 0, 0, 1]


async def test_a_redirect_is_tried_again_and_never_followed(office: Office) -> None:
    inside = f"Location: https://127.0.0.1:{office.place.canary.port}/"
    office.place.receiver.replies = [answering(307, inside)]
    await office.finish()
    assert await office.run_s(5, 60, 600, 6_000) == [1, 1, 1, 1, 0]
    assert office.place.canary.visits == 0


async def test_a_delivery_is_repeated_on_demand(office: Office) -> None:
    await office.finish()
    assert await office.run_s(60) == [1, 0]
    again = await office.manage.redeliver(EVENT_ID, TENANT)
    assert (again.state, again.tries) == ("pending", 0)
    assert await office.run_s() == [1]
    first, second = office.place.receiver.got
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body


async def test_an_old_secret_verifies_for_a_day_after_its_rotation(
    office: Office,
) -> None:
    old = await office.manage.secret("key-1")
    new = await office.manage.rotate("key-1")
    assert new == await office.manage.secret("key-1") != old
    await office.finish()
    await office.run_s()
    (got,) = office.place.receiver.got
    for secret in (old, new):
        Webhook(secret).verify(got.body, got.headers)
    office.place.clock.at_ms += ROTATION_OVERLAP_MS
    await office.finish("task-2")
    await office.run_s()
    signatures = office.place.receiver.got[-1].headers["webhook-signature"].split()
    assert len(signatures) == 1


async def test_nothing_is_sent_before_the_settlement(office: Office) -> None:
    task = a_task(TASK_ID, callback_url=office.place.url())
    await office.stores.tasks.open(task)
    assert await office.run_s() == [0]
    settled: list[Any] = []

    async def look(writer: asyncio.StreamWriter) -> None:
        settled.append(await office.stores.tasks.get(TASK_ID))
        await answering(200)(writer)

    office.place.receiver.replies = [look]
    now_ms = office.place.clock.at_ms
    await office.stores.tasks.finish(an_end(TASK_ID, finished_ms=now_ms))
    assert await office.run_s() == [1]
    assert settled[0].charged_nanocredits == 60
