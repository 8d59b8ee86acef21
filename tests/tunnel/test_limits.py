"""What options and configuration come to together."""

from __future__ import annotations

import pytest

from tunneld.config.schema import TunnelSettings
from tunneld.errors import UsageError
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.limits import EffectiveLimits
from tunneld.wire.proxy_protocol import encode_v1, encode_v2

SETTINGS = TunnelSettings(max_visitors=100, pairing_timeout=7, linger=8, bandwidth=1000, quota=500, visitor_rate="5/s")


def terms(**words: str) -> EffectiveLimits:
    return EffectiveLimits.of(SETTINGS, TunnelOptions.parse(words))


def test_where_no_option_is_given_the_configuration_holds() -> None:
    plain = terms()
    assert (plain.max_visitors, plain.pairing_timeout, plain.linger) == (100, 7, 8)
    assert (plain.bandwidth, plain.quota, str(plain.rules.rate)) == (1000, 500, "5/s")
    assert (plain.persist, plain.proxy_header, plain.hide_visitor) == (False, None, False)


def test_an_option_is_preferred_where_it_may_exceed_what_is_configured() -> None:
    asked = terms(max_visitors="99", pairing_timeout="70", linger="80")
    assert (asked.max_visitors, asked.pairing_timeout, asked.linger) == (99, 70, 80)


@pytest.mark.parametrize(("option", "least"), [("900", 900), ("1100", 1000)])
def test_of_two_rates_the_lower_one_holds(option: str, least: int) -> None:
    assert terms(bandwidth=option).bandwidth == least


@pytest.mark.parametrize(("option", "encode"), [("v1", encode_v1), ("v2", encode_v2)])
def test_the_proxy_header_is_that_of_the_version_that_was_asked_for(option: str, encode: object) -> None:
    assert terms(proxy_protocol=option).proxy_header is encode


def test_networks_of_both_are_kept_apart() -> None:
    settings = TunnelSettings(allow_from=("192.0.2.0/24",), deny_from=("192.0.2.1",))
    rules = EffectiveLimits.of(
        settings, TunnelOptions.parse({"allow_from": "192.0.2.0/25", "deny_from": "192.0.2.2"})
    ).rules
    assert [list(map(str, networks)) for networks in rules.allow] == [["192.0.2.0/24"], ["192.0.2.0/25"]]
    assert list(map(str, rules.deny)) == ["192.0.2.1/32", "192.0.2.2/32"]


def test_what_exceeds_its_ceiling_is_refused() -> None:
    with pytest.raises(UsageError, match="max_visitors=101"):
        terms(max_visitors="101")
    with pytest.raises(UsageError, match="visitor_rate=6/s"):
        terms(visitor_rate="6/s")
