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
from tunneld.policy.options import ANYWHERE, LONGEST, MAX_COUNT, MAX_NAME, OPTIONS, TunnelOptions
from tunneld.policy.rates import Rate


def test_the_table_and_the_value_have_the_same_fields() -> None:
    assert set(OPTIONS) == {field.name for field in fields(TunnelOptions)}


def test_nothing_asked_is_the_reference_tunnel() -> None:
    assert TunnelOptions.parse({}) == TunnelOptions()
    assert not TunnelOptions().persist


def test_every_option_reads() -> None:
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
        "name": "web-1",
        "allow_from": "192.0.2.0/24,2001:db8::/32",
        "deny_from": "192.0.2.7",
        "max_visitors": "100",
        "max_per_source": "10",
        "visitor_rate": "30/m",
        "bandwidth": "500k",
        "quota": "1000T",
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
        ("ttl", str(LONGEST + 1)),
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
def test_what_cannot_be_is_refused_by_name(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=key):
        TunnelOptions.parse({key: text})


def test_limits_hold_at_their_edge() -> None:
    assert TunnelOptions.parse({"ttl": str(LONGEST)}).ttl == LONGEST
    assert TunnelOptions.parse({"client_port": "65535"}).client_port == 65535
    assert TunnelOptions.parse({"max_visitors": str(MAX_COUNT)}).max_visitors == MAX_COUNT
    assert TunnelOptions.parse({"max_per_source": "1"}).max_per_source == 1
    assert len(TunnelOptions.parse({"deny_from": ",".join(["192.0.2.1"] * MAX_NETWORKS)}).deny_from) == MAX_NETWORKS
    assert TunnelOptions.parse({"name": "x" * MAX_NAME}).name == "x" * MAX_NAME


@given(
    st.dictionaries(st.one_of(st.sampled_from(list(OPTIONS)), st.text(max_size=8)), st.text(max_size=20), max_size=4)
)
def test_any_words_are_options_or_a_usage_error(words: dict[str, str]) -> None:
    with contextlib.suppress(UsageError):
        TunnelOptions.parse(words)


def test_options_are_said_in_words_that_are_read_as_the_same() -> None:
    words = {
        "persist": "yes", "server_from": "any", "ttl": "0.1", "linger": "7.5", "proxy_protocol": "v2",
        "client_port": "8011", "name": "a.b", "allow_from": "192.0.2.0/24,2001:db8::/32", "visitor_rate": "30/m",
        "quota": "1000T",
    }  # fmt: skip
    options = TunnelOptions.parse(words)
    assert TunnelOptions.parse(options.words()) == options
    assert TunnelOptions().words() == {}
    assert set(options.words()) == set(words)
