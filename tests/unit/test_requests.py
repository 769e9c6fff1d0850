"""Every rule of a generation request, and what a broken one says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.catalogue import Catalogue, Operation
from gateway.core.errors import GatewayError, InvalidRequestError, NotFoundError
from gateway.core.requests import (
    KNOWN_FIELDS,
    ImageRequest,
    parse_edit,
    parse_edit_form,
    parse_generation,
)
from gateway.settings import load_settings

CATALOGUE = Catalogue(
    variants=load_settings(None, {}, kinds={"sandbox", "openai"}).variants, offers={}
)


def parsed(**fields: object) -> ImageRequest:
    return parse_generation({"prompt": "a lighthouse", **fields}, CATALOGUE)


def refused(body: object) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_generation(body, CATALOGUE)
    return caught.value


def refused_field(**fields: object) -> InvalidRequestError:
    return refused({"prompt": "a lighthouse", **fields})


def test_a_prompt_is_enough() -> None:
    request = parsed()

    assert request == ImageRequest(
        variant=CATALOGUE.variants["gpt-image-2"],
        prompt="a lighthouse",
        size=None,
        quality="medium",
        mask_param="mask_url",
    )
    assert request.operation is Operation.GENERATE


def test_every_field_arrives() -> None:
    request = parsed(
        model="gpt-image-2.5-flare",
        size="16:9",
        resolution="2k",
        quality="xhigh",
        n=3,
        output_format="webp",
        background="transparent",
        output_compression=80,
        moderation="low",
        user="u-1",
        safety_identifier="s-1",
        response_format="url",
        image_urls=["https://a.test/1.png", "data:image/png;base64,AAAA"],
        mask_url="https://a.test/m.png",
        callback_url="https://a.test/hook",
        stream=True,
        partial_images=2,
    )

    assert request == ImageRequest(
        variant=CATALOGUE.variants["gpt-image-2.5-flare"],
        prompt="a lighthouse",
        size=request.size,
        quality="xhigh",
        n=3,
        output_format="webp",
        background="transparent",
        output_compression=80,
        moderation="low",
        user="u-1",
        safety_identifier="s-1",
        response_format="url",
        references=("https://a.test/1.png", "data:image/png;base64,AAAA"),
        mask="https://a.test/m.png",
        reference_params=("image_urls[0]", "image_urls[1]"),
        mask_param="mask_url",
        by_url=True,
        callback_url="https://a.test/hook",
        stream=True,
        partial_images=2,
    )
    assert request.size == (2736, 1536)
    assert request.operation is Operation.EDIT


def test_null_counts_as_not_given() -> None:
    assert parsed(**dict.fromkeys(KNOWN_FIELDS - {"prompt"})) == parsed()


@pytest.mark.parametrize("body", [None, [], "prompt", 1, True, [{"prompt": "x"}]])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    error = refused(body)

    assert (error.status, error.param, error.code) == (400, None, "invalid_body")


# --- the model ---


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("gpt-image-2-2026-04-21", "gpt-image-2"),
        ("gpt-image-2.5-sunburst-2026-09-08", "gpt-image-2.5-sunburst"),
        ("gpt-image-1.5", "gpt-image-1.5"),
    ],
)
def test_a_model_is_found_by_name_and_by_snapshot(name: str, variant: str) -> None:
    assert parsed(model=name).variant.name == variant


@pytest.mark.parametrize("name", ["gpt-image-3", "", "\n\u00e9", "x" * 100_000])
def test_an_unknown_model_is_told_what_there_is(name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        parsed(model=name)

    assert (caught.value.status, caught.value.param) == (404, "model")
    assert caught.value.code == "model_not_found"
    assert "gpt-image-2, gpt-image-2.5-flare" in str(caught.value)
    assert "gpt-image-1," not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isascii()


def test_a_retired_model_names_its_successor_and_its_last_day() -> None:
    with pytest.raises(NotFoundError) as caught:
        parsed(model="gpt-image-1")

    assert (caught.value.code, caught.value.param) == ("model_retired", "model")
    assert caught.value.extra == {"fallback_suggestion": "gpt-image-2"}
    assert "2026-10-23" in str(caught.value)
    assert "Use gpt-image-2 instead" in str(caught.value)


# --- the prompt ---


@pytest.mark.parametrize("prompt", ["\U0001f30a" * 32_000, "\u6d77" * 32_000])
def test_32000_characters_are_allowed_in_any_script(prompt: str) -> None:
    assert parsed(prompt=prompt).prompt == prompt


def test_one_character_more_is_refused() -> None:
    error = refused({"prompt": "\u6d77" * 32_001})

    assert error.param == "prompt"
    assert "32,000" in str(error)
    assert "32,001" in str(error)


@pytest.mark.parametrize(
    "prompt", [None, "", " \n\t\u3000", 7, ["a"], {"text": "a"}, "a\ud800", "a\x00b"]
)
def test_a_prompt_that_is_no_text_is_refused(prompt: object) -> None:
    assert refused({"prompt": prompt}).param == "prompt"


def test_only_an_estimate_may_go_without_a_prompt() -> None:
    request = parse_generation({"n": 2}, CATALOGUE, prompt_optional=True)

    assert (request.prompt, request.n) == ("", 2)


# --- all the rest ---


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 2}, "model"),
        ({"size": 1024}, "size"),
        ({"size": "17:3"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"size": ""}, "size"),
        ({"size": "1:1", "resolution": "8K"}, "resolution"),
        ({"model": "gpt-image-1.5", "size": "16:9"}, "size"),
        ({"quality": "xhigh"}, "quality"),
        ({"quality": "hd"}, "quality"),
        ({"quality": 1}, "quality"),
        ({"quality": ""}, "quality"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": -1}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 10**5000}, "n"),
        ({"output_format": "jpg"}, "output_format"),
        ({"output_format": ["png"]}, "output_format"),
        ({"background": "blue"}, "background"),
        ({"background": "transparent", "output_format": "jpeg"}, "background"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"output_compression": -1, "output_format": "jpeg"}, "output_compression"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 0, "output_format": "png"}, "output_compression"),
        ({"moderation": "none"}, "moderation"),
        ({"user": "u" * 513}, "user"),
        ({"user": 5}, "user"),
        ({"safety_identifier": "s" * 513}, "safety_identifier"),
        ({"safety_identifier": "\udfff"}, "safety_identifier"),
        ({"response_format": "b64"}, "response_format"),
        ({"image_urls": "https://a.test/1"}, "image_urls"),
        ({"image_urls": []}, "image_urls"),
        ({"image_urls": ["https://a.test/1"] * 17}, "image_urls"),
        ({"image_urls": ["https://a.test/1", None]}, "image_urls[1]"),
        ({"image_urls": ["https://a.test/1", "file:///etc"]}, "image_urls[1]"),
        ({"image_urls": ["data:" + "A" * 20_971_516]}, "image_urls[0]"),
        ({"image_urls": ["https://a.test/1"], "mask_url": "ftp://a"}, "mask_url"),
        ({"callback_url": "http://a.test/hook"}, "callback_url"),
        ({"callback_url": "https://"}, "callback_url"),
        ({"callback_url": "https://[::1"}, "callback_url"),
        ({"callback_url": "https://a.test/a b"}, "callback_url"),
        ({"callback_url": "https://a.test/\r\nX: y"}, "callback_url"),
        ({"callback_url": "https://a.test:0/"}, "callback_url"),
        ({"callback_url": "https://a.test:99999/"}, "callback_url"),
        ({"callback_url": "https://a.test/" + "a" * 2034}, "callback_url"),
        ({"callback_url": ""}, "callback_url"),
        ({"callback_url": 7}, "callback_url"),
        ({"callback_url": ["https://a.test/"]}, "callback_url"),
        ({"callback_url": "https://a.test/\ud800"}, "callback_url"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"partial_images": 4}, "partial_images"),
        ({"partial_images": False}, "partial_images"),
    ],
)
def test_a_broken_rule_names_its_field(fields: dict[str, object], param: str) -> None:
    error = refused_field(**fields)

    assert (error.status, error.type) == (400, "invalid_request_error")
    assert error.param == param
    of_a_callback = param == "callback_url"
    assert error.code == ("invalid_callback_url" if of_a_callback else "invalid_value")
    assert len(str(error)) < 400


def test_a_refusal_says_what_is_allowed() -> None:
    assert str(refused_field(quality="hd")) == (
        "quality must be one of auto, low, medium, high, not 'hd'."
    )
    assert str(refused_field(n="3")) == (
        "n must be a whole number from 1 to 10, not a string."
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 10},
        {"quality": "auto"},
        {"model": "gpt-image-2.5-flare", "quality": "max"},
        {"output_compression": 0, "output_format": "jpeg"},
        {"output_compression": 100, "output_format": "webp"},
        {"background": "transparent"},
        {"background": "auto", "output_format": "jpeg"},
        {"user": "u" * 512},
        {"user": ""},
        {"image_urls": ["HTTPS://a.test/1"] * 16},
        {"image_urls": ["data:" + "A" * 20_971_515]},
        {"callback_url": "https://a.test/" + "a" * 2033},
        {"partial_images": 0},
        {"stream": False},
        {"size": "auto", "resolution": "8K"},
        {"size": "1024x1024", "resolution": 7},
    ],
)
def test_the_very_limits_are_allowed(fields: dict[str, object]) -> None:
    request = parsed(**fields)

    for name in fields.keys() & {"n", "quality", "user", "background"}:
        assert getattr(request, name) == fields[name]
    assert request.ignored == ()


def test_zero_compression_is_not_mistaken_for_none() -> None:
    request = parsed(output_compression=0, output_format="jpeg")

    assert request.output_compression == 0


def test_unknown_fields_are_ignored_and_named() -> None:
    request = parsed(style="vivid", input_fidelity="high", seed=None)

    assert request.ignored == ("style", "input_fidelity")


def test_a_mask_without_references_has_no_effect_and_is_said_to_have_none() -> None:
    request = parsed(mask_url={"not": "even a URL"})

    assert request.mask is None
    assert request.ignored == ("mask_url",)
    assert request.operation is Operation.GENERATE


def test_names_of_ignored_fields_fit_into_a_header() -> None:
    strange = {"a\r\nSet-Cookie: b": 1, "\ud800": 1, "\u6d77": 1, "k" * 9000: 1}
    many = {f"field{index}": 1 for index in range(10_000)}

    ignored = parsed(**strange, **many).ignored

    assert len(ignored) == 16
    assert len(", ".join(ignored)) <= 1024 + 2 * 15
    assert all(name.isascii() and name.isprintable() for name in ignored)


def test_deep_nesting_in_a_field_is_harmless() -> None:
    deep: object = []
    for _ in range(100_000):
        deep = [deep]

    assert refused_field(prompt=deep).param == "prompt"
    assert parsed(unknown=deep).ignored == ("unknown",)


# --- whatever comes ---

ANY_TEXT = st.text(st.characters(), max_size=20)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
LIKELY = st.sampled_from(
    ["auto", "1:1", "16:9", "1024x1024", "4K", "high", "jpeg", "transparent", 1, 10, 50]
) | st.sampled_from(
    ["gpt-image-2", "gpt-image-1", "https://a.test/", True, 0, 2, "url"]
)
ALMOST = st.fixed_dictionaries(
    {"prompt": st.just("a lighthouse") | ANY_JSON},
    optional=dict.fromkeys(sorted(KNOWN_FIELDS - {"prompt"}), LIKELY | ANY_JSON),
)


def outcome(body: object) -> ImageRequest | GatewayError:
    try:
        return parse_generation(body, CATALOGUE)
    except GatewayError as error:
        return error


@given(ANY_JSON | ALMOST)
def test_any_json_is_a_request_or_a_clear_refusal(body: object) -> None:
    result = outcome(body)

    if isinstance(result, GatewayError):
        assert result.status in {400, 404}
        assert json.dumps([str(result), result.param, result.code]).isascii()
        assert len(str(result)) < 400
    else:
        assert result.prompt.strip().encode()
        assert 1 <= result.n <= 10
        assert result.quality in {"auto", *result.variant.tile_bases}


SENSIBLE = st.fixed_dictionaries(
    {"prompt": st.just("a lighthouse")},
    optional={
        "model": st.sampled_from(["gpt-image-2", "gpt-image-2.5-flare"]),
        "size": st.sampled_from(["auto", "1:1", "3840x2160"]),
        "resolution": st.sampled_from(["1k", "2K", "4K"]),
        "quality": st.sampled_from(["auto", "low", "medium", "high"]),
        "n": st.integers(1, 10),
        "output_format": st.sampled_from(["png", "webp"]),
        "background": st.sampled_from(["auto", "opaque", "transparent"]),
    },
)


@given(SENSIBLE, st.dictionaries(ANY_TEXT, ANY_JSON))
def test_unknown_fields_never_change_what_is_made(
    body: dict[str, object], extra: dict[str, object]
) -> None:
    plain = parse_generation(body, CATALOGUE)
    extra = {name: value for name, value in extra.items() if name not in KNOWN_FIELDS}
    decorated = parse_generation({**extra, **body}, CATALOGUE)

    assert (decorated.size, decorated.quality, decorated.n, decorated.variant) == (
        plain.size,
        plain.quality,
        plain.n,
        plain.variant,
    )


# --- edits ---


def edited(**fields: Any) -> ImageRequest:
    images = [{"image_url": "https://a.test/1.png"}]
    return parse_edit({"prompt": "a fox", "images": images, **fields}, CATALOGUE)


def test_an_edit_names_its_pictures_by_url_data_or_id() -> None:
    request = edited(
        images=[
            {"image_url": "https://a.test/1.png"},
            {"image_url": "data:image/png;base64,AAAA"},
            {"file_id": "file_abc"},
        ],
        mask={"file_id": "file_m"},
    )

    assert request.operation is Operation.EDIT
    assert request.references == (
        "https://a.test/1.png",
        "data:image/png;base64,AAAA",
        "file_abc",
    )
    assert request.mask == "file_m"
    assert request.ignored == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": None}, "images"),
        ({"images": []}, "images"),
        ({"images": [{"image_url": "https://a.test/1"}] * 17}, "images"),
        ({"images": ["https://a.test/1"]}, "images[0]"),
        ({"images": [{}]}, "images[0]"),
        ({"images": [{"image_url": "https://a.test/1", "x": 1}]}, "images[0]"),
        ({"images": [{"image_url": "ftp://a"}]}, "images[0].image_url"),
        ({"images": [{"file_id": "https://a.test/1"}]}, "images[0].file_id"),
        ({"images": [{"image_url": "file_abc"}]}, "images[0].image_url"),
        ({"mask": "https://a.test/m"}, "mask"),
        ({"input_fidelity": "medium"}, "input_fidelity"),
    ],
)
def test_an_edit_that_breaks_a_rule_is_refused(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        edited(**fields)

    assert caught.value.param == param


def test_a_form_says_everything_in_text() -> None:
    form = {
        "prompt": "a fox",
        "n": "2",
        "stream": "True",
        "partial_images": "3",
        "output_format": "jpeg",
        "output_compression": "40",
        "quality": "",
    }

    request = parse_edit_form(form, 2, CATALOGUE, has_mask=True)

    assert request.references == ("upload:0", "upload:1")
    assert request.mask == "upload:2"
    assert (request.n, request.stream, request.partial_images) == (2, True, 3)
    assert request.output_compression == 40
    assert request.quality == "medium"


@pytest.mark.parametrize(
    ("form", "images", "param"),
    [
        ({"prompt": "a fox"}, 0, "image"),
        ({"prompt": "a fox"}, 17, "image"),
        ({"prompt": "a fox", "n": "two"}, 1, "n"),
        ({"prompt": "a fox", "n": "1.0"}, 1, "n"),
        ({"prompt": "a fox", "stream": "maybe"}, 1, "stream"),
        ({}, 1, "prompt"),
    ],
)
def test_a_form_that_breaks_a_rule_is_refused(
    form: dict[str, str], images: int, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_edit_form(form, images, CATALOGUE, has_mask=False)

    assert caught.value.param == param


def test_nobody_can_name_an_upload_that_is_not_theirs() -> None:
    with pytest.raises(InvalidRequestError):
        edited(images=[{"image_url": "upload:0"}])


def test_fidelity_is_for_the_models_that_have_it() -> None:
    assert edited(model="gpt-image-1.5", input_fidelity="high").input_fidelity == "high"

    newer = edited(model="gpt-image-2", input_fidelity="high")
    assert newer.input_fidelity is None
    assert newer.ignored == ("input_fidelity",)
