"""TLS on a non-blocking socket, without a task and without losing a direction: one that ends leaves the other open.

`ssl.SSLSocket` cannot do that. Its `unwrap` says goodbye and then looks for the peer's goodbye, and where data of the
peer stands in the kernel by then, OpenSSL takes that for an error and the connection is lost. So OpenSSL gets two
buffers instead of the descriptor, and while it says goodbye the incoming one is empty: nothing to stumble over.

    kernel ── recv ──► incoming ── OpenSSL ──► octets          and what OpenSSL has to say meanwhile (key updates)
    octets ── OpenSSL ──► outgoing ──► unsent ── send ──► kernel                  goes out by the same way

An end of file without the peer's goodbye (close_notify) is no end: whoever is on the way can make one. It is told as a
broken connection.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

HANDSHAKE = b"\x16"
"""The first octet of every TLS connection (RFC 8446 §5.1, ContentType handshake)."""
CHUNK = 65536
"""Octets read from the kernel at a time by those who wait; four records."""
EMPTY = memoryview(b"")
NOT_YET, EXPIRED = 9, 10
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL."""
PEER_CLOSED = "it hung up"
"""How a connection ended of which the other end said nothing more."""


class TlsSocket:
    """One end of a TLS connection; it owns the socket below."""

    __slots__ = ("_ahead", "_incoming", "_outgoing", "_tls", "_unsent", "connection", "ended")

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """`connection` is connected and does not block. Nothing is said before `shake_hands`. `session` is from the
        method of that name, of an earlier connection to the same peer with the same context.
        """
        require_close_notify(context)
        self.connection = connection
        self.ended = False  # the peer has said goodbye, and everything before it was read
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._unsent = EMPTY
        self._ahead = b""  # deciphered as we said goodbye, and not read yet
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
            session=session,
        )

    @property
    def peer_certificate(self) -> bytes | None:
        """In DER, where the context asked for one and has verified it."""
        return self._tls.getpeercert(binary_form=True)

    def session(self, former: ssl.SSLSession | None) -> ssl.SSLSession | None:
        """What a client's next connection may begin with: `former`, if this one could, or else what the peer has given
        us behind the handshake (RFC 8446 §2.2), so ask once something was heard. Then nobody signs and nobody verifies,
        which is a tenth of what such a connection costs either end. Taking a new one each time would cost more than it
        saves, since Python copies it. A peer that was started again does not know it, and shakes hands as ever.
        """
        return former if self._tls.session_reused else self._tls.session

    # For whoever waits

    async def shake_hands(self) -> None:
        """The handshake. Raises OSError (`ssl.SSLError` among them), and what the context's own check raises."""
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

    async def receive(self, most: int) -> bytes:
        """Some octets, at most so many; none at the end. Raises OSError."""
        while not self.ended:
            if data := self._take(most):
                return data
            if not self.ended:
                await self._fill()
        return b""

    async def send_all(self, data: bytes) -> None:
        """Say it, and wait until the kernel has it. Raises OSError."""
        self._tls.write(data)
        await self._drain()

    async def send_end(self) -> None:
        """Say goodbye, and wait until the kernel has it. Raises OSError."""
        self.finish()
        await self._drain()

    async def _fill(self) -> None:
        while True:
            try:
                self.feed(self.connection.recv(CHUNK))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.connection)
            else:
                return

    async def _drain(self) -> None:
        while not self.flush():
            await trio.lowlevel.wait_writable(self.connection)

    def _take(self, most: int) -> bytes:
        if self._ahead:
            data, self._ahead = self._ahead[:most], self._ahead[most:]
            return data
        try:
            data = self._tls.read(most)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            raise _told(error) from None
        self.ended = not data
        return data

    # For whoever does not

    def receive_into(self, raw: memoryview, plain: memoryview) -> tuple[int, int]:
        """Read once from the kernel, as much as `raw` takes, and decipher what is whole: how many octets were read, and
        how many are in `plain`, which must have room for a record more than `raw`.

        Raises `BlockingIOError`, or OSError where the connection is broken.
        """
        count = self.connection.recv_into(raw)
        self.feed(raw[:count])
        return count, self.decipher(plain)

    @property
    def has_buffered_input(self) -> bool:
        """Whether more was read than given out: epoll will not tell of that. So it may be right after the handshake."""
        return bool(self._ahead) or self._incoming.pending > 0 or self._tls.pending() > 0

    def feed(self, data: bytes | memoryview) -> None:
        """What was read from the kernel, to be deciphered; nothing is the end of it."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def decipher(self, plain: memoryview) -> int:
        """Decipher what was read and is whole; octets in `plain`. Raises OSError."""
        incoming, tls, filled, size = self._incoming, self._tls, 0, len(plain)
        if self._ahead:
            filled = min(len(self._ahead), size)
            plain[:filled], self._ahead = self._ahead[:filled], self._ahead[filled:]
        try:
            while filled < size and (incoming.pending or incoming.eof or tls.pending()):
                octets = int(tls.read(size - filled, plain[filled:] if filled else plain))
                if not octets:
                    self.ended = True
                    break
                filled += octets
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        except ssl.SSLError as error:
            raise _told(error) from None
        return filled

    def write(self, data: memoryview) -> None:
        """Encipher; `flush` sends it. Raises OSError where that cannot be any more."""
        if data:
            self._tls.write(data)

    def finish(self) -> None:
        """Say goodbye; `flush` sends it. The peer may go on."""
        came = self._incoming.read()
        while self._tls.pending():
            self._ahead += self._tls.read(self._tls.pending())
        with suppress(ssl.SSLError):  # WANT_READ, mostly: the peer has not said its own yet
            self._tls.unwrap()
        if came:
            self._incoming.write(came)

    @property
    def pending_output(self) -> int:
        """Octets to flush."""
        return len(self._unsent) + self._outgoing.pending

    def flush(self) -> bool:
        """Send what the kernel takes; whether that was all. Raises OSError where the connection is broken."""
        try:
            while self._unsent or self._outgoing.pending:
                data = self._unsent or self._outgoing.read()
                self._unsent = EMPTY if len(data) == (sent := self._send(data)) else memoryview(data)[sent:]
                if self._unsent and not sent:
                    return False
        except OSError:
            self._unsent = EMPTY
            raise
        return True

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self.connection.send(data)
        except BlockingIOError:
            return 0

    def flush_if_possible(self) -> None:
        """The same, for a connection that is given up."""
        try:
            self.flush()
        except OSError:
            return

    def close(self) -> None:
        """Close the socket, without a goodbye."""
        self.connection.close()


async def shake_hands(
    connection: socket.socket, context: ssl.SSLContext, *, server_hostname: str | None = None, server_side: bool = False
) -> TlsSocket:
    """TLS on a connected non-blocking socket, for an engine that serves it without a task.

    Raises OSError (`ssl.SSLError` among them); the connection is closed then, and where this is cancelled.
    """
    try:
        tls = TlsSocket(connection, context, server_side=server_side, server_hostname=server_hostname)
        await tls.shake_hands()
    except BaseException:
        connection.close()
        raise
    return tls


def require_close_notify(context: ssl.SSLContext) -> None:
    """Have `context` take no end of the connection, which anybody on the way can make, for the peer's goodbye: with
    OpenSSL 3 that is Python's default before 3.11.4. Harmless when repeated.
    """
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # older OpenSSL has no such word


def is_truncation(error: BaseException | None) -> bool:
    """Whether this says that the connection ended without a goodbye. (Before 3.11.3 Python has no class for it.)"""
    return isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


def _told(error: ssl.SSLError) -> OSError:
    if is_truncation(error):
        return ConnectionResetError(errno.ECONNRESET, "connection ended without a TLS goodbye (close_notify)")
    return error


class TlsStream(trio.abc.HalfCloseableStream):
    """A `TlsSocket` after its handshake as a Trio stream, for one reader and one writer at a time."""

    def __init__(self, tls: TlsSocket) -> None:
        self.socket = tls.connection
        self._tls = tls

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        with _translated():
            await self._tls.send_all(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream`."""
        with _translated():
            await self._tls.send_end()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream`."""
        await trio.lowlevel.checkpoint()
        with _translated():
            return await self._tls.receive(max_bytes or CHUNK)

    async def aclose(self) -> None:
        """Close it, with a goodbye as far as the kernel takes one now."""
        if self.socket.fileno() != -1:
            self._tls.finish()
            self._tls.flush_if_possible()
            trio.lowlevel.notify_closing(self.socket)
            self._tls.close()
        await trio.lowlevel.checkpoint()


@contextmanager
def _translated() -> Iterator[None]:
    """Errors as Trio's streams have them."""
    try:
        yield
    except OSError as error:
        raise trio.BrokenResourceError(str(error)) from error
