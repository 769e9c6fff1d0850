"""OpenAI, and every server and relay that speaks its images API.

What such servers do differently is an option of the account, see ``Quirks``.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

from providers.kit.abilities import Abilities, Host, Plain, capabilities_of
from providers.kit.accounts import check_base_url, check_secret, read_options
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
from providers.kit.image_jobs import check_edit, edit_form, job_fields, unable
from providers.kit.images_api import ImagesApi
from providers.kit.probes import ask
from providers.kit.refusals import Refusal, judge
from providers.kit.wire import Call, Tools, deadline_in

MODELS_PATH = "/models"

_GPT_IMAGE = re.compile(r"(?:.*/)?(?:gpt-image-|chatgpt-image-)")

_NO_SCOPE = re.compile(r"(?i)missing scopes?\b")
"""So a key is refused that may make pictures and must not list models."""


class Quirks(Abilities, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an account's server differs from OpenAI's; each field is an option.

    ``path_prefix`` stands between the base URL and ``generations_path`` or
    ``edits_path``. ``strip_fields`` are never sent. ``response_format`` is sent unless
    ``omit``, never for gpt-image models. ``usage`` says whether to believe the reported
    tokens. ``download_hosts`` may be asked for pictures that come as a link, besides
    the base URL's own host.
    """

    path_prefix: Plain = ""
    generations_path: Plain = "/images/generations"
    edits_path: Plain = "/images/edits"
    auth_header: Literal["bearer", "api-key", "none"] = "bearer"
    organization: Plain = ""
    project: Plain = ""
    strip_fields: frozenset[str] = frozenset()
    response_format: Literal["omit", "b64_json", "url"] = "omit"
    usage: Literal["trust", "ignore"] = "trust"
    download_hosts: frozenset[Host] = frozenset()


def connect(account: Account, tools: Tools) -> OpenAI:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    quirks = read_options(account.options, Quirks)
    check_base_url(account.base_url)
    check_secret(account.secret)
    if quirks.auth_header != "none" and not account.secret:
        raise ValueError('credential: is empty (or set auth_header = "none")')
    return OpenAI(account, tools, quirks)


@dataclass(frozen=True, slots=True)
class OpenAI:
    """A provider behind the OpenAI images API."""

    account: Account
    tools: Tools
    quirks: Quirks

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Tell what the account's options allow."""
        return capabilities_of(self.quirks)

    async def start(self, job: ImageJob) -> Done | Pending:
        """Make the pictures; this API answers when they are done."""
        return await self._api.ask(self._call(job), job.n)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Make the pictures, and show how they come along."""
        if not self.quirks.stream:
            raise unable("no streams here")
        looks = self._api.follow(self._call(job, stream=True), job)
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
        """List the models; nothing is known where anybody may."""
        call = Call(
            "GET",
            self._url(MODELS_PATH),
            deadline_in(deadline_s),
            headers=self._headers(),
            secret=self.account.secret,
        )
        wire = self.tools.wire
        await ask(wire, call, judged_listing)
        if self.quirks.auth_header != "none":
            await self._see_it_is_needed(call)

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    async def _see_it_is_needed(self, call: Call) -> None:
        try:
            await ask(self.tools.wire, replace(call, headers={}))
        except ProviderError:
            return
        raise unable("it lists its models to anybody: the key was not looked at")

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
            check_edit(job, self.capabilities(job.model))
        fields = _fields(job, self.quirks, stream=stream)
        path = self.quirks.edits_path if edit else self.quirks.generations_path
        headers = self._headers()
        if stream:
            headers["Accept"] = "text/event-stream, application/json"
        return Call(
            "POST",
            self._url(path),
            deadline_in(job.deadline_s),
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


def _fields(job: ImageJob, quirks: Quirks, *, stream: bool) -> dict[str, object]:
    fields = job_fields(job, stream=stream)
    if quirks.response_format != "omit" and not _GPT_IMAGE.match(job.model):
        fields["response_format"] = quirks.response_format
    return {
        name: value for name, value in fields.items() if name not in quirks.strip_fields
    }


def judged_listing(
    status: int, headers: Mapping[str, str], body: object, secret: str
) -> ProviderError:
    """Classify an error of listing models: a key may be good for pictures alone."""
    refused = Refusal.of(status, headers, body)
    narrow = bool(_NO_SCOPE.search(refused.message))
    return judge(refused, secret, kind=FailureKind.UNSUPPORTED if narrow else None)
