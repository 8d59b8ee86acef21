"""What handles a visitor's end when its connection is no longer one for requests: after an upgrade, and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tunneld.engine.end import BufferedEnd
from tunneld.engine.limits import UNLIMITED
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import reason_of
from tunneld.sites.access_log import AccessRecord
from tunneld.sites.deadline import Deadline
from tunneld.sites.stream import RequestStream

if TYPE_CHECKING:
    from tunneld.engine.pipes import Pipe

CLOSING_SECONDS = 5.0
"""Seconds for a visitor to read the last response and close. Closing at once would reset the connection while bytes of
the visitor are unread, and the reset could overtake the response (RFC 9112 §9.6).
"""


class Owner(Protocol):
    """The connection whose end this is."""

    def on_over(self, reason: str) -> None:
        """The end is closed, or about to be."""


class UpgradedConnection:
    """After 101 Switching Protocols: bytes both ways, between the visitor's end and the stream."""

    def __init__(self, end: TlsEnd, stream: RequestStream, owner: Owner, record: AccessRecord | None = None) -> None:
        self._end = end
        self._record = record  # for the access log
        self._stream = stream
        self._owner = owner

    def start(self, data: bytes) -> None:
        """Take over as the handler of the end. `data` was read from the visitor behind the head of its request."""
        self._end.handler = self
        self._end.pipe_taker = self
        self._stream.upgrade(self)
        if data:
            self._feed(memoryview(data))
        self.on_requests_taken()

    # The handler of the visitor's end

    def on_data(self, data: memoryview) -> int:
        """Pass bytes to the hidden server."""
        if self._stream.buffered:
            return 0
        self._feed(data)
        return len(data)

    def pipe_capacity(self) -> int:
        """See `PipeTaker.pipe_capacity`."""
        return UNLIMITED if self._stream.takes_pipe else 0

    def take_pipe(self, pipe: Pipe) -> bool:
        """See `PipeTaker.take_pipe`."""
        if self._record is not None:
            self._record.up += pipe.count
        return self._stream.feed_pipe(pipe)

    def on_writable(self) -> None:
        """The visitor takes bytes again."""
        self._stream.notify_writable()

    def on_eof(self) -> None:
        """The visitor sends no more."""
        self._stream.leave()

    def on_write_failed(self, error: OSError) -> None:
        """The visitor reads no more, but may have sent something: the relay behind the stream knows what to do."""
        self._stream.notify_write_failed(error)

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self._stream.abandon(reason_of(error))
        self._owner.on_over(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug in here."""
        self._stream.abandon("internal error")
        self._owner.on_over("internal error")

    # Called by the stream

    def on_requests_taken(self) -> None:
        """The hidden server has taken what was buffered."""
        end = self._end
        if end.buffered and not self._stream.buffered:
            count = len(end.buffered)
            self._feed(memoryview(bytes(end.buffered)))
            end.consume(count)
        end.read_on()

    def on_response_data(self, data: memoryview) -> None:
        """Pass bytes to the visitor."""
        if self._record is not None:
            self._record.down += len(data)
        self._end.write(data)

    def on_response_spliced(self, count: int) -> None:
        """See `UpgradedReceiver.on_response_spliced`."""
        if self._record is not None:
            self._record.down += count

    def _feed(self, data: memoryview) -> None:
        if self._record is not None:
            self._record.up += len(data)
        self._stream.feed_requests(data)

    def on_finished(self) -> None:
        """The hidden server has sent its last byte."""
        self._end.finish()

    def on_stream_over(self, reason: str) -> None:
        """The relay has cut the stream, or both directions are finished (no reason)."""
        self._owner.on_over(reason)
        if reason:
            self._end.reset(reason)
        else:
            self._end.release()


class ClosingConnection:
    """After the last response: discard what the visitor still sends until it closes. `CLOSING_SECONDS` are counted from
    the moment when it has read the response, or since it has last read a part of it.
    """

    def __init__(self, end: BufferedEnd, owner: Owner) -> None:
        self._deadline = Deadline(end.engine, self._on_deadline)
        self._end = end
        self._owner = owner
        self._unread = 0  # bytes that the visitor had not acknowledged when it was last looked at
        self._patience = 0.0  # seconds that it may take to acknowledge some of them

    def start(self, *, visitor_ended: bool) -> None:
        """Take over as the handler of the end, and send an end of file."""
        end = self._end
        end.handler = self
        try:
            end.finish()
        except OSError as error:
            self.on_reset(error)
            return
        if visitor_ended or end.closed:
            self.on_eof()
            return
        self._patience = end.linger
        self._deadline.set(CLOSING_SECONDS)
        end.consume(len(end.buffered))

    def on_data(self, data: memoryview) -> int:
        """Discard it."""
        return len(data)

    def on_writable(self) -> None:
        """Nothing is left to write."""

    def on_eof(self) -> None:
        """The visitor has closed, or at least sends no more: the end closes by itself when it has sent everything."""
        self._over("")
        if not self._end.closed:
            self._end.release()

    def on_write_failed(self, error: OSError) -> None:
        """The visitor does not read the last response."""
        self._over(reason_of(error))
        self._end.reset(reason_of(error))

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self._over(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug in here."""
        self._over("internal error")

    def _on_deadline(self) -> None:
        """The visitor takes long: still reading, perhaps."""
        unread = self._end.unacknowledged()
        if unread and unread != self._unread:
            self._unread, self._patience = unread, self._end.linger
        self._patience -= CLOSING_SECONDS
        if unread and self._patience > 0:
            self._deadline.set(CLOSING_SECONDS)
            return
        self._over("")
        self._end.reset("the visitor did not close")

    def _over(self, reason: str) -> None:
        self._deadline.close()
        self._owner.on_over(reason)
