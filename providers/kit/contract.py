"""The contract between the gateway and an upstream adapter.

Standard library only and free of I/O, so that the gateway's core may use its words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol


class Operation(Enum):
    """What is asked of a model."""

    GENERATE = "generate"
    EDIT = "edit"


class FailureKind(Enum):
    """Why an attempt failed. Decided once, by the adapter; it decides what is next."""

    INVALID_REQUEST = "invalid_request"
    """The request is wrong wherever it is sent. Never tried elsewhere."""

    CONTENT_POLICY = "content_policy"
    """Moderation refused prompt or picture. Never tried elsewhere: no shopping."""

    UNSUPPORTED = "unsupported"
    """This offer cannot do it (unknown model, deployment or parameter). Alert."""

    AUTH = "auth"
    """The credential is refused or the account is locked. Alert."""

    INSUFFICIENT_FUNDS = "insufficient_funds"
    """The account at the upstream is out of money or over its spend limit. Alert."""

    RATE_LIMITED = "rate_limited"
    """Too many requests for now; healthy otherwise."""

    OVERLOADED = "overloaded"
    """No capacity at the upstream."""

    BAD_GATEWAY = "bad_gateway"
    """5xx, an answer that cannot be read, an error nobody has seen before."""

    NETWORK = "network"
    """The connection failed before the request was out: certainly not bought."""

    TIMEOUT = "timeout"
    """Unknown outcome: no whole answer after the request was out. Maybe bought."""

    NO_OUTPUT = "no_output"
    """A success that carries no picture."""

    RESULT_LOST = "result_lost"
    """The picture was made and paid, and cannot be fetched."""


class Billed(Enum):
    """Whether the upstream may charge for a failed attempt."""

    NO = "no"
    MAYBE = "maybe"
    YES = "yes"


BILLED_BY_KIND: Mapping[FailureKind, Billed] = {
    FailureKind.INVALID_REQUEST: Billed.NO,
    FailureKind.CONTENT_POLICY: Billed.NO,
    FailureKind.UNSUPPORTED: Billed.NO,
    FailureKind.AUTH: Billed.NO,
    FailureKind.INSUFFICIENT_FUNDS: Billed.NO,
    FailureKind.RATE_LIMITED: Billed.NO,
    FailureKind.OVERLOADED: Billed.NO,
    FailureKind.BAD_GATEWAY: Billed.NO,
    FailureKind.NETWORK: Billed.NO,
    FailureKind.TIMEOUT: Billed.MAYBE,
    FailureKind.NO_OUTPUT: Billed.MAYBE,
    FailureKind.RESULT_LOST: Billed.YES,
}
"""The usual answer per kind; an adapter that knows better says so in the error."""


class ProviderError(Exception):
    """A failed attempt, in terms that the router can act on.

    Args:
        kind: what failed; see ``FailureKind``.
        detail: for logs and operators only. May hold upstream wording, never a
            secret; clients never see it.
        status: the upstream's HTTP status, if it answered at all.
        upstream_code: the upstream's own error code, as it came.
        retry_after_s: how long the upstream asked us to stay away, in seconds.
        billed: whether the upstream may charge; by default what is usual for the
            kind.
        client_message: what may be shown to the client of a refused request.
        ended: the job itself is over, so asking again is no use; without it, a
            failure of ``poll`` may be one of the asking alone.
        cost_nanousd: what the upstream says that it charges all the same.
    """

    def __init__(  # noqa: PLR0913 - each is said of a failure where it is known
        self,
        kind: FailureKind,
        detail: str,
        *,
        status: int | None = None,
        upstream_code: str | None = None,
        retry_after_s: float | None = None,
        billed: Billed | None = None,
        client_message: str | None = None,
        ended: bool = False,
        cost_nanousd: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status
        self.upstream_code = upstream_code
        self.retry_after_s = retry_after_s
        self.billed = billed or BILLED_BY_KIND[kind]
        self.client_message = client_message
        self.ended = ended
        self.cost_nanousd = cost_nanousd


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job. A cached token counts in ``*_cached`` only."""

    text_input: int = 0
    text_cached: int = 0
    image_input: int = 0
    image_cached: int = 0
    image_output: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            assert getattr(self, name) >= 0, (name, self)

    def times(self, count: int) -> Usage:
        """Return the usage of ``count`` such jobs."""
        return Usage(*(getattr(self, name) * count for name in self.__slots__))

    def shared(self, count: int) -> Usage:
        """Return what each of ``count`` pictures took, rounded down."""
        return Usage(*(getattr(self, name) // count for name in self.__slots__))

    def minus(self, other: Usage) -> Usage:
        """Return what is left without the other, which is part of it."""
        names = self.__slots__
        return Usage(*(getattr(self, name) - getattr(other, name) for name in names))

    def plus(self, other: Usage) -> Usage:
        """Return both usages together."""
        names = self.__slots__
        return Usage(*(getattr(self, name) + getattr(other, name) for name in names))


class Payload(Protocol):
    """The bytes of one picture, spooled: a little in memory, the rest in a file.

    Can be read any number of times until it is closed.
    """

    @property
    def encoding(self) -> Literal["base64", "raw"]:
        """How ``chunks`` are encoded: base64 text as it came, or the file itself."""
        ...

    @property
    def size_bytes(self) -> int:
        """Length of what ``chunks`` yields, in bytes."""
        ...

    def chunks(self) -> Iterator[bytes]:
        """Yield the content from its start, at most 64 KiB at a time."""
        ...

    def persist(self, path: str) -> None:
        """Keep the content, encoded as it is, as a file of that path.

        Survives ``close``. No copy is made where the spool already is a file on the
        same file system.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def close(self) -> None:
        """Give memory and file back. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class InputFile:
    """A reference picture or mask: checked, and spooled until the task is over."""

    payload: Payload
    media_type: str
    width_px: int
    height_px: int


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One job in the gateway's own words: validated, sized and priced.

    ``width_px`` and ``height_px`` are None where the model may choose. Fields that
    are None were not given and are not sent. ``expected`` is the gateway's own
    estimate for one picture of this job. ``task_id`` and ``seq`` together name one
    call, for upstreams that take an idempotency key. ``deadline_s`` is how long the
    call may take, ``wanted_for_s`` how long the result is wanted for, in seconds from
    the call, if the job is left pending; None: as long as the call.
    """

    task_id: str
    model: str
    operation: Operation
    prompt: str
    width_px: int | None
    height_px: int | None
    quality: str
    n: int
    output_format: str
    expected: Usage
    deadline_s: float
    background: str | None = None
    output_compression: int | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    input_fidelity: str | None = None
    references: tuple[InputFile, ...] = ()
    mask: InputFile | None = None
    partial_images: int = 0
    seq: int = 1
    wanted_for_s: float | None = None

    @property
    def patience_s(self) -> float:
        """How long an upstream may work on it before nobody waits any more."""
        return self.deadline_s if self.wanted_for_s is None else self.wanted_for_s


@dataclass(frozen=True, slots=True)
class MadeImage:
    """One picture as the upstream gave it. Whoever holds it closes the payload."""

    payload: Payload
    media_type: str
    width_px: int
    height_px: int
    revised_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The upstream has finished. Never without a picture.

    ``usage`` is the total over all pictures, None when the upstream reports none.
    ``cost_nanousd`` is what the upstream says that it charged, if it says so;
    ``units_millionths`` how many of its billable units it counted, if it counts units.
    """

    images: tuple[MadeImage, ...]
    usage: Usage | None
    cost_nanousd: int | None = None
    units_millionths: int | None = None
    upstream_request_id: str | None = None
    quality: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        assert self.images


@dataclass(frozen=True, slots=True)
class Partial:
    """A first look at a picture that is still being made. Costs tokens of its own.

    ``index`` counts from 0. Fewer may come than were asked for.
    """

    index: int
    image: MadeImage


@dataclass(frozen=True, slots=True)
class Pending:
    """The upstream works on. ``job_id`` finds the job again after a restart."""

    job_id: str
    poll_after_s: float = 1.0
    progress: int | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The upstream has stopped a job, or has taken the wish to.

    ``billed`` tells whether it charges for it all the same, ``usage`` and
    ``cost_nanousd`` what it reports of that, if anything.
    """

    billed: Billed = Billed.NO
    usage: Usage | None = None
    cost_nanousd: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one model at one upstream can do; checked before any call.

    An empty ``qualities`` or ``sizes`` means: any that the variant allows. ``stream``
    tells that ``Provider.stream`` shows partial pictures, ``cancel`` that a job that
    was left pending can be stopped. A job of an operation in ``idempotent`` may be
    handed over again under the same ``task_id`` and ``seq``: what is bought already is
    not bought twice.
    """

    operations: frozenset[Operation] = frozenset({Operation.GENERATE})
    n_max: int = 10
    sizes: frozenset[tuple[int, int]] = frozenset()
    qualities: frozenset[str] = frozenset()
    output_formats: frozenset[str] = frozenset({"png", "jpeg", "webp"})
    backgrounds: frozenset[str] = frozenset({"opaque", "transparent"})
    mask: bool = False
    references_max: int = 0
    stream: bool = False
    cancel: bool = False
    idempotent: frozenset[Operation] = frozenset()


@dataclass(frozen=True, slots=True)
class Account:
    """An account at a provider: all that an adapter needs to reach it.

    ``options`` are the adapter's own settings (quirks), as the config gives them.
    """

    name: str
    base_url: str
    secret: str = field(repr=False, default="")
    options: Mapping[str, object] = field(default_factory=dict)


class Provider(Protocol):
    """An upstream. Every failure leaves as ``ProviderError``; nothing else may."""

    def capabilities(self, model: str) -> Capabilities:
        """Tell what a model can do here. No I/O."""
        ...

    async def start(self, job: ImageJob) -> Done | Pending:
        """Hand the job over once. Never retries: the gateway owns retries."""
        ...

    def stream(self, job: ImageJob) -> AsyncGenerator[Partial | Done, None]:
        """Hand the job over once, and yield partial pictures, then ``Done``, last.

        Only for models whose capabilities say ``stream``. Whoever iterates owns the
        payloads, and closes the generator.
        """
        ...

    async def poll(self, job: ImageJob, job_id: str) -> Done | Pending:
        """Ask after a job that ``start`` left pending.

        A job that the upstream has stopped, for whatever reason, is a failure.
        """
        ...

    async def cancel(self, job: ImageJob, job_id: str) -> Cancelled | None:
        """Stop a job that ``start`` left pending.

        Only for models whose capabilities say ``cancel``. None: it is too late, the
        job has ended; ``poll`` tells how.
        """
        ...

    async def probe(self, model: str, deadline_s: float) -> None:
        """Ask something that is free and needs the credential.

        Raises:
            ProviderError: AUTH, INSUFFICIENT_FUNDS, NETWORK, TIMEOUT...; UNSUPPORTED
                when the server has nothing free to ask, so nothing is known.
        """
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...
