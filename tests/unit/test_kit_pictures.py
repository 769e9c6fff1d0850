"""Pictures are only fetched from those who may be asked."""

from __future__ import annotations

import pytest

from providers.kit.pictures import hosts_for

HOSTS = frozenset({"api.upstream.test", "pictures.test"})


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://pb.Pictures.test/x", "pb.pictures.test"),
        ("https://a.b.pictures.test/x", "a.b.pictures.test"),
        ("https://pictures.test/x.png", None),
        ("https://evilpictures.test/x", None),
        ("https://pictures.test.x.test/x", None),
        ("https://[broken/x", None),
        ("x", None),
    ],
)
def test_a_host_below_a_domain_may_be_asked_too(url: str, host: str | None) -> None:
    more = {host} if host else set()
    assert hosts_for(url, HOSTS, ["Pictures.test"]) == HOSTS | more
