"""TLS on a non-blocking socket: no task of its own, and each direction can end while the other goes on.

`ssl.SSLSocket` cannot do the latter. Its `unwrap` sends a close_notify and then reads for the peer's; if application
data of the peer is in the kernel by then, OpenSSL reports an error and the connection is lost. So OpenSSL gets two
memory buffers instead of the descriptor, and the incoming one is empty while it sends the close_notify.

    kernel ── recv ──► incoming ── OpenSSL ──► plaintext       OpenSSL's own messages (key updates, alerts)
    plaintext ── OpenSSL ──► outgoing ──► unsent ── send ──► kernel           leave by the same way

An end of file without a close_notify is no end of the stream, since any machine on the path can forge one. It is
reported as a broken connection.
"""

from __future__ import annotations

import socket
import ssl
from typing import Final

import trio

from tunneld.tls.session import TlsSession, as_os_error

CONTROL_PROTOCOL, CARRIER_PROTOCOL = "tunneld", "tunneld-webmux"
"""ALPN of agents' connections (RFC 7301): on the HTTPS port of a relay they are told from visitors by it."""
HANDSHAKE: Final = b"\x16"
"""The first byte of every TLS connection (RFC 8446 §5.1, ContentType handshake)."""
READ_SIZE: Final = 65536
"""Bytes that the coroutines read from the kernel at a time: four records."""
SEND_AT_ONCE: Final = 16384
"""Bytes that are not copied to be sent together with others: as many as a record of TLS has."""
NO_DATA: Final = memoryview(b"")
NOT_YET, EXPIRED = 9, 10
"""OpenSSL's verify codes X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""
PEER_CLOSED: Final = "the peer closed the connection"
"""The reason given for a connection that ended without any other."""


class TlsSocket(TlsSession):
    """One end of a TLS connection over a socket. It owns the socket; `close` closes both.

    `shake_hands`, `receive`, `send_all` and `send_eof` are coroutines for a task. The other methods never block; an
    event loop calls them when the socket is readable or writable. Do not mix the two while a coroutine is running.

    If the two ends of the connection have agreed on it, what they carry can go on without this TLS, because it is
    encrypted already: each direction does so behind its close_notify (`leave`, `follow`).
    """

    __slots__ = ("_unsent", "connection", "receives_clear", "sends_clear")

    takes_pipes = False
    """Every byte is encrypted in this process."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        protocol: str = "",
    ) -> None:
        """`connection` is connected and non-blocking. Sends nothing before `shake_hands`. `session` is as for
        `TlsSession`. A client asks for `protocol` by ALPN, if it is given.
        """
        if protocol:
            context.set_alpn_protocols([protocol])  # OpenSSL copies it for the connection that is made next
        super().__init__(context, server_side=server_side, server_hostname=server_hostname, session=session)
        self.connection = connection
        self.sends_clear = False  # what is written from now on is not encrypted
        self.receives_clear = False  # the same of what is received
        self._unsent = NO_DATA

    # Coroutines

    async def shake_hands(self) -> None:
        """Do the handshake. Raises OSError (`ssl.SSLError` is one), and whatever the context's own check raises."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._drain()
                await self._fill()
            except OSError:
                self.flush_if_possible()  # OpenSSL has an alert for the peer
                raise
            else:
                await self._drain()
                return

    async def receive(self, max_bytes: int) -> bytes:
        """Return 1 to `max_bytes` bytes, or none at the end of the stream. Raises OSError."""
        while not self.ended:
            if data := self._read(max_bytes):
                return data
            if not self.ended:
                await self._fill()
        return b""

    async def send_all(self, data: bytes) -> None:
        """Send `data`; returns when the kernel has it. Raises OSError."""
        self._tls.write(data)
        await self._drain()

    async def send_eof(self) -> None:
        """Send close_notify; returns when the kernel has it. Raises OSError."""
        self.finish()
        await self._drain()

    async def _fill(self) -> None:
        while True:
            try:
                self.feed(self.connection.recv(READ_SIZE))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.connection)
            else:
                return

    async def _drain(self) -> None:
        while not self.flush():
            await trio.lowlevel.wait_writable(self.connection)

    def _read(self, max_bytes: int) -> bytes:
        if self._decrypted:
            data, self._decrypted = self._decrypted[:max_bytes], self._decrypted[max_bytes:]
            return data
        try:
            data = self._tls.read(max_bytes)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            raise as_os_error(error) from None
        self.ended = not data
        return data

    # For an event loop

    def receive_into(self, raw: memoryview, plain: memoryview) -> tuple[int, int]:
        """Read once from the kernel, at most `len(raw)` bytes, and decrypt all complete records into `plain`, which
        must be larger than `raw` by a record. Returns the number of bytes read and the number of bytes in `plain`.

        Raises `BlockingIOError`, or OSError if the connection is broken.
        """
        if self.receives_clear:
            count = self.connection.recv_into(plain, len(raw))
            self.ended = not count
            return count, count
        count = self.connection.recv_into(raw)
        self.feed(raw[:count])
        return count, self.decrypt(plain)

    def leave(self) -> None:
        """Append a close_notify to the pending output; what is written behind it is not encrypted. Harmless when
        repeated.
        """
        if not self.sends_clear:
            self.finish()
            self.sends_clear = True

    def follow(self) -> bytes:
        """After the peer's close_notify (`ended`): what it sends behind that is not encrypted. Returns what has arrived
        already.
        """
        self.ended, self.receives_clear = False, True
        return self._incoming.read()

    def write(self, data: bytes | memoryview) -> None:
        """See `TlsSession.write`. Without TLS, much goes to the kernel at once, as far as it takes that."""
        if not self.sends_clear:
            super().write(data)
            return
        if len(data) >= SEND_AT_ONCE and not self.pending_output:
            try:
                sent = self._send(data)
            except OSError:
                sent = 0  # `flush` finds out
            with memoryview(data) as view:
                data = bytes(view[sent:])
        if data:
            self._outgoing.write(data)

    def finish(self) -> None:
        """See `TlsSession.finish`. After `leave`, TCP's own end of file follows."""
        if not self.sends_clear:
            super().finish()

    @property
    def pending_output(self) -> int:
        """Encrypted bytes that the kernel does not have yet."""
        return len(self._unsent) + self._outgoing.pending

    def flush(self) -> bool:
        """Write pending output to the kernel; returns whether that was all of it. Raises OSError if the connection is
        broken.
        """
        try:
            while self._unsent or self._outgoing.pending:
                data = self._unsent or self._outgoing.read()
                self._unsent = NO_DATA if len(data) == (sent := self._send(data)) else memoryview(data)[sent:]
                if self._unsent and not sent:
                    return False
        except OSError:
            self._unsent = NO_DATA
            raise
        return True

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self.connection.send(data)
        except BlockingIOError:
            return 0

    def flush_if_possible(self) -> None:
        """Flush a connection that is being given up: errors are ignored."""
        try:
            self.flush()
        except OSError:
            return

    def close(self) -> None:
        """Close the socket, without a close_notify."""
        self.connection.close()


async def shake_hands(
    connection: socket.socket,
    context: ssl.SSLContext,
    *,
    server_hostname: str | None = None,
    server_side: bool = False,
    protocol: str = "",
    session: ssl.SSLSession | None = None,
) -> TlsSocket:
    """Do a TLS handshake on a connected non-blocking socket, which the result owns; an event loop can serve it then. A
    client resumes `session`, if there is one.

    Raises OSError (`ssl.SSLError` is one). The connection is closed on errors and on cancellation.
    """
    try:
        tls = TlsSocket(
            connection,
            context,
            server_side=server_side,
            server_hostname=server_hostname,
            protocol=protocol,
            session=session,
        )
        await tls.shake_hands()
    except BaseException:
        connection.close()
        raise
    return tls
