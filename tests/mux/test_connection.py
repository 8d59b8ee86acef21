"""The link of a carrier in TLS: many records in one system call, and nothing lost where they are cut."""

from __future__ import annotations

import random
import select
import socket
import time
from collections.abc import AsyncIterator

import pytest
import trio

from tests.engine.bench import NOISE, tcp_pair
from tests.support.papers import Papers
from tunneld.mux.connection import RECORD, Connection, connection_over
from tunneld.tls.connection import TlsSocket

WIDE = 256 * 1024


@pytest.fixture
async def ends(carrier_papers: Papers) -> AsyncIterator[tuple[TlsSocket, TlsSocket]]:
    """A relay's end and an agent's, of which the agent says hello in the same breath as the end of its handshake."""
    near, far = socket.socketpair()  # which delivers at once what is sent, unlike TCP
    for end in near, far:
        end.setblocking(False)
    relay = TlsSocket(near, carrier_papers.server, server_side=True)
    agent = TlsSocket(far, carrier_papers.client, server_hostname="localhost")

    async def call() -> None:
        await agent.shake_hands()
        agent.write(memoryview(b"hello"))
        assert agent.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay.shake_hands)
        nursery.start_soon(call)
    yield relay, agent
    relay.close()
    agent.close()


async def hear(link: Connection, buffer: memoryview) -> bytes:
    """The next octets of a link, none at its end."""
    while True:
        try:
            return bytes(buffer[: link.receive_into(buffer)])
        except BlockingIOError:
            await trio.lowlevel.wait_readable(link.connection)


async def hear_all(link: Connection, size: int, buffer: memoryview) -> bytes:
    """So many octets."""
    heard = bytearray()
    while len(heard) < size:
        heard += await hear(link, buffer)
    return bytes(heard)


async def write_all(link: Connection, outgoing: bytearray) -> None:
    """Write until the kernel has everything."""
    while not link.write(outgoing):
        await trio.lowlevel.wait_writable(link.connection)


async def test_what_came_with_the_handshake_is_told_of_before_epoll_could(ends: tuple[TlsSocket, TlsSocket]) -> None:
    link, buffer = connection_over(ends[0]), memoryview(bytearray(WIDE))
    before = link.has_buffered_input
    with pytest.raises(BlockingIOError):
        ends[0].connection.recv(1)
    count = link.receive_into(buffer)
    assert (before, bytes(buffer[:count]), link.has_buffered_input) == (True, b"hello", False)


async def test_a_goodbye_behind_the_last_octets_is_not_left_for_epoll(ends: tuple[TlsSocket, TlsSocket]) -> None:
    """Nobody would tell of it: the connection below stays as it is."""
    link, buffer = connection_over(ends[0]), memoryview(bytearray(WIDE))
    await ends[1].send_end()
    count = link.receive_into(buffer)
    assert (bytes(buffer[:count]), link.drained) == (b"hello", False)
    assert link.receive_into(buffer) == 0


@pytest.mark.parametrize("size", [2 * RECORD, 4 * RECORD, WIDE])
async def test_everything_arrives_whatever_a_write_or_a_read_holds(
    ends: tuple[TlsSocket, TlsSocket], size: int
) -> None:
    relay, agent = ends
    there, here, buffer = connection_over(relay), connection_over(agent), memoryview(bytearray(size))
    assert await hear(there, buffer) == b"hello"
    dice = random.Random(size)
    with trio.fail_after(30):
        for _ in range(40):
            part = NOISE[: dice.choice([1, RECORD - 1, RECORD, RECORD + 1, WIDE, len(NOISE)])]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_all, here, bytearray(part))
                assert await hear_all(there, len(part), buffer) == part


async def test_nothing_more_is_enciphered_before_the_kernel_has_what_is(ends: tuple[TlsSocket, TlsSocket]) -> None:
    relay, agent = ends
    link, outgoing = connection_over(agent), bytearray(NOISE)
    assert not link.write(outgoing)
    assert not outgoing
    assert 0 < link.pending_output < 1.01 * len(NOISE)
    outgoing += b"more"
    assert not link.write(outgoing)
    assert outgoing == b"more"
    there, buffer = connection_over(relay), memoryview(bytearray(WIDE))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_all, link, outgoing)
        assert await hear_all(there, 5 + len(NOISE) + 4, buffer) == b"hello" + NOISE + b"more"
    assert not link.pending_output


async def test_a_peer_that_is_gone_in_the_middle_of_a_record_is_an_end_behind_what_was_whole(
    ends: tuple[TlsSocket, TlsSocket],
) -> None:
    relay, agent = ends
    link, buffer = connection_over(relay), memoryview(bytearray(WIDE))
    assert await hear(link, buffer) == b"hello"
    agent.write(memoryview(NOISE))
    assert not agent.flush()
    agent.connection.shutdown(socket.SHUT_WR)
    heard = bytearray()
    while part := await hear(link, buffer):
        heard += part
    assert RECORD <= len(heard) < len(NOISE)
    assert NOISE.startswith(heard)


def test_the_kernel_knows_how_long_a_peer_has_been_quiet() -> None:
    near, far = tcp_pair()
    with near, far:
        link = Connection(near)
        far.send(b"hello")
        select.select([near], [], [])
        heard = time.monotonic()
        while not link.idle_seconds():
            assert time.monotonic() - heard < 5, "it does not tell"
        assert link.idle_seconds() <= time.monotonic() - heard + 0.05
        far.send(b"again")
        while link.idle_seconds() > 0.01:
            assert time.monotonic() - heard < 5, "it has not heard"


def test_of_a_socket_pair_it_knows_nothing() -> None:
    near, far = socket.socketpair()
    with near, far:
        assert Connection(near).idle_seconds() == 0
