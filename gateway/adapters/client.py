"""A client of a running gateway: what the command ``generate`` speaks over HTTP.

The key goes to the gateway alone: not to where its links lead, and into no message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx

CONNECT_MAX_S = 10.0
ANSWER_MAX_S = 30.0
"""Between two pieces of an answer, and of a body that is sent."""
SUBMIT_MAX_S = 150.0
"""More than the gateway takes to load the references of a request."""
MESSAGE_MAX_CHARS = 1_000
RETRY_AFTER_MAX_S = 3_600.0
PASSING_STATUSES = frozenset({429, 500, 502, 503, 504})
DOWNLOAD_MAX_BYTES = 256 * 1024 * 1024
"""Of one picture. The largest that models make have some 25 MB."""
REFUSAL_MAX_BYTES = 64 * 1024
"""Of what a link answers instead of a picture."""
FORMATS = frozenset({"png", "jpeg", "webp"})
FINAL_STATUSES = frozenset({"completed", "failed", "cancelled"})

_TASK_ID = re.compile(r"task-unified-[A-Za-z0-9-]{1,100}")
_FILE_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_NOT_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


class AwayError(Exception):
    """The gateway cannot be reached, or what answers is none; the message says which.

    ``may_have_arrived``: the request may have been carried out all the same.
    """

    def __init__(self, message: str, *, may_have_arrived: bool) -> None:
        super().__init__(message)
        self.may_have_arrived = may_have_arrived


class RefusedError(Exception):
    """The gateway said no; the message is its own, with the code behind it.

    ``passing``: the same request may be accepted a little later, after
    ``retry_after_s`` if the gateway said so.
    """

    def __init__(
        self, message: str, *, passing: bool = False, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.passing = passing
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RemoteTask:
    """A task as its gateway tells it.

    Fields:
        progress: percent, 0 to 100.
        links: to the pictures, in order; they need no key.
        output_format: png, jpeg or webp; None where it is not told.
        credits_used: exact decimal; None while it is not settled.
        failure: why there are no pictures; None unless it failed or was cancelled.
    """

    id: str
    status: str
    progress: int
    links: tuple[str, ...]
    output_format: str | None
    credits_used: str | None
    failure: str | None

    @property
    def over(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.status in FINAL_STATUSES


def is_task_id(text: str) -> bool:
    """Tell whether a text is a task id: it becomes part of paths and file names."""
    return _TASK_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class GatewayClient:
    """What a gateway can be asked; every method raises AwayError and RefusedError.

    Fields:
        api: sends the key with each request.
        links: knows no key.
        download_max_bytes: a picture with more is given up.
    """

    url: str
    key: str = field(repr=False)
    api: httpx.Client = field(repr=False)
    links: httpx.Client = field(repr=False)
    download_max_bytes: int = DOWNLOAD_MAX_BYTES

    def estimate(self, body: Mapping[str, object]) -> str:
        """Price a request body; returns the gateway's JSON as it came."""
        return self._ask("POST", "/v1/estimate", json=body).text

    def admin(self, method: str, path: str, body: str | None = None) -> str:
        """Ask an admin route with a JSON body; returns its JSON object as it came."""
        headers = {"content-type": "application/json"}
        answer = self._ask(method, path, content=body, headers=headers)
        self._object(answer)
        return answer.text

    def submit(
        self,
        body: Mapping[str, object],
        idempotency_key: str,
        *,
        at_most_s: float = SUBMIT_MAX_S,
    ) -> RemoteTask:
        """Make a task; with an equal body and key any number of times, but one task.

        ``at_most_s``: the answer is waited for as long, and no part of it longer.
        """
        headers = {"prefer": "respond-async", "idempotency-key": idempotency_key}
        answer = self._ask(
            "POST",
            "/v1/images/generations",
            json=body,
            headers=headers,
            timeout=_timeout(at_most_s),
        )
        return self._task(answer)

    def task(self, task_id: str) -> RemoteTask:
        """Read a task."""
        return self._task(self._ask("GET", f"/v1/tasks/{task_id}"))

    def cancel(self, task_id: str, *, at_most_s: float = ANSWER_MAX_S) -> RemoteTask:
        """Ask for a task's end; one that runs may take ten seconds to notice."""
        path = f"/v1/tasks/{task_id}/cancel"
        return self._task(self._ask("POST", path, timeout=_timeout(at_most_s)))

    def upload(self, path: Path) -> str:
        """Upload a picture, read from the disk as it goes out; returns its file id.

        Raises:
            OSError: it cannot be read.
        """
        name = path.name.encode("utf-8", "replace").decode()
        with path.open("rb") as file:
            answer = self._ask(
                "POST",
                "/api/v1/files/upload/stream",
                files={"file": (name, file, "application/octet-stream")},
                timeout=_timeout(SUBMIT_MAX_S),
            )
        data = self._object(answer).get("data")
        file_id = data.get("file_id") if isinstance(data, dict) else None
        if not isinstance(file_id, str) or not _FILE_ID.fullmatch(file_id):
            raise self._no_gateway(answer)
        return file_id

    def delete(self, file_id: str) -> None:
        """Delete an uploaded picture."""
        self._ask("DELETE", f"/api/v1/files/{file_id}")

    def download(self, link: str, path: Path) -> None:
        """Stream what a link leads to into a new file; half of one may stay behind.

        Raises:
            OSError: it cannot be written, or is there already.
        """
        try:
            with self.links.stream("GET", link) as answer:
                if not answer.is_success:
                    raise self._refused_link(answer)
                with path.open("xb") as file:
                    left_bytes = self.download_max_bytes
                    for piece in answer.iter_bytes():
                        left_bytes -= len(piece)
                        if left_bytes < 0:
                            raise RefusedError(
                                "a picture was not fetched: it has more than "
                                f"{self.download_max_bytes:,} bytes"
                            )
                        file.write(piece)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise AwayError(
                f"a picture could not be fetched: {_cause(error)}",
                may_have_arrived=False,
            ) from error

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:  # noqa: ANN401 - as httpx has them
        try:
            answer = self.api.request(method, f"{self.url}{path}", **more)
        except httpx.RequestError as error:
            raise AwayError(
                f"no answer from the gateway at {self.url}: {_cause(error)}",
                may_have_arrived=not isinstance(error, _NOT_SENT),
            ) from error
        if answer.is_success:
            return answer
        raise self._refusal(answer)

    def _refused_link(self, answer: httpx.Response) -> Exception:
        body = b""
        for piece in answer.iter_bytes():
            body += piece
            if len(body) > REFUSAL_MAX_BYTES:
                return self._no_gateway(answer)
        whole = httpx.Response(
            answer.status_code,
            content=body,
            headers={
                name: answer.headers[name]
                for name in ("x-should-retry", "retry-after")
                if name in answer.headers
            },
        )
        return self._refusal(whole)

    def _refusal(self, answer: httpx.Response) -> Exception:
        try:
            error = self._object(answer)["error"]
            message, code = str(error["message"]), str(error["code"])
        except (AwayError, KeyError, TypeError):
            return self._no_gateway(answer)
        asked_not_to = answer.headers.get("x-should-retry") == "false"
        return RefusedError(
            f"{self._shown(message)} ({self._shown(code)})",
            passing=answer.status_code in PASSING_STATUSES and not asked_not_to,
            retry_after_s=_seconds(answer.headers.get("retry-after")),
        )

    def _task(self, answer: httpx.Response) -> RemoteTask:
        body = self._object(answer)
        task_id, status, progress = (body.get(k) for k in ("id", "status", "progress"))
        if not isinstance(task_id, str) or not is_task_id(task_id):
            raise self._no_gateway(answer)
        links, usage = body.get("results") or [], body.get("usage") or {}
        output_format, error = body.get("output_format"), body.get("error")
        known = FORMATS if isinstance(output_format, str) else ()
        used = usage.get("credits_used") if isinstance(usage, dict) else None
        return RemoteTask(
            id=task_id,
            status=self._shown(str(status)),
            progress=min(max(progress, 0), 100) if isinstance(progress, int) else 0,
            links=tuple(map(str, links)) if isinstance(links, list) else (),
            # It becomes a part of file names.
            output_format=output_format if output_format in known else None,
            credits_used=_exact(used) if isinstance(used, int | Decimal) else None,
            failure=self._failure(error) if isinstance(error, dict) else None,
        )

    def _failure(self, error: Mapping[str, object]) -> str:
        return self._shown(f"{error.get('message')} ({error.get('code')})")

    def _object(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body = json.loads(answer.text, parse_float=Decimal)
        except ValueError as error:
            raise self._no_gateway(answer) from error
        if not isinstance(body, dict):
            raise self._no_gateway(answer)
        return body

    def _no_gateway(self, answer: httpx.Response) -> AwayError:
        return AwayError(
            f"what answers at {self.url} does not speak as a gateway does (status "
            f"{answer.status_code})",
            may_have_arrived=True,
        )

    def _shown(self, text: str) -> str:
        """Make a text of the gateway fit for a terminal, and free of the key."""
        plain = "".join(char if char.isprintable() else " " for char in text)
        return plain.replace(self.key, "[the key]")[:MESSAGE_MAX_CHARS]


@contextmanager
def opened(url: str, key: str) -> Iterator[GatewayClient]:
    """Open a client of the gateway at ``url``, which has no path of the API in it."""
    headers = {"user-agent": "imageway"}
    carrying = headers | {"authorization": f"Bearer {key}"}
    timeout = _timeout(ANSWER_MAX_S)
    with (
        httpx.Client(headers=carrying, timeout=timeout) as api,
        # Without a key in it, a link may lead on: to an object store, say.
        httpx.Client(headers=headers, timeout=timeout, follow_redirects=True) as links,
    ):
        yield GatewayClient(url, key, api, links)


def _timeout(answer_s: float) -> httpx.Timeout:
    return httpx.Timeout(
        min(ANSWER_MAX_S, answer_s),
        connect=min(CONNECT_MAX_S, answer_s),
        read=answer_s,
    )


def _exact(number: int | Decimal) -> str:
    return f"{Decimal(number):f}"


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__


def _seconds(text: str | None) -> float | None:
    if text is None or not text.isascii() or not text.isdigit():
        return None
    return min(float(text), RETRY_AFTER_MAX_S)
