"""Several gateways over one PostgreSQL and one Redis: to money they are one."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway
from tests.e2e.openai_upstreams import OFFER, simulated_upstream
from tests.e2e.test_postgres import config_in
from tests.e2e.test_s3 import storing
from tests.e2e.test_tasks import BODY, PATH
from tests.object_store import S3Server
from tests.servers import RedisServer
from tests.simulators.openai_server import KEY

CROWD = 200
HEARD_MAX_S = 2.0
RELOADED_MAX_S = 1.0
ALONE_RELOADED_MAX_S = 5.0
RATE_PER_S = 10
ASKED_EVERY_S = 0.3
UPSTREAMS = "/admin/v1/upstreams"
FAILING = {"failure_rate": 1, "failure_kind": "overloaded"}
SECOND = """
[[upstream]]
name = "dear"
kind = "sandbox"

[[upstream.offer]]
variant = "gpt-image-2"
model = "gpt-image-2"
cost = { per = "image", flat = 0.02 }
"""


Fleet = Callable[..., list[LiveGateway]]


@pytest.fixture
def fleet(
    tmp_path: Path, redis: RedisServer, s3: S3Server, *, whole: bool
) -> Iterator[Fleet]:
    """Start gateways that share everything but their data folders: four, or two."""
    env = {"IMAGEWAY__STORAGE__REDIS": redis.url, "SIMULATED_KEY": KEY}
    env |= storing(s3, s3.new_bucket())
    if not whole:
        env["IMAGEWAY__SERVER__LEAVING_S"] = "2"  # whoever balances asks oftener
    config = config_in(tmp_path, latency_ms=50)
    with ExitStack() as stack:

        def start(more_config: str = "") -> list[LiveGateway]:
            config.write_text(config.read_text() + more_config)
            return [
                stack.enter_context(
                    LiveGateway(tmp_path / f"gateway-{number}", config=config, env=env)
                )
                for number in range(4 if whole else 2)
            ]

        yield start


async def asked(
    gateways: list[LiveGateway], key: str, times: int, **headers: str
) -> list[httpx.Response]:
    """Ask the gateways in turn, ``CROWD`` at a time; returns the answers."""
    headers = {"authorization": f"Bearer {key}"} | headers
    urls = itertools.islice(itertools.cycle(g.url for g in gateways), times)
    answers: list[httpx.Response] = []

    async def ask(client: httpx.AsyncClient) -> None:
        # Not one task for each: a pool looks through all that wait for it, each time.
        for url in urls:
            answers.append(await client.post(url + PATH, json=BODY))  # noqa: PERF401

    limits = httpx.Limits(max_connections=CROWD)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=240) as client:
        await asyncio.gather(*(ask(client) for _ in range(CROWD)))
    return answers


def test_a_balance_buys_what_it_pays_for_however_many_ask(
    fleet: Fleet, *, whole: bool
) -> None:
    pays_for, tries = (100, 5_000) if whole else (20, 200)
    gateways = fleet()
    first = gateways[0]
    with first.client(first.tenant("rich")) as client:
        price = client.post(PATH, json=BODY).json()["usage"]["credits_used"]
    key = first.tenant("tight", f"{price * pays_for:.9f}")

    answers = asyncio.run(asked(gateways, key, tries))

    statuses = Counter(answer.status_code for answer in answers)
    # Who is turned away at the door is told so, and has bought nothing.
    assert set(statuses) <= {200, 402, 429}
    assert statuses[200] == pays_for
    assert gateways[-1].balance("tight")["available"] == "0"
    assert sum(gateway.bought("sandbox") for gateway in gateways) == pays_for + 1
    assert gateways[-1].audit()["clean"]


def test_two_hundred_equal_posts_to_all_of_them_buy_once(fleet: Fleet) -> None:
    gateways = fleet()
    key = gateways[0].tenant("once")

    repeated = {"idempotency-key": "the-same-for-all-of-them"}
    answers = asyncio.run(asked(gateways, key, 200, **repeated))

    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {200: 200}, {answer.text[:300] for answer in answers}
    assert len({answer.headers["x-task-id"] for answer in answers}) == 1
    assert sum(gateway.bought("sandbox") for gateway in gateways) == 1
    assert gateways[-1].audit()["clean"]


def test_a_breaker_that_one_has_opened_is_heeded_by_all_within_two_seconds(
    fleet: Fleet,
) -> None:
    gateways = fleet(SECOND)
    first, *others = gateways
    key = first.tenant("acme")
    first.sandbox("sandbox", **FAILING)
    with first.client(key) as client:
        until = time.monotonic() + 30
        while not opened(first):
            assert client.post(PATH, json=BODY).status_code == 200
            assert time.monotonic() < until
    time.sleep(HEARD_MAX_S)

    for gateway in others:
        assert opened(gateway)
        with gateway.client(key) as client:
            assert client.post(PATH, json=BODY).status_code == 200
        assert gateway.bought("sandbox") == 0
        assert gateway.bought("dear") == 1


def test_a_reload_that_one_is_asked_for_reaches_all_with_redis_and_without(
    fleet: Fleet, redis: RedisServer
) -> None:
    gateways = fleet(SECOND)
    first, *others = gateways
    assert first.config is not None
    config = first.config.read_text()

    def reloaded(price: str, within_s: float) -> None:
        assert first.config is not None
        first.config.write_text(config.replace("flat = 0.02", f"flat = {price}"))
        before = [costs(gateway) for gateway in others]
        with first.client(ADMIN_KEY) as admin:
            answer = admin.post("/admin/v1/reload")
        assert answer.json() == {
            "outcome": "reloaded",
            "changed": ["offers"],
            "warnings": answer.json()["warnings"],
        }
        time.sleep(within_s)
        after = [costs(gateway) for gateway in others]
        assert set(after) == {float(price)} != set(before)

    reloaded("0.03", RELOADED_MAX_S)
    redis.kill()
    try:
        reloaded("0.04", ALONE_RELOADED_MAX_S)
    finally:
        redis.start()  # it is that of other tests too


def costs(gateway: LiveGateway) -> float:
    """Tell what the dear upstream would cost, as a gateway sees it now."""
    with gateway.client(ADMIN_KEY) as admin:
        answer = admin.post("/admin/v1/routes/explain", json=BODY)
    (dear,) = [c for c in answer.json()["route"] if c["upstream"] == "dear"]
    return float(dear["estimate_usd"])


def opened(gateway: LiveGateway) -> bool:
    with gateway.client(ADMIN_KEY) as client:
        found = client.get(UPSTREAMS).json()["data"]
    (sandbox,) = [upstream for upstream in found if upstream["upstream"] == "sandbox"]
    return any(offer["state"] == "open" for offer in sandbox["offers"])


def test_gateways_are_restarted_in_turn_under_load_and_no_request_fails(
    fleet: Fleet,
) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(simulated_upstream("real"))
        offer = OFFER.format(
            name="real", base_url=upstream.base_url, options="", dollars=1
        )
        gateways = fleet(offer)
        key = gateways[0].tenant("acme", "100000")
        balancer = stack.enter_context(Balancer(gateways))
        over = threading.Event()
        answers: list[int] = []
        lock = threading.Lock()

        def client() -> None:
            with httpx.Client(
                headers={"authorization": f"Bearer {key}"}, timeout=60
            ) as http:
                while not over.is_set():
                    answer = http.post(balancer.url() + PATH, json=BODY)
                    with lock:
                        answers.append(answer.status_code)
                    time.sleep(4 / RATE_PER_S)

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            for gateway in gateways:
                time.sleep(2)
                before = len(answers)
                assert gateway.stop() == 0
                gateway.start()
                balancer.ready_again(gateway)
                assert len(answers) > before
            over.set()
        for done in clients:
            done.result()

        assert set(answers) == {200}
        assert len(upstream.purchases()) == len(answers)
        assert gateways[0].audit()["clean"]


class Balancer:
    """Sends to gateways that say that they are ready, in turn, as balancers do."""

    def __init__(self, gateways: list[LiveGateway]) -> None:
        self._gateways = gateways
        self._ready = [gateway.url for gateway in gateways]
        self._turn = itertools.count()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def url(self) -> str:
        """Choose one for the next request."""
        ready = self._ready
        return ready[next(self._turn) % len(ready)]

    def ready_again(self, gateway: LiveGateway) -> None:
        """Wait until a gateway is sent requests again."""
        until = time.monotonic() + 30
        while gateway.url not in self._ready:
            assert time.monotonic() < until
            time.sleep(ASKED_EVERY_S)

    def _watch(self) -> None:
        while not self._over.wait(ASKED_EVERY_S):
            self._ready = [g.url for g in self._gateways if _is_ready(g.url)]


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
