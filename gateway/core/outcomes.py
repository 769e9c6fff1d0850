"""How a request for pictures ended, in the words that availability counts."""

from __future__ import annotations

from enum import Enum


class RequestOutcome(Enum):
    """A closed set: it labels a metric.

    Served are SUCCESS and REFUSED; the client's are CLIENT_ERROR and CANCELLED, which
    availability leaves out; all others are failures of the service.
    """

    SUCCESS = "success"
    REFUSED = "refused"
    """By moderation: the model has answered."""

    CLIENT_ERROR = "client_error"
    CANCELLED = "cancelled"
    UPSTREAM_EXHAUSTED = "upstream_exhausted"
    """No upstream was left that could serve it, or had room for it."""

    TIMEOUT = "timeout"
    GATEWAY_ERROR = "gateway_error"


SERVED = frozenset({RequestOutcome.SUCCESS, RequestOutcome.REFUSED})
EXCLUDED = frozenset({RequestOutcome.CLIENT_ERROR, RequestOutcome.CANCELLED})
FAILED = frozenset(RequestOutcome) - SERVED - EXCLUDED
