"""Every error that a client can meet. ``api/errors.py`` alone turns one into a body."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gateway.core.money import decimal_text
from gateway.core.outcomes import RequestOutcome


class GatewayError(Exception):
    """An error meant for the client.

    ``str(error)`` is safe to show and says what to do. ``code`` is stable.
    ``extra`` goes into the ``error`` object beside the four OpenAI keys.
    ``retry_after_s`` becomes Retry-After, in whole seconds.
    ``client_may_retry`` False becomes ``x-should-retry: false``: a retry by the
    client's library could buy twice or cannot help.
    """

    status = 500
    type = "api_error"
    code = "internal_error"
    client_may_retry: bool | None = None
    outcome: RequestOutcome | None = None
    """What a request that meets it counts as; None: that follows from the status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        extra: Mapping[str, object] | None = None,
        client_may_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        if client_may_retry is not None:
            self.client_may_retry = client_may_retry
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s
        self.extra: Mapping[str, object] = extra or {}

    @property
    def counts_as(self) -> RequestOutcome:
        """What a request for pictures that ends by it counts as."""
        if self.outcome is not None:
            return self.outcome
        is_clients = self.status < 500  # noqa: PLR2004
        return (
            RequestOutcome.CLIENT_ERROR if is_clients else RequestOutcome.GATEWAY_ERROR
        )


class InvalidRequestError(GatewayError):
    """A part of the request is wrong; ``param`` names it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ConfigRefusedError(InvalidRequestError):
    """What was read cannot be used; the configuration from before goes on."""

    code = "config_invalid"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            "The configuration was not taken over; the one from before goes on. "
            f"Mend it and reload again: {'; '.join(problems)}",
            extra={"problems": list(problems)},
        )
        self.problems = tuple(problems)


class ContentRefusedError(GatewayError):
    """Moderation refused the request. Not charged, not tried elsewhere."""

    status = 400
    type = "image_generation_user_error"
    code = "moderation_blocked"
    client_may_retry = False
    outcome = RequestOutcome.REFUSED


class UnauthorizedError(GatewayError):
    """No key, or one that is not valid."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class InsufficientCreditsError(GatewayError):
    """The tenant has less available than the request may cost."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_quota"
    client_may_retry = False


def insufficient_credits(
    needed_nanocredits: int, available_nanocredits: int
) -> InsufficientCreditsError:
    """Say how much a request may cost and how much there is."""
    needed = decimal_text(needed_nanocredits)
    available = decimal_text(available_nanocredits)
    return InsufficientCreditsError(
        f"This request may cost up to {needed} credits, and {available} are "
        "available. Buy credits, or ask for a smaller size, a lower quality or fewer "
        "images.",
        extra={"estimated_credits": needed, "account_balance_credits": available},
    )


def max_credits_exceeded(
    most_nanocredits: int, limit_nanocredits: int
) -> InvalidRequestError:
    """Say how much a request may cost and how much it may cost at most."""
    most, limit = decimal_text(most_nanocredits), decimal_text(limit_nanocredits)
    return InvalidRequestError(
        f"This request may cost up to {most} credits, and routing.max_credits allows "
        f"{limit}. Nothing was charged. Raise the limit, or ask for a smaller size, a "
        "lower quality or fewer images.",
        param="routing.max_credits",
        code="max_credits_exceeded",
        extra={"estimated_credits": most},
    )


class ForbiddenError(GatewayError):
    """The key may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "model_access_denied"


def tenant_suspended() -> ForbiddenError:
    """Say that a tenant may not use the gateway for now."""
    return ForbiddenError(
        "The tenant of this API key is suspended. What runs is finished; nothing new "
        "is taken. Ask the operator.",
        code="tenant_suspended",
    )


class NotFoundError(GatewayError):
    """What was asked for is not there (or belongs to another tenant)."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


def upstream_not_found(name: str, known: Iterable[str]) -> NotFoundError:
    """Say that there is no such upstream, and which there are: to operators only."""
    return NotFoundError(
        f"There is no upstream {name[:64]!a}. There are: "
        f"{', '.join(sorted(known)) or 'none'}.",
        code="upstream_not_found",
    )


class ConflictError(GatewayError):
    """The request contradicts the state of what it acts on."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class TooLargeError(GatewayError):
    """The body is over its limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class RateLimitedError(GatewayError):
    """Too many requests; ``retry_after_s`` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class UpstreamsRestError(RateLimitedError):
    """Every upstream asked to be left alone for a while."""

    outcome = RequestOutcome.UPSTREAM_EXHAUSTED


class ServiceUnavailableError(GatewayError):
    """Nothing can serve this now; ``retry_after_s`` says when to come back."""

    status = 503
    type = "api_error"
    code = "service_unavailable"


class UpstreamsExhaustedError(ServiceUnavailableError):
    """No upstream is left that could serve the request, or has room for it."""

    outcome = RequestOutcome.UPSTREAM_EXHAUSTED


class NothingWantedError(ServiceUnavailableError):
    """What the request itself wants of routing leaves no upstream."""

    outcome = RequestOutcome.CLIENT_ERROR


class OutcomeUnknownError(ServiceUnavailableError):
    """What was asked for may have been done, or not."""


def storage_full() -> ServiceUnavailableError:
    """Say that the disk takes no pictures."""
    return ServiceUnavailableError(
        "The gateway cannot store pictures at the moment. Try again later.",
        code="storage_unavailable",
        retry_after_s=30,
    )


class StoreAwayError(ServiceUnavailableError):
    """The store of pictures does not answer, or refuses: it may come back by itself."""

    code = "storage_unavailable"


def store_away() -> StoreAwayError:
    """Say that pictures cannot be stored or read."""
    return StoreAwayError(
        "The gateway cannot reach its pictures at the moment. Try again later.",
        retry_after_s=30,
    )


class DeadlineExceededError(GatewayError):
    """The deadline passed before a picture was there."""

    status = 504
    type = "api_error"
    code = "generation_timeout"
    client_may_retry = False
    outcome = RequestOutcome.TIMEOUT
