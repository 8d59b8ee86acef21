"""The options that protect a site: which values they take, and which they exclude."""

from __future__ import annotations

import pytest

from tunneld.errors import NotAllowedError, UsageError
from tunneld.policy.options import TunnelOptions
from tunneld.policy.site_rules import MAX_FORWARD_AUTH_FIELDS, AuthUrl, check_site_options, parse_field_names

URL = "https://auth.example.org/verify"


def test_the_parts_of_a_url() -> None:
    assert AuthUrl.parse(URL) == AuthUrl(True, "auth.example.org", 443, b"auth.example.org", b"/verify")
    assert AuthUrl.parse("http://[::1]:9091") == AuthUrl(False, "::1", 9091, b"[::1]:9091", b"/")


@pytest.mark.parametrize(
    "text",
    [
        *("", "auth.example.org", "ftp://a/", "https://", "https://u:p@a/", "https://a:0/", "https://a:65536/"),
        *("https://a/#x", "https://a/ b", "https://a/\r\nX: y", "https://a b/"),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        AuthUrl.parse(text)


@pytest.mark.parametrize(
    "text", ["", "Host", "content-length", "Transfer-Encoding", "Cookie", "a b", "Remote_User", "X:", "A,"]
)
def test_a_field_that_the_relay_relies_on_is_not_copied(text: str) -> None:
    with pytest.raises(ValueError, match="not a field"):
        parse_field_names(text)


def test_the_number_of_fields_is_limited() -> None:
    names = [f"X-{number}" for number in range(MAX_FORWARD_AUTH_FIELDS)]
    assert parse_field_names(",".join(names)) == tuple(names)
    with pytest.raises(ValueError, match="more than"):
        parse_field_names(",".join([*names, "X-more"]))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"auth": "link"}, "add host"),
        ({"hsts": "1"}, "add host"),
        ({"auth": "link", "host": "blog", "tls": "pass"}, "tls=pass"),
        ({"tls": "pass"}, "add host"),
        ({"tls": "pass", "host": "blog/api"}, "leave out the path"),
        ({"tls": "pass", "host": "blog", "plain_http": "allow"}, "plain_http=allow requires"),
        ({"tls": "pass", "host": "blog", "host_header": "localhost"}, "host_header requires"),
        ({"auth": "link", "host": "blog", "forward_auth": URL}, "exclude"),
        ({"auth": "link", "host": "blog", "client_port": "80"}, "client_port"),
        ({"hsts": "1", "host": "blog", "forward_auth_fields": "X-User"}, "requires forward_auth"),
        ({"host": "blog", "forward_auth": "http://127.0.0.1/"}, r"names\.forward_auth"),
        ({"host": "blog", "forward_auth": URL + "/"}, r"names\.forward_auth"),
    ],
)
def test_options_that_would_not_protect_the_site_are_refused(words: dict[str, str], error: str) -> None:
    with pytest.raises((UsageError, NotAllowedError), match=error):
        check_site_options(TunnelOptions.parse(words), (URL,))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"host": "blog", "tls": "pass", "client_port": "80"},
        {"host": "blog", "forward_auth": URL},
        {"host": "blog", "hsts": "1", "client_port": "80"},
    ],
)
def test_and_the_rest_is_not(words: dict[str, str]) -> None:
    check_site_options(TunnelOptions.parse(words), (URL,))
