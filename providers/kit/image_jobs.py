"""Jobs as requests of OpenAI-style images APIs: fields, and forms with files.

For every adapter that speaks this API, whatever its URLs and credentials look like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from providers.kit.contract import (
    Billed,
    Capabilities,
    FailureKind,
    ImageJob,
    Operation,
    ProviderError,
)
from providers.kit.multipart import FormFile, form
from providers.kit.wire import Body, unreadable_file, unwritable

_FIXED_FIDELITY = re.compile(r"(?:.*/)?gpt-image-2")
"""These always look closely, and refuse to be told so."""


def job_fields(
    job: ImageJob, *, maker: str | None = None, stream: bool = False
) -> dict[str, object]:
    """Write a job as the fields of ``/images/generations`` or ``/images/edits``.

    ``maker`` is the model behind ``job.model``, where that is a name of one's own.
    """
    fields: dict[str, object] = {
        "model": job.model,
        "prompt": job.prompt,
        "n": job.n,
        "size": size_word(job),
        "quality": job.quality,
        "output_format": job.output_format,
    }
    if job.output_format != "png":
        fields["output_compression"] = job.output_compression
    fields["background"] = job.background
    fields["moderation"] = job.moderation
    fields["user"] = job.user
    fields["safety_identifier"] = job.safety_identifier
    edit = job.operation is Operation.EDIT
    if edit and not _FIXED_FIDELITY.match(maker or job.model):
        fields["input_fidelity"] = job.input_fidelity
    if stream:
        fields["stream"] = True
        fields["partial_images"] = job.partial_images
    return {name: value for name, value in fields.items() if value is not None}


def edit_form(job: ImageJob, fields: Mapping[str, object]) -> Body:
    """Write an edit as a form: one picture is ``image``, several are ``image[]``.

    Raises:
        ProviderError: a field cannot be written, a file cannot be read.
    """
    name = "image" if len(job.references) == 1 else "image[]"
    files = [FormFile(name, reference) for reference in job.references]
    if job.mask is not None:
        files.append(FormFile("mask", job.mask))
    texts = [
        (name, str(value).lower() if isinstance(value, bool) else str(value))
        for name, value in fields.items()
    ]
    try:
        return form(texts, files)
    except UnicodeEncodeError as error:
        raise unwritable() from error
    except OSError as error:
        raise unreadable_file(error) from error


def check_edit(job: ImageJob, capable: Capabilities) -> None:
    """Turn an edit away that is beyond an offer.

    Raises:
        ProviderError: UNSUPPORTED.
    """
    if Operation.EDIT not in capable.operations:
        raise unable("no edits here")
    if not 1 <= len(job.references) <= capable.references_max:
        raise unable(f"no edits of {len(job.references)} pictures here")
    if job.mask is not None and not capable.mask:
        raise unable("no masks here")


def unable(detail: str) -> ProviderError:
    """Say that this offer cannot do it."""
    return ProviderError(FailureKind.UNSUPPORTED, detail)


def unfindable(detail: str) -> ProviderError:
    """Say that a job is out which cannot be asked after here; it may be charged for."""
    return ProviderError(FailureKind.UNSUPPORTED, detail, billed=Billed.MAYBE)


def size_word(job: ImageJob) -> str:
    """Name the size that a job asks for; ``auto`` where the model may choose."""
    if job.width_px is None or job.height_px is None:
        return "auto"
    return f"{job.width_px}x{job.height_px}"
