"""A pretend upstream that lives in the process: demos, tests, the playground.

It makes real pictures that show what was asked for, and fails in every way that an
upstream can, as its settings say. The settings can be changed while it runs.
"""

from __future__ import annotations

import asyncio
import io
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

import msgspec
from PIL import Image, ImageDraw, ImageFont

from providers.kit.contract import (
    Account,
    Capabilities,
    Done,
    FailureKind,
    ImageJob,
    MadeImage,
    Operation,
    Pending,
    ProviderError,
)
from providers.kit.spool import SpoolFolder
from providers.kit.wire import Tools

AUTO_SIZE_PX = (1024, 1024)
EDGE_MAX_PX = 4096
PROMPT_MAX_CHARS = 240
PAINTERS_MAX = 2
RETRY_AFTER_S = 5.0


_KINDS = f"^(none|{'|'.join(kind.value for kind in FailureKind)})$"


class _Knobs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    latency_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)] = 200
    failure_rate: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    failure_kind: Annotated[str, msgspec.Meta(pattern=_KINDS)] = "bad_gateway"
    usage: Literal["reported", "missing"] = "reported"
    images_short: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0


class SandboxSettings:
    """How a sandbox behaves, and what was bought from it.

    ``latency_ms`` (0 to 600,000) is how long a job takes; a share of ``failure_rate``
    (0 to 1) of the jobs fails as ``failure_kind`` (a ``FailureKind``'s value, or
    ``none``); ``usage`` is ``reported`` or ``missing``; ``images_short`` pictures are
    missing in each answer.
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
        """Everything but references: it only paints."""
        return Capabilities()

    async def start(self, job: ImageJob) -> Done | Pending:
        """Paint the pictures, or fail as the settings say.

        A job counts as bought once it was not refused: who hangs up, or is told that
        the outcome is unknown, has bought it all the same.
        """
        knobs = self.settings.knobs
        if not _paintable(job):
            raise _failed(FailureKind.UNSUPPORTED)
        kind = self._drawn_failure(knobs)
        if kind in _AT_ONCE:
            raise _failed(kind)
        if kind is not FailureKind.BAD_GATEWAY:
            self.settings.buy(0 if kind is FailureKind.NO_OUTPUT else job.n)
        try:
            async with asyncio.timeout(job.deadline_s):
                await asyncio.sleep(knobs.latency_ms / 1000)
                if kind is not None:
                    raise _failed(kind)
                return await self._deliver(job, knobs)
        except TimeoutError as error:
            raise ProviderError(FailureKind.TIMEOUT, "the deadline passed") from error

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:  # noqa: ARG002 - the contract's
        """Fail: nothing is ever pending here."""
        raise ProviderError(FailureKind.UNSUPPORTED, "the sandbox has no jobs to ask")

    async def close(self) -> None:
        """Nothing to give back."""

    def _drawn_failure(self, knobs: _Knobs) -> FailureKind | None:
        if knobs.failure_kind == "none" or self.fraction() >= knobs.failure_rate:
            return None
        return FailureKind(knobs.failure_kind)

    async def _deliver(self, job: ImageJob, knobs: _Knobs) -> Done:
        count = job.n - knobs.images_short
        if count <= 0:
            raise _failed(FailureKind.NO_OUTPUT)
        async with self._painters:
            files = [
                await asyncio.to_thread(paint, job, self.name, f"{index}/{job.n}")
                for index in range(1, count + 1)
            ]
        return Done(
            images=self._spooled(job, files),
            usage=job.expected.times(count) if knobs.usage == "reported" else None,
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


def paint(job: ImageJob, upstream: str, number: str) -> bytes:
    """Make one picture file that says what it was made of.

    Few colours and a small text mask, blown up: cheap at any size.
    """
    width_px, height_px = _size_px(job)
    image = _gradient(width_px, height_px, job.quality)
    text = _text_mask(job, upstream, number, width_px / height_px)
    scale = min(width_px / text.width, height_px / text.height)
    text = text.resize((int(text.width * scale) or 1, int(text.height * scale) or 1))
    image.paste(_INK, (0, 0), text)
    if _is_transparent(job):
        image.info["transparency"] = _FADE
    file = io.BytesIO()
    if job.output_format == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        level = 80 if job.output_compression is None else job.output_compression
        image = image.convert("RGBA" if _is_transparent(job) else "RGB")
        image.save(file, job.output_format, quality=level, method=0)
    return file.getvalue()


_INK = 255
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


def _text_mask(job: ImageJob, upstream: str, number: str, aspect: float) -> Image.Image:
    long, short = _TEXT_EDGE_PX, max(int(_TEXT_EDGE_PX / max(aspect, 1 / aspect)), 128)
    size = (long, short) if aspect >= 1 else (short, long)
    mask = Image.new("1", size)
    prompt = job.prompt[:PROMPT_MAX_CHARS].encode(errors="replace").decode()
    columns = max(size[0] // (_FONT_PX // 2) - 2, 4)
    made = "{}x{}".format(*_size_px(job))
    lines = [
        *textwrap.wrap(f"{made} {job.quality} {upstream} {number}", columns),
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
    return (
        job.operation is Operation.GENERATE
        and 0 < width_px <= EDGE_MAX_PX
        and 0 < height_px <= EDGE_MAX_PX
    )


def _is_transparent(job: ImageJob) -> bool:
    return job.background == "transparent" and job.output_format != "jpeg"


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
