"""Outgoing connections."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest
import trio

from tunneld.errors import RelayUnreachableError
from tunneld.net.dial import Address, check_not_refused, dial, dial_nowait, first_reachable, resolve, resolve_relay
from tunneld.net.sockets import open_descriptors

LOOPBACK = "127.0.0.1"


@pytest.fixture
def listening() -> Iterator[Address]:
    """An address that accepts connections."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield socket.AF_INET, listener.getsockname()


@pytest.fixture
def refusing() -> Iterator[Address]:
    """An address that refuses connections, and that no other process can bind meanwhile."""
    with socket.socket() as not_listening:
        not_listening.bind((LOOPBACK, 0))
        yield socket.AF_INET, not_listening.getsockname()


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="the system's own times apply")
@pytest.mark.parametrize(("keepalive", "idle", "interval"), [(60.0, 60, 15), (2.0, 2, 1), (0.001, 1, 1)])
def test_a_vanished_peer_is_noticed_after_twice_the_keepalive_time(keepalive: float, idle: int, interval: int) -> None:
    with (
        socket.create_server(("127.0.0.2", 0)) as listener,
        dial_nowait((socket.AF_INET, listener.getsockname()), keepalive) as connection,
    ):
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        assert [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [idle, interval, 4]


async def test_a_connection_is_non_blocking_and_has_no_delay(listening: Address) -> None:
    with await dial(listening) as connection:
        assert connection.getpeername() == listening[1]
        assert connection.getblocking() is False
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_refused_connection_raises_and_leaves_no_descriptor(refusing: Address) -> None:
    before = open_descriptors()
    with pytest.raises(ConnectionRefusedError):
        await dial(refusing)
    assert open_descriptors() == before


async def test_a_refusal_is_found_after_dial_nowait(refusing: Address) -> None:
    before = open_descriptors()
    with pytest.raises(ConnectionRefusedError):
        check_not_refused(dial_nowait(refusing))
    assert open_descriptors() == before


async def test_a_connection_that_is_not_refused_stays_open(listening: Address) -> None:
    with dial_nowait(listening) as connection:
        check_not_refused(connection)
        await trio.lowlevel.wait_writable(connection)
        assert connection.getpeername() == listening[1]


async def test_the_first_reachable_address_is_chosen(listening: Address, refusing: Address) -> None:
    assert await first_reachable([refusing, listening]) == listening


async def test_without_a_reachable_address_the_last_error_is_raised(refusing: Address) -> None:
    with pytest.raises(ConnectionRefusedError):
        await first_reachable([refusing])
    with pytest.raises(OSError, match="the host name has no address") as failed:
        await first_reachable([])
    assert failed.value.errno == errno.EADDRNOTAVAIL


async def test_an_address_resolves_to_itself_without_a_connection(refusing: Address) -> None:
    port = refusing[1][1]
    assert await resolve(LOOPBACK, port) == [refusing]
    assert await resolve_relay(LOOPBACK, port) == refusing


async def test_a_relay_without_a_reachable_address_is_named(refusing: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve_twice(_host: str, _port: int) -> list[Address]:
        await trio.lowlevel.checkpoint()
        return [refusing, refusing]

    monkeypatch.setattr("tunneld.net.dial.resolve", resolve_twice)
    with pytest.raises(RelayUnreachableError, match=r"^could not connect to tcp://relay:7010: connection refused$"):
        await resolve_relay("relay", 7010)
