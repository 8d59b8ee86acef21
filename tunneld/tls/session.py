"""TLS in memory: bytes of the peer in, bytes for the peer out. What carries them is up to the caller: a socket
(`connection`), or any other end of a relay.
"""

from __future__ import annotations

import errno
import ssl
from contextlib import suppress
from weakref import WeakSet

_REQUIRES_CLOSE_NOTIFY = WeakSet[ssl.SSLContext]()


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
        if context not in _REQUIRES_CLOSE_NOTIFY:
            require_close_notify(context)
            _REQUIRES_CLOSE_NOTIFY.add(context)  # it takes long to look at its options each time
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

    @property
    def protocol(self) -> str:
        """The protocol that both ends offered by ALPN, after the handshake; empty if there is none."""
        return self._tls.selected_alpn_protocol() or ""

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
            raise as_os_error(error) from None
        return filled

    def write(self, data: bytes | memoryview) -> None:
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


def require_close_notify(context: ssl.SSLContext) -> None:
    """Make `context` reject an end of file without close_notify, which any machine on the path can forge. Python from
    3.11.4 does so by default, older ones with OpenSSL 3 do not. Harmless when repeated.
    """
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # older OpenSSL does not have the option


def is_truncation(error: BaseException | None) -> bool:
    """Whether `error` says that the stream ended without close_notify. (Python before 3.11.3 has no class for it.)"""
    return isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


def as_os_error(error: ssl.SSLError) -> OSError:
    """What callers get for an error of OpenSSL."""
    if is_truncation(error):
        return ConnectionResetError(errno.ECONNRESET, "connection ended without a TLS close_notify")
    return error
