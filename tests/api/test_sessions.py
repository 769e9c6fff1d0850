"""Sessions over time; the clock is the test's own."""

from __future__ import annotations

from typing import Any, cast

from litestar.types import Scope

from gateway.api.sessions import Sessions
from gateway.core.sessions import SESSION_MAX_S, SessionKind
from tests.fakes import FakeChance, StillClock

KEY = "iwk_live_" + "k" * 36


def request(cookie: str = "", **headers: str) -> Scope:
    lines = {"host": "gateway.test", "cookie": cookie, **headers}
    raw = [(k.encode(), v.encode()) for k, v in lines.items()]
    return cast("Scope", {"method": "GET", "scheme": "http", "headers": raw})


def test_a_session_lasts_twelve_hours_and_no_longer() -> None:
    clock = StillClock()
    sessions = Sessions(b"s" * 32, "", clock, FakeChance())
    cookie = sessions.cookie(request(), SessionKind.KEY, KEY)
    sent = request(f"theme=dark; {cookie.key}={cookie.value}; other=1")

    assert cookie.max_age == SESSION_MAX_S == 12 * 3600
    clock.at_ms += (SESSION_MAX_S - 1) * 1000
    assert sessions.credential(sent, SessionKind.KEY) == KEY
    clock.at_ms += 1000
    assert sessions.credential(sent, SessionKind.KEY) is None


def test_each_cookie_is_another_one() -> None:
    sessions = Sessions(b"s" * 32, "", StillClock(), FakeChance())
    made: list[Any] = [
        sessions.cookie(request(), SessionKind.ADMIN, KEY).value for _ in range(2)
    ]
    assert made[0] != made[1]
