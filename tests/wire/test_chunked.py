"""Chunked bodies: any chunking of the input gives the same output, and garbage is the peer's fault."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.wire.chunked import MAX_SIZE_LINE_BYTES, MAX_TRAILER_BYTES, ChunkedBody
from tunneld.wire.http1 import HeadError


def feed(body: ChunkedBody, data: bytes, step: int = 65536) -> tuple[int, bytes]:
    """Feed `data` in pieces of `step` bytes; return how many bytes were taken, and the output."""
    at, out = 0, bytearray()
    while at < len(data) and not body.is_over:
        taken, piece = body.feed(memoryview(data)[at : at + step])
        at += taken
        out += piece
    return at, bytes(out)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def decoded(body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """What another parser reads."""
    peer = h11.Connection(h11.CLIENT)
    peer.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    peer.send(h11.EndOfMessage())
    peer.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    data = b""
    while not isinstance(event := peer.next_event(), h11.EndOfMessage):
        assert not isinstance(event, type) or event is not h11.NEED_DATA
        data += bytes(event.data) if isinstance(event, h11.Data) else b""
    return data, [(bytes(name), bytes(value)) for name, value in event.headers]


EXTENSIONS = st.sampled_from([b"", b";a", b";a=b", b" ;a", b';a="b c"', b";" + b"x" * 100])


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=200), EXTENSIONS)), st.integers(1, 300), st.binary(max_size=9))
def test_a_body_arrives_complete_in_any_pieces(chunks: list[tuple[bytes, bytes]], step: int, behind: bytes) -> None:
    sent = b"".join(chunk(data, extension) for data, extension in chunks) + b"0\r\nX-Sum: 1\r\nHost: x\r\n\r\n"
    body = ChunkedBody()
    taken, out = feed(body, sent + behind, step)
    assert body.is_over
    assert taken == len(sent)
    assert len(out) <= taken
    assert decoded(out) == (b"".join(data for data, _ in chunks), [(b"x-sum", b"1")])


def test_data_in_the_middle_of_a_chunk_is_not_copied() -> None:
    body = ChunkedBody()
    feed(body, b"fff\r\n")
    data = memoryview(b"x" * 1000)
    assert body.feed(data)[1] is data


@given(st.binary(max_size=600), st.integers(1, 40))
def test_garbage_is_the_peers_fault_and_bounded(data: bytes, step: int) -> None:
    body = ChunkedBody()
    try:
        taken, out = feed(body, data, step)
    except HeadError:
        return
    assert len(out) <= taken <= len(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"x\r\n", b"5\n", b" 5\r\n", b"5 \r\n", b"+5\r\n", b"-5\r\n", b"0x5\r\n", b"5_0\r\n", b"5,\r\n",
        b"5;a\rb\r\n", b"5;a\nb\r\n", b"5;\0\r\n", b"1000000000000000\r\n", b"00000000000000005\r\n",
        b"1\r\nab\r\n", b"1\r\na\n", b"1\r\na\r\r\n", b"1\r\na\r\n\r\n",
        b"0\r\nX\r\n\r\n", b"0\r\nX : 1\r\n\r\n", b"0\r\n X: 1\r\n\r\n", b"0\r\nX: \0\r\n\r\n", b"0\r\n\n",
    ],
)  # fmt: skip
def test_a_body_that_two_readers_could_understand_differently_is_refused(data: bytes) -> None:
    for step in (1, 65536):
        with pytest.raises(HeadError):
            feed(ChunkedBody(), data, step)


def test_lines_are_bounded() -> None:
    for step in (1, 65536):
        fits = b"5;" + b"x" * (MAX_SIZE_LINE_BYTES - 4) + b"\r\n"
        assert feed(ChunkedBody(), fits, step) == (len(fits), b"5\r\n")
        with pytest.raises(HeadError, match="exceeds 256 bytes"):
            feed(ChunkedBody(), b"5;" + b"x" * (MAX_SIZE_LINE_BYTES - 3) + b"\r\n", step)


def test_trailers_are_bounded_together() -> None:
    for step in (1, 65536):
        line = b"X: " + b"a" * 1019 + b"\r\n"
        assert len(line) * 8 == MAX_TRAILER_BYTES
        with pytest.raises(HeadError, match="exceeds"):
            feed(ChunkedBody(), b"0\r\n" + line * 8 + b"\r\n", step)
        body = ChunkedBody()
        feed(body, b"0\r\n" + line * 7 + b"X: a\r\n\r\n", step)
        assert body.is_over
