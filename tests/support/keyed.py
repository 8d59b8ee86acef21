"""Hidden servers that show a key, in TLS or not: what `people.connect` is for tunnels that ask for none."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any, cast

import trio

from tests.support.papers import Papers
from tests.support.people import connect
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket, TlsStream

PATIENT = 10.0
"""Seconds that a newcomer has."""


async def open_lobby(
    nursery: trio.Nursery, papers: Papers | None, gate: Authenticator | None = None
) -> HandshakeSupervisor:
    """A lobby at work, of a relay that shows these papers."""
    context = papers.server if papers is not None else None
    lobby = HandshakeSupervisor(gate or Authenticator(lambda: ()), lambda: context, lambda: PATIENT)
    await nursery.start(lobby.run)
    return lobby


async def connect_hidden(uri: Endpoint, papers: Papers) -> trio.SocketStream:
    """Connect as the hidden server and show the key, if there is one. The relay's OK is read with what comes first.

    It is a `trio.SocketStream`, or works like one.
    """
    stream = await connect(uri)
    if not uri.key:
        return stream
    if uri.scheme == "tcp":
        await stream.send_all(f"{uri.key}\n".encode())
        return cast(trio.SocketStream, Told(stream))
    tls = TlsSocket(cast(Any, stream.socket)._sock, papers.client, server_hostname="localhost")
    try:
        await tls.shake_hands()
        await tls.send_all(f"{uri.key}\n".encode())
    except (OSError, ssl.SSLError):
        return stream  # turned away before it could say anything
    return cast(trio.SocketStream, Told(Polite(tls)))


class Polite(TlsStream):
    """One that reads away what it has been told before it closes, for closing on unread octets is a reset."""

    async def aclose(self) -> None:
        with suppress(OSError):
            while self.socket.recv(65536):
                pass
        await super().aclose()


class Told(trio.abc.HalfCloseableStream):
    """A stream in front of whose octets the relay says OK."""

    def __init__(self, stream: trio.SocketStream | TlsStream) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._welcomed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._welcomed:
            line = b""
            while not line.endswith(b"\n"):
                if not (more := await self._stream.receive_some(1)):
                    return b""
                line += more
            if line != b"OK\n":
                return b""
            self._welcomed = True
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        with suppress(trio.BrokenResourceError), trio.move_on_after(1):
            if not self._welcomed:
                await self._stream.receive_some(3)
        await self._stream.aclose()
