"""The schema: hosts, port ranges, and the check against an open port by accident."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.config import strategies
from tunneld.config import ControlSettings, HttpSettings, Settings, TlsFiles, TunnelSettings
from tunneld.config.values import parse_port_range

CERTIFICATES = {"certificate": Path("a"), "key": Path("b")}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_authentication(host: str) -> None:
    ControlSettings(host=host)
    HttpSettings(host=host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "relay.example.org", "localhost.example.org"])
def test_a_public_host_is_refused_without_open_to_anyone(host: str) -> None:
    with pytest.raises(ValidationError, match="lets anyone open tunnels"):
        ControlSettings(host=host)
    with pytest.raises(ValidationError, match="lets anyone open tunnels"):
        HttpSettings(host=host)
    ControlSettings(host=host, open_to_anyone=True)
    HttpSettings(host=host, open_to_anyone=True)


def test_tls_alone_is_refused_but_client_certificates_suffice() -> None:
    with pytest.raises(ValidationError, match="lets anyone open tunnels"):
        ControlSettings(host="", tls=TlsFiles(**CERTIFICATES))
    ControlSettings(host="", tls=TlsFiles(**CERTIFICATES, client_ca=Path("c")))


def test_a_disabled_http_port_may_have_any_host() -> None:
    HttpSettings(enabled=False, host="")


def test_an_ipv6_host_may_have_brackets() -> None:
    assert TunnelSettings(host="[2001:DB8::1]").host == TunnelSettings(host="2001:db8:0::1").host == "2001:db8::1"


def test_settings_are_immutable_and_hashable() -> None:
    name = "linger"
    with pytest.raises(ValidationError):
        setattr(Settings().tunnels, name, 1)
    assert hash(Settings()) == hash(Settings())


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("20000-29999", range(20000, 30000)),
        ("7", range(7, 8)),
        ("7-7", range(7, 8)),
        ("0", range(1)),
        ("0-0", range(1)),
        ("1-65535", range(1, 65536)),
    ],
)
def test_port_ranges(text: str, ports: range) -> None:
    assert parse_port_range(text) == ports


@pytest.mark.parametrize(
    "text",
    ["", "-", "1-", "-1", "2-1", "0-5", "1-65536", "65536", "a", "1-2-3", " 1", "1 - 2", "+1", "1_0", "٣", "9" * 5000],
)
def test_a_malformed_port_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a port range[:;] ") as caught:
        parse_port_range(text)
    assert len(str(caught.value)) < 150


@given(strategies.port_ranges())
def test_a_port_range_has_the_ends_that_it_names(text: str) -> None:
    ports = parse_port_range(text)
    assert [ports[0], ports[-1]] == [int(part) for part in (re.findall(r"\d+", text) * 2)[:2]] or len(ports) > 1
    assert ports[-1] <= 65535


@given(st.text())
def test_any_text_is_a_port_range_or_a_printable_error(text: str) -> None:
    try:
        ports = parse_port_range(text)
    except ValueError as error:
        ports, reason = range(1), str(error)
    else:
        reason = ""
    assert reason.isprintable()
    assert 0 <= ports[0] <= ports[-1] <= 65535
