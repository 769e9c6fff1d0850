"""Pictures are only fetched from those who may be asked."""

from __future__ import annotations

import pytest

from providers.kit.contract import Billed, FailureKind, ProviderError
from providers.kit.pictures import hosts_of, of_a_download

HOME = "https://api.upstream.test:8443/v1"
HOSTS = frozenset({"api.upstream.test", "Pictures.test"})
K = FailureKind


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://pb.Pictures.test/x", "pb.pictures.test"),
        ("https://a.b.pictures.test/x", "a.b.pictures.test"),
        ("https://pictures.test/x.png", None),
        ("https://b.api.upstream.test/x.png", None),
        ("https://evilpictures.test/x", None),
        ("https://pictures.test.x.test/x", None),
        ("https://[broken/x", None),
        ("x", None),
    ],
)
def test_a_host_below_a_domain_may_be_asked_too(url: str, host: str | None) -> None:
    more = {host} if host else set()
    assert hosts_of(url, ["Pictures.test"], HOME) == HOSTS | more


def failed(kind: FailureKind, status: int | None = None) -> ProviderError:
    """A download that failed, as the wire puts it."""
    error = ProviderError(K.RESULT_LOST, "not fetched", status=status)
    error.__cause__ = ProviderError(kind, "why")
    return error


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (failed(K.NETWORK), False),
        (failed(K.TIMEOUT), False),
        (failed(K.RESULT_LOST, 408), False),
        (failed(K.RESULT_LOST, 429), False),
        (failed(K.RESULT_LOST, 500), False),
        (failed(K.RESULT_LOST, 503), False),
        (failed(K.RESULT_LOST, 403), True),
        (failed(K.RESULT_LOST, 404), True),
        (failed(K.RESULT_LOST, 410), True),
        (failed(K.RESULT_LOST), True),
        (ProviderError(K.RESULT_LOST, "a foreign host"), True),
    ],
    ids=str,
)
def test_a_picture_out_of_reach_is_worth_another_look_and_a_lost_one_is_not(
    error: ProviderError, ended: bool
) -> None:
    told = of_a_download(error)
    assert told.kind is (K.RESULT_LOST if ended else K.BAD_GATEWAY)
    assert (told.billed, told.ended, told.status) == (Billed.YES, ended, error.status)
