"""URIs and addresses."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import UsageError
from tunneld.net import endpoint
from tunneld.net.endpoint import Endpoint, Target, parse_host_port, parse_relay

HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True),
    st.ip_addresses().map(str),
)
PORTS = st.integers(0, endpoint.MAX_PORT)


@given(host=HOSTS, port=PORTS, scheme=st.sampled_from(["tcp", "tls", "webmux"]))
def test_a_printed_endpoint_parses_back(host: str, port: int, scheme: str) -> None:
    written = Endpoint(scheme, host, port)
    assert Endpoint.parse(str(written)) == written


@given(st.text(max_size=60))
def test_any_text_is_an_endpoint_or_a_usage_error(text: str) -> None:
    try:
        parsed = Endpoint.parse(text)
    except UsageError:
        return
    assert Endpoint.parse(str(parsed)) == parsed


def test_letter_case_and_a_trailing_slash_make_no_difference() -> None:
    assert Endpoint.parse("TCP://Relay.Example.ORG:8010/") == Endpoint("tcp", "relay.example.org", 8010)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp:/x:1",
        "tcp://x",
        "tcp://:1",
        "tcp://x:65536",
        "tcp://x:-1",
        "tcp://u@x:1",
        "tcp://x:1/p/q",
        "http://x:1/p?q",
        "tcp://[::1:1",
        "tcp://x:1٣",
    ],
)
def test_an_invalid_uri_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Endpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("8000", Target("127.0.0.1", 8000)),
        ("web.local:80", Target("web.local", 80)),
        ("[::1]:65535", Target("::1", 65535)),
        ("unix:/run/web.sock", Target(path="/run/web.sock")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["", "0", "65536", "unix:", "host", "host:0", ":80:90", "٨٠٠٠"])
def test_an_invalid_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_a_network_contains_its_addresses() -> None:
    network = endpoint.parse_network("192.0.2.0/24")
    assert endpoint.contains(network, ("192.0.2.9", 1))
    assert not endpoint.contains(network, ("198.51.100.9", 1))
    assert not endpoint.contains(network, ("2001:db8::1", 1, 0, 0))
    assert endpoint.contains(ipaddress.ip_network("fe80::/10"), ("fe80::1%eth0", 1, 0, 2))


def test_peers_print_as_host_and_port() -> None:
    assert endpoint.format_peer(("192.0.2.9", 5)) == "192.0.2.9:5"
    assert endpoint.format_peer(("2001:db8::1", 5, 0, 0)) == "[2001:db8::1]:5"
    assert endpoint.format_peer("") == "unix"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.8.0.1", True), ("::1", True), ("localhost", True), ("", False), ("::", False), ("relay", False)],
)
def test_only_loopback_hosts_are_loopback(host: str, loopback: bool) -> None:
    assert endpoint.is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("relay.example.org", Endpoint("tcp", "relay.example.org", 7010)),
        ("Relay.example.org:7", Endpoint("tcp", "relay.example.org", 7)),
        ("tls://relay.example.org", Endpoint("tls", "relay.example.org", 7010)),
        ("TLS://192.0.2.1:7/", Endpoint("tls", "192.0.2.1", 7)),
        ("[2001:db8::1]", Endpoint("tcp", "2001:db8::1", 7010)),
        ("tcp://[2001:db8::1]:7", Endpoint("tcp", "2001:db8::1", 7)),
    ],
)
def test_the_port_of_a_relay_has_a_default(text: str, endpoint: Endpoint) -> None:
    assert parse_relay(text) == endpoint
    assert parse_relay(text, tls=True) == replace(endpoint, scheme="tls")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://relay.example.org", "invalid relay address 'https://relay.example.org': expected HOST or HOST:PORT"),
        ("::1", "invalid relay address '::1': an IPv6 address needs brackets: [::1]"),
        ("tls://2001:db8::ab", "invalid relay address 'tls://2001:db8::ab': an IPv6 address needs brackets: tls://["),
        (
            "2001:db8::1:7010",
            "invalid relay address '2001:db8::1:7010': an IPv6 address needs brackets: [2001:db8::1:7010] or [2001:db",
        ),
        ("", "invalid relay address ''"),
        ("relay:", "invalid relay address 'relay:'"),
        ("relay:0", "port out of range in 'relay:0'"),
        ("re lay", "invalid host name or address in 're lay'"),
        ("webmux://relay:7012/SECRET", "invalid relay address: this is the server URI of a tunnel"),
        ("ssh://SECRET@relay:7022", "invalid relay address: this is the server URI of a tunnel"),
    ],
)
def test_an_invalid_relay_address_is_explained_without_showing_a_key(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}") as caught:
        parse_relay(text)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"), [("::1:8000", "[::1]:8000"), ("::1", "[::1]:PORT"), ("fe80::", "[fe80::]:PORT")]
)
def test_a_local_server_with_a_bare_ipv6_address_is_explained(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"needs brackets: {hint}") + "$"):
        Target.parse(text)
    with pytest.raises(UsageError, match=re.escape(f"needs brackets: {hint}") + "$"):
        parse_host_port(text)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("https://blog.example.org/", Endpoint("https", "blog.example.org", 443)),
        ("http://blog.example.org/", Endpoint("http", "blog.example.org", 80)),
        ("https://blog.example.org:8443/", Endpoint("https", "blog.example.org", 8443)),
        ("https://shop.example.com/api/v1", Endpoint("https", "shop.example.com", 443, path="/api/v1")),
        ("https://[2001:db8::1]/", Endpoint("https", "2001:db8::1", 443)),
    ],
)
def test_a_web_address_has_no_port_that_its_scheme_implies(text: str, endpoint: Endpoint) -> None:
    assert str(endpoint) == text
    assert Endpoint.parse(text) == endpoint


def test_a_web_address_is_parsed_as_browsers_write_it() -> None:
    assert Endpoint.parse("HTTPS://Blog.Example.org:443") == Endpoint("https", "blog.example.org", 443)
