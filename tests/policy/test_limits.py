"""The limits of a tunnel from its configuration, its grant and its options."""

from __future__ import annotations

import pytest

from tunneld.config.schema import TunnelSettings
from tunneld.errors import UsageError
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.limits import EffectiveLimits, effective_limits
from tunneld.policy.options import TunnelOptions
from tunneld.wire.proxy_protocol import encode_v1, encode_v2

SETTINGS = TunnelSettings(max_visitors=100, pairing_timeout=7, linger=8, bandwidth=1000, quota=500, visitor_rate="5/s")


def limits(grant: Grant = EVERYBODY, **words: str) -> EffectiveLimits:
    return effective_limits(SETTINGS, grant, TunnelOptions.parse(words))


def test_without_options_the_configuration_holds() -> None:
    plain = limits()
    assert (plain.max_visitors, plain.pairing_timeout, plain.linger) == (100, 7, 8)
    assert (plain.bandwidth, plain.quota, str(plain.rules.rate)) == (1000, 500, "5/s")
    assert (plain.persist, plain.proxy_header, plain.hide_visitor) == (False, None, False)


def test_options_replace_the_configured_values() -> None:
    requested = limits(max_visitors="99", pairing_timeout="70", linger="80")
    assert (requested.max_visitors, requested.pairing_timeout, requested.linger) == (99, 70, 80)


@pytest.mark.parametrize(("option", "effective"), [("900", 900), ("1100", 1000)])
def test_the_lower_of_two_bandwidths_holds(option: str, effective: int) -> None:
    assert limits(bandwidth=option).bandwidth == effective


@pytest.mark.parametrize(("option", "encode"), [("v1", encode_v1), ("v2", encode_v2)])
def test_the_proxy_header_has_the_requested_version(option: str, encode: object) -> None:
    assert limits(proxy_protocol=option).proxy_header is encode


def test_configured_and_requested_networks_both_apply() -> None:
    settings = TunnelSettings(allow_from=("192.0.2.0/24",), deny_from=("192.0.2.1",))
    options = TunnelOptions.parse({"allow_from": "192.0.2.0/25", "deny_from": "192.0.2.2"})
    rules = effective_limits(settings, EVERYBODY, options).rules
    assert [list(map(str, networks)) for networks in rules.allow] == [["192.0.2.0/24"], ["192.0.2.0/25"]]
    assert list(map(str, rules.deny)) == ["192.0.2.1/32", "192.0.2.2/32"]


def test_an_option_above_its_ceiling_is_refused() -> None:
    with pytest.raises(UsageError, match="max_visitors=101 exceeds the limit of this relay: 100"):
        limits(max_visitors="101")
    with pytest.raises(UsageError, match="visitor_rate=6/s exceeds the limit of this relay: 5/s"):
        limits(visitor_rate="6/s")


@pytest.mark.parametrize(("requested", "effective"), [(None, 60.0), ("59", 59.0), ("60", 60.0), ("61", 60.0)])
def test_the_ttl_of_a_grant_is_default_and_ceiling(requested: str | None, effective: float) -> None:
    words = {} if requested is None else {"ttl": requested}
    assert limits(Grant("alice", max_ttl=60.0), **words).ttl == effective


def test_the_smallest_of_option_grant_and_configuration_holds() -> None:
    alice = Grant("alice", bandwidth=700, quota=600)
    assert (limits(alice).bandwidth, limits(alice).quota) == (700, 500)
    assert limits(alice, bandwidth="600", quota="400").bandwidth == 600
    assert limits(alice, bandwidth="600", quota="400").quota == 400
    assert limits(alice, bandwidth="800").bandwidth == 700


def test_the_lower_ceiling_of_grant_and_configuration_bounds_max_visitors() -> None:
    assert limits(Grant("alice", max_visitors=10)).max_visitors == 10
    assert limits(Grant("alice", max_visitors=200)).max_visitors == 100
    assert limits(Grant("alice", max_visitors=10), max_visitors="10").max_visitors == 10
    with pytest.raises(UsageError, match="max_visitors=11 exceeds the limit of credential 'alice': 10"):
        limits(Grant("alice", max_visitors=10), max_visitors="11")
    with pytest.raises(UsageError, match="max_visitors=101 exceeds the limit of this relay: 100"):
        limits(Grant("alice", max_visitors=200), max_visitors="101")


def test_bound_options_yield_the_same_limits_without_the_grant() -> None:
    alice = Grant("alice", max_visitors=10, max_ttl=60, bandwidth=700, quota=400)
    options = TunnelOptions.parse({"quota": "450", "name": "blog"})
    effective = effective_limits(SETTINGS, alice, options)
    bound = effective.bound(options)
    assert effective_limits(SETTINGS, EVERYBODY, bound) == effective
    assert TunnelOptions.parse(bound.words()) == bound
