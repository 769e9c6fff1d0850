"""Free questions that need a credential, to see whether it is good."""

from __future__ import annotations

from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.images_api import Judge
from providers.kit.refusals import judge_body
from providers.kit.replies import Fields, decoded, read_object
from providers.kit.wire import Call, Wire

_NOT_FOUND = frozenset({400, 404, 410, 422})
_AS_IT_SHOULD = frozenset(
    {FailureKind.UNSUPPORTED, FailureKind.INVALID_REQUEST, FailureKind.BAD_GATEWAY}
)
"""What the answer to an odd question is taken for."""


async def ask(wire: Wire, call: Call, judge: Judge = judge_body) -> Fields:
    """Ask what only who has the credential is told.

    Raises:
        ProviderError: it is refused, it was not answered, or not with an object;
            UNSUPPORTED, the server knows no such question.
    """
    try:
        async with wire.exchange(call) as reply:
            if not reply.is_success:
                body = decoded(await reply.error_body())
                raise judge(reply.status, reply.headers, body, call.secret)
            told = await read_object(reply, secret=call.secret)
            if told.get("error"):
                raise judge(reply.status, reply.headers, told, call.secret)
            return told
    except ProviderError as error:
        # Nothing is sold here.
        error.billed = Billed.NO
        raise


async def ask_in_vain(wire: Wire, call: Call, judge: Judge = judge_body) -> None:
    """Ask for what cannot be there: only a good credential is told so, in JSON.

    Raises:
        ProviderError: the credential is refused, or it was not answered.
    """
    try:
        async with wire.exchange(call) as reply:
            body = (
                await read_object(reply, secret=call.secret)
                if reply.is_success
                else decoded(await reply.error_body())
            )
            error = judge(reply.status, reply.headers, body, call.secret)
            told = reply.is_success or reply.status in _NOT_FOUND
            if told and isinstance(body, dict) and error.kind in _AS_IT_SHOULD:
                return
            raise error
    except ProviderError as error:
        error.billed = Billed.NO
        raise


def is_used_up(left: object) -> bool:
    """Tell whether an amount that is left is nothing; one that is not told is not."""
    return isinstance(left, int | float) and left <= 0
