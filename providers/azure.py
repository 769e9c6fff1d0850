"""Azure OpenAI and Foundry: OpenAI's images API behind names and credentials of Azure.

An offer's model is the name of a deployment. What else differs between resources is
an option of the account, see ``Options``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from providers.kit.abilities import Abilities, Format, Host, capabilities_of
from providers.kit.accounts import check_base_url, check_secret, read_options
from providers.kit.contract import (
    Account,
    Billed,
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
from providers.kit.tokens import CommandTokens, FileTokens, Tokens
from providers.kit.wire import Call, Tools, deadline_in

DATED_API_VERSION = "2025-04-01-preview"
"""The first dated version that knows gpt-image models."""

_UNAUTHORIZED = 401

T = TypeVar("T")

Version = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.-]*$")]
Argument = Annotated[str, msgspec.Meta(pattern="^[^\\x00]+$")]


class Options(Abilities, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an account's resource is spoken to; each field is an option.

    ``form`` is how a deployment is named: ``v1`` in the body, ``deployment`` in the
    path. ``api_version`` goes with every request; empty means none for ``v1``, and
    ``DATED_API_VERSION`` for ``deployment``. ``token_command`` (a program and its
    arguments) or ``token_file`` gives Entra tokens, in place of a credential.
    ``models`` tells which model is behind a deployment whose name does not say.
    ``strip_fields`` are never sent. ``download_hosts`` may be asked for pictures that
    come as a link, besides the resource's own host.
    """

    form: Literal["v1", "deployment"] = "v1"
    api_version: Version = ""
    token_command: tuple[Argument, ...] = ()
    token_file: Argument | None = None
    models: Mapping[str, str] = {}
    strip_fields: frozenset[str] = frozenset()
    download_hosts: frozenset[Host] = frozenset()
    # Microsoft's guide: there is no WebP at Azure.
    output_formats: frozenset[Format] = frozenset({"png", "jpeg"})


def connect(account: Account, tools: Tools) -> Azure:
    """Build the adapter for an account. No I/O.

    Raises:
        ValueError: the message names what is wrong.
    """
    options = read_options(account.options, Options)
    check_base_url(account.base_url)
    if "openai" in urlsplit(account.base_url).path.split("/"):
        raise ValueError("base_url: must be the endpoint alone, without /openai")
    check_secret(account.secret)
    given = (account.secret, options.token_command, options.token_file)
    if sum(map(bool, given)) != 1:
        raise ValueError(
            "credential: give one of credential, token_command and token_file"
        )
    return Azure(account, tools, options, _tokens(options, tools))


def _tokens(options: Options, tools: Tools) -> Tokens | None:
    if options.token_command:
        return CommandTokens(options.token_command, tools.now_s)
    if options.token_file is None:
        return None
    path = Path(options.token_file)
    if not path.is_absolute():
        raise ValueError("options: token_file must be an absolute path")
    return FileTokens(path, tools.now_s)


@dataclass(frozen=True, slots=True)
class Azure:
    """A provider behind one Azure resource.

    ``tokens`` is None where the account's secret is a key.
    """

    account: Account
    tools: Tools
    options: Options
    tokens: Tokens | None

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Tell what the account's options allow."""
        return capabilities_of(self.options)

    async def start(self, job: ImageJob) -> Done | Pending:
        """Make the pictures; this API answers when they are done."""
        call, token = await self._call(job)
        return await self._asked(call, token, lambda call: self._api.ask(call, job.n))

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Make the pictures, and show how they come along."""
        if not self.options.stream:
            raise unable("no streams here")
        call, token = await self._call(job, stream=True)
        try:
            async with aclosing(self._followed(call, token, job)) as looks:
                async for look in looks:
                    yield look
        except ProviderError as error:
            call, token = await self._anew(call, token, error)
        else:
            return
        async with aclosing(self._followed(call, token, job)) as looks:
            async for look in looks:
                yield look

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise unable("this API has no jobs to ask for")

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: no job is ever left pending by this API."""
        raise unable("this API has no jobs to ask for")

    async def probe(self, model: str, deadline_s: float) -> None:  # noqa: ARG002 - the contract's; a key is for all deployments
        """List the models of the resource."""
        deadline_at_s = deadline_in(deadline_s)
        headers, token = await self._credential(deadline_at_s)
        call = Call(
            "GET",
            _url(self.account.base_url, self.options, "", "models"),
            deadline_at_s,
            headers=headers,
            secret=token or self.account.secret,
        )
        await self._asked(call, token, lambda call: ask(self.tools.wire, call))

    async def close(self) -> None:
        """Stop fetching tokens; the connections belong to the wire."""
        if self.tokens is not None:
            await self.tokens.close()

    @property
    def _api(self) -> ImagesApi:
        home = urlsplit(self.account.base_url).hostname or ""
        return ImagesApi(
            self.tools, hosts=self.options.download_hosts | {home}, usage_is_true=True
        )

    async def _call(self, job: ImageJob, *, stream: bool = False) -> tuple[Call, str]:
        """Write a job as a request; returns the Entra token in it, too, if any."""
        deadline_at_s = deadline_in(job.deadline_s)
        edit = job.operation is Operation.EDIT
        if edit:
            check_edit(job, self.capabilities(job.model))
        fields = _fields(job, self.options, stream=stream)
        body = edit_form(job, fields) if edit else None
        headers, token = await self._credential(deadline_at_s)
        if stream:
            headers["Accept"] = "text/event-stream, application/json"
        call = Call(
            "POST",
            _url(
                self.account.base_url,
                self.options,
                f"/deployments/{quote(job.model, safe='')}",
                f"images/{'edits' if edit else 'generations'}",
            ),
            deadline_at_s,
            headers=headers,
            json=None if edit else fields,
            body=body,
            secret=token or self.account.secret,
        )
        return call, token

    async def _credential(self, deadline_at_s: float) -> tuple[dict[str, str], str]:
        """Give the headers that prove who asks, and the Entra token in them, if any."""
        token = await self._token(deadline_at_s)
        # Both at once is an error at Azure, and a key as bearer is one, too.
        if token:
            return {"Authorization": f"Bearer {token}"}, token
        return {"api-key": self.account.secret}, ""

    async def _token(self, deadline_at_s: float) -> str:
        if self.tokens is None:
            return ""
        try:
            async with asyncio.timeout_at(deadline_at_s):
                return await self.tokens.current()
        except TimeoutError as error:
            raise ProviderError(
                FailureKind.TIMEOUT,
                "the deadline passed while waiting for a token",
                billed=Billed.NO,
            ) from error

    async def _asked(
        self, call: Call, token: str, ask: Callable[[Call], Awaitable[T]]
    ) -> T:
        """Make a call; once more with a fresh token, when its own is refused."""
        try:
            with self._unless_refused(token):
                return await ask(call)
        except ProviderError as error:
            call, token = await self._anew(call, token, error)
        with self._unless_refused(token):
            return await ask(call)

    async def _followed(
        self, call: Call, token: str, job: ImageJob
    ) -> AsyncGenerator[Partial | Done, None]:
        with self._unless_refused(token):
            async with aclosing(self._api.follow(call, job)) as looks:
                async for look in looks:
                    yield look

    async def _anew(
        self, call: Call, token: str, error: ProviderError
    ) -> tuple[Call, str]:
        """Write a call whose token was refused with another one: a 401 bought nothing.

        Raises:
            ProviderError: it was not that, or there is no other token.
        """
        free = error.status == _UNAUTHORIZED and error.billed is Billed.NO
        if self.tokens is None or not free:
            raise error
        fresh = await self._token(call.deadline_at_s)
        if fresh == token:
            raise error
        headers = {**call.headers, "Authorization": f"Bearer {fresh}"}
        return replace(call, headers=headers, secret=fresh), fresh

    @contextmanager
    def _unless_refused(self, token: str) -> Iterator[None]:
        """Let go of a token that is not accepted."""
        try:
            yield
        except ProviderError as error:
            if self.tokens is not None and error.status == _UNAUTHORIZED:
                self.tokens.reject(token)
            raise


def _fields(job: ImageJob, options: Options, *, stream: bool) -> dict[str, object]:
    fields = job_fields(job, maker=options.models.get(job.model), stream=stream)
    unwanted = set(options.strip_fields)
    if options.form == "deployment":
        # The path names it. Said twice, some models are not found.
        unwanted.add("model")
    return {name: value for name, value in fields.items() if name not in unwanted}


def _url(base_url: str, options: Options, deployment: str, path: str) -> str:
    """Write an URL in the account's form; the v1 form names no deployment in it."""
    version = options.api_version
    root = "/openai/v1"
    if options.form == "deployment":
        root = f"/openai{deployment}"
        version = version or DATED_API_VERSION
    query = "?" + urlencode({"api-version": version}) if version else ""
    return f"{base_url.rstrip('/')}{root}/{path}{query}"
