"""Which URLs callers may point us at: every way to write "inside" is refused."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.addresses import (
    URL_MAX_CHARS,
    CheckedUrl,
    ForbiddenUrlError,
    UrlRules,
    checked_url,
    client_address,
    is_public,
    may_reach,
    plain_address,
    redirected,
)

IMAGES = UrlRules(schemes=("https", "http"))
ANY_PORT = UrlRules(schemes=("https", "http"), ports=tuple(range(65_536)))

HOSTILE = [
    # loopback, spelled out
    "http://127.0.0.1/a.png",
    "http://127.0.0.2/a.png",
    "http://127.255.255.254/a.png",
    "http://0.0.0.0/a.png",
    "http://0.1.2.3/a.png",
    "http://[::1]/a.png",
    "http://[::]/a.png",
    "http://[0:0:0:0:0:0:0:1]/a.png",
    "http://[0000:0000:0000:0000:0000:0000:0000:0001]/a.png",
    "http://localhost/a.png",
    "http://LOCALHOST/a.png",
    "http://files.localhost/a.png",
    "http://localhost.localdomain/a.png",
    # loopback, as resolvers and C libraries read it
    "http://2130706433/a.png",
    "http://0x7f000001/a.png",
    "http://0X7F000001/a.png",
    "http://017700000001/a.png",
    "http://0x7f.0.0.1/a.png",
    "http://0177.0.0.1/a.png",
    "http://127.0.0.01/a.png",
    "http://127.1/a.png",
    "http://127.0.1/a.png",
    "http://0/a.png",
    "http://0x/a.png",
    "http://127.0.0.0x1/a.png",
    "http://4294967297/a.png",
    "http://127.0.0.1.1/a.png",
    "http://256.256.256.256/a.png",
    "http://name.127/a.png",
    # loopback, with other characters that fold to it
    "http://\u2460\u2461\u2466.0.0.1/a.png",
    "http://\uff11\uff12\uff17.0.0.1/a.png",
    "http://127\u30020\u30020\u30021/a.png",
    "http://127\uff0e0\uff0e0\uff0e1/a.png",
    "http://127\uff610\uff610\uff611/a.png",
    "http://\u0661\u0662\u0667.0.0.1/a.png",
    "http://127.0.0.\u0661/a.png",
    "http://\u24dbocalhost/a.png",
    "http://localho\u017ft/a.png",
    "http://images.example\u3002com/a.png",
    "http://\u212as.example.com/a.png",
    "http://stra\u00dfe.example.com/a.png",
    "http://%6c%6f%63alhost/a.png",
    "http://127%2e0%2e0%2e1/a.png",
    "http://127.0.0.1%00.example.com/a.png",
    "http://127.0.0.1\x00.example.com/a.png",
    "http://exa\u00admple.com/a.png",
    "http://exam\u200bple.com/a.png",
    # private, shared and link-local ranges
    "http://10.0.0.1/a.png",
    "http://10.255.255.255/a.png",
    "http://172.16.0.1/a.png",
    "http://172.31.255.255/a.png",
    "http://192.168.1.1/a.png",
    "http://100.64.0.1/a.png",
    "http://169.254.1.1/a.png",
    "http://[fe80::1]/a.png",
    "http://[fe80::1%25eth0]/a.png",
    "http://[fe80::1%eth0]/a.png",
    "http://[fec0::1]/a.png",
    "http://[fd00::1]/a.png",
    "http://[fc00::1]/a.png",
    # metadata services
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://0xa9fea9fe/latest/meta-data/",
    "http://0251.0376.0251.0376/latest/meta-data/",
    "http://169.254.43518/latest/meta-data/",
    "http://[::ffff:169.254.169.254]/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[fd20:ce::254]/computeMetadata/v1/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://100.100.100.200/latest/meta-data/",
    "http://192.0.0.192/opc/v2/",
    "http://168.63.129.16/machine",
    # IPv4 addresses inside IPv6 ones
    "http://[::ffff:127.0.0.1]/a.png",
    "http://[::ffff:7f00:1]/a.png",
    "http://[::ffff:10.0.0.1]/a.png",
    "http://[::127.0.0.1]/a.png",
    "http://[::8.8.8.8]/a.png",
    "http://[64:ff9b::127.0.0.1]/a.png",
    "http://[64:ff9b::a9fe:a9fe]/a.png",
    "http://[64:ff9b:1::10.0.0.1]/a.png",
    "http://[2002:7f00:1::]/a.png",
    "http://[2002:808:808::1]/a.png",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/a.png",
    "http://[::ffff:0:127.0.0.1]/a.png",
    # reserved, documentation, benchmarks, multicast, broadcast
    "http://192.0.2.1/a.png",
    "http://198.51.100.1/a.png",
    "http://203.0.113.1/a.png",
    "http://198.18.0.1/a.png",
    "http://198.19.255.255/a.png",
    "http://192.88.99.1/a.png",
    "http://224.0.0.1/a.png",
    "http://240.0.0.1/a.png",
    "http://255.255.255.255/a.png",
    "http://[100::1]/a.png",
    "http://[2001:db8::1]/a.png",
    "http://[2001:2::1]/a.png",
    "http://[2001:10::1]/a.png",
    "http://[2001:20::1]/a.png",
    "http://[3fff::1]/a.png",
    "http://[5f00::1]/a.png",
    "http://[ff02::1]/a.png",
    "http://[4000::1]/a.png",
    # who is who: user names, fragments, backslashes, blanks
    "http://images.example.com@127.0.0.1/a.png",
    "http://user:password@images.example.com/a.png",
    "http://@images.example.com/a.png",
    "http://images.example.com#@127.0.0.1/a.png",
    "http://127.0.0.1#@images.example.com/a.png",
    "http://images.example.com/a.png#part",
    "http://images.example.com\\@127.0.0.1/a.png",
    "http:\\\\127.0.0.1\\a.png",
    "http://127.0.0.1\\.example.com/a.png",
    "http://images.example.com /a.png",
    " http://images.example.com/a.png",
    "http://images.example.com/a b.png",
    "http://images.example.com/a.png\r\nHost: 127.0.0.1",
    "http://images.example.com\t/a.png",
    "http://images.example.com/\u2028",
    "http://images.example.com/\ud800",
    # names that mean something here only
    "http://router/a.png",
    "http://printer.local/a.png",
    "http://api.internal/a.png",
    "http://nas.home.arpa/a.png",
    "http://1.0.0.127.in-addr.arpa/a.png",
    "http://db.corp/a.png",
    "http://box.lan/a.png",
    "http://images.example.com./a.png",
    "http://localhost./a.png",
    "http://127.0.0.1./a.png",
    "http://.example.com/a.png",
    "http://images..example.com/a.png",
    "http://-images.example.com/a.png",
    f"http://{'a' * 64}.example.com/a.png",
    f"http://{'a.' * 130}com/a.png",
    "http://images.example.com,127.0.0.1/a.png",
    "http://images.example.com;127.0.0.1/a.png",
    "http://images.example.com&@127.0.0.1/a.png",
    "http://[127.0.0.1]/a.png",
    "http://[images.example.com]/a.png",
    "http://[::1/a.png",
    "http://::1/a.png",
    "http://[::1]127.0.0.1/a.png",
    "http://[]/a.png",
    # ports
    "http://images.example.com:22/a.png",
    "http://images.example.com:6379/a.png",
    "http://images.example.com:0/a.png",
    "http://images.example.com:/a.png",
    "http://images.example.com:-80/a.png",
    "http://images.example.com:+80/a.png",
    "http://images.example.com:80:80/a.png",
    "http://images.example.com:65616/a.png",
    "http://images.example.com:\uff18\uff10/a.png",
    "http://images.example.com:8 0/a.png",
    # schemes
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "ftp://images.example.com/a.png",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/",
    "jar:http://images.example.com!/a.png",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "ws://images.example.com/a.png",
    "https:images.example.com/a.png",
    "https:/images.example.com/a.png",
    "https:///images.example.com/a.png",
    "//images.example.com/a.png",
    "images.example.com/a.png",
    "/a.png",
    "http://",
    "http:///",
    "http://?",
    "://images.example.com/a.png",
    "",
    "\x00",
    "https://images.example.com/" + "a" * 100_000,
    "https://" + "a" * 100_000,
]

PUBLIC_ADDRESSES = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "93.184.215.14",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "168.63.129.15",
    "192.0.1.0",
    "192.167.255.255",
    "198.17.255.255",
    "223.255.255.255",
    "2001:4860:4860::8888",
    "2606:4700:4700::1111",
    "2a00:1450:4001:81b::200e",
    "2001:200::1",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]


def verdict(url: str, rules: UrlRules = IMAGES) -> str:
    """Say what is known of a URL before anything is looked up."""
    try:
        host = checked_url(url, rules).host
    except ForbiddenUrlError:
        return "refused"
    with contextlib.suppress(ValueError):
        return "public" if is_public(ip_address(host)) else "refused"
    return "a name"


@pytest.mark.parametrize("url", HOSTILE, ids=lambda url: ascii(url)[:60])
def test_a_hostile_url_is_refused(url: str) -> None:
    assert verdict(url) == "refused"


def test_the_table_of_hostile_urls_is_long() -> None:
    assert len(set(HOSTILE)) >= 150


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_a_public_address_may_be_reached(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert verdict(f"https://{host}/a.png") == "public"


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.com/a.png",
        "HTTPS://Images.Example.COM/a.png",
        "https://images.example.com:443/a.png",
        "http://images.example.com",
        "https://images.example.com?size=2",
        "https://my_bucket.s3.amazonaws.com/a%20b.png?X-Amz-Signature=00&e=@;:,",
        "https://127.0.0.1.example.com/a.png",
        "https://localhost.example.com/a.png",
        "https://bücher.example/a.png",
        "https://xn--bcher-kva.example/a.png",
        "https://例え.jp/画像.png",
        "https://7.example.co/a.png",
        "https://0x7f.example.com/a.png",
    ],
)
def test_an_ordinary_url_waits_for_its_lookup(url: str) -> None:
    assert verdict(url) == "a name"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://images.example.com/a.png", "must start with https:// or http://"),
        ("https://me@images.example.com/", "user name"),
        ("https://images.example.com/#a", "fragment"),
        ("https://images.example.com:8080/", "port must be 443 or 80"),
        ("https://router/", "public name"),
        ("https://a.com/ b", "percent-encode"),
        ("https://a.com/" + "b" * URL_MAX_CHARS, "at most 8192 characters"),
    ],
)
def test_the_refusal_says_what_to_change(url: str, says: str) -> None:
    with pytest.raises(ForbiddenUrlError, match=says):
        checked_url(url, IMAGES)


def test_plain_http_needs_to_be_allowed() -> None:
    assert verdict("http://images.example.com/a.png", UrlRules()) == "refused"
    assert verdict("https://images.example.com/a.png", UrlRules()) == "a name"


def test_a_url_is_taken_apart_once() -> None:
    assert checked_url('HTTP://[2606:4700:0::1]:443?a=ü"', IMAGES) == CheckedUrl(
        "http", "2606:4700::1", 443, "/?a=%C3%BC%22"
    )


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://A.example.com", "a.example.com"),
        ("https://a.example.com:443", "a.example.com"),
        ("https://a.example.com:80", "a.example.com:80"),
        ("http://[2606:4700::1]:443", "[2606:4700::1]:443"),
        ("https://bücher.example", "xn--bcher-kva.example"),
    ],
)
def test_the_host_header_is_what_was_checked(url: str, authority: str) -> None:
    assert checked_url(url, IMAGES).authority == authority


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        ("/b.png", "https://a.example.com/b.png"),
        ("b.png?x", "https://a.example.com/dir/b.png?x"),
        ("//b.example.com/", "https://b.example.com/"),
        ("http://b.example.com/", "http://b.example.com/"),
    ],
)
def test_a_redirect_is_read_as_a_browser_reads_it(location: str, leads_to: str) -> None:
    here = checked_url("https://a.example.com/dir/a.png", IMAGES)
    assert redirected(here, location, IMAGES).text == leads_to


@pytest.mark.parametrize(
    "location",
    [
        "//localhost/",
        "//2130706433/",
        "file:///etc/passwd",
        "http://[/",
        "\\\\x",
    ],
)
def test_a_redirect_is_checked_like_any_url(location: str) -> None:
    here = checked_url("https://a.example.com/dir/a.png", IMAGES)
    with pytest.raises(ForbiddenUrlError):
        redirected(here, location, IMAGES)


def test_the_operator_may_open_a_network_of_their_own() -> None:
    allow = (ip_network("10.1.0.0/16"), ip_network("fd12::/32"))
    assert may_reach(ip_address("10.1.2.3"), allow)
    assert may_reach(ip_address("fd12::1"), allow)
    assert not may_reach(ip_address("10.2.2.3"), allow)
    assert not may_reach(ip_address("::ffff:10.2.2.3"), allow)


def test_a_zone_makes_any_address_a_local_one() -> None:
    assert is_public(ip_address("2606:4700::1"))
    assert not is_public(ip_address("2606:4700::1%eth0"))


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_no_ipv4_address_is_public_that_python_calls_special(
    address: IPv4Address,
) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
@example(IPv4Address("8.8.8.8"))
def test_an_ipv4_address_inside_an_ipv6_one_is_judged_by_itself(
    address: IPv4Address,
) -> None:
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        inside = IPv6Address(int(IPv6Address(prefix)) | int(address))
        assert is_public(inside) == is_public(address)


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_no_ipv6_address_is_public_outside_what_is_handed_out(
    address: IPv6Address,
) -> None:
    if is_public(address) and address.ipv4_mapped is None:
        assert int(address) >> 125 == 1 or address in ip_network("64:ff9b::/96")


@given(
    st.text()
    | st.from_regex(r"https?://[^/]{0,40}(:[0-9]{0,6})?(/.*)?", fullmatch=True)
)
def test_whatever_text_it_is_the_url_is_taken_apart_the_same_way_twice(
    text: str,
) -> None:
    try:
        url = checked_url(text, ANY_PORT)
    except ForbiddenUrlError:
        return
    assert url.text.isascii()
    assert url.text.isprintable()
    assert checked_url(url.text, ANY_PORT) == url


# --- where a request comes from ---

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.7", "", "203.0.113.7"),
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),  # anybody can write that
        ("10.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "203.0.113.7, 10.9.9.9,10.0.0.2", "203.0.113.7"),
        ("10.0.0.1", "203.0.113.7:4711", "203.0.113.7"),
        ("10.0.0.1", "[2001:db8::1]:4711, fd00::5", "2001:db8::1"),
        ("::ffff:10.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "203.0.113.7, unknown", "10.0.0.1"),
        ("10.0.0.1", ", ,", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7" + ", 10.0.0.2" * 99, "10.0.0.2"),
        ("", "203.0.113.7", ""),
    ],
)
def test_only_what_trusted_proxies_wrote_says_where_a_request_comes_from(
    peer: str, forwarded: str, address: str
) -> None:
    assert client_address(peer, forwarded, PROXIES) == address
    if peer:
        assert client_address(peer, forwarded, ()) == str(plain_address(peer))
