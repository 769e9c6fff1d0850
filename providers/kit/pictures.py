"""Pictures that were made: fetched from their links, and told by what they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import urlsplit

from providers.kit.answers import Picture
from providers.kit.contract import Billed, FailureKind, MadeImage, ProviderError
from providers.kit.images import NotAnImageError, read_payload_header
from providers.kit.spool import Spool
from providers.kit.wire import Download, Tools

T = TypeVar("T")

_BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


async def collected(
    items: Iterable[T], make: Callable[[T], Awaitable[MadeImage | None]]
) -> tuple[list[MadeImage], ProviderError | None]:
    """Gather the pictures, one by one, and the last trouble with one of them.

    None is no picture, and no trouble.
    """
    images: list[MadeImage] = []
    lost: ProviderError | None = None
    try:
        for item in items:
            try:
                image = await make(item)
            except ProviderError as error:
                lost = error
            else:
                images += [image] if image is not None else []
    except BaseException:
        for image in images:
            image.payload.close()
        raise
    return images, lost


async def fetched(download: Download, tools: Tools) -> Picture:
    """Fetch a picture from its link.

    Raises:
        ProviderError: RESULT_LOST.
    """
    return described(await tools.wire.download(download, tools.spools))


def of_a_download(error: ProviderError) -> ProviderError:
    """Tell a picture of a job that is gone from one that is out of reach for now.

    Its link lives on at the upstream, and the picture is paid for: BAD_GATEWAY is
    worth another look, RESULT_LOST has ended the job.
    """
    cause = error.__cause__
    unreachable = isinstance(cause, ProviderError) and cause.kind in {
        FailureKind.NETWORK,
        FailureKind.TIMEOUT,
    }
    status = error.status or 0
    away = unreachable or status in _BUSY or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return ProviderError(
        FailureKind.BAD_GATEWAY if away else FailureKind.RESULT_LOST,
        error.detail,
        status=error.status,
        billed=Billed.YES,
        ended=not away,
    )


def described(spool: Spool) -> Picture:
    """Read what a file is; it is closed when it is no picture.

    Raises:
        ProviderError: RESULT_LOST.
    """
    try:
        return Picture(spool, read_payload_header(spool))
    except (NotAnImageError, OSError) as error:
        spool.close()
        raise ProviderError(
            FailureKind.RESULT_LOST, f"what the link gave is {error}"
        ) from error


def made(picture: Picture, revised_prompt: object = None) -> MadeImage:
    """Hand a picture over as what it is, not as what was asked for."""
    return MadeImage(
        payload=picture.spool,
        media_type=picture.header.media_type,
        width_px=picture.header.width_px,
        height_px=picture.header.height_px,
        revised_prompt=revised_prompt if isinstance(revised_prompt, str) else None,
    )


def hosts_of(url: str, domains: Collection[str], home: str) -> frozenset[str]:
    """Tell who may be asked for the picture that a URL links to.

    These are the host of the base URL ``home``, the domains, and the URL's own host if
    it is below one of them.
    """
    hosts = frozenset(domains) | {urlsplit(home).hostname or ""}
    try:
        host = (urlsplit(url).hostname or "").lower()
    except ValueError:
        return hosts
    below = any(host.endswith(f".{domain.lower()}") for domain in domains)
    return hosts | {host} if below else hosts
