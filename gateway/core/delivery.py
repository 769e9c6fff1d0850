"""How a client gets its pictures: the table of the two contracts. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gateway.core.requests import ImageRequest
from gateway.core.tasks import DeliveryMode

WAIT_MAX_S = 290
"""Below the 300 s after which common HTTP clients give up."""
_WAIT = re.compile(r"wait=(\d{1,6})")


@dataclass(frozen=True, slots=True)
class Delivery:
    """``wait_s``: answer within so many seconds, and with the task after that."""

    mode: DeliveryMode
    wait_s: int | None = None


SYNC = Delivery(DeliveryMode.SYNC)
ASYNC = Delivery(DeliveryMode.ASYNC)


def delivery_of(
    prefer: str | None, request: ImageRequest, key_delivery: str
) -> Delivery:
    """Decide by the first of these that says something.

    The ``Prefer`` header (RFC 7240), ``stream``, ``callback_url``, the key's own
    setting, words that only the task contract has; else sync.
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


def _preferred(prefer: str | None) -> Delivery | None:
    words = [word.strip().lower() for word in re.split("[,;]", prefer or "")]
    waits = [found for word in words if (found := _WAIT.fullmatch(word))]
    if waits:
        return Delivery(DeliveryMode.ASYNC, min(int(waits[0][1]), WAIT_MAX_S))
    return ASYNC if "respond-async" in words else None
