from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.sessions import SessionKind, open_sealed, seal

SECRET = b"s" * 32
NONCE = "abcdefghijklmnopqrstuv"
KEY = "iwk_live_" + "k" * 36


def sealed(credential: str = KEY, kind: SessionKind = SessionKind.KEY) -> str:
    return seal(SECRET, kind, credential, nonce=NONCE, expires_s=1_000)


def opened(token: str, now_s: int = 999, secret: bytes = SECRET) -> str | None:
    return open_sealed(secret, SessionKind.KEY, token, now_s=now_s)


@given(st.text(min_size=1, max_size=100).filter(lambda t: t.isprintable()))
def test_what_was_sealed_comes_out_until_it_expires(credential: str) -> None:
    token = sealed(credential)
    assert opened(token) == credential
    assert opened(token, now_s=1_000) is None


def test_the_key_cannot_be_read_off_the_token() -> None:
    raw = urlsafe_b64decode(sealed() + "==")
    assert KEY.encode() not in raw
    assert b"kkkk" not in raw


@given(st.data())
def test_a_token_with_any_byte_changed_does_not_open(data: st.DataObject) -> None:
    raw = bytearray(urlsafe_b64decode(sealed() + "=="))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    assert opened(urlsafe_b64encode(raw).decode().rstrip("=")) is None


def test_neither_another_gateway_nor_another_kind_opens_it() -> None:
    assert opened(sealed(), secret=b"t" * 32) is None
    assert opened(sealed(kind=SessionKind.ADMIN)) is None


@given(st.text(max_size=200))
def test_noise_is_no_token(noise: str) -> None:
    assert opened(noise) is None
