"""Brings the pictures that a request starts from into spools, and checks them.

Before anything is held: a request whose pictures cannot be used costs nothing.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from gateway.core.errors import InvalidRequestError, StoreAwayError
from gateway.core.images import IMAGE_MAX_BYTES, check_mask
from gateway.core.requests import UPLOAD_SCHEME, ImageRequest
from gateway.core.sizes import Size
from gateway.flows.files import fetcher_busy, read_picture
from gateway.ports import (
    BlobStore,
    Clock,
    Fetcher,
    FetcherBusyError,
    FetchRefusedError,
    FileStore,
    Spools,
    WritableSpool,
)
from providers.kit.contract import InputFile, Payload
from providers.kit.payloads import BrokenBase64Error, raw_chunks

FETCHES_MAX_PER_REQUEST = 4
FETCH_MAX_S = 30.0
ALL_FETCHES_MAX_S = 120.0
COPY_BYTES = 64 * 1024
DATA_MARK = "data:#"
INPUTS_MAX = 17


@dataclass(frozen=True, slots=True)
class Inputs:
    """The pictures of one request; whoever has them closes them."""

    references: tuple[InputFile, ...] = ()
    mask: InputFile | None = None

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The pixels of each reference."""
        return tuple(Size(r.width_px, r.height_px) for r in self.references)

    def close(self) -> None:
        """Give the spools back."""
        for file in _all(self):
            file.payload.close()


NO_INPUTS = Inputs()


@dataclass(frozen=True, slots=True)
class LoadInputs:
    """Loads references and mask from wherever the request says that they are."""

    fetcher: Fetcher
    files: FileStore
    uploads: BlobStore
    spools: Spools
    clock: Clock

    async def __call__(
        self, request: ImageRequest, tenant_id: str, brought: Sequence[Payload]
    ) -> Inputs:
        """Load and check every picture of a request.

        Args:
            request: says where the pictures are.
            tenant_id: whose uploaded files may be used.
            brought: what came with the request itself. Files belong to the inputs
                once they are loaded; data URLs stay with the caller.

        Raises:
            InvalidRequestError: a picture cannot be had or cannot be used; ``param``
                names it.
            ServiceUnavailableError: too many files are being fetched.
        """
        names = request.reference_params or ("image_urls",) * len(request.references)
        places = list(zip(request.references, names, strict=True))
        if request.mask is not None:
            places.append((request.mask, request.mask_param))
        gate = asyncio.Semaphore(FETCHES_MAX_PER_REQUEST)
        loads = [
            asyncio.ensure_future(self._load(place, tenant_id, brought, gate))
            for place in places
        ]
        try:
            async with asyncio.timeout(ALL_FETCHES_MAX_S):
                await asyncio.gather(*loads)
            return _checked(request, [load.result() for load in loads])
        except TimeoutError:
            await _let_go(loads)
            raise InvalidRequestError(
                f"The reference images did not arrive in {ALL_FETCHES_MAX_S:.0f} s. "
                "Use a faster host, or upload them.",
                param=names[0],
                code="image_fetch_failed",
            ) from None
        except BaseException:
            await _let_go(loads)
            raise

    async def _load(
        self,
        place: tuple[str, str],
        tenant_id: str,
        brought: Sequence[Payload],
        gate: asyncio.Semaphore,
    ) -> tuple[Payload, str]:
        located, param = place
        if located.startswith((UPLOAD_SCHEME, DATA_MARK)):
            return await self._brought(located, param, brought), param
        spool = self.spools.open("raw", limit_bytes=IMAGE_MAX_BYTES)
        try:
            if located.startswith("file_"):
                await self._copy_upload(located, param, tenant_id, spool)
            elif located[:5].lower() == "data:":
                await _decode_inline(located, param, spool)
            else:
                async with gate:
                    await self._fetch(located, param, tenant_id, spool)
        except BaseException:
            spool.close()
            raise
        return spool, param

    async def _fetch(
        self, url: str, param: str, tenant_id: str, spool: WritableSpool
    ) -> None:
        try:
            await self.fetcher.fetch(
                url, spool, deadline_s=FETCH_MAX_S, caller=tenant_id
            )
        except FetcherBusyError as error:
            raise fetcher_busy() from error
        except FetchRefusedError as error:
            raise InvalidRequestError(
                f"{param} could not be fetched: {error}",
                param=param,
                code="image_fetch_failed",
            ) from error

    async def _brought(
        self, located: str, param: str, brought: Sequence[Payload]
    ) -> Payload:
        _, _, place = located.replace("#", ":").rpartition(":")
        if not place.isascii() or not place.isdigit() or int(place) >= len(brought):
            raise InvalidRequestError(
                f"{param} is not a data URL that holds a picture.", param=param
            )
        payload = brought[int(place)]
        if payload.encoding == "raw":
            return payload
        spool = self.spools.open("raw", limit_bytes=IMAGE_MAX_BYTES)
        try:
            await _decode(payload, spool, param)
        except BaseException:
            spool.close()
            raise
        return spool

    async def _copy_upload(
        self, file_id: str, param: str, tenant_id: str, spool: WritableSpool
    ) -> None:
        file = await self.files.file(file_id, now_ms=self.clock.now_ms())
        opened = None
        if file is not None and file.tenant_id == tenant_id:
            opened = await self.uploads.open(file.blob)
        if opened is None:
            raise InvalidRequestError(
                f"{param}: there is no file {file_id[:64]}. Files are kept for 72 "
                "hours and are seen by the tenant that uploaded them.",
                param=param,
                code="file_not_found",
            )
        try:
            for offset in range(0, opened.size_bytes, COPY_BYTES):
                spool.append(await opened.read(offset, COPY_BYTES))
                await asyncio.sleep(0)  # others get their turn
        finally:
            opened.close()


@dataclass(frozen=True, slots=True)
class KeptInputs:
    """Keeps the pictures of an async task until it is over."""

    blobs: BlobStore
    spools: Spools

    async def keep(self, task_id: str, inputs: Inputs) -> None:
        """Store references and mask, durably, before the task is made.

        Raises:
            ServiceUnavailableError: the disk does not take them.
        """
        for place, file in enumerate(_all(inputs)):
            await self.blobs.keep_file(f"{task_id}/{place}", file.payload)

    async def load(self, task_id: str, request: ImageRequest) -> Inputs:
        """Bring what was kept back into spools.

        Raises:
            InvalidRequestError: not all of it is kept any more.
        """
        count = len(request.references) + (request.mask is not None)
        loaded: list[InputFile] = []
        try:
            for place in range(count):
                loaded.append(await self._load(f"{task_id}/{place}"))  # noqa: PERF401 - those before are closed
        except BaseException:
            Inputs(tuple(loaded)).close()
            raise
        if request.mask is None:
            return Inputs(tuple(loaded))
        return Inputs(tuple(loaded[:-1]), loaded[-1])

    async def forget(self, task_id: str) -> None:
        """Delete what was kept for a task.

        What a store that is away keeps expires later, as results do.
        """
        with suppress(StoreAwayError):
            for place in range(INPUTS_MAX):
                blob = f"{task_id}/{place}"
                if not await self.blobs.exists(blob):
                    return
                await self.blobs.delete(blob)

    async def _load(self, blob: str) -> InputFile:
        opened = await self.blobs.open(blob)
        if opened is None:
            raise InvalidRequestError(
                "A picture of this task is not kept any more.",
                param="image_urls",
                code="resource_not_found",
            )
        spool = self.spools.open("raw", limit_bytes=IMAGE_MAX_BYTES)
        try:
            for offset in range(0, opened.size_bytes, COPY_BYTES):
                spool.append(await opened.read(offset, COPY_BYTES))
                await asyncio.sleep(0)
            return _input_file(spool, "image_urls")
        except BaseException:
            spool.close()
            raise
        finally:
            opened.close()


def _all(inputs: Inputs) -> tuple[InputFile, ...]:
    return (*inputs.references, *((inputs.mask,) if inputs.mask else ()))


def _checked(request: ImageRequest, loaded: list[tuple[Payload, str]]) -> Inputs:
    files = [_input_file(payload, param) for payload, param in loaded]
    if request.mask is None:
        return Inputs(tuple(files))
    *references, mask = files
    header = read_picture(mask.payload, request.mask_param)
    check_mask(header, references[0], request.mask_param)
    return Inputs(tuple(references), mask)


def _input_file(payload: Payload, param: str) -> InputFile:
    header = read_picture(payload, param)
    return InputFile(payload, header.media_type, header.width_px, header.height_px)


async def _decode_inline(located: str, param: str, spool: WritableSpool) -> None:
    # Short ones only: the API lifts longer ones out of the body before it is parsed.
    head, _, text = located.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            raise _not_base64(param)
        spool.append(binascii.a2b_base64(text.encode("ascii"), strict_mode=True))
    except ValueError as error:
        raise _not_base64(param) from error


async def _decode(payload: Payload, spool: WritableSpool, param: str) -> None:
    try:
        for chunk in raw_chunks(payload):
            spool.append(chunk)
            await asyncio.sleep(0)  # 64 KiB at a time: others get their turn
    except BrokenBase64Error as error:
        raise _not_base64(param) from error


def _not_base64(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} must be a data URL with valid base64, such as "
        "data:image/png;base64,iVBORw0….",
        param=param,
        code="invalid_image",
    )


async def _let_go(loads: Sequence[asyncio.Future[tuple[Payload, str]]]) -> None:
    for load in loads:
        load.cancel()
    done = await asyncio.gather(*loads, return_exceptions=True)
    for result in done:
        if not isinstance(result, BaseException):
            result[0].close()
