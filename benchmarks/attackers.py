"""The hostile tenants of `benchmarks.attacks`, each a process of its own: `python -m benchmarks.attackers KIND PLACES`.

An attacker has the credential `mallory`, an ordinary user, and does nothing that its credential forbids. It prints
`ready` once its attack is under way, and goes on until it is killed. PLACES is JSON: the URIs of the relay's ports.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
import threading
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from functools import partial
from struct import Struct

import trio

from tests.support.credentials import SECRET
from tunneld import client
from tunneld.net.endpoint import Endpoint
from tunneld.wire.webmux.header import CONTROL, LONG, Code, pack_control
from tunneld.wire.webmux.mux import Mux

NAME = "mallory"
NICENESS = 10
"""On a real network an attacker has a machine of its own. Here it leaves the processor to the relay."""
SESSIONS = range(3, 255, 2)
"""The sessions that a relay opens on a carrier, without the one of its ping."""
TUNNELS = 100
WATCHERS = 250
CONNECTIONS = 400
"""More than `max_connections`."""
BLOCK = 4096
"""Messages sent by one system call."""

_message = Struct("!II").pack


def default_credits() -> Iterator[bytes]:
    """SetDefaultCredit without end, one byte more each time: every unanswered session may send that byte."""
    word = CONTROL | LONG | Code.SET_DEFAULT_CREDIT << 19
    for first in itertools.count(16_385, BLOCK):
        yield b"".join(_message(word, credit) for credit in range(first, first + BLOCK))


def small_fragments() -> Iterator[bytes]:
    """SetMSS 1, and credit without end: every byte is a fragment of its own."""
    yield pack_control(Code.SET_MSS, 0, 1)
    credit = b"".join(pack_control(Code.ADD_CREDIT, session, 1000) for session in SESSIONS)
    while True:
        yield credit


def credits_of_one_byte() -> Iterator[bytes]:
    """AddCredit without end, one byte for every session."""
    credit = b"".join(pack_control(Code.ADD_CREDIT, session, 1) for session in SESSIONS) * (BLOCK // len(SESSIONS))
    while True:
        yield credit


async def flood_carriers(places: dict[str, str], flood: Callable[[], Iterator[bytes]], carriers: int) -> None:
    """Connect carriers, have each full of visitors that send and are never answered, and send `flood` on each."""
    async with client.connect(places["control"], credential=(NAME, SECRET)) as relay:
        server = await relay.open_tunnel("webmux", persist="yes")
        public = Endpoint.parse(await relay.get_tunnel_address(server))
    uri = Endpoint.parse(server)
    opened = [_carrier(uri) for _ in range(carriers)]
    await trio.sleep(0.5)
    visitors = [_talkative_visitor(public) for _ in range(carriers * len(SESSIONS))]
    await trio.sleep(1)
    for carrier in opened:
        threading.Thread(target=_discard, args=(carrier,), daemon=True).start()
        threading.Thread(target=_send, args=(carrier, flood()), daemon=True).start()
    print("ready", flush=True)
    await trio.to_thread.run_sync(_keep_talking, visitors)


def _carrier(uri: Endpoint) -> socket.socket:
    connection = socket.create_connection((uri.host, uri.port))
    mux = Mux(initiator=True)
    mux.define_endpoint(mux.intern_atom(0, str(uri)))
    connection.sendall(bytes(mux.outgoing))
    return connection


def _talkative_visitor(public: Endpoint) -> socket.socket:
    visitor = socket.create_connection((public.host, public.port))
    visitor.setblocking(False)
    return visitor


def _keep_talking(visitors: list[socket.socket]) -> None:
    block, pause = bytes(65_536), threading.Event()
    while not pause.wait(0.05):
        for visitor in visitors:
            with suppress(OSError):
                visitor.send(block)


def _discard(carrier: socket.socket) -> None:
    with suppress(OSError):
        while carrier.recv(1 << 20):
            pass


def _send(carrier: socket.socket, blocks: Iterator[bytes]) -> None:
    with suppress(OSError):
        for block in blocks:
            carrier.sendall(block)


async def watch(places: dict[str, str]) -> None:
    """Watch all events, on many connections."""
    async with trio.open_nursery() as nursery:
        for _ in range(WATCHERS):
            with suppress(Exception):
                await nursery.start(_watch_once, places)
        print("ready", flush=True)


async def _watch_once(places: dict[str, str], *, task_status: trio.TaskStatus[None]) -> None:
    with suppress(Exception):
        async with client.connect(places["control"], credential=(NAME, SECRET)) as relay, relay.watch() as events:
            task_status.started()
            async for _ in events:
                pass
    await trio.sleep_forever()


async def list_without_pause(places: dict[str, str]) -> None:
    """Open some tunnels, and ask for the list of them in one request after the other, without waiting for replies."""
    async with client.connect(places["control"], credential=(NAME, SECRET)) as relay:
        with suppress(Exception):
            for _ in range(TUNNELS):
                await relay.open_tunnel("webmux", persist="yes")
        stream = relay._exchange._stream

        async def discard() -> None:
            while await stream.receive_some(1 << 20):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(discard)
            print("ready", flush=True)
            while True:
                await stream.send_all(b"list\n" * BLOCK)


async def take_connections(places: dict[str, str]) -> None:
    """Log in to the control port and the HTTP port as often as possible, and stay."""
    authorization = b64encode(f"{NAME}:{SECRET}".encode()).decode()
    request = f"GET /api/v1/list HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {authorization}\r\n\r\n".encode()
    http = Endpoint.parse(places["http"].replace("http://", "tcp://").rstrip("/"))
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            with suppress(Exception):
                await stack.enter_async_context(client.connect(places["control"], credential=(NAME, SECRET)))
        for _ in range(CONNECTIONS):
            with suppress(Exception):
                stream = await stack.enter_async_context(await trio.open_tcp_stream(http.host, http.port))
                await stream.send_all(request)
                await stream.receive_some()
        print("ready", flush=True)
        await trio.sleep_forever()


async def open_channels(places: dict[str, str]) -> None:
    """Log in over ssh, and open channels of a type that does not exist."""
    import asyncssh  # noqa: PLC0415  # takes half a second
    from asyncssh.constants import MSG_CHANNEL_OPEN  # noqa: PLC0415
    from asyncssh.packet import String, UInt32  # noqa: PLC0415

    async with client.connect(places["control"], credential=(NAME, SECRET)) as relay:
        server = Endpoint.parse(await relay.open_tunnel("ssh", persist="yes"))
    opening = String("nothing") + UInt32(0) + UInt32(1 << 20) + UInt32(1 << 15)

    async def flood() -> None:
        connection = await asyncssh.connect(
            server.host, server.port, username=server.key or "", known_hosts=None, config=None, client_keys=None
        )
        print("ready", flush=True)
        while True:
            for _ in range(1000):
                connection.send_packet(MSG_CHANNEL_OPEN, opening)
            await asyncio.sleep(0)

    await trio.to_thread.run_sync(lambda: asyncio.run(flood()))


KINDS: dict[str, Callable[[dict[str, str]], Awaitable[None]]] = {
    "default-credit": partial(flood_carriers, flood=default_credits, carriers=1),
    "default-credit-4": partial(flood_carriers, flood=default_credits, carriers=4),
    "mss": partial(flood_carriers, flood=small_fragments, carriers=1),
    "mss-4": partial(flood_carriers, flood=small_fragments, carriers=4),
    "add-credit": partial(flood_carriers, flood=credits_of_one_byte, carriers=1),
    "add-credit-4": partial(flood_carriers, flood=credits_of_one_byte, carriers=4),
    "watch": watch,
    "list": list_without_pause,
    "ssh": open_channels,
    "connections": take_connections,
}

if __name__ == "__main__":
    os.nice(NICENESS)
    trio.run(KINDS[sys.argv[1]], json.loads(sys.argv[2]))
