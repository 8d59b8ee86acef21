"""Which protocol a connection to the HTTPS port speaks, byte by byte."""

from __future__ import annotations

import ssl
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunneld.wire.client_hello import MAX_HELLO_BYTES, ClientHello, HelloError
from tunneld.wire.first_bytes import PlainProtocol, read_first_bytes


def hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a.example").do_handshake()
    return outgoing.read()


CASES = {
    b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n": PlainProtocol.SSH,
    b"SSH-1.99-x": PlainProtocol.SSH,
    b"GET / HTTP/1.1\r\n": PlainProtocol.HTTP,
    b"SEARCH / HTTP/1.1\r\n": PlainProtocol.HTTP,
    b"SSHX / HTTP/1.1\r\n": PlainProtocol.HTTP,
    b"PROXY TCP4 192.0.2.1 198.51.100.7 41234 80\r\n": PlainProtocol.HTTP,  # from a proxy that is not trusted
    hello(): ClientHello("a.example", ()),
}


@pytest.mark.parametrize("data", CASES)
def test_the_protocol_is_told_by_the_first_bytes_however_they_arrive(data: bytes) -> None:
    found = [read_first_bytes(data[:size]) for size in range(len(data) + 1)]
    assert found[0] is None
    assert found[-1] == CASES[data]
    assert {one for one in found if one is not None} == {CASES[data]}


@pytest.mark.parametrize("data", [b"get / HTTP/1.1", b"\x80\x2e\x01", b"\r\n\r\n\x00\r\nQUIT\n", b"\x00", b"ssh-2.0"])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(HelloError):
        read_first_bytes(data)


@given(st.binary(max_size=40), st.sampled_from([b"", b"\x16\x03\x01"]), st.sampled_from([b"\x00", b"\xff", b"\x01"]))
def test_a_decision_takes_a_bounded_number_of_bytes(data: bytes, start: bytes, fill: bytes) -> None:
    with suppress(HelloError):
        assert read_first_bytes((start + data).ljust(MAX_HELLO_BYTES, fill)) is not None
