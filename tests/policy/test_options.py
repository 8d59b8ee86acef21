"""The options of openTunnel."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import UsageError
from tunneld.policy.networks import MAX_NETWORKS
from tunneld.policy.options import ANYWHERE, MAX_COUNT, MAX_NAME, MAX_SECONDS, OPTIONS, TunnelOptions, parse_count
from tunneld.policy.rates import Rate


def test_the_table_and_the_value_have_the_same_fields() -> None:
    assert set(OPTIONS) == {field.name for field in fields(TunnelOptions)}


def test_no_options_mean_the_reference_tunnel() -> None:
    assert TunnelOptions.parse({}) == TunnelOptions()
    assert not TunnelOptions().persist


def test_every_option_is_parsed() -> None:
    words = {
        "persist": "yes",
        "secure": "key",
        "server_from": "192.0.2.0/24",
        "ttl": "3600",
        "idle_timeout": "0.5",
        "open_timeout": "10",
        "pairing_timeout": "5",
        "linger": "7",
        "proxy_protocol": "V2",
        "client_port": "8011",
        "bind": "192.0.2.80",
        "name": "web-1",
        "allow_from": "192.0.2.0/24,2001:db8::/32",
        "deny_from": "192.0.2.7",
        "max_visitors": "100",
        "max_per_source": "10",
        "visitor_rate": "30/m",
        "bandwidth": "500k",
        "quota": "1000T",
        "host": "blog,shop.example.com/api,any",
        "tls": "pass",
        "plain_http": "allow",
        "host_header": "localhost:8000",
        "auth": "link",
        "forward_auth": "https://auth.example.org/verify",
        "forward_auth_fields": "Remote-User,Remote-Groups",
        "hsts": "3600",
    }
    allowed = ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32")
    denied = (ipaddress.ip_network("192.0.2.7/32"),)
    assert TunnelOptions.parse(words) == TunnelOptions(
        True,
        "key",
        allowed[0],
        3600,
        0.5,
        10,
        5,
        7,
        "v2",
        8011,
        "192.0.2.80",
        1,
        ("blog", "shop.example.com/api", "any"),
        "pass",
        "allow",
        "localhost:8000",
        ("link",),
        "https://auth.example.org/verify",
        ("Remote-User", "Remote-Groups"),
        3600,
        "web-1",
        allowed,
        denied,
        100,
        10,
        Rate(30, 60),
        500_000,
        10**15,
    )
    assert TunnelOptions.parse({"server_from": "ANY"}).server_from == ANYWHERE


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("persist", "maybe"),
        ("server_from", "somewhere"),
        ("ttl", "0"),
        ("ttl", "-1"),
        ("ttl", "nan"),
        ("ttl", "inf"),
        ("ttl", str(MAX_SECONDS + 1)),
        ("linger", "soon"),
        ("proxy_protocol", "v3"),
        ("client_port", "0"),
        ("client_port", "65536"),
        ("client_port", "٨٠٨٠"),
        ("name", ""),
        ("name", "x" * (MAX_NAME + 1)),
        ("name", "a b"),
        ("allow_from", ""),
        ("allow_from", "192.0.2.1,"),
        ("deny_from", "192.0.2.0/33"),
        ("deny_from", ",".join(["192.0.2.1"] * (MAX_NETWORKS + 1))),
        ("max_visitors", "0"),
        ("max_visitors", str(MAX_COUNT + 1)),
        ("max_visitors", "٣"),
        ("max_per_source", "-1"),
        ("max_per_source", "9" * 5000),
        ("visitor_rate", "10/d"),
        ("bandwidth", "0"),
        ("bandwidth", "1001T"),
        ("bandwidth", "1.5M"),
        ("quota", "10 M"),
        ("quota", "-1"),
        ("quota", "1m"),
        ("visitor_rate", "0"),
        ("colour", "red"),
    ],
)
def test_invalid_values_are_refused_with_the_name_of_the_option(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=key):
        TunnelOptions.parse({key: text})


def test_values_at_the_edge_of_their_range_are_valid() -> None:
    assert TunnelOptions.parse({"ttl": str(MAX_SECONDS)}).ttl == MAX_SECONDS
    assert TunnelOptions.parse({"client_port": "65535"}).client_port == 65535
    assert TunnelOptions.parse({"max_visitors": str(MAX_COUNT)}).max_visitors == MAX_COUNT
    assert TunnelOptions.parse({"max_per_source": "1"}).max_per_source == 1
    assert len(TunnelOptions.parse({"deny_from": ",".join(["192.0.2.1"] * MAX_NETWORKS)}).deny_from) == MAX_NETWORKS
    assert TunnelOptions.parse({"name": "x" * MAX_NAME}).name == "x" * MAX_NAME


@given(
    st.dictionaries(st.one_of(st.sampled_from(list(OPTIONS)), st.text(max_size=8)), st.text(max_size=20), max_size=4)
)
def test_any_words_are_valid_options_or_a_usage_error(words: dict[str, str]) -> None:
    with contextlib.suppress(UsageError):
        TunnelOptions.parse(words)


def test_options_survive_a_round_trip_through_words() -> None:
    words = {
        "persist": "yes", "server_from": "any", "ttl": "0.1", "linger": "7.5", "proxy_protocol": "v2",
        "client_port": "8011", "name": "a.b", "allow_from": "192.0.2.0/24,2001:db8::/32", "visitor_rate": "30/m",
        "quota": "1000T",
    }  # fmt: skip
    options = TunnelOptions.parse(words)
    assert TunnelOptions.parse(options.words()) == options
    assert TunnelOptions().words() == {}
    assert set(options.words()) == set(words)


@pytest.mark.parametrize("text", ["0", "101", "1000", "+1", " 1", "1_0", "1.0", "", "٣"])
def test_counts_are_ascii_digits_up_to_their_maximum(text: str) -> None:
    assert parse_count("100", 100) == 100
    with pytest.raises(ValueError, match="not a number between 1 and 100"):
        parse_count(text, 100)
