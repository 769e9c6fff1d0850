"""Pictures in an object store: S3 and what speaks like it; also Google's and Azure's.

Nothing is ever half there: a picture appears when its last byte was taken. What is no
longer than one part goes up in one request. What is longer goes up in parts, which are
taken back if it does not come to an end; those of a process that died are the store's
to clear away (docs/pictures.md).

Each gateway has a folder of its own in the bucket, named after its secret: gateways
that share a bucket do not see each other's pictures, replicas of one see the same.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from gateway.core.errors import StoreAwayError, store_away
from gateway.core.events import Event, StoreChanged
from gateway.core.tasks import is_task_id, made_ms
from providers.kit.contract import MadeImage, Payload
from providers.kit.payloads import raw_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore import GetOptions, ObjectMeta
    from obstore.store import S3Config

PART_BYTES = 8 * 1024 * 1024
"""Of a picture on its way up; so much of each lies in memory, at most three times."""
PUTS_MAX = 8
GETS_MAX = 64
WINDOW_MIN_BYTES = 64 * 1024
WINDOW_MAX_BYTES = 2 * 1024 * 1024
WINDOWS_BYTES = 64 * 1024 * 1024
"""What all readers together hold of their pictures, if they are not too many."""
LIST_PAGE = 1_000
FOLDER_CHARS = 16
TEXT_MAX_CHARS = 200
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]+)")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the store is waited for, in seconds."""

    connect_s: float = 3.0
    request_s: float = 20.0
    """One HTTP request, its body included."""
    retries: int = 2
    call_s: float = 30.0
    """One thing that is wanted, with all retries."""
    upload_s: float = 120.0
    """A picture that goes up in parts."""
    look_s: float = 10.0
    """Finding out how the store is."""


PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Address:
    """Where a bucket is. What is empty is looked for as the platform has it.

    ``url`` is s3://bucket/prefix, gs:// or az://; the rest is of use with s3:// only.
    """

    url: str
    endpoint: str = ""
    region: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def where(self) -> str:
        """What to look at when it does not answer."""
        return self.endpoint or self.url

    def connect(self, patience: Patience) -> ObjectStore:
        """Make a client; nothing is sent yet."""
        options = {
            "endpoint": self.endpoint,
            "region": self.region,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
        }
        given = {name: value for name, value in options.items() if value}
        config = cast("S3Config | None", given or None)
        return from_url(
            self.url.rstrip("/"),
            config=config,
            client_options={
                "allow_http": self.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=patience.connect_s),
                "timeout": timedelta(seconds=patience.request_s),
                "user_agent": "imageway",
            },
            retry_config={
                "max_retries": patience.retries,
                "retry_timeout": timedelta(seconds=patience.call_s),
            },
        )


class Bucket:
    """A gateway's folder in a bucket, and what is known of how the store is."""

    def __init__(
        self,
        address: Address,
        secret: bytes,
        emit: Callable[[Event], None],
        patience: Patience = PATIENCE,
    ) -> None:
        self.address = address
        self.patience = patience
        self.store = address.connect(patience)
        self.folder = hmac.digest(secret, b"pictures", "sha256").hex()[:FOLDER_CHARS]
        self.puts = asyncio.Semaphore(PUTS_MAX)
        self.gets = asyncio.Semaphore(GETS_MAX)
        self.readers = 0
        self._emit = emit
        self._trouble: str | None = None

    @property
    def window_bytes(self) -> int:
        """How much a reader takes at once: the less, the more of them there are."""
        share = WINDOWS_BYTES // max(self.readers, 1)
        return min(max(share, WINDOW_MIN_BYTES), WINDOW_MAX_BYTES)

    async def trouble(self) -> str | None:
        """Say what keeps pictures from being stored, as far as is known by now."""
        return self._trouble

    async def look(self) -> None:
        """Find out how the store is, by writing to it."""
        try:
            async with self.putting(self.patience.look_s):
                await obstore.put_async(
                    self.store, f"{self.folder}/alive", b"", use_multipart=False
                )
        except StoreAwayError as error:
            self._know(str(error.__cause__))
        else:
            self._know(None)

    async def glance(self) -> str | None:
        """Say what is wrong, as far as can be seen without writing."""
        try:
            async with self.asking(self.patience.look_s):
                await anext(obstore.list(self.store, self.folder, chunk_size=1), None)
        except StoreAwayError as error:
            return str(error.__cause__)
        return None

    @asynccontextmanager
    async def putting(self, at_most_s: float) -> AsyncIterator[None]:
        """Ask the store to take something.

        Raises:
            StoreAwayError: as ``asking``, or there is no bucket to put it into.
        """
        try:
            async with self.asking(at_most_s):
                yield
        except FileNotFoundError as error:
            sentence = f"there is no bucket {self.address.bucket}: make it"
            raise store_away() from _TroubleError(sentence, error)

    @asynccontextmanager
    async def asking(self, at_most_s: float) -> AsyncIterator[None]:
        """Ask something of the store; what is not there is told as it is.

        Raises:
            FileNotFoundError: there is no such object.
            StoreAwayError: it failed, or took too long; its cause says why.
        """
        try:
            async with asyncio.timeout(at_most_s):
                yield
        except TimeoutError as error:
            raise store_away() from _TroubleError(
                f"the store does not answer within {at_most_s:g} s: see that it runs, "
                f"and that {self.address.where} can be reached from here",
                error,
            )
        except FileNotFoundError as error:
            if _code_of(error) != "NoSuchBucket":
                raise
            raise store_away() from _TroubleError(_sentence(error, self.address), error)
        except (BaseError, OSError) as error:
            raise store_away() from _TroubleError(_sentence(error, self.address), error)

    def _know(self, trouble: str | None) -> None:
        if (trouble is None) != (self._trouble is None):
            state = "back" if trouble is None else "away"
            self._emit(StoreChanged(state, trouble))
        self._trouble = trouble


class _TroubleError(Exception):
    """What is wrong with the store, in words for an operator; made of what it said."""

    def __init__(self, sentence: str, error: Exception) -> None:
        super().__init__(sentence)
        self.__cause__ = error


def _sentence(error: Exception, at: Address) -> str:
    """Say to an operator what is wrong, and what to do."""
    text, code = f"{type(error).__name__} {error}", _code_of(error)
    for sign, sentence in _SENTENCES:
        if re.search(sign, text):
            names = {"code": code or "access denied", "bucket": at.bucket}
            return sentence.format(where=at.where, url=at.url, **names)
    status = _STATUS.search(text)
    said = code or (status[1].strip() if status else "")
    first = said or str(error).partition("\n")[0][:TEXT_MAX_CHARS]
    return f"the store at {at.where} answers with an error: {first}"


_SENTENCES = (
    (
        "<Code>NoSuchBucket<",
        "there is no bucket {bucket}: make it, or correct storage.results",
    ),
    (
        "<Code>(InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|ExpiredToken)<",
        (
            "the store does not take the credential ({code}): correct "
            "storage.results_access_key and storage.results_secret_key"
        ),
    ),
    (
        r"http://169\.254\.169\.254/",  # asked for a role, having found nothing else
        (
            "there is no credential for the store: set storage.results_access_key and "
            "storage.results_secret_key, or give this machine a role"
        ),
    ),
    (
        "^(PermissionDenied|Permission|Unauthenticated)Error|<Code>AccessDenied<",
        (
            "the store refuses the gateway ({code}): its credential needs the right to "
            "put, get, delete and list objects in {url}"
        ),
    ),
    (
        "Received redirect|<Code>(PermanentRedirect|AuthorizationHeaderMalformed)<",
        "the bucket {bucket} is in another region: set storage.results_region",
    ),
    (
        "kind: Connect",
        (
            "the store at {where} cannot be reached: see that it runs, and that "
            "storage.results_endpoint is right"
        ),
    ),
    ("kind: Timeout", "the store at {where} is too slow: see how it is doing"),
)


def _code_of(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


class ObjectBlob:
    """A picture that is read from the store window by window."""

    def __init__(
        self, bucket: Bucket, key: str, size_bytes: int, tag: str | None
    ) -> None:
        self.size_bytes = size_bytes
        self._bucket = bucket
        self._key = key
        self._tag = tag
        self._start = 0
        self._window = b""
        self._closed = False
        bucket.readers += 1

    def begin(self, window: bytes) -> None:
        """Take the start of the file, which came with its length."""
        self._window = window

    async def read(self, offset: int, length: int) -> bytes:
        """Read a part of the file.

        Raises:
            ServiceUnavailableError: the store does not give it, or not the same file.
        """
        stop = min(offset + length, self.size_bytes)
        pieces = []
        while offset < stop:
            at = offset - self._start
            if not 0 <= at < len(self._window):
                await self._move(offset)
                continue
            pieces.append(self._window[at : at + stop - offset])
            offset += len(pieces[-1])
        return b"".join(pieces)

    def close(self) -> None:
        """Give memory back."""
        if not self._closed:
            self._closed = True
            self._window = b""
            self._bucket.readers -= 1

    async def _move(self, offset: int) -> None:
        bucket = self._bucket
        stop = min(offset + bucket.window_bytes, self.size_bytes)
        try:
            _, self._window = await _fetch(bucket, self._key, offset, stop, self._tag)
        except FileNotFoundError as error:
            raise store_away() from error  # deleted while it was read
        if not self._window:
            raise store_away()  # shorter than the store said
        self._start = offset


@dataclass(frozen=True, slots=True)
class ObjectBlobs:
    """Implements ``BlobStore`` in a folder of a bucket, such as ``results``.

    Every picture is stored as its file; ``as_it_came`` makes no difference here.
    """

    bucket: Bucket
    kind: str

    async def keep(
        self, blob: str, image: MadeImage, *, as_it_came: bool = False
    ) -> int:
        """Store a picture; it is there for good when this returns.

        Raises:
            StoreAwayError: the store does not take it.
        """
        del as_it_came
        return await self.keep_file(blob, image.payload)

    async def keep_file(self, blob: str, content: Payload) -> int:
        """Store a file; it is there for good, and whole, when this returns.

        Raises:
            StoreAwayError: the store does not take it.
        """
        bucket = self.bucket
        if await bucket.trouble() is not None:
            raise store_away()  # nobody waits to be told the same
        try:
            return await self._put(self._key(blob), content)
        except StoreAwayError:
            # One that failed says little of the others: they wait for this answer.
            await bucket.look()
            raise

    async def _put(self, key: str, content: Payload) -> int:
        bucket, parts = self.bucket, _parts(content)
        is_long = content.size_bytes >= PART_BYTES
        at_most_s = bucket.patience.upload_s if is_long else bucket.patience.call_s
        async with bucket.putting(at_most_s), bucket.puts:
            first = await asyncio.to_thread(next, parts, b"")
            if len(first) == PART_BYTES:
                return await self._put_parts(key, first, parts)
            await obstore.put_async(bucket.store, key, first, use_multipart=False)
            return len(first)

    async def _put_parts(self, key: str, part: bytes, parts: Iterator[bytes]) -> int:
        size_bytes = 0
        writer = obstore.open_writer_async(
            self.bucket.store, key, buffer_size=PART_BYTES, max_concurrency=1
        )
        # Whatever ends it early, its cancellation too, takes back what is up there.
        async with writer:
            while part:
                await writer.write(part)
                size_bytes += len(part)
                part = await asyncio.to_thread(next, parts, b"")
        return size_bytes

    async def open(self, blob: str) -> ObjectBlob | None:
        """Open a stored picture; its start comes with the same request.

        Raises:
            StoreAwayError: the store does not answer.
        """
        if not _NAME.fullmatch(blob):
            return None
        key = self._key(blob)
        try:
            meta, start = await _fetch(
                self.bucket, key, 0, self.bucket.window_bytes, None
            )
        except FileNotFoundError:
            return None
        tag = meta["e_tag"]
        if tag is not None and tag.startswith("W/"):
            tag = None  # a weak one matches nothing (RFC 9110, 13.1.1)
        opened = ObjectBlob(self.bucket, key, meta["size"], tag)
        opened.begin(start)
        return opened

    async def delete(self, blob: str) -> None:
        """Forget a picture.

        Raises:
            StoreAwayError: the store does not answer.
        """
        with suppress(FileNotFoundError):
            async with self.bucket.asking(self.bucket.patience.call_s):
                await obstore.delete_async(self.bucket.store, self._key(blob))

    async def exists(self, blob: str) -> bool:
        """Tell whether a picture is there; yes, if the store cannot be asked.

        Then a link is given that may work later, rather than none.
        """
        bucket = self.bucket
        try:
            async with bucket.asking(bucket.patience.call_s), bucket.gets:
                await obstore.head_async(bucket.store, self._key(blob))
        except FileNotFoundError:
            # Of a bucket that is not there this says the same.
            return await bucket.trouble() is not None
        except StoreAwayError:
            return True
        return True

    async def expire(self, before_ms: int) -> int:
        """Delete what was stored before a time; returns how many tasks' or files.

        Names of tasks begin with the time when they were made, and stores list by
        name: what is too young is not even looked at.

        Raises:
            StoreAwayError: the store does not answer; the next run goes on.
        """
        bucket, gone = self.bucket, set[str]()
        folder = f"{bucket.folder}/{self.kind}/"
        pages = obstore.list(bucket.store, prefix=folder, chunk_size=LIST_PAGE)
        while True:
            async with bucket.asking(bucket.patience.call_s):
                page = await anext(pages, None)
            if not page:
                return len(gone)
            old = [m["path"] for m in page if _written_ms(m) < before_ms]
            if old:
                async with bucket.asking(bucket.patience.call_s):
                    await obstore.delete_async(bucket.store, old)
            gone |= {path.removeprefix(folder).partition("/")[0] for path in old}
            if _reaches(before_ms, folder, page):
                return len(gone)

    def _key(self, blob: str) -> str:
        assert _NAME.fullmatch(blob), blob
        return f"{self.bucket.folder}/{self.kind}/{blob}"


async def _fetch(
    bucket: Bucket, key: str, start: int, stop: int, tag: str | None
) -> tuple[ObjectMeta, bytes]:
    options: GetOptions = {"range": (start, stop)}
    if tag is not None:
        options["if_match"] = tag
    async with bucket.asking(bucket.patience.call_s), bucket.gets:
        found = await obstore.get_async(bucket.store, key, options=options)
        return found.meta, bytes(await found.bytes_async())


def _parts(content: Payload) -> Iterator[bytes]:
    """Cut a file into parts of ``PART_BYTES``; the last may be shorter."""
    part = bytearray()
    for chunk in raw_chunks(content):
        part += chunk
        if len(part) >= PART_BYTES:
            with memoryview(part) as view:
                whole = bytes(view[:PART_BYTES])
            yield whole
            del part[:PART_BYTES]
    if part:
        yield bytes(part)


def _written_ms(meta: ObjectMeta) -> float:
    return meta["last_modified"].timestamp() * 1000


def _reaches(before_ms: int, folder: str, page: Sequence[ObjectMeta]) -> bool:
    """Tell whether nothing that is listed after a page can be older than a time."""
    names = [meta["path"] for meta in page]
    last = names[-1].removeprefix(folder).partition("/")[0]
    in_order = names == sorted(names)
    return in_order and is_task_id(last) and made_ms(last) >= before_ms
