"""TLS over another end: for a visitor on a channel, whose TLS ends here and not at the relay; and for the other end of
a private tunnel, which is the client.

    the end below ──► on_data ──► decrypt ──► the handler, at once      nothing more is taken while bytes are buffered
    handler ──► write ──► encrypt ──► the end below                     no capacity until that has taken all of it

First comes the handshake; the handler is set when it is done. As in `tls_end`, an end of file is close_notify followed
by that of the end below, and an end without close_notify is a broken connection.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable
from typing import Final

from tunneld.engine.end import BufferedEnd
from tunneld.engine.failures import TcpSocket
from tunneld.engine.tls_end import TlsEnd
from tunneld.tls.connection import PEER_CLOSED
from tunneld.tls.session import TlsSession

MAX_RECORD: Final = 1 << 14
"""Plaintext bytes of one record (RFC 8446 §5.1): what OpenSSL may hold beside the bytes that it was just given."""
SCRATCH: Final = 8 * MAX_RECORD
"""Bytes into which an end decrypts at a time: what comes from below at once, and a record."""
_scratch: Final[list[bytearray]] = []
"""One such buffer that no end is using: what is in it is valid only during the call of a handler."""


class TlsOverEnd(BufferedEnd):
    """TLS over the end `below`, which it owns, and whose handler it is."""

    __slots__ = ("_below", "_finishing", "_handler_waits", "_is_ready", "_is_server", "_on_done", "_stalled", "_tls",
                 "_unsent", "deadline")  # fmt: skip

    def __init__(
        self,
        below: BufferedEnd,
        context: ssl.SSLContext,
        on_done: Callable[[TlsOverEnd, OSError | None], None],
        *,
        server_side: bool = True,
    ) -> None:
        """`on_done` is called once: after the handshake, or with the error if it fails, and then this end is closed."""
        super().__init__(below.engine)
        self._below = below
        self._is_server = server_side
        self._tls = TlsSession(context, server_side=server_side)
        self._on_done = on_done
        self._is_ready = False  # the handshake is done
        self._unsent = bytearray()  # encrypted, and not taken by the end below
        self._handler_waits = False  # `send_capacity` was 0: `on_writable` is due
        self._stalled = False  # the end below offers bytes again once the buffered ones are consumed
        self._finishing = False  # the end below gets an end of file behind what is unsent
        self.deadline = 0.0
        below.handler = self

    def start(self, received: bytes, timeout: float) -> None:
        """Begin the handshake. `received` was taken from the end below already; `timeout` is in seconds."""
        self.deadline = self.engine.now() + timeout
        self.engine.timers.watch(self)
        if received:
            self.on_data(memoryview(received))
        elif not self._is_server:
            self.on_data(memoryview(b""))  # a client speaks first
        if not self.closed:
            self._below.deliver_buffered()

    @property
    def protocol(self) -> str:
        """See `TlsSession.protocol`."""
        return self._tls.protocol

    @property
    def peer_certificate(self) -> bytes | None:
        """See `TlsSession.peer_certificate`."""
        return self._tls.peer_certificate

    def leave_tls_below(self) -> None:
        """The end below need not encrypt what this one has encrypted, if it is a TLS connection: see `tls_end`."""
        if isinstance(self._below, TlsEnd):
            self._below.leave_tls()

    # Called by the handler

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`: one buffer, once the end below has taken the one before."""
        if self.closed or self.eof_sent or self.write_failure is not None:
            return 0
        if self._unsent:
            self._handler_waits = True
            return 0
        return self.engine.buffer_size

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        self._tls.write(data)
        self._flush()

    def send(self, data: bytes) -> None:
        """See `BufferedEnd.send`."""
        if self.closed:
            raise ConnectionResetError(errno.ECONNRESET, PEER_CLOSED)
        self.write(memoryview(data))

    def finish(self) -> None:
        """See `End.finish`."""
        if not (self.eof_sent or self.closed):
            self.eof_sent = self._finishing = True
            self._tls.finish()
            self._flush()

    def consume(self, count: int) -> None:
        """See `BufferedEnd.consume`."""
        super().consume(count)
        self._release_if_finished()

    def reset(self, reason: str) -> None:
        """See `End.reset`."""
        if not self.closed:
            self._over()
            self._below.reset(reason)

    def close(self, reason: str = "not needed") -> None:
        """See `End.close`."""
        if self.closed:
            return
        if self._is_ready and not self.eof_sent:
            self._tls.finish()
            self._flush()
        lost = bool(self._unsent)
        self._over()
        (self._below.reset if lost else self._below.close)(reason)

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`."""
        return 0 if self.closed else len(self._unsent) + self._below.unacknowledged()

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """See `End.tcp_connection`."""
        return None if self.closed else self._below.tcp_connection

    # The handler of the end below

    def on_data(self, data: memoryview) -> int:
        """Decrypt, unless earlier bytes still wait for the handler."""
        if self.buffered:
            self._stalled = True
            return 0
        if data:  # else a client begins
            self._tls.feed(data)
        try:
            if self._is_ready or self._shake_hands():
                self._read(len(data))
        except OSError as error:
            self._flush()  # OpenSSL has an alert for the peer
            self._break(error)
        else:
            self._flush()
        return len(data)

    def on_writable(self) -> None:
        """The end below takes bytes again."""
        self._flush()
        if self._handler_waits and not self._unsent and not self.closed:
            self._handler_waits = False
            self.notify_writable()

    def on_eof(self) -> None:
        """The end below has ended: without a close_notify, which any machine on the path can forge, that is a break."""
        if not self.eof_received:
            self._break(ConnectionResetError(errno.ECONNRESET, "connection ended without a TLS close_notify"))

    def on_write_failed(self, error: OSError) -> None:
        """The peer takes no more bytes."""
        self._unsent.clear()
        if self._is_ready and not self.eof_received:
            self.notify_write_failed(error)
        else:
            self._break(error)

    def on_reset(self, error: OSError) -> None:
        """The end below is gone."""
        self._break(error)

    def on_internal_error(self, error: Exception) -> None:
        """A method of this handler raised: a bug."""
        handler = self.handler
        self._over()
        handler.on_internal_error(error)

    def on_deadline(self) -> None:
        """The handshake takes too long."""
        self._break(TimeoutError(errno.ETIMEDOUT, "the TLS handshake takes too long"))

    # Internal

    def _consumed(self, count: int) -> None:
        if self._stalled and not self.buffered:
            self._stalled = False
            self.engine.call_after_batch(self._resume)  # not inside of what the handler is doing

    def _resume(self) -> None:
        if not self.closed and not self.buffered:
            self._below.deliver_buffered()

    def _shake_hands(self) -> bool:
        """Go on with the handshake; returns whether it is done. Raises OSError."""
        if not self._tls.advance_handshake():
            return False
        self._flush()
        if self.closed:
            return False
        self._is_ready = True
        self.engine.timers.forget(self)
        self._on_done(self, None)
        return not self.closed

    def _read(self, count: int) -> None:
        """Decrypt what is complete of the last `count` bytes and those before. Raises OSError."""
        scratch = _scratch.pop() if _scratch else bytearray(SCRATCH)
        if count + MAX_RECORD > len(scratch):
            scratch = bytearray(count + MAX_RECORD)
        with memoryview(scratch) as plain:
            filled = self._tls.decrypt(plain)
            if filled:
                self.feed(plain[:filled])
        if len(scratch) == SCRATCH and not _scratch:
            _scratch.append(scratch)
        if self._tls.ended and not self.closed:
            self.feed_eof()
            self._release_if_finished()

    def _flush(self) -> None:
        """Pass on what is encrypted, as far as the end below takes it."""
        if self.closed or self._below.closed or self.write_failure is not None:
            return
        unsent = self._unsent
        capacity = 0 if unsent else self._below.send_capacity()  # first: it may call `on_writable`, and so this method
        output = self._tls.take_output()
        if capacity and output and not unsent:  # most of it without a copy
            unsent += output[capacity:]
            with memoryview(output) as whole:
                self._below.write(whole[: min(capacity, len(whole))])
        else:
            unsent += output
        while unsent:
            capacity = self._below.send_capacity()
            if not capacity:
                return
            with memoryview(unsent) as view:
                part = bytes(view[: min(capacity, len(view))])
            del unsent[: len(part)]
            self._below.write(memoryview(part))
        if self._finishing:
            self._finishing = False
            self._below.finish()
            self._release_if_finished()

    def _release_if_finished(self) -> None:
        """Both directions have ended, and everything is delivered: the end below closes by itself."""
        if self.eof_sent and self.eof_received and not (self.buffered or self._unsent or self.closed):
            self._over()
            self._below.linger = self.linger
            self._below.release()

    def _break(self, error: OSError) -> None:
        """The connection is broken: close it, and notify the handler, or the caller of a handshake."""
        if self.closed:
            return
        if self._is_ready:
            self._notify_broken(self.write_failure or error)
            self._below.reset(str(error))
            return
        self._over()
        if isinstance(error, ssl.SSLError):
            self._below.release()  # behind the alert for the peer
        else:
            self._below.reset(str(error))
        self._on_done(self, error)

    def _over(self) -> None:
        self.engine.timers.forget(self)
        self._discard()
