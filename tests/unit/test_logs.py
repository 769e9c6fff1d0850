"""What the log takes out, and what it survives."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

from gateway.adapters.events import FanOut
from gateway.adapters.logs import NAMES, LogListener, scrubbed
from gateway.core.errors import ServiceUnavailableError
from gateway.core.events import AttemptFinished, ConfigRead, Event, HoldRefused
from gateway.core.traces import trace_id_of

ATTEMPT = AttemptFinished(
    task_id="task-unified-1-abcdefgh",
    seq=1,
    offer_id="a/b",
    upstream="a",
    variant="b",
    outcome="bad_gateway",
    billed="no",
    duration_ms=5,
    cost_nanousd=0,
    detail="refused: Bearer sk-abcdefghijkl",
)


@pytest.mark.parametrize(
    "secret",
    [
        "iwk_live_ABCDEFGHIJKLMNOPQRSTUVWXYZabcd123456",
        "sk-proj-abcdefghijklmnop",
        "Bearer whatever-it-is",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "data:image/png;base64," + "A" * 100,
        "http://h/files/results/a/0.png?expires=1&signature=abc-DEF_123",
        "https://b.s3.test/0.png?X-Amz-Date=1&X-Amz-Signature=0123456789abcdef",
        "https://a.blob.test/0.png?sv=1&sig=abc%2Fdef%2B0123456789%3D",
        "Authorization: Key 01234567-89ab-cdef-0123-456789abcdef:0123456789abcdef",
        "r8_0123456789abcdefghijABCDEFGHIJ",
        "redis://:correct-horse-battery@h",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(secret: str) -> None:
    shown = scrubbed(f"before {secret} after")

    assert "[secret]" in shown
    assert secret not in shown
    assert secret[-12:] not in shown


def test_long_texts_are_cut() -> None:
    assert len(scrubbed("x" * 10_000)) == 501


def test_a_line_is_json_and_begins_with_when_and_what() -> None:
    out = io.StringIO()

    LogListener(out).on_event(ATTEMPT)

    line = json.loads(out.getvalue())
    assert list(line)[:3] == ["at", "level", "event"]
    assert line["event"] == "attempt"
    assert line["detail"] == "refused: [secret]"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_what_is_no_text_is_told_all_the_same() -> None:
    out = io.StringIO()
    log = LogListener(out)

    log.on_event(replace(ATTEMPT, detail="half a pair: \ud83d"))
    log.on_crash(ValueError("half a pair: \ud83d"), "somewhere")

    attempt, crash = map(json.loads, out.getvalue().splitlines())
    assert attempt["detail"] == "half a pair: \\ud83d"
    assert "half a pair: \\ud83d" in crash["exception"]


def test_a_sink_that_fails_costs_lines_and_nothing_else() -> None:
    log = LogListener(FullDisk())

    log.on_event(ATTEMPT)
    log.on_crash(KeyError("x"), "here")

    assert log.dropped_lines == 2


def test_a_listener_that_fails_does_not_keep_the_others_from_hearing() -> None:
    heard: list[Event] = []
    crashes: list[str] = []

    def broken(event: Event) -> None:
        raise RuntimeError(event)

    events = FanOut((broken, heard.append), lambda _, where: crashes.append(where))
    events.emit(HoldRefused("gpt-image-2"))

    assert heard == [HoldRefused("gpt-image-2")]
    assert crashes == ["telling of HoldRefused"]


def test_what_was_foreseen_is_one_line_and_what_was_not_has_its_traceback() -> None:
    out = io.StringIO()
    log = LogListener(out)
    away = ServiceUnavailableError("storage failed and nothing was changed; try again")
    away.__cause__ = ConnectionRefusedError("nobody listens at 127.0.0.1")

    log.on_crash(away, "webhooks")
    log.on_crash(KeyError("a row nobody expected"), "webhooks")

    foreseen, crash = (json.loads(line) for line in out.getvalue().splitlines())
    assert foreseen["event"] == "unavailable"
    assert foreseen["level"] == "warning"
    assert foreseen["where"] == "webhooks"
    assert foreseen["reason"] == "ConnectionRefusedError nobody listens at 127.0.0.1"
    assert "exception" not in foreseen
    assert crash["event"] == "crash"
    assert "KeyError" in crash["exception"]


def test_a_level_keeps_lines_out_and_may_change_while_it_runs() -> None:
    out = io.StringIO()
    log = LogListener(out)
    failed, well = ATTEMPT, replace(ATTEMPT, outcome="done", detail=None)

    log.level = "warning"
    log.on_event(well)
    log.note("started")
    log.on_event(failed)
    log.level = "error"
    log.on_event(failed)
    log.on_event(ConfigRead("refused", problem="a key is wrong"))
    log.level = "info"
    log.on_event(well)

    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    told = [(line["event"], line["level"]) for line in lines]
    assert told == [
        ("attempt", "warning"),
        ("config_read", "error"),
        ("attempt", "info"),
    ]


def test_a_field_whose_name_says_so_is_a_secret_whatever_it_holds() -> None:
    out = io.StringIO()

    LogListener(out).note("x", prompt="a fox", access_token=7, tokens=7, who="me")

    line = json.loads(out.getvalue())
    assert (line["prompt"], line["access_token"]) == ("[secret]", "[secret]")
    assert (line["tokens"], line["who"]) == (7, "me")


def test_lines_about_a_task_carry_its_trace() -> None:
    out = io.StringIO()

    LogListener(out).on_event(ATTEMPT)
    LogListener(out).on_event(HoldRefused("gpt-image-2"))

    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert first["trace_id"] == trace_id_of(ATTEMPT.task_id)
    assert "trace_id" not in second


def test_every_event_and_every_field_of_it_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs" / "logs.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*)\|", text, re.MULTILINE))

    for event in get_args(Event):
        name = NAMES[event]
        explained = set(re.findall(r"`(\w+)`", rows[name]))
        assert explained == {field.name for field in fields(event)}, name
