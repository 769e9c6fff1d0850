"""The form of an API key: ``iwk_live_``, 30 random characters, 6 of checksum.

The checksum lets a secret scanner tell a real key from noise, and turns a mistyped
key away without a look into the store.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import zlib

PREFIX = "iwk_live_"
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
RANDOM_CHARS = 30
CHECKSUM_CHARS = 6

_KEY = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{RANDOM_CHARS + CHECKSUM_CHARS}}}")


def key_from(random: str) -> str:
    """Build a key from 30 unguessable characters of ``ALPHABET``."""
    assert len(random) == RANDOM_CHARS
    assert set(random) <= set(ALPHABET)
    body = PREFIX + random
    return body + _checksum(body)


def is_well_formed(text: str) -> bool:
    """Tell whether a text has the form of a key, checksum included."""
    return _KEY.fullmatch(text) is not None and hmac.compare_digest(
        _checksum(text[:-CHECKSUM_CHARS]), text[-CHECKSUM_CHARS:]
    )


def digest(text: str, pepper: bytes) -> bytes:
    """Return what is stored instead of a key: 32 bytes of HMAC-SHA256.

    A key holds 178 bits of chance, so a slow hash would only cost time. The pepper
    keeps a stolen database from being matched against keys found elsewhere.
    """
    return hmac.digest(pepper, text.encode("utf-8", "surrogatepass"), hashlib.sha256)


def display(text: str) -> str:
    """Shorten a key to what may be shown again, e.g. ``iwk_live_ab…wxyz``."""
    assert is_well_formed(text)
    return f"{text[: len(PREFIX) + 2]}…{text[-4:]}"


def _checksum(body: str) -> str:
    rest = zlib.crc32(body.encode("ascii"))
    chars = ""
    for _ in range(CHECKSUM_CHARS):
        rest, digit = divmod(rest, len(ALPHABET))
        chars = ALPHABET[digit] + chars
    return chars
