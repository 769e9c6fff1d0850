"""What the metrics say of a gateway, and how many of them there can be."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.core.outcomes import RequestOutcome
from tests.inside import ADMIN, Inside, inside
from tests.servers import program

UPSTREAMS = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
REQUESTS = "imageway_requests_total"
SERIES_MAX = 2_000
"""Of the shipped configuration: five variants at three upstreams."""
ASKED = 10_000
TENANTS = 1_000


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Inside]:
    async with inside(tmp_path) as made:
        for upstream in UPSTREAMS:
            made.tune(upstream, latency_ms=0)
        yield made


def fail(there: Inside, kind: str, *upstreams: str) -> None:
    for upstream in upstreams or UPSTREAMS:
        there.tune(upstream, failure_rate=1, failure_kind=kind)


def outcomes(samples: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> set[str]:
    """What was counted of requests, as ``model operation mode outcome count``."""
    found = {}
    for (name, labels), value in samples.items():
        if name == REQUESTS and value:
            told = dict(labels)
            names = (told[n] for n in ("model", "operation", "mode", "outcome"))
            found[" ".join(names)] = value
    return {f"{what} {value:.0f}" for what, value in found.items()}


async def ended(there: Inside, task_id: str) -> None:
    async with asyncio.timeout(30):
        status = ""
        while status != "completed":
            await asyncio.sleep(0.05)
            task = await there.client.get(f"/v1/tasks/{task_id}")
            status = task.json()["status"]


async def test_every_request_for_pictures_is_counted_once_when_it_has_ended(
    there: Inside,
) -> None:
    made = await there.ask()
    repeated = [await there.ask(user="me") for _ in range(1)]
    queued = await there.client.post(
        "/v1/images/generations",
        json={"model": "gpt-image-2", "prompt": "x"},
        headers={"prefer": "respond-async"},
    )
    await ended(there, queued.json()["id"])
    wrong = await there.ask(size="7:1")
    strange = await there.ask(model="never-heard-of-it")
    nobody = await there.client.post(
        "/v1/images/generations", headers={"authorization": "Bearer nobody"}
    )
    fail(there, "content_policy")
    refused = await there.ask()
    fail(there, "overloaded")
    down = await there.ask()

    answers = (made, *repeated, queued, wrong, strange, nobody, refused, down)
    assert [a.status_code for a in answers] == [200] * 3 + [400, 404, 401, 400, 503]
    assert outcomes(await there.samples()) == {
        "gpt-image-2 generate sync success 2",
        "gpt-image-2 generate async success 1",
        "gpt-image-2 generate sync client_error 1",
        "other generate sync client_error 2",
        "gpt-image-2 generate sync refused 1",
        "gpt-image-2 generate sync upstream_exhausted 1",
    }


async def test_a_repeated_request_is_no_second_one(there: Inside) -> None:
    once = {"idempotency-key": "a"}
    body = {"model": "gpt-image-2", "prompt": "x"}
    for _ in range(3):
        await there.client.post("/v1/images/generations", json=body, headers=once)

    assert outcomes(await there.samples()) == {"gpt-image-2 generate sync success 1"}


async def test_a_fallback_is_told_with_its_way_and_its_reason(there: Inside) -> None:
    fail(there, "overloaded", "sandbox-thrifty")

    assert (await there.ask()).status_code == 200

    way = {"from": "sandbox-thrifty", "to": "sandbox-fair", "reason": "overloaded"}
    model = {"model": "gpt-image-2"}
    assert await there.sample("imageway_fallbacks_total", **model, **way) == 1
    assert await there.sample("imageway_requests_saved_by_fallback_total", **model) == 1
    for upstream, result in (
        ("sandbox-thrifty", "overloaded"),
        ("sandbox-fair", "success"),
    ):
        labels = model | {"upstream": upstream, "result": result}
        assert await there.sample("imageway_upstream_attempts_total", **labels) == 1
    assert await there.sample("imageway_overhead_seconds_count") == 1
    overhead_s = await there.sample("imageway_overhead_seconds_sum")
    assert 0 < overhead_s < 60


async def test_an_upstream_whose_account_is_refused_is_down(there: Inside) -> None:
    fail(there, "auth", "sandbox-thrifty")
    up = {"upstream": "sandbox-thrifty"}
    assert await there.sample("imageway_upstream_up", **up) == 1

    await there.ask()

    await there.gateway.loops.chores["how upstreams are"][1]()
    assert await there.sample("imageway_upstream_up", **up) == 0
    circuit = up | {"model": "gpt-image-2", "operation": "generate"}
    state = circuit | {"state": "open"}
    assert await there.sample("imageway_circuit_state", **state) == 1
    moved = circuit | {"to": "open"}
    assert await there.sample("imageway_circuit_transitions_total", **moved) == 1


async def test_a_monitor_is_told_in_short_how_upstreams_are(there: Inside) -> None:
    fail(there, "auth", "sandbox-thrifty")
    await there.ask()
    nobody = await there.client.get("/health/upstreams")
    some = await there.client.get("/health/upstreams", headers=ADMIN)
    fail(there, "auth")
    await there.ask()
    none = await there.client.get("/health/upstreams", headers=ADMIN)
    ready = await there.client.get("/health/ready")

    assert nobody.status_code == 401
    assert (some.status_code, some.json()["status"]) == (200, "degraded")
    told = some.json()["upstreams"]
    assert told["sandbox-fair"]["up"]
    assert not told["sandbox-thrifty"]["up"]
    assert told["sandbox-thrifty"]["reason"] == "auth"
    assert (none.status_code, none.json()["status"]) == (503, "down")
    assert ready.status_code == 200  # a gateway without upstreams still answers


async def test_a_task_that_is_cancelled_while_it_waits_is_counted_once(
    tmp_path: Path,
) -> None:
    async with inside(tmp_path, works=False) as there:
        queued = await there.client.post(
            "/v1/images/generations",
            json={"model": "gpt-image-2", "prompt": "x"},
            headers={"prefer": "respond-async"},
        )
        await there.gateway.loops.chores["open tasks"][1]()
        assert await there.sample("imageway_tasks", state="pending") == 1
        assert await there.sample("imageway_credits_held") > 0

        path = f"/v1/tasks/{queued.json()['id']}/cancel"
        answers = await asyncio.gather(*(there.client.post(path) for _ in range(4)))

        assert {answer.status_code for answer in answers} == {200}
        assert outcomes(await there.samples()) == {
            "gpt-image-2 generate async cancelled 1"
        }


async def test_a_task_that_nobody_ends_counts_as_a_timeout(tmp_path: Path) -> None:
    async with inside(tmp_path, works=False) as there:
        await there.client.post(
            "/v1/images/generations",
            json={"model": "gpt-image-2", "prompt": "x"},
            headers={"prefer": "respond-async"},
        )
        await there.books.database.write(
            lambda tx: tx.run("""UPDATE tasks SET deadline_ms = 1, mode = 'sync',
                    order_json = NULL""")
        )

        assert await there.gateway.standing.recovery.overdue() == 1

        assert outcomes(await there.samples()) == {
            "gpt-image-2 generate sync timeout 1"
        }


# --- all of them ---


async def test_everything_configured_is_there_from_the_start_at_zero(
    there: Inside,
) -> None:
    samples = await there.samples()

    for outcome in RequestOutcome:
        labels = {"operation": "edit", "mode": "async", "outcome": outcome.value}
        for model in ("gpt-image-1.5", "other"):
            key = (REQUESTS, frozenset({**labels, "model": model}.items()))
            assert samples[key] == 0
    counters = [v for (name, _), v in samples.items() if name.endswith("_total")]
    assert len(counters) > 500
    assert not any(
        value
        for (name, _), value in samples.items()
        if name.endswith("_total") and not name.startswith("imageway_http")
    )


async def test_promtool_has_nothing_to_say_of_them(there: Inside) -> None:
    await there.ask()
    text = (await there.client.get("/metrics")).content

    assert await asyncio.to_thread(checked, text) == (0, b"", b"")


def checked(text: bytes) -> tuple[int, bytes, bytes]:
    command = [program("promtool"), "check", "metrics"]
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.timeout(300)  # ten thousand requests, beside whatever else runs
async def test_whatever_is_asked_by_whomever_there_are_only_so_many(
    there: Inside,
) -> None:
    chance = random.Random(7)
    keys = await many_keys(there)
    for upstream in UPSTREAMS:
        there.tune(upstream, failure_rate=0.3, failure_kind="overloaded")

    async def some(count: int) -> None:
        for _ in range(count):
            await one_of_any_kind(there, chance, keys)

    await asyncio.gather(*(some(ASKED // 20) for _ in range(20)))

    samples = await there.samples()
    counted = sum(
        value
        for (name, _), value in samples.items()
        if name == "imageway_http_requests_total"
    )
    assert counted >= ASKED
    assert len(samples) < SERIES_MAX


async def many_keys(there: Inside) -> list[str]:
    async def one(place: int) -> str:
        tenant = await there.books.tenants.create(f"tenant-{place}")
        return (await there.books.keys.create(tenant)).secret

    return await asyncio.gather(*(one(place) for place in range(TENANTS)))


async def one_of_any_kind(
    there: Inside, chance: random.Random, keys: list[str]
) -> None:
    junk = "".join(chance.choices("abcdefgh/%.", k=12))
    mine = {"authorization": f"Bearer {chance.choice(keys)}"}
    match chance.choices(range(6), [45, 30, 14, 9, 1, 1])[0]:
        case 0:
            await there.client.get(f"/x{junk}", headers=mine)
        case 1:
            body = {"model": junk, "prompt": "x"}
            path = "/v1/images/generations"
            await there.client.post(path, json=body, headers=mine)
        case 2:
            method = "".join(chance.choices("GETPUSHX", k=4))
            await there.client.request(method, "/v1/models", headers=mine)
        case 3:
            await there.client.get(f"/v1/tasks/{junk}", headers=mine)
        case 4:
            body = {"model": "gpt-image-2", "prompt": "x"}
            path = "/v1/images/generations"
            await there.client.post(path, json=body, headers=mine)
        case _:
            await there.ask(quality="low", size="1024x1024")
