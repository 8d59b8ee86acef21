"""The TLS connection of a carrier: many records in one system call, and nothing is lost when records are cut."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import AsyncIterator

import pytest
import trio

from tests.engine.bench import NOISE, tcp_pair
from tests.support.pki import Pki
from tunneld.mux.connection import TLS_RECORD_SIZE, Connection, connection_over
from tunneld.tls.connection import TlsSocket

BUFFER_SIZE = 256 * 1024


@pytest.fixture
async def ends(carrier_certificates: Pki) -> AsyncIterator[tuple[TlsSocket, TlsSocket]]:
    """The relay's end and the agent's; the agent sends hello together with the end of its handshake."""
    near, far = socket.socketpair()  # delivers everything at once, unlike TCP
    for end in near, far:
        end.setblocking(False)
    relay = TlsSocket(near, carrier_certificates.server, server_side=True)
    agent = TlsSocket(far, carrier_certificates.client, server_hostname="localhost")

    async def connect() -> None:
        await agent.shake_hands()
        agent.write(memoryview(b"hello"))
        assert agent.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay.shake_hands)
        nursery.start_soon(connect)
    yield relay, agent
    relay.close()
    agent.close()


async def receive(connection: Connection, buffer: memoryview) -> bytes:
    """The next bytes of a connection, none at its end."""
    while True:
        try:
            return bytes(buffer[: connection.receive_into(buffer)])
        except BlockingIOError:
            await trio.lowlevel.wait_readable(connection.connection)


async def receive_all(connection: Connection, size: int, buffer: memoryview) -> bytes:
    """Exactly `size` bytes."""
    received = bytearray()
    while len(received) < size:
        received += await receive(connection, buffer)
    return bytes(received)


async def write_all(connection: Connection, outgoing: bytearray) -> None:
    """Write until the kernel has everything."""
    while not connection.write(outgoing):
        await trio.lowlevel.wait_writable(connection.connection)


async def test_data_that_came_with_the_handshake_is_reported_as_buffered(ends: tuple[TlsSocket, TlsSocket]) -> None:
    connection, buffer = connection_over(ends[0]), memoryview(bytearray(BUFFER_SIZE))
    before = connection.has_buffered_input
    with pytest.raises(BlockingIOError):
        ends[0].connection.recv(1)
    count = connection.receive_into(buffer)
    assert (before, bytes(buffer[:count]), connection.has_buffered_input) == (True, b"hello", False)


async def test_a_close_notify_after_the_last_bytes_does_not_wait_for_epoll(ends: tuple[TlsSocket, TlsSocket]) -> None:
    """epoll would not report it: the socket below does not change."""
    connection, buffer = connection_over(ends[0]), memoryview(bytearray(BUFFER_SIZE))
    await ends[1].send_eof()
    count = connection.receive_into(buffer)
    assert (bytes(buffer[:count]), connection.drained) == (b"hello", False)
    assert connection.receive_into(buffer) == 0


@pytest.mark.parametrize("size", [2 * TLS_RECORD_SIZE, 4 * TLS_RECORD_SIZE, BUFFER_SIZE])
async def test_everything_arrives_whatever_the_sizes_of_reads_and_writes(
    ends: tuple[TlsSocket, TlsSocket], size: int
) -> None:
    relay, agent = ends
    there, here, buffer = connection_over(relay), connection_over(agent), memoryview(bytearray(size))
    assert await receive(there, buffer) == b"hello"
    dice = random.Random(size)
    with trio.fail_after(30):
        for _ in range(40):
            part = NOISE[
                : dice.choice([1, TLS_RECORD_SIZE - 1, TLS_RECORD_SIZE, TLS_RECORD_SIZE + 1, BUFFER_SIZE, len(NOISE)])
            ]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_all, here, bytearray(part))
                assert await receive_all(there, len(part), buffer) == part


async def test_nothing_more_is_encrypted_before_the_kernel_has_the_previous_output(
    ends: tuple[TlsSocket, TlsSocket],
) -> None:
    relay, agent = ends
    connection, outgoing = connection_over(agent), bytearray(NOISE)
    assert not connection.write(outgoing)
    assert not outgoing
    assert 0 < connection.pending_output < 1.01 * len(NOISE)
    outgoing += b"more"
    assert not connection.write(outgoing)
    assert outgoing == b"more"
    there, buffer = connection_over(relay), memoryview(bytearray(BUFFER_SIZE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, connection, outgoing)
        assert await receive_all(there, 5 + len(NOISE) + 4, buffer) == b"hello" + NOISE + b"more"
    assert not connection.pending_output


async def test_a_stream_cut_within_a_record_ends_after_the_complete_records(
    ends: tuple[TlsSocket, TlsSocket],
) -> None:
    relay, agent = ends
    connection, buffer = connection_over(relay), memoryview(bytearray(BUFFER_SIZE))
    assert await receive(connection, buffer) == b"hello"
    agent.write(memoryview(NOISE))
    assert not agent.flush()
    agent.connection.shutdown(socket.SHUT_WR)
    received = bytearray()
    while part := await receive(connection, buffer):
        received += part
    assert TLS_RECORD_SIZE <= len(received) < len(NOISE)
    assert NOISE.startswith(received)


def test_the_kernel_knows_how_long_a_peer_has_been_idle() -> None:
    near, far = tcp_pair()
    with near, far:
        connection = Connection(near)
        far.send(b"hello")
        select.select([near], [], [])
        arrived = time.monotonic()
        while not connection.idle_seconds():
            assert time.monotonic() - arrived < 5, "the kernel reports no idle time"
        assert connection.idle_seconds() <= time.monotonic() - arrived + 0.05
        far.send(b"again")
        while connection.idle_seconds() > 0.01:
            assert time.monotonic() - arrived < 5, "the kernel did not notice the new data"


def test_the_idle_time_of_a_socket_pair_is_unknown() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert Connection(near).idle_seconds() == 0
