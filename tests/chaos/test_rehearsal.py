"""Six providers fail, each in its own way: every request is answered and booked right.

What a reply that was lost has bought, nobody can know: the book has it as waste that
may be billed, and the log tells here whether it was. All else is equal row by row.
"""

from __future__ import annotations

import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

from gateway.core.breaker import PROBES_TO_CLOSE
from tests.chaos.rehearsing import (
    SLOTS,
    TENANT,
    Match,
    Rehearsal,
    attempts_in,
    charge_of,
    matched,
    rehearsal,
    settled_in,
)

BACK_MAX_S = 300
"""A breaker that opened several times stays open for so long."""
BUSY = {"error": {"message": "later", "code": "server_is_overloaded"}}
LOCKED = {"error": {"message": "no credits left", "code": "insufficient_user_quota"}}
REFUSED = {"error": {"message": "no", "code": "invalid_api_key"}}
LIMITED = {
    "status": 429,
    "body": {"error": {"code": "429", "message": "Too many requests."}},
    "headers": {"retry-after": "2"},
}
NO_MONEY = {"error": {"code": 402, "message": "Insufficient credits"}}
RUNNER = {"detail": "the runner broke", "error_type": "runner_server_error"}


def in_short(played: Rehearsal) -> None:
    """All in one life: what takes minutes is left out, a call that hangs foremost."""
    some, at = 14, played.providers
    at["task_api"].always(status=503, body=BUSY)
    played.ask(some, "task_api: 503")
    at["openai"].next(*[{"close": "reset"}] * 2, *[{"close": "mid_body"}] * 2)
    played.ask(some, "and openai: reset, half a body")
    at["openai"].always(status=401, body=REFUSED)
    played.ask(some, "and openai: 401")
    at["fal"].next(*[{"on": "file", "status": 404}] * 2)
    played.ask(some, "and fal: links dead for a while")
    at["fal"].always(on="run", status=500, body=RUNNER)
    played.ask(some, "and fal: jobs fail")
    at["openrouter"].next(*[{"answer": "error"}] * 2)
    played.ask(some, "and openrouter: 200 with an error", plain=True)
    at["openrouter"].always(status=402, body=NO_MONEY)
    played.ask(some, "and openrouter: 402", plain=True)
    at["azure"].next(*[{"answer": "html"}] * 2, LIMITED)
    played.ask(some, "and azure: HTML, 429", plain=True)
    at["azure"].end()
    # For longer than the 429 keeps all away from it.
    played.ask(some, "and azure: killed", plain=True, pause_s=0.3)
    come_back(played, "azure")


def refusals(played: Rehearsal) -> None:
    """One after the other refuses, until only the dearest is left."""
    some, at = 100, played.providers
    played.ask(some, "all well")
    at["task_api"].always(status=503, body=BUSY)
    played.ask(some, "task_api: 503")
    at["openai"].always(status=401, body=REFUSED)
    played.ask(some, "and openai: 401")
    at["fal"].always(on="run", status=500, body=RUNNER)
    played.ask(some, "and fal: jobs fail")
    at["openrouter"].always(status=402, body=NO_MONEY)
    played.ask(some, "and openrouter: 402", plain=True)
    at["azure"].always(**LIMITED)
    played.ask(3 * some, "and azure: 429", plain=True, pause_s=0.1)


def losses(played: Rehearsal) -> None:
    """Replies are lost or broken, a process is killed, and comes back."""
    some, at = 100, played.providers
    at["task_api"].always(status=402, body=LOCKED)
    played.ask(some, "task_api: account locked")
    at["openai"].next(*[{"close": "reset"}] * 3)
    played.ask(some, "and openai: reset after send")
    at["openai"].next(*[{"close": "mid_body"}] * 3)
    played.ask(some, "and openai: half a body")
    at["openai"].always(status=500, body="<html>Internal Server Error</html>")
    played.ask(some, "and openai: 500")
    at["fal"].next(*[{"on": "file", "status": 404}] * 2)
    played.ask(some, "and fal: links dead for a while")
    at["fal"].always(answer="html")
    played.ask(some, "and fal: HTML in place of a job")
    at["openrouter"].always(answer="error")
    played.ask(some, "and openrouter: 200 with an error", plain=True)
    at["azure"].always(answer="html")
    played.ask(some, "and azure: HTML", plain=True)
    at["azure"].end()
    played.ask(some, "and azure: killed", plain=True)
    come_back(played, "azure")


def come_back(played: Rehearsal, upstream: str) -> None:
    """Go on asking until one that was killed is bought from, its breaker shut.

    All cheaper ones are down still: else nobody would ask this one.
    """
    noticed(played, upstream)
    provider = played.providers[upstream]
    provider.restart()
    before, end_s = len(provider.earlier), time.monotonic() + BACK_MAX_S
    while time.monotonic() < end_s:
        played.ask(1, f"{upstream} comes back", plain=True, pause_s=0.4)
        new = Counter(bought["operation"] for bought in provider.purchases()[before:])
        shut = played.breaker(upstream) == "closed"
        if shut and min(new["generate"], new["edit"]) >= PROBES_TO_CLOSE:
            return
    raise AssertionError(f"{upstream} was not bought from again")


def noticed(played: Rehearsal, upstream: str) -> None:
    """Go on asking until the breaker of one that was killed has opened."""
    end_s = time.monotonic() + BACK_MAX_S
    while played.openings(upstream) < 1:
        assert time.monotonic() < end_s, f"nobody noticed the end of {upstream}"
        played.ask(1, f"{upstream} is gone", plain=True)


def hanging(played: Rehearsal) -> None:
    """Calls hang until the gateway gives them up, while others fail."""
    at = played.providers
    at["task_api"].always(status=401, body=REFUSED)
    played.ask(20, "task_api: 401")
    # All its slots: a request has three attempts, and can stand two upstreams of whose
    # trouble nobody knows yet. The next two must be found out before these return.
    at["openai"].next(*[{"hang": True}] * SLOTS)
    played.ask(100, "and openai: hangs", pause_s=0.05)
    at["fal"].always(status=503, body=RUNNER)
    played.ask(80, "and fal: 503", pause_s=0.05)
    at["openrouter"].always(status=529, body=BUSY)
    played.ask(100, "and openrouter: 529", pause_s=0.05)


def test_an_outage_of_five_in_six_is_not_noticed(tmp_path: Path, whole: bool) -> None:
    began_s = time.monotonic()
    with rehearsal(tmp_path) as played:
        for act in (refusals, losses, hanging) if whole else (in_short,):
            with played.life():
                act(played)
            played.heal()
        gateway = played.gateway
        attempts = attempts_in(gateway.data_dir)
        matches = matched(played, attempts)
        charged = settled_in(gateway.data_dir)
        balance = gateway.balance(TENANT)
        audit = gateway.audit()
    show(played, matches, time.monotonic() - began_s)

    assert played.broken == []
    failed = [a for a in played.answers if not (a.status == 200 and a.served)]
    assert failed == []
    won_by = {
        a.task_id: {
            w.upstream
            for w in attempts
            if w.task_id == a.task_id and w.booked_as == "cost"
        }
        for a in played.answers
    }
    assert [w for a in played.answers if (w := charge_of(a, won_by[a.task_id]))] == []
    assert {
        a.task_id: int(a.usage["credits_used"] * 10**9) for a in played.answers
    } == charged
    assert sum(charged.values()) == int(Decimal(balance["spent"]) * 10**9)
    assert balance["held"] == "0"
    assert audit["clean"], audit
    assert [wrong for match in matches.values() for wrong in match.wrong] == []


def show(played: Rehearsal, matches: dict[str, Match], took_s: float) -> None:
    """Print the figures."""
    asked = Counter(a.asked.outage for a in played.answers)
    longest_s: dict[str, float] = {}
    for a in played.answers:
        longest_s[a.asked.outage] = max(longest_s.get(a.asked.outage, 0.0), a.took_s)
    lines = [f"{'outage':<36}{'requests':>9}{'longest s':>11}"]
    lines += [f"{o:<36}{c:>9}{longest_s[o]:>11.1f}" for o, c in asked.items()]
    lines.append(
        f"\n{'upstream':<12}{'calls':>6}{'bought':>8}{'won':>6}{'lost':>6}"
        f"{'booked $':>11}{'lost $':>10}{'waste $':>10}{'bill $':>11}"
    )
    for name, m in matches.items():
        lost = sum(m.lost_but_bought.values())
        lines.append(
            f"{name:<12}{m.calls:>6}{m.purchases:>8}{m.won:>6}{lost:>6}"
            f"{m.booked_nanousd / 1e9:>11.6f}{m.lost_nanousd / 1e9:>10.6f}"
            f"{m.waste_nanousd / 1e9:>10.6f}"
            f"{m.bill_usd:>11.6f}"
        )
    for name, m in matches.items():
        lines += [f"{name} lost, and bought: {dict(m.lost_but_bought)}"] * bool(
            m.lost_but_bought
        )
        lines += [f"{name} lost, not bought: {dict(m.lost_not_bought)}"] * bool(
            m.lost_not_bought
        )
    kept = {
        k: v for k, v in played.metrics.items() if not k.startswith("upstream_attempts")
    }
    lines += [f"{name} {value}" for name, value in sorted(kept.items()) if value]
    lines.append(f"{len(played.answers)} requests in {took_s:.0f} s")
    print("\n" + "\n".join(lines))  # noqa: T201 - figures, where somebody asks for them


def test_without_another_upstream_the_same_outage_is_noticed(tmp_path: Path) -> None:
    with rehearsal(tmp_path, "task_api") as played:
        played.providers["task_api"].always(status=503, body=BUSY)
        with played.life():
            played.ask(8, "alone", now=True)
        balance = played.gateway.balance(TENANT)
        bought = played.providers["task_api"].purchases()

    assert [a.status for a in played.answers] == [503] * 8
    assert not any(a.served for a in played.answers)
    assert bought == []
    assert (balance["spent"], balance["held"]) == ("0", "0")
