"""What a server of an OpenAI-style images API can do, as the options of its account."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, get_args

import msgspec

from providers.kit.contract import Capabilities, Operation
from providers.kit.images_api import Background, Quality

Format = Literal["png", "jpeg", "webp"]
Plain = Annotated[str, msgspec.Meta(pattern="^[!-~]*$")]
Word = Annotated[str, msgspec.Meta(pattern="^[!-~]+$")]
Host = Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.:-]+$")]
Size = Annotated[str, msgspec.Meta(pattern="^[1-9][0-9]{1,4}x[1-9][0-9]{1,4}$")]


class Abilities(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that say what a server can do.

    ``edits``, ``mask`` and ``stream`` say whether it can do that, ``references_max``
    how many pictures an edit may start from. Empty ``sizes`` and ``qualities`` mean:
    any.
    """

    edits: bool = True
    references_max: Annotated[int, msgspec.Meta(ge=1, le=16)] = 16
    mask: bool = True
    stream: bool = True
    n_max: Annotated[int, msgspec.Meta(ge=1, le=10)] = 10
    sizes: frozenset[Size] = frozenset()
    qualities: frozenset[Quality] = frozenset()
    output_formats: frozenset[Format] = frozenset(get_args(Format))
    backgrounds: frozenset[Background] = frozenset(get_args(Background))


def capabilities_of(able: Abilities) -> Capabilities:
    """Say the same in the words of the contract."""
    return Capabilities(
        operations=operations(edits=able.edits),
        n_max=able.n_max,
        sizes=sizes_px(able.sizes),
        qualities=frozenset(able.qualities),
        output_formats=frozenset(able.output_formats),
        backgrounds=frozenset(able.backgrounds),
        mask=able.edits and able.mask,
        references_max=able.references_max if able.edits else 0,
        stream=able.stream,
    )


def operations(*, edits: bool) -> frozenset[Operation]:
    """Everything, or all but edits."""
    return frozenset(Operation) if edits else frozenset({Operation.GENERATE})


def sizes_px(sizes: Iterable[Size]) -> frozenset[tuple[int, int]]:
    """Read sizes as width and height."""
    split = (size.split("x") for size in sizes)
    return frozenset((int(width), int(height)) for width, height in split)
