"""OpenAI, and every server and relay that speaks its images API.

What such servers do differently is an option of the account, see ``Quirks``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from providers.kit.accounts import check_secret, check_url
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
)
from providers.kit.images_api import Background, ImagesApi, Quality
from providers.kit.multipart import FormFile, form
from providers.kit.wire import Body, Call, Tools, unwritable

Format = Literal["png", "jpeg", "webp"]

_GPT_IMAGE = re.compile(r"(?:.*/)?(?:gpt-image-|chatgpt-image-)")
_FIXED_FIDELITY = re.compile(r"(?:.*/)?gpt-image-2")
"""These always look closely, and refuse to be told so."""

Plain = Annotated[str, msgspec.Meta(pattern="^[!-~]*$")]
Host = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.:-]+$")]
Size = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{1,4}x[1-9][0-9]{1,4}$")]


class Quirks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an account's server differs from OpenAI's; each field is an option.

    ``path_prefix`` stands between the base URL and ``generations_path`` or
    ``edits_path``. ``edits``, ``mask`` and ``stream`` say whether it can do that,
    ``references_max`` how many pictures an edit may start from. ``strip_fields`` are
    never sent. ``response_format`` is sent unless ``omit``, never for gpt-image
    models. ``usage`` says whether to believe the reported tokens. ``download_hosts``
    may be asked for pictures that come as a link, besides the base URL's own host.
    Empty ``sizes`` and ``qualities`` mean: any.
    """

    path_prefix: Plain = ""
    generations_path: Plain = "/images/generations"
    edits_path: Plain = "/images/edits"
    edits: bool = True
    references_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 16
    mask: bool = True
    stream: bool = True
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
    check_url(account.base_url)
    check_secret(account.secret)
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
        quirks = self.quirks
        split = (size.split("x") for size in quirks.sizes)
        return Capabilities(
            operations=frozenset(Operation)
            if quirks.edits
            else frozenset({Operation.GENERATE}),
            n_max=quirks.n_max,
            sizes=frozenset((int(width), int(height)) for width, height in split),
            qualities=frozenset(quirks.qualities),
            output_formats=frozenset(quirks.output_formats),
            backgrounds=frozenset(quirks.backgrounds),
            mask=quirks.edits and quirks.mask,
            references_max=quirks.references_max if quirks.edits else 0,
            stream=quirks.stream,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Make the pictures; this API answers when they are done."""
        return await self._api.ask(self._call(job), job.n)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Make the pictures, and show how they come along."""
        if not self.quirks.stream:
            raise _unable("no streams here")
        looks = self._api.follow(self._call(job, stream=True), job)
        async with aclosing(looks):
            async for look in looks:
                yield look

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise _unable("this API has no jobs to ask for")

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise _unable("this API has no jobs to ask for")

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    @property
    def _api(self) -> ImagesApi:
        home = urlsplit(self.account.base_url).hostname or ""
        return ImagesApi(
            self.tools,
            hosts=self.quirks.download_hosts | {home},
            usage_is_true=self.quirks.usage == "trust",
        )

    def _call(self, job: ImageJob, *, stream: bool = False) -> Call:
        edit = job.operation is Operation.EDIT
        if edit:
            _check_edit(job, self.capabilities(job.model))
        fields = job_fields(job, self.quirks, stream=stream)
        path = self.quirks.edits_path if edit else self.quirks.generations_path
        headers = self._headers()
        if stream:
            headers["Accept"] = "text/event-stream, application/json"
        return Call(
            "POST",
            self._url(path),
            asyncio.get_running_loop().time() + job.deadline_s,
            headers=headers,
            json=None if edit else fields,
            body=edit_form(job, fields) if edit else None,
            secret=self.account.secret,
        )

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


def job_fields(
    job: ImageJob, quirks: Quirks, *, stream: bool = False
) -> dict[str, object]:
    """Write a job as the fields of ``/images/generations`` or ``/images/edits``."""
    fields: dict[str, object] = {
        "model": job.model,
        "prompt": job.prompt,
        "n": job.n,
        "size": _size(job),
        "quality": job.quality,
        "output_format": job.output_format,
    }
    if job.output_format != "png":
        fields["output_compression"] = job.output_compression
    fields["background"] = job.background
    fields["moderation"] = job.moderation
    fields["user"] = job.user
    fields["safety_identifier"] = job.safety_identifier
    if job.operation is Operation.EDIT and not _FIXED_FIDELITY.match(job.model):
        fields["input_fidelity"] = job.input_fidelity
    if quirks.response_format != "omit" and not _GPT_IMAGE.match(job.model):
        fields["response_format"] = quirks.response_format
    if stream:
        fields["stream"] = True
        fields["partial_images"] = job.partial_images
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name not in quirks.strip_fields
    }


def edit_form(job: ImageJob, fields: Mapping[str, object]) -> Body:
    """Write an edit as a form: one picture is ``image``, several are ``image[]``.

    Raises:
        ProviderError: a field cannot be written, a file cannot be read.
    """
    name = "image" if len(job.references) == 1 else "image[]"
    files = [FormFile(name, reference) for reference in job.references]
    if job.mask is not None:
        files.append(FormFile("mask", job.mask))
    texts = [
        (name, str(value).lower() if isinstance(value, bool) else str(value))
        for name, value in fields.items()
    ]
    try:
        return form(texts, files)
    except UnicodeEncodeError as error:
        raise unwritable() from error
    except OSError as error:
        raise ProviderError(
            FailureKind.NETWORK, f"a file cannot be read: {error.strerror}"
        ) from error


def _check_edit(job: ImageJob, capable: Capabilities) -> None:
    if Operation.EDIT not in capable.operations:
        raise _unable("no edits here")
    if not 1 <= len(job.references) <= capable.references_max:
        raise _unable(f"no edits of {len(job.references)} pictures here")
    if job.mask is not None and not capable.mask:
        raise _unable("no masks here")


def _unable(detail: str) -> ProviderError:
    return ProviderError(FailureKind.UNSUPPORTED, detail)


def _size(job: ImageJob) -> str:
    if job.width_px is None or job.height_px is None:
        return "auto"
    return f"{job.width_px}x{job.height_px}"
