"""The names that a relay's tunnels share: random ones, and the addresses to advertise."""

from __future__ import annotations

import pytest

from tunneld.config.names import NamesSettings
from tunneld.errors import UsageError
from tunneld.net.address import HostName
from tunneld.policy.names import complete_name
from tunneld.sites.names import RANDOM_LENGTH, SharedNames, random_name

DOMAIN = "t.example.org"
BLOG = HostName("blog.t.example.org")


def names(http: int = 80, https: int = 443, certified: frozenset[str] = frozenset()) -> SharedNames:
    """The names of a relay with these ports, and with certificates for some."""
    made = SharedNames(lambda: NamesSettings(domain=DOMAIN), certified.__contains__)
    made.set_port("http", http)
    made.set_port("https", https)
    return made


def test_random_names_are_valid_and_differ() -> None:
    found = {random_name(DOMAIN) for _ in range(100)}
    assert len(found) == 100
    for name in found:
        assert complete_name(str(name), "") == name
        assert len(name.name) == RANDOM_LENGTH + 1 + len(DOMAIN)


def test_a_relay_without_ports_for_host_names_has_none() -> None:
    with pytest.raises(UsageError, match="this relay has no host names"):
        names(0, 0).check()
    names(80, 0).check()
    names(0, 443).check()


@pytest.mark.parametrize(
    ("http", "https", "has_certificate", "uri"),
    [
        (80, 443, True, "https://blog.t.example.org/"),
        (80, 443, False, "http://blog.t.example.org/"),
        (8080, 8443, True, "https://blog.t.example.org:8443/"),
        (8080, 8443, False, "http://blog.t.example.org:8080/"),
        (80, 0, True, "http://blog.t.example.org/"),
        (0, 443, False, "https://blog.t.example.org/"),
    ],
)
def test_https_is_advertised_where_visitors_can_use_it(http: int, https: int, has_certificate: bool, uri: str) -> None:
    made = names(http, https, frozenset({BLOG.name} if has_certificate else ()))
    assert str(made.uri(BLOG)) == uri
    assert made.is_secure(BLOG.name) == (has_certificate and bool(https))


def test_https_is_advertised_where_the_certificate_comes_or_is_the_local_server_s() -> None:
    made = names()
    assert str(made.uri(BLOG, keeps_tls=True)) == "https://blog.t.example.org/"
    made.obtains_certificates = lambda: True
    assert str(made.uri(BLOG)) == "https://blog.t.example.org/"


def test_the_path_of_a_name_is_advertised() -> None:
    assert str(names().uri(HostName("t.example.org", "/api"))) == "http://t.example.org/api"
