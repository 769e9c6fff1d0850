"""Edits: references and masks arrive as they are, whatever they weigh."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from PIL import Image

from providers.kit.contract import (
    Billed,
    Capabilities,
    Done,
    FailureKind,
    InputFile,
    Operation,
    ProviderError,
    Usage,
)
from providers.kit.spool import MEMORY_MAX_BYTES, SpoolFolder
from providers.registry import PROVIDERS
from tests.builders import a_job, an_account
from tests.contract.cases import answers_with_pictures, edits, failures_of, masks, those
from tests.contract.openai_upstream import openai_upstream
from tests.contract.sending import request_of
from tests.contract.upstreams import Case, K, an_input, file_of, tools
from tests.simulators.pictures import png
from tests.simulators.server import Fault

EDIT = Operation.EDIT
LARGE = png(64, 32, padding=4_000_000)


def sha256(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


def a_picture(kind: str, size: tuple[int, int] = (64, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(file, kind)
    return file.getvalue()


def a_mask(size: tuple[int, int] = (64, 32)) -> bytes:
    """Keep the upper half, and repaint the lower."""
    image = Image.new("RGBA", size, (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, size[1] // 2, *size))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def close(*inputs: InputFile) -> None:
    for one in inputs:
        one.payload.close()


@those(edits)
async def test_an_edit_makes_pictures_of_the_size_that_was_asked_for(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, png(64, 32))
        mask = an_input(upstream.spools, a_mask()) if masks(case) else None
        width_px, height_px = case.size_px
        n = min(2, case.capable.n_max)
        done = await upstream.make(
            operation=EDIT,
            references=(reference,),
            mask=mask,
            n=n,
            width_px=width_px,
            height_px=height_px,
        )
        assert upstream.purchases() == n
        assert [(i.width_px, i.height_px) for i in done.images] == [case.size_px] * n
        for made in done.images:
            with Image.open(io.BytesIO(file_of(made))) as image:
                assert image.size == case.size_px
        close(reference, *([mask] if mask else []))
    assert not list(tmp_path.iterdir())


@those(edits)
async def test_an_edit_takes_as_many_references_as_it_says_of_every_type(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        kinds = (["png", "jpeg", "webp", "png"] * 4)[: case.capable.references_max]
        references = tuple(
            an_input(upstream.spools, a_picture(kind), media_type=f"image/{kind}")
            for kind in kinds
        )
        done = await upstream.make(operation=EDIT, references=references)
        close(*references)
    done.images[0].payload.close()


@those(edits)
async def test_the_references_can_be_used_again_by_the_next_upstream(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, LARGE)
        upstream.fail(K.OVERLOADED)
        edit: dict[str, Any] = {"operation": EDIT, "references": (reference,)}
        assert (await upstream.failure(**edit)).kind is K.OVERLOADED
        async with case.connect(tmp_path) as other:
            done = await other.make(**edit)
        done.images[0].payload.close()
        close(reference)
        assert upstream.files() == 0


@those(edits)
async def test_a_reference_that_is_no_picture_is_refused(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, b"not a picture" * 100)
        error = await upstream.failure(operation=EDIT, references=(reference,))
        billed = case.failures[case.bad_file]
        assert (error.kind, error.billed) == (case.bad_file, billed)
        assert bool(error.client_message) is (case.bad_file is K.INVALID_REQUEST)
        assert upstream.purchases() == 0
        close(reference)


@failures_of(edits)
async def test_a_failing_edit_has_its_kind(
    case: Case, kind: FailureKind, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, png(64, 32))
        upstream.fail(kind)
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (kind, case.failures[kind])
        close(reference)
        assert upstream.files() == 0


# --- openai: what arrives ---


@pytest.mark.parametrize("encoding", ["raw", "base64"])
async def test_files_arrive_byte_for_byte(
    encoding: Literal["raw", "base64"], tmp_path: Path
) -> None:
    files = [LARGE, png(64, 32, padding=1), png(64, 32, padding=2)]
    async with openai_upstream(tmp_path) as (upstream, simulator):
        inputs = [an_input(upstream.spools, f, encoding=encoding) for f in files]
        mask = an_input(upstream.spools, a_mask(), encoding=encoding)
        done = await upstream.make(
            operation=EDIT, references=tuple(inputs), mask=mask, n=2
        )
        (bought,) = simulator.purchases
        # 64 x 32 is two patches: three references of two, for both pictures.
        assert done.usage == Usage(text_input=26, image_input=12, image_output=130)
        close(*inputs, mask)
    assert bought.operation == "edit"
    assert bought.references == tuple(map(sha256, files))
    assert bought.mask == sha256(a_mask())
    for made in done.images:
        made.payload.close()


async def test_several_uploads_at_once_do_not_mix(tmp_path: Path) -> None:
    files = [png(64, 32, padding=1_000_000 + place) for place in range(4)]
    async with openai_upstream(tmp_path) as (upstream, simulator):
        inputs = [an_input(upstream.spools, file) for file in files]
        done = await asyncio.gather(
            *(upstream.make(operation=EDIT, references=(one,)) for one in inputs)
        )
        close(*inputs)
        bought = {purchase.references for purchase in simulator.purchases}
    assert bought == {(sha256(file),) for file in files}
    for each in done:
        each.images[0].payload.close()


# --- what is said of an upload that breaks off ---


@those(answers_with_pictures)
async def test_an_upload_that_breaks_off_was_certainly_not_bought(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        assert upstream.simulator is not None
        reference = an_input(upstream.spools, LARGE * 8)
        upstream.simulator.script(Fault(close="mid_upload"))
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (K.NETWORK, Billed.NO)
        assert upstream.purchases() == 0
        close(reference)


@pytest.mark.parametrize("how", ["before_reply", "reset", "mid_body"])
async def test_a_break_after_the_upload_was_maybe_bought(
    how: str, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, LARGE)
        simulator.script(Fault(close=how))
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (K.TIMEOUT, Billed.MAYBE)
        assert len(simulator.purchases) == 1
        close(reference)


# --- openai: the shape of what is sent ---


@those(lambda case: edits(case) and case.is_remote)
async def test_a_reference_that_cannot_be_read_is_not_sent(
    case: Case, tmp_path: Path
) -> None:
    async with case.connect(tmp_path) as upstream:
        reference = an_input(upstream.spools, bytes(2 * MEMORY_MAX_BYTES))
        list(reference.payload.chunks())
        for file in tmp_path.iterdir():
            file.unlink()
        error = await upstream.failure(operation=EDIT, references=(reference,))
        assert (error.kind, error.billed) == (K.NETWORK, Billed.NO)
        assert upstream.purchases() == 0


async def sent(folder: Path, **changes: Any) -> list[tuple[str, str | None, bytes]]:
    """Send an edit; returns name, file and content of each part."""
    account = an_account(options=changes.pop("options", {}))
    job = a_job(operation=EDIT, **changes)
    request = await request_of("openai", account, job, folder)
    assert str(request.url) == "http://upstream.test/v1/images/edits"
    length = int(request.headers["content-length"])
    assert length == len(request.content)
    assert "transfer-encoding" not in request.headers
    kind, boundary = request.headers["content-type"].split("; boundary=")
    assert kind == "multipart/form-data"
    parts = request.content.split(f"--{boundary}".encode())
    assert (parts[0], parts[-1]) == (b"", b"--\r\n")
    return [read_part(part) for part in parts[1:-1]]


def read_part(part: bytes) -> tuple[str, str | None, bytes]:
    head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    fields = dict(re.findall(r'(\w+)="([^"]*)"', head.decode()))
    return fields["name"], fields.get("filename"), content.removesuffix(b"\r\n")


async def test_one_reference_is_image_and_several_are_a_list(tmp_path: Path) -> None:
    spools = SpoolFolder(tmp_path)
    one = an_input(spools, b"1")
    two = an_input(spools, b"2", media_type="image/jpeg")
    three = an_input(spools, b"3", media_type="image/webp")
    mask = an_input(spools, b"m")

    parts = await sent(tmp_path, references=(one,), mask=mask)
    assert parts[-2:] == [("image", "image-1.png", b"1"), ("mask", "mask-2.png", b"m")]
    parts = await sent(tmp_path, references=(one, two, three))
    assert parts[-3:] == [
        ("image[]", "image-1.png", b"1"),
        ("image[]", "image-2.jpg", b"2"),
        ("image[]", "image-3.webp", b"3"),
    ]


async def test_fields_of_an_edit_are_text(tmp_path: Path) -> None:
    reference = an_input(SpoolFolder(tmp_path), b"1")
    hostile = 'x"\r\n--boundary\r\nContent-Disposition: form-data; name="n"\r\n\r\n9 é'
    parts = await sent(
        tmp_path,
        references=(reference,),
        prompt=hostile,
        n=1,
        output_format="webp",
        output_compression=0,
        background="opaque",
    )
    assert {name: content.decode() for name, file, content in parts if not file} == {
        "model": "gpt-image-2",
        "prompt": hostile,
        "n": "1",
        "size": "64x32",
        "quality": "low",
        "output_format": "webp",
        "output_compression": "0",
        "background": "opaque",
    }


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("gpt-image-2", False),
        ("gpt-image-2.5-flare", False),
        ("openai/gpt-image-2", False),
        ("gpt-image-1.5", True),
        ("sdxl", True),
    ],
)
async def test_models_that_always_look_closely_are_not_told_to(
    model: str, told: bool, tmp_path: Path
) -> None:
    reference = an_input(SpoolFolder(tmp_path), b"1")
    parts = await sent(
        tmp_path, references=(reference,), model=model, input_fidelity="high"
    )
    assert (("input_fidelity", None, b"high") in parts) is told


async def test_a_prompt_that_is_no_unicode_is_the_clients_fault(
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        error = await upstream.failure(
            operation=EDIT, references=(reference,), prompt="\ud800"
        )
        assert error.kind is K.INVALID_REQUEST
        assert not simulator.requests


@pytest.mark.parametrize(
    ("options", "capable", "inputs", "masked"),
    [
        ({"edits": False}, Capabilities(stream=True), 1, False),
        (
            {"mask": False},
            Capabilities(frozenset(Operation), references_max=16, stream=True),
            1,
            True,
        ),
        (
            {"references_max": 1},
            Capabilities(
                frozenset(Operation), references_max=1, mask=True, stream=True
            ),
            2,
            False,
        ),
    ],
)
async def test_a_server_that_cannot_edit_is_not_asked_to(
    options: dict[str, object],
    capable: Capabilities,
    inputs: int,
    masked: bool,
    tmp_path: Path,
) -> None:
    async with openai_upstream(tmp_path, **options) as (upstream, simulator):
        assert upstream.provider.capabilities("any") == capable
        one = an_input(upstream.spools, png(64, 32))
        error = await upstream.failure(
            operation=EDIT, references=(one,) * inputs, mask=one if masked else None
        )
        assert error.kind is K.UNSUPPORTED
        assert not simulator.requests


# --- the simulator refuses what OpenAI refuses ---


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (png(64, 64, clear=True), "invalid_value"),
        (png(64, 32), "invalid_value"),
        (b"no picture", "invalid_image_file"),
    ],
    ids=["another size", "no alpha", "no picture"],
)
async def test_the_simulator_rejects_a_mask_that_does_not_fit(
    mask: bytes, code: str, tmp_path: Path
) -> None:
    async with openai_upstream(tmp_path) as (upstream, simulator):
        reference = an_input(upstream.spools, png(64, 32))
        error = await upstream.failure(
            operation=EDIT,
            references=(reference,),
            mask=an_input(upstream.spools, mask),
        )
        assert (error.kind, error.upstream_code) == (K.INVALID_REQUEST, code)
        assert not simulator.purchases


async def test_the_simulator_rejects_wrong_fields_and_names(tmp_path: Path) -> None:
    async with openai_upstream(tmp_path) as (_, simulator):
        url = f"{simulator.base_url}/images/edits"
        headers = {"Authorization": f"Bearer {simulator.key}"}
        file = ("a.png", png(64, 32), "image/png")
        lying = ("a.jpg", png(64, 32), "image/png")
        fields = {"model": "gpt-image-2", "prompt": "x"}
        refused: list[tuple[dict[str, str], list[tuple[str, Any]], str]] = [
            ({"response_format": "url"}, [("image", file)], "unknown_parameter"),
            ({"input_fidelity": "high"}, [("image", file)], "invalid_input"),
            ({"n": "eleven"}, [("image", file)], "invalid_value"),
            ({}, [("image", file), ("image", file)], "invalid_value"),
            ({}, [("image", file), ("image[]", file)], "invalid_value"),
            ({}, [("image[]", file)] * 17, "invalid_value"),
            ({}, [("image", lying)], "invalid_image_file"),
        ]
        async with httpx.AsyncClient(trust_env=False, headers=headers) as client:
            for more, files, code in refused:
                answer = await client.post(url, data=fields | more, files=files)
                assert answer.status_code == 400
                assert answer.json()["error"]["code"].startswith(code)
            good = await client.post(url, data=fields, files=[("image[]", file)])
            assert good.status_code == 200
        assert len(simulator.purchases) == 1


# --- the sandbox shows what it was given ---


def solid(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


async def painted(folder: Path, **changes: Any) -> Image.Image:
    async with tools(folder) as given:
        account = an_account(options={"latency_ms": 0})
        provider = PROVIDERS["sandbox"](account, given)
        done = await provider.start(
            a_job(operation=EDIT, width_px=512, height_px=512, prompt="x", **changes)
        )
    assert isinstance(done, Done)
    return Image.open(io.BytesIO(file_of(done.images[0]))).convert("RGB")


async def test_the_sandbox_shows_the_first_reference_and_small_ones_of_the_others(
    tmp_path: Path,
) -> None:
    spools = SpoolFolder(tmp_path)
    first = an_input(spools, solid((10, 20, 200), (300, 200)))
    second = an_input(spools, solid((200, 20, 10), (100, 100)))
    image = await painted(tmp_path, references=(first, second))
    assert image.getpixel((256, 300)) == (10, 20, 200)
    assert image.getpixel((5, 507)) == (200, 20, 10)
    assert image.getpixel((256, 507)) == (10, 20, 200)


async def test_the_sandbox_repaints_where_the_mask_is_clear(tmp_path: Path) -> None:
    spools = SpoolFolder(tmp_path)
    first = an_input(spools, solid((10, 20, 200), (128, 128)))
    mask = an_input(spools, a_mask((128, 128)))
    image = await painted(tmp_path, references=(first,), mask=mask)
    assert image.getpixel((256, 200)) == (10, 20, 200)
    assert image.getpixel((256, 480)) != (10, 20, 200)


@pytest.mark.parametrize(
    ("size", "opened"), [((4000, 3000), False), ((2000, 1000), True)]
)
async def test_the_sandbox_decodes_no_more_than_it_can_afford(
    size: tuple[int, int], opened: bool, tmp_path: Path
) -> None:
    spools = SpoolFolder(tmp_path)
    first = an_input(spools, solid((10, 20, 200), size), size_px=size)
    image = await painted(tmp_path, references=(first,))
    assert (image.getpixel((256, 300)) == (10, 20, 200)) is opened


async def test_the_sandbox_scales_a_large_photo_while_decoding(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8000, 6000), (10, 20, 200)).save(file, "JPEG")
    photo = an_input(
        SpoolFolder(tmp_path),
        file.getvalue(),
        size_px=(8000, 6000),
        media_type="image/jpeg",
    )
    image = await painted(tmp_path, references=(photo,))
    red, _, blue = image.getpixel((256, 300))  # type: ignore[misc]  # RGB has three
    assert red < 20
    assert blue > 180


async def test_a_damaged_reference_is_told_by_its_place(tmp_path: Path) -> None:
    async with tools(tmp_path) as given:
        provider = PROVIDERS["sandbox"](an_account(options={"latency_ms": 0}), given)
        good = an_input(given.spools, a_picture("png"))
        bad = an_input(given.spools, a_picture("png", (640, 320))[:200])
        with pytest.raises(ProviderError) as caught:
            await provider.start(a_job(operation=EDIT, references=(good, bad)))
    assert caught.value.kind is K.INVALID_REQUEST
    assert caught.value.client_message == "The reference image 2 cannot be decoded."
