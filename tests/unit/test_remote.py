"""Orders at a gateway: sent once, waited for politely, kept under the right names.

The client is the real one, over a scripted wire; no time passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import httpx
import pytest

from gateway.adapters.client import DOWNLOAD_MAX_BYTES, GatewayClient, is_task_id
from gateway.generating import target_of
from gateway.remote import (
    PATIENCE_S,
    PAUSE_MAX_S,
    STOP_MAX_S,
    AwayError,
    Order,
    Pace,
    RefusedError,
    Target,
    TargetTakenError,
    Waited,
    fetch,
    follow,
    place,
    stop,
)

URL = "http://gateway.example"
KEY = "iwk_live_secret"
ID = "task-unified-1795562712-mkoreuok"
ORDER = Order({"prompt": "a fox"}, (), None, "order-1")
REFUSED = httpx.ConnectError("Connection refused")
LOST = httpx.ReadError("connection reset")
Step = httpx.Response | Exception


@dataclass
class Clock:
    """A clock that jumps; ``pauses`` are what was slept."""

    at_s: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.at_s += seconds

    @property
    def pace(self) -> Pace:
        return Pace(lambda: self.at_s, self.sleep)


class Wire:
    """Plays its steps in order, the last one for ever; keeps what was asked."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.steps = list(steps)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return step


def client_over(wire: Callable[[httpx.Request], httpx.Response]) -> GatewayClient:
    carrying = httpx.Client(
        transport=httpx.MockTransport(wire), headers={"authorization": f"Bearer {KEY}"}
    )
    return GatewayClient(
        URL, KEY, carrying, httpx.Client(transport=httpx.MockTransport(wire))
    )


def told(status: str = "pending", **more: Any) -> httpx.Response:
    return httpx.Response(200, json={"id": ID, "status": status, "progress": 7} | more)


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"error": {"message": f"No: {KEY}\x1b[2J", "code": code}}
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers=sent)


def silent(_doing: str, _percent: int) -> None:
    return


def placed(wire: Wire, clock: Clock, order: Order = ORDER) -> tuple[str, Waited]:
    so_far = Waited()
    task = place(client_over(wire), order, so_far, silent, clock.pace)
    return task.id, so_far


# --- sending ---


def test_an_order_whose_answer_is_lost_is_sent_again_as_the_same_order() -> None:
    wire, clock = Wire([LOST, LOST, told()]), Clock()

    task_id, so_far = placed(wire, clock)

    assert (task_id, so_far.task_id) == (ID, ID)
    assert len({request.content for request in wire.asked}) == 1
    keys = [request.headers["idempotency-key"] for request in wire.asked]
    assert keys == ["order-1"] * 3
    assert {request.headers["prefer"] for request in wire.asked} == {"respond-async"}


def test_a_gateway_that_is_not_there_is_not_waited_for() -> None:
    wire, clock, so_far = Wire([REFUSED]), Clock(), Waited()

    with pytest.raises(AwayError, match="Connection refused"):
        place(client_over(wire), ORDER, so_far, silent, clock.pace)

    assert clock.pauses == []
    assert not so_far.sent


def test_an_order_may_have_arrived_though_the_gateway_went_away_after_it() -> None:
    wire, clock, so_far = Wire([LOST, REFUSED]), Clock(), Waited()

    with pytest.raises(AwayError):
        place(client_over(wire), ORDER, so_far, silent, clock.pace)

    assert so_far.sent
    assert PATIENCE_S - PAUSE_MAX_S <= clock.at_s <= PATIENCE_S


def test_a_busy_gateway_is_given_the_time_that_it_asks_for() -> None:
    busy = refusal(429, "queue_full", retry_after="20")
    wire, clock = Wire([busy, told()]), Clock()

    placed(wire, clock)

    assert clock.pauses == [20]


@pytest.mark.parametrize(
    "answer",
    [
        refusal(402, "insufficient_quota"),
        refusal(503, "service_unavailable", x_should_retry="false"),
        refusal(429, "queue_full", retry_after="3000"),
    ],
)
def test_a_refusal_that_waiting_cannot_help_is_final(answer: httpx.Response) -> None:
    wire, clock, so_far = Wire([answer]), Clock(), Waited()

    with pytest.raises(RefusedError) as refused:
        place(client_over(wire), ORDER, so_far, silent, clock.pace)

    assert len(wire.asked) == 1
    assert not so_far.sent
    assert "secret" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_files_are_uploaded_once_and_deleted_when_the_order_is_in(
    tmp_path: Path,
) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG of a fox")
    order = Order({}, (photo, "https://example.com/b.png"), photo, "order-2")
    uploaded = httpx.Response(200, json={"data": {"file_id": "file_1"}})
    gone = httpx.Response(200, json={"success": True})
    wire = Wire([uploaded, told(), gone])

    placed(wire, Clock(), order)

    upload, post, delete = wire.asked
    assert b"\x89PNG of a fox" in upload.content
    assert json.loads(post.content) == {
        "image_urls": ["file_1", "https://example.com/b.png"],
        "mask_url": "file_1",
    }
    assert (delete.method, delete.url.path) == ("DELETE", "/api/v1/files/file_1")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(502, text="<html>bad gateway</html>"),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"id": "../../etc/passwd", "status": "pending"}),
        httpx.Response(404, json={"error": "not found"}),
        httpx.Response(301, headers={"location": "https://elsewhere.example"}),
    ],
)
def test_what_does_not_speak_as_a_gateway_is_none(answer: httpx.Response) -> None:
    with pytest.raises(AwayError, match="does not speak as a gateway does"):
        client_over(Wire([answer])).task(ID)


def test_the_key_stays_out_of_messages_and_representations() -> None:
    client = client_over(Wire([refusal(401, "invalid_api_key")]))

    with pytest.raises(RefusedError, match="the key") as refused:
        client.task(ID)

    assert KEY not in str(refused.value)
    assert KEY not in repr(client)


# --- waiting ---


def test_a_task_is_looked_at_less_and_less_often() -> None:
    clock = Clock()
    client = client_over(Wire([*[told("processing")] * 12, told("completed")]))

    task = follow(client, client.task(ID), None, silent, clock.pace)

    assert task.status == "completed"
    assert clock.pauses == sorted(clock.pauses)
    assert clock.pauses[-1] == PAUSE_MAX_S
    assert len(clock.pauses) == 12


def test_waiting_ends_when_its_time_is_over() -> None:
    clock = Clock()
    client = client_over(Wire([told("processing")]))

    task = follow(client, client.task(ID), 5, silent, clock.pace)

    assert not task.over
    assert clock.at_s == pytest.approx(5)


def test_a_gateway_that_restarts_is_waited_for_and_one_that_stays_away_is_not() -> None:
    restart: list[Step] = [told(), *[REFUSED] * 5, told("completed")]
    clock = Clock()
    back = client_over(Wire(restart))
    assert follow(back, back.task(ID), None, silent, clock.pace).over

    clock = Clock()
    away = client_over(Wire([told(), REFUSED]))
    task = away.task(ID)
    with pytest.raises(AwayError):
        follow(away, task, None, silent, clock.pace)
    assert clock.at_s <= PATIENCE_S + PAUSE_MAX_S


@pytest.mark.parametrize(
    ("used", "shown"),
    [("1.820088", "1.820088"), ("12", "12"), ("0.000000001", "0.000000001")],
)
def test_credits_are_shown_to_the_last_digit(used: str, shown: str) -> None:
    text = (
        f'{{"id": "{ID}", "status": "completed", "usage": {{"credits_used": {used}}}}}'
    )
    task = client_over(Wire([httpx.Response(200, text=text)])).task(ID)

    assert task.credits_used == shown


# --- keeping ---


def fetched(
    wire: Wire,
    target: Target,
    links: int = 1,
    download_max_bytes: int = DOWNLOAD_MAX_BYTES,
) -> list[Path]:
    urls = [f"{URL}/files/{place}" for place in range(links)]
    more: dict[str, Any] = {"results": urls, "output_format": "jpeg"}
    task = client_over(Wire([told("completed", **more)])).task(ID)
    client = replace(client_over(wire), download_max_bytes=download_max_bytes)
    return fetch(client, task, target, silent, Clock().pace)


def test_links_are_followed_without_the_key(tmp_path: Path) -> None:
    wire = Wire([httpx.Response(200, content=b"picture")])

    paths = fetched(wire, Target(tmp_path / "new"), links=2)

    assert [path.name for path in paths] == [f"{ID}-1.jpg", f"{ID}-2.jpg"]
    assert [path.read_bytes() for path in paths] == [b"picture"] * 2
    assert all("authorization" not in request.headers for request in wire.asked)


def test_a_picture_that_breaks_off_leaves_nothing_behind(tmp_path: Path) -> None:
    def half() -> Iterable[bytes]:
        yield b"half a pict"
        raise LOST

    wire = Wire([httpx.Response(200, content=half()) for _ in range(100)])
    with pytest.raises(AwayError):
        fetched(wire, Target(tmp_path))

    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten_unless_by_force(
    tmp_path: Path,
) -> None:
    wire = Wire([httpx.Response(200, content=b"new")])
    path = tmp_path / "fox.jpg"
    path.write_bytes(b"old")

    with pytest.raises(TargetTakenError):
        Target(tmp_path, "fox.jpg").check_free(1)
    with pytest.raises(TargetTakenError):
        fetched(wire, Target(tmp_path, "fox.jpg"))
    assert path.read_bytes() == b"old"
    fetched(wire, Target(tmp_path, "fox.jpg", force=True))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_came_in_between_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "fox.jpg"

    class Meanwhile(Wire):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            path.write_bytes(b"somebody else's")
            return super().__call__(request)

    wire = Meanwhile([httpx.Response(200, content=b"new")])
    with pytest.raises(TargetTakenError):
        fetched(wire, Target(tmp_path, "fox.jpg"))

    assert path.read_bytes() == b"somebody else's"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_fetched_before_is_not_fetched_again(tmp_path: Path) -> None:
    first = tmp_path / f"{ID}-1.jpg"
    first.write_bytes(b"picture")
    wire = Wire([httpx.Response(200, content=b"second")])

    paths = fetched(wire, Target(tmp_path), links=2)

    assert [path.read_bytes() for path in paths] == [b"picture", b"second"]
    assert [request.url.path for request in wire.asked] == ["/files/1"]


def test_several_pictures_share_the_name_that_was_given(tmp_path: Path) -> None:
    paths = Target(tmp_path, "fox.webp").paths(ID, 2, "webp")

    assert [path.name for path in paths] == ["fox-1.webp", "fox-2.webp"]


@pytest.mark.parametrize(
    ("out", "folder", "name"),
    [
        (".", ".", None),
        ("pictures", "pictures", None),
        ("a.b/", "a.b", None),
        ("fox.PNG", ".", "fox.PNG"),
        ("pictures/fox.webp", "pictures", "fox.webp"),
    ],
)
def test_out_is_a_file_if_it_ends_like_a_picture(
    out: str, folder: str, name: str | None
) -> None:
    assert target_of(out, force=False) == Target(Path(folder), name)


def test_out_must_not_end_like_something_else() -> None:
    with pytest.raises(click.UsageError, match="must end in"):
        target_of("fox.gif", force=False)


@pytest.mark.parametrize("text", ["", "task-1", f"{ID}/../x", f"{ID}\n", f"{ID}.png"])
def test_what_could_lead_out_of_a_folder_is_no_task_id(text: str) -> None:
    assert is_task_id(ID)
    assert not is_task_id(text)


def test_files_that_are_there_are_left_alone_when_a_task_is_picked_up(
    tmp_path: Path,
) -> None:
    path = tmp_path / "fox-1.jpg"
    path.write_bytes(b"picture")
    wire = Wire([httpx.Response(200, content=b"second")])
    target = Target(tmp_path, "fox.jpg", keep=True)

    target.check_free(1)
    paths = fetched(wire, target, links=2)

    assert [each.read_bytes() for each in paths] == [b"picture", b"second"]
    assert [request.url.path for request in wire.asked] == ["/files/1"]


def test_a_picture_without_an_end_is_given_up(tmp_path: Path) -> None:
    sent: list[bytes] = []

    def endless() -> Iterable[bytes]:
        while True:
            sent.append(bytes(60_000))
            yield sent[-1]

    wire = Wire([httpx.Response(200, content=endless())])
    with pytest.raises(RefusedError, match="more than 100,000 bytes"):
        fetched(wire, Target(tmp_path), download_max_bytes=100_000)

    assert (len(wire.asked), len(sent)) == (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_without_an_end_is_none(tmp_path: Path) -> None:
    def endless() -> Iterable[bytes]:
        while True:
            yield b"{" * 60_000

    wire = Wire([httpx.Response(403, content=endless()) for _ in range(100)])
    with pytest.raises(AwayError):
        fetched(wire, Target(tmp_path))


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("png", "png"),
        ("jpeg", "jpeg"),
        ("webp", "webp"),
        ("/../../evil", None),
        ("exe", None),
        (["png"], None),
        (7, None),
    ],
)
def test_only_formats_that_pictures_have_become_part_of_names(
    said: object, known: str | None
) -> None:
    told_so = told("completed", output_format=said)
    assert client_over(Wire([told_so])).task(ID).output_format == known


# --- stopping ---


def test_an_order_whose_answer_did_not_come_is_found_by_its_key_and_cancelled() -> None:
    class Interrupted(Wire):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            answer = super().__call__(request)
            if len(self.asked) == 1:
                raise KeyboardInterrupt
            return answer

    wire, clock, so_far = (
        Interrupted([told(), told(), told("cancelled")]),
        Clock(),
        Waited(),
    )
    with pytest.raises(KeyboardInterrupt):
        place(client_over(wire), ORDER, so_far, silent, clock.pace)
    assert so_far.sent

    task = stop(client_over(wire), ORDER, so_far, clock.pace)

    first, again, cancel = wire.asked
    assert (again.content, again.headers) == (first.content, first.headers)
    assert cancel.url.path == f"/v1/tasks/{ID}/cancel"
    assert (task.status, so_far.task_id) == ("cancelled", ID)


def test_who_leaves_does_not_wait_long_for_a_gateway_that_is_away() -> None:
    wire, clock = Wire([LOST]), Clock()

    with pytest.raises(AwayError):
        stop(client_over(wire), ORDER, Waited(sent=True, body={}), clock.pace)

    assert clock.at_s <= STOP_MAX_S
    limits = [request.extensions["timeout"].values() for request in wire.asked]
    assert max(max(each) for each in limits) <= STOP_MAX_S
