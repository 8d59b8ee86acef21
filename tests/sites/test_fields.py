"""Fields on their way through the relay: what the hidden server may believe, and which host it sees."""

from __future__ import annotations

import pytest

from tunneld.net.endpoint import parse_network
from tunneld.policy.networks import NetworkSet
from tunneld.sites.fields import HostRewrite, Origin, given_id, new_id, request_fields, response_fields
from tunneld.wire.http1 import Fields, RequestHead, ResponseHead, parse_request, parse_response

REACHED = ("198.51.100.9", 443)
PROXIES = NetworkSet([parse_network("192.0.2.0/24")])
VISITOR = Origin(("192.0.2.7", 5), b"https", REACHED)
PROXY = Origin(("192.0.2.7", 5), b"http", REACHED, PROXIES)


def request(*lines: bytes, host: bytes = b"blog.example.org") -> RequestHead:
    return parse_request(b"\r\n".join([b"GET / HTTP/1.1", b"Host: " + host, *lines, b"", b""]))


def response(*lines: bytes) -> ResponseHead:
    return parse_response(b"\r\n".join([b"HTTP/1.1 302 Found", b"Content-Length: 0", *lines, b"", b""]), b"GET")


def values(fields: Fields, name: bytes) -> list[bytes]:
    return [value for key, value in fields if key.lower() == name]


def test_the_hidden_server_learns_where_a_request_comes_from() -> None:
    assert request_fields(request(b"Accept: */*"), VISITOR) == [
        (b"Host", b"blog.example.org"),
        (b"Accept", b"*/*"),
        (b"X-Forwarded-For", b"192.0.2.7"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"blog.example.org"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"X-Forwarded-For: 127.0.0.1", b"x-forwarded-for: 127.0.0.1", b"X_Forwarded_For: 127.0.0.1",
        b"X-Forwarded_For: 127.0.0.1", b"Forwarded: for=127.0.0.1", b"X-Real-IP: 127.0.0.1", b"X_REAL_IP: 127.0.0.1",
        b"True-Client-IP: 127.0.0.1", b"X-Forwarded-Proto: 127.0.0.1", b"X-Forwarded-Host: 127.0.0.1",
        b"X-Forwarded-Port: 127.0.0.1", b"X-Original-URL: 127.0.0.1", b"Via: 127.0.0.1",
    ],
)  # fmt: skip
def test_a_visitor_cannot_write_them(line: bytes) -> None:
    fields = request_fields(request(line), VISITOR)
    assert fields == request_fields(request(), VISITOR)


def test_connection_cannot_remove_them() -> None:
    line = b"Connection: X-Forwarded-For, X-Forwarded-Proto, X-Request-Id, Host"
    assert request_fields(request(line), VISITOR) == request_fields(request(), VISITOR)


def test_a_trusted_proxy_is_believed() -> None:
    head = request(
        b"X-Forwarded-For: 198.51.100.1", b"X-Forwarded-For: 198.51.100.2", b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: www.example.org", b"X_Forwarded_For: 127.0.0.1",
    )  # fmt: skip
    fields = request_fields(head, PROXY)
    assert values(fields, b"x-forwarded-for") == [b"198.51.100.1, 198.51.100.2, 192.0.2.7"]
    assert values(fields, b"x-forwarded-proto") == [b"https"]
    assert values(fields, b"x-forwarded-host") == [b"www.example.org"]
    assert values(fields, b"x_forwarded_for") == []


def test_a_plain_request_id_is_kept_and_any_other_replaced() -> None:
    assert given_id(request(b"X-Request-ID: abc-1")) == b"abc-1"
    assert given_id(request(b"X-Request-ID: a b")) == given_id(request()) == b""
    assert given_id(request(b"X-Request-ID: " + b"a" * 129)) == b""
    assert len({new_id() for _ in range(1000)}) == 1000
    assert len(new_id()) == 16


LOCAL = HostRewrite(b"localhost:8000")


def test_the_local_server_sees_its_own_host() -> None:
    head = request(
        b"Origin: https://blog.example.org", b"Referer: https://blog.example.org/a?b", b"X: https://blog.example.org",
    )  # fmt: skip
    fields = request_fields(head, VISITOR, LOCAL)
    assert values(fields, b"host") == [b"localhost:8000"]
    assert values(fields, b"origin") == [b"http://localhost:8000"]
    assert values(fields, b"referer") == [b"http://localhost:8000/a?b"]
    assert values(fields, b"x") == [b"https://blog.example.org"]
    assert values(fields, b"x-forwarded-host") == [b"blog.example.org"]


@pytest.mark.parametrize("origin", [b"https://blog.example.org.evil.example", b"https://evil.example", b"null"])
def test_a_foreign_origin_stays_foreign(origin: bytes) -> None:
    fields = request_fields(request(b"Origin: " + origin), VISITOR, LOCAL)
    assert values(fields, b"origin") == [origin]


@pytest.mark.parametrize(
    ("name", "value", "rewritten"),
    [
        (b"Location", b"http://localhost:8000/login?x", b"https://blog.example.org/login?x"),
        (b"Location", b"http://localhost:8000", b"https://blog.example.org"),
        (b"Location", b"/login", b"/login"),
        (b"Location", b"http://localhost:80001/", b"http://localhost:80001/"),
        (b"Location", b"http://elsewhere.example/", b"http://elsewhere.example/"),
        (b"Access-Control-Allow-Origin", b"http://localhost:8000", b"https://blog.example.org"),
        (b"Set-Cookie", b"a=b; Domain=localhost; Path=/", b"a=b; Path=/"),
        (b"Set-Cookie", b"a=b; domain=.localhost", b"a=b"),
        (b"Set-Cookie", b"a=b; Domain=other.example", b"a=b; Domain=other.example"),
        (b"X", b"http://localhost:8000/", b"http://localhost:8000/"),
    ],
)
def test_the_visitor_sees_the_public_host(name: bytes, value: bytes, rewritten: bytes) -> None:
    head = response(name + b": " + value)
    assert values(response_fields(head, request(), VISITOR, LOCAL), name.lower()) == [rewritten]
    assert values(response_fields(head, request(), VISITOR), name.lower()) == [value]


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ((), "192.0.2.7"),
        ((b"198.51.100.1",), "198.51.100.1"),
        ((b"127.0.0.1, 198.51.100.1",), "198.51.100.1"),
        ((b"127.0.0.1", b"198.51.100.1, 192.0.2.9"), "198.51.100.1"),
        ((b"192.0.2.8, 192.0.2.9",), "192.0.2.8"),
        ((b"nonsense",), "192.0.2.7"),
        ((b"nonsense, 192.0.2.9",), "192.0.2.9"),
        ((b"::ffff:198.51.100.1",), "198.51.100.1"),
        ((b"",), "192.0.2.7"),
    ],
)
def test_the_client_behind_trusted_proxies_is_the_first_that_none_of_them_is(
    chain: tuple[bytes, ...], client: str
) -> None:
    head = request(*[b"X-Forwarded-For: " + each for each in chain])
    assert PROXY.client(head)[0] == client
    assert VISITOR.client(head) == ("192.0.2.7", 5)


def test_a_trusted_proxy_tells_whether_a_request_came_in_tls() -> None:
    assert VISITOR.is_secure(request())
    assert not PROXY.is_secure(request())
    assert PROXY.is_secure(request(b"X-Forwarded-Proto: https"))
    assert not Origin(("192.0.2.7", 5), b"http", REACHED).is_secure(request(b"X-Forwarded-Proto: https"))
