"""`[names]`: what it accepts, and what the daemon reads from it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tunneld.config.names import NamesSettings
from tunneld.net.listeners import BindAddress
from tunneld.policy.limits import HttpLimits


def settings(**values: object) -> NamesSettings:
    return NamesSettings.model_validate(values)


def test_host_names_are_off_by_default() -> None:
    assert (settings().http_address, settings().https_address) == (None, None)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":80", BindAddress("", 80)),
        ("0.0.0.0:8080", BindAddress("0.0.0.0", 8080)),
        ("127.0.0.1:0", BindAddress("127.0.0.1", 0)),
        ("[::1]:443", BindAddress("::1", 443)),
        ("[2001:DB8::1]:443", BindAddress("2001:db8::1", 443)),
    ],
)
def test_a_port_is_written_with_its_address(text: str, address: BindAddress) -> None:
    assert settings(http=text).http_address == address
    assert settings(https=text).https_address == address


@pytest.mark.parametrize("text", ["80", "::1:80", ":65536", ":-1", ":", "a b:80", "http://:80", ":80 "])
def test_what_is_no_port_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValidationError, match="is not a port to listen on; write"):
        settings(http=text)


def test_both_ports_differ_unless_the_system_chooses_them() -> None:
    with pytest.raises(ValidationError, match="HTTP and HTTPS need a port each"):
        settings(http=":80", https=":80")
    settings(http=":0", https=":0")


@pytest.mark.parametrize("text", ["T.example.ORG", "t.example.org."])
def test_a_domain_is_kept_in_lower_case_without_a_final_dot(text: str) -> None:
    assert settings(domain=text).domain == "t.example.org"


@pytest.mark.parametrize(
    "text", ["localhost", "*.example.org", "example.org/a", "192.0.2.1", "a_b.example.org", "ä.org"]
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        settings(domain=text)


def test_the_limits_of_connections() -> None:
    found = settings(max_head=4096, head_timeout=1.0, keep_alive_timeout=2.0, response_timeout=3.0).limits
    assert found == HttpLimits(4096, 1.0, 2.0, 3.0)
    assert settings().limits == HttpLimits()


@pytest.mark.parametrize("size", [4095, 256 * 1024 + 1])
def test_a_head_is_neither_tiny_nor_huge(size: int) -> None:
    with pytest.raises(ValidationError):
        settings(max_head=size)
