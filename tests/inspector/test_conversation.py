"""Which response belongs to which request."""

from __future__ import annotations

import pytest

from tests.inspector.support import Recorded, recorded
from tunneld.inspector.conversation import MAX_WAITING
from tunneld.wire.proxy_protocol import encode_v2

GET = b"GET /%d HTTP/1.1\r\nHost: blog\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d"


def test_pipelined_requests_get_their_responses_in_order() -> None:
    made = Recorded()
    made.ask(b"".join(GET % number for number in range(3)))
    made.reply(OK % 0 + OK % 1)
    pairs = [(one.request and one.request.target, one.response and bytes(one.response.body)) for one in made.all]
    assert pairs == [("/0", b"0"), ("/1", b"1"), ("/2", None)]
    made.end()
    assert [one.note for one in made.all] == ["", "", "the connection ended first"]


def test_a_response_before_the_end_of_its_request() -> None:
    made = recorded(b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nab", b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")
    assert made.one.ended is None
    made.ask(b"cd")
    assert made.one.ended is not None


def test_a_limited_number_of_requests_waits() -> None:
    made = Recorded()
    made.ask(GET % 1 * MAX_WAITING)
    assert {one.note for one in made.all} == {""}
    made.ask(GET % 1)
    assert not made.is_followed
    assert len(made.all) == MAX_WAITING
    assert {one.note for one in made.all} == {"more than 100 requests wait for their responses"}


@pytest.mark.parametrize("chunk", [0, 1, 7])
def test_a_proxy_header_in_front_is_no_request(chunk: int) -> None:
    made = Recorded(has_proxy_header=True)
    made.ask(encode_v2(("192.0.2.1", 5), ("192.0.2.2", 80)) + GET % 1, chunk)
    assert made.one.request is not None
    assert made.one.request.target == "/1"


def test_a_response_without_a_request_ends_the_looking() -> None:
    made = recorded(GET % 1, OK % 1)
    made.reply(b"HTTP/1.1 408 Timeout\r\n\r\n")
    assert not made.is_followed
    assert made.one.note == ""
