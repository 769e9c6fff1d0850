"""The answers of OpenAI-style images APIs: pictures at once, or one look after another.

For every adapter that speaks this API, whatever its URLs and credentials look like.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from providers.kit.answers import Answer, AnswerReader, Picture
from providers.kit.contract import (
    Billed,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Partial,
    ProviderError,
    Usage,
)
from providers.kit.events import Event, EventReader
from providers.kit.pictures import collected, fetched, made
from providers.kit.refusals import judge_body
from providers.kit.replies import Fields, decoded, readable, unreadable
from providers.kit.streams import Emit, relayed
from providers.kit.usages import read_usage
from providers.kit.wire import Call, Download, Reply, Tools

COMPLETED = frozenset({"image_generation.completed", "image_edit.completed"})
PARTIAL = frozenset({"image_generation.partial_image", "image_edit.partial_image"})

Quality = Literal["low", "medium", "high", "xhigh", "max"]
Background = Literal["opaque", "transparent"]
Chunks = AsyncGenerator[bytes, None]
Judge = Callable[[int, Mapping[str, str], object, str], ProviderError]
"""Classifies an error by status, headers, decoded body; the secret is kept out."""

_INDEX_MAX = 1000


@dataclass(frozen=True, slots=True)
class ImagesApi:
    """Asks, and reads what is answered.

    ``hosts`` may be asked for pictures that come as a link. ``usage_is_true`` says
    whether to believe the reported tokens. What servers write in words of their own is
    read by ``judge`` (an error), and by ``tokens_of`` and ``nanousd_of`` (the ``usage``
    object); ``id_header`` is where they give a call its name, in lower case.
    """

    tools: Tools
    hosts: frozenset[str]
    usage_is_true: bool
    judge: Judge = judge_body
    tokens_of: Callable[[object], Usage | None] = read_usage
    nanousd_of: Callable[[object], int | None] = lambda _: None
    id_header: str = "x-request-id"

    async def ask(self, call: Call, n: int) -> Done:
        """Make a call that answers when all is done."""
        harvest = _Harvest(call, n, self.judge)
        try:
            async with self.tools.wire.exchange(call) as reply:
                await _check(reply, harvest)
                async with aclosing(reply.chunks()) as chunks:
                    await self._read_answer(harvest, reply, b"", chunks)
            return await self._done(harvest, reply)
        finally:
            harvest.close()

    def follow(self, call: Call, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Make a call that shows partial pictures; more than were asked for are not.

        A server that knows no streams and answers as ever is understood. A stream
        that breaks off when some of the pictures are finished delivers those.
        """

        async def work(emit: Emit) -> None:
            looks = _Looks(emit, job.partial_images * job.n)
            harvest = _Harvest(call, job.n, self.judge, looks)
            try:
                emit(await self._followed(harvest))
            except ProviderError as error:
                if looks.seen and error.billed is Billed.NO:
                    # It was at work already.
                    error.billed = Billed.MAYBE
                raise
            finally:
                harvest.close()

        return relayed(work)

    async def _followed(self, harvest: _Harvest) -> Done:
        reply: Reply | None = None
        try:
            async with self.tools.wire.exchange(harvest.call) as reply:
                await _check(reply, harvest)
                # Nobody knows how long the next look takes.
                async with aclosing(reply.chunks(paced=False)) as chunks:
                    await self._read_either(harvest, reply, chunks)
        except ProviderError:
            if reply is None or not harvest.items:
                raise
            harvest.broken_off = True
        return await self._done(harvest, reply)

    async def _read_either(
        self, harvest: _Harvest, reply: Reply, chunks: Chunks
    ) -> None:
        start = b""
        async for chunk in chunks:
            start += chunk
            if start.strip():
                break
        read = self._read_events if _speaks_events(reply, start) else self._read_answer
        await read(harvest, reply, start, chunks)

    async def _read_answer(
        self, harvest: _Harvest, reply: Reply, start: bytes, chunks: Chunks
    ) -> None:
        reader = AnswerReader(self.tools.spools)
        try:
            with readable(reply):
                reader.feed(start)
                async for chunk in chunks:
                    reader.feed(chunk)
                answer = reader.finish()
        finally:
            reader.close()
        harvest.answers.append(answer)
        if not isinstance(answer.body, dict):
            raise unreadable("the answer is no object", reply.status)
        harvest.add(answer, answer.body)

    async def _read_events(
        self, harvest: _Harvest, reply: Reply, start: bytes, chunks: Chunks
    ) -> None:
        reader = EventReader(self.tools.spools)
        harvest.is_stream = True
        try:
            with readable(reply):
                _take_events(reader.feed(start), harvest, reply)
                while not harvest.is_over:
                    chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    _take_events(reader.feed(chunk), harvest, reply)
                if not harvest.is_over:
                    _take_events(reader.finish(), harvest, reply)
        finally:
            reader.close()

    async def _done(self, harvest: _Harvest, reply: Reply) -> Done:
        # Nobody asked, nor pays, for more than n.
        images, lost = await collected(
            harvest.items[: harvest.n], partial(self._image, harvest.call)
        )
        if not images:
            raise _why_nothing(harvest, reply, lost)
        # The usage of a picture that cannot be delivered is not the tenant's.
        whole = lost is None and harvest.is_whole
        body = harvest.body
        return Done(
            images=tuple(images),
            usage=self.tokens_of(harvest.usage)
            if whole and self.usage_is_true
            else None,
            # The account pays for what was made, whatever became of it.
            cost_nanousd=None if harvest.broken_off else self.nanousd_of(harvest.usage),
            upstream_request_id=reply.headers.get(self.id_header)
            or reply.headers.get("apim-request-id"),
            quality=_known(body.get("quality"), get_args(Quality)),
            background=_known(body.get("background"), get_args(Background)),
        )

    async def _image(
        self, call: Call, found: tuple[Answer, Fields]
    ) -> MadeImage | None:
        answer, item = found
        url = item.get("url")
        picture = _picture(answer, item)
        if picture is None and isinstance(url, str) and "/" in url:
            download = Download(url, self.hosts, call.deadline_at_s, secret=call.secret)
            picture = await fetched(download, self.tools)
        return made(picture, item.get("revised_prompt")) if picture else None


@dataclass(slots=True)
class _Looks:
    """Shows partial pictures, up to ``left`` of them."""

    emit: Emit
    left: int
    seen: int = 0

    def take(self, answer: Answer, body: Fields) -> None:
        index = body.get("partial_image_index")
        if type(index) is not int or not 0 <= index <= _INDEX_MAX:
            index = self.seen
        self.seen += 1
        picture = _picture(answer, body) if self.left > 0 else None
        if picture is not None:
            self.left -= 1
            self.emit(Partial(index, made(picture)))


@dataclass(slots=True)
class _Harvest:
    """What came of a call so far. ``body`` is the last that told of the pictures."""

    call: Call
    n: int
    judge: Judge
    looks: _Looks | None = None
    answers: list[Answer] = field(default_factory=list)
    items: list[tuple[Answer, Fields]] = field(default_factory=list)
    body: Fields = field(default_factory=dict)
    usages: list[object] = field(default_factory=list)
    is_stream: bool = False
    is_over: bool = False
    broken_off: bool = False

    @property
    def usage(self) -> object:
        """The tokens of all pictures together.

        Where several events tell some, they could be parts or totals: nobody knows.
        """
        told = [usage for usage in self.usages if usage is not None]
        return told[0] if len(told) == 1 and self.usages[-1] is told[0] else None

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(fault for answer in self.answers for fault in answer.faults)

    @property
    def is_whole(self) -> bool:
        return len(self.items) <= self.n and not self.faults and not self.broken_off

    def add(self, answer: Answer, body: Fields) -> None:
        """Take a whole answer, or the event of one picture."""
        items = _items(body) if "data" in body or not self.is_stream else [body]
        self.items += [(answer, item) for item in items]
        self.body = body
        self.usages.append(body.get("usage"))
        # A stream is not read to its end: some never end it.
        self.is_over = self.is_stream and len(self.items) >= self.n

    def refused(self, reply: Reply, body: object) -> ProviderError:
        return self.judge(reply.status, reply.headers, body, self.call.secret)

    def close(self) -> None:
        for answer in self.answers:
            answer.close()


def _take_events(events: Iterator[Event], harvest: _Harvest, reply: Reply) -> None:
    for event in events:
        answer = event.answer
        if answer is None:
            harvest.is_over = True
            return
        harvest.answers.append(answer)
        _take_event(event.name, answer, harvest, reply)
        if harvest.is_over:
            return


def _take_event(name: str, answer: Answer, harvest: _Harvest, reply: Reply) -> None:
    body = answer.body
    assert isinstance(body, dict), "an event's data is an object"
    kind = body.get("type") or name
    if kind == "error" or body.get("error"):
        raise harvest.refused(reply, body)
    if kind in COMPLETED or "data" in body:
        harvest.add(answer, body)
        return
    if kind in PARTIAL and harvest.looks is not None:
        harvest.looks.take(answer, body)
    # A look that is broken, or was not asked for, says nothing of the result.
    harvest.answers.remove(answer)
    answer.close()


def _why_nothing(
    harvest: _Harvest, reply: Reply, lost: ProviderError | None
) -> ProviderError:
    if harvest.body.get("error"):
        return harvest.refused(reply, harvest.body)
    if harvest.faults:
        return unreadable(f"pictures: {'; '.join(harvest.faults)}", reply.status)
    if lost is not None:
        return lost
    if harvest.is_stream and not harvest.is_over:
        return ProviderError(
            FailureKind.TIMEOUT,
            "the stream ended without a finished picture",
            status=reply.status,
        )
    if not harvest.is_stream and "data" not in harvest.body:
        return unreadable("an object that is no images answer", reply.status)
    return ProviderError(
        FailureKind.NO_OUTPUT, "a success without a picture", status=reply.status
    )


async def _check(reply: Reply, harvest: _Harvest) -> None:
    if not reply.is_success:
        raise harvest.refused(reply, decoded(await reply.error_body()))


def _speaks_events(reply: Reply, start: bytes) -> bool:
    """Tell events from an answer; relays send either with the other's type."""
    first = start.strip()[:1]
    if first in {b"{", b"["}:
        return False
    told = reply.headers.get("content-type", "").lower()
    return told.startswith("text/event-stream") or first in {b":", b"d", b"e"}


def _picture(answer: Answer, item: Fields) -> Picture | None:
    return answer.take(item.get("b64_json")) or answer.take(item.get("url"))


def _items(body: Fields) -> list[Fields]:
    data = body.get("data")
    return [i for i in data if isinstance(i, dict)] if isinstance(data, list) else []


def _known(value: object, words: tuple[str, ...]) -> str | None:
    return value if isinstance(value, str) and value in words else None
