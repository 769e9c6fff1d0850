"""Bearer tokens that run out: printed by a command, or kept in a file by somebody else.

Either holds the token alone, or JSON as ``az account get-access-token`` prints it:
``accessToken``, and ``expires_on`` in seconds since the epoch or ``expiresOn`` in local
time. No text of a token ever leaves in an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec

from providers.kit.contract import FailureKind, ProviderError

COMMAND_MAX_S = 30.0
OUTPUT_MAX_BYTES = 64 * 1024
PLAIN_LIFE_S = 300.0
"""Of a printed token that does not tell its end: ``az`` gives none with less left."""
LIFE_MAX_S = 86_400.0
RENEW_EARLY_S = 300.0
"""From then on a new one is fetched while the old one serves."""
LAST_S = 30.0
"""A token this near to its end is not used any more: it could run out on its way."""
RENEWAL_PAUSE_S = 15.0
"""Between two renewals, while the old token still serves."""

_TOKEN = re.compile(rb"[!-~]{1,16384}")


class Tokens(Protocol):
    """Where a bearer token comes from."""

    async def current(self) -> str:
        """Give a token that holds.

        Raises:
            ProviderError: NETWORK when a command gave none, for whatever reason: it may
                the next time. AUTH when a file holds none.
        """
        ...

    def reject(self, token: str) -> None:
        """Hear that the upstream does not accept a token: the next is a new one."""
        ...

    async def close(self) -> None:
        """Stop whatever is under way."""
        ...


@dataclass(frozen=True, slots=True)
class _Token:
    """A token, and when it runs out in seconds since the epoch, if it tells."""

    text: str
    ends_at_s: float | None


@dataclass(frozen=True, slots=True)
class _Kept:
    token: str
    renew_at_s: float
    void_at_s: float


class CommandTokens:
    """Tokens that a command prints. It runs once for all who wait.

    A token is renewed before its end, without anyone having to wait; a renewal that
    fails then is tried again, and hurts nobody until the old token has run out.

    Args:
        command: the program and its arguments. There is no shell.
        now_s: seconds since the epoch.
        command_max_s: how long it may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        now_s: Callable[[], float],
        *,
        command_max_s: float = COMMAND_MAX_S,
    ) -> None:
        self._command = tuple(command)
        self._now_s = now_s
        self._command_max_s = command_max_s
        self._kept: _Kept | None = None
        self._renewal: asyncio.Task[str] | None = None
        self._renew_next_at_s = 0.0

    async def current(self) -> str:
        """Give the token at hand, or wait for the command."""
        kept, now_s = self._kept, self._now_s()
        if kept is None or now_s >= kept.void_at_s:
            # Who leaves early does not take the token from the others.
            return await asyncio.shield(self._renewing())
        if now_s >= max(kept.renew_at_s, self._renew_next_at_s):
            self._renewing()
        return kept.token

    def reject(self, token: str) -> None:
        """Forget the token, if it still is the one at hand."""
        if self._kept is not None and self._kept.token == token:
            self._kept = None

    async def close(self) -> None:
        """Stop the command."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])

    def _renewing(self) -> asyncio.Task[str]:
        if self._renewal is None or self._renewal.done():
            self._renew_next_at_s = self._now_s() + RENEWAL_PAUSE_S
            self._renewal = asyncio.create_task(self._renew())
            self._renewal.add_done_callback(_look_at)
        return self._renewal

    async def _renew(self) -> str:
        token = await self._fetched()
        now_s = self._now_s()
        life_s = PLAIN_LIFE_S
        if token.ends_at_s is not None:
            life_s = min(token.ends_at_s - now_s, LIFE_MAX_S)
        if life_s <= LAST_S:
            raise _not_now("token_command gives a token that has run out")
        early_s = min(RENEW_EARLY_S, life_s / 2)
        self._kept = _Kept(
            token.text, now_s + life_s - early_s, now_s + life_s - LAST_S
        )
        return token.text

    async def _fetched(self) -> _Token:
        try:
            async with asyncio.timeout(self._command_max_s):
                output = await _printed(self._command)
        except TimeoutError as error:
            told = f"token_command took more than {self._command_max_s} s"
            raise _not_now(told) from error
        except OSError as error:
            raise _not_now(f"token_command cannot run: {error.strerror}") from error
        try:
            return _read_token(output, "token_command")
        except ProviderError as error:
            raise _not_now(error.detail) from None


class FileTokens:
    """Tokens that somebody else keeps in a file: it is read again when it changes.

    While a change cannot be read (it may be half written), the last token serves on.

    Args:
        path: the file.
        now_s: seconds since the epoch.
    """

    def __init__(self, path: Path, now_s: Callable[[], float]) -> None:
        self._path = path
        self._now_s = now_s
        self._token: _Token | None = None
        self._mark: object = None

    async def current(self) -> str:
        """Give the token of the file."""
        try:
            self._look()
        except ProviderError:
            if self._token is None:
                raise
        token = self._token
        assert token is not None
        if token.ends_at_s is not None and self._now_s() >= token.ends_at_s:
            raise _no_token("token_file holds a token that has run out")
        return token.text

    def reject(self, token: str) -> None:
        """Read the file again, whether it looks changed or not."""
        if self._token is not None and self._token.text == token:
            self._mark = None

    async def close(self) -> None:
        """Nothing is under way."""

    def _look(self) -> None:
        try:
            # Looked at before it is read: a change in between shows the next time.
            stat = self._path.stat()
            mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if mark == self._mark:
                return
            with self._path.open("rb") as file:
                content = file.read(OUTPUT_MAX_BYTES + 1)
        except OSError as error:
            raise _no_token(f"token_file cannot be read: {error.strerror}") from error
        self._token = _read_token(content, "token_file")
        self._mark = mark


async def _printed(command: Sequence[str]) -> bytes:
    """Run a command to its end; it and its children do not outlive the wait."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        # Nobody knows what a command says there: it could be the token.
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        output = b""
        while chunk := await process.stdout.read(OUTPUT_MAX_BYTES):
            output += chunk
            if len(output) > OUTPUT_MAX_BYTES:
                raise _not_now(f"token_command prints more than {OUTPUT_MAX_BYTES}")
        status = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if status != 0:
        raise _not_now(f"token_command ended with {status}; run it by hand to see why")
    return output


class _Printed(msgspec.Struct):
    token: str = msgspec.field(name="accessToken")
    expires_on: int | str | None = None
    expires_on_local: str | None = msgspec.field(name="expiresOn", default=None)


def _read_token(output: bytes, source: str) -> _Token:
    text, ends_at_s = output.strip(), None
    if text.startswith(b"{"):
        try:
            printed = msgspec.json.decode(text, type=_Printed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # Not even as a cause: its words may quote what was read.
            raise _no_token(f"{source} gives JSON without accessToken") from None
        text, ends_at_s = printed.token.encode(), _end_s(printed)
    if not _TOKEN.fullmatch(text):
        raise _no_token(f"{source} gives nothing that looks like a token")
    return _Token(text.decode(), ends_at_s)


def _end_s(printed: _Printed) -> float | None:
    """Read when a token ends; nothing where that cannot be read."""
    try:
        if printed.expires_on is not None:
            return float(int(printed.expires_on))
        # ``az`` means local time where it names no zone, as Python does.
        return datetime.fromisoformat(printed.expires_on_local or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _no_token(detail: str) -> ProviderError:
    return ProviderError(FailureKind.AUTH, detail)


def _not_now(detail: str) -> ProviderError:
    # Nothing was sent, and nobody has refused a credential: shutting it off would
    # outlast most of what makes a command fail.
    return ProviderError(FailureKind.NETWORK, detail)


def _look_at(task: asyncio.Task[str]) -> None:
    """Take note of a failure that nobody waited for: who needs a token meets it."""
    if not task.cancelled():
        task.exception()
