"""EvoLink, and servers alike: a task is submitted, asked after, and its links fetched.

Where such servers differ is their dialect, an option of the account.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Decimal
from functools import partial
from typing import Annotated, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec

from providers.kit.abilities import (
    Format,
    Host,
    Plain,
    Size,
    operations,
    sizes_px,
)
from providers.kit.accounts import check_account, check_base_url, read_options
from providers.kit.answers import Answer
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
from providers.kit.image_jobs import check_edit, unable, unfindable
from providers.kit.images_api import Background, Quality
from providers.kit.json_bodies import json_body
from providers.kit.multipart import FormFile, form
from providers.kit.pictures import collected, fetched, hosts_of, made, of_a_download
from providers.kit.probes import ask, ask_in_vain, is_used_up
from providers.kit.refusals import Refusal, judge, of_a_read, of_an_upload
from providers.kit.replies import Fields, as_object, decoded, read_answer, unreadable
from providers.kit.usages import read_usage
from providers.kit.wire import (
    Call,
    Download,
    Reply,
    Tools,
    deadline_in,
    scrub,
    unreadable_file,
)

SUBMIT_MAX_S = 30.0
UPLOAD_MAX_S = 120.0
"""These two are the patience of EvoLink's own client."""
REPLAY_PAUSE_S = 0.5
"""Before a submission whose reply was lost is repeated, as that client does."""
CREDITS_PER_USD = 68
"""EvoLink's rate: 6.8 CNY are 1 USD, 10 credits are 1 CNY."""
NANOUSD_PER_USD = 10**9
AMOUNT_MAX = Decimal(10**9)
"""An amount of money or credits beyond this is none."""
PROGRESS_MAX = 100
NO_TASK_ID = "task-00000000"

_TASK_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:-]{0,127}")
_PERCENT = re.compile(r"([0-9]{1,3})%?")

T = TypeVar("T")
References = Literal["upload", "data_uri", "none"]
Path = Annotated[str, msgspec.Meta(pattern="^/[!-~]*$")]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a family of servers puts things.

    ``task_id`` and what follows are places in a body, tried in turn: keys with dots
    between, where a list stands for all that is in it. All but ``task_id`` start at
    the task, which may be wrapped in ``data``.

    ``replays`` tells that a submission may be repeated with its Idempotency-Key.
    ``credits_path`` is where it says what is left of the account's.
    ``hosts`` are domains whose hosts may be asked for pictures. ``kinds`` are error
    codes of its own.
    """

    submit_path: str
    task_path: str
    task_id: tuple[str, ...]
    pictures: tuple[str, ...]
    usage: tuple[str, ...]
    references: References
    replays: bool = False
    credits_path: str = ""
    credits: tuple[str, ...] = ()
    usd: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    kinds: Mapping[str, FailureKind] = field(default_factory=dict)
    mask: bool = False
    formats: frozenset[Format] = frozenset({"png"})
    backgrounds: frozenset[Background] = frozenset({"opaque"})


_K = FailureKind
_EVOLINK_KINDS: Mapping[str, FailureKind] = {
    "unauthorized": _K.AUTH,
    "key_disabled": _K.AUTH,
    "key_expired": _K.AUTH,
    "user_disabled": _K.AUTH,
    "quota_not_enough": _K.INSUFFICIENT_FUNDS,
    "account_balance_insufficient": _K.INSUFFICIENT_FUNDS,
    "insufficient_token_quota": _K.INSUFFICIENT_FUNDS,
    "key_quota_exhausted": _K.INSUFFICIENT_FUNDS,
    "token_daily_quota_exceeded": _K.INSUFFICIENT_FUNDS,
    "key_daily_quota_exhausted": _K.INSUFFICIENT_FUNDS,
    # The key is good, but not for this model.
    "key_model_not_allowed": _K.UNSUPPORTED,
    "model_access_denied": _K.UNSUPPORTED,
    "model_unavailable": _K.OVERLOADED,
    "channel_selection_failed": _K.OVERLOADED,
    "service_unavailable": _K.OVERLOADED,
    "invalid_parameter": _K.INVALID_REQUEST,
    "sensitive_content": _K.CONTENT_POLICY,
    "input_moderation_failed": _K.CONTENT_POLICY,
    # An earlier call with this key was taken, and what became of it is not told.
    "idempotency_conflict": _K.TIMEOUT,
    "paid_outcome_unknown": _K.TIMEOUT,
}
_TASK_KINDS: Mapping[str, FailureKind] = {
    **_EVOLINK_KINDS,
    "invalid_parameters": _K.INVALID_REQUEST,
    "image_processing_error": _K.INVALID_REQUEST,
    "image_dimension_mismatch": _K.INVALID_REQUEST,
    "generation_failed_no_content": _K.NO_OUTPUT,
    # Of a task it means "too fast", says the list of error codes.
    "quota_exceeded": _K.RATE_LIMITED,
    "service_error": _K.BAD_GATEWAY,
    "request_cancelled": _K.BAD_GATEWAY,
    "resource_not_found": _K.BAD_GATEWAY,
    "unknown_error": _K.BAD_GATEWAY,
}
"""Codes that a failed task gives, besides those of a refused call."""

DIALECTS: Mapping[str, Dialect] = {
    "evolink": Dialect(
        submit_path="/images/generations",
        task_path="/tasks/{id}",
        task_id=("id",),
        pictures=("results",),
        usage=("usage",),
        references="upload",
        replays=True,
        credits_path="/credits",
        credits=("billing.charged_credits", "usage.credits_used"),
        usd=("usage.cost.usd",),
        hosts=("evolink.ai",),
        kinds=_EVOLINK_KINDS,
        mask=True,
        formats=frozenset(get_args(Format)),
        backgrounds=frozenset(get_args(Background)),
    ),
    "apimart": Dialect(
        submit_path="/images/generations",
        task_path="/tasks/{id}?language=en",
        task_id=("data.task_id",),
        pictures=("result.images.url",),
        usage=("usage",),
        references="data_uri",
        usd=("cost",),
        hosts=("apimart.ai", "apib.ai"),
    ),
    "new-api": Dialect(
        submit_path="/images/generations?async=true",
        task_path="/images/tasks/{id}",
        task_id=("data.task_id", "task_id", "data"),
        pictures=(
            "data.data.b64_json",
            "data.data.url",
            "result.data.b64_json",
            "result.data.url",
            "result_url",
        ),
        usage=("data.usage", "result.usage"),
        references="none",
        formats=frozenset(get_args(Format)),
        backgrounds=frozenset(get_args(Background)),
    ),
}

_WAITING = frozenset(
    {
        "pending",
        "submitted",
        "queued",
        "not_start",
        "processing",
        "in_progress",
        "running",
    }
)
_COMPLETED = frozenset({"completed", "success", "succeeded"})
_FAILED = frozenset({"failed", "failure", "error"})
_CANCELLED = frozenset({"cancelled", "canceled"})

_SMALL_SIZES = frozenset({(1024, 1024), (1024, 1536), (1536, 1024)})
_WIDE_RATIOS = {
    (1024, 1024): "1:1",
    (1456, 720): "2:1",
    (1776, 592): "3:1",
    (1248, 832): "3:2",
    (1184, 880): "4:3",
    (1152, 912): "5:4",
    (1360, 768): "16:9",
    (1568, 672): "21:9",
}
_RATIOS = _WIDE_RATIOS | {
    (height, width): ":".join(reversed(ratio.split(":")))
    for (width, height), ratio in _WIDE_RATIOS.items()
}
"""EvoLink's table of what its ratios come to at 1K."""
_BY_RATIO = frozenset(_RATIOS)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an account's server speaks, and what it can do; each field is an option.

    ``submit_path`` and ``task_path`` stand behind the base URL; ``{id}`` in the latter
    is the task's. ``files_url`` is where references are uploaded to. ``references``
    says how they are handed over. ``download_hosts``, with their subdomains, may be
    asked for pictures, besides the base URL's own host and the dialect's. Options that
    are not given are as usual for the dialect; empty ``sizes`` and ``qualities`` mean:
    any.
    """

    dialect: Literal["evolink", "apimart", "new-api"] = "evolink"
    submit_path: Path | None = None
    task_path: Annotated[str, msgspec.Meta(pattern=r"^/[!-~]*\{id\}[!-~]*$")] | None = (
        None
    )
    files_url: Plain = ""
    references: References | None = None
    references_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 16
    mask: bool | None = None
    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 1
    sizes: frozenset[Size] = frozenset()
    qualities: frozenset[Quality] = frozenset()
    output_formats: frozenset[Format] | None = None
    backgrounds: frozenset[Background] | None = None
    download_hosts: frozenset[Host] = frozenset()
    poll_after_ms: Annotated[int, msgspec.Meta(ge=200, le=60_000)] = 3_000


def connect(account: Account, tools: Tools) -> TaskApi:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    options = read_options(account.options, Options)
    check_account(account)
    files_url = options.files_url or _files_url(account.base_url)
    check_base_url(files_url, "files_url")
    dialect = DIALECTS[options.dialect]
    if options.references == "upload" and options.dialect != "evolink":
        raise ValueError("references: only EvoLink's file API is known")
    return TaskApi(
        account,
        tools,
        options,
        replace(
            dialect,
            submit_path=options.submit_path or dialect.submit_path,
            task_path=options.task_path or dialect.task_path,
            references=options.references or dialect.references,
            mask=dialect.mask if options.mask is None else options.mask,
            formats=_first(options.output_formats, dialect.formats),
            backgrounds=_first(options.backgrounds, dialect.backgrounds),
        ),
        files_url,
    )


@dataclass(frozen=True, slots=True)
class TaskApi:
    """A provider behind a task API.

    ``dialect`` has the account's own paths and abilities in it.
    """

    account: Account
    tools: Tools
    options: Options
    dialect: Dialect
    files_url: str
    replay_pause_s: float = REPLAY_PAUSE_S

    def capabilities(self, model: str) -> Capabilities:
        """Tell what a model can do, as far as the account's options allow."""
        options, dialect = self.options, self.dialect
        sizes = sizes_px(options.sizes)
        mask, formats, backgrounds = dialect.mask, dialect.formats, dialect.backgrounds
        n_max = options.n_max
        made = self._sizes_of(model)
        if made:
            # The smaller models know no more fields than these.
            sizes = (sizes & made) or made
            mask, formats, n_max = False, frozenset({"png"}), 1
            backgrounds = frozenset({"opaque"})
        edits = dialect.references != "none"
        return Capabilities(
            operations=operations(edits=edits),
            n_max=n_max,
            sizes=sizes,
            qualities=frozenset(options.qualities),
            output_formats=frozenset(formats),
            backgrounds=frozenset(backgrounds),
            mask=edits and mask,
            references_max=options.references_max if edits else 0,
            idempotent=_replayable(dialect),
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Submit a task, its references first.

        When the reply is lost, EvoLink is asked once more with the same key: it
        answers with the task that it has, and never starts a second one.
        """
        end_s = deadline_in(job.deadline_s)
        fields = _fields(job, self._sizes_of(job.model))
        if job.operation is Operation.EDIT:
            check_edit(job, self.capabilities(job.model))
            fields |= await self._reference_fields(job, end_s)
        call = self._call("POST", self._url(self.dialect.submit_path), end_s)
        call = replace(call, body=json_body(fields))
        if self.dialect.replays:
            headers = {**call.headers, "Idempotency-Key": _key(job)}
            call = replace(call, headers=headers)
        try:
            return await self._submitted(call.within(SUBMIT_MAX_S))
        except ProviderError as error:
            if error.billed is Billed.NO or not self.dialect.replays:
                raise
            return await self._replayed(call, error)

    def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:  # noqa: ARG002 - the contract's
        """Fail: a task shows nothing before it is over."""
        raise unable("no streams here")

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        """Look at a task, and fetch its pictures when it has ended."""
        end_s = deadline_in(job.deadline_s)
        if not _TASK_ID.fullmatch(job_id):
            raise unfindable("no task has such an id")
        path = self.dialect.task_path.replace("{id}", job_id)
        call = self._call("GET", self._url(path), end_s).within(
            self.tools.wire.read_max_s
        )
        try:
            answer, reply = await self._asked(call)
        except ProviderError as error:
            raise of_a_read(error) from error
        try:
            return await self._looked_at(_Look(job, job_id, answer, reply, end_s))
        finally:
            answer.close()

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: nobody documents how a task is stopped."""
        raise unable("tasks cannot be stopped here")

    async def probe(self, model: str, deadline_s: float) -> None:  # noqa: ARG002 - the contract's; a key is for all models
        """Ask how many credits are left, else look at a task that cannot be."""
        end_s, wire = deadline_in(deadline_s), self.tools.wire
        if not self.dialect.credits_path:
            path = self.dialect.task_path.replace("{id}", NO_TASK_ID)
            call = self._call("GET", self._url(path), end_s)
            await ask_in_vain(wire, call, self._judged)
            return
        call = self._call("GET", self._url(self.dialect.credits_path), end_s)
        told = as_object((await ask(wire, call, self._judged)).get("data"))
        user, token = as_object(told.get("user")), as_object(told.get("token"))
        unlimited = token.get("unlimited_credits") is True
        spent = not unlimited and is_used_up(token.get("remaining_credits"))
        if spent or is_used_up(user.get("remaining_credits")):
            raise ProviderError(FailureKind.INSUFFICIENT_FUNDS, "no credits are left")

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    # --- to submit ---

    def _sizes_of(self, model: str) -> frozenset[tuple[int, int]]:
        """Tell the only sizes of one of EvoLink's smaller models; empty: any size."""
        if self.options.dialect != "evolink":
            return frozenset()
        if model.startswith("gpt-image-2-beta"):
            return _BY_RATIO
        return _SMALL_SIZES if model.startswith("gpt-image-1") else frozenset()

    async def _reference_fields(self, job: ImageJob, end_s: float) -> dict[str, object]:
        inputs = [*job.references, *([job.mask] if job.mask else [])]
        given: list[object] = list(inputs)
        if self.dialect.references == "upload":
            given = [await self._uploaded(one, end_s) for one in inputs]
        count = len(job.references)
        mask = {"mask_url": given[count]} if job.mask else {}
        return {"image_urls": given[:count], **mask}

    async def _uploaded(self, file: InputFile, end_s: float) -> str:
        """Hand a file to EvoLink's file API; it gives an URL that lives for 72 h."""
        url = f"{self.files_url.rstrip('/')}/api/v1/files/upload/stream"
        call = self._call("POST", url, end_s).within(UPLOAD_MAX_S)
        try:
            call = replace(call, body=form([], [FormFile("file", file)]))
            answer, reply = await self._asked(call)
            answer.close()
            return self._file_url(answer.body, reply)
        except OSError as error:
            raise unreadable_file(error) from error
        except ProviderError as error:
            raise of_an_upload(error) from error

    def _file_url(self, body: object, reply: Reply) -> str:
        url = _text(body, ("data.file_url",))
        if url is None or not url.startswith(("https://", "http://")):
            raise self._refused(body, reply)
        return url

    async def _submitted(self, call: Call) -> Pending:
        answer, reply = await self._asked(call)
        answer.close()
        task_id = _text(answer.body, self.dialect.task_id)
        if task_id is None or not _TASK_ID.fullmatch(task_id):
            raise self._refused(answer.body, reply)
        return Pending(task_id, self._poll_after_s, _progress(_task_in(answer.body)))

    async def _replayed(self, call: Call, lost: ProviderError) -> Pending:
        if deadline_in(self.replay_pause_s) >= call.deadline_at_s:
            raise lost
        await asyncio.sleep(self.replay_pause_s)
        try:
            return await self._submitted(call.within(SUBMIT_MAX_S))
        except ProviderError as error:
            # What is wrong with the request was wrong the first time, too. Any other
            # refusal says nothing of what became of the first.
            if error.kind in _TOLD:
                raise
            raise lost from error

    # --- to look ---

    async def _looked_at(self, look: _Look) -> Done | Pending:
        task = look.task
        state = str(task.get("status") or "").lower()
        if state in _WAITING:
            return Pending(look.job_id, self._poll_after_s, _progress(task))
        if state in _COMPLETED:
            return await self._done(look)
        if state in _FAILED | _CANCELLED:
            raise self._failed(look, cancelled=state in _CANCELLED)
        error = self._refused(look.answer.body, look.reply)
        if state:
            told = scrub(f"a state that nobody knows: {state!r}", self.account.secret)
            error.detail = told
        raise of_a_read(error)

    async def _done(self, look: _Look) -> Done:
        found = [
            one
            for place in self.dialect.pictures
            for one in _found(look.task, place)
            if isinstance(one, str)
        ]
        # Nobody asked, nor pays, for more than n.
        images, lost = await collected(found[: look.job.n], partial(self._image, look))
        if not images:
            raise lost or _nothing(look)
        usage = _first_of(look.task, self.dialect.usage)
        spent = _amount(look.task, self.dialect.credits)
        return Done(
            images=tuple(images),
            # The usage of a picture that cannot be delivered is not the tenant's.
            usage=read_usage(usage) if lost is None else None,
            cost_nanousd=self._cost_nanousd(look.task, spent),
            upstream_request_id=_request_id(look.reply),
            background=look.job.background,
        )

    async def _image(self, look: _Look, one: str) -> MadeImage:
        picture = look.answer.take(one)
        if picture is None:
            domains = self.options.download_hosts | frozenset(self.dialect.hosts)
            hosts = hosts_of(one, domains, self.account.base_url)
            secret = self.account.secret
            download = Download(one, hosts, look.end_s, secret=secret)
            try:
                picture = await fetched(download, self.tools)
            except ProviderError as error:
                raise of_a_download(error) from error
        return made(picture)

    def _cost_nanousd(self, task: Fields, spent: Decimal | None) -> int | None:
        # The credits are the ledger's; the price in USD is rounded for the eye.
        usd = _amount(task, self.dialect.usd)
        if spent is not None:
            return _ceil(spent * NANOUSD_PER_USD / CREDITS_PER_USD)
        return None if usd is None else _ceil(usd * NANOUSD_PER_USD)

    # --- what is refused ---

    def _failed(self, look: _Look, *, cancelled: bool) -> ProviderError:
        task, reply = look.task, look.reply
        status = task.get("http_status")
        told = task if task.get("error") else {"message": task.get("fail_reason")}
        refused = Refusal.of(
            status if isinstance(status, int) else reply.status, reply.headers, told
        )
        kinds = {**self.dialect.kinds, **_TASK_KINDS}
        error = judge(refused, self.account.secret, kinds=kinds)
        error.billed = _billed(task, cancelled=cancelled)
        error.status = reply.status
        error.ended = True
        return error

    def _refused(self, body: object, reply: Reply) -> ProviderError:
        """Classify an error, or a success that holds no task."""
        return self._judged(reply.status, reply.headers, body, self.account.secret)

    def _judged(
        self, status: int, headers: Mapping[str, str], body: object, secret: str
    ) -> ProviderError:
        found = dict(as_object(body))
        if "message" not in found and "msg" in found:
            # The file API's way.
            found["message"] = found["msg"]
        refused = Refusal.of(status, headers, found)
        error = judge(refused, secret, kinds=self.dialect.kinds)
        if error.kind in _TOLD:
            error.client_message = error.client_message or "The request was refused."
        return error

    # --- to ask ---

    @property
    def _poll_after_s(self) -> float:
        return self.options.poll_after_ms / 1000

    def _url(self, path: str) -> str:
        return self.account.base_url.rstrip("/") + path

    def _call(self, method: str, url: str, end_s: float) -> Call:
        secret = self.account.secret
        headers = {"Authorization": f"Bearer {secret}"}
        return Call(method, url, end_s, headers=headers, secret=secret)

    async def _asked(self, call: Call) -> tuple[Answer, Reply]:
        async with self.tools.wire.exchange(call) as reply:
            if not reply.is_success:
                raise self._refused(decoded(await reply.error_body()), reply)
            return await read_answer(reply, self.tools.spools), reply


_TOLD = frozenset({FailureKind.INVALID_REQUEST, FailureKind.CONTENT_POLICY})


@dataclass(frozen=True, slots=True)
class _Look:
    """What a task said of itself; ``end_s`` is when its pictures must be here."""

    job: ImageJob
    job_id: str
    answer: Answer
    reply: Reply
    end_s: float

    @property
    def task(self) -> Fields:
        return _task_in(self.answer.body)


def _files_url(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.hostname == "api.evolink.ai":
        return "https://files-api.evolink.ai"
    return f"{parts.scheme}://{parts.netloc}"


def _key(job: ImageJob) -> str:
    """Name one call for ever, in 16 to 96 of the characters that EvoLink takes."""
    return f"imageway.{job.task_id}.{job.seq}"


def _fields(job: ImageJob, sizes: frozenset[tuple[int, int]]) -> dict[str, object]:
    fields: dict[str, object] = {"model": job.model, "prompt": job.prompt, "n": job.n}
    size = _size(job, sizes)
    if size is not None:
        fields["size"] = size
    if sizes != _BY_RATIO:
        fields["quality"] = job.quality
    # What is usual is not sent: not every model knows these fields.
    if job.output_format != "png":
        fields["output_format"] = job.output_format
    if job.background not in {None, "opaque"}:
        fields["background"] = job.background
    return fields


def _size(job: ImageJob, sizes: frozenset[tuple[int, int]]) -> str | None:
    if job.width_px is None or job.height_px is None:
        # The models with three sizes know no such word.
        return None if sizes == _SMALL_SIZES else "auto"
    if sizes and (job.width_px, job.height_px) not in sizes:
        raise unable(f"no {job.width_px}x{job.height_px} here")
    if sizes == _BY_RATIO:
        return _RATIOS[job.width_px, job.height_px]
    return f"{job.width_px}x{job.height_px}"


def _nothing(look: _Look) -> ProviderError:
    faults = "; ".join(look.answer.faults)
    if faults:
        error = unreadable(f"pictures: {faults}", look.reply.status)
        error.ended = True
        return error
    return ProviderError(
        FailureKind.NO_OUTPUT,
        "a task that completed without a picture",
        status=look.reply.status,
        ended=True,
    )


def _billed(task: Fields, *, cancelled: bool) -> Billed:
    """Tell what a task that failed costs: nothing, unless the ledger says so."""
    ledger = as_object(_first_of(task, ("billing",)))
    refunded = ledger.get("refund_status") == "completed"
    charge = ledger.get("charge_status")
    if charge == "charged":
        return Billed.NO if refunded else Billed.YES
    if charge == "unknown":
        return Billed.MAYBE
    # That a failed task is free is promised; of a cancelled one nothing is said.
    return Billed.MAYBE if cancelled and charge is None else Billed.NO


def _task_in(body: object) -> Fields:
    whole = as_object(body)
    inner = whole.get("data")
    return inner if isinstance(inner, dict) and "status" in inner else whole


def _found(body: object, place: str) -> list[object]:
    values = list(_flat(body))
    for key in place.split("."):
        inner = (value.get(key) for value in values if isinstance(value, dict))
        values = [one for value in inner for one in _flat(value)]
    return values


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        yield from value
    elif value is not None:
        yield value


def _first_of(body: object, places: tuple[str, ...]) -> object:
    return next((one for place in places for one in _found(body, place)), None)


def _text(body: object, places: tuple[str, ...]) -> str | None:
    found = (one for place in places for one in _found(body, place))
    return next((one for one in found if isinstance(one, str) and one), None)


def _amount(task: Fields, places: tuple[str, ...]) -> Decimal | None:
    for place in places:
        for value in _found(task, place):
            if type(value) is int or isinstance(value, Decimal):
                amount = Decimal(value)
                # Nothing is free: a zero is what a server says that does not know.
                if 0 < amount <= AMOUNT_MAX:
                    return amount
    return None


def _ceil(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_CEILING))


def _progress(task: Fields) -> int | None:
    told = task.get("progress")
    percent = _PERCENT.fullmatch(told) if isinstance(told, str) else None
    value = int(percent[1]) if percent else told
    if type(value) is not int or not 0 <= value <= PROGRESS_MAX:
        return None
    return value


def _request_id(reply: Reply) -> str | None:
    headers = reply.headers
    return headers.get("x-request-id") or headers.get("x-oneapi-request-id")


def _replayable(dialect: Dialect) -> frozenset[Operation]:
    # What is uploaded again gets another URL: such a call would not be the same.
    if not dialect.replays:
        return frozenset()
    uploads = dialect.references == "upload"
    return frozenset({Operation.GENERATE}) if uploads else frozenset(Operation)


def _first(given: frozenset[T] | None, usual: frozenset[T]) -> frozenset[T]:
    return usual if given is None else given
