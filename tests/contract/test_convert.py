"""Pictures in another format, or as they came where that cannot be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from gateway.adapters.convert import PillowStudio
from providers.kit.contract import MadeImage
from providers.kit.spool import SpoolFolder
from tests.fakes import FakePayload


def made(mode: str = "RGBA", kind: str = "PNG") -> MadeImage:
    out = io.BytesIO()
    Image.new(mode, (40, 30), "red").save(out, kind)
    return MadeImage(FakePayload(out.getvalue()), f"image/{kind.lower()}", 40, 30)


@pytest.fixture
def studio(tmp_path: Path) -> PillowStudio:
    return PillowStudio(SpoolFolder(tmp_path))


@pytest.mark.parametrize(
    ("wanted", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L", "LA"])
async def test_every_kind_becomes_every_other(
    studio: PillowStudio, mode: str, wanted: str, kind: str
) -> None:
    converted = await studio.convert(made(mode), wanted, None)

    assert converted is not None
    assert converted.media_type == f"image/{wanted}"
    with Image.open(io.BytesIO(b"".join(converted.payload.chunks()))) as opened:
        opened.load()
        assert (opened.format, opened.size) == (kind, (40, 30))
    converted.payload.close()


async def test_compression_makes_smaller_files(studio: PillowStudio) -> None:
    noise = Image.effect_noise((200, 200), 80)
    out = io.BytesIO()
    noise.save(out, "PNG")
    image = MadeImage(FakePayload(out.getvalue()), "image/png", 200, 200)

    best = await studio.convert(image, "jpeg", 100)
    worst = await studio.convert(image, "jpeg", 10)

    assert best is not None
    assert worst is not None
    assert worst.payload.size_bytes < best.payload.size_bytes / 3


def broken() -> list[bytes]:
    whole = b"".join(made().payload.chunks())
    chunk_name = bytearray(whole)
    chunk_name[37:41] = b"\x00\x01\x02\x03"
    return [whole[:60], bytes(chunk_name), whole[:8] + bytes(400), b"", b"junk"]


@pytest.mark.parametrize("content", broken())
async def test_what_cannot_be_decoded_is_left_as_it_is(
    studio: PillowStudio, tmp_path: Path, content: bytes
) -> None:
    image = MadeImage(FakePayload(content), "image/png", 40, 30)

    assert await studio.convert(image, "webp", None) is None
    assert list(tmp_path.iterdir()) == []


async def test_broken_base64_is_left_as_it_is(studio: PillowStudio) -> None:
    image = MadeImage(FakePayload(b"!!!!", encoding="base64"), "image/png", 40, 30)

    assert await studio.convert(image, "webp", None) is None


async def test_what_would_take_too_much_memory_is_not_decoded(
    studio: PillowStudio,
) -> None:
    image = MadeImage(FakePayload(b""), "image/png", 16_000, 16_000)

    assert await studio.convert(image, "webp", None) is None
