"""Heads and bodies, in any pieces, and what is no HTTP."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inspector.support import Recorded, recorded
from tunneld.inspector.framing import MAX_FIELDS, MAX_HEAD, NotHttpError, parse_head

GET = b"GET /x HTTP/1.1\r\nHost: blog\r\n\r\n"


def test_a_body_of_a_length() -> None:
    made = recorded(
        b"POST /form HTTP/1.1\r\nContent-Length: 3\r\n\r\na=1", b"HTTP/1.1 201 Made\r\nContent-Length: 2\r\n\r\nok"
    )
    request, response = made.one.request, made.one.response
    assert request is not None
    assert response is not None
    assert (request.method, request.target, bytes(request.body)) == ("POST", "/form", b"a=1")
    assert (response.status, response.reason, bytes(response.body)) == (201, "Made", b"ok")
    assert request.is_whole
    assert made.one.ended == 2


def test_chunks_extensions_and_trailers() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nDigest: x\r\n\r\n"
    made = recorded(GET, answer)
    response = made.one.response
    assert response is not None
    assert (bytes(response.body), response.size, response.trailers) == (b"abcde", 5, [("Digest", "x")])
    assert made.one.ended is not None


def test_until_the_end_of_the_connection() -> None:
    made = recorded(GET, b"HTTP/1.0 200 OK\r\n\r\nall of it")
    assert made.one.ended is None
    made.end()
    response = made.one.response
    assert response is not None
    assert response.is_whole
    assert (bytes(response.body), made.one.note) == (b"all of it", "")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
def test_responses_without_a_body(method: bytes, answer: bytes) -> None:
    made = Recorded()
    for _ in range(2):
        made.ask(GET.replace(b"GET", method))
        made.reply(answer)
    assert [exchange.ended is not None for exchange in made.all] == [True, True]


def test_line_feeds_alone_and_folded_fields_are_read_as_servers_may() -> None:
    start, headers = parse_head(b"GET / HTTP/1.1\nA: one\r\n  two\nB:\tthree \r\nno colon")
    assert (start, headers) == ("GET / HTTP/1.1", [("A", "one two"), ("B", "three"), ("no colon", "")])
    assert recorded(b"\r\n\r\nGET /x HTTP/1.1\nHost: a\n\n", b"HTTP/1.1 200\n\n").one.ended is None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x16\x03\x01\x02", "TLS between the visitor and the local server"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"\x00\x01\x02", "not HTTP"),
        (b"GET" + b" " * 30_000 + b"x\r\n\r\n", "no request line"),
        (b"GET /" + b" HTTP/1.1" * 3_000 + b" \t\r\n\r\n" + b"\x00", "not HTTP"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b" " * 4_000 + b"\r\n", "size of a chunk"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2"),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", "Content-Length"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "size of a chunk"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "longer than its size"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * MAX_HEAD, "a head exceeds"),
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * (MAX_FIELDS + 1) + b"\r\n", "more than 500 fields"),
    ],
)
def test_what_cannot_be_followed_is_given_up_at_once(data: bytes, reason: str) -> None:
    made = Recorded()
    made.ask(data)
    assert not made.is_followed
    assert reason in made.one.note
    assert made.one.ended is not None


def test_the_largest_head_is_read() -> None:
    start, end = b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * (MAX_FIELDS - 1) + b"A: ", b"\r\n\r\n"
    made = Recorded()
    made.ask(start + b"a" * (MAX_HEAD - len(start) - len(end)) + end, chunk=1000)
    assert made.is_followed
    assert made.one.request is not None


def test_a_server_that_speaks_first_is_not_http() -> None:
    made = Recorded()
    made.reply(b"220 mail ESMTP\r\n")
    assert made.one.note == "not HTTP: the local server speaks first"


REQUESTS = (
    b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    b"GET /b?c=d HTTP/1.1\r\n\r\n"
    b"POST /e HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n0\r\n\r\n"
)
RESPONSES = (
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n\r\n\r\nab"
    b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nT: u\r\n\r\n"
    b"HTTP/1.1 200 OK\r\n\r\nrest"
)


def summary(made: Recorded) -> list[object]:
    seen: list[object] = []
    for exchange in made.all:
        for message in (exchange.request, exchange.response):
            assert message is not None
            seen.append((message.headers, bytes(message.body), message.size, message.trailers, message.is_whole))
        seen.append((exchange.interim, exchange.note, exchange.ended is not None))
    return seen


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_pieces_make_no_difference(up: int, down: int) -> None:
    whole = recorded(REQUESTS, RESPONSES)
    whole.end()
    pieces = Recorded()
    pieces.ask(REQUESTS, up)
    pieces.reply(RESPONSES, down)
    pieces.end()
    assert summary(pieces) == summary(whole)
    assert len(whole.all) == 3


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=60) | st.sampled_from([REQUESTS, RESPONSES])), max_size=8))
@settings(max_examples=200, deadline=None)
def test_garbage_is_given_up_or_followed_and_nothing_else(pieces: list[tuple[bool, bytes]]) -> None:
    made = Recorded()
    for is_request, data in pieces:
        made.say(0 if is_request else 1, data)  # anything but NotHttpError fails the test
    made.end()
    assert all(exchange.ended is not None for exchange in made.all)


def test_missing_bytes_matter_only_where_they_are_wanted() -> None:
    made = recorded(GET, b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab")
    made.conversation.skip(1, 5, 9.0)
    made.reply(b"cde")
    exchange = made.one
    assert exchange.response is not None
    assert (bytes(exchange.response.body), exchange.response.size, exchange.response.lost) == (b"ab", 10, 5)
    assert "fell behind" in exchange.note
    assert exchange.ended is not None
    with pytest.raises(NotHttpError, match="fell behind"):
        made.conversation.skip(0, 1, 9.0)
