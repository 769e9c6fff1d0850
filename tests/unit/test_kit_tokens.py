"""A token is fetched once, renewed before its end, and never told to anyone."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from providers.kit import tokens
from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.tokens import CommandTokens, FileTokens

K = FailureKind
NOW_S = 1_790_000_000.0
PROGRAM = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "runs").open("a") as runs:
    runs.write("x")
while (folder / "gate").exists() and not (folder / "open").exists():
    time.sleep(0.001)
output = (folder / "output").read_text()
if output == "fail":
    print("SECRET", file=sys.stderr)
    print("SECRET")
    sys.exit(7)
print(output)
"""


@dataclass
class Desk:
    """A command that prints a file, the count of its runs, and a clock."""

    folder: Path
    now_s: float = NOW_S

    def prints(self, output: str | dict[str, object]) -> None:
        text = output if isinstance(output, str) else json.dumps(output)
        (self.folder / "output").write_text(text)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(self.folder)]

    @property
    def runs(self) -> int:
        runs = self.folder / "runs"
        return len(runs.read_text()) if runs.exists() else 0

    def shut(self) -> None:
        (self.folder / "gate").touch()

    def open(self) -> None:
        (self.folder / "open").touch()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@asynccontextmanager
async def printed(
    desk: Desk, command: list[str] | None = None, command_max_s: float = 30
) -> AsyncGenerator[CommandTokens, None]:
    source = CommandTokens(
        command or desk.command, lambda: desk.now_s, command_max_s=command_max_s
    )
    try:
        yield source
    finally:
        await source.close()


async def refused(source: CommandTokens | FileTokens) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await source.current()
    error = caught.value
    assert error.billed is Billed.NO
    assert "SECRET" not in f"{error!r} {error.__cause__!r}"
    return error


async def until_runs(desk: Desk, runs: int) -> None:
    while desk.runs < runs:  # noqa: ASYNC110 - nothing tells when
        await asyncio.sleep(0.001)


async def until_renewed(source: CommandTokens, old: str) -> None:
    while await source.current() == old:  # noqa: ASYNC110 - nothing tells when
        await asyncio.sleep(0.001)


def local(offset_s: float) -> str:
    """Write a time as ``az`` does: local, without a zone."""
    when = datetime.fromtimestamp(NOW_S + offset_s, tz=UTC).astimezone()
    return when.strftime("%Y-%m-%d %H:%M:%S.%f")


async def test_a_command_runs_once_for_all_who_wait(desk: Desk) -> None:
    desk.prints({"accessToken": "t-1", "expires_on": int(NOW_S) + 3600, "tenant": "x"})
    async with printed(desk) as source:
        got = await asyncio.gather(*(source.current() for _ in range(5)))
        assert got == ["t-1"] * 5
        assert await source.current() == "t-1"
    assert desk.runs == 1


@pytest.mark.parametrize(
    ("ends", "used_until_s"),
    [
        ({"expires_on": int(NOW_S) + 3600}, 3570),
        ({"expires_on": str(int(NOW_S) + 3600)}, 3570),
        ({"expiresOn": local(3600)}, 3570),
        ({"expiresOn": local(999), "expires_on": int(NOW_S) + 3600}, 3570),
        (
            {
                "expiresOn": (
                    datetime.fromtimestamp(NOW_S, tz=UTC) + timedelta(hours=1)
                )
                .astimezone(timezone(timedelta(hours=9)))
                .isoformat()
            },
            3570,
        ),
        ({"expires_on": int(NOW_S) + 10**9}, 86_370),
        ({}, 270),
        ({"expiresOn": "tomorrow"}, 270),
        ({"expires_on": "9" * 400}, 270),
    ],
    ids=str,
)
async def test_a_token_is_used_until_shortly_before_its_end(
    ends: dict[str, object], used_until_s: int, desk: Desk
) -> None:
    async with printed(desk) as source:
        desk.prints({"accessToken": "t-1", **ends})
        assert await source.current() == "t-1"
        desk.prints("fail")
        desk.now_s = NOW_S + used_until_s - 1
        assert await source.current() == "t-1"
        desk.now_s = NOW_S + used_until_s
        assert (await refused(source)).kind is K.NETWORK


async def test_a_plain_token_is_kept_for_a_while(desk: Desk) -> None:
    desk.prints("t-1")
    async with printed(desk) as source:
        assert await source.current() == "t-1"
        first = source._renewal
        desk.prints("t-2")
        desk.now_s += tokens.PLAIN_LIFE_S / 2 - 1
        assert await source.current() == "t-1"
        assert source._renewal is first
        desk.now_s += tokens.PLAIN_LIFE_S
        assert await source.current() == "t-2"


async def test_a_renewal_makes_nobody_wait(desk: Desk) -> None:
    desk.prints({"accessToken": "t-1", "expires_on": int(NOW_S) + 3600})
    async with printed(desk) as source:
        assert await source.current() == "t-1"
        desk.prints({"accessToken": "t-2", "expires_on": int(NOW_S) + 7200})
        desk.shut()
        desk.now_s = NOW_S + 3600 - tokens.RENEW_EARLY_S
        assert await source.current() == "t-1"
        await until_runs(desk, 2)
        assert await source.current() == "t-1"
        desk.open()
        await until_renewed(source, "t-1")
        assert await source.current() == "t-2"
    assert desk.runs == 2


async def test_a_renewal_that_fails_is_tried_again_after_a_pause(desk: Desk) -> None:
    desk.prints({"accessToken": "t-1", "expires_on": int(NOW_S) + 3600})
    async with printed(desk) as source:
        assert await source.current() == "t-1"
        desk.prints("fail")
        desk.now_s = NOW_S + 3400
        assert await source.current() == "t-1"
        await until_runs(desk, 2)
        failed = source._renewal
        assert failed is not None
        await asyncio.wait([failed])
        desk.now_s += tokens.RENEWAL_PAUSE_S - 1
        assert await source.current() == "t-1"
        assert source._renewal is failed
        desk.prints({"accessToken": "t-2", "expires_on": int(NOW_S) + 7200})
        desk.now_s += 1
        assert await source.current() == "t-1"
        await until_renewed(source, "t-1")
    assert desk.runs == 3


async def test_who_leaves_early_does_not_take_the_token_from_others(desk: Desk) -> None:
    desk.prints("t-1")
    desk.shut()
    async with printed(desk) as source:
        hasty = asyncio.create_task(source.current())
        patient = asyncio.create_task(source.current())
        await until_runs(desk, 1)
        hasty.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hasty
        desk.open()
        assert await patient == "t-1"
    assert desk.runs == 1


async def test_a_rejected_token_is_fetched_anew_and_another_is_kept(desk: Desk) -> None:
    desk.prints("t-1")
    async with printed(desk) as source:
        assert await source.current() == "t-1"
        source.reject("t-0")
        assert await source.current() == "t-1"
        desk.prints("t-2")
        source.reject("t-1")
        assert await source.current() == "t-2"
    assert desk.runs == 2


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("fail", "ended with 7"),
        ("", "nothing that looks like a token"),
        ("two words SECRET", "nothing that looks like a token"),
        ("t\u00e9 SECRET", "nothing that looks like a token"),
        ("t" * 20_000, "nothing that looks like a token"),
        ("t" * 70_000, "more than 65536"),
        ('{"token": "SECRET"}', "without accessToken"),
        ('{"accessToken": 5, "x": "SECRET"}', "without accessToken"),
        ('{"accessToken": "SECRET"', "without accessToken"),
        ('{"accessToken": "SEC\\u0000RET"}', "nothing that looks like a token"),
        ('{"accessToken": "SECRET", "expires_on": 1000}', "has run out"),
        (f'{{"accessToken": "SECRET", "expires_on": {NOW_S + 20:.0f}}}', "run out"),
    ],
    ids=lambda value: value[:40],
)
async def test_a_command_without_a_good_token_shuts_nothing_off(
    output: str, told: str, desk: Desk
) -> None:
    desk.prints(output)
    async with printed(desk) as source:
        error = await refused(source)
        # Nothing was sent, and no credential refused.
        assert error.kind is K.NETWORK
        assert told in error.detail
        # Nothing is remembered of a failure.
        desk.prints("t-1")
        assert await source.current() == "t-1"


@pytest.mark.parametrize("command", [["/no/such/program"], ["/"]])
async def test_a_command_that_cannot_run_says_so(
    command: list[str], desk: Desk
) -> None:
    async with printed(desk, command) as source:
        error = await refused(source)
    assert error.kind is K.NETWORK
    assert "cannot run" in error.detail


async def test_no_shell_reads_the_command(desk: Desk) -> None:
    program = "import sys; print(sys.argv[1].replace(' ', '-'))"
    command = [sys.executable, "-c", program, "$HOME ; touch x"]
    async with printed(desk, command) as source:
        assert await source.current() == "$HOME-;-touch-x"


async def test_a_command_that_hangs_is_left(desk: Desk) -> None:
    desk.prints("t-1")
    desk.shut()
    async with printed(desk, command_max_s=0.05) as source:
        error = await refused(source)
    # The network may be what it waited for: no reason to shut the account off.
    assert error.kind is K.NETWORK


async def test_closing_ends_the_command_and_its_children(
    desk: Desk, tmp_path: Path
) -> None:
    program = (
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time;time.sleep(99)'])"
        "\npathlib.Path(sys.argv[1]).write_text(str(child.pid) + '.')\n"
        "child.wait()"
    )
    told = tmp_path / "pid"
    told.touch()
    command = [sys.executable, "-c", program, str(told)]
    async with printed(desk, command) as source:
        waiting = asyncio.create_task(source.current())
        while not told.read_text().endswith("."):  # noqa: ASYNC110 - nothing tells when
            await asyncio.sleep(0.001)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    child = int(told.read_text().removesuffix("."))
    while not is_over(child):  # noqa: ASYNC110 - nothing tells when
        await asyncio.sleep(0.001)


def is_over(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True
    # Dead, and not yet fetched by whoever inherited it.
    return stat.rpartition(")")[2].split()[0] == "Z"


# --- files ---


def kept(desk: Desk) -> FileTokens:
    return FileTokens(desk.folder / "output", lambda: desk.now_s)


async def test_a_file_is_read_again_when_it_changes(desk: Desk) -> None:
    source = kept(desk)
    desk.prints("t-1\n")
    assert await source.current() == "t-1"
    desk.now_s += 10**6
    assert await source.current() == "t-1"
    desk.prints({"accessToken": "t-two", "expires_on": int(desk.now_s) + 60})
    assert await source.current() == "t-two"
    desk.now_s += 60
    assert (await refused(source)).kind is K.AUTH
    (desk.folder / "new").write_text("three")
    (desk.folder / "new").replace(desk.folder / "output")
    assert await source.current() == "three"
    await source.close()


async def test_a_file_that_looks_the_same_is_read_again_after_a_refusal(
    desk: Desk,
) -> None:
    source = kept(desk)
    desk.prints("t-1")
    path = desk.folder / "output"
    before = path.stat()
    assert await source.current() == "t-1"
    desk.prints("t-2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await source.current() == "t-1"
    source.reject("t-0")
    assert await source.current() == "t-1"
    source.reject("t-1")
    assert await source.current() == "t-2"


@pytest.mark.parametrize("half", ["", '{"accessToken": "t-', None])
async def test_a_change_that_cannot_be_read_leaves_the_last_token(
    half: str | None, desk: Desk
) -> None:
    source = kept(desk)
    desk.prints("t-1")
    assert await source.current() == "t-1"
    if half is None:
        (desk.folder / "output").unlink()
    else:
        desk.prints(half)
    assert await source.current() == "t-1"
    desk.prints("t-2")
    assert await source.current() == "t-2"


@pytest.mark.parametrize(
    "content", [None, "", "two words SECRET", '{"token": "SECRET"}', "t" * 70_000]
)
async def test_a_file_without_a_token_is_an_alert(
    content: str | None, desk: Desk
) -> None:
    if content is not None:
        desk.prints(content)
    assert (await refused(kept(desk))).kind is K.AUTH
