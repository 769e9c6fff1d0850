"""Simulators are steered: by a script for the next calls, by a mode for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.simulators.cast import CAST, Part
from tests.simulators.openai_server import KEY, OpenAISimulator
from tests.simulators.server import Fault, served

PATH = "/v1/images/generations"
BODY = {"model": "gpt-image-2", "prompt": "a fox", "size": "64x32", "quality": "low"}


class Caller:
    """Buys at a simulator and steers it, over HTTP as from another process."""

    def __init__(self, simulator: OpenAISimulator, client: httpx.AsyncClient) -> None:
        self.simulator = simulator
        self._client = client

    async def buy(self) -> int:
        """Buy a picture; returns the status, 0 where the connection broke."""
        auth = {"authorization": f"Bearer {KEY}"}
        try:
            answer = await self._client.post(PATH, json=BODY, headers=auth)
        except httpx.TransportError:
            return 0
        return answer.status_code

    async def steer(self, path: str, body: str) -> httpx.Response:
        return await self._client.post(path, content=body)

    async def read(self, path: str) -> Any:
        return (await self._client.get(path)).json()


@asynccontextmanager
async def calling(percent: int = 100) -> AsyncGenerator[Caller, None]:
    async with served(OpenAISimulator()) as simulator:
        simulator.percent = percent
        async with httpx.AsyncClient(base_url=simulator.origin, timeout=10) as client:
            yield Caller(simulator, client)


async def test_a_mode_stays_until_it_is_taken_back() -> None:
    async with calling() as caller:
        await caller.steer("/_mode", '{"status": 503, "body": {"error": "busy"}}')
        down = [await caller.buy() for _ in range(3)]
        answer = await caller.steer("/_mode", "null")
        well = await caller.buy()

    assert (down, well) == ([503] * 3, 200)
    assert answer.json() == {"waiting": 0, "lasting": []}
    assert len(caller.simulator.purchases) == 1


async def test_a_script_goes_before_the_mode_and_leaves_it_as_it_is() -> None:
    async with calling() as caller:
        await caller.steer("/_mode", '{"status": 503}')
        await caller.steer("/_script", '[{"status": 429}, {}]')
        seen = [await caller.buy() for _ in range(4)]

    assert seen == [429, 200, 503, 503]


async def test_each_step_has_a_mode_of_its_own() -> None:
    async with calling() as caller:
        poll, buy = '{"on": "poll", "status": 500}', '{"close": "reset"}'
        first = await caller.steer("/_mode", poll)
        seen = [await caller.buy()]
        both = await caller.steer("/_mode", buy)
        seen.append(await caller.buy())

    assert seen == [200, 0]
    assert first.json()["lasting"] == ["poll"]
    assert both.json()["lasting"] == ["", "poll"]
    assert len(caller.simulator.purchases) == 2  # a reset comes after the purchase


@pytest.mark.parametrize("lasting", [True, False], ids=["mode", "script"])
async def test_an_upload_can_be_cut_off_as_often_as_is_wanted(*, lasting: bool) -> None:
    async with calling() as caller:
        if lasting:
            await caller.steer("/_mode", '{"close": "mid_upload"}')
        else:
            await caller.steer("/_script", '[{"close": "mid_upload"}]')
        seen = [await caller.buy() for _ in range(2)]

    assert seen == ([0, 0] if lasting else [0, 200])
    assert len(caller.simulator.purchases) == (0 if lasting else 1)


@pytest.mark.parametrize("path", ["/_mode", "/_script"])
@pytest.mark.parametrize("body", ["", "[3]", '[{"stauts": 503}]', "nonsense"])
async def test_what_is_no_fault_is_refused_and_changes_nothing(
    path: str, body: str
) -> None:
    async with calling() as caller:
        answer = await caller.steer(path, body)
        well = await caller.buy()

    assert (answer.status_code, well) == (400, 200)
    assert "no fault" in answer.json()["error"]


async def test_the_bill_is_the_sum_of_the_purchases() -> None:
    async with calling(percent=95) as caller:
        await caller.buy()
        await caller.buy()
        log, bill = await caller.read("/_purchases"), await caller.read("/_bill")

    used: Mapping[str, Any] = log[0]["usage"]
    tokens = used["input_tokens"] * 5 + used["output_tokens"] * 30
    assert Decimal(log[0]["bill_usd"]) == Decimal(tokens * 95) / 10**8
    assert bill == {"jobs": 2, "usd": str(2 * Decimal(log[0]["bill_usd"]))}
    assert log[0]["prompt"] == "a fox"


@pytest.mark.parametrize("part", CAST, ids=lambda part: part.name)
async def test_each_of_the_cast_takes_a_mode_and_tells_its_bill(part: Part) -> None:
    made = part.kind(part.key, percent=part.percent)
    async with served(made) as simulator, httpx.AsyncClient() as client:
        told = '{"on": "", "status": 503}'
        await client.post(f"{simulator.origin}/_mode", content=told)
        bill = (await client.get(f"{simulator.origin}/_bill")).json()
        fault = simulator.fault()

    assert fault == Fault(status=503)
    assert bill == {"jobs": 0, "usd": "0"}
