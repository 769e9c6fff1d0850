"""Pictures on their way into a request: loaded, checked, or refused by name."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.core.errors import GatewayError, InvalidRequestError, TooLargeError
from gateway.core.requests import ImageRequest
from gateway.flows.inputs import FETCHES_MAX_PER_REQUEST, Inputs, KeptInputs, LoadInputs
from gateway.ports import FetcherBusyError, FetchRefusedError, StoredFile, WritableSpool
from providers.kit.contract import Payload
from providers.kit.spool import MEMORY_MAX_BYTES, SpoolFolder
from tests.fakes import FakePayload, MemoryBlobs
from tests.flows.test_files import MemoryFiles
from tests.flows.test_generate import VARIANT
from tests.simulators.pictures import png
from tests.virtual_time import LoopClock


def picture(
    width: int = 8, height: int = 6, mode: str = "RGB", kind: str = "PNG", **more: Any
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, kind, **more)
    return out.getvalue()


ANIMATED = picture(
    save_all=True,
    append_images=[Image.new("RGB", (8, 6), (i, i, i)) for i in (90, 180)],
)


BUSY = "https://a.test/busy"


class Web:
    """A ``Fetcher`` over a dictionary; counts how many come at once."""

    def __init__(self, **pages: bytes) -> None:
        self.pages = {f"https://a.test/{name}": page for name, page in pages.items()}
        self.takes_s = 0.0
        self.at_once = 0
        self.most_at_once = 0
        self.callers: set[str] = set()

    async def fetch(
        self, url: str, into: WritableSpool, *, deadline_s: float, caller: str = ""
    ) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.takes_s)
        self.at_once -= 1
        self.callers.add(caller)
        if url == BUSY:
            raise FetcherBusyError("Too many.")
        if url not in self.pages:
            raise FetchRefusedError("The URL could not be reached.")
        into.append(self.pages[url])


class Desk:
    """The flow under test, with spools in a folder that must be empty at the end."""

    def __init__(self, folder: Path, web: Web) -> None:
        self.folder = folder
        self.web = web
        self.files = MemoryFiles()
        self.uploads = MemoryBlobs()
        self.load = LoadInputs(
            web, self.files, self.uploads, SpoolFolder(folder), LoopClock()
        )

    async def __call__(
        self,
        *references: str,
        mask: str | None = None,
        brought: tuple[Payload, ...] = (),
    ) -> Inputs:
        request = ImageRequest(
            variant=VARIANT,
            prompt="a fox",
            size=None,
            quality="low",
            references=references,
            mask=mask,
            reference_params=tuple(f"image_urls[{i}]" for i in range(len(references))),
        )
        return await self.load(request, "ten_1", brought)

    async def refusal(self, *references: str, **more: Any) -> GatewayError:
        with pytest.raises(GatewayError) as caught:
            await self(*references, **more)
        assert list(self.folder.iterdir()) == []
        return caught.value


@pytest.fixture
def web() -> Web:
    return Web(
        **{
            "fox.png": picture(),
            "owl.jpg": picture(20, 10, kind="JPEG"),
            "elk.webp": picture(5, 5, kind="WEBP"),
            "mask.png": picture(mode="RGBA"),
            "opaque.png": picture(),
            "small-mask.png": picture(4, 4, mode="RGBA"),
            "animated.png": ANIMATED,
            "wide.png": picture(20_000, 1),
            "text.png": b"I am no picture",
            "half.png": picture()[:20],
        }
    )


@pytest.fixture
def desk(tmp_path: Path, web: Web) -> Desk:
    return Desk(tmp_path, web)


async def test_every_kind_of_place_is_loaded_in_order(desk: Desk) -> None:
    stored = StoredFile(
        *("file_1", "ten_1", "elk", "elk", "", "image/webp"),
        *(1, 5, 5, 0, 10**15),
    )
    desk.files.kept["file_1"] = stored
    desk.uploads.kept[stored.blob] = desk.web.pages["https://a.test/elk.webp"]
    inline = base64.b64encode(picture(3, 2)).decode()
    lifted = FakePayload(base64.b64encode(picture(7, 7)), encoding="base64")

    inputs = await desk(
        "https://a.test/fox.png",
        "file_1",
        f"data:image/png;base64,{inline}",
        "data:#0",
        "upload:1",
        brought=(lifted, FakePayload(picture(9, 9, kind="JPEG"))),
    )

    kinds = [(r.media_type, r.width_px, r.height_px) for r in inputs.references]
    assert kinds == [
        ("image/png", 8, 6),
        ("image/webp", 5, 5),
        ("image/png", 3, 2),
        ("image/png", 7, 7),
        ("image/jpeg", 9, 9),
    ]
    assert b"".join(inputs.references[0].payload.chunks()) == picture()
    inputs.close()
    assert list(desk.folder.iterdir()) == []


async def test_a_mask_of_the_same_size_with_alpha_is_taken(desk: Desk) -> None:
    inputs = await desk("https://a.test/fox.png", mask="https://a.test/mask.png")

    assert inputs.mask is not None
    assert (inputs.mask.width_px, inputs.mask.height_px) == (8, 6)


@pytest.mark.parametrize(
    ("mask", "code", "words"),
    [
        ("opaque.png", "invalid_image", "alpha"),
        ("owl.jpg", "invalid_image", "alpha"),
        ("small-mask.png", "image_dimension_mismatch", "4x4"),
    ],
)
async def test_a_mask_that_does_not_fit_is_refused(
    desk: Desk, mask: str, code: str, words: str
) -> None:
    error = await desk.refusal("https://a.test/fox.png", mask=f"https://a.test/{mask}")

    assert (error.code, error.param) == (code, "mask")
    assert words in str(error)
    if code == "image_dimension_mismatch":
        assert "8x6" in str(error)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("animated.png", "invalid_image"),
        ("wide.png", "invalid_image"),
        ("text.png", "invalid_image"),
        ("half.png", "invalid_image"),
        ("nothing.png", "image_fetch_failed"),
    ],
)
async def test_a_picture_that_cannot_be_used_is_refused_by_name(
    desk: Desk, name: str, code: str
) -> None:
    error = await desk.refusal("https://a.test/fox.png", f"https://a.test/{name}")

    assert isinstance(error, InvalidRequestError)
    assert (error.code, error.param) == (code, "image_urls[1]")


@pytest.mark.parametrize(
    "located",
    [
        "data:image/png;base64,####",
        "data:image/png,plain",
        "data:image/png;base64,",
        "data:#7",
        "data:#x",
        "upload:7",
    ],
)
async def test_a_data_url_that_is_none_is_refused(desk: Desk, located: str) -> None:
    assert (await desk.refusal(located)).status == 400


async def test_broken_base64_in_the_middle_is_refused(desk: Desk) -> None:
    text = bytearray(base64.b64encode(picture() + bytes(100_000)))
    text[70_000] = ord("!")

    error = await desk.refusal(
        "data:#0", brought=(FakePayload(bytes(text), encoding="base64"),)
    )

    assert error.code == "invalid_image"


async def test_another_tenants_file_is_not_there(desk: Desk) -> None:
    desk.files.kept["file_1"] = StoredFile(
        *("file_1", "ten_2", "elk", "elk", "", "image/webp"),
        *(1, 5, 5, 0, 10**15),
    )
    desk.uploads.kept["file_1"] = picture()

    assert (await desk.refusal("file_1")).code == "file_not_found"


async def test_at_most_four_are_fetched_at_a_time(desk: Desk) -> None:
    desk.web.takes_s = 1.0

    inputs = await desk(*["https://a.test/fox.png"] * 16)

    assert len(inputs.references) == 16
    assert desk.web.most_at_once == FETCHES_MAX_PER_REQUEST
    inputs.close()


async def test_a_busy_fetcher_is_no_fault_of_the_request(desk: Desk) -> None:
    error = await desk.refusal(BUSY)

    assert (error.status, error.code) == (503, "overloaded")
    assert desk.web.callers == {"ten_1"}


async def test_fetches_that_take_too_long_together_are_given_up(desk: Desk) -> None:
    desk.web.takes_s = 50.0

    error = await desk.refusal(*["https://a.test/fox.png"] * 16)

    assert error.code == "image_fetch_failed"


async def test_a_file_over_50_mb_is_too_large(desk: Desk) -> None:
    big = FakePayload(picture() + bytes(50 * 1024 * 1024))

    assert isinstance(await desk.refusal("upload:0", brought=(big,)), TooLargeError)


async def test_when_one_kept_picture_is_gone_the_spools_of_the_others_are_given_back(
    tmp_path: Path,
) -> None:
    large = png(64, 32, padding=MEMORY_MAX_BYTES)  # so large that it takes a file
    kept = KeptInputs(MemoryBlobs({"task-1/0": large}), SpoolFolder(tmp_path))
    request = ImageRequest(
        variant=VARIANT,
        prompt="a fox",
        size=None,
        quality="low",
        references=("kept:0", "kept:1"),
    )

    with pytest.raises(InvalidRequestError, match="not kept any more"):
        await kept.load("task-1", request)

    assert list(tmp_path.iterdir()) == []
