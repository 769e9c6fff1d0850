"""OpenRouter's image API: one endpoint, told in USD what each call costs.

An edit is a generation with pictures to go by. There is no mask, and no way to ask
for a number of partial pictures; what the models behind it can do is an option of the
account, see ``Quirks``.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, get_args

import msgspec

from providers.kit.abilities import Format, Size, Word, operations, sizes_px
from providers.kit.accounts import check_account, read_options
from providers.kit.contract import (
    Account,
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    Operation,
    Partial,
    Pending,
    ProviderError,
    Usage,
)
from providers.kit.image_jobs import check_edit, unable
from providers.kit.images_api import Background, ImagesApi, Quality
from providers.kit.json_bodies import json_body
from providers.kit.probes import ask, is_used_up
from providers.kit.refusals import Refusal, judge
from providers.kit.replies import as_object, decoded
from providers.kit.usages import read_nanousd, read_usage
from providers.kit.wire import Call, Tools, deadline_in

PATH = "/images"
KEY_PATH = "/key"
RATIOS = frozenset(
    {
        *("1:1", "1:2", "1:4", "1:8", "2:1", "2:3", "3:2", "3:4", "4:1", "4:3", "4:5"),
        *("5:2", "5:4", "5:7", "7:5", "8:1", "9:16", "16:9", "9:20", "20:9"),
        *("9:21", "21:9"),
    }
)
"""The aspect ratios in whole numbers that OpenRouter has a name for."""

Field = Literal["size", "quality", "output_format", "output_compression", "user"]


class Routing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which providers OpenRouter may ask, as it takes it in ``provider``."""

    only: tuple[Word, ...] = ()
    order: tuple[Word, ...] = ()
    ignore: tuple[Word, ...] = ()
    sort: Literal["price", "throughput", "latency", ""] = ""
    allow_fallbacks: bool = True


class Quirks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the models of an account can do there; each field is an option.

    ``dimensions`` says how a size is asked for: as pixels, or as the aspect ratio that
    the ``sizes``, all of them named, have. ``strip_fields`` are never sent.
    ``usage`` says whether to believe the reported tokens; the reported cost always
    counts. Empty ``sizes`` and ``qualities`` mean: any.
    """

    edits: bool = True
    references_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 16
    stream: bool = True
    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    dimensions: Literal["size", "aspect_ratio"] = "size"
    sizes: frozenset[Size] = frozenset()
    qualities: frozenset[Quality] = frozenset()
    output_formats: frozenset[Format] = frozenset(get_args(Format))
    backgrounds: frozenset[Background] = frozenset({"opaque"})
    strip_fields: frozenset[Field] = frozenset()
    usage: Literal["trust", "ignore"] = "trust"
    provider: Routing = Routing()


def connect(account: Account, tools: Tools) -> OpenRouter:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    quirks = read_quirks(account.options)
    check_account(account)
    return OpenRouter(account, tools, quirks)


def read_quirks(options: Mapping[str, object]) -> Quirks:
    """Check an account's options.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    quirks = read_options(options, Quirks)
    if quirks.dimensions == "aspect_ratio":
        strange = sorted(s for s in quirks.sizes if _ratio(*_pixels(s)) not in RATIOS)
        if strange or not quirks.sizes:
            told = f"{strange[0]} has no aspect ratio with a name" if strange else ""
            raise ValueError(
                f"options: sizes: {told or 'must be named'} (dimensions = aspect_ratio)"
            )
    return quirks


@dataclass(frozen=True, slots=True)
class OpenRouter:
    """A provider behind OpenRouter's image API."""

    account: Account
    tools: Tools
    quirks: Quirks

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Tell what the account's options allow."""
        quirks = self.quirks
        return Capabilities(
            operations=operations(edits=quirks.edits),
            n_max=quirks.n_max,
            sizes=sizes_px(quirks.sizes),
            qualities=frozenset(quirks.qualities),
            output_formats=frozenset(quirks.output_formats),
            backgrounds=frozenset(quirks.backgrounds),
            references_max=quirks.references_max if quirks.edits else 0,
            stream=quirks.stream,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Make the pictures; this API answers when they are done."""
        return await self._api(job).ask(self._call(job), job.n)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Make the pictures, and show how they come along."""
        if not self.quirks.stream:
            raise unable("no streams here")
        looks = self._api(job).follow(self._call(job, stream=True), job)
        async with aclosing(looks):
            async for look in looks:
                yield look

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise unable("this API has no jobs to ask for")

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise unable("this API has no jobs to ask for")

    async def probe(self, model: str, deadline_s: float) -> None:  # noqa: ARG002 - the contract's; a key is for all models
        """Ask what the key may do, and whether it may still spend."""
        call = Call(
            "GET",
            self.account.base_url.rstrip("/") + KEY_PATH,
            deadline_in(deadline_s),
            headers={"Authorization": f"Bearer {self.account.secret}"},
            secret=self.account.secret,
        )
        key = as_object((await ask(self.tools.wire, call, judged)).get("data"))
        if is_used_up(key.get("limit_remaining")):
            raise ProviderError(
                FailureKind.INSUFFICIENT_FUNDS, "the key's own limit is used up"
            )

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    def _api(self, job: ImageJob) -> ImagesApi:
        return ImagesApi(
            self.tools,
            hosts=frozenset(),  # pictures never come as links
            usage_is_true=self.quirks.usage == "trust",
            judge=judged,
            tokens_of=partial(tokens_of, job=job),
            nanousd_of=nanousd_of,
            id_header="x-generation-id",
        )

    def _call(self, job: ImageJob, *, stream: bool = False) -> Call:
        edit = job.operation is Operation.EDIT
        if edit:
            check_edit(job, self.capabilities(job.model))
        fields = job_fields(job, self.quirks, stream=stream)
        headers = {"Authorization": f"Bearer {self.account.secret}"}
        if stream:
            headers["Accept"] = "text/event-stream, application/json"
        return Call(
            "POST",
            self.account.base_url.rstrip("/") + PATH,
            deadline_in(job.deadline_s),
            headers=headers,
            json=None if edit else fields,
            body=json_body(fields) if edit else None,
            secret=self.account.secret,
        )


def job_fields(
    job: ImageJob, quirks: Quirks, *, stream: bool = False
) -> dict[str, object]:
    """Write a job as the fields of ``/images``; pictures as they are."""
    fields: dict[str, object] = {
        "model": job.model,
        "prompt": job.prompt,
        "n": job.n,
        **_dimensions(job, quirks),
        "quality": job.quality,
        "output_format": job.output_format,
    }
    if job.output_format != "png":
        fields["output_compression"] = job.output_compression
    fields["background"] = job.background
    fields["user"] = job.user or job.safety_identifier
    fields["provider"] = _routing(job, quirks.provider) or None
    if job.operation is Operation.EDIT:
        fields["input_references"] = [
            {"type": "image_url", "image_url": {"url": reference}}
            for reference in job.references
        ]
    if stream:
        fields["stream"] = True
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name not in quirks.strip_fields
    }


def tokens_of(reported: object, job: ImageJob) -> Usage | None:
    """Read the tokens of a ``usage`` object; None when they cannot be true.

    Of the prompt's tokens only the sum is told. As many as the gateway expects for the
    references are taken to be theirs, the rest to be text.
    """
    if not isinstance(reported, dict):
        return None
    prompt = reported.get("prompt_tokens")
    of_references = job.expected.image_input * job.n
    image = min(prompt, of_references) if type(prompt) is int else 0
    details = reported.get("prompt_tokens_details")
    return read_usage(
        {
            "input_tokens": prompt,
            "output_tokens": reported.get("completion_tokens"),
            "total_tokens": reported.get("total_tokens"),
            "input_tokens_details": {
                "text_tokens": prompt - image if type(prompt) is int else prompt,
                "image_tokens": image,
                "cached_tokens": details.get("cached_tokens")
                if isinstance(details, dict)
                else None,
            },
        }
    )


def nanousd_of(reported: object) -> int | None:
    """Read what a call cost; None when it is not told or cannot be true.

    With a provider's key of one's own, the provider's bill comes on top.
    """
    if not isinstance(reported, dict):
        return None
    cost = read_nanousd(reported.get("cost"))
    if reported.get("is_byok") is not True or cost is None:
        return cost
    details = reported.get("cost_details")
    told = details.get("upstream_inference_cost") if isinstance(details, dict) else None
    bill = read_nanousd(told)
    return None if bill is None else cost + bill


def judged(
    status: int, headers: Mapping[str, str], body: object, secret: str
) -> ProviderError:
    """Classify an error by what OpenRouter calls it, then as any images API's.

    What the provider behind it answered is looked at, too. That such a provider wants
    a credential or money is between the two of them: BAD_GATEWAY.
    """
    told = as_object(as_object(body).get("error"))
    if told.get("name") == "ZodError":
        return _misfit(status, headers, str(told.get("message")), secret)
    metadata = as_object(told.get("metadata"))
    refused = _with_provider(Refusal.of(status, headers, body), metadata)
    kind = _kind_by_metadata(metadata)
    if kind is not None:
        return judge(refused, secret, kind=kind)
    error_type = metadata.get("error_type")
    if isinstance(error_type, str):
        kind = _KIND_BY_ERROR_TYPE.get(error_type)
    error = judge(refused, secret, kind=kind or _kind_by_words(refused))
    quoted = metadata.get("raw") or metadata.get("provider_code")
    if quoted and error.kind in {FailureKind.AUTH, FailureKind.INSUFFICIENT_FUNDS}:
        return judge(refused, secret, kind=FailureKind.BAD_GATEWAY)
    return error


_TOO_LARGE = 413
_K = FailureKind
_KIND_BY_ERROR_TYPE: Mapping[str, FailureKind] = {
    "content_policy_violation": _K.CONTENT_POLICY,
    "refusal": _K.CONTENT_POLICY,
    "authentication": _K.AUTH,
    "payment_required": _K.INSUFFICIENT_FUNDS,
    "token_limit_exceeded": _K.INSUFFICIENT_FUNDS,
    "rate_limit_exceeded": _K.RATE_LIMITED,
    "provider_overloaded": _K.OVERLOADED,
    "provider_unavailable": _K.BAD_GATEWAY,
    "server": _K.BAD_GATEWAY,
    "timeout": _K.TIMEOUT,
    "not_found": _K.UNSUPPORTED,
    # Pictures travel inside the body: elsewhere there may be room for them.
    "payload_too_large": _K.UNSUPPORTED,
    "context_length_exceeded": _K.INVALID_REQUEST,
    "string_too_long": _K.INVALID_REQUEST,
    "invalid_prompt": _K.INVALID_REQUEST,
    "invalid_image": _K.INVALID_REQUEST,
    "image_too_large": _K.INVALID_REQUEST,
    "image_too_small": _K.INVALID_REQUEST,
    "unsupported_image_format": _K.INVALID_REQUEST,
    # For the same reason there is nothing to look for.
    "image_not_found": _K.BAD_GATEWAY,
    "image_download_failed": _K.BAD_GATEWAY,
}
_KIND_BY_LIMIT: Mapping[str, FailureKind] = {
    "openrouter_in_flight_budget": _K.RATE_LIMITED,
    "openrouter_key_limit": _K.INSUFFICIENT_FUNDS,
    "openrouter_credits": _K.INSUFFICIENT_FUNDS,
}
_KIND_BY_WORDS = (
    ({403}, re.compile(r"(?i)request blocked"), _K.CONTENT_POLICY),
    (
        {400, 404},
        re.compile(
            r"(?i)not a valid model|no endpoints found|no allowed providers"
            r"|does not support"
        ),
        _K.UNSUPPORTED,
    ),
)


def _kind_by_metadata(metadata: Mapping[str, object]) -> FailureKind | None:
    # Moderation says why, a guardrail of the account what it has found.
    if any(metadata.get(name) for name in ("reasons", "flagged_input", "patterns")):
        return FailureKind.CONTENT_POLICY
    if metadata.get("reason") == "weight_exceeds_budget":
        return FailureKind.INSUFFICIENT_FUNDS
    limit = metadata.get("limit_source")
    return _KIND_BY_LIMIT.get(limit) if isinstance(limit, str) else None


def _kind_by_words(refused: Refusal) -> FailureKind | None:
    if refused.status == _TOO_LARGE:
        return FailureKind.UNSUPPORTED
    for statuses, words, kind in _KIND_BY_WORDS:
        if refused.status in statuses and words.search(refused.message):
            return kind
    return None


def _with_provider(refused: Refusal, metadata: Mapping[str, object]) -> Refusal:
    """Add what the provider answered, whose words are the more telling."""
    raw = metadata.get("raw")
    if isinstance(raw, str):
        raw = decoded(raw.encode(errors="replace")) or {"error": raw}
    inner = Refusal.of(refused.status or 0, refused.headers, raw)
    outer = (metadata.get("provider_code"), metadata.get("error_type"))
    code, error_type = (one if isinstance(one, str) else "" for one in outer)
    codes = (code, *inner.codes, *refused.codes, error_type)
    return replace(
        refused,
        codes=tuple(code for code in codes if code),
        type=refused.type or inner.type,
        message=" / ".join(filter(None, (refused.message, inner.message))),
        output_stage=inner.output_stage,
    )


def _misfit(
    status: int, headers: Mapping[str, str], message: str, secret: str
) -> ProviderError:
    """Read which fields do not fit the schema: it is checked before anything else.

    What the gateway lets through and OpenRouter does not know is for others to make.
    """
    issues = decoded(message.encode(errors="replace"))
    told: list[str] = []
    fields: set[object] = set()
    for issue in map(as_object, issues if isinstance(issues, list) else []):
        path = issue.get("path")
        fields.add(path[0] if isinstance(path, list) and path else None)
        told.append(f"{path}: {issue.get('message')}")
    return judge(
        Refusal(
            status, headers, codes=("ZodError",), message="; ".join(told) or message
        ),
        secret,
        kind=FailureKind.UNSUPPORTED if fields - {"prompt"} else None,
    )


def _routing(job: ImageJob, routing: Routing) -> dict[str, object]:
    told: dict[str, object] = {
        name: value
        for name in ("only", "order", "ignore", "sort")
        if (value := getattr(routing, name))
    }
    if not routing.allow_fallbacks:
        told["allow_fallbacks"] = False
    if job.moderation is not None:
        # Not one of OpenRouter's own fields: passed on if OpenAI makes the picture.
        told["options"] = {"openai": {"moderation": job.moderation}}
    return told


def _dimensions(job: ImageJob, quirks: Quirks) -> dict[str, str]:
    auto = job.width_px is None or job.height_px is None
    if quirks.dimensions == "aspect_ratio":
        ratio = "auto" if auto else _ratio(job.width_px or 0, job.height_px or 0)
        return {"aspect_ratio": ratio}
    return {} if auto else {"size": f"{job.width_px}x{job.height_px}"}


def _ratio(width_px: int, height_px: int) -> str:
    by = math.gcd(width_px, height_px) or 1
    return f"{width_px // by}:{height_px // by}"


def _pixels(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return int(width), int(height)
