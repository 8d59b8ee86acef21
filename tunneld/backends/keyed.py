"""The handshake of tcp tunnels with a key: `openTunnel tcp secure=yes`, or `secure=key` without encryption.

    the hidden server           the relay
    KEY line end          ──►                   in TLS, with the certificate of the control port
                          ◄──   OK line end     the connection is parked; or ERR code reason, and it is closed
    bytes                 ◄─►   bytes           from here on, the visitor's; its PROXY header first, if requested

Bytes that the hidden server sends early, after the key's line, are for the visitor. Keys are compared in constant time.
"""

from __future__ import annotations

import hmac
import math
import socket
from collections.abc import Callable

import trio

from tunneld.auth.handshakes import FailedProofError, NothingReceivedError
from tunneld.engine.end import NO_HANDLER
from tunneld.engine.engine import FailureCallback, Registration
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import NotAllowedError, RemoteProtocolError
from tunneld.net import liveness
from tunneld.net.endpoint import Peer
from tunneld.tls.connection import HANDSHAKE, TlsSocket
from tunneld.tunnel.server_side import Handshakes, TunnelContext
from tunneld.wire.lines import format_err

MAX_KEY_LINE = 128
"""Bytes of the first line: a key, blanks around it and any line end."""
OK = b"OK\n"
CLOSED_BEFORE_KEY = "the connection closed before a key was sent"

KeyedTransport = socket.socket | TlsSocket


async def read_key(
    connection: socket.socket, key: str, handshakes: Handshakes, *, encrypted: bool
) -> tuple[KeyedTransport, bytes]:
    """Do the TLS handshake, if `encrypted`, and read the key. Returns the connection, which the caller owns, and the
    bytes that came with the key's line.

    Raises `NotAllowedError` for a wrong key, `RemoteProtocolError` or OSError; the connection is closed then.
    """
    transport: KeyedTransport = connection
    try:
        if encrypted:
            transport = await _encrypt(connection, handshakes)
        if isinstance(transport, TlsSocket):
            line, early = await _read_tls_line(transport)
        else:
            line, early = await _read_line(transport)
        if not hmac.compare_digest(line.strip(), key.encode()):
            raise FailedProofError("wrong key", line.decode(errors="replace"))
    except NotAllowedError as error:
        await send_line(transport, format_err(error.code, str(error)))
        close(transport)
        raise
    except BaseException:
        transport.close()
        raise
    return transport, early


async def send_line(transport: KeyedTransport, line: bytes) -> None:
    """Send one line of the handshake. Raises OSError."""
    if isinstance(transport, TlsSocket):
        await transport.send_all(line)
    else:
        transport.send(line)  # it fits the empty send buffer of a new connection


def close(transport: KeyedTransport) -> None:
    """Close the connection, in TLS with a close_notify if the kernel takes it now."""
    if isinstance(transport, TlsSocket):
        transport.finish()
        transport.flush_if_possible()
    transport.close()


async def _encrypt(connection: socket.socket, handshakes: Handshakes) -> TlsSocket:
    """Do the TLS handshake. A peer that starts in plain text gets an error line in plain text. Raises as `read_key`."""
    context = handshakes.tls
    if context is None:
        raise RemoteProtocolError("this relay no longer has a certificate")
    await trio.lowlevel.wait_readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if first and first != HANDSHAKE:  # a person with nc, perhaps
        connection.send(format_err("protocol", "this port speaks TLS; use openssl s_client"))
        connection.recv(4096)  # closing with unread bytes resets the connection, which would destroy our error line
        raise RemoteProtocolError("the peer sent plain text to a TLS port")
    if not first:
        raise NothingReceivedError(CLOSED_BEFORE_KEY)
    tls = TlsSocket(connection, context, server_side=True)
    await tls.shake_hands()
    return tls


async def _read_tls_line(tls: TlsSocket) -> tuple[bytes, bytes]:
    """The first line without its line feed, and the bytes that were decrypted with it."""
    received = b""
    while (end := received.find(b"\n")) < 0:
        if len(received) >= MAX_KEY_LINE:
            raise NotAllowedError("wrong key")
        if not (more := await tls.receive(MAX_KEY_LINE - len(received))):
            raise RemoteProtocolError(CLOSED_BEFORE_KEY)
        received += more
    return received[:end], received[end + 1 :]


async def _read_line(connection: socket.socket) -> tuple[bytes, bytes]:
    """The first line, and nothing else: the bytes after it stay in the kernel."""
    received = b""
    while not received.endswith(b"\n"):
        if len(received) >= MAX_KEY_LINE:
            raise NotAllowedError("wrong key")
        await trio.lowlevel.wait_readable(connection)
        peeked = connection.recv(MAX_KEY_LINE - len(received), socket.MSG_PEEK)
        if not peeked:
            raise (RemoteProtocolError if received else NothingReceivedError)(CLOSED_BEFORE_KEY)
        if not received and peeked.startswith(HANDSHAKE):
            raise RemoteProtocolError("the peer started TLS on a plain-text port")
        received += connection.recv(peeked.find(b"\n") + 1 or len(peeked))
    return received, b""


class TlsServerConnection:
    """A TLS connection of the hidden server, for one visitor. Implements `ParkableConnection`."""

    __slots__ = ("_connection", "end", "peer")

    def __init__(self, end: TlsEnd, connection: socket.socket, peer: Peer) -> None:
        """`connection` carries the end."""
        self.end = end
        self._connection = connection
        self.peer = peer

    def heard_ago(self) -> float:
        """See `ParkableConnection.heard_ago`."""
        end = self.end
        has_ended = end.closed or (end.eof_received and not end.buffered)
        return math.inf if has_ended else liveness.heard_ago(self._connection)

    def probe(self) -> None:
        """See `ParkableConnection.probe`."""
        liveness.probe(self._connection)

    def set_keepalive(self, seconds: float) -> None:
        """See `ParkableConnection.set_keepalive`."""
        liveness.set_keepalive(self._connection, seconds)

    def watch(self, on_closed: Callable[[], None], on_failure: FailureCallback) -> Registration:
        """See `ParkableConnection.watch`."""
        return _ParkedWatch(self.end, on_closed, on_failure)

    def set_originator(self, visitor: Peer | None) -> None:
        """Nothing: TLS cannot carry the visitor's address."""

    def send(self, data: bytes) -> None:
        """See `ServerConnection.send`."""
        self.end.send(data)

    def close(self) -> None:
        """Close the connection with a close_notify."""
        self.end.close()


class _ParkedWatch:
    """The handler of a parked TLS end: it takes no data and reports when the peer closes."""

    def __init__(self, end: TlsEnd, on_closed: Callable[[], None], on_failure: FailureCallback) -> None:
        self._end = end
        self._on_closed = on_closed
        self.on_internal_error = on_failure
        if end.closed or (end.eof_received and not end.buffered):
            end.engine.call_after_batch(self._report_closed)
        end.handler = self

    def release(self) -> None:
        """See `Registration.release`."""
        self._end.handler = NO_HANDLER

    def on_data(self, _data: memoryview) -> int:
        return 0

    def on_writable(self) -> None:
        """Nothing: this handler sends nothing."""

    def on_eof(self) -> None:
        self._on_closed()

    def on_write_failed(self, _error: OSError) -> None:
        self._on_closed()

    def on_reset(self, _error: OSError) -> None:
        self._on_closed()

    def _report_closed(self) -> None:
        try:
            self._on_closed()
        except Exception as error:
            self.on_internal_error(error)


def serve(tls: TlsSocket, early: bytes, context: TunnelContext, peer: Peer) -> TlsServerConnection:
    """Hand the connection to the engine, with the bytes that it sent `early` in its receive buffer. Raises OSError."""
    from tunneld.engine.pump import Pump  # noqa: PLC0415  # a relay that does handshakes has a pump

    assert isinstance(context.engine, Pump)
    end = TlsEnd(context.engine, tls)
    end.may_leave = context.private
    end.unread(early)
    end.start()
    return TlsServerConnection(end, tls.connection, peer)
