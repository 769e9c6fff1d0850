"""Replicate: predictions, asked after until they end, for models like gpt-image-2.

Pictures come in a few sizes, told as an aspect ratio. No mask, and no usage.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, get_args

import msgspec

from providers.kit.abilities import Format, Host, Word, operations, sizes_px
from providers.kit.accounts import check_account, is_at_home, read_options
from providers.kit.contract import (
    Account,
    Billed,
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    InputFile,
    MadeImage,
    Operation,
    Partial,
    Pending,
    ProviderError,
)
from providers.kit.image_jobs import check_edit, size_word, unable, unfindable
from providers.kit.images_api import Background
from providers.kit.multipart import FormFile, form
from providers.kit.payloads import base64_chunks, raw_length
from providers.kit.pictures import (
    collected,
    described,
    fetched,
    hosts_of,
    made,
    of_a_download,
)
from providers.kit.probes import ask
from providers.kit.refusals import (
    Refusal,
    judge,
    of_a_read,
    of_an_upload,
    refusal,
)
from providers.kit.replies import Fields, as_object, read_object, unreadable
from providers.kit.spool import Spool
from providers.kit.wire import (
    Body,
    Call,
    Download,
    Reply,
    Tools,
    deadline_in,
    scrub,
    unreadable_file,
)

INLINE_MAX_BYTES = 256 * 1024
"""References up to this size, all together, travel within the request itself."""
CANCEL_AFTER_MIN_S = 5
CREATE_MAX_S = 30.0
"""For the id of a prediction, besides the time that the call is held open."""
UPLOAD_MAX_S = 120.0
"""For one reference."""

_RUNNING = frozenset({"starting", "processing"})
_ENDED = frozenset({"succeeded", "failed", "canceled", "aborted"})
_MODEL = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*/[0-9A-Za-z][0-9A-Za-z._-]*")
_CODE = re.compile(r"\((E[0-9]{3,4})\)")
_MEANING = {
    "E003": "server_is_overloaded",
    "E004": "server_is_overloaded",
    "E005": "moderation_blocked",
    "E006": "invalid_value",
}
"""Codes that stand in the text of a failed prediction, in the kit's words."""
_WRONG_INPUT = re.compile(
    r"(?i)invalid_request_error|image_generation_user_error|input validation error"
)
_OUR_WORDS = re.compile(
    r"(?i)\b(?:aspect_ratio|quality|number_of_images|background|output_format"
    r"|output_compression|moderation|user_id|additional propert(?:y|ies))\b"
)
"""Inputs that hold what the gateway has checked: refused, they are unknown here."""

Quality = Literal["auto", "low", "medium", "high", "xhigh", "max"]
Size = Annotated[
    str, msgspec.Meta(pattern="^(?:auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$")
]
Id = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z_-]{1,64}$")]

_ASPECT_RATIOS: Mapping[str, str] = {
    "auto": "auto",
    "1024x1024": "1:1",
    "1536x1024": "3:2",
    "1024x1536": "2:3",
    "2048x2048": "2048x2048",
    "2048x1152": "2048x1152",
    "1152x2048": "1152x2048",
    "3840x2160": "3840x2160",
    "2160x3840": "2160x3840",
}


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the models of an account can do, and how they are asked.

    ``wait_s`` is how long the first call may be held open for a picture; 0 gives the
    id of the prediction at once, so that nothing can lose it. ``poll_ms`` is the pause
    between looks. ``aspect_ratios`` says how each size is called there: no other can
    be made. ``download_hosts``, with their subdomains, may be asked for pictures
    besides the base URL's own host.
    """

    wait_s: Annotated[int, msgspec.Meta(ge=0, le=60)] = 0
    poll_ms: Annotated[int, msgspec.Meta(ge=200, le=30_000)] = 1_000
    aspect_ratios: dict[Size, Word] = msgspec.field(
        default_factory=lambda: dict(_ASPECT_RATIOS)
    )
    edits: bool = True
    references_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 16
    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    qualities: frozenset[Quality] = frozenset({"auto", "low", "medium", "high"})
    output_formats: frozenset[Format] = frozenset(get_args(Format))
    backgrounds: frozenset[Background] = frozenset({"opaque"})
    download_hosts: frozenset[Host] = frozenset({"replicate.delivery"})


def connect(account: Account, tools: Tools) -> Replicate:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    options = read_options(account.options, Options)
    check_account(account)
    return Replicate(account, tools, options)


class Prediction(msgspec.Struct, frozen=True):
    """What Replicate tells of a job, as far as it matters here."""

    id: Id
    status: str
    output: object = None
    error: object = None
    urls: object = None
    data_removed: bool | None = None


class JobId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that finds a prediction again: its id, and where to ask and to stop it."""

    id: Id
    get: str
    cancel: str


@dataclass(frozen=True, slots=True)
class Replicate:
    """An account at Replicate."""

    account: Account
    tools: Tools
    options: Options

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Tell what the account's options allow."""
        options = self.options
        named = (size for size in options.aspect_ratios if size != "auto")
        return Capabilities(
            operations=operations(edits=options.edits),
            n_max=options.n_max,
            sizes=sizes_px(named),
            qualities=frozenset(options.qualities),
            output_formats=frozenset(options.output_formats),
            backgrounds=frozenset(options.backgrounds),
            references_max=options.references_max if options.edits else 0,
            cancel=True,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Create the prediction, once; a call that is held open may bring its end."""
        _check(job, self.options)
        if job.operation is Operation.EDIT:
            check_edit(job, self.capabilities(job.model))
        loop = asyncio.get_running_loop()
        deadline_at_s = loop.time() + job.deadline_s
        wanted_until_s = loop.time() + job.patience_s
        pictures = await self._pictures(job, deadline_at_s)
        call = self._call(
            "POST",
            f"{self._home}/models/{job.model}/predictions",
            deadline_at_s,
            headers=self._patience(
                deadline_at_s - loop.time(), wanted_until_s - loop.time()
            ),
            json={"input": job_input(job, self.options, pictures)},
        )
        limit_s = CREATE_MAX_S + self.options.wait_s
        prediction = await self._asked(call.within(limit_s))
        pending = Pending(self._job_id(prediction), self._poll_after_s)
        if prediction.status not in _ENDED:
            return pending
        try:
            return await self._end(job, prediction, deadline_at_s)
        except ProviderError as error:
            if error.ended:
                raise
            # The pictures are there, and could not be fetched yet.
            return pending

    def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:  # noqa: ARG002 - the contract's
        """Fail: these models show no partial pictures here."""
        raise unable("no streams here")

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        """Ask after a prediction, and fetch its pictures when it has them."""
        deadline_at_s = deadline_in(job.deadline_s)
        call = self._call("GET", self._found(job_id).get, deadline_at_s)
        prediction = await self._read(call)
        if prediction.status in _ENDED:
            return await self._end(job, prediction, deadline_at_s)
        if prediction.status in _RUNNING:
            return Pending(job_id, self._poll_after_s)
        raise ProviderError(
            FailureKind.BAD_GATEWAY,
            scrub(f"an unknown state: {prediction.status!r}", self.account.secret),
            billed=Billed.MAYBE,
        )

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        """Stop a prediction: it is charged once it has started, else not."""
        deadline_at_s = deadline_in(job.deadline_s)
        call = self._call("POST", self._found(job_id).cancel, deadline_at_s)
        prediction = await self._read(call)
        if prediction.status in {"succeeded", "failed"}:
            return None
        return Cancelled(_BILLED_BY_STATE.get(prediction.status, Billed.MAYBE))

    async def probe(self, model: str, deadline_s: float) -> None:  # noqa: ARG002 - the contract's; a token is for all models
        """Ask whose token it is."""
        url = f"{self._home}/account"
        call = self._call("GET", url, deadline_in(deadline_s))
        await ask(self.tools.wire, call)

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    @property
    def _home(self) -> str:
        return self.account.base_url.rstrip("/")

    @property
    def _poll_after_s(self) -> float:
        return self.options.poll_ms / 1000

    def _call(
        self,
        method: str,
        url: str,
        deadline_at_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        json: object = None,
        body: Body | None = None,
    ) -> Call:
        secret = self.account.secret
        return Call(
            method,
            url,
            deadline_at_s,
            headers={"Authorization": f"Bearer {secret}", **(headers or {})},
            json=json,
            body=body,
            secret=secret,
        )

    def _patience(self, left_s: float, wanted_for_s: float) -> dict[str, str]:
        # Stopped when nobody waits any more: what has not started is then free.
        headers = {"Cancel-After": f"{max(int(wanted_for_s), CANCEL_AFTER_MIN_S)}s"}
        wait_s = min(self.options.wait_s, int(left_s))
        if wait_s > 0:
            headers["Prefer"] = f"wait={wait_s}"
        return headers

    async def _pictures(self, job: ImageJob, deadline_at_s: float) -> list[str]:
        """Give each reference as a data URI, or as the URL of an uploaded file."""
        links: list[str] = []
        left_bytes = INLINE_MAX_BYTES
        for reference in job.references:
            try:
                size_bytes = raw_length(reference.payload)
                if size_bytes > left_bytes:
                    link = await self._uploaded(reference, deadline_at_s)
                else:
                    link = _data_uri(reference)
                    left_bytes -= size_bytes
            except OSError as error:
                raise unreadable_file(error) from error
            links.append(link)
        return links

    async def _uploaded(self, reference: InputFile, deadline_at_s: float) -> str:
        body = form([], [FormFile("content", reference)])
        call = self._call("POST", f"{self._home}/files", deadline_at_s, body=body)
        try:
            async with self.tools.wire.exchange(call.within(UPLOAD_MAX_S)) as reply:
                told = await _told(reply, call)
        except ProviderError as error:
            raise of_an_upload(error) from error
        url = as_object(told.get("urls")).get("get")
        if not is_at_home(url, self.account.base_url):
            raise ProviderError(
                FailureKind.BAD_GATEWAY, "an uploaded file got no URL of this upstream"
            )
        return url

    async def _asked(self, call: Call) -> Prediction:
        async with self.tools.wire.exchange(call) as reply:
            told = await _told(reply, call)
        try:
            return msgspec.convert(told, Prediction)
        except msgspec.ValidationError as error:
            if told.get("error") or told.get("detail"):
                refused = Refusal.of(reply.status, reply.headers, told)
                raise judge(refused, call.secret) from error
            detail = f"no prediction: {error}"
            raise unreadable(detail, reply.status, call.secret) from error

    async def _read(self, call: Call) -> Prediction:
        try:
            return await self._asked(call.within(self.tools.wire.read_max_s))
        except ProviderError as error:
            raise of_a_read(error) from error

    def _job_id(self, prediction: Prediction) -> str:
        # A URL elsewhere is not followed: the documented one at home finds it too.
        urls = as_object(prediction.urls)
        get, cancel = urls.get("get"), urls.get("cancel")
        home = self.account.base_url
        ours = f"{self._home}/predictions/{prediction.id}"
        job = JobId(
            id=prediction.id,
            get=get if is_at_home(get, home) else ours,
            cancel=cancel if is_at_home(cancel, home) else f"{ours}/cancel",
        )
        return msgspec.json.encode(job).decode()

    def _found(self, job_id: str) -> JobId:
        try:
            job = msgspec.json.decode(job_id, type=JobId)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise unfindable("this is no prediction") from error
        # The base URL may have been changed since.
        if not all(
            is_at_home(url, self.account.base_url) for url in (job.get, job.cancel)
        ):
            raise unfindable("this prediction is at another host")
        return job

    async def _end(
        self, job: ImageJob, prediction: Prediction, deadline_at_s: float
    ) -> Done:
        if prediction.status == "failed":
            raise _failed(prediction, self.account.secret)
        if prediction.status != "succeeded":
            raise ProviderError(
                FailureKind.TIMEOUT,
                f"the prediction was stopped: {prediction.status}",
                upstream_code=prediction.status,
                billed=_BILLED_BY_STATE[prediction.status],
                ended=True,
            )
        links = _links(prediction.output)[: job.n]
        images, lost = await collected(links, partial(self._image, deadline_at_s))
        if not images:
            raise lost or _nothing(prediction)
        return Done(
            images=tuple(images),
            usage=None,
            upstream_request_id=prediction.id,
        )

    async def _image(self, deadline_at_s: float, link: str) -> MadeImage:
        try:
            if link.startswith("data:"):
                return made(described(self._written(link)))
            domains = self.options.download_hosts
            hosts = hosts_of(link, domains, self.account.base_url)
            download = Download(link, hosts, deadline_at_s, secret=self.account.secret)
            return made(await fetched(download, self.tools))
        except ProviderError as error:
            raise of_a_download(error) from error

    def _written(self, uri: str) -> Spool:
        head, _, text = uri.partition(",")
        try:
            content = binascii.a2b_base64(text, strict_mode=True)
            if not head.endswith(";base64"):
                raise _lost("a data URI that is not base64")
            return self.tools.spools.from_bytes(content)
        except (ValueError, OSError) as error:
            raise _lost(f"a data URI that cannot be kept: {error}") from error


def job_input(
    job: ImageJob, options: Options, pictures: list[str]
) -> dict[str, object]:
    """Write a job as the ``input`` of a prediction."""
    fields: dict[str, object] = {
        "prompt": job.prompt,
        "quality": job.quality,
        "aspect_ratio": options.aspect_ratios.get(size_word(job)),
        "number_of_images": job.n,
        # Always said: theirs is webp, unless told.
        "output_format": job.output_format,
        "background": job.background,
        "moderation": job.moderation,
        "user_id": job.safety_identifier or job.user,
        "input_images": pictures or None,
    }
    if job.output_format != "png":
        fields["output_compression"] = job.output_compression
    return {name: value for name, value in fields.items() if value is not None}


_BILLED_BY_STATE: Mapping[str, Billed] = {
    "canceled": Billed.YES,
    "aborted": Billed.NO,
}


def _check(job: ImageJob, options: Options) -> None:
    if not _MODEL.fullmatch(job.model):
        raise unable("a model is owner/name here")
    if size_word(job) not in options.aspect_ratios:
        raise unable(f"no pictures of {size_word(job)} here")


def _data_uri(reference: InputFile) -> str:
    text = b"".join(base64_chunks(reference.payload)).decode()
    return f"data:{reference.media_type};base64,{text}"


async def _told(reply: Reply, call: Call) -> Fields:
    """Read an answer whole, up to its limit."""
    if not reply.is_success:
        raise _refused(reply, await reply.error_body(), call)
    return await read_object(reply, secret=call.secret)


def _refused(reply: Reply, body: bytes, call: Call) -> ProviderError:
    error = refusal(reply.status, reply.headers, body, secret=call.secret)
    wrong = error.kind is FailureKind.INVALID_REQUEST
    if wrong and _OUR_WORDS.search(error.detail):
        # Each model has a schema of its own, and it changes.
        error.kind = FailureKind.UNSUPPORTED
        error.client_message = None
    return error


def _lost(detail: str, status: int | None = None) -> ProviderError:
    return ProviderError(FailureKind.RESULT_LOST, detail, status=status, ended=True)


def _nothing(prediction: Prediction) -> ProviderError:
    if prediction.data_removed:
        return _lost("the prediction's data has been removed")
    return ProviderError(
        FailureKind.NO_OUTPUT, "a success without a picture", ended=True
    )


def _failed(prediction: Prediction, secret: str) -> ProviderError:
    """Classify a failed prediction: all there is to go by is a text."""
    message = prediction.error if isinstance(prediction.error, str) else ""
    found = _CODE.search(message)
    code = found[1] if found else ""
    wrong = _WRONG_INPUT.search(message)
    error = judge(
        Refusal(
            status=None,
            headers={},
            codes=tuple(filter(None, (_MEANING.get(code), code))),
            type="image_generation_user_error" if wrong else "",
            message=message,
            in_success=True,
        ),
        secret,
    )
    error.ended = True
    return error


def _links(output: object) -> list[str]:
    listed = output if isinstance(output, list) else [output]
    return [link for link in listed if isinstance(link, str) and link]
