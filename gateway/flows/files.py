"""Uploads of a tenant: kept for 72 h, to be used in its requests."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from gateway.core.errors import (
    GatewayError,
    InvalidRequestError,
    NotFoundError,
    ServiceUnavailableError,
)
from gateway.core.images import (
    IMAGE_MAX_BYTES,
    check_reference,
    not_an_image,
    too_large,
)
from gateway.ports import (
    BlobStore,
    Chance,
    Clock,
    Fetcher,
    FetcherBusyError,
    FetchRefusedError,
    FileStore,
    FileUse,
    Spools,
    StoredFile,
    WritableSpool,
)
from providers.kit.contract import Payload
from providers.kit.images import (
    ImageHeader,
    LongHeaderError,
    NotAnImageError,
    read_payload_header,
)

FILE_KEPT_MS = 72 * 3600 * 1000
FILES_MAX = 2_000
"""How many unexpired files a tenant may have."""
FILES_MAX_BYTES_PER_TENANT = 5 * 1024 * 1024 * 1024
"""What they may have together; fewer of the largest fit than may be there."""
NAME_MAX_CHARS = 200
UPLOAD_PATH_MAX_CHARS = 200
GIVEN_MAX_CHARS = 1_024
"""What is looked at of a name that a caller gives."""
FETCH_MAX_S = 30.0
BUSY_RETRY_AFTER_S = 10
SWEEP_MAX_FILES = 500
ORPHAN_GRACE_MS = 3_600_000
"""A blob whose file was never written down is deleted so long after its time."""

ID_PREFIX = "file_"
ID_CHARS = 24
ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
EXTENSIONS = {
    "image/png": ("png",),
    "image/jpeg": ("jpg", "jpeg"),
    "image/webp": ("webp",),
}

QUOTA = FileUse(FILES_MAX, FILES_MAX_BYTES_PER_TENANT)


@dataclass(frozen=True, slots=True)
class Naming:
    """What the caller calls a file; every part may be left out."""

    original_name: str | None = None
    file_name: str | None = None
    upload_path: str | None = None


@dataclass(frozen=True, slots=True)
class Quota:
    """How many files a tenant has, and may have, and their bytes."""

    used: FileUse
    at_most: FileUse


@dataclass(frozen=True, slots=True)
class Files:
    """Keeps, lists and deletes the files of a tenant."""

    store: FileStore
    blobs: BlobStore
    clock: Clock
    chance: Chance

    async def check_room(self, tenant_id: str) -> None:
        """Refuse an upload that could not be kept, before its body is read.

        Raises:
            InvalidRequestError: the tenant has as many files, or bytes, as it may.
        """
        used = (await self.quota(tenant_id)).used
        full = used.size_bytes >= QUOTA.size_bytes
        if full or used.files >= QUOTA.files:
            raise _quota_reached()

    async def keep(
        self, tenant_id: str, content: Payload, naming: Naming, *, param: str
    ) -> StoredFile:
        """Keep a file; the content stays the caller's, to be closed by it.

        A file is listed only once its bytes are stored: one that is seen can be used.

        Raises:
            InvalidRequestError: it is no picture that a model could use, or the
                tenant would have more than it may.
            TooLargeError: it is over the limit.
            ServiceUnavailableError: it cannot be stored.
        """
        header = read_picture(content, param)
        now_ms = self.clock.now_ms()
        file = _described(
            ID_PREFIX + self.chance.token(ID_ALPHABET, ID_CHARS),
            tenant_id,
            header,
            naming,
            size_bytes=content.size_bytes,
            now_ms=now_ms,
        )
        await self.blobs.keep_file(file.blob, content)
        try:
            added = await self.store.add_file(file, at_most=QUOTA, now_ms=now_ms)
        except GatewayError:
            await self.blobs.delete(file.blob)
            raise
        if not added:
            await self.blobs.delete(file.blob)
            raise _quota_reached()
        return file

    async def find(
        self, tenant_id: str, file_id: str, *, param: str = "file_id"
    ) -> StoredFile:
        """Find a file of the tenant.

        Raises:
            NotFoundError: there is none, it has expired, or it is another tenant's.
        """
        file = await self.store.file(file_id, now_ms=self.clock.now_ms())
        if file is None or file.tenant_id != tenant_id:
            raise NotFoundError(
                "There is no such file. Files are kept for 72 hours and are seen "
                "only with a key of the tenant that uploaded them.",
                param=param,
                code="file_not_found",
            )
        return file

    async def delete(self, tenant_id: str, file_id: str) -> None:
        """Delete a file; its links open nothing from now on.

        Raises:
            NotFoundError: as ``find``.
        """
        file = await self.find(tenant_id, file_id)
        await self._forget(file)

    async def listed(
        self, tenant_id: str, *, page: int, page_size: int
    ) -> tuple[int, Sequence[StoredFile]]:
        """Give a page of the tenant's files, newest first, with the total number."""
        return await self.store.files(
            tenant_id,
            now_ms=self.clock.now_ms(),
            offset=(page - 1) * page_size,
            limit=page_size,
        )

    async def quota(self, tenant_id: str) -> Quota:
        """Count the tenant's files and their bytes."""
        used = await self.store.file_use(tenant_id, now_ms=self.clock.now_ms())
        return Quota(used, QUOTA)

    async def expire(self) -> int:
        """Delete what has expired, blob before row; returns how many files."""
        now_ms = self.clock.now_ms()
        expired = await self.store.expired_files(now_ms=now_ms, limit=SWEEP_MAX_FILES)
        for file in expired:
            await self._forget(file)
        await self.blobs.expire(now_ms - FILE_KEPT_MS - ORPHAN_GRACE_MS)
        return len(expired)

    async def _forget(self, file: StoredFile) -> None:
        # In this order: a row without its blob is found again, a blob alone is not.
        await self.blobs.delete(file.blob)
        await self.store.remove_file(file.id)


@dataclass(frozen=True, slots=True)
class FetchFile:
    """Keeps a file that is fetched from where its owner points."""

    files: Files
    fetcher: Fetcher
    spools: Spools

    async def __call__(self, tenant_id: str, url: str, naming: Naming) -> StoredFile:
        """Fetch and keep.

        Raises:
            InvalidRequestError: it could not be fetched; else as ``Files.keep``.
            ServiceUnavailableError: too many are being fetched.
        """
        spool = upload_spool(self.spools)
        try:
            await self.fetcher.fetch(
                url, spool, deadline_s=FETCH_MAX_S, caller=tenant_id
            )
            named = Naming(_name_in(url), naming.file_name, naming.upload_path)
            return await self.files.keep(tenant_id, spool, named, param="file_url")
        except FetcherBusyError as error:
            raise fetcher_busy() from error
        except FetchRefusedError as error:
            raise InvalidRequestError(
                f"The file could not be fetched: {error}",
                param="file_url",
                code="image_fetch_failed",
            ) from error
        finally:
            spool.close()


def fetcher_busy() -> ServiceUnavailableError:
    """Say that no turn to fetch a URL came free in time."""
    return ServiceUnavailableError(
        "Too many files are being fetched, of yours or in all. Try again in a moment, "
        "or upload the file.",
        code="overloaded",
        retry_after_s=BUSY_RETRY_AFTER_S,
    )


def upload_spool(spools: Spools) -> WritableSpool:
    """Make a spool that takes one byte more than a picture may have.

    So that who fills it can tell a file that is too large from one that just fits.
    """
    return spools.open("raw", limit_bytes=IMAGE_MAX_BYTES + 1)


def read_picture(content: Payload, param: str) -> ImageHeader:
    """Read and check the header of a raw picture.

    Marks behind a large profile (the animation of a PNG) are seen as well.

    Raises:
        InvalidRequestError: it is no picture that a model could use.
        TooLargeError: it is over the limit.
    """
    assert content.encoding == "raw", content.encoding
    if content.size_bytes > IMAGE_MAX_BYTES:
        raise too_large(param)
    try:
        header = read_payload_header(content)
    except LongHeaderError as error:
        raise InvalidRequestError(
            "The picture cannot be used: its header is too long. Save it without "
            "embedded texts and profiles.",
            param=param,
            code="invalid_image",
        ) from error
    except NotAnImageError as error:
        raise not_an_image(param) from error
    check_reference(header, content.size_bytes, param)
    return header


def _described(
    file_id: str,
    tenant_id: str,
    header: ImageHeader,
    naming: Naming,
    *,
    size_bytes: int,
    now_ms: int,
) -> StoredFile:
    fallback = f"image.{EXTENSIONS[header.media_type][0]}"
    original = _plain_name(naming.original_name or naming.file_name or "") or fallback
    wanted = _plain_name(naming.file_name or "") or original
    return StoredFile(
        id=file_id,
        tenant_id=tenant_id,
        name=_with_extension(wanted, header.media_type),
        original_name=original,
        upload_path=_plain_path(naming.upload_path or ""),
        media_type=header.media_type,
        size_bytes=size_bytes,
        width_px=header.width_px,
        height_px=header.height_px,
        created_ms=now_ms,
        expires_ms=now_ms + FILE_KEPT_MS,
    )


def _plain_name(text: str) -> str:
    """Keep the last part of a path, without what could mislead or walk."""
    given = text[-GIVEN_MAX_CHARS:]
    last = given.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return _printable(last).strip(" .")[:NAME_MAX_CHARS].rstrip(" .")


def _plain_path(text: str) -> str:
    """Keep a path as a label: a few names with slashes between them."""
    given = text[:GIVEN_MAX_CHARS].replace("\\", "/")
    parts = [_printable(part).strip(" .") for part in given.split("/")]
    path = "/".join(part for part in parts if part)
    return path[:UPLOAD_PATH_MAX_CHARS].rstrip("/ .")


def _printable(text: str) -> str:
    # Category C: control and format characters (also those that turn the direction
    # of what follows), lone surrogates, unassigned ones.
    kept = (c for c in text if unicodedata.category(c)[0] != "C")
    return unicodedata.normalize("NFC", "".join(kept))


def _with_extension(name: str, media_type: str) -> str:
    """Let a name end as its content is: a picture is never saved as ``.html``."""
    extensions = EXTENSIONS[media_type]
    if name.rpartition(".")[2].lower() in extensions and "." in name:
        return name
    ending = f".{extensions[0]}"
    return name[: NAME_MAX_CHARS - len(ending)] + ending


def _name_in(url: str) -> str | None:
    try:
        path = urlsplit(url).path
    except ValueError:
        return None
    return unquote(path).rpartition("/")[2] or None


def _quota_reached() -> InvalidRequestError:
    return InvalidRequestError(
        f"A tenant may have at most {FILES_MAX:,} files with "
        f"{FILES_MAX_BYTES_PER_TENANT:,} bytes together, and has no room for this one. "
        "Delete some, or wait until some expire.",
        code="file_quota_exceeded",
    )
