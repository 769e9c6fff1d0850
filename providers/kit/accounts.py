"""Checks of what an account is made of, before anything is sent.

Their messages name what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard, TypeVar
from urllib.parse import SplitResult, urlsplit

import msgspec

from providers.kit.contract import Account

AnyOptions = TypeVar("AnyOptions", bound=msgspec.Struct)

_PORTS = {"http": 80, "https": 443}


def read_options(options: Mapping[str, object], kind: type[AnyOptions]) -> AnyOptions:
    """Check an account's options.

    Raises:
        ValueError: the message names the option that is wrong.
    """
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"options: {error}") from error


def check_account(account: Account) -> None:
    """Check the base URL, and that there is a credential.

    Raises:
        ValueError: the message begins with what is wrong.
    """
    check_base_url(account.base_url)
    check_secret(account.secret)
    if not account.secret:
        raise ValueError("credential: is empty")


def check_secret(secret: str) -> None:
    """Check that a secret can stand in a header.

    Raises:
        ValueError: it cannot.
    """
    if not secret.isascii() or not secret.isprintable():
        raise ValueError("credential: holds characters that cannot be sent")


def check_base_url(base_url: str, name: str = "base_url") -> None:
    """Check that paths can be put behind a base URL.

    Raises:
        ValueError: they cannot; the message begins with ``name``.
    """
    try:
        parts = urlsplit(base_url)
        usable = bool(parts.hostname) and parts.scheme in _PORTS
        usable = usable and not (parts.query or parts.fragment or "@" in parts.netloc)
        usable = usable and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{name}: must be http(s)://host[:port][/path], nothing more")


def is_at_home(url: object, base_url: str) -> TypeGuard[str]:
    """Tell whether a URL is on the host that the credential is for.

    Scheme and port must be the same too: only there may the credential be sent.
    """
    if not isinstance(url, str) or not url.isascii() or not url.isprintable():
        return False
    try:
        given, home = urlsplit(url), urlsplit(base_url)
        return "@" not in given.netloc and _origin(given) == _origin(home)
    except ValueError:
        return False


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
