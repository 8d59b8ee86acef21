"""Requests of HTTP/2 as HTTP/1.1: exactly one request comes out, or none; and the chunks of responses."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tunneld.wire.http1 import Fields, HeadError, parse_request, parse_response
from tunneld.wire.http2 import Dechunker, has_length, request_head, response_headers, trailer_section

PSEUDO: Fields = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"a.example"), (b":path", b"/x?y")]
TRICKY = st.lists(
    st.sampled_from([b"\r\n", b"\n", b"\0", b":", b" ", b"\t", b"a", b"\xff", b"GET / HTTP/1.1", b";", b"1"])
)
VALUES = (
    TRICKY.map(b"".join) | st.binary(max_size=20) | st.sampled_from([b"GET", b"/", b"a.example", b"5", b"trailers"])
)
NAMES = (
    st.sampled_from(
        [b":method", b":path", b":authority", b":scheme", b":status", b"host", b"content-length", b"cookie"]
    )
    | st.sampled_from([b"transfer-encoding", b"connection", b"x", b"te", b"expect"])
    | VALUES
)


def test_a_request() -> None:
    fields = [(b"accept", b"*/*"), (b"cookie", b"a=1"), (b"x", b""), (b"cookie", b"b=2"), (b"te", b"trailers")]
    head = parse_request(request_head([*PSEUDO, *fields], has_body=True))
    assert (head.method, head.target, head.host, head.body_length) == (b"POST", b"/x?y", "a.example", None)
    assert head.fields == [
        (b"host", b"a.example"),
        (b"accept", b"*/*"),
        (b"x", b""),
        (b"cookie", b"a=1; b=2"),
        (b"transfer-encoding", b"chunked"),
    ]
    known = [*PSEUDO, (b"content-length", b"5")]
    assert (has_length(known), has_length(PSEUDO)) == (True, False)
    assert parse_request(request_head(known, has_body=True)).body_length == 5
    assert parse_request(request_head(PSEUDO, has_body=False)).body_length == 0


@given(
    st.sampled_from(["method", "target", "authority", "name", "value"]),
    VALUES,
    st.lists(st.tuples(NAMES, st.sampled_from([b"5", b"a", b"a.example"])), max_size=2),
    st.booleans(),
)
@example("method", b"GET / HTTP/1.1\r\nx: y\r\n\r\nGET", [], False)
@example("target", b" HTTP/1.1\r\nx: y\r\n\r\nGET /", [], False)
@example("authority", b"a\r\nx: y", [], False)
@example("name", b": y\r\nx", [], False)
@example("value", b"y\r\nz: a", [], True)
def test_no_field_becomes_two_lines_or_two_requests(where: str, tricky: bytes, fields: Fields, has_body: bool) -> None:
    method = tricky if where == "method" else b"POST"
    target = b"/" + tricky if where == "target" else b"/x?y"
    authority = tricky if where == "authority" else b"a.example"
    more = [(b"x" + tricky if where == "name" else b"x", tricky if where == "value" else b"y"), *fields]
    headers = [(b":method", method), (b":path", target), (b":authority", authority), *more]
    with suppress(HeadError):
        head = request_head(headers, has_body=has_body)
        first, *lines = head.split(b"\r\n")
        assert first.split(b" ") == [method, target, b"HTTP/1.1"]
        cookies = b"; ".join(value for name, value in more if name == b"cookie")
        allowed = {b"%b: %b" % field for field in more if b"\n" not in b"".join(field)} | {b"host: %b" % authority}
        allowed |= {b"cookie: %b" % cookies, b"transfer-encoding: chunked"}
        assert lines[-2:] == [b"", b""]
        assert set(lines[:-2]) <= allowed
        parsed = parse_request(head)
        assert {value for name, value in headers if name in {b":authority", b"host"}} == {parsed.authority}
        assert (parsed.body_length is None) == (has_body and not has_length(headers))


@given(st.lists(st.tuples(st.sampled_from([b"x-sum", b"y"]) | VALUES, VALUES), max_size=4))
def test_trailers_end_where_they_should(fields: Fields) -> None:
    with suppress(HeadError):
        section = trailer_section(fields)
        assert section.startswith(b"0\r\n")
        assert section.index(b"\r\n\r\n") == len(section) - 4
        assert section.count(b"\r\n") == len(fields) + 2


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=5), st.lists(st.integers(1, 20)), st.booleans())
def test_chunks_are_taken_off_however_they_arrive(chunks: list[bytes], cuts: list[int], has_trailer: bool) -> None:
    trailer = b"X-Sum: 1 \r\n" if has_trailer else b""
    data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"
    dechunker, out, at = Dechunker(), b"", 0
    for size in [*cuts, len(data)]:
        assert dechunker.is_over == (at >= len(data))
        out += dechunker.feed(data[at : at + size])
        at += size
    assert dechunker.is_over
    assert out == b"".join(chunks)
    assert dechunker.trailers == ([(b"x-sum", b"1")] if has_trailer else [])


@pytest.mark.parametrize("data", [b"x\r\n", b"\r\n", b"-1\r\n", b"1" * 300, b"0\r\n" + b"a" * 9000])
def test_what_are_no_chunks(data: bytes) -> None:
    with pytest.raises(HeadError):
        Dechunker().feed(data)


def test_a_response() -> None:
    head = b"HTTP/1.1 200 Fine\r\nContent-Type: a\r\nConnection: x, close\r\nX: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert response_headers(parse_response(head, b"GET")) == [(b":status", b"200"), (b"content-type", b"a")]
