"""PROXY protocol headers read from real sockets, in pieces of any size: no byte of the visitor is lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tunneld.errors import RemoteProtocolError
from tunneld.tunnel.ingress.proxy_header import receive_header
from tunneld.wire.proxy_protocol import MAX_V2, SIGNATURE, ProxyHeader, encode_v1, encode_v2

SOURCE, DESTINATION = ("192.0.2.1", 41234), ("198.51.100.7", 80)
SOURCE6, DESTINATION6 = ("2001:db8::1", 41234), ("2001:db8::7", 80)
BOTH = ProxyHeader(SOURCE, DESTINATION)
BOTH6 = ProxyHeader(SOURCE6, DESTINATION6)
HEADERS = {
    "v1": (encode_v1(SOURCE, DESTINATION), BOTH),
    "v1 ipv6": (encode_v1(SOURCE6, DESTINATION6), BOTH6),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", ProxyHeader()),
    "v1 unknown, longest": (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", ProxyHeader()),
    "v2": (encode_v2(SOURCE, DESTINATION), BOTH),
    "v2 ipv6": (encode_v2(SOURCE6, DESTINATION6), BOTH6),
    "v2 local": (encode_v2(None, None), ProxyHeader()),
    "v2 local without anything": (SIGNATURE + b"\x20\x00\x00\x00", ProxyHeader()),
    "v2 with a long TLV": (
        encode_v2(SOURCE, DESTINATION)[:14] + (4096).to_bytes(2) + encode_v2(SOURCE, DESTINATION)[16:] + bytes(4084),
        BOTH,
    ),
    "v2 mapped": (
        SIGNATURE + b"\x21\x21\x00\x24"
        + bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1]) + bytes(10) + b"\xff\xff" + bytes([198, 51, 100, 7])
        + (41234).to_bytes(2) + (80).to_bytes(2),
        BOTH,
    ),
}  # fmt: skip
PAYLOADS = [b"", b"GET / HTTP/1.1\r\n\r\n", b"\r\n", b"PROXY UNKNOWN\r\n", encode_v2(None, None)]


@contextmanager
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The relay's socket, non-blocking, and the proxy's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", HEADERS)
async def test_the_header_is_consumed_and_the_bytes_behind_it_are_left(name: str, payload: bytes) -> None:
    header, expected = HEADERS[name]
    with connection() as (ours, theirs):
        theirs.sendall(header + payload)
        theirs.shutdown(socket.SHUT_WR)
        assert await receive_header(ours) == expected
        assert ours.recv(100) == payload


@pytest.mark.parametrize("name", [name for name in HEADERS if "TLV" not in name])
async def test_a_header_may_arrive_byte_by_byte(name: str, nursery: trio.Nursery) -> None:
    header, expected = HEADERS[name]
    with connection() as (ours, theirs):
        found: list[ProxyHeader] = []

        async def receive() -> None:
            found.append(await receive_header(ours))

        nursery.start_soon(receive)
        for byte in header:
            await wait_all_tasks_blocked()
            assert not found
            theirs.send(bytes([byte]))
        theirs.send(b"x")
        await wait_all_tasks_blocked()
        assert found == [expected]
        assert ours.recv(100) == b"x"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"proxy tcp4 192.0.2.1 192.0.2.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n",
        b"PROXY " + b"x" * 101,
        b"\r\n\r\n\x00\r\nQUIX",
        SIGNATURE + b"\x31\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x21\x11\x00\x0b" + bytes(11),
        SIGNATURE + b"\x21\x11" + (MAX_V2 - 15).to_bytes(2) + bytes(12),
    ],
)
async def test_data_that_is_no_header_is_refused_immediately(garbage: bytes) -> None:
    with connection() as (ours, theirs):
        theirs.sendall(garbage)
        with pytest.raises(RemoteProtocolError, match="PROXY protocol"):
            await receive_header(ours)


@pytest.mark.parametrize("cut", [0, 1, 6, 20])
@pytest.mark.parametrize("name", ["v1", "v2"])
async def test_an_incomplete_header_is_refused(name: str, cut: int) -> None:
    with connection() as (ours, theirs):
        theirs.sendall(HEADERS[name][0][:cut])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RemoteProtocolError, match="ended before"):
            await receive_header(ours)
