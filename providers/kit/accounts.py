"""Checks that an account can work at all, before anything is sent."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_url(url: str, name: str = "base_url") -> None:
    """Check an URL that paths are put behind.

    Raises:
        ValueError: the message names what is wrong.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.scheme in {"http", "https"}
        usable = usable and not (parts.query or parts.fragment or "@" in parts.netloc)
        usable = usable and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{name}: must be http(s)://host[:port][/path], nothing more")


def check_secret(secret: str) -> None:
    """Check that a credential can be sent in a header.

    Raises:
        ValueError: it cannot.
    """
    if not secret.isascii() or not secret.isprintable():
        raise ValueError("credential: holds characters that cannot be sent")
