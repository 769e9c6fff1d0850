"""What a key's limits are read from, and whom they turn away."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.core.errors import (
    ForbiddenError,
    GatewayError,
    InsufficientCreditsError,
    InvalidRequestError,
    RateLimitedError,
    UnauthorizedError,
)
from gateway.core.key_limits import (
    NO_LIMITS,
    USUAL_SCOPES,
    KeyLimits,
    KeyScope,
    KeyUse,
    address_group,
    check_hold,
    check_model,
    check_use,
    left_nanocredits,
    limit_facts,
    parse_limits,
    resets_at,
)
from gateway.core.money import NANO, NANO_MAX, decimal_text

NOW_MS = 1_790_000_000_000
ALIASES = {"gpt-image-2": "gpt-image-2", "image-2": "gpt-image-2"}


def parsed(limits: KeyLimits = NO_LIMITS, **given: Any) -> KeyLimits:
    return parse_limits(given, limits, ALIASES.get)


def refusal(**given: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as refused:
        parsed(**given)
    return refused.value


# --- reading ---


def test_every_limit_is_read_and_written_back() -> None:
    given: dict[str, Any] = {
        "scopes": ["tasks", "images"],
        "models": ["image-2"],
        "addresses": ["203.0.113.7", "2001:db8::/32"],
        "expires_at": "2027-01-31T13:00:00+01:00",
        "requests_per_minute": 60,
        "concurrent_tasks": 4,
        "total_credits": "1000",
        "daily_credits": "0.5",
        "monthly_credits": 12,
    }

    limits = parsed(**given)

    assert limit_facts(limits) == given | {
        "scopes": ["images", "tasks"],
        "models": ["gpt-image-2"],
        "addresses": ["203.0.113.7/32", "2001:db8::/32"],
        "expires_at": "2027-01-31T12:00:00Z",
        "monthly_credits": "12",
    }
    assert parse_limits(limit_facts(limits), NO_LIMITS, ALIASES.get) == limits
    assert limits.counted


def test_what_is_not_given_stays_and_null_takes_a_limit_away() -> None:
    before = parsed(scopes=["billing"], daily_credits="1", requests_per_minute=5)

    after = parsed(before, scopes=None, daily_credits=None)

    assert after == KeyLimits(requests_per_min=5)
    assert after.scopes == USUAL_SCOPES
    assert not after.counted


@pytest.mark.parametrize("name", ["total_credits", "daily_credits", "monthly_credits"])
@pytest.mark.parametrize(
    "amount",
    [
        "0.0000000001",
        "-1",
        -1,
        "1e3",
        "1.5e1",
        "1E400",
        "NaN",
        "Infinity",
        "",
        " 1",
        "1,5",
        "+1",
        "\u0661",
        "9223372036.854775808",
        10**10,
        10**4_000,
        1.5,
        True,
        [],
        {},
    ],
)
def test_an_amount_that_is_none_is_refused_by_name(name: str, amount: object) -> None:
    assert refusal(**{name: amount}).param == name


def test_amounts_are_exact_to_the_last_of_nine_decimals() -> None:
    limits = parsed(total_credits="0.000000001", daily_credits=decimal_text(NANO_MAX))

    assert (limits.total_nanocredits, limits.daily_nanocredits) == (1, NANO_MAX)
    assert parsed(total_credits=0).total_nanocredits == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scopes", []),
        ("scopes", ["images", "everything"]),
        ("scopes", "images"),
        ("models", ["gpt-image-9"]),
        ("models", [7]),
        ("models", ["gpt-image-2"] * 65),
        ("addresses", ["203.0.113.7/24"]),
        ("addresses", ["nowhere"]),
        ("addresses", ["::1" * 99]),
        ("expires_at", "tomorrow"),
        ("expires_at", "0001-01-01T00:00:00+23:59"),
        ("expires_at", -1),
        ("expires_at", 10**30),
        ("expires_at", True),
        ("requests_per_minute", 0),
        ("requests_per_minute", "60"),
        ("requests_per_minute", True),
        ("concurrent_tasks", 1_000_001),
        ("concurrent_tasks", 1.5),
        ("speed", 1),
        ("speed\n\x1b[31m" * 99, 1),
    ],
)
def test_what_breaks_a_rule_is_named(name: str, value: object) -> None:
    error = refusal(**{name: value})

    assert (error.status, error.code) == (400, "invalid_value")
    assert name[:5] in str(error.param)
    assert str(error).isprintable()


# --- who may use it ---


def turned_away(limits: KeyLimits, **changes: Any) -> GatewayError | None:
    asked: dict[str, Any] = {
        "needs": KeyScope.IMAGES,
        "address": "203.0.113.7",
        "now_ms": NOW_MS,
    }
    try:
        check_use(limits, **(asked | changes))
    except GatewayError as error:
        return error
    return None


def test_a_key_ends_at_its_moment() -> None:
    limits = KeyLimits(expires_ms=NOW_MS)

    assert turned_away(limits, now_ms=NOW_MS - 1) is None
    ended = turned_away(limits)

    assert isinstance(ended, UnauthorizedError)
    assert (ended.status, ended.code) == (401, "key_expired")


@pytest.mark.parametrize(
    ("address", "within"),
    [
        ("203.0.113.7", True),
        ("::ffff:203.0.113.7", True),
        ("203.0.114.7", False),
        ("2001:db8:1::1", True),
        ("2001:db9::1", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("a socket", False),
    ],
)
def test_a_key_is_used_from_its_networks_only(address: str, within: bool) -> None:
    limits = parsed(addresses=["203.0.113.0/24", "2001:db8::/32"])

    refused = turned_away(limits, address=address)

    assert (refused is None) is within
    if refused is not None:
        assert isinstance(refused, ForbiddenError)
        assert refused.code == "key_address_not_allowed"


@pytest.mark.parametrize("needs", KeyScope)
def test_a_key_opens_its_scopes_and_usually_all_but_admin(needs: KeyScope) -> None:
    usual = turned_away(NO_LIMITS, needs=needs)
    assert (usual is None) is (needs is not KeyScope.ADMIN)

    for scope in KeyScope:
        refused = turned_away(parsed(scopes=[scope.value]), needs=needs)
        assert (refused is None) is (scope is needs)
        if refused is not None:
            assert (refused.status, refused.code) == (403, "key_scope_missing")
            assert refused.extra["needed_scope"] == needs.value


def test_any_key_is_good_for_what_needs_no_scope() -> None:
    assert turned_away(parsed(scopes=["billing"]), needs=None) is None


def test_a_key_asks_for_its_models_only() -> None:
    check_model(NO_LIMITS, "gpt-image-1.5")
    limits = parsed(models=["image-2"])
    check_model(limits, "gpt-image-2")

    with pytest.raises(ForbiddenError) as refused:
        check_model(limits, "gpt-image-1.5")

    assert refused.value.code == "model_access_denied"
    assert refused.value.extra["allowed_models"] == ["gpt-image-2"]


# --- budgets ---


@pytest.mark.parametrize(
    ("budget", "code", "until"),
    [
        ("total", "insufficient_token_quota", None),
        ("daily", "token_daily_quota_exceeded", "2028-03-01T00:00:00Z"),
        ("monthly", "token_monthly_quota_exceeded", "2028-03-01T00:00:00Z"),
    ],
)
def test_a_budget_can_be_used_up_and_not_overdrawn(
    budget: str, code: str, until: str | None
) -> None:
    given: dict[str, Any] = {f"{budget}_nanocredits": 10 * NANO}
    limits = KeyLimits(**given)
    used: dict[str, Any] = {f"{budget}_nanocredits": 7 * NANO}
    use = KeyUse("2028-02-29", **used)

    check_hold(limits, use, 3 * NANO)
    with pytest.raises(InsufficientCreditsError) as refused:
        check_hold(limits, use, 3 * NANO + 1)

    error = refused.value
    assert (error.status, error.type) == (402, "insufficient_quota")
    assert (error.code, error.client_may_retry) == (code, False)
    assert error.extra["resets_at"] == until
    assert error.extra["limit_scope"] == budget
    assert error.extra["remaining_credits"] == "3"
    assert left_nanocredits(limits, use) == 3 * NANO


def test_months_end_where_they_end() -> None:
    assert resets_at("monthly", "2026-12-31") == "2027-01-01T00:00:00Z"
    assert resets_at("daily", "2026-12-31") == "2027-01-01T00:00:00Z"
    assert resets_at("monthly", "2027-01-31") == "2027-02-01T00:00:00Z"
    assert resets_at("daily", "2027-02-28") == "2027-03-01T00:00:00Z"


def test_the_tightest_budget_says_what_is_left_never_less_than_nothing() -> None:
    limits = KeyLimits(total_nanocredits=100, daily_nanocredits=5)

    assert left_nanocredits(limits, KeyUse("2026-11-25")) == 5
    over = KeyUse("2026-11-25", 0, 99, 7, 99)
    assert left_nanocredits(limits, over) == 0
    assert left_nanocredits(NO_LIMITS, over) is None


def test_so_many_tasks_are_in_flight_as_may() -> None:
    limits = KeyLimits(concurrent_tasks=2)

    check_hold(limits, KeyUse("2026-11-25", open_tasks=1), 1)
    with pytest.raises(RateLimitedError) as refused:
        check_hold(limits, KeyUse("2026-11-25", open_tasks=2), 1)

    assert (refused.value.code, refused.value.status) == ("rate_limit_exceeded", 429)
    assert refused.value.retry_after_s


# --- addresses ---


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("a socket", "a socket"),
    ],
)
def test_whoever_has_an_ipv6_network_is_counted_as_one(
    address: str, group: str
) -> None:
    assert address_group(address) == group
