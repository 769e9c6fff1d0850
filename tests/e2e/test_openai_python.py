"""The official OpenAI library, unmodified, pointed at a live gateway."""

from __future__ import annotations

import base64
import io
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import ImagesResponse
from PIL import Image

from tests.e2e.gateways import LiveGateway

VARIANTS = [
    "gpt-image-2",
    "gpt-image-2.5-flare",
    "gpt-image-2.5-sunburst",
    "gpt-image-1.5",
    "gpt-image-1-mini",
]


@pytest.fixture(scope="module")
def sdk(shared_gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    key = shared_gateway.tenant("sdk", "100000")
    with client_of(shared_gateway, key) as client:
        yield client


def client_of(gateway: LiveGateway, key: str, retries: int = 0) -> openai.OpenAI:
    url = f"{gateway.url}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries)


def picture(answer: ImagesResponse, index: int = 0) -> Image.Image:
    assert answer.data is not None
    item = answer.data[index]
    if item.b64_json is not None:
        raw = base64.b64decode(item.b64_json, validate=True)
    else:
        assert item.url is not None
        with urllib.request.urlopen(item.url, timeout=30) as opened:
            raw = opened.read()
    image = Image.open(io.BytesIO(raw))
    image.load()
    return image


def checked(answer: ImagesResponse) -> ImagesResponse:
    return ImagesResponse.model_validate(answer.model_dump(), strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_answers_with_its_pictures_inside(
    sdk: openai.OpenAI, variant: str
) -> None:
    answer = checked(
        sdk.images.generate(model=variant, prompt="a fox", size="1024x1024")
    )

    assert picture(answer).size == (1024, 1024)
    assert answer.usage is not None
    assert answer.usage.total_tokens == (
        answer.usage.input_tokens + answer.usage.output_tokens
    )
    assert (answer.size, answer.background) == ("1024x1024", "opaque")


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_answers_with_links(sdk: openai.OpenAI, variant: str) -> None:
    answer = checked(
        sdk.images.generate(model=variant, prompt="a fox", response_format="url")
    )

    assert answer.data is not None
    assert answer.data[0].b64_json is None
    assert picture(answer).format == "PNG"


@pytest.mark.parametrize(
    ("wanted", "shown"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_the_format_asked_for_is_the_format_that_comes(
    sdk: openai.OpenAI, wanted: Any, shown: str
) -> None:
    answer = checked(
        sdk.images.generate(model="gpt-image-2", prompt="a fox", output_format=wanted)
    )

    assert picture(answer).format == shown
    assert answer.output_format == wanted


def test_several_pictures_come_in_one_answer_and_are_counted(
    sdk: openai.OpenAI,
) -> None:
    one = sdk.images.generate(model="gpt-image-2", prompt="a fox", quality="low")
    three = sdk.images.generate(model="gpt-image-2", prompt="a fox", quality="low", n=3)

    assert three.data is not None
    assert len(three.data) == 3
    assert [picture(three, i).format for i in range(3)] == ["PNG"] * 3
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.output_tokens == 3 * one.usage.output_tokens


def test_a_transparent_background_is_transparent(sdk: openai.OpenAI) -> None:
    answer = checked(
        sdk.images.generate(
            model="gpt-image-2", prompt="a fox", background="transparent"
        )
    )

    image = picture(answer).convert("RGBA")
    lowest, _ = image.getchannel("A").getextrema()
    assert answer.background == "transparent"
    assert lowest == 0


def test_every_openai_field_is_accepted(sdk: openai.OpenAI) -> None:
    answer = sdk.images.with_raw_response.generate(
        model="gpt-image-2",
        prompt="a fox",
        size="1536x1024",
        quality="high",
        n=1,
        background="opaque",
        output_format="jpeg",
        output_compression=40,
        moderation="low",
        user="user-1",
        extra_body={"safety_identifier": "s-1", "resolution": "2K", "style": "vivid"},
    )

    assert answer.headers["x-gateway-ignored-params"] == "style"
    assert answer.headers["x-task-id"].startswith("task-unified-")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-gateway-mode"] == "sync"
    assert picture(answer.parse()).size == (1536, 1024)


@pytest.mark.parametrize(
    ("size", "pixels"),
    [("16:9", (2736, 1536)), ("1:1", (2048, 2048)), ("9:21", (1344, 3136))],
)
def test_ratios_are_drawn_at_the_pixels_of_the_product_page(
    sdk: openai.OpenAI, size: Any, pixels: tuple[int, int]
) -> None:
    answer = sdk.images.generate(
        model="gpt-image-2", prompt="a fox", size=size, extra_body={"resolution": "2k"}
    )

    assert picture(answer).size == pixels


def test_a_wrong_key_is_an_authentication_error(shared_gateway: LiveGateway) -> None:
    with (
        client_of(shared_gateway, "sk-wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.images.generate(model="gpt-image-2", prompt="a fox")

    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("gpt-image-9", "model_not_found", "gpt-image-2"),
        ("gpt-image-1", "model_retired", "gpt-image-2"),
    ],
)
def test_a_model_that_is_not_there_is_a_not_found_error(
    sdk: openai.OpenAI, model: str, code: str, words: str
) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.images.generate(model=model, prompt="a fox")

    assert (caught.value.code, caught.value.param) == (code, "model")
    assert words in caught.value.message


def test_a_wrong_size_is_a_bad_request_error(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(model="gpt-image-2", prompt="a fox", size="17:3")

    assert caught.value.param == "size"


def test_no_credits_is_402_and_not_tried_again(shared_gateway: LiveGateway) -> None:
    key = shared_gateway.tenant("poor", "0.000001")
    with (
        client_of(shared_gateway, key, retries=5) as poor,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        poor.images.generate(model="gpt-image-2", prompt="a fox")

    assert caught.value.status_code == 402
    assert (caught.value.code, caught.value.type) == ("insufficient_quota",) * 2
    refused = shared_gateway.metric("imageway_holds_refused_total")
    assert {labels: count for labels, count in refused.items() if count} == {
        '{model="gpt-image-2"}': 1.0
    }


def test_models_are_listed_with_price_and_life(sdk: openai.OpenAI) -> None:
    models = {model.id: model for model in sdk.models.list().data}

    retired: Any = models["gpt-image-1"]
    live: Any = sdk.models.retrieve("gpt-image-2")
    assert set(VARIANTS) < set(models)
    assert (retired.status, retired.successor) == ("retired", "gpt-image-2")
    assert live.pricing["image_output"] == 1.836


def test_every_answer_is_the_object_of_its_task(
    sdk: openai.OpenAI, shared_gateway: LiveGateway
) -> None:
    answer = sdk.images.with_raw_response.generate(
        model="gpt-image-2", prompt="a fox", response_format="url"
    )
    body = answer.http_response.json()

    with shared_gateway.client(sdk.api_key) as client:
        task = client.get(f"/v1/tasks/{answer.headers['x-task-id']}").json()

    assert task == body
