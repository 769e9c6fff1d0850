"""How a client gets its pictures: the table of the two contracts. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gateway.core.requests import ImageRequest
from gateway.core.tasks import DeliveryMode

WAIT_MAX_S = 290
"""Below the 300 s after which common HTTP clients give up."""
WAIT_MAX_DIGITS = len(str(WAIT_MAX_S))
"""More digits, leading zeros aside, are more than the most in any case."""
PREFER_MAX_CHARS = 1_024
"""So much of the header is read."""
_PREFERENCE = re.compile(r'(?:[^",;]|"(?:[^"\\]|\\.)*"|")+')
_PARTS = re.compile(r'\s*([^\s=]+)\s*(?:=\s*(?:"([^"\\]*)"|([^\s"]*))\s*)?')
_SECONDS = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Delivery:
    """``wait_s``: answer within so many seconds, and with the task after that."""

    mode: DeliveryMode
    wait_s: int | None = None


SYNC = Delivery(DeliveryMode.SYNC)
ASYNC = Delivery(DeliveryMode.ASYNC)


def delivery_of(prefer: str, request: ImageRequest, key_delivery: str) -> Delivery:
    """Decide by the first of these that says something.

    The ``Prefer`` header (RFC 7240; all its lines, joined), ``stream``,
    ``callback_url``, the key's own setting, words that only the task contract has;
    else sync.
    """
    asked = _preferred(prefer)
    if asked is not None:
        return asked
    if request.stream:
        return SYNC
    if request.callback_url is not None:
        return ASYNC
    if key_delivery in {"sync", "async"}:
        return ASYNC if key_delivery == "async" else SYNC
    return ASYNC if request.by_url else SYNC


def surely_sync(prefer: str, key_delivery: str) -> bool:
    """Tell, before a body is read, what it will be unless it has a ``callback_url``."""
    return _preferred(prefer) is None and key_delivery != "async"


def _preferred(prefer: str) -> Delivery | None:
    asked = list(_preferences(prefer))
    for name, word in asked:
        if name == "wait" and _SECONDS.fullmatch(word):
            return Delivery(DeliveryMode.ASYNC, _at_most(word))
    return ASYNC if ("respond-async", "") in asked else None


def _preferences(prefer: str) -> Iterator[tuple[str, str]]:
    """Yield names, in lower case, and their words, without quotes.

    Blanks may stand around ``=``, and an empty word is none (RFC 7240, 2). What cannot
    be read is passed over, and so is what is not known: it is only a preference.
    """
    for text in _PREFERENCE.findall(prefer[:PREFER_MAX_CHARS]):
        found = _PARTS.fullmatch(text)
        if found is not None:
            name, quoted, plain = found.groups()
            yield name.lower(), (quoted or plain or "").strip()


def _at_most(digits: str) -> int:
    short = digits.lstrip("0")
    return WAIT_MAX_S if len(short) > WAIT_MAX_DIGITS else min(int(digits), WAIT_MAX_S)
