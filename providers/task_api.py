"""EvoLink, and servers alike: a task is submitted, asked after, and its links fetched.

A job may be handed over twice with the same key: EvoLink then answers with the task
that it has. See ``TaskApi.start``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from providers.kit.answers import Answer, AnswerReader, UnreadableAnswerError
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
from providers.kit.images import NotAnImageError, read_payload_header
from providers.kit.refusals import Refusal, judge, refusal
from providers.kit.usages import read_usage
from providers.kit.wire import Call, Download, Reply, Tools

SUBMIT_MAX_S = 30.0
"""As long as EvoLink's own client waits for a task to be taken."""
READ_MAX_S = 15.0
CREDITS_PER_USD = 68
NANOUSD_PER_USD = 10**9
PROGRESS_MAX = 100
AMOUNT_MAX = Decimal(10**9)
"""An amount of money or credits beyond this is none."""

Fields = Mapping[str, object]
Format = Literal["png", "jpeg", "webp"]
Host = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.:-]+$")]

_TASK_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an account's server can do; each field is an option.

    ``download_hosts`` may be asked for pictures, besides the base URL's own host and
    hosts of EvoLink. ``poll_after_ms`` is the time between two looks at a task.
    """

    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 1
    output_formats: frozenset[Format] = frozenset(get_args(Format))
    download_hosts: frozenset[Host] = frozenset()
    poll_after_ms: Annotated[int, msgspec.Meta(ge=200, le=60_000)] = 3_000


def connect(account: Account, tools: Tools) -> TaskApi:
    """Build the adapter for an account.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    try:
        options = msgspec.convert(dict(account.options), Options)
    except msgspec.ValidationError as error:
        raise ValueError(f"options: {error}") from error
    if not account.secret or not account.secret.isascii():
        raise ValueError("credential: is empty, or cannot be sent")
    return TaskApi(account, tools, options)


@dataclass(frozen=True, slots=True)
class TaskApi:
    """A provider behind EvoLink's task API."""

    account: Account
    tools: Tools
    options: Options

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's
        """Tell what the account's options allow."""
        return Capabilities(
            n_max=self.options.n_max,
            output_formats=frozenset(self.options.output_formats),
            idempotent=True,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Submit a task. When the reply is lost, ask once more with the same key."""
        if job.operation is Operation.EDIT:
            raise _unable("no edits here")
        call = self._call(
            "POST",
            "/images/generations",
            min(job.deadline_s, SUBMIT_MAX_S),
            headers={"Idempotency-Key": _key(job)},
            json=_fields(job),
        )
        try:
            return await self._submitted(call)
        except ProviderError as error:
            if error.billed is Billed.NO:
                raise
        return await self._submitted(call)

    def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:  # noqa: ARG002 - the contract's
        """Fail: tasks show nothing before they end."""
        raise _unable("no streams here")

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        """Look at a task, and fetch its pictures when it has ended."""
        call = self._call("GET", f"/tasks/{job_id}", min(job.deadline_s, READ_MAX_S))
        try:
            body, reply = await self._asked(call)
        except ProviderError as error:
            # The task was taken: whatever happens to a look, it may be charged.
            error.billed = Billed.MAYBE
            raise
        state = body.get("status")
        if state in {"pending", "processing"}:
            return Pending(job_id, self._poll_after_s, _progress(body))
        if state == "completed":
            return await self._done(job, body, reply)
        raise judge(Refusal.of(reply.status, reply.headers, body), self.account.secret)

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: there is no way to stop a task."""
        raise _unable("tasks cannot be stopped here")

    async def close(self) -> None:
        """Nothing to give back: the connections belong to the wire."""

    @property
    def _poll_after_s(self) -> float:
        return self.options.poll_after_ms / 1000

    def _call(
        self,
        method: str,
        path: str,
        limit_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        json: object = None,
    ) -> Call:
        return Call(
            method,
            self.account.base_url.rstrip("/") + path,
            asyncio.get_running_loop().time() + limit_s,
            headers={
                "Authorization": f"Bearer {self.account.secret}",
                **(headers or {}),
            },
            json=json,
            secret=self.account.secret,
        )

    async def _submitted(self, call: Call) -> Pending:
        body, reply = await self._asked(call)
        task_id = body.get("id")
        if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
            raise _unreadable("a task without an id", reply)
        return Pending(task_id, self._poll_after_s, _progress(body))

    async def _asked(self, call: Call) -> tuple[Fields, Reply]:
        async with self.tools.wire.exchange(call) as reply:
            if not reply.is_success:
                body = await reply.error_body()
                raise refusal(reply.status, reply.headers, body, secret=call.secret)
            answer = await self._read(reply)
        answer.close()
        if not isinstance(answer.body, dict):
            raise _unreadable("no object", reply)
        return answer.body, reply

    async def _read(self, reply: Reply) -> Answer:
        reader = AnswerReader(self.tools.spools)
        try:
            async with aclosing(reply.chunks()) as chunks:
                async for chunk in chunks:
                    reader.feed(chunk)
            return reader.finish()
        except UnreadableAnswerError as error:
            raise _unreadable(str(error), reply) from error
        finally:
            reader.close()

    async def _done(self, job: ImageJob, body: Fields, reply: Reply) -> Done:
        results = body.get("results")
        links = (
            [link for link in results if isinstance(link, str)]
            if isinstance(results, list)
            else []
        )
        if not links:
            raise ProviderError(
                FailureKind.NO_OUTPUT,
                "a task completed without a picture",
                status=reply.status,
            )
        images: list[MadeImage] = []
        try:
            for link in links[: job.n]:
                images += [await self._fetched(job, link)]
        except BaseException:
            for image in images:
                image.payload.close()
            raise
        usage = body.get("usage")
        return Done(
            images=tuple(images),
            usage=read_usage(usage),
            cost_nanousd=_cost_nanousd(usage),
            upstream_request_id=reply.headers.get("x-request-id"),
            background=job.background,
        )

    async def _fetched(self, job: ImageJob, url: str) -> MadeImage:
        host = (urlsplit(url).hostname or "").lower()
        home = urlsplit(self.account.base_url).hostname or ""
        hosts = self.options.download_hosts | {home}
        if host.endswith(".evolink.ai"):
            hosts |= {host}
        download = Download(
            url,
            hosts,
            asyncio.get_running_loop().time() + job.deadline_s,
            secret=self.account.secret,
        )
        spool = await self.tools.wire.download(download, self.tools.spools)
        try:
            header = read_payload_header(spool)
        except (NotAnImageError, OSError) as error:
            spool.close()
            raise ProviderError(
                FailureKind.RESULT_LOST, f"what the link gave is {error}"
            ) from error
        return MadeImage(spool, header.media_type, header.width_px, header.height_px)


def _key(job: ImageJob) -> str:
    """Name one call for ever: 16 to 96 of what EvoLink takes in a key."""
    return f"imageway.{job.task_id}.{job.seq}"


def _fields(job: ImageJob) -> dict[str, object]:
    fields: dict[str, object] = {
        "model": job.model,
        "prompt": job.prompt,
        "size": "auto"
        if job.width_px is None or job.height_px is None
        else f"{job.width_px}x{job.height_px}",
        "quality": job.quality,
        "n": job.n,
    }
    # The defaults are not sent: not every model takes these fields.
    if job.output_format != "png":
        fields["output_format"] = job.output_format
    if job.background not in {None, "opaque"}:
        fields["background"] = job.background
    return fields


def _progress(body: Fields) -> int | None:
    progress = body.get("progress")
    if type(progress) is not int or not 0 <= progress <= PROGRESS_MAX:
        return None
    return progress


def _cost_nanousd(usage: object) -> int | None:
    if not isinstance(usage, dict):
        return None
    cost = usage.get("cost")
    usd = _amount(cost.get("usd")) if isinstance(cost, dict) else None
    used = _amount(usage.get("credits_used"))
    if usd is None and used is not None:
        usd = used / CREDITS_PER_USD
    if usd is None:
        return None
    return int((usd * NANOUSD_PER_USD).to_integral_value(ROUND_CEILING))


def _amount(value: object) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    amount = Decimal(value)
    return amount if 0 <= amount <= AMOUNT_MAX else None


def _unable(detail: str) -> ProviderError:
    return ProviderError(FailureKind.UNSUPPORTED, detail)


def _unreadable(detail: str, reply: Reply) -> ProviderError:
    return ProviderError(
        FailureKind.BAD_GATEWAY,
        f"{reply.status} with what cannot be used: {detail}",
        status=reply.status,
        billed=Billed.MAYBE,
    )
