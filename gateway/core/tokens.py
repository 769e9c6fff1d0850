"""How many tokens a request will take, before it is made. Pure, whole numbers only.

Three answers: ``bound_usage`` (the hold), ``least_usage`` (the low end of an
estimate) and ``expected_usage`` (routing, and settling when nothing is reported).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gateway.core.catalogue import TokenRule, Usage, Variant
from gateway.core.requests import ImageRequest
from gateway.core.sizes import (
    RATIOS,
    TABLE_SIZES,
    TIER_BUDGETS_PX,
    Size,
    size_for_ratio,
)

AUTO_SIZE = Size(2048, 2048)
"""What a size left to the model counts as, by the product page."""
TEXT_OVERHEAD_TOKENS = 6
TEXT_BYTES_PER_TOKEN = 3
"""A cautious average over languages; no tokenizer has to be loaded for it."""
REFERENCE_PATCH_PX = 32
REFERENCE_TOKENS_MAX = 1536
"""Covers a mask too, and the 1,097 that the gpt-image-1 family takes at most."""
HIGH_FIDELITY_TOKENS_MAX = 6240
"""What ``input_fidelity: high`` adds to a reference in the gpt-image-1 family."""
PARTIAL_IMAGE_TOKENS = 100

TABLE_TOKENS = {
    Size(1024, 1024): {"low": 272, "medium": 1056, "high": 4160},
    Size(1024, 1536): {"low": 408, "medium": 1584, "high": 6240},
    Size(1536, 1024): {"low": 400, "medium": 1568, "high": 6208},
}
"""Output tokens of the gpt-image-1 family, as published."""
TABLE_QUALITIES = ("low", "medium", "high")

_SMALLEST_SIZES = tuple(
    size_for_ratio(*ratio, TIER_BUDGETS_PX["1K"]) for ratio in RATIOS.values()
)

References = Sequence[Size | None]
"""The pictures that an edit starts from; None where the size is not known."""


def bound_usage(request: ImageRequest, references: References | None = None) -> Usage:
    """Return the most that one picture can take; a request takes ``n`` times that.

    Args:
        request: what is asked for.
        references: those really given, if not just ``request.references``. Each
            counts as the maximum, since small ones are magnified upstream.
    """
    pictures = _references(request, references)
    return Usage(
        text_input=_text_bound(request.prompt),
        image_input=_reference_bound(request) * (len(pictures) + _masks(request)),
        image_output=_most(request),
    )


def expected_usage(
    request: ImageRequest, references: References | None = None
) -> Usage:
    """Return what one picture is expected to take. Never over ``bound_usage``.

    A mask is not expected to count: no price list counts it. The bound covers it.
    """
    return Usage(
        text_input=_text_expected(request.prompt),
        image_input=sum(
            _reference_expected(request, size)
            for size in _references(request, references)
        ),
        image_output=_most(request),
    )


def reported_usage(
    request: ImageRequest, references: References | None = None
) -> Usage:
    """Return what an upstream without a tokenizer reports for one picture.

    The bound, but for references of known size, which count by their patches, and
    without partial pictures, which count as they are sent. The sandbox charges by it.
    """
    bound = bound_usage(request, references)
    known = expected_usage(request, references)
    return replace(
        bound,
        image_input=known.image_input,
        image_output=bound.image_output - _partial_tokens(request),
    )


def least_usage(request: ImageRequest, references: References | None = None) -> Usage:
    """Return the least that one picture can take. Never over ``expected_usage``."""
    variant = request.variant
    return Usage(
        text_input=TEXT_OVERHEAD_TOKENS + 1 if request.prompt else 0,
        image_input=sum(
            reference_tokens(size) if size else 1
            for size in _references(request, references)
        ),
        image_output=min(
            output_tokens(variant, size, quality)
            for size in _sizes(request, _smallest_sizes(variant))
            for quality in _qualities(request)
        ),
    )


def estimated_usage(
    request: ImageRequest,
    made: Iterable[Size],
    *,
    quality: str | None = None,
    references: References | None = None,
    partials: int = 0,
) -> Usage:
    """Return the usage to settle by when the upstream reports none.

    Counts the pictures that were really made, at their real size, and no picture
    over the bound: the charge stays within the hold.

    Args:
        request: what was asked for.
        made: the sizes of the pictures, as delivered.
        quality: what the upstream says it used, if it says so.
        references: as in ``bound_usage``.
        partials: how many partial pictures were sent.
    """
    each = expected_usage(request, references)
    most = each.image_output - _partial_tokens(request)
    used = quality if quality in request.variant.tile_bases else None
    outputs = [
        min(
            most,
            max(
                output_tokens(request.variant, size, q)
                for q in ((used,) if used else _qualities(request))
            ),
        )
        for size in made
    ]
    return Usage(
        text_input=each.text_input * len(outputs),
        image_input=each.image_input * len(outputs),
        image_output=sum(outputs) + PARTIAL_IMAGE_TOKENS * partials,
    )


def output_tokens(variant: Variant, size: Size, quality: str) -> int:
    """Return the output tokens of one picture.

    The tile formula of OpenAI's price calculator, rounded up: it reproduces every
    published count. A variant with a table counts a size outside it as its dearest.
    """
    if variant.token_rule is TokenRule.TABLE:
        row = TABLE_TOKENS.get(size) or TABLE_TOKENS[_DEAREST_TABLE_SIZE]
        return row[quality]
    base = variant.tile_bases[quality]
    short, long = sorted(size)
    tiles = base * ((2 * base * short + long) // (2 * long))
    return -(-tiles * (2_000_000 + size.area_px) // 4_000_000)


def reference_tokens(size: Size) -> int:
    """Return the input tokens of a reference picture: its 32 px patches, capped."""
    across, down = (-(-edge // REFERENCE_PATCH_PX) for edge in size)
    return min(across * down, REFERENCE_TOKENS_MAX)


_DEAREST_TABLE_SIZE = max(TABLE_TOKENS, key=lambda size: TABLE_TOKENS[size]["high"])


def _text_bound(prompt: str) -> int:
    """No tokenizer makes more tokens than there are bytes. 0 without a prompt."""
    return len(prompt.encode()) + TEXT_OVERHEAD_TOKENS if prompt else 0


def _text_expected(prompt: str) -> int:
    if not prompt:
        return 0
    return -(-len(prompt.encode()) // TEXT_BYTES_PER_TOKEN) + TEXT_OVERHEAD_TOKENS


def _reference_expected(request: ImageRequest, size: Size | None) -> int:
    if size is None:
        return _reference_bound(request)
    return _reference_bound(request) - REFERENCE_TOKENS_MAX + reference_tokens(size)


def _references(request: ImageRequest, given: References | None) -> References:
    return (None,) * len(request.references) if given is None else given


def _reference_bound(request: ImageRequest) -> int:
    high = request.input_fidelity == "high"
    return REFERENCE_TOKENS_MAX + (HIGH_FIDELITY_TOKENS_MAX if high else 0)


def _masks(request: ImageRequest) -> int:
    return int(request.mask is not None)


def _most(request: ImageRequest) -> int:
    """Output tokens at the dearest quality and size that the request allows."""
    variant = request.variant
    auto = (
        TABLE_SIZES.values() if variant.token_rule is TokenRule.TABLE else [AUTO_SIZE]
    )
    dearest = max(
        output_tokens(variant, size, quality)
        for size in _sizes(request, auto)
        for quality in _qualities(request)
    )
    return dearest + _partial_tokens(request)


def _partial_tokens(request: ImageRequest) -> int:
    partials = request.partial_images if request.stream else 0
    return PARTIAL_IMAGE_TOKENS * partials


def _smallest_sizes(variant: Variant) -> Iterable[Size]:
    return TABLE_TOKENS if variant.token_rule is TokenRule.TABLE else _SMALLEST_SIZES


def _sizes(request: ImageRequest, auto: Iterable[Size]) -> Iterable[Size]:
    return auto if request.size is None else (request.size,)


def _qualities(request: ImageRequest) -> Iterable[str]:
    auto = request.quality == "auto"
    return request.variant.tile_bases if auto else (request.quality,)
