"""Seals a key into a cookie that only this gateway can open, until it expires. Pure.

Encrypted with HMAC-SHA256 in counter mode, then authenticated with HMAC-SHA256 under
a key of its own: the standard library has no other cipher.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from enum import StrEnum

SESSION_MAX_S = 12 * 3600
CREDENTIAL_MAX_CHARS = 512
TOKEN_MAX_CHARS = 1024
NONCE_CHARS = 22
"""Of 62 letters and digits: 131 bits of chance, so that none comes twice."""

_TAG_BYTES = 32
_EXPIRES_BYTES = 8
_BLOCK_BYTES = 32


class SessionKind(StrEnum):
    """Whose key it is: a tenant's, or the operator's. One never opens as the other."""

    KEY = "key"
    ADMIN = "admin"


def seal(
    secret: bytes, kind: SessionKind, credential: str, *, nonce: str, expires_s: int
) -> str:
    """Seal a credential until a moment in unix seconds; fit for a cookie.

    Args:
        secret: the gateway's.
        kind: what it may be opened as.
        credential: 1 to 512 characters.
        nonce: 22 characters of chance, never used before.
        expires_s: from then on it does not open any more.
    """
    assert len(nonce) == NONCE_CHARS, nonce
    plain = credential.encode()
    assert 0 < len(credential) <= CREDENTIAL_MAX_CHARS
    head = nonce.encode("ascii") + expires_s.to_bytes(_EXPIRES_BYTES, "big")
    box = head + _crypted(secret, kind, nonce.encode("ascii"), plain)
    return urlsafe_b64encode(box + _tag(secret, kind, box)).decode().rstrip("=")


def open_sealed(
    secret: bytes, kind: SessionKind, token: str, *, now_s: int
) -> str | None:
    """Take the credential out; None if it was made elsewhere, changed, or is over."""
    if len(token) > TOKEN_MAX_CHARS or not token.isascii():
        return None
    try:
        raw = urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except ValueError:
        return None
    box, tag = raw[:-_TAG_BYTES], raw[-_TAG_BYTES:]
    if not hmac.compare_digest(_tag(secret, kind, box), tag):
        return None
    nonce, rest = box[:NONCE_CHARS], box[NONCE_CHARS:]
    if now_s >= int.from_bytes(rest[:_EXPIRES_BYTES], "big"):
        return None
    return _crypted(secret, kind, nonce, rest[_EXPIRES_BYTES:]).decode()


def _crypted(secret: bytes, kind: SessionKind, nonce: bytes, text: bytes) -> bytes:
    # Each way: the text is mixed with a stream that only the secret and nonce give.
    key = _key(secret, kind, b"encrypt")
    blocks = range(-(-len(text) // _BLOCK_BYTES))
    stream = b"".join(
        hmac.digest(key, nonce + block.to_bytes(4, "big"), hashlib.sha256)
        for block in blocks
    )
    return bytes(a ^ b for a, b in zip(text, stream, strict=False))


def _tag(secret: bytes, kind: SessionKind, box: bytes) -> bytes:
    return hmac.digest(_key(secret, kind, b"authenticate"), box, hashlib.sha256)


def _key(secret: bytes, kind: SessionKind, use: bytes) -> bytes:
    label = b"imageway session 1 " + kind.value.encode() + b" " + use
    return hmac.digest(secret, label, hashlib.sha256)
