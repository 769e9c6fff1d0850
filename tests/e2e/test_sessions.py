"""Keys in cookies: who may use them, from where, and for how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.gateways import ADMIN_KEY, LiveGateway

BODY = {"model": "gpt-image-2"}


@pytest.fixture
def browser(shared_gateway: LiveGateway) -> Iterator[httpx.Client]:
    """What the gateway's own page sends, as a browser sends it."""
    headers = {
        "origin": shared_gateway.url,
        "sec-fetch-site": "same-origin",
        "x-imageway-session": "key",
    }
    with httpx.Client(base_url=shared_gateway.url, headers=headers) as client:
        yield client


def signed_in(browser: httpx.Client, key: str | None) -> httpx.Client:
    answer = browser.post("/ui/session", json={"key": key})
    assert answer.status_code == 200, answer.text
    return browser


def refusal(answer: httpx.Response) -> tuple[int, Any]:
    return answer.status_code, answer.json()["error"]["code"]


def test_a_key_entered_once_opens_the_api_and_is_hidden_from_scripts(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    key = shared_gateway.first_key or ""
    answer = browser.post("/ui/session", json={"key": key})

    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie  # this one is served without TLS
    assert key not in cookie
    assert answer.json()["key"] == f"{key[:11]}…{key[-4:]}"
    assert browser.post("/v1/estimate", json=BODY).status_code == 200
    assert browser.get("/ui/session").json()["admin"] is False


def test_behind_tls_the_cookie_is_secure(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    browser.headers["origin"] = shared_gateway.url.replace("http:", "https:")
    answer = browser.post("/ui/session", json={"key": shared_gateway.first_key})
    assert "Secure" in answer.headers["set-cookie"].split("; ")


def test_the_admin_key_opens_the_admin_routes_beside_the_api_key(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    as_admin = {"x-imageway-session": "admin"}
    assert browser.get("/admin/v1/upstreams", headers=as_admin).status_code == 401
    facts = signed_in(browser, ADMIN_KEY).get("/ui/session").json()

    assert (facts["key"] is not None, facts["admin"]) == (True, True)
    assert browser.get("/admin/v1/upstreams", headers=as_admin).status_code == 200
    assert browser.get("/admin/v1/upstreams").status_code == 401  # as the tenant
    assert browser.post("/v1/estimate", json=BODY).status_code == 200


def test_a_wrong_key_begins_nothing(browser: httpx.Client) -> None:
    for wrong in ("iwk_live_nonsense", ADMIN_KEY + "x"):
        answer = browser.post("/ui/session", json={"key": wrong})
        assert refusal(answer) == (401, "invalid_api_key")
        assert "set-cookie" not in answer.headers
    for odd in ("", "é", "a\nb", 7, None, "x" * 600):
        answer = browser.post("/ui/session", json={"key": odd})
        assert refusal(answer) == (400, "invalid_value")


def test_a_session_ends(browser: httpx.Client, shared_gateway: LiveGateway) -> None:
    signed_in(browser, shared_gateway.first_key)
    assert browser.delete("/ui/session").json()["key"] is None
    assert refusal(browser.post("/v1/estimate", json=BODY)) == (401, "missing_api_key")


def test_a_session_ends_with_its_key(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    key = shared_gateway.tenant("revoked-soon", "10")
    signed_in(browser, key)

    async def revoke(books: Any) -> None:
        tenant = await books.tenants.named("revoked-soon")
        (found,) = await books.accounts.keys(tenant.id)
        await books.keys.revoke(found.id)

    shared_gateway.in_books(revoke)
    for _ in range(100):
        if browser.get("/ui/session").json()["key"] is None:
            break
        time.sleep(0.1)  # a key is believed for two seconds
    else:
        pytest.fail("the session has outlived its key")
    assert refusal(browser.post("/v1/estimate", json=BODY)) == (401, "key_disabled")


def test_a_forged_cookie_opens_nothing(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    token = browser.cookies["imageway_key"]
    changed = token[:40] + ("A" if token[40] != "A" else "B") + token[41:]
    for name, value in (
        ("imageway_key", changed),
        ("imageway_key", "noise"),
        ("imageway_admin", token),
    ):
        browser.cookies.clear()
        browser.cookies.set(name, value)
        for kind in ("key", "admin"):
            answer = browser.get("/v1/tasks", headers={"x-imageway-session": kind})
            assert refusal(answer) == (401, "missing_api_key")


def test_no_other_page_can_use_a_session(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    forbidden = (403, "cross_site_request")
    host = shared_gateway.url.removeprefix("http://")
    for elsewhere in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": host},
        {"origin": f"http://evil.example#{host}"},
    ):
        answer = browser.post("/v1/estimate", json=BODY, headers=elsewhere)
        assert refusal(answer) == forbidden, elsewhere
        answer = browser.post("/ui/session", json={"key": "x"}, headers=elsewhere)
        assert refusal(answer) == forbidden, elsewhere
        assert refusal(browser.get("/v1/tasks", headers=elsewhere)) == forbidden


def test_what_changes_something_has_to_say_where_it_comes_from(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    del browser.headers["sec-fetch-site"]
    assert browser.post("/v1/estimate", json=BODY).status_code == 200
    del browser.headers["origin"]
    answer = browser.post("/v1/estimate", json=BODY)
    assert refusal(answer) == (403, "cross_site_request")
    assert browser.get("/v1/tasks").status_code == 200


def test_a_request_that_does_not_name_its_session_has_none(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    for header in ("", "other", "key, admin"):
        named = {"x-imageway-session": header}
        answer = browser.post("/v1/estimate", json=BODY, headers=named)
        assert refusal(answer) == (401, "missing_api_key")
        assert browser.delete("/ui/session", headers=named).status_code == 403
    del browser.headers["x-imageway-session"]
    assert browser.get("/v1/tasks").status_code == 401


def test_a_key_in_the_request_goes_before_the_session(
    browser: httpx.Client, shared_gateway: LiveGateway
) -> None:
    signed_in(browser, shared_gateway.first_key)
    answer = browser.get("/v1/tasks", headers={"authorization": "Bearer wrong"})
    assert refusal(answer) == (401, "invalid_api_key")
