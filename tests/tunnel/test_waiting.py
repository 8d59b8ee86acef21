"""Visitors without a server connection: which wait, in which order they are served, and when they are given up."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from tests.support.peers import connect, is_dropped, read_all, reset
from tests.support.visitors import open_tunnel, refused, until_parked, until_served, until_waiting
from tunneld.directory.service import TunnelService
from tunneld.net.endpoint import Peer
from tunneld.tunnel.tunnel import Tunnel
from tunneld.tunnel.visitor import Visitor
from tunneld.tunnel.waiting import MAX_PAIRINGS


async def arrived(tunnel: Tunnel, early: bytes = b"") -> trio.SocketStream:
    """A visitor that did not come through the tunnel's port, and from which `early` has been read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        end, peer = listener.accept()
    for one in (client, end):
        one.setblocking(False)
    tunnel.arrivals.arrive(Visitor(end, peer, early=early))
    return trio.SocketStream(trio.socket.from_stdlib_socket(client))


# Ends of file and resets


async def test_a_visitor_that_sends_nothing_and_only_reads_waits_and_is_answered(service: TunnelService) -> None:
    """As `nc -N` with an empty input does."""
    tunnel = await open_tunnel(service)
    reader = await connect(tunnel.client_uri)
    await reader.send_eof()
    await until_waiting(tunnel, 1)
    server = await connect(tunnel.server_uri)
    await server.send_all(b"220 hidden.example ESMTP\r\n")
    assert await read_all(server) == b""
    await server.aclose()
    assert await read_all(reader) == b"220 hidden.example ESMTP\r\n"


@pytest.mark.parametrize("request_sent", [b"", b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_reset_ends_the_waiting_even_behind_unread_bytes(service: TunnelService, request_sent: bytes) -> None:
    tunnel = await open_tunnel(service)
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(request_sent)
    await until_waiting(tunnel, 1)
    reset(visitor)
    await until_waiting(tunnel, 0)
    assert refused(tunnel) == {"unserved": 1}


async def test_a_reset_behind_an_end_of_file_ends_the_waiting(service: TunnelService) -> None:
    tunnel = await open_tunnel(service)
    visitor = await connect(tunnel.client_uri)
    await visitor.send_eof()
    await until_waiting(tunnel, 1)
    reset(visitor)
    await until_waiting(tunnel, 0)


async def test_a_visitor_that_waited_in_vain_is_reset(service: TunnelService, mock_clock: MockClock) -> None:
    """An end of file would look like an empty answer."""
    tunnel = await open_tunnel(service, pairing_timeout="30")
    visitor = await connect(tunnel.client_uri)
    await until_waiting(tunnel, 1)
    mock_clock.jump(30.1)
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some(1)
    assert refused(tunnel) == {"unserved": 1}


async def test_visitors_that_wait_when_the_tunnel_closes_are_reset(service: TunnelService) -> None:
    tunnel = await open_tunnel(service)
    visitor = await connect(tunnel.client_uri)
    await until_waiting(tunnel, 1)
    await service.close(tunnel.id)
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some(1)


# Bytes read already


@pytest.mark.parametrize("size", [1, 5000, 8 << 20])
@pytest.mark.parametrize("is_parked", [True, False])
async def test_bytes_read_from_a_visitor_already_come_first(
    service: TunnelService, size: int, is_parked: bool, nursery: trio.Nursery
) -> None:
    """Behind the PROXY header, ahead of what is still in the visitor's socket, and all of them, even where the server
    connection does not take them at once.
    """
    early = bytes(number % 251 for number in range(size))
    tunnel = await open_tunnel(service, proxy_protocol="v1")
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    if not is_parked:
        await server.aclose()
        await until_parked(tunnel, 0)
    visitor = await arrived(tunnel, early)
    if not is_parked:
        await until_waiting(tunnel, 1)
        server = await connect(tunnel.server_uri)
    await visitor.send_all(b"and more")
    await visitor.send_eof()
    await until_served(tunnel, 1)
    received = await read_all(server)
    header, _, rest = received.partition(b"\r\n")
    assert header.startswith(b"PROXY TCP4 127.0.0.1")
    assert rest == early + b"and more"
    await server.aclose()
    assert await read_all(visitor) == b""
    await visitor.aclose()
    assert tunnel.octets == (size + len(b"and more"), 0)


# Failed server connections


class BrokenConnection:
    """A server connection that fails with the first byte."""

    def __init__(self, made: list[BrokenConnection]) -> None:
        self.closed = False
        made.append(self)

    def set_originator(self, _visitor: Peer | None) -> None:
        pass

    def send(self, _data: bytes) -> None:
        raise OSError(errno.EPIPE, "broken pipe")

    def close(self) -> None:
        self.closed = True


def break_first(tunnel: Tunnel, count: int, monkeypatch: pytest.MonkeyPatch) -> list[BrokenConnection]:
    """Make the first `count` server connections that visitors get fail."""
    made: list[BrokenConnection] = []
    dial: Callable[[], object] = tunnel.server_side.dial_nowait
    monkeypatch.setattr(
        tunnel.server_side, "dial_nowait", lambda: BrokenConnection(made) if len(made) < count else dial()
    )
    return made


@pytest.mark.interpreted
async def test_a_visitor_paired_with_a_failed_server_connection_gets_another_one(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel = await open_tunnel(service, proxy_protocol="v1")
    server = await connect(tunnel.server_uri)
    await until_parked(tunnel, 1)
    made = break_first(tunnel, MAX_PAIRINGS - 1, monkeypatch)
    visitor = await connect(tunnel.client_uri)
    await visitor.send_all(b"hello")
    await until_served(tunnel, 1)
    await visitor.send_eof()
    assert (await read_all(server)).endswith(b"\r\nhello")
    assert all(one.closed for one in made)
    assert len(made) == MAX_PAIRINGS - 1
    assert not tunnel.refusals


@pytest.mark.interpreted
async def test_a_visitor_that_gets_failed_server_connections_alone_is_given_up(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel = await open_tunnel(service, proxy_protocol="v1", max_per_source="1")
    made = break_first(tunnel, 2 * MAX_PAIRINGS, monkeypatch)
    for count in (1, 2):
        assert await is_dropped(await connect(tunnel.client_uri))
        assert len(made) == count * MAX_PAIRINGS
        assert refused(tunnel) == {"unserved": count}


@pytest.mark.interpreted
async def test_a_failed_server_connection_sends_the_visitor_back_to_wait_until_its_deadline(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    tunnel = await open_tunnel(service, proxy_protocol="v1", pairing_timeout="30")
    made = break_first(tunnel, 1, monkeypatch)
    visitor = await connect(tunnel.client_uri)
    await until_waiting(tunnel, 1)
    assert len(made) == 1
    mock_clock.jump(30.1)
    assert await is_dropped(visitor)
