"""ClientHellos, real ones and hostile ones, in any pieces."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.wire.client_hello import (
    ALPN,
    DECODE_ERROR,
    ILLEGAL_PARAMETER,
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    SERVER_NAME,
    UNEXPECTED_MESSAGE,
    UNRECOGNIZED_NAME,
    ClientHello,
    HelloError,
    encode_alert,
    parse_client_hello,
)


def real_hello(name: str | None, *protocols: str) -> bytes:
    """What OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(list(protocols))
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size) + data


def records(message: bytes, size: int = 16384) -> bytes:
    """A message in records of at most `size` bytes."""
    return b"".join(b"\x16\x03\x01" + vector(2, message[at : at + size]) for at in range(0, len(message), size))


def hello(*extensions: tuple[int, bytes], tail: bytes = b"", session: bytes = b"") -> bytes:
    listed = b"".join(kind.to_bytes(2) + vector(2, data) for kind, data in extensions)
    body = b"\x03\x03" + bytes(32) + vector(1, session) + vector(2, b"\x13\x01") + vector(1, b"\0")
    return b"\x01" + vector(3, body + vector(2, listed) + tail)


def named(name: bytes, kind: int = 0) -> tuple[int, bytes]:
    return SERVER_NAME, vector(2, bytes((kind,)) + vector(2, name))


@pytest.mark.parametrize(
    ("name", "protocols"),
    [
        ("blog.example.org", ()),
        (None, ("http/1.1",)),
        ("a.example", ("h2", "http/1.1")),
        ("x" * 60 + ".example", ("tunneld",)),
    ],
)
def test_what_openssl_sends(name: str | None, protocols: tuple[str, ...]) -> None:
    found = parse_client_hello(real_hello(name, *protocols))
    assert found == ClientHello(name or "", tuple(each.encode() for each in protocols))


@given(st.integers(1, 600), st.integers(0, 5), st.binary(max_size=40))
def test_in_any_records_and_any_pieces(record: int, behind: int, early: bytes) -> None:
    message = hello((0xFE0D, bytes(300)), named(b"Blog.Example.ORG."), (ALPN, vector(2, vector(1, b"h2"))))
    data = records(message, record)
    for end in {0, 1, 5, 6, len(data) // 2, len(data) - 1, *range(0, len(data), 37)}:
        assert parse_client_hello(data[:end]) is None
    assert parse_client_hello(memoryview(data + early)) == ClientHello("blog.example.org", (b"h2",))


def test_a_client_may_name_nothing() -> None:
    assert parse_client_hello(records(hello())) == ClientHello("", ())
    old = b"\x01" + vector(3, b"\x03\x01" + bytes(32) + vector(1, b"") + vector(2, b"\0\x2f") + vector(1, b"\0"))
    assert parse_client_hello(records(old)) == ClientHello("", ())


HOSTILE = {
    "HTTP": (b"GET / HTTP/1.1\r\n", UNEXPECTED_MESSAGE),
    "SSLv2": (b"\x80\x2e\x01\x00\x02", UNEXPECTED_MESSAGE),
    "version": (b"\x16\x02\x00\x00\x05", PROTOCOL_VERSION),
    "empty record": (b"\x16\x03\x01\x00\x00", DECODE_ERROR),
    "long record": (b"\x16\x03\x01\xff\xff", DECODE_ERROR),
    "long message": (records(b"\x01\x00\xff\xff"), DECODE_ERROR),
    "ServerHello": (records(b"\x02"), UNEXPECTED_MESSAGE),
    "another record between": (records(hello()[:10]) + b"\x17\x03\x03\x00\x01x", UNEXPECTED_MESSAGE),
    "endless small records": (records(hello((9, bytes(16000))), 1)[:MAX_HELLO_BYTES], DECODE_ERROR),
    "truncated": (records(b"\x01" + vector(3, bytes(20))), DECODE_ERROR),
    "extension over the end": (records(b"\x01" + vector(3, hello()[4:-2] + b"\x00\x09")), DECODE_ERROR),
    "bytes at the end": (records(hello(tail=b"x")), DECODE_ERROR),
    "two names": (records(hello(named(b"a.example"), named(b"b.example"))), ILLEGAL_PARAMETER),
    "two names in one": (
        records(hello((SERVER_NAME, vector(2, (b"\0" + vector(2, b"a.example")) * 2)))), ILLEGAL_PARAMETER,
    ),
    "another kind of name": (records(hello(named(b"a.example", 1))), ILLEGAL_PARAMETER),
    "no name in the list": (records(hello((SERVER_NAME, vector(2, b"")))), DECODE_ERROR),
    "empty list": (records(hello((SERVER_NAME, b""))), DECODE_ERROR),
    "empty name": (records(hello(named(b""))), UNRECOGNIZED_NAME),
    "NUL": (records(hello(named(b"a.example\0.evil.example"))), UNRECOGNIZED_NAME),
    "space": (records(hello(named(b"a b"))), UNRECOGNIZED_NAME),
    "above ASCII": (records(hello(named(b"\xc3\xa9.example"))), UNRECOGNIZED_NAME),
    "IPv6": (records(hello(named(b"::1"))), UNRECOGNIZED_NAME),
    "long name": (records(hello(named(b"a" * 300))), UNRECOGNIZED_NAME),
    "no protocols": (records(hello((ALPN, vector(2, b"")))), DECODE_ERROR),
    "empty protocol": (records(hello((ALPN, vector(2, b"\0")))), DECODE_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_anything_else_is_the_peers_fault(case: str) -> None:
    data, alert = HOSTILE[case]
    with pytest.raises(HelloError) as refused:
        parse_client_hello(data)
    assert refused.value.alert == alert


@given(st.binary(max_size=400), st.sampled_from([b"", b"\x16\x03\x01", records(hello())[:50]]))
def test_garbage_is_the_peers_fault(data: bytes, start: bytes) -> None:
    with contextlib.suppress(HelloError):
        parse_client_hello(start + data)


@given(st.data())
def test_a_changed_byte_is_no_bug(data: st.DataObject) -> None:
    message = bytearray(real_hello("blog.example.org", "h2", "http/1.1"))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(HelloError):
        parse_client_hello(bytes(message))


def test_a_client_that_never_completes_is_refused_at_the_limit() -> None:
    data = records(b"\x01" + (MAX_HELLO_BYTES - 4).to_bytes(3) + bytes(MAX_HELLO_BYTES), 1000)
    with pytest.raises(HelloError):
        parse_client_hello(data[:MAX_HELLO_BYTES])
    assert parse_client_hello(data[: MAX_HELLO_BYTES - 1]) is None


def test_openssl_understands_the_alert() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(encode_alert(UNRECOGNIZED_NAME))
    with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        client.do_handshake()
