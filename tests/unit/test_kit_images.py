"""Headers are read like Pillow reads them, or refused; nothing ever blows up."""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from providers.kit.images import (
    HEADER_MAX_BYTES,
    ImageHeader,
    NotAnImageError,
    TruncatedImageError,
    read_header,
    read_payload_header,
)
from providers.kit.spool import Spool, SpoolFolder
from tests.simulators.pictures import png


def made(
    file_format: str, mode: str = "RGB", size: tuple[int, int] = (37, 21), **more: Any
) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert(mode)
    if mode == "RGBA":
        # Encoders drop the alpha of a picture that is opaque throughout.
        image.putalpha(90)
    image.save(file, file_format, **more)
    return file.getvalue()


def spooled(folder: Path, content: bytes, encoding: str) -> Spool:
    if encoding == "base64":
        return SpoolFolder(folder).from_bytes(base64.b64encode(content), "base64")
    return SpoolFolder(folder).from_bytes(content, "raw")


def moving(file_format: str) -> bytes:
    frames = [Image.new("RGBA", (20, 10), (level, 0, 0, 9)) for level in (1, 200)]
    file = io.BytesIO()
    frames[0].save(file, file_format, save_all=True, append_images=frames[1:])
    return file.getvalue()


PROFILE = bytes(60_000)
PNG = made("png")
JPEG = made("jpeg", exif=b"Exif\x00\x00" + bytes(500))
FILES = {
    "png": (PNG, "image/png", False, False),
    "png, alpha": (made("png", "RGBA"), "image/png", True, False),
    "png, grey": (made("png", "L"), "image/png", False, False),
    "png, palette": (made("png", "P", transparency=3), "image/png", True, False),
    "png, moving": (moving("png"), "image/png", True, True),
    "jpeg": (JPEG, "image/jpeg", False, False),
    "jpeg, grey": (made("jpeg", "L"), "image/jpeg", False, False),
    "jpeg, four inks": (made("jpeg", "CMYK"), "image/jpeg", False, False),
    "jpeg, progressive": (
        made("jpeg", progressive=True, icc_profile=PROFILE),
        "image/jpeg",
        False,
        False,
    ),
    "webp": (made("webp"), "image/webp", False, False),
    "webp, lossless": (made("webp", lossless=True), "image/webp", False, False),
    "webp, lossless alpha": (
        made("webp", "RGBA", lossless=True),
        "image/webp",
        True,
        False,
    ),
    "webp, alpha": (moving("webp"), "image/webp", True, True),
    "webp, profile": (made("webp", icc_profile=PROFILE), "image/webp", False, False),
}


@pytest.mark.parametrize("name", FILES)
def test_type_size_alpha_and_motion_are_read(name: str) -> None:
    content, media_type, alpha, animated = FILES[name]
    header = read_header(content)
    with Image.open(io.BytesIO(content)) as image:
        assert (header.width_px, header.height_px) == image.size
    assert header.media_type == media_type
    assert header.has_alpha is alpha
    assert header.animated is animated


def test_an_exif_rotation_does_not_swap_the_sides() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header = read_header(made("jpeg", exif=exif))
    assert (header.width_px, header.height_px) == (37, 21)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"I cannot draw that.",
        b"GIF89a" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\xff\xd8\xff\xd9" + bytes(100),
        b"RIFF\x10\x00\x00\x00WAVE" + bytes(100),
        b"RIFF\x10\x00\x00\x00WEBPVP8Q" + bytes(100),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(NotAnImageError):
        read_header(content)


def test_a_png_of_no_width_or_with_a_damaged_header_is_refused() -> None:
    with pytest.raises(NotAnImageError, match="without area"):
        read_header(png(0, 5))
    damaged = bytearray(PNG)
    damaged[18] ^= 1
    with pytest.raises(NotAnImageError, match="damaged"):
        read_header(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_a_start_of_a_file_asks_for_more_or_tells_the_same(name: str) -> None:
    content = FILES[name][0]
    whole = read_header(content)
    for length in range(12, len(content), max(len(content) // 97, 1)):
        try:
            header = read_header(content[:length])
        except TruncatedImageError:
            continue
        assert (header.width_px, header.height_px) == (whole.width_px, whole.height_px)


def png_chunk(name: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + crc


def behind_text(content: bytes, size_bytes: int) -> bytes:
    """Put a text chunk right behind the header of a PNG."""
    return content[:33] + png_chunk(b"tEXt", b"k\0" + b"x" * size_bytes) + content[33:]


def behind_profiles(content: bytes, count: int) -> bytes:
    """Put full segments before all others of a JPEG."""
    segment = b"\xff\xe2\xff\xff" + bytes(0xFFFF - 2)
    return content[:2] + segment * count + content[2:]


LONG_HEADERS = {
    "an animation behind 2 MB of text": (
        behind_text(FILES["png, moving"][0], 2_000_000),
        FILES["png, moving"][0],
    ),
    "transparency behind 1.2 MB of text": (
        behind_text(FILES["png, palette"][0], 1_200_000),
        FILES["png, palette"][0],
    ),
    "a frame behind 1.3 MB of profiles": (behind_profiles(JPEG, 20), JPEG),
    "a frame behind 15 MB of profiles": (behind_profiles(JPEG, 230), JPEG),
}


@pytest.mark.parametrize("encoding", ["raw", "base64"])
@pytest.mark.parametrize("name", LONG_HEADERS)
def test_what_stands_behind_a_long_text_or_profile_is_seen(
    tmp_path: Path, name: str, encoding: str
) -> None:
    content, plain = LONG_HEADERS[name]
    assert read_header(content) == read_header(plain)
    with closing(spooled(tmp_path, content, encoding)) as spool:
        assert read_payload_header(spool) == read_header(plain)


def test_what_stands_behind_the_first_pixels_is_not_looked_at() -> None:
    pixels = PNG.index(b"IDAT") - 4
    late = png_chunk(b"acTL", bytes(8))
    early = read_header(PNG[:pixels] + late + PNG[pixels:])
    behind = read_header(PNG[:-12] + late + PNG[-12:])
    assert (early.animated, behind.animated) == (True, False)


TOO_LONG = {
    "a large text": behind_text(PNG, HEADER_MAX_BYTES),
    "large profiles": behind_profiles(JPEG, HEADER_MAX_BYTES // 0xFFFF + 1),
    "many small chunks": PNG[:33] + png_chunk(b"teXt", b"") * 5_000 + PNG[33:],
    "many small segments": JPEG[:2] + b"\xff\xfe\x00\x02" * 5_000 + JPEG[2:],
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_header_without_end_is_given_up(tmp_path: Path, name: str) -> None:
    with (
        closing(spooled(tmp_path, TOO_LONG[name], "raw")) as spool,
        pytest.raises(NotAnImageError, match="its header is too long"),
    ):
        read_payload_header(spool)


def test_a_jpeg_that_gives_two_sizes_is_refused() -> None:
    start = JPEG.index(b"\xff\xc0")
    frame = JPEG[start : start + 19]
    doubled = JPEG[:start] + frame + JPEG[start:]
    with pytest.raises(NotAnImageError, match="two frames"):
        read_header(doubled)


def test_segments_whose_code_resembles_a_frame_are_stepped_over() -> None:
    for code in (b"\xc4", b"\xcc", b"\xdb", b"\xfe", b"\xed"):
        more = JPEG[:2] + b"\xff" + code + b"\x00\x0a\x08" + bytes(7) + JPEG[2:]
        assert read_header(more) == read_header(JPEG)


@pytest.mark.parametrize("encoding", ["raw", "base64"])
@pytest.mark.parametrize("profiles", [0, 1, 9])
def test_a_payload_is_decoded_as_far_as_its_header_needs(
    tmp_path: Path, encoding: str, profiles: int
) -> None:
    segment = b"\xff\xe2\xea\x60" + bytes(0xEA60 - 2)
    content = JPEG[:2] + segment * profiles + JPEG[2:]
    folder = SpoolFolder(tmp_path)
    if encoding == "base64":
        spool = folder.from_bytes(base64.b64encode(content), "base64")
    else:
        spool = folder.from_bytes(content, "raw")

    assert read_payload_header(spool) == ImageHeader(
        "image/jpeg", 37, 21, has_alpha=False, animated=False
    )
    spool.close()


@pytest.mark.parametrize("text", [b"", b"iVBOR", b"!!!!", b"aGVsbG8="])
def test_a_payload_that_is_no_picture_is_refused(tmp_path: Path, text: bytes) -> None:
    spool = SpoolFolder(tmp_path).from_bytes(text, "base64")
    with pytest.raises(NotAnImageError):
        read_payload_header(spool)
    spool.close()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))][0])
    for _ in range(draw(st.integers(0, 4))):
        # Most headers are in the first bytes; change those most.
        at = draw(st.one_of(st.integers(0, 63), st.integers(0, len(content) - 1)))
        if at < len(content):
            content[at] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


@settings(max_examples=1000, suppress_health_check=list(HealthCheck), deadline=None)
@given(content=mutated())
def test_a_damaged_file_is_read_as_pillow_reads_it_or_refused(content: bytes) -> None:
    try:
        header = read_header(content)
    except NotAnImageError:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                size = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return
    assert (header.width_px, header.height_px) == size


@given(content=st.binary(max_size=64))
def test_noise_after_a_signature_is_refused_or_read_but_never_blows_up(
    content: bytes,
) -> None:
    for start in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8L", b""):
        try:
            header = read_header(start + content)
        except NotAnImageError:
            continue
        assert header.width_px > 0
        assert header.height_px > 0
