"""Classifies the errors of OpenAI-style images APIs, whatever shape they come in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.replies import as_object, decoded
from providers.kit.wire import RETRY_AFTER_MAX_S, retry_after_s, scrub

_MADE = re.compile(r"(?i)generated image was filtered")
"""So Azure says that the picture was refused, not the prompt."""
_OK = range(200, 300)
_FAULTS = range(400, 600)
NO_CODES: Mapping[str, FailureKind] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as the upstream put it, whatever the shape of its body.

    ``status`` is None where the body of a success tells none. ``codes`` stand as they
    came, the most telling first.
    """

    status: int | None
    headers: Mapping[str, str]
    codes: tuple[str, ...] = ()
    type: str = ""
    message: str = ""
    output_stage: bool = False
    in_success: bool = False

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], body: object) -> Refusal:
        """Read the error out of a body: an object, a string, or FastAPI's detail."""
        found = _error_in(body)
        inner = as_object(found.get("innererror") or found.get("inner_error"))
        code = found.get("code")
        stage = as_object(found.get("moderation_details")).get("moderation_stage")
        message = str(found.get("message") or "")
        return cls(
            status=_told_status(status, code),
            headers=headers,
            codes=tuple(str(c) for c in (inner.get("code"), code) if c),
            type=str(found.get("type") or "").lower(),
            message=message,
            output_stage=stage == "output" or bool(_MADE.search(message)),
            in_success=status in _OK,
        )


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, secret: str
) -> ProviderError:
    """Classify an error answer. Decided by code, then words, headers, status."""
    return judge_body(status, headers, decoded(body), secret)


def judge_body(
    status: int, headers: Mapping[str, str], body: object, secret: str
) -> ProviderError:
    """Classify an error that stands in a decoded body."""
    return judge(Refusal.of(status, headers, body), secret)


def judge(
    refused: Refusal,
    secret: str,
    *,
    kind: FailureKind | None = None,
    kinds: Mapping[str, FailureKind] = NO_CODES,
) -> ProviderError:
    """Classify an error by code, then words, headers, status.

    ``kind`` is given by who knows it already. ``kinds`` are codes of the upstream's
    own, in lower case; they come before all others.
    """
    kind = (
        kind
        or _first(refused.codes, kinds)
        or _first(refused.codes, _KIND_BY_CODE)
        or _KIND_BY_TYPE.get(refused.type)
        or _kind_by_words(refused)
        or _kind_by_header(refused)
        or _kind_by_status(refused)
    )
    message = scrub(refused.message, secret)
    told = kind in {FailureKind.INVALID_REQUEST, FailureKind.CONTENT_POLICY}
    made = refused.in_success and kind is FailureKind.BAD_GATEWAY
    maybe = refused.output_stage or made
    return ProviderError(
        kind,
        f"{refused.status or 'error in a success'}: {message or 'no message'}",
        status=refused.status,
        upstream_code=scrub(refused.codes[-1], secret) if refused.codes else None,
        retry_after_s=_wait_s(refused),
        billed=Billed.MAYBE if maybe else None,
        client_message=(message or None) if told else None,
    )


def of_a_read(error: ProviderError) -> ProviderError:
    """Say of a look at a job that failed that the job may run on, and be charged for.

    What is refused is the look alone: it ends no job, and no client's request is wrong.
    """
    return ProviderError(
        error.kind if error.kind in _OF_THE_ASKING else FailureKind.BAD_GATEWAY,
        f"asking after a job: {error.detail}",
        status=error.status,
        upstream_code=error.upstream_code,
        retry_after_s=error.retry_after_s,
        billed=Billed.MAYBE,
    )


def of_an_upload(error: ProviderError) -> ProviderError:
    """Say of an upload before a job that failed that nothing was bought.

    A file that is refused was checked by the gateway: another upstream may take it.
    """
    kind = {
        FailureKind.TIMEOUT: FailureKind.NETWORK,
        FailureKind.INVALID_REQUEST: FailureKind.UNSUPPORTED,
    }.get(error.kind, error.kind)
    policy = kind is FailureKind.CONTENT_POLICY
    return ProviderError(
        kind,
        f"the upload of a reference: {error.detail}",
        status=error.status,
        upstream_code=error.upstream_code,
        retry_after_s=error.retry_after_s,
        billed=Billed.NO,
        client_message=error.client_message if policy else None,
    )


_K = FailureKind
_OF_THE_ASKING = frozenset(
    {
        _K.NETWORK,
        _K.TIMEOUT,
        _K.BAD_GATEWAY,
        _K.OVERLOADED,
        _K.RATE_LIMITED,
        _K.AUTH,
        _K.INSUFFICIENT_FUNDS,
    }
)
"""What can be wrong with asking, whatever becomes of the job."""
_KIND_BY_CODE: Mapping[str, FailureKind] = {
    "moderation_blocked": _K.CONTENT_POLICY,
    "content_policy_violation": _K.CONTENT_POLICY,
    "content_filter": _K.CONTENT_POLICY,
    "contentfilter": _K.CONTENT_POLICY,
    "responsibleaipolicyviolation": _K.CONTENT_POLICY,
    "billing_hard_limit_reached": _K.INSUFFICIENT_FUNDS,
    "billing_not_active": _K.INSUFFICIENT_FUNDS,
    "insufficient_quota": _K.INSUFFICIENT_FUNDS,
    "insufficient_user_quota": _K.INSUFFICIENT_FUNDS,
    "insufficient_balance": _K.INSUFFICIENT_FUNDS,
    "credit_balance_exhausted": _K.INSUFFICIENT_FUNDS,
    "organization_spend_limit_exceeded": _K.INSUFFICIENT_FUNDS,
    "project_spend_limit_exceeded": _K.INSUFFICIENT_FUNDS,
    "organization_usage_limit_exceeded": _K.INSUFFICIENT_FUNDS,
    "invalid_api_key": _K.AUTH,
    "account_deactivated": _K.AUTH,
    "unsupported_country_region_territory": _K.AUTH,
    "model_not_found": _K.UNSUPPORTED,
    "deploymentnotfound": _K.UNSUPPORTED,
    "operationnotsupported": _K.UNSUPPORTED,
    "unknown_parameter": _K.UNSUPPORTED,
    "unsupported_parameter": _K.UNSUPPORTED,
    "unsupported_value": _K.UNSUPPORTED,
    "unsupported_model": _K.UNSUPPORTED,
    "invalid_input_fidelity_model": _K.UNSUPPORTED,
    "extra_forbidden": _K.UNSUPPORTED,
    "rate_limit_exceeded": _K.RATE_LIMITED,
    "slow_down": _K.RATE_LIMITED,
    "server_is_overloaded": _K.OVERLOADED,
    "no_available_channel": _K.OVERLOADED,
    "resource_exhausted": _K.OVERLOADED,
    "generation_timeout": _K.TIMEOUT,
    "invalid_image_file": _K.INVALID_REQUEST,
    "invalid_value": _K.INVALID_REQUEST,
    "missing_required_parameter": _K.INVALID_REQUEST,
    "string_above_max_length": _K.INVALID_REQUEST,
}
_KIND_BY_TYPE: Mapping[str, FailureKind] = {
    "insufficient_quota": _K.INSUFFICIENT_FUNDS,
    "authentication_error": _K.AUTH,
    "permission_error": _K.AUTH,
    "rate_limit_error": _K.RATE_LIMITED,
    "service_unavailable_error": _K.OVERLOADED,
    "overloaded_error": _K.OVERLOADED,
}
# Words are only believed where the status leaves room for them; None is an error that
# came with a success.
_KIND_BY_WORDS: tuple[
    tuple[frozenset[int | None], re.Pattern[str], FailureKind], ...
] = (
    # Azure locks a whole resource, and speaks of the content policy while doing so.
    (frozenset({403}), re.compile(r"(?i)temporarily blocked"), _K.AUTH),
    (
        frozenset({None, 400, 402, 403, 429}),
        re.compile(
            r"(?i)exhausted balance|insufficient (?:credit|balance|quota|funds)|billing"
            r"|\btop[ _-]?up\b|\buser is locked\b(?!.{0,80}admin lock)"
        ),
        _K.INSUFFICIENT_FUNDS,
    ),
    (
        frozenset({None, 400, 403, 422, 451}),
        re.compile(
            r"(?i)safety system|content (?:management )?policy|flagged|moderation"
            r"|(?<!case[ -])\bsensitive\b"
        ),
        _K.CONTENT_POLICY,
    ),
    (
        frozenset({None, 400, 422}),
        re.compile(
            r"(?i)(?:unknown|unsupported|unrecognized) (?:request )?"
            r"(?:parameter|argument)|model\b.{0,80} (?:does not exist|not found)"
            r"|api version not supported"
        ),
        _K.UNSUPPORTED,
    ),
)
_KIND_BY_STATUS: Mapping[int, FailureKind] = {
    400: _K.INVALID_REQUEST,
    401: _K.AUTH,
    402: _K.INSUFFICIENT_FUNDS,
    403: _K.AUTH,
    404: _K.UNSUPPORTED,
    405: _K.UNSUPPORTED,
    408: _K.TIMEOUT,
    410: _K.UNSUPPORTED,
    413: _K.INVALID_REQUEST,
    415: _K.INVALID_REQUEST,
    422: _K.INVALID_REQUEST,
    429: _K.RATE_LIMITED,
    451: _K.CONTENT_POLICY,
    499: _K.TIMEOUT,
    503: _K.OVERLOADED,
    504: _K.TIMEOUT,
    524: _K.TIMEOUT,
    529: _K.OVERLOADED,
}
_WAIT_IN_WORDS = re.compile(
    r"(?i)(?:(?:resets|try again) in|retry after) ~?(\d{1,6}(?:\.\d{1,6})?)"
    r" ?(ms|s(?:econds?)?)\b"
)


def _first(
    codes: tuple[str, ...], kinds: Mapping[str, FailureKind]
) -> FailureKind | None:
    lower = (code.lower() for code in codes)
    return next((kinds[code] for code in lower if code in kinds), None)


def _kind_by_words(refused: Refusal) -> FailureKind | None:
    for statuses, words, kind in _KIND_BY_WORDS:
        if refused.status in statuses and words.search(refused.message):
            return kind
    return None


def _kind_by_header(refused: Refusal) -> FailureKind | None:
    # A request that the upstream itself wants to see again is not what is wrong.
    wanted = refused.headers.get("x-should-retry") == "true"
    if wanted and _kind_by_status(refused) is FailureKind.INVALID_REQUEST:
        return FailureKind.BAD_GATEWAY
    return None


def _kind_by_status(refused: Refusal) -> FailureKind:
    if refused.status is None:
        wrong = refused.type in {"invalid_request_error", "image_generation_user_error"}
        return FailureKind.INVALID_REQUEST if wrong else FailureKind.BAD_GATEWAY
    return _KIND_BY_STATUS.get(refused.status, FailureKind.BAD_GATEWAY)


def _wait_s(refused: Refusal) -> float | None:
    wait_s = retry_after_s(refused.headers)
    said = _WAIT_IN_WORDS.search(refused.message)
    if wait_s is None and said is not None:
        wait_s = float(said[1]) / (1000 if said[2].lower() == "ms" else 1)
        wait_s = min(wait_s, RETRY_AFTER_MAX_S)
    return wait_s


def _told_status(status: int, code: object) -> int | None:
    """Take the status from the body where a success carries an error."""
    if status not in _OK:
        return status
    return code if isinstance(code, int) and code in _FAULTS else None


def _error_in(body: object) -> Mapping[str, object]:
    whole = as_object(body)
    told = (whole.get("error"), whole.get("detail"))
    error = next((t for t in told if t and isinstance(t, (str, list, dict))), whole)
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, list):
        # FastAPI lists what is wrong field by field.
        faults = [as_object(fault) for fault in error]
        said = (f"{_place(fault.get('loc'))}{fault.get('msg')}" for fault in faults)
        kinds = [fault.get("type") for fault in faults]
        return {"message": "; ".join(said), "code": kinds[0] if kinds else None}
    return as_object(error)


def _place(loc: object) -> str:
    return f"{'.'.join(map(str, loc))}: " if isinstance(loc, list) and loc else ""
