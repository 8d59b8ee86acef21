"""Heads that repeat are read and written as if each were the first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.sites.conftest import ORIGIN
from tests.wire.test_http1 import GET, REFUSED, request
from tunneld.sites.fields import HostRewrite, request_fields
from tunneld.sites.heads import MAX_REMEMBERED, HeadWriter, RequestReader, ResponseReader
from tunneld.wire.http1 import HeadError, RequestHead, encode_request, parse_request, parse_response

STARTS = (
    b"GET / HTTP/1.1", b"GET /a?b HTTP/1.1", b"GET /\"'<> HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0",
    b"GET /#x HTTP/1.1", b"GET  / HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"BREW / HTTP/1.1",
    b"GET http://blog.example.org/a HTTP/1.1", b"GET / HTTP/1.2", b"GET /\xe9 HTTP/1.1", b"get / HTTP/1.1",
    b"GET /%b HTTP/1.1" % (b"a" * 9000),
)  # fmt: skip
LINES = (
    (), (b"Accept: */*",), (b"Connection: Upgrade", b"Upgrade: websocket"), (b"Connection: close",),
    (b"Content-Length: 5",), (b"X: " + b"a" * MAX_REMEMBERED,), (b"X-Request-Id: given",),
)  # fmt: skip
HEADS = [request(*lines, start=start) for start in STARTS for lines in LINES] + [head for head, _ in REFUSED.values()]


def read(reader: RequestReader, head: bytes) -> RequestHead | int | None:
    try:
        return reader.take(bytearray(head), 32768)
    except HeadError as error:
        return error.status


@given(st.lists(st.sampled_from(HEADS), min_size=2, max_size=6))
def test_a_request_is_read_as_the_first_one_is(heads: list[bytes]) -> None:
    reader = RequestReader()
    for head in heads:
        assert read(reader, head) == read(RequestReader(), head)


@given(st.lists(st.sampled_from(HEADS), min_size=2, max_size=6))
def test_a_request_is_written_as_the_first_one_is(heads: list[bytes]) -> None:
    reader, writer = RequestReader(), HeadWriter(ORIGIN)
    for number, head in enumerate(heads):
        found = read(reader, head)
        if isinstance(found, RequestHead):
            rewrite = HostRewrite(b"localhost:1") if number % 3 else None
            assert writer.request(found, b"1", rewrite) == HeadWriter(ORIGIN).request(found, b"1", rewrite)
            again = parse_request(writer.request(found, b"1", rewrite))
            assert again.fields[-1] == (b"X-Request-Id", b"1")
            assert (again.target, again.body_length, again.upgrade) == (found.target, found.body_length, found.upgrade)
            assert writer.identity(found) == b"given" or b"given" not in head


@given(st.lists(st.sampled_from(HEADS), min_size=2, max_size=6))
def test_a_head_that_comes_again_alone_is_the_last_one(heads: list[bytes]) -> None:
    reader = RequestReader()
    for head in heads:
        repeated = reader.repeated(memoryview(head))
        assert repeated is None or repeated == parse_request(head)
        if isinstance(found := read(reader, head), RequestHead) and len(head) <= MAX_REMEMBERED:
            assert reader.repeated(memoryview(head)) is found
        for other in (head + b"x", head[:-1], b"", head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r"):
            assert reader.repeated(memoryview(other)) is None


def test_a_head_is_taken_from_the_front_of_what_came() -> None:
    reader, data = RequestReader(), bytearray(b"\r\n" + GET + GET + GET.replace(b"GET /", b"GET /x") + GET[:20])
    assert [head.target for head in iter(lambda: reader.take(data, 1000), None)] == [b"/", b"/", b"/x"]
    assert data == GET[:20]


RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n", b"nonsense\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"a" * MAX_REMEMBERED + b"\r\n\r\n",
]  # fmt: skip
REQUESTS = [
    parse_request(request(*lines, start=start))
    for start in (b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0")
    for lines in ((), (b"Connection: Upgrade", b"Upgrade: websocket"))
]


@given(
    st.lists(
        st.tuples(st.sampled_from(RESPONSES), st.sampled_from(REQUESTS), st.integers(1, 3), st.booleans()),
        min_size=2, max_size=6,
    )
)  # fmt: skip
def test_a_response_is_read_and_written_as_the_first_one_is(
    exchanges: list[tuple[bytes, RequestHead, int, bool]],
) -> None:
    reader, writer = ResponseReader(), HeadWriter(ORIGIN)
    for raw, head, pieces, keep_alive in exchanges:
        found, used = None, 0
        try:
            expected = ResponseReader().take(memoryview(raw), head, 32768)[1]
        except HeadError:
            continue
        for piece in range(pieces):
            data = raw[used:] + b"body" if piece == pieces - 1 else raw[used : used + len(raw) // 4]
            taken, found = reader.take(memoryview(data), head, 32768)
            used += taken
        assert used == len(raw)
        assert found == expected == parse_response(raw, head.method)
        assert found is not None
        written = writer.response(found, head, b"1", None, keep_alive=keep_alive)
        assert written == HeadWriter(ORIGIN).response(found, head, b"1", None, keep_alive=keep_alive)


def test_what_is_written_has_every_field_once() -> None:
    head = parse_request(request(b"X-Request-Id: given", b"Accept: */*", start=b"GET / HTTP/1.1"))
    written = HeadWriter(ORIGIN).request(head, b"given", None)
    assert written == encode_request(head, [*request_fields(head, ORIGIN), (b"X-Request-Id", b"given")])
    response = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nx-request-id: other\r\n\r\n", b"GET")
    assert HeadWriter(ORIGIN).response(response, head, b"given", None, keep_alive=True) == (
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Request-Id: given\r\n\r\n"
    )
