"""Workers that are killed and workers that are stopped: bought once, told once."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.flows.webhooks import LEASE_MS as WEBHOOK_LEASE_MS
from tests.chaos.stages import At, Stage, end, stage, until
from tests.e2e.openai_upstreams import running_server, simulated_upstream
from tests.simulators.openai_server import KEY as OPENAI_KEY
from tests.simulators.task_server import KEY as TASK_KEY

TAKEOVER_MAX_S = 5.0
"""From the end of a lease, which lasts 30 s, to the next claim."""
WATCH_EVERY_S = 0.1


@contextmanager
def watched(set_up: Stage) -> Iterator[list[float]]:
    """Note all the time how long, in seconds, an ended lease has waited at most."""
    over, waits_s = threading.Event(), [0.0]

    def look() -> None:
        while not over.wait(WATCH_EVERY_S):
            (row,) = set_up.rows(
                "SELECT MIN(lease_until_ms) FROM tasks WHERE state = 'processing'"
            )
            if row[0] is not None:
                waits_s.append(time.time() - row[0] / 1000)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield waits_s
    finally:
        over.set()
        watcher.join()


def test_tasks_survive_workers_that_are_killed_at_random(
    tmp_path: Path, whole: bool
) -> None:
    tasks, slots, lease_ms, latency_s, kills = 24, 8, 2_000, 4.0, 4
    if whole:
        tasks, slots, lease_ms, latency_s, kills = 200, 24, 30_000, 12.0, 20
    chance = random.Random(20261125)
    module = ("tests.simulators.task_server", "--latency-s", str(latency_s))
    with (
        running_server(*module) as base_url,
        stage(tmp_path, TASK_KEY, At("task_api", base_url, slots=slots)) as set_up,
    ):
        at_work = [set_up.work(lease_ms) for _ in range(3)]
        ids = set_up.open(tasks)
        with watched(set_up) as waits_s:
            for _ in range(kills):
                time.sleep(chance.uniform(0.1, 2 * latency_s / 5))
                end(at_work.pop(chance.randrange(len(at_work))))
                at_work.append(set_up.work(lease_ms))
            most_s = 4 * lease_ms / 1000 + 10 * latency_s
            until(lambda: set_up.finished() == tasks, at_most_s=most_s)
        # A worker may be killed while it sends: the next one waits for its lease.
        most_s = WEBHOOK_LEASE_MS / 1000 + 15
        until(lambda: len(set_up.receiver.got) >= tasks, at_most_s=most_s)
        origin = base_url.removesuffix("/v1")
        bought = httpx.get(f"{origin}/_purchases").json()
        takeovers = set_up.rows("SELECT SUM(takeovers), MAX(takeovers) FROM tasks")[0]
        charges = set_up.rows("SELECT COUNT(*), MIN(charged) FROM settlements")[0]
        audit = set_up.run("audit", "--json")

    print(  # noqa: T201 - figures, where somebody asks for them
        f"{tasks} tasks, {kills} kills, takeovers in all and at most {takeovers}, "
        f"longest wait after the end of a lease {max(waits_s):.1f} s"
    )
    assert len(bought) == tasks
    assert takeovers[0] > 0
    assert charges[0] == tasks
    assert charges[1] > 0
    if whole:
        assert max(waits_s) < TAKEOVER_MAX_S
    assert {got.task["id"] for got in set_up.receiver.got} == set(ids)
    assert all(got.settled for got in set_up.receiver.got)
    assert set_up.receiver.unsigned == []
    assert audit.code == 0, audit.out


@pytest.mark.parametrize("fence", ["fenced", "unfenced"])
def test_a_worker_that_was_stopped_and_goes_on_cannot_write(
    tmp_path: Path, fence: str, whole: bool
) -> None:
    # While it is stopped its upstream refuses, so that it would buy elsewhere; by then
    # another worker has the task, and has bought there. Unfenced is the control.
    stopped_s, lease_ms = (60.0, 30_000) if whole else (5.0, 2_000)
    more = [fence] if fence == "unfenced" else []
    with (
        simulated_upstream("busy") as busy,
        simulated_upstream("slow") as slow,
        stage(
            tmp_path,
            OPENAI_KEY,
            At("openai", busy.base_url),
            At("openai", slow.base_url),
        ) as set_up,
    ):
        refusal = {"error": {"message": "later", "code": "server_is_overloaded"}}
        busy.script({"status": 503, "body": refusal, "delay_s": 1.0})
        slow.script(*[{"delay_s": stopped_s}] * 2)
        set_up.open(1)
        first = set_up.work(lease_ms, *more)
        until(lambda: bool(set_up.rows("SELECT 1 FROM attempts")), at_most_s=10)
        first.send_signal(signal.SIGSTOP)
        stopped_at_s = time.monotonic()
        set_up.work(lease_ms, *more)
        until(lambda: len(slow.purchases()) == 1, at_most_s=lease_ms / 1000 + 5)
        time.sleep(max(0.0, stopped_at_s + stopped_s - time.monotonic()))
        first.send_signal(signal.SIGCONT)
        until(lambda: set_up.finished() == 1, at_most_s=2 * stopped_s + 30)
        until(lambda: bool(set_up.receiver.got), at_most_s=10)
        time.sleep(1 + stopped_s / 10)
        bought = len(busy.purchases()) + len(slow.purchases())
        charges = set_up.rows("SELECT COUNT(*) FROM settlements")[0][0]
        told = [got.event_id for got in set_up.receiver.got]
        fences = set_up.rows("SELECT fence FROM tasks")
        audit = set_up.run("audit", "--json")

    assert fences == [(2,)]
    assert bought == (1 if fence == "fenced" else 2)
    assert charges == 1
    assert len(told) == 1
    assert audit.code == 0, audit.out
