"""Has pictures made by a gateway elsewhere: ordered once, waited for, and fetched.

A part of the composition root, like ``books``: it joins the client to the machine's
clock and disk, for the command ``generate``.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from gateway.adapters.client import (
    AwayError,
    GatewayClient,
    RefusedError,
    RemoteTask,
    is_task_id,
    opened,
)

__all__ = [
    "AwayError",
    "GatewayClient",
    "Order",
    "Pace",
    "RefusedError",
    "RemoteTask",
    "Target",
    "TargetTakenError",
    "Waited",
    "fetch",
    "follow",
    "is_task_id",
    "opened",
    "place",
    "stop",
]

PATIENCE_S = 60.0
"""How long a gateway may be away, or too busy, before that is the answer."""
FIRST_PAUSE_S = 0.3
PAUSE_MAX_S = 3.0
"""Between two looks at a task. Each looks at the books only, but there may be many."""
PAUSE_GROWS = 1.5
STOP_MAX_S = 20.0
"""How long who wants to leave waits for a task to be found and cancelled."""
EXTENSIONS = {"jpeg": "jpg"}

T = TypeVar("T")
Picture = str | Path
"""A reference as the gateway takes it, or a file on this machine."""
Tell = Callable[[str, int], None]
"""Shows what is being done, and how far all of it is, in percent."""


class TargetTakenError(Exception):
    """A file is there already, and stays as it is."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The clock that waiting goes by."""

    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    Fields:
        fields: of the request's body, without its pictures.
        idempotency_key: of this order, however often it is sent.
    """

    fields: Mapping[str, object]
    references: tuple[Picture, ...]
    mask: Picture | None
    idempotency_key: str

    @property
    def brings_files(self) -> bool:
        """Whether there are pictures to be uploaded first."""
        return any(isinstance(p, Path) for p in (*self.references, self.mask))

    def body(self, located: Callable[[Picture], str]) -> dict[str, object]:
        """Build the body; ``located`` tells where the gateway finds a picture."""
        body = dict(self.fields)
        if self.references:
            body["image_urls"] = [located(picture) for picture in self.references]
        if self.mask is not None:
            body["mask_url"] = located(self.mask)
        return body


@dataclass(slots=True)
class Waited:
    """How far an order has come, for whoever has to stop in the middle of it."""

    sent: bool = False
    task_id: str | None = None
    body: Mapping[str, object] | None = None
    """What is sent, once it is: sent again, it finds the task that it made."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where pictures go. ``name`` None: they are called after their task."""

    folder: Path
    name: str | None = None
    force: bool = False
    keep: bool = False
    """Leaves files that are there alone: they were fetched before."""

    def paths(self, task_id: str, count: int, output_format: str) -> list[Path]:
        """Name the files of a task, in order."""
        if self.name is None:
            ends = EXTENSIONS.get(output_format, output_format)
            names = [f"{task_id}-{place}.{ends}" for place in range(1, count + 1)]
        elif count == 1:
            names = [self.name]
        else:
            given = Path(self.name)
            places = range(1, count + 1)
            names = [f"{given.stem}-{place}{given.suffix}" for place in places]
        return [self.folder / name for name in names]

    def check_free(self, count: int) -> None:
        """Look before something is bought that could not be kept.

        Raises:
            TargetTakenError: a file is there already.
            OSError: there is no such folder, and it cannot be made or written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.folder} cannot be written to")
        if self.name is not None and not self.force and not self.keep:
            for path in self.paths("", count, ""):
                _check_free(path)


def place(
    client: GatewayClient, order: Order, so_far: Waited, tell: Tell, pace: Pace
) -> RemoteTask:
    """Send an order, again if its answer is lost; returns the task, under way.

    Raises:
        AwayError: the gateway cannot be reached.
        RefusedError: it does not want the order.
        OSError: a picture to be sent cannot be read.
    """
    uploaded: dict[Picture, str] = {}

    def located(picture: Picture) -> str:
        if isinstance(picture, str):
            return picture
        if picture not in uploaded:
            tell(f"sending {picture.name}", 0)
            uploaded[picture] = _patiently(
                lambda: client.upload(picture), pace, eager=True
            )
        return uploaded[picture]

    def submit() -> RemoteTask:
        so_far.body = body
        earlier, so_far.sent = so_far.sent, True
        try:
            return client.submit(body, order.idempotency_key)
        except AwayError as error:
            so_far.sent = earlier or error.may_have_arrived
            raise
        except RefusedError:
            so_far.sent = earlier
            raise

    try:
        body = order.body(located)
        tell("asking", 0)
        task = _patiently(submit, pace, eager=True)
        so_far.task_id = task.id
    finally:
        # The gateway has copied what it needs, and they count towards a quota.
        with suppress(AwayError):  # who does not answer is not asked for each
            for file_id in uploaded.values():
                with suppress(RefusedError):
                    client.delete(file_id)
    return task


def stop(client: GatewayClient, order: Order, so_far: Waited, pace: Pace) -> RemoteTask:
    """Cancel what was ordered, within about ``STOP_MAX_S``; returns the task.

    A task whose id did not arrive is found by sending the order again, under its key.
    If it had not arrived at all it is made by that, and cancelled while it waits.

    Raises:
        AwayError: the gateway cannot be reached, or does not answer.
        RefusedError: it did not take the order, or the task cannot be cancelled.
    """
    if so_far.task_id is None:
        body, key = so_far.body or {}, order.idempotency_key
        so_far.task_id = _patiently(
            lambda: client.submit(body, key, at_most_s=STOP_MAX_S / 2),
            pace,
            patience_s=STOP_MAX_S / 2,
        ).id
    return client.cancel(so_far.task_id, at_most_s=STOP_MAX_S / 2)


def follow(
    client: GatewayClient,
    task: RemoteTask,
    wait_s: float | None,
    tell: Tell,
    pace: Pace,
) -> RemoteTask:
    """Look at a task until it is over, or ``wait_s`` have passed.

    Raises:
        AwayError: the gateway cannot be reached any more.
        RefusedError: it does not show the task any more.
    """
    started_s = pace.now_s()
    pause_s = FIRST_PAUSE_S
    while not task.over:
        spent_s = pace.now_s() - started_s
        left_s = PATIENCE_S if wait_s is None else wait_s - spent_s
        if left_s <= 0:
            break
        doing = "waiting" if task.status == "pending" else "making"
        tell(f"{doing}, {spent_s:.0f} s", task.progress)
        pace.sleep(min(pause_s, left_s))
        pause_s = min(pause_s * PAUSE_GROWS, PAUSE_MAX_S)
        task = _patiently(
            partial(client.task, task.id), pace, patience_s=min(left_s, PATIENCE_S)
        )
    return task


def fetch(
    client: GatewayClient, task: RemoteTask, target: Target, tell: Tell, pace: Pace
) -> list[Path]:
    """Fetch a task's pictures into files, whole or not at all; returns their paths.

    A file that is called after the task is that picture already: it is left alone, and
    so is any that is there if the target keeps them.

    Raises:
        TargetTakenError: a file is there already.
        AwayError: a link leads nowhere.
        RefusedError: a link is not, or not any more, good.
        OSError: a file cannot be written.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    paths = target.paths(task.id, len(task.links), task.output_format or "png")
    for place, (link, path) in enumerate(zip(task.links, paths, strict=True), 1):
        tell(f"fetching {place} of {len(paths)}", 100 * (place - 1) // len(paths))
        if not target.force and path.exists():
            if target.name is None or target.keep:
                continue
            _check_free(path)
        _fetch_one(client, link, path, pace, force=target.force)
    tell("done", 100)
    return paths


def _fetch_one(
    client: GatewayClient, link: str, path: Path, pace: Pace, *, force: bool
) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")

    def once() -> None:
        part.unlink(missing_ok=True)
        client.download(link, part)

    try:
        _patiently(once, pace)
        if not force:
            _take(path)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _take(path: Path) -> None:
    # Made by nobody but us, or not at all: what came in between is not overwritten.
    try:
        path.open("xb").close()
    except FileExistsError:
        raise _taken(path) from None


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise _taken(path)


def _taken(path: Path) -> TargetTakenError:
    return TargetTakenError(
        f"{path} is there already: take another --out, or --force to overwrite it"
    )


def _patiently(
    call: Callable[[], T],
    pace: Pace,
    *,
    patience_s: float = PATIENCE_S,
    eager: bool = False,
) -> T:
    """Call until it works or ``patience_s`` are over; then its error is raised.

    ``eager``: a gateway that is not there at the first call is not waited for.
    """
    until_s = pace.now_s() + patience_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except AwayError as error:
            if eager and not error.may_have_arrived:
                raise
            wait_s = pause_s
            last: Exception = error
        except RefusedError as error:
            if not error.passing:
                raise
            wait_s = max(pause_s, error.retry_after_s or 0)
            last = error
        if pace.now_s() + wait_s >= until_s:
            raise last
        pace.sleep(wait_s)
        pause_s = min(pause_s * PAUSE_GROWS, PAUSE_MAX_S)
        eager = False
