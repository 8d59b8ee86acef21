"""Who connects as the hidden server shows a key first: `openTunnel tcp secure=yes`, or `secure=key` without encryption.

    the hidden server           the relay
    KEY line end          ──►                   in TLS, with the certificate of the control port
                          ◄──   OK line end     it is parked; or ERR code reason, and the end
    octets                ◄─►   octets          from here on, of the visitor that comes; its PROXY header first, if any

What is said ahead, behind the key's line, is for the visitor. The key is compared in constant time.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Callable
from typing import Any

import trio

from tunneld.engine.end import NO_HANDLER
from tunneld.engine.engine import FailureCallback, Limiter, Registration, Relay, RelayEnd
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import NotAllowedError, RemoteProtocolError
from tunneld.tls.connection import HANDSHAKE, TlsSocket
from tunneld.tunnel.server_side import Handshakes, TunnelContext
from tunneld.wire.lines import format_err

MAX_KEY_LINE = 128
"""Octets of a first line: a key, blanks around it and any line end."""
OK = b"OK\n"

Way = socket.socket | TlsSocket


async def read_key(connection: socket.socket, key: str, lobby: Handshakes, *, encrypted: bool) -> tuple[Way, bytes]:
    """The connection of somebody who has shown the key, and what it said ahead. Closed where this raises.

    Raises `NotAllowedError` for a wrong key, `RemoteProtocolError`, OSError.
    """
    way: Way = connection
    try:
        if encrypted:
            way = await _encrypt(connection, lobby)
        line, ahead = await (_tls_line(way) if isinstance(way, TlsSocket) else _line(way))
        if not hmac.compare_digest(line.strip(), key.encode()):
            raise NotAllowedError("wrong key")
    except NotAllowedError as error:
        await say(way, format_err(error.code, str(error)))
        close(way)
        raise
    except BaseException:
        way.close()
        raise
    return way, ahead


async def say(way: Way, line: bytes) -> None:
    """A line of ours. Raises OSError."""
    if isinstance(way, TlsSocket):
        await way.send_all(line)
    else:
        way.send(line)  # the empty buffer of a new connection takes it


def close(way: Way) -> None:
    """Close behind a last word."""
    if isinstance(way, TlsSocket):
        way.finish()
        way.flush_if_possible()
    way.close()


async def _encrypt(connection: socket.socket, lobby: Handshakes) -> TlsSocket:
    context = lobby.tls
    if context is None:
        raise RemoteProtocolError("this relay has no certificate any more")
    await trio.lowlevel.wait_readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if first and first != HANDSHAKE:  # somebody with nc: tell them
        connection.send(format_err("protocol", "this port speaks TLS; use openssl s_client"))
        connection.recv(4096)  # closing on unread octets is a reset, and a reset destroys what we said
        raise RemoteProtocolError("peer spoke plain text to a port for TLS")
    if not first:
        raise RemoteProtocolError("it left before it showed its key")
    tls = TlsSocket(connection, context, server_side=True)
    await tls.shake_hands()
    return tls


async def _tls_line(tls: TlsSocket) -> tuple[bytes, bytes]:
    """The first line, and what came behind it."""
    heard = b""
    while (end := heard.find(b"\n")) < 0:
        if len(heard) >= MAX_KEY_LINE:
            raise NotAllowedError("wrong key")
        if not (more := await tls.receive(MAX_KEY_LINE - len(heard))):
            raise RemoteProtocolError("it left before it showed its key")
        heard += more
    return heard[:end], heard[end + 1 :]


async def _line(connection: socket.socket) -> tuple[bytes, bytes]:
    """The first line; what comes behind it stays in the kernel."""
    heard = b""
    while not heard.endswith(b"\n"):
        if len(heard) >= MAX_KEY_LINE:
            raise NotAllowedError("wrong key")
        await trio.lowlevel.wait_readable(connection)
        seen = connection.recv(MAX_KEY_LINE - len(heard), socket.MSG_PEEK)
        if not seen:
            raise RemoteProtocolError("it left before it showed its key")
        if not heard and seen.startswith(HANDSHAKE):
            raise RemoteProtocolError("peer spoke TLS to a port for plain text")
        heard += connection.recv(seen.find(b"\n") + 1 or len(seen))
    return heard, b""


class TlsServerConnection:
    """A connection in TLS that the hidden server made, for one visitor. See `ServerConnection`."""

    __slots__ = ("_duct", "peer")

    def __init__(self, duct: TlsEnd, peer: Any) -> None:
        self._duct = duct
        self.peer = peer

    def watch(self, left: Callable[[], None], failed: FailureCallback) -> Registration:
        """Call `left` when the hidden server leaves without having said anything."""
        return _ParkedWatch(self._duct, left, failed)

    def set_originator(self, visitor: Any | None) -> None:
        """TLS has no word for it."""

    def send(self, data: bytes) -> None:
        """See `ServerConnection.send`."""
        self._duct.send(data)

    def join(
        self,
        visitor: socket.socket,
        *,
        linger: float,
        on_end: Callable[[Relay, RelayEnd], None],
        throttle: Limiter | None = None,
    ) -> Relay:
        """See `ServerConnection.join`."""
        return self._duct.join(visitor, linger=linger, on_end=on_end, throttle=throttle)

    def close(self) -> None:
        """Close it with a goodbye."""
        self._duct.close()


class _ParkedWatch:
    """The user of a duct that is parked: it takes nothing, and sees whether the peer leaves."""

    def __init__(self, duct: TlsEnd, left: Callable[[], None], failed: FailureCallback) -> None:
        self._duct = duct
        self._left = left
        self.on_internal_error = failed
        if duct.closed or (duct.eof_received and not duct.buffered):
            duct.pump.call_after_batch(self._leave)
        duct.handler = self

    def release(self) -> None:
        """See `Registration.release`."""
        self._duct.handler = NO_HANDLER

    def on_data(self, _data: memoryview) -> int:
        return 0

    def on_writable(self) -> None:
        """Nothing is said here."""

    def on_eof(self) -> None:
        self._left()

    def on_reset(self, _error: OSError) -> None:
        self._left()

    def _leave(self) -> None:
        try:
            self._left()
        except Exception as error:
            self.on_internal_error(error)


def serve(tls: TlsSocket, ahead: bytes, host: TunnelContext, peer: Any) -> TlsServerConnection:
    """Hand it to the engine. Raises OSError."""
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # where there is a lobby, there is a pump

    assert isinstance(host.engine, Pump)
    duct = TlsEnd(host.engine, tls)
    duct.unread(ahead)
    duct.start()
    return TlsServerConnection(duct, peer)
