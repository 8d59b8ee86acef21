"""`peer_closed` sees an end of file without reading."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tunneld.engine.acceptor import peer_closed


@pytest.fixture
def ours_and_peer() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two sockets of a TCP connection; ours is non-blocking."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as peer,
        listener.accept()[0] as ours,
    ):
        ours.setblocking(False)
        yield ours, peer


def test_a_peer_that_closed_counts_as_closed_once_its_bytes_are_read(
    ours_and_peer: tuple[socket.socket, socket.socket],
) -> None:
    ours, peer = ours_and_peer
    assert not peer_closed(ours)
    peer.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    assert not peer_closed(ours)
    assert ours.recv(10) == b"x"
    assert peer_closed(ours)


def test_a_peer_that_reset_counts_as_closed(ours_and_peer: tuple[socket.socket, socket.socket]) -> None:
    ours, peer = ours_and_peer
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    assert peer_closed(ours)
