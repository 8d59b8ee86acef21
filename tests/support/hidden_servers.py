"""Connections of hidden servers that present a key, with or without TLS."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any, cast

import trio

from tests.support.peers import connect
from tests.support.pki import Pki
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.net.endpoint import Endpoint
from tunneld.tls.connection import TlsSocket
from tunneld.tls.stream import TlsStream

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for a handshake."""


async def start_handshakes(
    nursery: trio.Nursery, pki: Pki | None, gate: Authenticator | None = None
) -> HandshakeSupervisor:
    """Start a handshake supervisor, with these certificates."""
    context = pki.server if pki is not None else None
    lobby = HandshakeSupervisor(gate or Authenticator(lambda: ()), lambda: context, lambda: HANDSHAKE_TIMEOUT)
    await nursery.start(lobby.run)
    return lobby


async def connect_hidden(uri: Endpoint, pki: Pki) -> trio.SocketStream:
    """Connect as the hidden server, and present the key, if there is one. The relay's OK is read before the first data.

    Returns a `trio.SocketStream`, or a stream that works like one.
    """
    stream = await connect(uri)
    if not uri.key:
        return stream
    if uri.scheme == "tcp":
        await stream.send_all(f"{uri.key}\n".encode())
        return cast(trio.SocketStream, AcceptedStream(stream))
    tls = TlsSocket(cast(Any, stream.socket)._sock, pki.client, server_hostname="localhost")
    try:
        await tls.shake_hands()
        await tls.send_all(f"{uri.key}\n".encode())
    except (OSError, ssl.SSLError):
        return stream  # the relay closed the connection during the handshake
    return cast(trio.SocketStream, AcceptedStream(DrainingTlsStream(tls)))


class DrainingTlsStream(TlsStream):
    """A TLS stream that reads all received bytes before it closes, since closing with unread bytes sends a reset."""

    async def aclose(self) -> None:
        with suppress(OSError):
            while self.socket.recv(65536):
                pass
        await super().aclose()


class AcceptedStream(trio.abc.HalfCloseableStream):
    """A stream that reads the relay's OK before the data."""

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
