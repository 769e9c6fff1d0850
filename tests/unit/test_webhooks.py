"""When a webhook is tried again, where it may go, and what signs it."""

from __future__ import annotations

import base64
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import InvalidRequestError
from gateway.core.webhooks import (
    ROTATION_OVERLAP_MS,
    Answer,
    CallbackRules,
    Delivery,
    SigningKey,
    after_try,
    check_callback_url,
    event_id,
    event_name,
    host_of,
    secret_for,
    secrets_at,
)

NOW_MS = 1_700_000_000_000
OK = Answer(200)
BROKEN = Answer(500, "broken")
SILENT = Answer(None, "silent")


def a_delivery(**changes: Any) -> Delivery:
    fields: dict[str, Any] = {
        "id": "evt_t_completed",
        "task_id": "t",
        "tenant_id": "t-1",
        "key_id": "key-1",
        "event": "task.completed",
        "url": "https://hooks.example.com/x",
        "state": "pending",
        "tries": 0,
        "next_ms": NOW_MS,
        "created_ms": NOW_MS,
    }
    return Delivery(**(fields | changes))


def waits_s(*answers: Answer, fraction: float = 0.5) -> list[float]:
    """Try until it is over; returns the waits between."""
    delivery, waits = a_delivery(), list[float]()
    for answer in answers:
        delivery = after_try(delivery, answer, NOW_MS, fraction=fraction)
        if delivery.state != "pending":
            return [*waits, -1.0 if delivery.state == "failed" else 0.0]
        waits.append((delivery.next_ms - NOW_MS) / 1000)
    return waits


def test_a_failing_receiver_is_tried_four_times() -> None:
    assert waits_s(*[BROKEN] * 9) == [5, 60, 600, -1]
    assert waits_s(*[SILENT] * 9) == [5, 60, 600, -1]


def test_what_is_accepted_is_over_at_whichever_try() -> None:
    assert waits_s(Answer(204)) == [0]
    assert waits_s(BROKEN, SILENT, OK) == [5, 60, 0]


def test_waits_are_spread_by_a_fifth() -> None:
    assert waits_s(BROKEN, fraction=0.0) == [4]
    assert waits_s(BROKEN, fraction=1.0) == [6]


def test_gone_and_hopeless_are_not_tried_again() -> None:
    assert waits_s(Answer(410, "gone")) == [-1]
    assert waits_s(Answer(None, "no such task", final=True)) == [-1]


@pytest.mark.parametrize(
    ("status", "asked_s", "waits"),
    [(429, 30, 30), (503, 30, 30), (429, 2, 5), (429, 9_999, 3_600), (500, 30, 5)],
)
def test_a_receiver_may_ask_for_a_longer_wait(
    status: int, asked_s: float, waits: float
) -> None:
    assert waits_s(Answer(status, "later", asked_s)) == [waits]


def test_a_redirect_is_a_failure_like_others() -> None:
    assert waits_s(Answer(302, "moved")) == [5]


def test_the_last_answer_is_kept() -> None:
    tried = after_try(a_delivery(), BROKEN, NOW_MS, fraction=0.5)
    assert (tried.status, tried.error, tried.tries) == (500, "broken", 1)
    done = after_try(tried, OK, NOW_MS + 5, fraction=0.5)
    assert (done.status, done.error, done.delivered_ms) == (200, None, NOW_MS + 5)


@given(st.lists(st.integers(1, 1000), max_size=5), st.floats(0, 1))
def test_no_receiver_is_tried_more_often_than_configured(
    after_s: list[int], fraction: float
) -> None:
    delivery = a_delivery()
    while delivery.state == "pending":
        delivery = after_try(
            delivery, BROKEN, NOW_MS, fraction=fraction, tries_after_s=after_s
        )
    assert delivery.tries == 1 + len(after_s)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/",
        "https://user:word@hooks.example.com/",
        "https://hooks.example.com/" + "x" * 2_048,
        "https://127.0.0.1/",
        "https://10.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/",
        "https://2130706433/",
        "https://localhost/",
        "https://hooks.internal/",
        "https://hooks.example.com:22/",
        "https://hooks.example.com/#part",
        "ftp://hooks.example.com/",
        "hooks.example.com",
        "",
    ],
)
def test_a_callback_url_that_is_not_public_https_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_callback_url(url, CallbackRules())
    assert refused.value.param == "callback_url"


def test_a_public_callback_url_is_taken() -> None:
    longest = "https://hooks.example.com/" + "x" * 2_022
    assert len(longest) == 2_048
    for url in (longest, "https://8.8.8.8/", "https://hooks.example.com:443/a?b=c"):
        check_callback_url(url, CallbackRules())


def test_the_operators_own_networks_and_ports_are_taken() -> None:
    rules = CallbackRules((8443,), (ip_network("10.1.0.0/16"),))
    check_callback_url("https://10.1.2.3:8443/", rules)
    with pytest.raises(InvalidRequestError, match="public"):
        check_callback_url("https://10.2.2.3:8443/", rules)


def test_hosts_are_told_apart_by_name_and_port() -> None:
    assert host_of("https://A.example.com/x?y") == "a.example.com"
    assert host_of("https://a.example.com:8443") == "a.example.com:8443"
    assert host_of("https://a.example.com?y") == "a.example.com"


def test_events_are_named_by_their_task_and_its_end() -> None:
    assert event_name("cancelled") == "task.cancelled"
    assert event_id("task-1", "failed") == "evt_task-1_failed"


def test_secrets_follow_from_the_pepper_and_nothing_else() -> None:
    secret = secret_for(b"pepper", "key_a", 1)
    assert secret == secret_for(b"pepper", "key_a", 1)
    assert len(base64.b64decode(secret.removeprefix("whsec_"))) == 32
    others = {
        secret_for(b"salt", "key_a", 1),
        secret_for(b"pepper", "key_b", 1),
        secret_for(b"pepper", "key_a", 2),
    }
    assert len(others | {secret}) == 4


def test_the_old_secret_signs_for_a_day_after_a_rotation() -> None:
    old, new = (secret_for(b"p", "key_a", version) for version in (1, 2))
    rotated = SigningKey("key_a", "t-1", 2, (NOW_MS,))
    assert secrets_at(b"p", SigningKey("key_a", "t-1", 1), NOW_MS) == (old,)
    at_last_ms = NOW_MS + ROTATION_OVERLAP_MS - 1
    assert secrets_at(b"p", rotated, at_last_ms) == (new, old)
    assert secrets_at(b"p", rotated, at_last_ms + 1) == (new,)


def test_every_secret_of_the_last_day_signs_however_often_it_is_rotated() -> None:
    hour_ms = 3_600_000
    rotations_ms = (NOW_MS + 3 * hour_ms, NOW_MS + 2 * hour_ms, NOW_MS)
    key = SigningKey("key_a", "t-1", 4, rotations_ms)
    secrets = [secret_for(b"p", "key_a", version) for version in (4, 3, 2, 1)]

    def signing(at_ms: int) -> list[str]:
        return list(secrets_at(b"p", key, at_ms))

    assert signing(NOW_MS + 3 * hour_ms) == secrets
    assert signing(NOW_MS + 24 * hour_ms) == secrets[:3]
    assert signing(NOW_MS + 26 * hour_ms) == secrets[:2]
    assert signing(NOW_MS + 27 * hour_ms) == secrets[:1]
