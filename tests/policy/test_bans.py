"""Bans keep networks out until they end."""

from __future__ import annotations

import pytest

from tunneld.errors import LimitReachedError
from tunneld.net.endpoint import parse_network
from tunneld.policy.bans import MAX_BANS, Ban, Bans


def bans(**ends: float) -> Bans:
    made = Bans()
    for network, end in ends.items():
        made.add(parse_network(network), end)
    return made


@pytest.mark.parametrize(
    ("network", "host", "is_covered"),
    [
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("192.0.2.0/24", "192.0.2.8", True),
        ("192.0.2.0/24", "::ffff:192.0.2.8", True),
        ("2001:db8::/32", "2001:db8:1::1", True),
        ("2001:db8::/32", "192.0.2.8", False),
        ("192.0.2.0/24", "a Unix socket", False),
    ],
)
def test_a_ban_covers_the_addresses_of_its_network(network: str, host: str, is_covered: bool) -> None:
    assert bans(**{network: 10.0}).covers(host, 9.9) is is_covered


def test_a_ban_ends_by_itself_or_is_lifted() -> None:
    made = bans(**{"192.0.2.0/24": 10.0, "198.51.100.7": 20.0})
    assert made.covers("192.0.2.1", 9.9)
    assert not made.covers("192.0.2.1", 10.0)
    assert list(made.report(15.0)) == [Ban(parse_network("198.51.100.7"), 5.0)]
    assert made.lift(parse_network("198.51.100.7"))
    assert not made.lift(parse_network("198.51.100.7"))
    assert not made.covers("198.51.100.7", 15.0)
    assert not made.ends


def test_a_second_ban_replaces_the_first() -> None:
    made = bans(**{"192.0.2.7": 10.0})
    made.add(parse_network("192.0.2.7"), 5.0)
    assert not made.covers("192.0.2.7", 5.0)


def test_their_number_is_limited() -> None:
    made = Bans()
    for number in range(MAX_BANS):
        made.add(parse_network(f"10.0.{number >> 8}.{number & 255}"), 10.0)
    made.add(parse_network("10.0.0.0"), 20.0)  # one of them
    with pytest.raises(LimitReachedError, match="lift some"):
        made.add(parse_network("192.0.2.7"), 10.0)
