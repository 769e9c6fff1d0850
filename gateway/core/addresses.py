"""Which URLs and network addresses callers may point the gateway at. Pure.

Built from IANA's special-purpose address registries, not from ``ipaddress.is_global``:
its verdict differs between Python versions, and it counts ranges as global that lead
back inside (6to4, Azure's 168.63.129.16).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
)
from urllib.parse import quote, urljoin

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

URL_MAX_CHARS = 8192
HOST_MAX_CHARS = 253
HOPS_MAX = 32
"""Proxies that a request may have come through; what is before is not looked at."""

_DENIED_IPV4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a carrier's NAT; Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host, inside every virtual machine
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_IPV6_UNICAST = IPv6Network("2000::/3")
"""The only part of IPv6 that is handed out: all the rest is refused unseen."""
_DENIED_IPV6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_IPV4_INSIDE = (
    IPv6Network("::ffff:0:0/96"),  # mapped: the system dials the IPv4 address
    IPv6Network("64:ff9b::/96"),  # NAT64, all that networks without IPv4 see of it
)

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<site>[^/?#]*)(?P<rest>.*)"
)
_SITE = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]*)(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_IDEOGRAPHIC_FULL_STOP = "\u3002"
_PLAIN_IN_TARGET = "!$%&'()*+,-./:;=?@[]_~"
_INTERNAL = frozenset(
    {
        "alt",
        "arpa",
        "corp",
        "home",
        "internal",
        "intranet",
        "invalid",
        "lan",
        "local",
        "localdomain",
        "localhost",
        "onion",
        "private",
        "test",
    }
)
"""Last labels that no public name has."""
_DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST_REFUSED = (
    "The URL's host must be a public name, such as images.example.com, or an IP "
    "address in its usual spelling."
)


class ForbiddenUrlError(ValueError):
    """A URL that is not fetched, whatever its host resolves to. Safe to show."""


@dataclass(frozen=True, slots=True)
class UrlRules:
    """What URLs may look like; ``schemes`` is one or both of https and http."""

    schemes: tuple[str, ...] = ("https",)
    ports: tuple[int, ...] = (443, 80)

    def __post_init__(self) -> None:
        assert self.schemes
        assert set(self.schemes) <= set(_DEFAULT_PORTS), self.schemes


@dataclass(frozen=True, slots=True)
class CheckedUrl:
    """A URL that may be fetched if its host's addresses are public.

    ``host`` is an ASCII name in small letters, or an address without brackets;
    ``target`` is what goes into the request line.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.port == _DEFAULT_PORTS[self.scheme]:
            return host
        return f"{host}:{self.port}"

    @property
    def text(self) -> str:
        """The URL as it is fetched."""
        return f"{self.scheme}://{self.authority}{self.target}"


def is_public(address: Address) -> bool:
    """Tell whether an address belongs to the public internet."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _DENIED_IPV4)
    if address.scope_id is not None:
        return False
    if any(address in network for network in _IPV4_INSIDE):
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    return address in _IPV6_UNICAST and not any(
        address in network for network in _DENIED_IPV6
    )


def may_reach(address: Address, allow: Iterable[Network]) -> bool:
    """Tell whether an address is public or on the operator's own list."""
    return is_public(address) or any(address in network for network in allow)


def plain_address(text: str) -> Address | None:
    """Read an address; IPv4 that came over an IPv6 socket is IPv4. None for no address.

    A zone (``fe80::1%eth0``) is left out.
    """
    try:
        found = ip_address(text.strip().partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def client_address(peer: str, forwarded: str, trusted: Collection[Network]) -> str:
    """Tell where a request comes from.

    Args:
        peer: who is connected.
        forwarded: ``X-Forwarded-For``, all its lines joined by commas.
        trusted: proxies that are believed. Each adds at the end who was connected to
            it, so the list is read from there, as far as only they have written it.
    """
    address = plain_address(peer)
    if not trusted or address is None or not forwarded:
        return peer if address is None else str(address)
    for hop in reversed(forwarded.rsplit(",", HOPS_MAX)[-HOPS_MAX:]):
        if not any(address in network for network in trusted):
            break
        before = plain_address(_without_port(hop.strip()))
        if before is None:
            break
        address = before
    return str(address)


def _without_port(text: str) -> str:
    # Some proxies write the port too: 203.0.113.7:4711, [2001:db8::1]:4711.
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def checked_url(text: str, rules: UrlRules) -> CheckedUrl:
    """Take a URL apart, strictly: what could be read in two ways is refused.

    Raises:
        ForbiddenUrlError: it breaks a rule; the message says which.
    """
    _check_characters(text)
    parts = _URL.fullmatch(text)
    scheme = parts["scheme"].lower() if parts else ""
    if parts is None or scheme not in rules.schemes:
        starts = " or ".join(f"{scheme}://" for scheme in rules.schemes)
        raise ForbiddenUrlError(f"The URL must start with {starts}.")
    if "@" in parts["site"]:
        raise ForbiddenUrlError("The URL must not carry a user name or password.")
    if "#" in parts["rest"]:
        raise ForbiddenUrlError("The URL must not have a fragment (#...).")
    site = _SITE.fullmatch(parts["site"])
    if site is None:
        raise ForbiddenUrlError(_HOST_REFUSED)
    port = int(site["port"] or _DEFAULT_PORTS[scheme])
    if port not in rules.ports:
        ports = " or ".join(str(port) for port in rules.ports)
        raise ForbiddenUrlError(f"The URL's port must be {ports}.")
    return CheckedUrl(scheme, _checked_host(site["host"]), port, _target(parts["rest"]))


def redirected(url: CheckedUrl, location: str, rules: UrlRules) -> CheckedUrl:
    """Check where a redirect leads to, from scratch.

    Raises:
        ForbiddenUrlError: it breaks a rule.
    """
    _check_characters(location)
    try:
        text = urljoin(url.text, location)
    except ValueError as error:
        raise ForbiddenUrlError(_HOST_REFUSED) from error
    return checked_url(text, rules)


def _check_characters(text: str) -> None:
    if len(text) > URL_MAX_CHARS:
        raise ForbiddenUrlError(
            f"The URL must be at most {URL_MAX_CHARS} characters long."
        )
    # Not printable: control and format characters, other blanks, lone surrogates.
    if "\\" in text or " " in text or not text.isprintable():
        raise ForbiddenUrlError(
            "The URL must not contain blanks, backslashes or control characters: "
            "percent-encode them."
        )


def _checked_host(host: str) -> str:
    if host.startswith("["):
        return _ipv6_host(host[1:-1])
    host = _ascii_host(host)
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # It ends like an IPv4 address, and some resolvers take it for one however
        # it is written: 127.1, 0x7f.1, 017700000001, 2130706433.
        return _ipv4_host(host)
    if (
        len(host) > HOST_MAX_CHARS
        or len(labels) == 1
        or labels[-1] in _INTERNAL
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise ForbiddenUrlError(_HOST_REFUSED)
    return host


def _ipv6_host(host: str) -> str:
    try:
        address = IPv6Address(host)
    except AddressValueError as error:
        raise ForbiddenUrlError(_HOST_REFUSED) from error
    if address.scope_id is not None:
        raise ForbiddenUrlError(_HOST_REFUSED)
    return str(address)


def _ipv4_host(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except AddressValueError as error:
        raise ForbiddenUrlError(_HOST_REFUSED) from error


def _ascii_host(host: str) -> str:
    """Write a name in small ASCII letters, unless that would make it another one."""
    if host.isascii():
        return host.lower()
    if (
        len(host) > HOST_MAX_CHARS
        or _IDEOGRAPHIC_FULL_STOP in host
        or unicodedata.normalize("NFKC", host) != host
        or any(char.isdigit() and not char.isascii() for char in host)
    ):
        raise ForbiddenUrlError(_HOST_REFUSED)
    try:
        encoded = host.lower().encode("idna")
        unchanged = encoded.decode("idna") == host.lower()
    except UnicodeError as error:
        raise ForbiddenUrlError(_HOST_REFUSED) from error
    if not unchanged:
        raise ForbiddenUrlError(_HOST_REFUSED)
    return encoded.decode("ascii")


def _target(rest: str) -> str:
    path = rest if rest.startswith("/") else f"/{rest}"
    return quote(path, safe=_PLAIN_IN_TARGET)
