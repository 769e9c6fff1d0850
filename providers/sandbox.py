"""A pretend upstream that lives in the process: demos, tests, the playground.

It makes real pictures that show what was asked for: the prompt and, of an edit, its
references and mask. It fails in every way that an upstream can, as its settings say.
The settings can be changed while it runs.
"""

from __future__ import annotations

import asyncio
import io
import struct
import tempfile
import textwrap
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Annotated, Literal

import msgspec
from PIL import Image, ImageDraw, ImageFont

from providers.kit.contract import (
    Account,
    Billed,
    Cancelled,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    InputFile,
    MadeImage,
    Operation,
    Partial,
    Pending,
    ProviderError,
    Usage,
)
from providers.kit.payloads import raw_chunks
from providers.kit.spool import SpoolFolder
from providers.kit.streams import Emit, relayed
from providers.kit.wire import Tools

AUTO_SIZE_PX = (1024, 1024)
EDGE_MAX_PX = 4096
TOKENS_PER_LOOK = 100
"""What OpenAI charges for each partial picture that it sends."""
PROMPT_MAX_CHARS = 240
PAINTERS_MAX = 2
RETRY_AFTER_S = 5.0
REFERENCES_MAX = 16
DECODED_MAX_PX = 8 * 1024 * 1024
"""Of a file as it is decoded; a JPEG can be, at an eighth of its edges."""
OPENED_MAX_PX = 64 * 1024 * 1024
REFERENCE_EDGE_PX = 1024
THUMBNAIL_EDGE_PX = 256
FILE_IN_MEMORY_MAX_BYTES = 1024 * 1024


_KINDS = f"^(none|{'|'.join(kind.value for kind in FailureKind)})$"


class _Knobs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    latency_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)] = 200
    failure_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    failure_kind: Annotated[str, msgspec.Meta(pattern=_KINDS)] = "bad_gateway"
    usage: Literal["reported", "missing"] = "reported"
    images_short: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0
    stream: bool = True


class SandboxSettings:
    """How a sandbox behaves, and what was bought from it.

    ``latency_ms`` (0 to 600,000) is how long a job takes; a share of ``failure_rate``
    (0 to 1) of the jobs fails as ``failure_kind`` (a ``FailureKind``'s value, or
    ``none``); ``usage`` is ``reported`` or ``missing``; ``images_short`` pictures are
    missing in each answer; ``stream`` says whether it shows partial pictures.
    """

    def __init__(self, changes: Mapping[str, object] | None = None) -> None:
        self._knobs = _Knobs()
        self._jobs = 0
        self._images = 0
        self.change(changes or {})

    @property
    def knobs(self) -> _Knobs:
        """The settings as they are now."""
        return self._knobs

    def snapshot(self) -> dict[str, object]:
        """Tell all settings, and under ``purchases`` the jobs and images bought."""
        settings: dict[str, object] = msgspec.to_builtins(self._knobs)
        return settings | {"purchases": {"jobs": self._jobs, "images": self._images}}

    def change(self, changes: Mapping[str, object]) -> None:
        """Change the settings that are named, all or none.

        Raises:
            ValueError: the message names the setting that is wrong.
        """
        current: dict[str, object] = msgspec.to_builtins(self._knobs)
        try:
            self._knobs = msgspec.convert(current | dict(changes), _Knobs)
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error

    def buy(self, images: int) -> None:
        """Note a purchase."""
        self._jobs += 1
        self._images += images


def connect(account: Account, tools: Tools) -> Sandbox:
    """Build a sandbox; the account's options are its first settings.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    try:
        settings = SandboxSettings(account.options)
    except ValueError as error:
        raise ValueError(f"options: {error}") from error
    return Sandbox(account.name, tools.spools, tools.fraction, settings)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The pretend upstream. ``fraction`` draws from 0 up to 1 for the failure rate."""

    name: str
    spools: SpoolFolder
    fraction: Callable[[], float]
    settings: SandboxSettings
    _painters: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(PAINTERS_MAX)
    )

    def capabilities(self, model: str) -> Capabilities:  # noqa: ARG002 - the contract's; here all models are alike
        """Everything that the settings leave on."""
        return Capabilities(
            operations=frozenset(Operation),
            mask=True,
            references_max=REFERENCES_MAX,
            stream=self.settings.knobs.stream,
        )

    async def start(self, job: ImageJob) -> Done | Pending:
        """Paint the pictures, or fail as the settings say.

        A job counts as bought once it was not refused: who hangs up, or is told that
        the outcome is unknown, has bought it all the same.
        """
        return await self._work(job, None)

    async def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Paint as ``start`` does, and show the first picture get sharper.

        Who has seen something of a job that fails may have bought it.
        """
        if not self.settings.knobs.stream:
            yield await self._work(job, None)  # switched off while it runs
            return
        seen = 0

        async def work(emit: Emit) -> None:
            emit(await self._work(job, emit))

        async with aclosing(relayed(work)) as looks:
            try:
                async for look in looks:
                    seen += 1
                    yield look
            except ProviderError as error:
                if seen and error.billed is Billed.NO:
                    error.billed = Billed.MAYBE
                raise

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: nothing is ever pending here."""
        raise ProviderError(FailureKind.UNSUPPORTED, "the sandbox has no jobs to ask")

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:  # noqa: ARG002 - the contract's
        """Fail: nothing is ever pending here."""
        raise ProviderError(FailureKind.UNSUPPORTED, "the sandbox has no jobs to ask")

    async def probe(self, model: str, deadline_s: float) -> None:  # noqa: ARG002 - the contract's
        """Fail: there is no credential here, and nothing to ask."""
        raise ProviderError(FailureKind.UNSUPPORTED, "the sandbox has no credential")

    async def close(self) -> None:
        """Nothing to give back."""

    async def _work(self, job: ImageJob, emit: Emit | None) -> Done:
        knobs = self.settings.knobs
        if not _paintable(job):
            raise _failed(FailureKind.UNSUPPORTED)
        kind = self._drawn_failure(knobs)
        if kind in _AT_ONCE:
            raise _failed(kind)
        try:
            async with asyncio.timeout(job.deadline_s):
                scene = await self._look(job)
                if kind is not FailureKind.BAD_GATEWAY:
                    self.settings.buy(0 if kind is FailureKind.NO_OUTPUT else job.n)
                looks = await self._take_time(scene, knobs, emit)
                if kind is not None:
                    raise _failed(kind)
                return await self._deliver(scene, knobs, looks)
        except TimeoutError as error:
            raise ProviderError(FailureKind.TIMEOUT, "the deadline passed") from error

    async def _look(self, job: ImageJob) -> Scene:
        if job.operation is Operation.GENERATE:
            return Scene(job, self.name)
        async with self._painters:
            return await asyncio.to_thread(look, job, self.name, str(self.spools.path))

    async def _take_time(self, scene: Scene, knobs: _Knobs, emit: Emit | None) -> int:
        # Tells how many looks were shown on the way.
        looks = scene.job.partial_images if emit is not None else 0
        pause_s = knobs.latency_ms / 1000 / (looks + 1)
        for index in range(looks):
            await asyncio.sleep(pause_s)
            file = await self._painted(scene, 1, blur=2 ** (looks - index))
            if emit is not None:
                emit(Partial(index, self._spooled(scene.job, [file])[0]))
        await asyncio.sleep(pause_s)
        return looks

    async def _painted(self, scene: Scene, number: int, *, blur: int = 1) -> bytes:
        async with self._painters:
            return await asyncio.to_thread(paint, scene, number, blur=blur)

    def _drawn_failure(self, knobs: _Knobs) -> FailureKind | None:
        if knobs.failure_kind == "none" or self.fraction() >= knobs.failure_rate:
            return None
        return FailureKind(knobs.failure_kind)

    async def _deliver(self, scene: Scene, knobs: _Knobs, looks: int) -> Done:
        job = scene.job
        count = job.n - knobs.images_short
        if count <= 0:
            raise _failed(FailureKind.NO_OUTPUT)
        files = [await self._painted(scene, number + 1) for number in range(count)]
        return Done(
            images=self._spooled(job, files),
            usage=_usage(job, count, looks) if knobs.usage == "reported" else None,
            upstream_request_id=f"sandbox-{job.task_id}",
            quality=job.quality if job.quality != "auto" else None,
            background="transparent" if _is_transparent(job) else "opaque",
        )

    def _spooled(self, job: ImageJob, files: list[bytes]) -> tuple[MadeImage, ...]:
        images: list[MadeImage] = []
        try:
            for file in files:
                spool = self.spools.from_bytes(file)
                media_type = f"image/{job.output_format}"
                images.append(MadeImage(spool, media_type, *_size_px(job)))
        except OSError as error:
            for image in images:
                image.payload.close()
            detail = f"no room for the picture: {error.strerror}"
            raise ProviderError(FailureKind.RESULT_LOST, detail) from error
        return tuple(images)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a job's pictures show. Of an edit, what its files look like, scaled down.

    ``kept`` is white where the mask keeps the first reference, black elsewhere.
    """

    job: ImageJob
    upstream: str
    first: Image.Image | None = None
    others: tuple[Image.Image, ...] = ()
    kept: Image.Image | None = None


def look(job: ImageJob, upstream: str, folder: str) -> Scene:
    """Decode the files of an edit, one after the other, and keep small copies.

    Raises:
        ProviderError: INVALID_REQUEST, one cannot be decoded.
    """
    first, *others = (
        _decoded(
            reference,
            f"reference image {number}",
            folder,
            edge_px=REFERENCE_EDGE_PX if number == 1 else THUMBNAIL_EDGE_PX,
        )
        for number, reference in enumerate(job.references, start=1)
    )
    kept = None
    if job.mask is not None:
        mask = _decoded(job.mask, "mask", folder, edge_px=REFERENCE_EDGE_PX)
        kept = mask.getchannel("A").point(lambda alpha: alpha // 128 * 255)
    return Scene(job, upstream, first, tuple(others), kept)


def paint(scene: Scene, number: int, *, blur: int = 1) -> bytes:
    """Make one picture file that says what it was made of.

    ``blur`` is how many pixels go into one.
    """
    job = scene.job
    image = _canvas(scene)
    width_px, height_px = image.size
    text = _text_mask(scene, f"{number}/{job.n}", width_px / height_px)
    scale = min(width_px / text.width, height_px / text.height)
    text = text.resize((int(text.width * scale) or 1, int(text.height * scale) or 1))
    image.paste(_INK if image.mode == "P" else _WHITE, (0, 0), text)
    if blur > 1:
        image = _blurred(image, blur)
    return _encoded(image, job)


def _decoded(file: InputFile, what: str, folder: str, *, edge_px: int) -> Image.Image:
    if file.width_px * file.height_px > OPENED_MAX_PX:
        return _stand_in(edge_px)
    with tempfile.SpooledTemporaryFile(FILE_IN_MEMORY_MAX_BYTES, dir=folder) as copy:
        try:
            _copy(file, copy)
            with Image.open(copy, formats=["PNG", "JPEG", "WEBP"]) as image:
                image.draft("RGB", (edge_px, edge_px))
                if image.width * image.height > DECODED_MAX_PX:
                    return _stand_in(edge_px)
                image.thumbnail((edge_px, edge_px))
                return image.convert("RGBA")
        except _UNDECODABLE as error:
            raise ProviderError(
                FailureKind.INVALID_REQUEST,
                f"the {what} cannot be decoded: {error}",
                status=400,
                upstream_code="invalid_image_file",
                client_message=f"The {what} cannot be decoded.",
            ) from error


def _copy(file: InputFile, target: IO[bytes]) -> None:
    """Make a file that can be read back and forth, as decoding needs it."""
    try:
        for chunk in raw_chunks(file.payload):
            target.write(chunk)
        target.seek(0)
    except OSError as error:
        raise ProviderError(
            FailureKind.OVERLOADED, f"no room for a reference: {error.strerror}"
        ) from error


def _stand_in(edge_px: int) -> Image.Image:
    """Stand for what is too large to decode: grey as a picture, clear as a mask."""
    return Image.new("RGBA", (edge_px, edge_px), (128, 128, 128, 0))


def _canvas(scene: Scene) -> Image.Image:
    """Few colours, blown up, are cheap at any size; an edit needs them all."""
    size = _size_px(scene.job)
    plain = _gradient(*size, scene.job.quality)
    if scene.first is None:
        return plain
    image = scene.first.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    if scene.kept is not None:
        kept = scene.kept.resize(size, Image.Resampling.NEAREST)
        image = Image.composite(image, plain.convert("RGB"), kept)
    _hang_up(image, scene.others)
    return image


def _hang_up(image: Image.Image, thumbnails: tuple[Image.Image, ...]) -> None:
    """Put small pictures in a row along the lower edge."""
    place = max(image.width // REFERENCES_MAX, 1)
    for index, thumbnail in enumerate(thumbnails):
        scale = place / max(thumbnail.size)
        small = thumbnail.resize(
            (int(thumbnail.width * scale) or 1, int(thumbnail.height * scale) or 1)
        )
        corner = (index * place, image.height - small.height)
        image.paste(small.convert("RGB"), corner)


def _blurred(image: Image.Image, blur: int) -> Image.Image:
    small = image.convert("RGB").reduce(blur * 4)
    return small.resize(image.size, Image.Resampling.BILINEAR)


def _encoded(image: Image.Image, job: ImageJob) -> bytes:
    if _is_transparent(job):
        if image.mode == "P":
            image.info["transparency"] = _FADE
        else:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
    file = io.BytesIO()
    if job.output_format == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        level = 80 if job.output_compression is None else job.output_compression
        image = image.convert("RGBA" if _is_transparent(job) else "RGB")
        image.save(file, job.output_format, quality=level, method=0)
    return file.getvalue()


# All that Pillow lets out when a file is damaged. A broken payload is a ValueError.
_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
_INK = 255
_WHITE = (255, 255, 255)
_TINTS = {"low": (120, 70, 40), "medium": (40, 120, 90), "high": (60, 80, 160)}
_TINT = (120, 60, 140)
_TEXT_EDGE_PX = 1024
_FONT_PX = 40
_BANDS = 192
_FADE = bytes(max(band - 64, 0) for band in range(_BANDS))
"""Alpha of each band: nothing at the top, then more and more."""


def _gradient(width_px: int, height_px: int, quality: str) -> Image.Image:
    tint = _TINTS.get(quality, _TINT)
    palette = [
        min(255, channel * (48 + level) // 128)
        for level in range(_INK)
        for channel in tint
    ]
    bands = Image.new("P", (1, _BANDS))
    bands.putdata(range(_BANDS))
    bands.putpalette([*palette, 255, 255, 255])
    return bands.resize((width_px, height_px), Image.Resampling.NEAREST)


def _text_mask(scene: Scene, number: str, aspect: float) -> Image.Image:
    job = scene.job
    long, short = _TEXT_EDGE_PX, max(int(_TEXT_EDGE_PX / max(aspect, 1 / aspect)), 128)
    size = (long, short) if aspect >= 1 else (short, long)
    mask = Image.new("1", size)
    prompt = job.prompt[:PROMPT_MAX_CHARS].encode(errors="replace").decode()
    columns = max(size[0] // (_FONT_PX // 2) - 2, 4)
    made = "{}x{}".format(*_size_px(job))
    lines = [
        *textwrap.wrap(f"{made} {job.quality} {scene.upstream} {number}", columns),
        "",
        *textwrap.wrap(prompt, columns),
    ]
    ImageDraw.Draw(mask).multiline_text(
        (_FONT_PX // 2, _FONT_PX // 2), "\n".join(lines), fill=1, font=_font()
    )
    return mask


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_FONT_PX)


def _size_px(job: ImageJob) -> tuple[int, int]:
    if job.width_px is None or job.height_px is None:
        return AUTO_SIZE_PX
    return job.width_px, job.height_px


def _paintable(job: ImageJob) -> bool:
    width_px, height_px = _size_px(job)
    edit = job.operation is Operation.EDIT
    return (
        (not edit or 1 <= len(job.references) <= REFERENCES_MAX)
        and 0 < width_px <= EDGE_MAX_PX
        and 0 < height_px <= EDGE_MAX_PX
    )


def _is_transparent(job: ImageJob) -> bool:
    return job.background == "transparent" and job.output_format != "jpeg"


def _usage(job: ImageJob, count: int, looks: int) -> Usage:
    of_looks = Usage(image_output=TOKENS_PER_LOOK * looks)
    return job.expected.times(count).plus(of_looks)


def _failed(kind: FailureKind) -> ProviderError:
    """Fail as a real upstream would: same status, same code."""
    status, code = _ANSWERS[kind]
    limited = kind is FailureKind.RATE_LIMITED
    return ProviderError(
        kind,
        f"the sandbox was told to fail: {kind.value}",
        status=status,
        upstream_code=code,
        retry_after_s=RETRY_AFTER_S if limited else None,
        client_message=_MESSAGES.get(kind),
    )


_ANSWERS: Mapping[FailureKind, tuple[int | None, str | None]] = {
    FailureKind.INVALID_REQUEST: (400, "invalid_value"),
    FailureKind.CONTENT_POLICY: (400, "moderation_blocked"),
    FailureKind.UNSUPPORTED: (404, "model_not_found"),
    FailureKind.AUTH: (401, "invalid_api_key"),
    FailureKind.INSUFFICIENT_FUNDS: (429, "insufficient_quota"),
    FailureKind.RATE_LIMITED: (429, "rate_limit_exceeded"),
    FailureKind.OVERLOADED: (503, "server_is_overloaded"),
    FailureKind.BAD_GATEWAY: (502, None),
    FailureKind.NETWORK: (None, None),
    FailureKind.TIMEOUT: (None, None),
    FailureKind.NO_OUTPUT: (200, None),
    FailureKind.RESULT_LOST: (404, None),
}
_MESSAGES: Mapping[FailureKind, str] = {
    FailureKind.INVALID_REQUEST: "The sandbox was told to call this request invalid.",
    FailureKind.CONTENT_POLICY: "The sandbox was told to refuse this as unsafe.",
}
_AT_ONCE = frozenset(FailureKind) - {
    FailureKind.BAD_GATEWAY,
    FailureKind.TIMEOUT,
    FailureKind.NO_OUTPUT,
    FailureKind.RESULT_LOST,
}
"""Refused before any work; the rest fail when the latency is over."""
