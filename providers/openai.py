"""OpenAI, and every server and relay that speaks its images API.

What such servers do differently is an option of the account, see ``Quirks``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from providers.kit.answers import (
    Answer,
    AnswerReader,
    Picture,
    UnreadableAnswerError,
)
from providers.kit.contract import (
    Account,
    Billed,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Operation,
    Pending,
    ProviderError,
    Usage,
)
from providers.kit.images import NotAnImageError, read_payload_header
from providers.kit.wire import (
    RETRY_AFTER_MAX_S,
    TEXT_MAX_CHARS,
    Call,
    Download,
    Reply,
    Tools,
    retry_after_s,
    scrub,
)

TOKENS_MAX = 1_000_000_000
"""A usage beyond this is no usage."""

Quality = Literal["low", "medium", "high", "xhigh", "max"]
Format = Literal["png", "jpeg", "webp"]
Background = Literal["opaque", "transparent"]

_GPT_IMAGE = re.compile(r"(?:.*/)?(?:gpt-image-|chatgpt-image-)")
_OK = range(200, 300)
_FAULTS = range(400, 600)

Plain = Annotated[str, msgspec.Meta(pattern="^[!-~]*$")]
Host = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.:-]+$")]
Size = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{1,4}x[1-9][0-9]{1,4}$")]


class Quirks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an account's server differs from OpenAI's; each field is an option.

    ``path_prefix`` stands between the base URL and ``generations_path``.
    ``strip_fields`` are never sent. ``response_format`` is sent unless ``omit``, never
    for gpt-image models. ``usage`` says whether to believe the reported tokens.
    ``download_hosts`` may be asked for pictures that come as a link, besides the base
    URL's own host. Empty ``sizes`` and ``qualities`` mean: any.
    """

    path_prefix: Plain = ""
    generations_path: Plain = "/images/generations"
    auth_header: Literal["bearer", "api-key", "none"] = "bearer"
    organization: Plain = ""
    project: Plain = ""
    strip_fields: frozenset[str] = frozenset()
    response_format: Literal["omit", "b64_json", "url"] = "omit"
    usage: Literal["trust", "ignore"] = "trust"
    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    download_hosts: frozenset[Host] = frozenset()
    sizes: frozenset[Size] = frozenset()
    qualities: frozenset[Quality] = frozenset()
    output_formats: frozenset[Format] = frozenset(get_args(Format))
    backgrounds: frozenset[Background] = frozenset(get_args(Background))


def connect(account: Account, tools: Tools) -> OpenAI:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    quirks = read_quirks(account.options)
    _check_base_url(account.base_url)
    if not account.secret.isascii() or not account.secret.isprintable():
        raise ValueError("credential: holds characters that cannot be sent")
    if quirks.auth_header != "none" and not account.secret:
        raise ValueError('credential: is empty (or set auth_header = "none")')
    return OpenAI(account, tools, quirks)


def read_quirks(options: Mapping[str, object]) -> Quirks:
    """Check an account's options.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    try:
        return msgspec.convert(dict(options), Quirks)
    except msgspec.ValidationError as error:
        raise ValueError(f"options: {error}") from error


@dataclass(frozen=True, slots=True)
class OpenAI:
    """A provider behind the OpenAI images API."""

    account: Account
    tools: Tools
    quirks: Quirks

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Tell what the account's options allow."""
        split = (size.split("x") for size in self.quirks.sizes)
        return Capabilities(
            operations=frozenset({Operation.GENERATE}),
            n_max=self.quirks.n_max,
            sizes=frozenset((int(width), int(height)) for width, height in split),
            qualities=frozenset(self.quirks.qualities),
            output_formats=frozenset(self.quirks.output_formats),
            backgrounds=frozenset(self.quirks.backgrounds),
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Make the pictures; this API answers when they are done."""
        if job.operation is not Operation.GENERATE:
            raise ProviderError(
                FailureKind.UNSUPPORTED, f"no way to {job.operation.value} here yet"
            )
        deadline_at_s = asyncio.get_running_loop().time() + job.deadline_s
        call = Call(
            "POST",
            self._url(self.quirks.generations_path),
            deadline_at_s,
            headers=self._headers(),
            json=generation_body(job, self.quirks),
            secret=self.account.secret,
        )
        return await self._images(call, job.n)

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise ProviderError(FailureKind.UNSUPPORTED, "this API has no jobs to ask for")

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    def _url(self, path: str) -> str:
        parts = (self.account.base_url, self.quirks.path_prefix, path)
        return "/".join(part.strip("/") for part in parts if part.strip("/"))

    def _headers(self) -> dict[str, str]:
        headers = {
            "OpenAI-Organization": self.quirks.organization,
            "OpenAI-Project": self.quirks.project,
        }
        if self.quirks.auth_header == "bearer":
            headers["Authorization"] = f"Bearer {self.account.secret}"
        if self.quirks.auth_header == "api-key":
            headers["api-key"] = self.account.secret
        return {name: value for name, value in headers.items() if value}

    async def _images(self, call: Call, n: int) -> Done:
        reader = AnswerReader(self.tools.spools)
        try:
            async with self.tools.wire.exchange(call) as reply:
                if not reply.is_success:
                    body = await reply.error_body()
                    raise refusal(reply.status, reply.headers, body, secret=call.secret)
                await _fill(reader, reply)
            return await self._done(_whole(reader, reply), reply, call, n)
        finally:
            reader.close()

    async def _done(self, answer: Answer, reply: Reply, call: Call, n: int) -> Done:
        try:
            body = answer.body
            if not isinstance(body, dict):
                raise _unreadable("the answer is no object", reply.status)
            items = _items(body)
            # Nobody asked, nor pays, for more than n.
            images, lost = await self._collect(answer, items[:n], call)
            if not images:
                raise self._why_nothing(answer, body, reply, lost)
            # The usage of a picture that cannot be delivered is not the tenant's.
            whole = lost is None and not answer.faults and len(items) <= n
            trusted = whole and self.quirks.usage == "trust"
            return Done(
                images=tuple(images),
                usage=read_usage(body.get("usage")) if trusted else None,
                upstream_request_id=reply.headers.get("x-request-id"),
                quality=_known(body.get("quality"), get_args(Quality)),
                background=_known(body.get("background"), get_args(Background)),
            )
        finally:
            answer.close()

    async def _collect(
        self, answer: Answer, items: list[Mapping[str, object]], call: Call
    ) -> tuple[list[MadeImage], ProviderError | None]:
        """Gather the pictures, and the last trouble with one that is a link."""
        images: list[MadeImage] = []
        lost: ProviderError | None = None
        try:
            for item in items:
                try:
                    image = await self._image(answer, item, call)
                except ProviderError as error:
                    lost = error
                else:
                    images += [image] if image is not None else []
        except BaseException:
            for image in images:
                image.payload.close()
            raise
        return images, lost

    async def _image(
        self, answer: Answer, item: Mapping[str, object], call: Call
    ) -> MadeImage | None:
        url = item.get("url")
        picture = answer.take(item.get("b64_json")) or answer.take(url)
        if picture is None and isinstance(url, str) and "/" in url:
            picture = await self._fetched(url, call)
        if picture is None:
            return None
        revised = item.get("revised_prompt")
        return MadeImage(
            payload=picture.spool,
            media_type=picture.header.media_type,
            width_px=picture.header.width_px,
            height_px=picture.header.height_px,
            revised_prompt=revised if isinstance(revised, str) else None,
        )

    async def _fetched(self, url: str, call: Call) -> Picture:
        home = urlsplit(self.account.base_url).hostname or ""
        download = Download(
            url,
            hosts={home, *self.quirks.download_hosts},
            deadline_at_s=call.deadline_at_s,
            secret=call.secret,
        )
        spool = await self.tools.wire.download(download, self.tools.spools)
        try:
            return Picture(spool, read_payload_header(spool))
        except (NotAnImageError, OSError) as error:
            spool.close()
            raise ProviderError(
                FailureKind.RESULT_LOST, f"what the link gave is {error}"
            ) from error

    def _why_nothing(
        self,
        answer: Answer,
        body: Mapping[str, object],
        reply: Reply,
        lost: ProviderError | None,
    ) -> ProviderError:
        if body.get("error"):
            refused = Refusal.of(reply.status, reply.headers, body)
            return _judge(refused, self.account.secret)
        if answer.faults:
            return _unreadable(f"pictures: {'; '.join(answer.faults)}", reply.status)
        if lost is not None:
            return lost
        if "data" not in body:
            return _unreadable("an object that is no images answer", reply.status)
        return ProviderError(
            FailureKind.NO_OUTPUT, "a success without a picture", status=reply.status
        )


def generation_body(job: ImageJob, quirks: Quirks) -> dict[str, object]:
    """Write a job as the body of ``/images/generations``."""
    body: dict[str, object] = {
        "model": job.model,
        "prompt": job.prompt,
        "n": job.n,
        "size": _size(job),
        "quality": job.quality,
        "output_format": job.output_format,
    }
    if job.output_format != "png":
        body["output_compression"] = job.output_compression
    body["background"] = job.background
    body["moderation"] = job.moderation
    body["user"] = job.user
    body["safety_identifier"] = job.safety_identifier
    if quirks.response_format != "omit" and not _GPT_IMAGE.match(job.model):
        body["response_format"] = quirks.response_format
    return {
        name: value
        for name, value in body.items()
        if value is not None and name not in quirks.strip_fields
    }


def read_usage(reported: object) -> Usage | None:
    """Read a ``usage`` object; None when it is missing or cannot be true.

    A cached token is counted as cached only. Where only the number of all cached
    tokens is given, it is text first: the smaller of the two discounts, so that nobody
    is charged less than the upstream vouches for.
    """
    if not isinstance(reported, dict):
        return None
    details = _object(reported.get("input_tokens_details"))
    cached = _object(details.get("cached_tokens_details"))
    try:
        given = _count(reported, "input_tokens")
        output = _count(reported, "output_tokens") or 0
        total = _count(reported, "total_tokens")
        text = _count(details, "text_tokens")
        image = _count(details, "image_tokens")
        if text is None and image is None:
            text = given
        if text is None and image is None:
            return None
        text, image = text or 0, image or 0
        text_cached, image_cached = _cached(details, cached, text)
    except ValueError:
        return None
    consistent = (
        given in {None, text + image}
        and total in {None, text + image + output}
        and text_cached <= text
        and image_cached <= image
    )
    # No picture was ever made of no tokens: zeros are what a relay says that does
    # not know.
    if not consistent or output == 0:
        return None
    return Usage(
        text_input=text - text_cached,
        text_cached=text_cached,
        image_input=image - image_cached,
        image_cached=image_cached,
        image_output=output,
    )


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
        inner = _object(found.get("innererror") or found.get("inner_error"))
        code = found.get("code")
        stage = _object(found.get("moderation_details")).get("moderation_stage")
        return cls(
            status=_told_status(status, code),
            headers=headers,
            codes=tuple(str(c) for c in (inner.get("code"), code) if c),
            type=str(found.get("type") or "").lower(),
            message=str(found.get("message") or ""),
            output_stage=stage == "output",
            in_success=status in _OK,
        )


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, secret: str
) -> ProviderError:
    """Classify an error answer. Decided by code, then words, headers, status."""
    try:
        decoded: object = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = None
    return _judge(Refusal.of(status, headers, decoded), secret)


def _judge(refused: Refusal, secret: str) -> ProviderError:
    kind = (
        _first(refused.codes, _KIND_BY_CODE)
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


_K = FailureKind
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
    r"(?i)(?:resets|try again) in ~?(\d{1,6}(?:\.\d{1,6})?) ?(ms|s)\b"
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
    whole = _object(body)
    told = (whole.get("error"), whole.get("detail"))
    error = next((t for t in told if t and isinstance(t, (str, list, dict))), whole)
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, list):
        # FastAPI lists what is wrong field by field.
        faults = [_object(fault) for fault in error]
        said = (f"{_place(fault.get('loc'))}{fault.get('msg')}" for fault in faults)
        kinds = [fault.get("type") for fault in faults]
        return {"message": "; ".join(said), "code": kinds[0] if kinds else None}
    return _object(error)


def _place(loc: object) -> str:
    return f"{'.'.join(map(str, loc))}: " if isinstance(loc, list) and loc else ""


async def _fill(reader: AnswerReader, reply: Reply) -> None:
    async with aclosing(reply.chunks()) as chunks:
        async for chunk in chunks:
            try:
                reader.feed(chunk)
            except UnreadableAnswerError as error:
                raise _unreadable(str(error), reply.status) from error
            except OSError as error:
                raise _unkept(error) from error


def _whole(reader: AnswerReader, reply: Reply) -> Answer:
    try:
        return reader.finish()
    except UnreadableAnswerError as error:
        raise _unreadable(str(error), reply.status) from error
    except OSError as error:
        raise _unkept(error) from error


def _unreadable(detail: str, status: int) -> ProviderError:
    return ProviderError(
        FailureKind.BAD_GATEWAY,
        f"{status} with what cannot be used: {detail}"[:TEXT_MAX_CHARS],
        status=status,
        billed=Billed.MAYBE,
    )


def _unkept(error: OSError) -> ProviderError:
    return ProviderError(
        FailureKind.RESULT_LOST, f"no room for the answer: {error.strerror}"
    )


def _items(body: Mapping[str, object]) -> list[Mapping[str, object]]:
    data = body.get("data")
    return [i for i in data if isinstance(i, dict)] if isinstance(data, list) else []


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _known(value: object, words: tuple[str, ...]) -> str | None:
    return value if isinstance(value, str) and value in words else None


def _size(job: ImageJob) -> str:
    if job.width_px is None or job.height_px is None:
        return "auto"
    return f"{job.width_px}x{job.height_px}"


def _cached(
    details: Mapping[str, object], by_class: Mapping[str, object], text_tokens: int
) -> tuple[int, int]:
    text = _count(by_class, "text_tokens") or _count(details, "cached_text_tokens")
    image = _count(by_class, "image_tokens") or _count(details, "cached_image_tokens")
    total = _count(details, "cached_tokens")
    if text is None and image is None and total is not None:
        text = min(total, text_tokens)
        image = total - text
    text, image = text or 0, image or 0
    if total not in {None, text + image}:
        raise ValueError("cached tokens that do not add up")
    return text, image


def _count(counts: Mapping[str, object], name: str) -> int | None:
    value = counts.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= TOKENS_MAX:
        raise ValueError(f"{name} is no number of tokens")
    return value


def _check_base_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        usable = bool(parts.hostname) and parts.scheme in {"http", "https"}
        usable = usable and not (parts.query or parts.fragment or "@" in parts.netloc)
        usable = usable and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("base_url: must be http(s)://host[:port][/path], nothing more")
