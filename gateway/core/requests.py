"""Reads a generation request: every rule of the contract, in one place. Pure.

Nothing is fetched, held or bought before a request has passed here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from urllib.parse import urlsplit

from gateway.core.catalogue import Catalogue, Operation, TokenRule, Variant
from gateway.core.errors import InvalidRequestError, NotFoundError
from gateway.core.preferences import parse_routing, parse_routing_text
from gateway.core.routing import NO_PREFERENCES, Preferences
from gateway.core.sizes import Size, resolve_size, shown

DEFAULT_MODEL = "gpt-image-2"
PROMPT_MAX_CHARS = 32_000
"""In Unicode code points, whatever their length in bytes."""
IDENTIFIER_MAX_CHARS = 512
IMAGE_URL_MAX_CHARS = 20_971_520
"""Room for a data URL; the contract of the JSON edit body."""
CALLBACK_URL_MAX_CHARS = 2048
COMPRESSION_MAX = 100
PARTIAL_IMAGES_MAX = 3
IGNORED_MAX = 16
"""So many unknown fields are named to the client; they travel in one header."""
IGNORED_MAX_CHARS = 64
"""Of each name, as it is shown: the header stays within 1 KiB."""

OUTPUT_FORMATS = ("png", "jpeg", "webp")
BACKGROUNDS = ("auto", "opaque", "transparent")
MODERATIONS = ("auto", "low")
RESPONSE_FORMATS = ("url", "b64_json")
INPUT_FIDELITIES = ("high", "low")
REFERENCE_SCHEMES = ("https://", "http://", "data:", "file_")
UPLOAD_SCHEME = "upload:"
"""Names a file that came with the request itself; no client can send this one."""
TRUE_OR_FALSE = {"true": True, "false": False, "1": True, "0": False}
FORM_NUMBERS = frozenset({"n", "output_compression", "partial_images"})
FORM_FLAGS = frozenset({"stream"})
KNOWN_FIELDS = frozenset(
    {
        "background",
        "callback_url",
        "image_urls",
        "mask_url",
        "model",
        "moderation",
        "n",
        "output_compression",
        "output_format",
        "partial_images",
        "prompt",
        "quality",
        "resolution",
        "response_format",
        "routing",
        "safety_identifier",
        "size",
        "stream",
        "user",
    }
)

_EDIT_FIELDS = KNOWN_FIELDS - {"image_urls", "mask_url"} | {"input_fidelity"}
_FORM_NUMBER = re.compile(r"-?[0-9]{1,9}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNPRINTED = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """A request that keeps every rule.

    ``size`` None lets the model choose; ``quality`` is one of the variant's, or
    ``auto``. Fields that are None were not given. ``references`` and ``mask`` say where
    the pictures are: a URL, a data URL, a file id, or ``upload:`` and the place among
    the files that came with the request; ``reference_params`` and ``mask_param`` are
    what the client calls them. ``ignored`` names the fields that had no effect, fit for
    a header.
    """

    variant: Variant
    prompt: str
    size: Size | None
    quality: str
    n: int = 1
    output_format: str = "png"
    background: str | None = None
    output_compression: int | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    response_format: str | None = None
    references: tuple[str, ...] = ()
    mask: str | None = None
    reference_params: tuple[str, ...] = ()
    mask_param: str = "mask"
    input_fidelity: str | None = None
    callback_url: str | None = None
    stream: bool = False
    partial_images: int = 0
    ignored: tuple[str, ...] = ()
    by_url: bool = False
    """Whether ``image_urls`` or ``mask_url`` was given: words of the task contract."""

    routing: Preferences = NO_PREFERENCES
    """As the body says, until headers and key are heard too."""

    @property
    def operation(self) -> Operation:
        """What is asked of the model: references make it an edit."""
        return Operation.EDIT if self.references else Operation.GENERATE


def parse_generation(
    body: object, catalogue: Catalogue, *, prompt_optional: bool = False
) -> ImageRequest:
    """Check a decoded JSON body against every rule; ``null`` counts as not given.

    Args:
        body: whatever the JSON held.
        catalogue: the variants to choose from.
        prompt_optional: let the prompt be missing, and then empty: for estimates.

    Raises:
        InvalidRequestError: a field breaks a rule; ``param`` names it, and is None
            when the body is no object at all.
        NotFoundError: there is no such model, or it is retired.
    """
    fields = _fields(body)
    variant = _variant(fields, catalogue)
    urls = _image_urls(fields, variant.references_max)
    pictures = _Pictures(
        urls,
        _mask_url(fields) if urls else None,
        _named("image_urls", urls),
        "mask_url",
    )
    known = KNOWN_FIELDS if urls else KNOWN_FIELDS - {"mask_url"}
    request = _request(
        fields, variant, pictures, known, prompt_optional=prompt_optional
    )
    return replace(request, by_url=bool(urls) or "mask_url" in fields)


def parse_edit(body: object, catalogue: Catalogue) -> ImageRequest:
    """Check a JSON body of the edit route: ``images`` and ``mask`` are objects.

    Raises:
        InvalidRequestError: a field breaks a rule, or there is no image.
        NotFoundError: there is no such model, or it is retired.
    """
    fields = _fields(body)
    variant = _variant(fields, catalogue)
    images = fields.get("images")
    count_max = variant.references_max
    if not isinstance(images, list) or not 1 <= len(images) <= count_max:
        raise _wrong(
            "images",
            f"must be an array of 1 to {count_max} objects with image_url or file_id",
        )
    references = tuple(
        _image_object(image, f"images[{i}]") for i, image in enumerate(images)
    )
    mask = _image_object(fields["mask"], "mask") if "mask" in fields else None
    known = _EDIT_FIELDS | {"images", "mask"}
    names = tuple(f"images[{place}]" for place in range(len(references)))
    return _request(fields, variant, _Pictures(references, mask, names, "mask"), known)


def parse_edit_form(
    form: Mapping[str, str], images: int, catalogue: Catalogue, *, has_mask: bool
) -> ImageRequest:
    """Check the text fields of a multipart edit that brought ``images`` files.

    The mask, if there is one, is the file after the images.

    Raises:
        InvalidRequestError: a field breaks a rule, or there is no image.
        NotFoundError: there is no such model, or it is retired.
    """
    fields = {name: _from_form(name, text) for name, text in form.items() if text}
    variant = _variant(fields, catalogue)
    if not 1 <= images <= variant.references_max:
        raise _wrong(
            "image",
            f"must be 1 to {variant.references_max} files: send one as image, "
            "several as image[]",
        )
    references = tuple(f"{UPLOAD_SCHEME}{place}" for place in range(images))
    mask = f"{UPLOAD_SCHEME}{images}" if has_mask else None
    pictures = _Pictures(references, mask, _named("image", references), "mask")
    return _request(fields, variant, pictures, _EDIT_FIELDS)


@dataclass(frozen=True, slots=True)
class _Pictures:
    references: tuple[str, ...]
    mask: str | None
    reference_params: tuple[str, ...]
    mask_param: str


def _named(param: str, references: tuple[str, ...]) -> tuple[str, ...]:
    if len(references) == 1:
        return (param,)
    return tuple(f"{param}[{place}]" for place in range(len(references)))


def _request(
    fields: Mapping[str, object],
    variant: Variant,
    pictures: _Pictures,
    known: Collection[str],
    *,
    prompt_optional: bool = False,
) -> ImageRequest:
    prompt = _prompt(fields, required=not prompt_optional)
    asked = _text(fields, "size")
    size = resolve_size(
        "auto" if asked is None else asked, fields.get("resolution"), variant.token_rule
    )
    quality = _choice(fields, "quality", ("auto", *variant.tile_bases))
    output_format = _choice(fields, "output_format", OUTPUT_FORMATS) or "png"
    fidelity = _choice(fields, "input_fidelity", INPUT_FIDELITIES)
    takes_fidelity = pictures.references and variant.token_rule is TokenRule.TABLE
    if not takes_fidelity:
        known = set(known) - {"input_fidelity"}
    return ImageRequest(
        variant=variant,
        prompt=prompt,
        size=size,
        quality=quality or variant.default_quality,
        n=_whole(fields, "n", 1, variant.n_max) or 1,
        output_format=output_format,
        background=_background(fields, output_format),
        output_compression=_compression(fields, output_format),
        moderation=_choice(fields, "moderation", MODERATIONS),
        user=_identifier(fields, "user"),
        safety_identifier=_identifier(fields, "safety_identifier"),
        response_format=_choice(fields, "response_format", RESPONSE_FORMATS),
        references=pictures.references,
        mask=pictures.mask,
        reference_params=pictures.reference_params,
        mask_param=pictures.mask_param,
        input_fidelity=fidelity if takes_fidelity else None,
        callback_url=_callback_url(fields),
        stream=_flag(fields, "stream"),
        partial_images=_whole(fields, "partial_images", 0, PARTIAL_IMAGES_MAX) or 0,
        ignored=_ignored(fields, known),
        routing=parse_routing(fields.get("routing")),
    )


def _fields(body: object) -> dict[str, object]:
    if not isinstance(body, Mapping):
        raise InvalidRequestError(
            'The body must be a JSON object such as {"prompt": "a lighthouse"}.',
            code="invalid_body",
        )
    return {str(name): value for name, value in body.items() if value is not None}


def _from_form(name: str, text: str) -> object:
    # A form has only text. What cannot be read stays text, and is refused as such.
    if name in FORM_NUMBERS and _FORM_NUMBER.fullmatch(text):
        return int(text)
    if name in FORM_FLAGS:
        return TRUE_OR_FALSE.get(text.lower(), text)
    return parse_routing_text(text) if name == "routing" else text


def _variant(fields: Mapping[str, object], catalogue: Catalogue) -> Variant:
    name = _text(fields, "model")
    if name is None:
        name = DEFAULT_MODEL
    variant = catalogue.variant(name)
    live = ", ".join(v.name for v in catalogue.variants.values() if not v.retired)
    if variant is None:
        raise NotFoundError(
            f"The model {shown(name)} does not exist here. Available: {live}.",
            param="model",
            code="model_not_found",
        )
    if variant.retired:
        since = f" on {variant.shutdown_on}" if variant.shutdown_on else ""
        raise NotFoundError(
            f"The model {variant.name} was shut down{since}. "
            f"Use {variant.successor or live} instead.",
            param="model",
            code="model_retired",
            extra={"fallback_suggestion": variant.successor or live},
        )
    return variant


def _prompt(fields: Mapping[str, object], *, required: bool) -> str:
    prompt = _text(fields, "prompt")
    if prompt is None or not prompt.strip():
        if required:
            raise _wrong("prompt", "is required: describe the picture in words")
        return ""
    if len(prompt) > PROMPT_MAX_CHARS:
        raise _wrong(
            "prompt",
            f"may have at most {PROMPT_MAX_CHARS:,} characters, "
            f"and this one has {len(prompt):,}",
        )
    if "\x00" in prompt:
        raise _wrong("prompt", "must not contain the character U+0000")
    return prompt


def _background(fields: Mapping[str, object], output_format: str) -> str | None:
    background = _choice(fields, "background", BACKGROUNDS)
    if background == "transparent" and output_format == "jpeg":
        raise _wrong(
            "background",
            "can be transparent only with output_format png or webp, not jpeg",
        )
    return background


def _compression(fields: Mapping[str, object], output_format: str) -> int | None:
    compression = _whole(fields, "output_compression", 0, COMPRESSION_MAX)
    if compression is not None and output_format == "png":
        raise _wrong(
            "output_compression",
            "applies to output_format jpeg or webp only: "
            "leave it out, or choose one of these",
        )
    return compression


def _identifier(fields: Mapping[str, object], name: str) -> str | None:
    text = _text(fields, name)
    if text is not None and len(text) > IDENTIFIER_MAX_CHARS:
        raise _wrong(name, f"may have at most {IDENTIFIER_MAX_CHARS} characters")
    return text


def _image_urls(fields: Mapping[str, object], count_max: int) -> tuple[str, ...]:
    urls = fields.get("image_urls")
    if urls is None:
        return ()
    if not isinstance(urls, list) or not 1 <= len(urls) <= count_max:
        raise _wrong("image_urls", f"must be an array of 1 to {count_max} URLs")
    return tuple(_reference(url, f"image_urls[{i}]") for i, url in enumerate(urls))


def _mask_url(fields: Mapping[str, object]) -> str | None:
    return _reference(fields["mask_url"], "mask_url") if "mask_url" in fields else None


def _image_object(image: object, param: str) -> str:
    rule = 'must be an object with either "image_url" or "file_id", and nothing else'
    if not isinstance(image, Mapping):
        raise _wrong(param, rule)
    given = {name: value for name, value in image.items() if value is not None}
    if len(given) != 1 or not set(given) <= {"image_url", "file_id"}:
        raise _wrong(param, rule)
    ((name, value),) = given.items()
    located = _reference(value, f"{param}.{name}")
    if located.startswith("file_") != (name == "file_id"):
        raise _wrong(f"{param}.{name}", "has a value of the other kind")
    return located


def _reference(value: object, param: str) -> str:
    located = _text({param: value}, param) or ""
    if len(located) > IMAGE_URL_MAX_CHARS:
        raise _wrong(param, f"may have at most {IMAGE_URL_MAX_CHARS:,} characters")
    if not located[:8].lower().startswith(REFERENCE_SCHEMES):
        raise _wrong(
            param,
            "must be a URL that starts with https://, http:// or data:, "
            "or the id of an uploaded file",
        )
    return located


def _callback_url(fields: Mapping[str, object]) -> str | None:
    url = fields.get("callback_url")
    if url is None:
        return None
    rule = "must be an https URL such as https://example.com/hook"
    if not isinstance(url, str):
        raise _wrong_callback(f"{rule}, not {_json_type(url)}")
    if len(url) > CALLBACK_URL_MAX_CHARS:
        raise _wrong_callback(f"may have at most {CALLBACK_URL_MAX_CHARS:,} characters")
    if _UNPRINTED.search(url) or _SURROGATE.search(url) or not _is_https(url):
        raise _wrong_callback(rule)
    return url


def _wrong_callback(rule: str) -> InvalidRequestError:
    # As where the URL's host is looked at: one code for all that can be wrong with it.
    return InvalidRequestError(
        f"callback_url {rule}.", param="callback_url", code="invalid_callback_url"
    )


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _ignored(fields: Mapping[str, object], known: Collection[str]) -> tuple[str, ...]:
    names = [name for name in fields if name not in known][:IGNORED_MAX]
    return tuple(ascii(name)[1:-1][:IGNORED_MAX_CHARS] for name in names)


# --- one field of one type ---


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(name, f"must be a string, not {_json_type(value)}")
    if not value.isascii() and _SURROGATE.search(value):
        raise _wrong(name, "must be valid Unicode: it has half of a surrogate pair")
    return value


def _choice(
    fields: Mapping[str, object], name: str, allowed: Collection[str]
) -> str | None:
    value = _text(fields, name)
    if value is None:
        return None
    if value not in allowed:
        raise _wrong(name, f"must be one of {', '.join(allowed)}, not {shown(value)}")
    return value


def _whole(fields: Mapping[str, object], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(
            name,
            f"must be a whole number from {low} to {high}, not {_json_type(value)}",
        )
    if not low <= value <= high:
        raise _wrong(name, f"must be a whole number from {low} to {high}")
    return value


def _flag(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(name, f"must be true or false, not {_json_type(value)}")
    return value


def _json_type(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number with a fraction",
        Decimal: "a number with a fraction",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "something else")


def _wrong(name: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {rule}.", param=name)
