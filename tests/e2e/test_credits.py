"""Credits as a tenant and an operator meet them: statements, grants, prices."""

from __future__ import annotations

import csv
import io
import json
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway, command

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


# --- operators ---

TENANTS = "/admin/v1/tenants"


def test_a_tenant_is_made_and_given_credits_by_the_admin_api(
    live: LiveGateway,
) -> None:
    with live.client(ADMIN_KEY) as admin:
        made = admin.post(TENANTS, json={"name": "acme", "credits": "10.5"})
        url = f"{TENANTS}/acme/grants"
        body = {"credits": 5, "expires_at": "2999-12-31", "note": "a promotion"}
        headers = {"idempotency-key": "promo-1"}
        first, again = (admin.post(url, json=body, headers=headers) for _ in range(2))
        other = admin.post(url, json={"credits": 6}, headers=headers)
        grants = exact(admin.get(url))
        found = exact(admin.get(f"{TENANTS}/{made.json()['id']}"))
        taken = admin.post(TENANTS, json={"name": "acme"})

    assert made.status_code == 201
    assert first.json() == again.json()
    assert first.json()["available"] == 15.5
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    promo = grants["data"][0]  # type: ignore[index]
    assert promo["reference"] == "promo-1"
    assert (promo["left"], promo["note"]) == (5, "a promotion")
    assert promo["expires_at"] == "3000-01-01T00:00:00Z"
    assert (found["name"], found["available"]) == ("acme", Decimal("15.5"))
    assert taken.status_code == 409
    shown = live.cli("credits", "grants", "--tenant", "acme", "--json").json
    assert [each["credits"] for each in shown] == ["5", "10.5"]


@pytest.mark.parametrize(
    "amount",
    [
        *('"-1"', "-1", "1e3", '"1e3"', "1.5e1", "0.0000000001", "99999999999", "NaN"),
        *('"NaN"', '"Infinity"', "true", "null", "[]", '""', "0", "1" + "0" * 400),
    ],
)
def test_what_is_no_amount_is_refused_everywhere(
    live: LiveGateway, amount: str
) -> None:
    with live.client(ADMIN_KEY) as admin:
        for path, body in (
            ("/first/grants", f'{{"credits": {amount}}}'),
            ("/first/refunds", f'{{"task_id": "x", "credits": {amount}}}'),
        ):
            if (path, amount) == ("/first/refunds", "null"):
                continue  # all that is left
            answer = admin.post(TENANTS + path, content=body)
            assert answer.status_code == 400, (body, answer.text)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"name": ""}, "name"),
        ("", {"name": 5}, "name"),
        ("", {"credits": 5}, "name"),
        ("", {"name": "x", "owner": "me"}, "owner"),
        ("/first/grants", {"credits": 1, "expires_at": "2020-01-01"}, "expires_at"),
        ("/first/grants", {"credits": 1, "expires_at": 5}, "expires_at"),
        ("/first/grants", {"credits": 1, "expires_at": "2030-01-01T00:00"}, None),
        ("/first/grants", {"credits": 1, "note": "x" * 501}, "note"),
        ("/first/grants", {"credits": 1, "reference": "x" * 129}, "reference"),
        ("/first/grants", {"credits": 1, "reference": "\x00"}, "reference"),
        ("/first/refunds", {"credits": 1}, "task_id"),
    ],
)
def test_what_operators_get_wrong_is_named(
    live: LiveGateway, path: str, body: dict[str, object], param: str | None
) -> None:
    with live.client(ADMIN_KEY) as admin:
        answer = admin.post(TENANTS + path, json=body)

    assert answer.status_code == 400, answer.text
    assert param in {None, answer.json()["error"]["param"]}


def test_only_an_operator_reaches_tenants(live: LiveGateway) -> None:
    key = live.tenant("curious")
    with live.client(key) as client:
        answers = [
            client.get(TENANTS),
            client.get(f"{TENANTS}/first"),
            client.post(f"{TENANTS}/curious/grants", json={"credits": 5}),
            client.post(f"{TENANTS}/curious/resume"),
            client.get("/admin/v1/trail"),
            client.get("/admin/v1/margin"),
            client.get("/admin/v1/audit"),
        ]
    with live.client(ADMIN_KEY) as admin:
        nobody = [
            admin.get(f"{TENANTS}/nobody"),
            admin.post(f"{TENANTS}/nobody/grants", json={"credits": 5}),
            admin.patch(f"{TENANTS}/nobody", json={"price_multiplier": 2}),
            admin.get(f"{TENANTS}/nobody/entries"),
            admin.get("/admin/v1/trail?tenant=nobody"),
            admin.get(f"{TENANTS}/%00"),
            admin.post(
                f"{TENANTS}/first/refunds",
                json={"task_id": "\x00", "reference": "x"},
            ),
        ]

    assert {answer.status_code for answer in answers} == {401}
    assert {answer.status_code for answer in nobody} == {404}
    assert live.balance("curious")["available"] == "1000"


def test_a_refund_is_given_once_and_never_more_than_the_charge(
    live: LiveGateway,
) -> None:
    key = live.tenant("refunded", "100")
    other = live.tenant("bystander")
    with live.client(key) as client, live.client(other) as bystander:
        task_id = str(bought(client)["id"])
        foreign = str(bought(bystander)["id"])
    url = f"{TENANTS}/refunded/refunds"
    with live.client(ADMIN_KEY) as admin:
        part = {"task_id": task_id, "credits": "0.1", "reference": "r-1"}
        admin.post(url, json=part).raise_for_status()
        admin.post(url, json=part).raise_for_status()
        more = admin.post(url, json={"task_id": task_id, "credits": 50})
        rest = admin.post(url, json={"task_id": task_id, "note": "sorry"})
        stolen = admin.post(url, json={"task_id": foreign})

    assert more.json()["error"]["code"] == "refund_exceeds_charge"
    assert rest.json()["available"] == 100
    assert stolen.json()["error"]["code"] == "task_not_found"
    assert live.balance("refunded") == {"available": "100", "held": "0", "spent": "0"}
    with live.client(key) as client:
        entries = exact(client.get("/v1/credits/entries"))["data"]
    kinds = [each["kind"] for each in entries]  # type: ignore[attr-defined]
    assert kinds == ["refund", "refund", "charge", "grant"]
    assert {each["task_id"] for each in entries[:3]} == {task_id}  # type: ignore[index]
    assert live.audit()["clean"]


def test_a_suspended_tenant_waits_and_what_it_began_is_finished(
    live: LiveGateway,
) -> None:
    key = live.tenant("debtor")
    with live.client(key) as client, live.client(ADMIN_KEY) as admin:
        live.sandbox("sandbox-thrifty", latency_ms=1_500)
        queued = client.post(PATH, json=BODY, headers={"prefer": "respond-async"})
        admin.post(f"{TENANTS}/debtor/suspend").raise_for_status()
        refused = client.post(PATH, json=BODY)
        live.sandbox("sandbox-thrifty", latency_ms=0)
        task = f"/v1/tasks/{queued.json()['id']}"
        ended = exact(admin.get(task))
        until = time.monotonic() + 30
        while ended["status"] != "completed" and time.monotonic() < until:
            time.sleep(0.05)
            ended = exact(admin.get(task))
        reading = client.get("/v1/credits")
        state = exact(admin.get(f"{TENANTS}/debtor"))["state"]
        live.cli("tenants", "resume", "debtor")
        while client.get("/v1/credits").status_code == 403:
            assert time.monotonic() < until
            time.sleep(0.05)
        again = client.post(PATH, json=BODY)

    assert (refused.status_code, refused.json()["error"]["code"]) == (
        403,
        "tenant_suspended",
    )
    assert ended["status"] == "completed"
    assert (reading.status_code, state) == (403, "suspended")
    assert again.status_code == 200
    assert live.balance("debtor")["held"] == "0"


def test_a_tenant_pays_its_own_price_from_estimate_to_statement(
    live: LiveGateway,
) -> None:
    plain, special = live.tenant("plain"), live.tenant("special")
    own = dict.fromkeys(("text_input", "text_cached", "image_cached"), "0.1")
    own |= {"image_input": "0.2", "image_output": "1"}
    with live.client(ADMIN_KEY) as admin:
        set_ = admin.patch(f"{TENANTS}/special", json={"price_multiplier": "0.333333"})
        with live.client(special) as client, live.client(plain) as usual:
            cheaper = Decimal(str(bought(client)["usage"]["credits_used"]))  # type: ignore[index]
            charged = Decimal(str(bought(usual)["usage"]["credits_used"]))  # type: ignore[index]
            live.cli("tenants", "set", "special", "--price-multiplier", "none")
            live.cli(
                *("tenants", "set", "special"),
                *("--prices", json.dumps({"gpt-image-2": own})),
            )
            until = time.monotonic() + 10
            while str(_price(client)["image_output"]) != "1":
                assert time.monotonic() < until
                time.sleep(0.1)
            estimate = exact(client.post("/v1/estimate", json=BODY))
            by_card = bought(client)["usage"]
            usage = exact(client.get("/v1/usage?group_by="))["data"][0]  # type: ignore[index]

    assert set_.json()["price_multiplier"] == "0.333333"
    exact_price = Fraction(charged) * Fraction(333_333, 1_000_000)
    assert abs(Fraction(cheaper) - exact_price) <= Fraction(1, 2 * 10**9)
    tokens = by_card["input_tokens_details"]["text_tokens"]  # type: ignore[index]
    output = by_card["output_tokens"]  # type: ignore[index]
    price = Decimal(tokens) / 10_000 + Decimal(output) / 1_000
    assert by_card["credits_used"] == price  # type: ignore[index]
    assert estimate["low"]["credits"] <= price <= estimate["high"]["credits"]  # type: ignore[index]
    assert usage["credits"] == cheaper + price
    assert live.audit()["clean"]


def _price(client: httpx.Client) -> dict[str, object]:
    found = exact(client.get("/v1/models/gpt-image-2"))["pricing"]
    assert isinstance(found, dict)
    return found


def test_every_change_is_in_the_trail_with_who_and_what(live: LiveGateway) -> None:
    with live.client(ADMIN_KEY) as admin:
        admin.post(TENANTS, json={"name": "traced", "credits": 5}).raise_for_status()
        for factor in ("1.5", "1.5"):
            admin.patch(f"{TENANTS}/traced", json={"price_multiplier": factor})
        live.cli("tenants", "suspend", "traced")
        page = exact(admin.get("/admin/v1/trail?tenant=traced&limit=3"))
        params = {"tenant": "traced", "after": str(page["next"])}
        rest = exact(admin.get("/admin/v1/trail", params=params))

    data = [*page["data"], *rest["data"]]  # type: ignore[misc]
    assert [each["what"] for each in data] == [
        "tenant.suspend",
        "tenant.change",
        "grant",
        "tenant.create",
    ]
    assert data[0]["who"].startswith("command of ")
    assert {each["who"] for each in data[1:]} == {"admin key"}
    assert data[1]["before"]["price_multiplier"] == "1"
    assert data[1]["after"]["price_multiplier"] == "1.5"
    assert rest["has_more"] is False
    printed = live.cli("trail", "--tenant", "traced", "--json").json
    assert [each["what"] for each in printed] == [each["what"] for each in data]
    first = live.cli("trail", "--tenant", "first", "--json").json
    assert {each["who"] for each in first} == {"first start"}


# --- the operator's books ---


def test_margin_book_and_statement_agree_and_an_invoice_is_compared(
    tmp_path: Path,
) -> None:
    with LiveGateway(tmp_path / "data") as gateway:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            gateway.sandbox(name, latency_ms=0)
        with gateway.client() as client, gateway.client(ADMIN_KEY) as admin:
            tasks = [bought(client) for _ in range(3)]
            refund = {"task_id": tasks[0]["id"], "credits": "0.01"}
            admin.post(f"{TENANTS}/first/refunds", json=refund).raise_for_status()
            rows: Any = exact(admin.get("/admin/v1/margin"))["data"]
            as_csv = admin.get("/admin/v1/margin?format=csv").text
            audit = admin.get("/admin/v1/audit").json()
        spent = Decimal(gateway.balance("first")["spent"])
        printed = gateway.cli("margin", "--json").json

        (row,) = rows
        assert (row["upstream"], row["tasks"], row["images"]) == (
            "sandbox-thrifty",
            3,
            3,
        )
        assert row["charged_credits"] - row["refunded_credits"] == spent
        assert row["refunded_credits"] == Decimal("0.01")
        assert (row["waste_usd"], row["absorbed_credits"]) == (0, 0)
        assert row["cost_usd"] > 0
        assert Decimal(printed[0]["margin_usd"]) == row["margin_usd"]
        assert next(csv.DictReader(io.StringIO(as_csv)))["tasks"] == "3"
        assert audit["clean"]

        invoice = tmp_path / "invoice.csv"
        today = time.strftime("%Y-%m-%d", time.gmtime())
        invoice.write_text(f"Date,Amount\n{today},${row['cost_usd']}\n")
        args = ("credits", "reconcile", "--upstream", "sandbox-thrifty")
        same = gateway.cli(*args, "--from", str(invoice), "--json").json
        invoice.write_text(f"day,cost\n{today},1\n2026-01-01,0.5\n")
        data = ("--data-dir", str(gateway.data_dir))
        differs = command(*args, "--from", str(invoice), "--json", *data)

    assert (same["differences"], same["calls"]) == ([], 3)
    assert differs.code == 1
    found = {each["name"]: each["why"] for each in differs.json["differences"]}
    assert found == {today: "another amount", "2026-01-01": "only on the invoice"}


def test_a_low_balance_is_sent_to_where_the_tenant_wants_it(live: LiveGateway) -> None:
    key = live.tenant("thrifty", "5")
    with live.client(ADMIN_KEY) as admin:
        low = {"credits": 6, "url": "https://nothing-here.example.com/low"}
        set_ = admin.patch(f"{TENANTS}/thrifty", json={"low_balance": low})
        wrong = [
            admin.patch(f"{TENANTS}/thrifty", json={"low_balance": low | change})
            for change in (
                {"url": "http://hooks.example.com/"},
                {"url": "https://127.0.0.1/"},
                {"credits": "0"},
                {"key_id": "key_of_nobody"},
            )
        ]
    with live.client(key) as client:
        until = time.monotonic() + 30
        data: Any = []
        while not (data and data[0]["tries"]) and time.monotonic() < until:
            time.sleep(0.2)
            data = exact(client.get("/v1/webhooks/deliveries"))["data"]

    assert set_.json()["low_balance"]["credits"] == "6"
    assert [answer.status_code for answer in wrong] == [400, 400, 400, 404]
    assert (data[0]["event"], data[0]["task_id"]) == ("credits.low", None)
    assert data[0]["url"] == low["url"]
    assert not str(data[0]["last_error"]).startswith("Nothing was sent")


def test_a_litellm_configuration_is_taken_over(tmp_path: Path) -> None:
    source, made = tmp_path / "config.yaml", tmp_path / "gateway.toml"
    source.write_text(
        "model_list:\n"
        "  - model_name: gpt-image-2\n"
        "    litellm_params: {model: openai/gpt-image-2, api_key: os.environ/A_KEY}\n"
        "general_settings: {master_key: sk-1}\n"
    )
    data = ("--data-dir", str(tmp_path / "data"))

    printed = command("import", "litellm", str(source), *data)
    written = command("import", "litellm", str(source), "--out", str(made), *data)
    again = command("import", "litellm", str(source), "--out", str(made), *data)
    checked = command("check", "--config", str(made), A_KEY="x")
    source.write_text("model_list: []")
    nothing = command("import", "litellm", str(source), *data)

    assert printed.out == made.read_text()
    assert "general_settings (master_key) is not carried over" in printed.err
    assert (written.code, again.code, nothing.code) == (0, 1, 1)
    assert "ok: 1 upstreams, 1 offers" in checked.out
