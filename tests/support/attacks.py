"""Attacks on a relay over real sockets: many connections, slow or endless requests, random data."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio

from tests.support.peers import PATIENCE
from tests.support.pki import Pki
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket

AT_ONCE = 64
"""Connections at the same time: fewer than the queue of a listening socket holds."""


@asynccontextmanager
async def crowd(endpoint: Endpoint, count: int, says: bytes = b"") -> AsyncIterator[list[trio.SocketStream]]:
    """Open connections that each send `says` and stay open for the length of the block."""
    async with AsyncExitStack() as stack:
        streams = []
        for _ in range(count):
            stream = await stack.enter_async_context(await trio.open_tcp_stream(endpoint.host, endpoint.port))
            with suppress(trio.BrokenResourceError):
                await stream.send_all(says)
            streams.append(stream)
        yield streams


async def flood(endpoint: Endpoint, count: int, says: bytes = b"") -> None:
    """Open `count` connections that send `says` and close at once."""
    left = iter(range(count))

    async def attack() -> None:
        for _ in left:
            async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(says)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(attack)


async def send_endlessly(endpoint: Endpoint, beginning: bytes, chunk: bytes, most: int) -> int:
    """Send `chunk` repeatedly, until the relay closes the connection or `most` bytes are sent. Returns the bytes sent.

    Bytes in kernel buffers count, too, so these are some millions if the relay read a few thousand.
    """
    sent = 0
    async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
        with suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE):
            await stream.send_all(beginning)
            while sent < most:
                await stream.send_all(chunk)
                sent += len(chunk)
    return sent


async def send_in_tls(endpoint: Endpoint, pki: Pki, says: bytes) -> None:
    """Send `says` over TLS, and read until the relay closes the connection."""
    with socket.create_connection((endpoint.host, endpoint.port)) as below:
        below.setblocking(False)
        tls = TlsSocket(below, pki.client, server_hostname="localhost")
        with suppress(OSError):
            await tls.shake_hands()
            await tls.send_all(says)
            await tls.send_eof()
            with trio.move_on_after(PATIENCE):
                while await tls.receive(65536):
                    pass


async def send_random(endpoint: Endpoint, beginning: bytes, seed: int, count: int) -> None:
    """Open `count` connections that each send `beginning` and 512 bytes to 2 KiB of data that depends on the seed."""
    dice = random.Random(seed)
    for _ in range(count):
        await _say(endpoint, beginning + dice.randbytes(dice.randrange(512, 2048)))


async def _say(endpoint: Endpoint, says: bytes) -> None:
    """Send on a new connection, and close it."""
    async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(says)
            await stream.send_eof()
