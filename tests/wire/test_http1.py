"""Heads of HTTP/1.1: what is refused, what is passed on, and in which form."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.wire.http1 import (
    MAX_FIELDS,
    MAX_TARGET_BYTES,
    HeadError,
    encode_request,
    encode_response,
    find_head,
    forwarded_fields,
    host_name,
    parse_request,
    parse_response,
    skip_empty_lines,
)

GET = b"GET / HTTP/1.1\r\nHost: blog.example.org\r\n\r\n"


def request(*lines: bytes, start: bytes = b"POST /form?x=1 HTTP/1.1", host: bytes = b"Host: blog.example.org") -> bytes:
    return b"\r\n".join([start, *([host] if host else []), *lines, b"", b""])


def response(*lines: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([start, *lines, b"", b""])


def test_a_request_is_read_and_routed() -> None:
    head = parse_request(request(b"Content-Length: 12", b"X-A: 1, 2", host=b"hOSt: Blog.Example.ORG.:8443"))
    assert (head.method, head.target, head.path, head.minor_version) == (b"POST", b"/form?x=1", b"/form", 1)
    assert (head.authority, head.host) == (b"Blog.Example.ORG.:8443", "blog.example.org")
    assert (head.body_length, head.keep_alive, head.upgrade, head.expects_continue) == (12, True, b"", False)
    assert head.fields[1:] == [(b"Content-Length", b"12"), (b"X-A", b"1, 2")]


@pytest.mark.parametrize(
    ("lines", "body_length", "keep_alive"),
    [
        ((), 0, True),
        ((b"Connection: close",), 0, False),
        ((b"Connection: x, Close",), 0, False),
        ((b"Transfer-Encoding: Chunked",), None, True),
        ((b"Content-Length: 9223372036854775807",), 2**63 - 1, True),
    ],
)
def test_framing_and_persistence_of_requests(
    lines: tuple[bytes, ...], body_length: int | None, keep_alive: bool
) -> None:
    head = parse_request(request(*lines))
    assert (head.body_length, head.keep_alive) == (body_length, keep_alive)


def test_a_request_of_http_1_0_closes_unless_it_asks_not_to() -> None:
    assert not parse_request(request(start=b"GET / HTTP/1.0")).keep_alive
    assert parse_request(request(b"Connection: keep-alive", start=b"GET / HTTP/1.0")).keep_alive


def test_an_absolute_target_becomes_a_path() -> None:
    head = parse_request(request(start=b"GET http://blog.example.org?x HTTP/1.1"))
    assert (head.target, head.host) == (b"/?x", "blog.example.org")
    assert parse_request(request(start=b"GET https://Blog.Example.org/a HTTP/1.1")).target == b"/a"
    assert parse_request(request(start=b"OPTIONS * HTTP/1.1")).target == b"*"


REFUSED = {
    # two readers, two hosts
    "no Host": (request(host=b""), 400),
    "no Host in 1.0": (request(start=b"GET / HTTP/1.0", host=b""), 400),
    "two Hosts": (request(b"Host: other.example.org"), 400),
    "two equal Hosts": (request(b"host: blog.example.org"), 400),
    "empty Host": (request(host=b"Host:"), 400),
    "Host with a path": (request(host=b"Host: a/b"), 400),
    "Host with userinfo": (request(host=b"Host: a@b"), 400),
    "Host with a space": (request(host=b"Host: a b"), 400),
    "Host list": (request(host=b"Host: a, b"), 400),
    "Host with a bad port": (request(host=b"Host: a:b"), 400),
    "Host with two ports": (request(host=b"Host: a:1:2"), 400),
    "Host not ASCII": (request(host=b"Host: \xc3\xa9"), 400),
    "absolute target contradicts": (request(start=b"GET http://other.example.org/ HTTP/1.1"), 400),
    "absolute target with userinfo": (request(start=b"GET http://x@blog.example.org/ HTTP/1.1"), 400),
    "absolute target with another port": (request(start=b"GET http://blog.example.org:80/ HTTP/1.1"), 400),
    "absolute target without host": (request(start=b"GET http:///x HTTP/1.1"), 400),
    "absolute target of another scheme": (request(start=b"GET ftp://blog.example.org/ HTTP/1.1"), 400),
    "fragment": (request(start=b"GET /#x HTTP/1.1"), 400),
    "target without slash": (request(start=b"GET x HTTP/1.1"), 400),
    "asterisk with GET": (request(start=b"GET * HTTP/1.1"), 400),
    "CONNECT": (request(start=b"CONNECT blog.example.org:443 HTTP/1.1"), 405),
    # the request line
    "two spaces": (request(start=b"GET  / HTTP/1.1"), 505),
    "space at the end of the target": (request(start=b"GET /  HTTP/1.1"), 505),
    "tab": (request(start=b"GET\t/ HTTP/1.1"), 501),
    "space at the end": (request(start=b"GET / HTTP/1.1 "), 400),
    "lower-case version": (request(start=b"GET / http/1.1"), 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/0.9 with fields": (request(start=b"GET / HTTP/0.9"), 505),
    "HTTP/1.2": (request(start=b"GET / HTTP/1.2"), 400),
    "HTTP/2.0": (request(start=b"GET / HTTP/2.0"), 505),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 505),
    "RTSP": (request(start=b"GET / RTSP/1.0"), 400),
    "unrecognized method": (request(start=b"BREW / HTTP/1.1"), 501),
    "lower-case method": (request(start=b"get / HTTP/1.1"), 501),
    "control byte in the target": (request(start=b"GET /\x01 HTTP/1.1"), 400),
    "byte above ASCII in the target": (request(start=b"GET /\xe9 HTTP/1.1"), 400),
    "long target": (request(start=b"GET /%b HTTP/1.1" % (b"a" * MAX_TARGET_BYTES)), 414),
    # lines
    "LF alone": (b"GET / HTTP/1.1\nHost: a\n\r\n\r\n", 400),
    "LF alone behind a field": (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
    "CR alone in a value": (request(b"X: a\rb"), 400),
    "CR CR LF": (request(b"X: a\r"), 400),
    "NUL in a value": (request(b"X: a\0b"), 400),
    "folded value": (request(b"X: a", b" b"), 400),
    "folded with a tab": (request(b"X: a", b"\tb"), 400),
    "space before the colon": (request(b"X : a"), 400),
    "tab before the colon": (request(b"X\t: a"), 400),
    "space before the first field": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "no name": (request(b": a"), 400),
    "no colon": (request(b"X"), 400),
    "space in a name": (request(b"X Y: a"), 400),
    "NUL in a name": (request(b"X\0: a"), 400),
    "byte above ASCII in a name": (request(b"X\xff: a"), 400),
    "too many fields": (request(*[b"X-%d: 1" % number for number in range(MAX_FIELDS)]), 431),
    # framing
    "both framings": (request(b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
    "both framings, reversed": (request(b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    "two lengths": (request(b"Content-Length: 5", b"Content-Length: 6"), 400),
    "two equal lengths": (request(b"Content-Length: 5", b"Content-Length: 5"), 400),
    "list of lengths": (request(b"Content-Length: 5, 5"), 400),
    "length with a sign": (request(b"Content-Length: +5"), 400),
    "negative length": (request(b"Content-Length: -5"), 400),
    "hexadecimal length": (request(b"Content-Length: 0x5"), 400),
    "length with an underscore": (request(b"Content-Length: 1_0"), 400),
    "empty length": (request(b"Content-Length:"), 400),
    "length above 2^63": (request(b"Content-Length: 9223372036854775808"), 400),
    "length above 2^64": (request(b"Content-Length: 18446744073709551621"), 400),
    "coding before chunked": (request(b"Transfer-Encoding: gzip, chunked"), 501),
    "coding behind chunked": (request(b"Transfer-Encoding: chunked, identity"), 400),
    "chunked twice": (request(b"Transfer-Encoding: chunked, chunked"), 400),
    "two codings": (request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
    "identity": (request(b"Transfer-Encoding: identity"), 400),
    "nearly chunked": (request(b"Transfer-Encoding: xchunked"), 400),
    "vertical tab before chunked": (request(b"Transfer-Encoding: \x0bchunked"), 400),
    "quoted chunked": (request(b'Transfer-Encoding: "chunked"'), 400),
    "empty coding": (request(b"Transfer-Encoding:"), 400),
    "chunked in 1.0": (request(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.0"), 400),
    "other expectation": (request(b"Expect: 200-ok"), 417),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_readers_could_understand_differently_is_refused(case: str) -> None:
    head, status = REFUSED[case]
    with pytest.raises(HeadError) as refused:
        parse_request(head)
    assert refused.value.status == status


def test_a_head_is_found_where_it_ends_and_bounded() -> None:
    assert find_head(GET[:-1], 1000) == 0
    assert find_head(GET + b"more\r\n\r\n", 1000) == len(GET)
    assert find_head(GET, len(GET)) == len(GET)
    with pytest.raises(HeadError) as refused:
        find_head(GET[:-1] + b"xx", len(GET) - 1)
    assert refused.value.status == 431
    assert skip_empty_lines(b"\r\n" + GET) == 2
    assert skip_empty_lines(GET) == 0


@given(st.binary(max_size=300), st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n"]))
def test_garbage_is_the_peers_fault(data: bytes, start: bytes) -> None:
    for parse in (parse_request, lambda head: parse_response(head, b"GET")):
        with contextlib.suppress(HeadError):
            parse(start + data + b"\r\n\r\n")


NAMES = st.from_regex(rb"X-[A-Za-z0-9!#$%&'*+.^_`|~-]{1,20}", fullmatch=True)
VALUES = st.from_regex(rb"[\x21-\x7e\x80-\xff]([\x20-\x7e\t\x80-\xff]{0,20}[\x21-\x7e\x80-\xff])?", fullmatch=True)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=20), st.integers(0, 2**63 - 1))
def test_what_is_passed_on_is_read_the_same(fields: list[tuple[bytes, bytes]], length: int) -> None:
    lines = [b"%b:%b" % field for field in fields]
    head = parse_request(request(*lines, b"Content-Length: %d" % length))
    again = parse_request(encode_request(head, forwarded_fields(head.fields)))
    assert again == head
    assert head.fields[1:-1] == fields


def test_hop_by_hop_fields_stay_behind() -> None:
    head = parse_request(
        request(
            b"Connection: close, X-Secret, Host, Content-Length, Cookie",
            b"X-Secret: 1", b"Keep-Alive: timeout=5", b"TE: trailers", b"Proxy-Connection: x", b"Cookie: a=b",
            b"Content-Length: 3", b"Trailer: X-Sum", b"X-Forwarded-For: 192.0.2.1",
        )
    )  # fmt: skip
    assert [name for name, _ in forwarded_fields(head.fields, frozenset((b"x-forwarded-for",)))] == [
        b"Host", b"Cookie", b"Content-Length", b"Trailer",
    ]  # fmt: skip


def test_an_upgrade_is_passed_on_as_one_token() -> None:
    head = parse_request(request(b"Connection: keep-alive, Upgrade", b"Upgrade: websocket", start=b"GET /ws HTTP/1.1"))
    assert head.upgrade == b"websocket"
    written = encode_request(head, forwarded_fields(head.fields))
    assert written.endswith(b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert parse_request(written).upgrade == b"websocket"


@pytest.mark.parametrize(
    "lines",
    [
        (b"Upgrade: websocket",),
        (b"Connection: Upgrade",),
        (b"Connection: Upgrade", b"Upgrade: h2c"),
        (b"Connection: Upgrade", b"Upgrade: websocket, h2c"),
        (b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: other"),
        (b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 1"),
    ],
)
def test_any_other_upgrade_is_a_request_without_one(lines: tuple[bytes, ...]) -> None:
    head = parse_request(request(*lines, start=b"GET / HTTP/1.1"))
    assert head.upgrade == b""
    assert b"pgrade" not in encode_request(head, forwarded_fields(head.fields))


def test_100_continue_is_expected_in_1_1_only() -> None:
    assert parse_request(request(b"Expect: 100-Continue")).expects_continue
    assert not parse_request(request(b"Expect: 100-continue", start=b"POST / HTTP/1.0")).expects_continue


@pytest.mark.parametrize(
    ("head", "method", "body_length", "until_close", "keep_alive"),
    [
        (response(b"Content-Length: 5"), b"GET", 5, False, True),
        (response(b"Content-Length: 5"), b"HEAD", 0, False, True),
        (response(b"Content-Length: 5", start=b"HTTP/1.1 304 Not Modified"), b"GET", 0, False, True),
        (response(start=b"HTTP/1.1 204 No Content"), b"GET", 0, False, True),
        (response(b"Transfer-Encoding: chunked"), b"GET", None, False, True),
        (response(b"Connection: close", b"Transfer-Encoding: chunked"), b"GET", None, False, False),
        (response(), b"GET", 0, True, False),
        (response(b"Content-Length: 5", start=b"HTTP/1.0 200 OK"), b"GET", 5, False, False),
        (response(b"Content-Length: 5", b"Connection: keep-alive", start=b"HTTP/1.0 200 OK"), b"GET", 5, False, True),
        (response(b"Upgrade: x", b"Connection: upgrade", start=b"HTTP/1.1 101 "), b"GET", 0, False, True),
        (response(start=b"HTTP/1.1 100 Continue"), b"POST", 0, False, True),
        (response(b"Content-Length: 0", start=b"HTTP/1.1 200"), b"GET", 0, False, True),
    ],
)
def test_framing_of_responses(
    head: bytes, method: bytes, body_length: int | None, until_close: bool, keep_alive: bool
) -> None:
    read = parse_response(head, method)
    assert (read.body_length, read.until_close, read.keep_alive) == (body_length, until_close, keep_alive)


@pytest.mark.parametrize(
    "head",
    [
        response(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        response(b"Content-Length: 5", b"Content-Length: 6"),
        response(b"Content-Length: 5x"),
        response(b"Transfer-Encoding: gzip"),
        response(start=b"ICY 200 OK"),
        response(start=b"HTTP/2.0 200 OK"),
        response(start=b"HTTP/1.1 99 No"),
        response(start=b"HTTP/1.1 2000 No"),
        response(start=b"HTTP/1.1  200 OK"),
        response(b"X : a"),
        response(b"X: a", b" folded"),
        b"\r\n\r\n",
    ],
)
def test_a_response_that_two_readers_could_understand_differently_is_refused(head: bytes) -> None:
    with pytest.raises(HeadError):
        parse_response(head, b"GET")


def test_a_response_is_written_for_the_visitors_connection() -> None:
    asked = parse_request(GET)
    head = parse_response(
        response(b"Connection: close", b"Content-Length: 2", b"Set-Cookie: a", b"Set-Cookie: b"), b"GET"
    )
    fields = forwarded_fields(head.fields)
    assert encode_response(head, fields, asked, keep_alive=True) == response(
        b"Content-Length: 2", b"Set-Cookie: a", b"Set-Cookie: b"
    )
    assert encode_response(head, fields, asked, keep_alive=False).endswith(b"\r\nConnection: close\r\n\r\n")
    old = parse_request(request(b"Connection: keep-alive", start=b"GET / HTTP/1.0"))
    assert encode_response(head, fields, old, keep_alive=True).endswith(b"\r\nConnection: keep-alive\r\n\r\n")


def test_a_response_changes_protocols_only_with_101() -> None:
    asked = parse_request(request(b"Connection: Upgrade", b"Upgrade: websocket", start=b"GET / HTTP/1.1"))
    head = parse_response(
        response(b"Upgrade: websocket", b"Connection: Upgrade", b"X: 1", start=b"HTTP/1.1 101 Switching Protocols"),
        b"GET",
    )
    assert encode_response(head, forwarded_fields(head.fields), asked, keep_alive=True) == response(
        b"X: 1", b"Upgrade: websocket", b"Connection: Upgrade", start=b"HTTP/1.1 101 Switching Protocols"
    )
    interim = parse_response(response(b"Link: </a>", start=b"HTTP/1.1 103 Early Hints"), b"GET")
    assert interim.is_interim
    assert encode_response(interim, interim.fields, asked, keep_alive=False) == response(
        b"Link: </a>", start=b"HTTP/1.1 103 Early Hints"
    )


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        (b"A.example", "a.example"), (b"a.example.", "a.example"), (b"a.example:80", "a.example"),
        (b"[2001:DB8::1]", "[2001:db8::1]"), (b"[2001:db8::1]:8080", "[2001:db8::1]"), (b"a.example.:1", "a.example"),
    ],
)  # fmt: skip
def test_requests_are_routed_by_host_without_port_and_case(authority: bytes, host: str) -> None:
    assert host_name(authority) == host
