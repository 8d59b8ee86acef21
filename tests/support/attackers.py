"""Those who attack a relay over real sockets: in crowds, slowly, endlessly, or with nonsense."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import trio

from tests.support.papers import Papers
from tests.support.people import PATIENCE
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket

AT_ONCE = 64
"""Attackers that connect at the same time: fewer than a listening socket's queue holds."""


@asynccontextmanager
async def crowd(endpoint: Endpoint, count: int, says: bytes = b"") -> AsyncIterator[list[trio.SocketStream]]:
    """Connections that each said `says` and stay, for as long as the block runs."""
    async with AsyncExitStack() as stack:
        streams = []
        for _ in range(count):
            stream = await stack.enter_async_context(await trio.open_tcp_stream(endpoint.host, endpoint.port))
            with suppress(trio.BrokenResourceError):
                await stream.send_all(says)
            streams.append(stream)
        yield streams


async def flood(endpoint: Endpoint, count: int, says: bytes = b"") -> None:
    """So many connections that say `says` and leave at once."""
    left = iter(range(count))

    async def attack() -> None:
        for _ in left:
            async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(says)

    async with trio.open_nursery() as nursery:
        for _ in range(AT_ONCE):
            nursery.start_soon(attack)


async def pour(endpoint: Endpoint, beginning: bytes, chunk: bytes, most: int) -> int:
    """Send `chunk` again and again, until the relay hangs up or `most` octets are gone; how many those were.

    Octets in the buffers of the kernel count, so some millions go where the relay took a few thousand.
    """
    sent = 0
    async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
        with suppress(trio.BrokenResourceError), trio.fail_after(PATIENCE):
            await stream.send_all(beginning)
            while sent < most:
                await stream.send_all(chunk)
                sent += len(chunk)
    return sent


async def whisper(endpoint: Endpoint, papers: Papers, says: bytes) -> None:
    """Say it in TLS, and hear the relay out."""
    with socket.create_connection((endpoint.host, endpoint.port)) as below:
        below.setblocking(False)
        tls = TlsSocket(below, papers.client, server_hostname="localhost")
        with suppress(OSError):
            await tls.shake_hands()
            await tls.send_all(says)
            await tls.send_eof()
            with trio.move_on_after(PATIENCE):
                while await tls.receive(65536):
                    pass


async def babble(endpoint: Endpoint, beginning: bytes, seed: int, count: int) -> None:
    """So many connections that each say `beginning` and 512 octets to 2 KiB of nonsense, always the same for a seed."""
    dice = random.Random(seed)
    for _ in range(count):
        await _say(endpoint, beginning + dice.randbytes(dice.randrange(512, 2048)))


async def _say(endpoint: Endpoint, says: bytes) -> None:
    """One connection that says it and leaves."""
    async with await trio.open_tcp_stream(endpoint.host, endpoint.port) as stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(says)
            await stream.send_eof()
