"""fal.ai: pictures from its queue, which is asked until they are made.

What is peculiar to its models and to an account is in ``Options``.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from functools import partial
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from providers.kit.abilities import Host, Size, Word, operations, sizes_px
from providers.kit.accounts import check_account, is_at_home, read_options
from providers.kit.answers import Answer
from providers.kit.contract import (
    Account,
    Billed,
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Operation,
    Partial,
    Pending,
    ProviderError,
)
from providers.kit.image_jobs import check_edit, unable, unfindable
from providers.kit.images_api import Quality
from providers.kit.json_bodies import json_body
from providers.kit.pictures import (
    collected,
    fetched,
    hosts_of,
    made,
    of_a_download,
)
from providers.kit.probes import ask_in_vain
from providers.kit.refusals import Refusal, judge, of_a_read
from providers.kit.replies import (
    Fields,
    as_object,
    decoded,
    read_answer,
    unreadable,
)
from providers.kit.usages import read_usage
from providers.kit.wire import Call, Download, Tools, deadline_in

POLL_QUEUED_S = 2.0
POLL_RUNNING_S = 1.0
START_MIN_S = 2
"""fal refuses a time to start of 1 s or less."""
NO_REQUEST_ID = "00000000-0000-0000-0000-000000000000"
N_MAX = 4
REFERENCES_MAX = 16
UNITS_MAX = 1_000_000
"""A count of billable units beyond this is no count."""
UNITS_MAX_CHARS = 32

DOWNLOAD_DOMAINS = frozenset({"fal.media"})
AUTO_SIZE_PX = (1024, 1024)
"""What is asked for where the model may choose: fal's own choice is 1024x768."""

Path = Annotated[str, msgspec.Meta(pattern="^/[!-~]*$")]

_FIRST_FAMILY = re.compile(r"(?:.*/)?gpt-image-1(?:[.-][^/]*)?(?:/|$)")
"""gpt-image-1, 1.5 and mini take other fields than their successors."""
_FIRST_SIZES = frozenset({(1024, 1024), (1536, 1024), (1024, 1536)})
_KNOWS_AUTO_QUALITY = re.compile(r"(?:.*/)?gpt-image-2\.")
_THREE_QUALITIES = frozenset({"low", "medium", "high"})
_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_STILL_AT_WORK = re.compile(r"(?i)still in progress")


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an account's endpoints can do; each field is an option.

    A job's model is the id of the endpoint that generates. The one that edits is
    looked up in ``edit_models``; else it is that id with ``/edit`` at its end, in place
    of ``/text-to-image`` where there is one. ``edits`` and ``mask`` say whether it can
    do that, ``background`` whether it takes one (the gpt-image-1 family always does).
    ``usage`` says whether to believe the reported tokens. ``download_hosts``, with
    their subdomains, may be asked for pictures, besides fal's own. Empty ``sizes`` and
    ``qualities`` mean: what the model is known to take.
    """

    edits: bool = True
    edit_models: Mapping[Word, Word] = {}
    mask: bool = True
    references_max: Annotated[int, msgspec.Meta(ge=1, le=REFERENCES_MAX)] = (
        REFERENCES_MAX
    )
    background: bool = False
    n_max: Annotated[int, msgspec.Meta(ge=1, le=N_MAX)] = N_MAX
    usage: Literal["trust", "ignore"] = "trust"
    priority: Literal["normal", "low"] = "normal"
    download_hosts: frozenset[Host] = frozenset()
    sizes: frozenset[Size] = frozenset()
    qualities: frozenset[Quality] = frozenset()


def connect(account: Account, tools: Tools) -> Fal:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    options = read_options(account.options, Options)
    check_account(account)
    parts = urlsplit(account.base_url)
    return Fal(account, tools, options, f"{parts.scheme}://{parts.netloc}")


@dataclass(frozen=True, slots=True)
class Fal:
    """A provider behind fal's queue. ``origin`` is the only host that sees the key."""

    account: Account
    tools: Tools
    options: Options
    origin: str

    def capabilities(self, model: str) -> Capabilities:
        """Tell what the model is known to take, within the account's options."""
        options = self.options
        first = bool(_FIRST_FAMILY.match(model))
        auto = bool(_KNOWS_AUTO_QUALITY.match(model))
        qualities = frozenset() if auto else _THREE_QUALITIES
        see_through = first or options.background
        return Capabilities(
            operations=operations(edits=options.edits),
            n_max=options.n_max,
            sizes=sizes_px(options.sizes) or (_FIRST_SIZES if first else frozenset()),
            qualities=frozenset(options.qualities) or qualities,
            backgrounds=frozenset(
                {"opaque", "transparent"} if see_through else {"opaque"}
            ),
            mask=options.edits and options.mask,
            references_max=options.references_max if options.edits else 0,
            cancel=True,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Put the job into the queue, once."""
        heard = await self._told(self._submission(job))
        app = _app(endpoint(job, self.options))
        place = _place_of(heard.body, self.account.base_url, app)
        if heard.is_success and place is not None:
            return Pending(msgspec.json.encode(place).decode(), POLL_RUNNING_S)
        if heard.is_success and not _says_why(heard.body):
            raise unreadable("no job that could be asked for", heard.status)
        raise self._refused(heard)

    def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:  # noqa: ARG002 - the contract's
        """Fail: partial pictures are not shown."""
        raise unable("no streams here")

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        """Ask how the job is, and for its pictures when it has ended.

        A job may go back into the queue. One that has completed may have failed: often
        only its result tells.
        """
        place = _read_place(job_id)
        told = await self._status(job, place)
        state = told.get("status")
        if state == "IN_QUEUE":
            return Pending(job_id, POLL_QUEUED_S, progress=0)
        if state == "COMPLETED":
            done = await self._result(job, place, told)
            if done is not None:
                return done
        return Pending(job_id, POLL_RUNNING_S)

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        """Take the job out of the queue, or ask for it to be stopped.

        One that waits is removed, and free. One that runs gets a signal, and may be
        charged. Nothing tells which it was, unless the answer counts units: a job that
        waited a moment before may have started since.
        """
        place = _read_place(job_id)
        heard = await self._read(self._look(job, "PUT", place.cancel))
        heard.close()
        if heard.status in _TOO_LATE:
            return None
        if not heard.is_success:
            raise of_a_read(self._refused(heard))
        return Cancelled(_billed_by_units(heard.headers) or Billed.MAYBE)

    async def probe(self, model: str, deadline_s: float) -> None:
        """Look at a job that cannot be: who has no key is not told that it is not."""
        base_url = self.account.base_url.rstrip("/")
        call = Call(
            "GET",
            f"{base_url}/{_app(model)}/requests/{NO_REQUEST_ID}/status",
            deadline_in(deadline_s),
            headers=self._headers({}),
            secret=self.account.secret,
        )

        def judged(
            status: int, headers: Mapping[str, str], body: object, _: str
        ) -> ProviderError:
            return self._refused(_Heard(status, headers, body))

        await ask_in_vain(self.tools.wire, call, judged)

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    def _submission(self, job: ImageJob) -> Call:
        if job.operation is Operation.EDIT:
            check_edit(job, self.capabilities(job.model))
        headers = {
            # Else fal tries again by itself, up to ten times, and hides its trouble.
            "x-fal-no-retry": "1",
            # A job that starts later would end when nobody waits any more.
            "X-Fal-Request-Timeout": str(max(START_MIN_S, int(job.patience_s / 2))),
        }
        if self.options.priority != "normal":
            headers["X-Fal-Queue-Priority"] = self.options.priority
        return Call(
            "POST",
            f"{self.account.base_url.rstrip('/')}/{endpoint(job, self.options)}",
            deadline_in(job.deadline_s),
            headers=self._headers(headers),
            body=json_body(job_fields(job)),
            # An id takes no time: a submit that hangs would take all of the attempt's.
            answer_max_s=self.tools.wire.read_max_s,
            secret=self.account.secret,
        )

    def _look(self, job: ImageJob, method: str, path: str) -> Call:
        return Call(
            method,
            f"{self.origin}{path}",
            deadline_in(min(job.deadline_s, self.tools.wire.read_max_s)),
            headers=self._headers({}),
            secret=self.account.secret,
        )

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"Authorization": f"Key {self.account.secret}", **more}

    async def _status(self, job: ImageJob, place: Place) -> Fields:
        heard = await self._read(self._look(job, "GET", place.status))
        heard.close()
        if not heard.is_success:
            raise of_a_read(self._refused(heard))
        told = as_object(heard.body)
        if told.get("status") not in _STATES:
            detail = f"the status {told.get('status')!r}"
            raise unreadable(detail, heard.status, self.account.secret)
        return told

    async def _result(self, job: ImageJob, place: Place, told: Fields) -> Done | None:
        """Fetch what a completed job has left; None: it is at work again."""
        heard = await self._read(self._look(job, "GET", place.result))
        try:
            if heard.is_at_work:
                return None
            if not heard.is_success:
                raise self._verdict(heard, told)
            images, lost = await collected(
                heard.items[: job.n],
                partial(self._image, heard, deadline_in(job.deadline_s)),
            )
        finally:
            heard.close()
        if not images:
            raise self._why_nothing(heard, told, lost)
        # The usage of other pictures than are delivered is not the tenant's.
        is_whole = len(heard.items) <= job.n and not heard.faults and lost is None
        trusted = is_whole and self.options.usage == "trust"
        return Done(
            images=tuple(images),
            usage=read_usage(as_object(heard.body).get("usage")) if trusted else None,
            units_millionths=_units_millionths(heard.headers),
            upstream_request_id=place.request_id,
        )

    async def _image(
        self, heard: _Heard, deadline_at_s: float, item: object
    ) -> MadeImage | None:
        url = as_object(item).get("url")
        picture = heard.answer.take(url) if heard.answer else None
        if picture is None and isinstance(url, str) and "/" in url:
            domains = DOWNLOAD_DOMAINS | self.options.download_hosts
            hosts = hosts_of(url, domains, self.origin)
            download = Download(url, hosts, deadline_at_s, secret=self.account.secret)
            try:
                picture = await fetched(download, self.tools)
            except ProviderError as error:
                raise of_a_download(error) from error
        return made(picture) if picture else None

    async def _told(self, call: Call) -> _Heard:
        """Make a call whose answer holds no pictures."""
        heard = await self._hear(call)
        heard.close()
        return heard

    async def _read(self, call: Call) -> _Heard:
        try:
            return await self._hear(call)
        except ProviderError as error:
            raise of_a_read(error) from error

    async def _hear(self, call: Call) -> _Heard:
        """Make a call and read its answer, pictures in it straight into spools."""
        async with self.tools.wire.exchange(call) as reply:
            if not reply.is_success:
                body = decoded(await reply.error_body())
                return _Heard(reply.status, reply.headers, body)
            answer = await read_answer(reply, self.tools.spools)
            return _Heard(reply.status, reply.headers, answer.body, answer)

    def _refused(self, heard: _Heard) -> ProviderError:
        """Classify an error answer: what is wrong with the call itself."""
        headers = heard.headers
        told = as_object(heard.body)
        word = told.get("error_type") or headers.get("x-fal-error-type")
        kinds = _KIND_BY_CODE
        if headers.get("x-fal-request-timeout-type") == "user":
            kinds = {**kinds, **_NOT_STARTED_IN_TIME}
        if headers.get("x-fal-retryable") == "true":
            headers = {**headers, "x-should-retry": "true"}
        refused = Refusal.of(heard.status, headers, heard.body)
        if isinstance(word, str):
            refused = replace(refused, codes=(word, *refused.codes))
        error = judge(refused, self.account.secret, kinds=kinds)
        if isinstance(word, str) and heard.status >= _SERVER_FAULT:
            # These are fal's own words, and it charges for none of its own faults.
            error.billed = Billed.NO
        return error

    def _verdict(self, heard: _Heard, told: Fields) -> ProviderError:
        """Tell a job that failed from a result that cannot be read just now."""
        failed = bool(told.get("error") or told.get("error_type"))
        if failed and not heard.is_of_a_job:
            why = {"detail": told.get("error"), "error_type": told.get("error_type")}
            heard = _Heard(_OK, {}, why)
        elif heard.status in _GONE:
            return _gone(heard)
        error = self._refused(heard)
        if not (failed or heard.is_of_a_job):
            return of_a_read(error)
        error.ended = True
        error.billed = _billed(error, heard)
        return error

    def _why_nothing(
        self, heard: _Heard, told: Fields, lost: ProviderError | None
    ) -> ProviderError:
        if told.get("error") or told.get("error_type"):
            return self._verdict(_Heard(heard.status, {}, None), told)
        if _says_why(heard.body):
            error = self._refused(heard)
        elif lost is not None:
            return lost
        elif heard.faults:
            error = unreadable(f"pictures: {'; '.join(heard.faults)}", heard.status)
        elif "images" not in as_object(heard.body):
            return unreadable("an object that is no result", heard.status)
        else:
            error = ProviderError(
                FailureKind.NO_OUTPUT,
                "a success without a picture",
                status=heard.status,
            )
        error.ended = True
        return error


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a job is asked for, at the account's own host: what a job id holds."""

    request_id: str
    status: Path
    result: Path
    cancel: Path


def endpoint(job: ImageJob, options: Options) -> str:
    """Name the endpoint that a job is for."""
    if job.operation is Operation.GENERATE:
        return job.model
    usual = job.model.removesuffix("/text-to-image") + "/edit"
    return options.edit_models.get(job.model, usual)


def job_fields(job: ImageJob) -> dict[str, object]:
    """Write a job as the input of its endpoint; pictures stand where they belong.

    What fal has no field for is left out: compression, moderation, and who asks.
    """
    first = bool(_FIRST_FAMILY.match(job.model))
    edit = job.operation is Operation.EDIT
    fields: dict[str, object] = {
        "prompt": job.prompt,
        "image_size": _image_size(job, words=first),
        # Never left to fal: it would make the dearest.
        "quality": job.quality,
        "num_images": job.n,
        "output_format": job.output_format,
        "background": job.background if job.background == "transparent" else None,
    }
    if edit:
        fields["image_urls"] = job.references
        fields["mask_image_url" if first else "mask_url"] = job.mask
        fields["input_fidelity"] = job.input_fidelity if first else None
    return {name: value for name, value in fields.items() if value is not None}


def _image_size(job: ImageJob, *, words: bool) -> object:
    if job.width_px is not None and job.height_px is not None:
        width_px, height_px = job.width_px, job.height_px
    elif job.operation is Operation.EDIT:
        return "auto"
    else:
        width_px, height_px = AUTO_SIZE_PX
    if words:
        return f"{width_px}x{height_px}"
    return {"width": width_px, "height": height_px}


_STATES = frozenset({"IN_QUEUE", "IN_PROGRESS", "COMPLETED"})
_GONE = frozenset({404, 410})
_TOO_LATE = frozenset({400, 404, 410})
_OF_A_JOB = frozenset({400, 413, 415, 422})
_AT_WORK = 202
_SERVER_FAULT = 500
_BAD_REQUEST = 400
_OK = 200
_K = FailureKind
_KIND_BY_CODE: Mapping[str, FailureKind] = {
    "request_timeout": _K.TIMEOUT,
    "startup_timeout": _K.OVERLOADED,
    "runner_scheduling_failure": _K.OVERLOADED,
    "runner_connection_timeout": _K.OVERLOADED,
    "runner_connection_refused": _K.OVERLOADED,
    "runner_connection_error": _K.BAD_GATEWAY,
    "runner_disconnected": _K.BAD_GATEWAY,
    "runner_incomplete_response": _K.BAD_GATEWAY,
    "runner_server_error": _K.BAD_GATEWAY,
    "client_disconnected": _K.TIMEOUT,
    "client_cancelled": _K.TIMEOUT,
    "bad_request": _K.INVALID_REQUEST,
    "internal_error": _K.BAD_GATEWAY,
    "internal_server_error": _K.BAD_GATEWAY,
    "downstream_service_error": _K.BAD_GATEWAY,
    "downstream_service_unavailable": _K.OVERLOADED,
    "no_media_generated": _K.NO_OUTPUT,
    "feature_not_supported": _K.UNSUPPORTED,
    # The gateway has checked all values: this endpoint knows fewer.
    "one_of": _K.UNSUPPORTED,
    "enum": _K.UNSUPPORTED,
    "literal_error": _K.UNSUPPORTED,
}
_NOT_STARTED_IN_TIME: Mapping[str, FailureKind] = {"request_timeout": _K.OVERLOADED}
_MAYBE_CHARGED = frozenset(
    {_K.INVALID_REQUEST, _K.CONTENT_POLICY, _K.UNSUPPORTED, _K.NO_OUTPUT}
)


@dataclass(frozen=True, slots=True)
class _Heard:
    """An answer as far as it matters; of a refusal the body may be anything."""

    status: int
    headers: Mapping[str, str]
    body: object
    answer: Answer | None = None

    @property
    def is_success(self) -> bool:
        return self.answer is not None

    @property
    def items(self) -> list[object]:
        """The pictures that it lists, good or not."""
        listed = as_object(self.body).get("images")
        return listed if isinstance(listed, list) else []

    @property
    def faults(self) -> tuple[str, ...]:
        return self.answer.faults if self.answer is not None else ()

    @property
    def is_at_work(self) -> bool:
        """Whether it says, in place of a result, that there is none yet."""
        if self.status == _AT_WORK:
            return True
        detail = as_object(self.body).get("detail")
        return isinstance(detail, str) and bool(_STILL_AT_WORK.search(detail))

    @property
    def is_of_a_job(self) -> bool:
        """Whether an error is what a job has left, not trouble with reading it."""
        body = as_object(self.body)
        marked = {"x-fal-error-type", "x-fal-retryable"} & self.headers.keys()
        marked_inside = "error_type" in body or isinstance(body.get("detail"), list)
        return bool(marked) or marked_inside or self.status in _OF_A_JOB

    def close(self) -> None:
        if self.answer is not None:
            self.answer.close()


def _billed(error: ProviderError, heard: _Heard) -> Billed:
    """Tell whether a job that failed is charged: 5xx never is, 422 may be."""
    told = _billed_by_units(heard.headers)
    if told is not None:
        return told
    stopped = (error.upstream_code or "").startswith("client_")
    refused = error.kind in _MAYBE_CHARGED and heard.status != _BAD_REQUEST
    return Billed.MAYBE if stopped or refused else Billed.NO


def _billed_by_units(headers: Mapping[str, str]) -> Billed | None:
    units = _units_millionths(headers)
    if units is None:
        return None
    return Billed.YES if units else Billed.NO


def _units_millionths(headers: Mapping[str, str]) -> int | None:
    text = headers.get("x-fal-billable-units", "")
    try:
        units = Decimal(text[:UNITS_MAX_CHARS])
    except InvalidOperation:
        return None
    if not units.is_finite() or not 0 <= units <= UNITS_MAX:
        return None
    return int((units * 1_000_000).to_integral_value(ROUND_HALF_UP))


def _gone(heard: _Heard) -> ProviderError:
    return ProviderError(
        FailureKind.RESULT_LOST,
        f"{heard.status}: fal does not know the job's result any more",
        status=heard.status,
        ended=True,
    )


def _read_place(job_id: str) -> Place:
    try:
        return msgspec.json.decode(job_id, type=Place)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise unfindable("this is no job of fal's queue") from error


def _place_of(body: object, base_url: str, app: str) -> Place | None:
    """Read where a job is asked for; None if nothing is told that finds it.

    A link elsewhere is not followed, the key would go there: the documented one at
    home finds the job, too.
    """
    told = as_object(body)
    request_id = told.get("request_id")
    known = isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id)
    home = f"{urlsplit(base_url).path.rstrip('/')}/{app}/requests/{request_id}"
    paths = [
        _path(told.get(f"{name}_url"), base_url) or (f"{home}{end}" if known else None)
        for name, end in (
            ("status", "/status"),
            ("response", ""),
            ("cancel", "/cancel"),
        )
    ]
    try:
        return msgspec.convert([request_id, *paths], Place)
    except msgspec.ValidationError:
        return None


def _path(url: object, base_url: str) -> str | None:
    if not is_at_home(url, base_url):
        return None
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def _app(model: str) -> str:
    """Name whose a request is: owner and app, the path of an endpoint left out."""
    return "/".join(model.split("/")[:2])


def _says_why(body: object) -> bool:
    found = as_object(body)
    return bool(found.get("detail") or found.get("error"))
