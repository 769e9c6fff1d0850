"""Sends webhooks: signed, to public addresses only, and not for a moment too long.

The guard of ``outbound`` stands at every connection. Nothing is followed, and of the
answer little more than its status is read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpcore
from standardwebhooks import Webhook

from gateway.adapters.outbound import (
    BREAKS,
    TIMEOUTS,
    Guard,
    Resolve,
    UnreachableError,
    location,
)
from gateway.core.addresses import CheckedUrl, ForbiddenUrlError
from gateway.core.webhooks import (
    RETRY_AFTER_MAX_S,
    Answer,
    CallbackRules,
    callback_url,
)
from gateway.ports import Clock, Post
from providers.kit.wire import retry_after_s

SEND_MAX_S = 10.0
"""For all of it: lookup, handshake, request and answer."""
ANSWER_MAX_BYTES = 4_096
"""Of the answer's body; it is thrown away, and so is the connection after it."""


@dataclass(frozen=True, slots=True)
class GuardedSender:
    """The ``Sender`` port over HTTPS/1.1.

    Fields:
        network: dials addresses, never names.
    """

    clock: Clock
    resolve: Resolve
    rules: CallbackRules = field(default_factory=CallbackRules)
    tls: ssl.SSLContext = field(default_factory=httpcore.default_ssl_context)
    network: httpcore.AsyncNetworkBackend = field(default_factory=httpcore.AnyIOBackend)

    async def send(self, post: Post) -> Answer:
        """See ``Sender``."""
        deadline = asyncio.timeout(SEND_MAX_S)
        try:
            url = callback_url(post.url, self.rules)
            async with deadline:
                return await self._exchange(url, post)
        except ForbiddenUrlError as error:
            return Answer(None, str(error))
        except UnreachableError:
            return Answer(
                None,
                "The host could not be reached. It must have public addresses only, "
                "and answer.",
            )
        except TimeoutError:
            # A read or write has no timeout of its own, so this is the deadline, or
            # what the system makes of a host that fell silent.
            return Answer(None, f"There was no whole answer within {SEND_MAX_S:g} s.")
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            return Answer(None, "No secure connection: check the host's certificate.")
        except BREAKS:
            return Answer(None, "The connection broke off before a whole answer.")

    async def _exchange(self, url: CheckedUrl, post: Post) -> Answer:
        guard = Guard(self.clock, self.resolve, self.rules.allow, self.network)
        # No connection outlives its request: none can be taken over by another name.
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self.tls, max_keepalive_connections=0, network_backend=guard
        )
        request = httpcore.Request(
            "POST",
            location(url),
            headers=[("Host", url.authority), *signed_headers(post).items()],
            content=post.body,
            extensions={"timeout": TIMEOUTS},
        )
        async with pool:
            response = await pool.handle_async_request(request)
            try:
                await _skim(response)
            finally:
                await response.aclose()
        return _answer(response)


def signed_headers(post: Post) -> Mapping[str, str]:
    """Write the headers of a webhook: one signature per secret, the newest first."""
    at = datetime.fromtimestamp(post.now_ms // 1000, UTC)
    body = post.body.decode()
    return {
        "User-Agent": "imageway",
        "Content-Type": "application/json",
        "Content-Length": str(len(post.body)),
        "webhook-id": post.id,
        "webhook-timestamp": str(post.now_ms // 1000),
        "webhook-signature": " ".join(
            Webhook(secret).sign(post.id, at, body) for secret in post.secrets
        ),
    }


async def _skim(response: httpcore.Response) -> None:
    seen_bytes = 0
    async for piece in response.aiter_stream():
        seen_bytes += len(piece)
        if seen_bytes > ANSWER_MAX_BYTES:
            return


def _answer(response: httpcore.Response) -> Answer:
    headers = {
        key.decode("latin-1").lower(): value.decode("latin-1")
        for key, value in response.headers
    }
    accepted = 200 <= response.status < 300  # noqa: PLR2004 - 2xx
    return Answer(
        response.status,
        None if accepted else f"The receiver answered with status {response.status}.",
        retry_after_s(headers, at_most_s=RETRY_AFTER_MAX_S),
    )
