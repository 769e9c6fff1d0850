"""Credits as a tenant and an operator meet them: statements, grants, prices."""

from __future__ import annotations

import csv
import io
from decimal import Decimal

import httpx
import pytest

from tests.e2e.gateways import LiveGateway

PATH = "/v1/images/generations"
BODY = {"prompt": "a fox", "size": "3:1", "quality": "low", "response_format": "url"}


@pytest.fixture(scope="module")
def live(shared_gateway: LiveGateway) -> LiveGateway:
    return shared_gateway


def bought(client: httpx.Client, **more: object) -> dict[str, object]:
    answer = client.post(PATH, json=BODY | more)
    assert answer.status_code == 200, answer.text
    found = answer.json(parse_float=Decimal)
    assert isinstance(found, dict)
    return found


def exact(answer: httpx.Response) -> dict[str, object]:
    assert answer.status_code == 200, answer.text
    found = answer.json(parse_float=Decimal)
    assert isinstance(found, dict)
    return found


def test_statement_and_usage_agree_with_the_balance(live: LiveGateway) -> None:
    key = live.tenant("reader", "20.5")
    with live.client(key) as client:
        tasks = [bought(client) for _ in range(3)]
        statement = exact(client.get("/v1/credits/entries"))
        usage = exact(client.get("/v1/usage"))
        holds = exact(client.get("/v1/credits/holds"))

    entries = statement["data"]
    assert isinstance(entries, list)
    assert [each["kind"] for each in entries] == ["charge"] * 3 + ["grant"]
    assert {each["task_id"] for each in entries[:3]} == {each["id"] for each in tasks}
    balance = live.balance("reader")
    assert sum(each["credits"] for each in entries) == Decimal(balance["available"])
    rows = usage["data"]
    assert isinstance(rows, list)
    assert len(rows) == 1
    assert (rows[0]["requests"], rows[0]["images"]) == (3, 3)
    assert usage["total_credits"] == Decimal(balance["spent"])
    assert rows[0]["tokens"]["image_output"] > 0
    assert holds["data"] == []


def test_a_statement_is_paged_and_comes_as_csv(live: LiveGateway) -> None:
    key = live.tenant("pages")
    with live.client(key) as client:
        for _ in range(2):
            bought(client)
        first = exact(client.get("/v1/credits/entries", params={"limit": "2"}))
        params = {"limit": "2", "after": str(first["next"])}
        last = exact(client.get("/v1/credits/entries", params=params))
        as_csv = client.get("/v1/credits/entries", headers={"accept": "text/csv"})
        page = client.get("/v1/credits/entries?format=csv&limit=1")
        usage = client.get("/v1/usage?format=csv&group_by=model")

    assert (first["has_more"], last["has_more"]) == (True, False)
    ids = [each["id"] for found in (first, last) for each in found["data"]]  # type: ignore[attr-defined]
    assert len(set(ids)) == 3
    read = list(csv.DictReader(io.StringIO(as_csv.text)))
    assert [row["id"] for row in read] == ids
    assert as_csv.headers["content-type"] == "text/csv; charset=utf-8"
    assert "x-next" not in as_csv.headers
    assert page.headers["x-next"]
    assert usage.text.splitlines()[0].startswith("model,requests,images,credits,")
    printed = live.cli("credits", "statement", "--tenant", "pages", "--csv").out
    assert list(csv.DictReader(io.StringIO(printed))) == read
    summed = live.cli("usage", "--tenant", "pages", "--by", "model", "--json").json
    assert summed[0]["credits"] == live.balance("pages")["spent"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/v1/credits/entries?after=nothing", "after"),
        ("/v1/credits/entries?limit=0", "limit"),
        ("/v1/credits/entries?limit=1001", "limit"),
        ("/v1/credits/entries?from=2026-02-30", "from"),
        ("/v1/credits/entries?format=xml", "format"),
        ("/v1/usage?from=2020-01-01", "from"),
        ("/v1/usage?group_by=tenant", "group_by"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    live: LiveGateway, path: str, param: str
) -> None:
    with live.client() as client:
        answer = client.get(path)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_nobody_reads_the_statement_of_another(live: LiveGateway) -> None:
    mine, other = live.tenant("mine"), live.tenant("other")
    with live.client(mine) as client:
        bought(client)
        bought(client)
        page = exact(client.get("/v1/credits/entries?limit=1"))
    with live.client(other) as client:
        params = {"after": str(page["next"])}
        stolen = exact(client.get("/v1/credits/entries", params=params))

    kinds = [each["kind"] for each in stolen["data"]]  # type: ignore[attr-defined]
    assert kinds == ["grant"]
    assert httpx.get(f"{live.url}/v1/usage").status_code == 401
