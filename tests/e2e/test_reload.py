"""The configuration is read again while requests are under way."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.adapters.logs import LogListener
from gateway.app import build_gateway, read_settings
from gateway.app.running import RETIRED_MAX_EDITIONS
from gateway.books import open_books
from gateway.settings import Settings
from tests.e2e.gateways import (
    ADMIN_KEY,
    COMMAND,
    LiveGateway,
    command,
    configured,
    environment,
)

BODY = {"prompt": "a fox", "size": "1:1", "quality": "low", "model": "gpt-image-2"}
POST = "/v1/images/generations"
RELOAD = "/admin/v1/reload"
LAST_OK = "imageway_config_last_reload_successful"
SEEN_MAX_S = 20.0
ADMIN = {"IMAGEWAY__SERVER__ADMIN_KEY": ADMIN_KEY}
SANDBOX = """
[[upstream]]
name = "{name}"
kind = "sandbox"
options = {{ latency_ms = {latency_ms} }}

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = {{ per = "image", flat = {dollars} }}
"""


def config_of(*names: str, more: str = "", latency_ms: int = 1) -> str:
    """Upstreams in the order of their prices, the cheapest first."""
    return more + "".join(
        SANDBOX.format(name=name, latency_ms=latency_ms, dollars=f"0.0{place}")
        for place, name in enumerate(names, start=1)
    )


def rewrite(gateway: LiveGateway, text: str) -> None:
    assert gateway.config is not None
    gateway.config.write_text(text)


def reload(gateway: LiveGateway) -> httpx.Response:
    with gateway.client(ADMIN_KEY) as admin:
        return admin.post(RELOAD)


def until(seen: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + SEEN_MAX_S
    while not seen():
        assert time.monotonic() < deadline_s, f"never seen: {what}"
        time.sleep(0.05)


def read_lines(gateway: LiveGateway) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in gateway.logs if line.startswith("{")]
    return [line for line in lines if line["event"] == "config_read"]


def trail(gateway: LiveGateway, task_id: str) -> list[str]:
    """Where a task was tried."""
    with gateway.client(ADMIN_KEY) as admin:
        attempts = admin.get(f"/v1/tasks/{task_id}").json()["attempts"]
    return [attempt["upstream"] for attempt in attempts]


def buy(gateway: LiveGateway) -> list[str]:
    with gateway.client() as client:
        answer = client.post(POST, json=BODY)
    assert answer.status_code == 200, answer.text
    return trail(gateway, answer.headers["x-task-id"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    folder = tmp_path_factory.mktemp("reload")
    with configured(folder, config_of("old"), **ADMIN) as started:
        yield started


@pytest.fixture
def gateway(running: LiveGateway) -> LiveGateway:
    """A gateway that goes by a configuration with one upstream, as after a start."""
    for name in ("before", "old"):
        rewrite(running, config_of(name))
        assert reload(running).status_code == 200
    running.logs.clear()
    return running


def test_new_requests_go_by_the_new_configuration_and_those_under_way_by_theirs(
    gateway: LiveGateway,
) -> None:
    gateway.sandbox("old", latency_ms=2_000)
    later = {"prefer": "respond-async"}
    with gateway.client() as client, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(client.post, POST, json=BODY)
        queued = client.post(POST, json=BODY, headers=later).json()["id"]
        until(
            lambda: client.get(f"/v1/tasks/{queued}").json()["status"] == "processing",
            "the task is worked on",
        )
        time.sleep(0.3)  # both calls are under way
        rewrite(gateway, config_of("new", "other"))
        answer = reload(gateway)

        assert answer.status_code == 200, (answer.text, gateway.logs)
        assert answer.json()["outcome"] == "reloaded"
        assert set(answer.json()["changed"]) == {"upstreams", "offers"}
        assert buy(gateway) == ["new"]
        old = begun.result()
        assert old.status_code == 200
        assert trail(gateway, old.headers["x-task-id"]) == ["old"]
        until(
            lambda: client.get(f"/v1/tasks/{queued}").json()["status"] == "completed",
            "the task is done",
        )
        assert trail(gateway, queued) == ["old"]
        states = gateway.metric("imageway_circuit_state")
        assert states
        assert not [labels for labels in states if 'upstream="old"' in labels]
        assert gateway.audit()["clean"]


def test_a_task_that_goes_on_is_not_taken_over_by_the_worker_that_came_after(
    gateway: LiveGateway,
) -> None:
    gateway.sandbox("old", latency_ms=3_000)
    later = {"prefer": "respond-async"}
    with gateway.client() as client:
        task_id = client.post(POST, json=BODY, headers=later).json()["id"]
        until(lambda: trail(gateway, task_id) == ["old"], "the call")
        rewrite(gateway, config_of("new"))
        assert reload(gateway).status_code == 200

        # As a machine that slept for a while finds it.
        with closing(sqlite3.connect(gateway.data_dir / "imageway.db")) as books, books:
            books.execute("UPDATE tasks SET lease_until_ms = 0 WHERE id = ?", [task_id])

        until(
            lambda: client.get(f"/v1/tasks/{task_id}").json()["status"] == "completed",
            "the task is done",
        )
    assert trail(gateway, task_id) == ["old"]


def test_a_price_changes_for_requests_from_then_on(gateway: LiveGateway) -> None:
    with gateway.client() as client:
        before = client.post("/v1/estimate", json=BODY).json()
        rewrite(gateway, config_of("old", more="[credits]\nper_usd = 100\n"))
        assert reload(gateway).json()["changed"] == ["nanocredits_per_usd"]
        after = client.post("/v1/estimate", json=BODY).json()

    assert before != after


def test_sighup_reads_again_and_what_is_wrong_changes_nothing(
    gateway: LiveGateway,
) -> None:
    rewrite(gateway, "[server]\nprot = 1\n" + config_of("new"))
    gateway.signal(signal.SIGHUP)
    until(lambda: gateway.metric(LAST_OK)[""] == 0, "the refusal")

    assert buy(gateway) == ["old"]
    (line,) = read_lines(gateway)
    assert line["outcome"] == "refused"
    assert "server.prot" in line["problem"]

    rewrite(gateway, config_of("new"))
    gateway.signal(signal.SIGHUP)
    until(lambda: gateway.metric(LAST_OK)[""] == 1, "the reload")

    assert buy(gateway) == ["new"]


def test_a_configuration_that_is_the_same_is_not_swapped(gateway: LiveGateway) -> None:
    gateway.sandbox("old", latency_ms=7)

    assert reload(gateway).json() == {
        "outcome": "unchanged",
        "changed": [],
        "warnings": [],
    }
    assert gateway.sandbox("old")["latency_ms"] == 7


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("not toml at all", "gateway.toml"),
        (config_of("old", more="[storage]\nredis = 'redis://127.0.0.1:9'\n"), "redis"),
        (config_of("old", more="[server]\nhost = '0.0.0.0'\n"), "server.host"),
        (config_of("old").replace("latency_ms", "latncy_ms"), "latncy_ms"),
    ],
    ids=["broken", "storage", "where it listens", "an adapter's option"],
)
def test_what_cannot_be_taken_over_is_refused_with_its_reason(
    gateway: LiveGateway, text: str, named: str
) -> None:
    rewrite(gateway, text)

    answer = reload(gateway)

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "config_invalid"
    assert named in " ".join(error["problems"])
    assert gateway.metric(LAST_OK)[""] == 0
    assert buy(gateway) == ["old"]


def test_only_an_admin_may_reload(gateway: LiveGateway) -> None:
    with gateway.client() as tenant:
        assert tenant.post(RELOAD).status_code == 401


def test_the_command_tells_what_became_of_it(gateway: LiveGateway) -> None:
    rewrite(gateway, config_of("new"))

    (told,) = gateway.cli("reload", "--json").json

    assert told["outcome"] == "heeded"
    assert buy(gateway) == ["new"]


def test_the_command_refuses_a_wrong_file_before_anybody_reads_it(
    gateway: LiveGateway,
) -> None:
    rewrite(gateway, "[server]\nprot = 1\n")

    refused = command(
        "reload", "--config", str(gateway.config), "--data-dir", str(gateway.data_dir)
    )

    assert refused.code == 78
    assert "server.prot" in refused.err
    assert not read_lines(gateway)


def test_the_command_tells_that_a_gateway_refused(gateway: LiveGateway) -> None:
    options = ["--config", str(gateway.config), "--data-dir", str(gateway.data_dir)]

    refused = command("reload", *options, IMAGEWAY__STORAGE__REDIS="")
    rewrite(gateway, config_of("old", more="[server]\nhost = '0.0.0.0'\n"))
    kept = command("reload", *options, "--json")

    assert refused.code == 0
    assert kept.code == 1
    assert "server.host" in json.loads(kept.out)[0]["problem"]


def test_without_a_gateway_the_command_says_so(tmp_path: Path) -> None:
    command("tenants", "create", "app", "--data-dir", str(tmp_path))

    alone = command("reload", "--data-dir", str(tmp_path))

    assert (alone.code, alone.out) == (1, "")
    assert "no gateway runs" in alone.err


def test_a_new_credential_is_tried_at_once(gateway: LiveGateway) -> None:
    gateway.sandbox("old", failure_rate=1, failure_kind="auth")
    with gateway.client() as client:
        assert client.post(POST, json=BODY).status_code == 503
        assert client.post(POST, json=BODY).status_code == 503

        rewrite(gateway, config_of("old", latency_ms=2))
        assert reload(gateway).json()["outcome"] == "reloaded"

        assert client.post(POST, json=BODY).status_code == 200


def test_a_task_that_goes_on_with_the_old_credential_spoils_not_the_new_one(
    gateway: LiveGateway,
) -> None:
    gateway.sandbox("old", failure_rate=1, failure_kind="auth")
    later = {"prefer": "respond-async"}

    def refusals() -> int:
        lines = [json.loads(line) for line in gateway.logs if line.startswith("{")]
        return sum(line.get("outcome") == "auth" for line in lines)

    with gateway.client() as client:
        task_id = client.post(POST, json=BODY, headers=later).json()["id"]
        until(lambda: refusals() == 1, "the first refusal")

        rewrite(gateway, config_of("old", latency_ms=2))
        assert reload(gateway).json()["outcome"] == "reloaded"
        # It tries again after 2 s, as it was configured when it began.
        until(lambda: refusals() == 2, "another refusal")

        states = gateway.metric("imageway_circuit_state")
        opened = [
            labels
            for labels, is_so in states.items()
            if is_so and 'state="open"' in labels
        ]
        assert states
        assert not opened
        assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 200


def test_reloads_one_after_the_other_lose_no_request(gateway: LiveGateway) -> None:
    def asked(_: int) -> int:
        with gateway.client() as client:
            return client.post(POST, json=BODY).status_code

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(asked, number) for number in range(60)]
        for number in range(10):
            rewrite(gateway, config_of(f"u{number}", "other", latency_ms=20))
            answer = reload(gateway)
            assert answer.status_code == 200, answer.text
            time.sleep(0.2)

    assert [each.result() for each in answers] == [200] * 60
    assert gateway.audit()["clean"]


async def test_configurations_that_nobody_uses_are_in_nobodys_way(
    tmp_path: Path,
) -> None:
    config = tmp_path / "gateway.toml"
    numbers = iter(range(2 * RETIRED_MAX_EDITIONS))

    def read_again() -> Settings:
        config.write_text(config_of(f"u{next(numbers)}"))
        return read_settings(config, {"storage.data_dir": str(tmp_path / "data")})

    settings = read_again()
    async with open_books(settings) as books:
        # None of its chores runs: as if all came within a second.
        gateway = build_gateway(settings, books, LogListener(), read_again=read_again)
        for _ in range(RETIRED_MAX_EDITIONS + 2):
            assert (await gateway.swap()).changed
        await gateway.close()


def test_a_hang_up_signal_while_it_starts_is_heeded_after_that(tmp_path: Path) -> None:
    options = ["--port", "0", "--data-dir", str(tmp_path)]
    starting = subprocess.Popen(
        [*COMMAND, "serve", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    until((tmp_path / "imageway.db").exists, "the database, long before it serves")
    starting.send_signal(signal.SIGHUP)

    assert starting.stderr is not None
    watchdog = threading.Timer(SEEN_MAX_S, starting.terminate)
    watchdog.start()
    try:
        lines = [starting.stderr.readline() for _ in ("started", "config_read")]
    finally:
        watchdog.cancel()
        starting.terminate()
        out, _ = starting.communicate(timeout=SEEN_MAX_S)

    assert "runs at" in out
    assert '"event":"config_read"' in lines[1]


def test_a_terminal_that_is_gone_ends_the_gateway_instead(tmp_path: Path) -> None:
    ours, its = pty.openpty()
    options = ["--port", "0", "--data-dir", str(tmp_path)]
    # The first terminal that a new session opens is its own.
    in_front = ["sh", "-c", f'exec "$@" <{os.ttyname(its)}', "sh"]
    run = subprocess.Popen(
        [*in_front, *COMMAND, "serve", *options],
        stdin=its,
        stdout=its,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    os.close(its)
    said = b""
    while b"-d '{" not in said:
        said += os.read(ours, 4096)

    os.close(ours)  # the system tells whoever is in front of the terminal

    try:
        assert run.wait(SEEN_MAX_S) == 0
    finally:
        run.kill()
