"""``/files/results/...``: signed, expiring links to pictures, and what they open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Stream
from litestar.types import Scope

from gateway.api.http import AnyRequest, header
from gateway.api.render import LinkTo
from gateway.core import links as rules
from gateway.core.errors import GatewayError, NotFoundError
from gateway.flows.tasks import Picture
from gateway.ports import BlobStore, Clock, OpenBlob

CHUNK_BYTES = 64 * 1024
MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


class LinkRefusedError(GatewayError):
    """A link's signature does not fit, or its time is over."""

    status = 403
    type = "invalid_request_error"
    code = "link_invalid"


@dataclass(frozen=True, slots=True)
class Links:
    """Makes links and checks them. ``public_url`` empty: as the client calls us."""

    secret: bytes
    public_url: str

    def to(self, scope: Scope) -> LinkTo:
        """Return what makes the links of an answer to this request."""
        origin = self.public_url.rstrip("/") or _origin(scope)

        def link_to(picture: Picture) -> str | None:
            if picture.blob is None:
                return None
            path = rules.result_path(picture.blob, picture.media_type)
            query = rules.sign(self.secret, path, picture.expires_ms // 1000)
            return f"{origin}{path}?{query}"

        return link_to

    def check(self, path: str, expires: str, signature: str, now_s: int) -> None:
        """Let a link pass, or say why not.

        Raises:
            LinkRefusedError: the signature does not fit, or the time is over.
        """
        fits = expires.isascii() and expires.isdigit() and len(expires) <= 12  # noqa: PLR2004
        if not fits or not rules.is_signed(self.secret, path, int(expires), signature):
            raise LinkRefusedError(
                "The link is not valid. Use it exactly as the gateway gave it."
            )
        if now_s >= int(expires):
            raise LinkRefusedError(
                "The link has expired: pictures are kept for 24 hours.",
                code="link_expired",
            )


def link_routes(links: Links, blobs: BlobStore, clock: Clock) -> list[HTTPRouteHandler]:
    """Route the links."""

    @get("/files/results/{task:str}/{name:str}")
    async def open_result(request: AnyRequest, task: str, name: str) -> Stream:
        """Send a picture to whoever holds its link; no key is asked for."""
        index, _, extension = name.partition(".")
        query = request.query_params
        links.check(
            unquote(request.url.path),
            query.get("expires", ""),
            query.get("signature", ""),
            clock.now_ms() // 1000,
        )
        opened = await blobs.open(f"{task}/{index}")
        if opened is None:
            raise NotFoundError(
                "The picture is not there any more. Pictures are kept for 24 hours.",
                code="result_expired",
            )
        return Stream(
            _whole(opened),
            media_type=MEDIA_TYPES.get(extension, "application/octet-stream"),
            headers={
                "content-length": str(opened.size_bytes),
                "content-disposition": f'inline; filename="{task}-{index}.{extension}"',
                "cache-control": "private, max-age=3600",
            },
        )

    return [open_result]


def _whole(opened: OpenBlob) -> Iterator[bytes]:
    try:
        for offset in range(0, opened.size_bytes, CHUNK_BYTES):
            yield opened.read(offset, CHUNK_BYTES)
    finally:
        opened.close()


def _origin(scope: Scope) -> str:
    host = header(scope, "host") or "127.0.0.1"
    return f"{scope['scheme']}://{host}"
