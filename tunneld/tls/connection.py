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

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

CONTROL_PROTOCOL, CARRIER_PROTOCOL = "tunneld", "tunneld-webmux"
"""ALPN of agents' connections (RFC 7301): on the HTTPS port of a relay they are told from visitors by it."""
HANDSHAKE = b"\x16"
"""The first byte of every TLS connection (RFC 8446 §5.1, ContentType handshake)."""
READ_SIZE = 65536
"""Bytes that the coroutines read from the kernel at a time: four records."""
NO_DATA = memoryview(b"")
NOT_YET, EXPIRED = 9, 10
"""OpenSSL's verify codes X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""
PEER_CLOSED = "the peer closed the connection"
"""The reason given for a connection that ended without any other."""


class TlsSession:
    """One end of a TLS connection in memory: bytes in, bytes out. It never blocks."""

    __slots__ = ("_decrypted", "_incoming", "_outgoing", "_tls", "ended")

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """`session` resumes an earlier connection to the same peer with the same context, see the method of that
        name.
        """
        require_close_notify(context)
        self.ended = False  # the peer's close_notify and everything before it was read
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._decrypted = b""  # decrypted by `finish`, and not read yet
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
            session=session,
        )

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate in DER, if the context requested and verified one."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def session_reused(self) -> bool:
        """Whether the handshake resumed an earlier session."""
        return bool(self._tls.session_reused)

    def session(self, former: ssl.SSLSession | None) -> ssl.SSLSession | None:
        """The session with which a client's next connection can be resumed: `former` if this connection resumed it,
        else the ticket that the peer sent after the handshake (RFC 8446 §2.2); so ask once something was received.

        A resumed handshake signs and verifies nothing, which saves either end nine tenths of its cost. Taking a new
        session each time would cost more than it saves, since Python copies it. A peer that was restarted does not know
        the session and does a full handshake.
        """
        return former if self._tls.session_reused else self._tls.session

    def advance_handshake(self) -> bool:
        """Do as much of the handshake as the bytes so far permit; returns whether it is done. What is to be sent, also
        after an error, is in `take_output`. Raises OSError (`ssl.SSLError` is one).
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def take_output(self) -> bytes:
        """Take what is to be sent to the peer."""
        return self._outgoing.read()

    @property
    def has_buffered_input(self) -> bool:
        """Whether bytes were read from the kernel and not yet returned; epoll does not report them. This is possible
        right after the handshake.
        """
        return bool(self._decrypted) or self._incoming.pending > 0 or self._tls.pending() > 0

    def feed(self, data: bytes | memoryview) -> None:
        """Add bytes read from the kernel, for `decrypt`; empty `data` is the end of file."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def decrypt(self, plain: memoryview) -> int:
        """Decrypt complete records into `plain`; returns the number of bytes. Raises OSError."""
        incoming, tls, filled, size = self._incoming, self._tls, 0, len(plain)
        if self._decrypted:
            filled = min(len(self._decrypted), size)
            plain[:filled], self._decrypted = self._decrypted[:filled], self._decrypted[filled:]
        try:
            while filled < size and (incoming.pending or incoming.eof or tls.pending()):
                count = int(tls.read(size - filled, plain[filled:] if filled else plain))
                if not count:
                    self.ended = True
                    break
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise _as_os_error(error) from None
        return filled

    def write(self, data: memoryview) -> None:
        """Encrypt `data` into the pending output. Raises OSError if the connection is broken."""
        if data:
            self._tls.write(data)

    def finish(self) -> None:
        """Append a close_notify to the pending output. The peer may still send."""
        unread = self._incoming.read()
        while self._tls.pending():
            self._decrypted += self._tls.read(self._tls.pending())
        with suppress(ssl.SSLError):  # mostly WANT_READ: the peer has not sent its own yet
            self._tls.unwrap()
        if unread:
            self._incoming.write(unread)


class TlsSocket(TlsSession):
    """One end of a TLS connection over a socket. It owns the socket; `close` closes both.

    `shake_hands`, `receive`, `send_all` and `send_eof` are coroutines for a task. The other methods never block; an
    event loop calls them when the socket is readable or writable. Do not mix the two while a coroutine is running.
    """

    __slots__ = ("_unsent", "connection")

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
            raise _as_os_error(error) from None
        self.ended = not data
        return data

    # For an event loop

    def receive_into(self, raw: memoryview, plain: memoryview) -> tuple[int, int]:
        """Read once from the kernel, at most `len(raw)` bytes, and decrypt all complete records into `plain`, which
        must be larger than `raw` by a record. Returns the number of bytes read and the number of bytes in `plain`.

        Raises `BlockingIOError`, or OSError if the connection is broken.
        """
        count = self.connection.recv_into(raw)
        self.feed(raw[:count])
        return count, self.decrypt(plain)

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
) -> TlsSocket:
    """Do a TLS handshake on a connected non-blocking socket, which the result owns; an event loop can serve it then.

    Raises OSError (`ssl.SSLError` is one). The connection is closed on errors and on cancellation.
    """
    try:
        tls = TlsSocket(
            connection, context, server_side=server_side, server_hostname=server_hostname, protocol=protocol
        )
        await tls.shake_hands()
    except BaseException:
        connection.close()
        raise
    return tls


def require_close_notify(context: ssl.SSLContext) -> None:
    """Make `context` reject an end of file without close_notify, which any machine on the path can forge. Python from
    3.11.4 does so by default, older ones with OpenSSL 3 do not. Harmless when repeated.
    """
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # older OpenSSL does not have the option


def is_truncation(error: BaseException | None) -> bool:
    """Whether `error` says that the stream ended without close_notify. (Python before 3.11.3 has no class for it.)"""
    return isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


def _as_os_error(error: ssl.SSLError) -> OSError:
    if is_truncation(error):
        return ConnectionResetError(errno.ECONNRESET, "connection ended without a TLS close_notify")
    return error


class TlsStream(trio.abc.HalfCloseableStream):
    """A `TlsSocket` after its handshake as a Trio stream, which owns it; for one reader and one writer at a time."""

    def __init__(self, tls: TlsSocket) -> None:
        self.socket = tls.connection
        self._tls = tls

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        with _trio_errors():
            await self._tls.send_all(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        with _trio_errors():
            await self._tls.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        await trio.lowlevel.checkpoint()
        with _trio_errors():
            return await self._tls.receive(max_bytes or READ_SIZE)

    async def aclose(self) -> None:
        """Close the connection. A close_notify is sent if the kernel accepts it at once."""
        if self.socket.fileno() != -1:
            self._tls.finish()
            self._tls.flush_if_possible()
            trio.lowlevel.notify_closing(self.socket)
            self._tls.close()
        await trio.lowlevel.checkpoint()


@contextmanager
def _trio_errors() -> Iterator[None]:
    """Raise the errors that Trio's streams raise."""
    try:
        yield
    except OSError as error:
        raise trio.BrokenResourceError(str(error)) from error
