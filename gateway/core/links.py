"""Signed, expiring links to pictures. Pure.

A link names what it opens and until when; the signature covers both. Whoever holds
the link may open it: no key is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode
from urllib.parse import quote


def sign(secret: bytes, path: str, expires_s: int) -> str:
    """Sign a path and an expiry in unix seconds; returns the query to append."""
    return f"expires={expires_s}&signature={_signature(secret, path, expires_s)}"


def is_signed(secret: bytes, path: str, expires_s: int, signature: str) -> bool:
    """Tell whether a signature fits a path and an expiry, in constant time."""
    expected = _signature(secret, path, expires_s)
    return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))


def result_path(blob: str, media_type: str) -> str:
    """Give the path of a picture's link: ``/files/results/<task>/<index>.<ext>``."""
    extension = {"image/jpeg": "jpg"}.get(media_type, media_type.removeprefix("image/"))
    return f"/files/results/{quote(blob)}.{extension}"


def _signature(secret: bytes, path: str, expires_s: int) -> str:
    text = f"GET\n{path}\n{expires_s}".encode()
    digest = hmac.new(secret, text, hashlib.sha256).digest()
    return urlsafe_b64encode(digest).decode().rstrip("=")
