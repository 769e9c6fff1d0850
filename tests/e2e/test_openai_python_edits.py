"""The official OpenAI library, unmodified: edits, masks and streams, live."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
    ImagesResponse,
)
from PIL import Image

from tests.e2e.gateways import LiveGateway
from tests.e2e.openai_upstreams import (
    SimulatedUpstream,
    gateway_before,
    simulated_upstream,
)
from tests.e2e.pictures import (
    BLUE,
    GREEN,
    PATCHES,
    RED,
    alike,
    file_of,
    mask_that_clears_the_left_half,
    opened,
)

SANDBOXES = ("sandbox-thrifty", "sandbox-fair", "sandbox-dear")
MODEL = "gpt-image-2"
WAIT_MAX_S = 30
UNTOUCHED = {"available": "1000", "held": "0", "spent": "0"}

AnyEvent = (
    ImageEditCompletedEvent
    | ImageEditPartialImageEvent
    | ImageGenCompletedEvent
    | ImageGenPartialImageEvent
)


@pytest.fixture(scope="module")
def sdk(shared_gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    with client_of(shared_gateway, shared_gateway.tenant("sdk", "100000")) as client:
        yield client


@pytest.fixture(scope="module")
def upstream() -> Iterator[SimulatedUpstream]:
    with simulated_upstream("simulated") as upstream:
        yield upstream


@pytest.fixture(scope="module")
def relaying_gateway(
    upstream: SimulatedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveGateway]:
    """A gateway whose one upstream can be told to break off in mid-stream."""
    with gateway_before(tmp_path_factory.mktemp("relaying"), upstream) as gateway:
        yield gateway


def client_of(gateway: LiveGateway, key: str, retries: int = 0) -> openai.OpenAI:
    url = f"{gateway.url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries)


def picture(answer: ImagesResponse, index: int = 0) -> Image.Image:
    """See that an answer is all that the library's types promise; open a picture."""
    ImagesResponse.model_validate(answer.model_dump(), strict=True)
    assert answer.data is not None
    return opened(answer.data[index].b64_json)


def edit(client: openai.OpenAI, **fields: Any) -> ImagesResponse:
    answer = client.images.edit(model=MODEL, prompt="a fox", size="1024x1024", **fields)
    assert isinstance(answer, ImagesResponse)
    return answer


def stream(client: openai.OpenAI, *, edits: bool, **fields: Any) -> Iterable[AnyEvent]:
    fields = {"model": MODEL, "prompt": "a fox", "size": "1024x1024"} | fields
    if edits:
        return client.images.edit(image=file_of(RED), stream=True, **fields)
    return client.images.generate(stream=True, **fields)


def checked(events: Iterable[AnyEvent]) -> list[AnyEvent]:
    """See that every event is all that the library's types promise."""
    kept = list(events)
    for event in kept:
        type(event).model_validate(event.model_dump(), strict=True)
    return kept


@contextmanager
def sandboxes(gateway: LiveGateway, **settings: Any) -> Iterator[None]:
    """Let all sandboxes behave otherwise for a while."""
    before = {name: gateway.sandbox(name) for name in SANDBOXES}
    for name in SANDBOXES:
        gateway.sandbox(name, **settings)
    try:
        yield
    finally:
        for name in SANDBOXES:
            gateway.sandbox(name, **{key: before[name][key] for key in settings})


# --- edits ---


@pytest.mark.parametrize("way", ["bytes", "BytesIO", "tuple", "typed tuple", "path"])
def test_the_picture_is_made_of_the_file_however_it_is_handed_over(
    sdk: openai.OpenAI, tmp_path: Path, way: str
) -> None:
    content = file_of(RED)
    path = tmp_path / "red.png"
    path.write_bytes(content)
    ways: dict[str, Any] = {
        "bytes": content,
        "BytesIO": io.BytesIO(content),
        "tuple": ("red.png", content),
        "typed tuple": ("whatever", io.BytesIO(content), "application/octet-stream"),
        "path": path,
    }

    answer = edit(sdk, image=ways[way])

    image = picture(answer)
    assert image.size == (1024, 1024)
    assert alike(image, (1000, 900), RED)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == PATCHES


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_references_may_be_of_each_format(sdk: openai.OpenAI, file_format: str) -> None:
    answer = edit(sdk, image=file_of(BLUE, file_format), output_format="webp")

    image = picture(answer)
    assert (image.format, answer.output_format) == ("WEBP", "webp")
    assert alike(image, (1000, 900), BLUE)


def test_several_files_are_all_in_the_picture_in_their_order(
    sdk: openai.OpenAI,
) -> None:
    files = [file_of(RED), ("green.webp", file_of(GREEN, "webp")), file_of(BLUE)]

    answer = edit(sdk, image=files)

    image = picture(answer)
    assert alike(image, (1000, 500), RED)
    assert alike(image, (30, 1010), GREEN)
    assert alike(image, (94, 1010), BLUE)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == 3 * PATCHES


def test_sixteen_files_are_fine_and_the_first_one_is_the_ground(
    sdk: openai.OpenAI,
) -> None:
    answer = edit(sdk, image=[file_of(GREEN), *[file_of(RED)] * 15], quality="low")

    assert alike(picture(answer), (1000, 500), GREEN)
    assert alike(picture(answer), (64 * 14 + 30, 1010), RED)


def test_what_the_mask_clears_is_made_anew_and_the_rest_stays(
    sdk: openai.OpenAI,
) -> None:
    plain = picture(edit(sdk, image=file_of(RED)))
    masked = picture(
        edit(sdk, image=file_of(RED), mask=mask_that_clears_the_left_half())
    )

    assert alike(plain, (100, 900), RED)
    assert not alike(masked, (100, 900), RED)
    assert alike(masked, (900, 900), RED)


def test_several_pictures_of_one_edit_come_together(sdk: openai.OpenAI) -> None:
    one = edit(sdk, image=file_of(RED), quality="low")
    three = edit(sdk, image=file_of(RED), quality="low", n=3, output_format="jpeg")

    assert [picture(three, i).format for i in range(3)] == ["JPEG"] * 3
    assert three.data is not None
    assert len(three.data) == 3
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.output_tokens == 3 * one.usage.output_tokens


def test_an_edit_may_be_answered_with_a_link(sdk: openai.OpenAI) -> None:
    answer = edit(sdk, image=file_of(RED), response_format="url")

    assert answer.data is not None
    assert answer.data[0].b64_json is None
    assert answer.data[0].url is not None
    assert answer.data[0].url.startswith(str(sdk.base_url).removesuffix("v1/"))


async def test_the_async_client_edits_and_streams(shared_gateway: LiveGateway) -> None:
    url, key = f"{shared_gateway.url}/v1", shared_gateway.tenant("async")
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        answer = await client.images.edit(
            model=MODEL,
            prompt="a fox",
            size="1024x1024",
            image=[file_of(RED), file_of(GREEN)],
            mask=mask_that_clears_the_left_half(),
        )
        events = await client.images.edit(
            model=MODEL,
            prompt="a fox",
            image=file_of(RED),
            stream=True,
            partial_images=1,
        )
        seen = checked([event async for event in events])

    assert alike(picture(answer), (900, 500), RED)
    assert alike(picture(answer), (30, 1010), GREEN)
    assert [event.type for event in seen] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


# --- streams ---


@pytest.mark.parametrize("partials", [0, 1, 2, 3])
@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_a_stream_shows_so_many_looks_and_then_the_picture(
    sdk: openai.OpenAI, *, edits: bool, partials: int
) -> None:
    events = checked(stream(sdk, edits=edits, partial_images=partials))

    kind = "image_edit" if edits else "image_generation"
    types = [f"{kind}.partial_image"] * partials + [f"{kind}.completed"]
    assert [event.type for event in events] == types
    *looks, last = events
    indexes = [getattr(look, "partial_image_index", None) for look in looks]
    assert indexes == list(range(partials))
    assert isinstance(last, ImageEditCompletedEvent | ImageGenCompletedEvent)
    assert all(opened(event.b64_json).size == (1024, 1024) for event in events)
    assert len({event.b64_json for event in events}) == partials + 1
    assert len({event.created_at for event in events}) == 1
    assert (last.size, last.quality) == ("1024x1024", "medium")
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    assert last.usage.input_tokens_details.image_tokens == (PATCHES if edits else 0)


@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_each_of_several_pictures_is_an_event_and_usages_add_up_to_the_tasks(
    sdk: openai.OpenAI, shared_gateway: LiveGateway, *, edits: bool
) -> None:
    opening: Any = stream(sdk, edits=edits, n=3, quality="low")
    task_id = opening.response.headers["x-task-id"]

    events = checked(opening)

    with shared_gateway.client(sdk.api_key) as client:
        task = client.get(f"/v1/tasks/{task_id}").json()
    finals = [
        event
        for event in events
        if isinstance(event, ImageEditCompletedEvent | ImageGenCompletedEvent)
    ]
    assert len(finals) == len(events) == 3
    for name in ("total_tokens", "input_tokens", "output_tokens"):
        total = sum(getattr(event.usage, name) for event in finals)
        assert total == task["usage"][name], name


def test_an_upstream_that_cannot_stream_still_completes(
    upstream: SimulatedUpstream, tmp_path: Path
) -> None:
    plain = replace(upstream, options="stream = false")
    with (
        gateway_before(tmp_path, plain) as gateway,
        client_of(gateway, gateway.tenant("patient")) as client,
    ):
        events = checked(stream(client, edits=True, partial_images=2))

    assert [event.type for event in events] == ["image_edit.completed"]
    assert opened(events[0].b64_json).size == (1024, 1024)
    assert upstream.purchases()[-1]["stream"] is False


def test_an_upstream_that_answers_a_stream_with_json_still_completes(
    relaying_gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    upstream.script({"answer": "plain"})
    with client_of(relaying_gateway, relaying_gateway.tenant("plain")) as client:
        events = checked(stream(client, edits=False, partial_images=2))

    assert [event.type for event in events] == ["image_generation.completed"]
    assert upstream.purchases()[-1]["stream"] is True


def test_an_upstreams_own_stream_comes_through(
    relaying_gateway: LiveGateway, upstream: SimulatedUpstream
) -> None:
    with client_of(relaying_gateway, relaying_gateway.tenant("through")) as client:
        events = checked(stream(client, edits=True, partial_images=2))

    assert [event.type for event in events] == [
        *["image_edit.partial_image"] * 2,
        "image_edit.completed",
    ]
    assert upstream.purchases()[-1]["stream"] is True


# --- errors of streams ---


@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_what_is_wrong_before_a_stream_begins_is_a_typed_error(
    sdk: openai.OpenAI, shared_gateway: LiveGateway, *, edits: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as wrong_size:
        stream(sdk, edits=edits, size="17:3")
    with pytest.raises(openai.NotFoundError) as wrong_model:
        stream(sdk, edits=edits, model="gpt-image-9")
    with (
        client_of(shared_gateway, "sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stream(stranger, edits=edits)
    with (
        sandboxes(shared_gateway, failure_rate=1, failure_kind="content_policy"),
        pytest.raises(openai.BadRequestError) as refused,
    ):
        stream(sdk, edits=edits, partial_images=2)

    assert (wrong_size.value.status_code, wrong_size.value.param) == (400, "size")
    assert wrong_model.value.code == "model_not_found"
    assert refused.value.code == "moderation_blocked"
    assert refused.value.type == "image_generation_user_error"


def test_no_credits_is_402_before_a_stream_begins(
    shared_gateway: LiveGateway,
) -> None:
    key = shared_gateway.tenant("poor", "0.000001")
    with (
        client_of(shared_gateway, key, retries=2) as poor,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        stream(poor, edits=True, partial_images=3)

    assert (caught.value.status_code, caught.value.code) == (402, "insufficient_quota")


@pytest.mark.parametrize("edits", [False, True], ids=["generate", "edit"])
def test_an_error_in_mid_stream_is_raised_with_its_code_and_nothing_is_held(
    relaying_gateway: LiveGateway, upstream: SimulatedUpstream, *, edits: bool
) -> None:
    tenant = f"mid-stream-{edits}"
    blocked = {
        "message": "Your request was rejected by the safety system.",
        "type": "image_generation_user_error",
        "param": None,
        "code": "moderation_blocked",
    }
    upstream.script({"answer": "error_event", "body": blocked})
    seen: list[str] = []
    with client_of(relaying_gateway, relaying_gateway.tenant(tenant)) as client:
        events = stream(client, edits=edits, partial_images=2)
        with pytest.raises(openai.APIError) as caught:
            seen.extend(event.type for event in events)

    kind = "image_edit" if edits else "image_generation"
    assert seen == [f"{kind}.partial_image"] * 2
    assert not isinstance(caught.value, openai.APIStatusError)
    assert caught.value.code == "moderation_blocked"
    assert caught.value.type == "image_generation_user_error"
    assert relaying_gateway.balance(tenant) == UNTOUCHED


def test_a_reader_who_leaves_in_the_middle_pays_once_and_finds_the_picture(
    shared_gateway: LiveGateway,
) -> None:
    key = shared_gateway.tenant("leaver")
    with sandboxes(shared_gateway, latency_ms=800):
        with client_of(shared_gateway, key) as client:
            opening: Any = stream(client, edits=True, partial_images=3)
            task_id = opening.response.headers["x-task-id"]
            first = next(iter(opening))
            opening.close()
        with shared_gateway.client(key) as client:
            until = time.monotonic() + WAIT_MAX_S
            task = client.get(f"/v1/tasks/{task_id}").json()
            left_in_the_middle = task["status"] == "processing"
            while task["status"] == "processing" and time.monotonic() < until:
                time.sleep(0.05)
                task = client.get(f"/v1/tasks/{task_id}").json()
            link = task["data"][0]["url"]
            content = client.get(link).content

    assert first.type == "image_edit.partial_image"
    assert left_in_the_middle
    assert task["status"] == "completed"
    assert alike(Image.open(io.BytesIO(content)), (1000, 900), RED)
    balance = shared_gateway.balance("leaver")
    assert balance["held"] == "0"
    assert float(balance["spent"]) == task["usage"]["credits_used"] > 0
    assert list((shared_gateway.data_dir / "spool").iterdir()) == []
    assert shared_gateway.audit()["clean"]
