"""Which visitors are accepted: networks, sources, and how the limits work together."""

from __future__ import annotations

import ipaddress
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.errors import UsageError
from tunneld.net.endpoint import Network, is_loopback
from tunneld.policy.admission import Admission, AdmissionRefusal, RefusalKind, Rules
from tunneld.policy.networks import MAX_NETWORKS, NetworkSet, parse_networks, read_address
from tunneld.policy.rates import Rate

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
NETWORKS = st.builds(
    lambda address, part: ipaddress.ip_network((address, round(part * address.max_prefixlen)), strict=False),
    ADDRESSES,
    st.floats(0, 1),
)


def nets(*texts: str) -> tuple[Network, ...]:
    return parse_networks(",".join(texts))


def kind(refusal: AdmissionRefusal | None) -> RefusalKind | None:
    return None if refusal is None else refusal.kind


# Networks


@given(st.lists(NETWORKS, max_size=5), ADDRESSES)
def test_a_set_of_networks_agrees_with_each_of_them(
    networks: list[Network], address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> None:
    known = NetworkSet(networks)
    assert (read_address(str(address)) in known) == any(address in network for network in networks) or (
        isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
    )
    for network in networks:
        assert read_address(str(network[0])) in known
        assert read_address(str(network[-1])) in known


@pytest.mark.parametrize("written", ["192.0.2.7", "::ffff:192.0.2.7", "::ffff:c000:207", "0:0:0:0:0:ffff:c000:207"])
@pytest.mark.parametrize("network", ["192.0.2.0/24", "::ffff:192.0.2.0/120", "::ffff:192.0.2.7"])
def test_every_spelling_of_an_ipv4_address_is_the_same(written: str, network: str) -> None:
    rules = Rules(deny=nets(network))
    assert kind(Admission(rules).admit(written, 0)) is RefusalKind.ADDRESS
    assert Admission(rules).admit("192.0.3.7", 0) is None


def test_deny_wins_and_every_allow_list_must_have_the_visitor() -> None:
    admission = Admission(
        Rules(allow=(nets("192.0.0.0/16", "2001:db8::/32"), nets("192.0.2.0/24")), deny=nets("192.0.2.128/25"))
    )
    found = [kind(admission.admit(host, 0)) for host in ("192.0.2.1", "192.0.3.1", "192.0.2.129", "2001:db8::1")]
    assert found == [None, RefusalKind.ADDRESS, RefusalKind.ADDRESS, RefusalKind.ADDRESS]


def test_an_empty_allow_list_admits_every_address() -> None:
    assert Admission(Rules(allow=((), ()), deny=nets("10.0.0.0/8"))).admit("2001:db8::1", 0) is None


def test_denying_all_of_ipv6_denies_no_ipv4() -> None:
    admission = Admission(Rules(deny=nets("::/0")))
    assert admission.admit("192.0.2.1", 0) is None
    assert kind(admission.admit("fe80::1%eth0", 0)) is RefusalKind.ADDRESS


def test_networks_of_an_option_are_read_up_to_their_limit() -> None:
    assert nets("192.0.2.7", " 2001:db8::/32") == (
        ipaddress.ip_network("192.0.2.7/32"),
        ipaddress.ip_network("2001:db8::/32"),
    )
    assert len(parse_networks(",".join(["192.0.2.1"] * MAX_NETWORKS))) == MAX_NETWORKS
    with pytest.raises(ValueError, match="more than 256"):
        parse_networks(",".join(["192.0.2.1"] * (MAX_NETWORKS + 1)))
    for wrong in ("", "192.0.2.1,", "somewhere", "192.0.2.1/33"):
        with pytest.raises(UsageError, match="not an address or a network"):
            parse_networks(wrong)


# Sources


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::1", "0.0.0.0", False),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_a_source_is_an_ipv4_address_or_an_ipv6_slash_64(one: str, other: str, same: bool) -> None:
    assert (read_address(one).source == read_address(other).source) is same
    for host in (one, other):
        assert read_address(host).is_loopback == is_loopback(host)


@given(
    limit=st.integers(1, 3),
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]))),
)
def test_a_source_never_exceeds_its_limit_and_leaves_nothing_behind(limit: int, steps: list[tuple[bool, str]]) -> None:
    admission, inside = Admission(Rules(max_per_source=limit)), Counter[int]()
    hosts: list[str] = []
    for arrives, host in steps:
        source = read_address(host).source
        if arrives:
            refused = admission.admit(host, 0)
            assert kind(refused) is (RefusalKind.PER_SOURCE if inside[source] == limit else None)
            if refused is None:
                inside[source] += 1
                hosts.append(host)
        elif host in hosts:
            hosts.remove(host)
            inside[source] -= 1
            admission.left(host)
        assert max(inside.values(), default=0) <= limit
        assert admission.sources == len(+inside)
    for host in hosts:
        admission.left(host)
    assert admission.sources == 0


# Together


def test_a_visitor_refused_by_one_limit_does_not_count_against_another() -> None:
    admission = Admission(Rules(deny=nets("10.0.0.1"), max_per_source=1, rate=Rate.parse("2/h"), max_sources=10))
    assert kind(admission.admit("10.0.0.1", 1e5)) is RefusalKind.ADDRESS
    assert admission.sources == 0
    assert admission.admit("192.0.2.1", 1e5) is None
    assert kind(admission.admit("192.0.2.1", 1e5)) is RefusalKind.PER_SOURCE
    admission.left("192.0.2.1")
    assert admission.admit("192.0.2.1", 1e5) is None
    admission.left("192.0.2.1")
    assert kind(admission.admit("192.0.2.1", 1e5)) is RefusalKind.RATE
    assert kind(admission.admit("192.0.2.1", 1e5)) is RefusalKind.RATE  # and it is not counted


def test_remembered_sources_are_bounded() -> None:
    admission = Admission(Rules(max_per_source=5, rate=Rate.parse("1/h"), max_sources=100))
    for number in range(1_000_000, 1_100_000):
        host = f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1"
        if admission.admit(host, 1e5) is None:
            admission.left(host)
    assert admission.sources == 100


@pytest.mark.parametrize(
    ("rules", "accept_all"),
    [
        (Rules(), True),
        (Rules(allow=((), ()), max_sources=100), True),
        (Rules(allow=((), nets("192.0.2.1"))), False),
        (Rules(deny=nets("192.0.2.1")), False),
        (Rules(max_per_source=1), False),
        (Rules(rate=Rate(1, 1)), False),
    ],
)
def test_rules_that_accept_every_visitor_are_known(rules: Rules, accept_all: bool) -> None:
    assert rules.accept_all is accept_all


def test_refusals_name_the_option() -> None:
    rate = Admission(Rules(rate=Rate.parse("1/m")))
    rate.admit("192.0.2.1", 1e5)
    assert rate.admit("192.0.2.1", 1e5) == AdmissionRefusal(
        RefusalKind.RATE, "limit reached: 1/m new visitors from its address (visitor_rate)"
    )
