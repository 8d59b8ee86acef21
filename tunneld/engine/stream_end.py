"""Any Trio stream as an end, served by two tasks of the engine.

    StreamEnd
    ├─ receive     receive_some ──► the handler       waits while bytes are buffered
    └─ send        write ──► send_all; finish ──► send_eof        no capacity until one write is sent

So each direction holds one chunk. Between streams nothing is spliced and every chunk costs two task switches; it is for
what the pump cannot serve: a stream of another library, or a system without epoll (`portable`).
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final

import trio
from trio.abc import HalfCloseableStream

from tunneld.engine.end import BufferedEnd
from tunneld.engine.failures import TcpSocket, reset_on_close, unacknowledged
from tunneld.engine.scheduler import Scheduler
from tunneld.net.sockets import pending_error

STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError)


class StreamEnd(BufferedEnd):
    """An end over a Trio stream, which it owns. A socket below may still be connecting."""

    __slots__ = ("_outgoing", "_readable", "_scope", "_socket", "_stream", "_writable")

    def __init__(self, engine: Scheduler, stream: HalfCloseableStream) -> None:
        """Raises RuntimeError unless the engine is running."""
        super().__init__(engine)
        self._stream = stream
        self._socket = _socket_below(stream)
        self._outgoing = b""  # written and not sent
        self._scope = trio.CancelScope()
        self._readable = trio.Event()  # nothing is buffered: read on
        self._writable = trio.Event()  # something is to be sent
        engine.start_task(self._run)

    # Called by the handler

    def send_capacity(self) -> int:
        """See `BufferedEnd.send_capacity`: one buffer, once the one before is sent."""
        if self._outgoing or self.eof_sent or self.closed or self.write_failure is not None:
            return 0
        return self.engine.buffer_size

    def write(self, data: memoryview) -> None:
        """See `BufferedEnd.write`."""
        self.send(bytes(data))

    def send(self, data: bytes) -> None:
        """See `BufferedEnd.send`."""
        if self.closed:
            raise ConnectionResetError(errno.ECONNRESET, "the stream was closed")
        self._outgoing += data
        self._writable.set()

    def finish(self) -> None:
        """See `End.finish`."""
        if not self.closed:
            self.eof_sent = True
            self._writable.set()

    def release(self) -> None:
        """See `End.release`. What was written is sent within `linger` seconds."""
        super().release()
        self._scope.deadline = trio.current_time() + self.linger

    def reset(self, reason: str) -> None:
        """See `End.reset`. Only a stream over a socket can be reset; others are closed."""
        if self.closed:
            return
        if self._socket is not None:
            reset_on_close(self._socket)
        self._close_now()

    def close(self, reason: str = "not needed") -> None:
        """See `End.close`."""
        if self._outgoing:
            self.reset(reason)
        elif not self.closed:
            self._close_now()

    def unacknowledged(self) -> int:
        """See `End.unacknowledged`."""
        below = 0 if self._socket is None or self.closed else unacknowledged(self._socket)
        return len(self._outgoing) + below

    @property
    def tcp_connection(self) -> TcpSocket | None:
        """See `End.tcp_connection`."""
        return None if self.closed else self._socket

    # Internal

    def _consumed(self, count: int) -> None:
        if not self.buffered:
            self._readable.set()

    def _close_now(self) -> None:
        self._outgoing = b""
        self._discard()
        self._scope.cancel()
        if isinstance(self._stream, trio.SocketStream):
            self._stream.socket.close()

    def _break(self, error: OSError) -> None:
        """The stream is broken, and everything that came before is delivered or buffered."""
        if not self.closed:
            self._notify_broken(self.write_failure or error)
            self._outgoing = b""
            self._scope.cancel()

    async def _run(self) -> None:
        """Serve the stream until both directions have ended or it is closed."""
        try:
            with self._scope:
                if isinstance(self._stream, trio.SocketStream):
                    await wait_connected(self._stream.socket)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    nursery.start_soon(self._send)
                with suppress(*STREAM_ERRORS):
                    await self._stream.aclose()
                self.closed = True
        except OSError as error:
            self._break(error)
        finally:
            self.reset("the engine stopped")  # unless it is closed already
            with trio.CancelScope(shield=True), suppress(*STREAM_ERRORS):
                await trio.aclose_forcefully(self._stream)

    async def _receive(self) -> None:
        """Deliver what arrives, as far as the handler takes it, up to the end of file."""
        try:
            while True:
                while self.buffered:
                    self._readable = trio.Event()
                    await self._readable.wait()
                data = await self._stream.receive_some(self.engine.buffer_size)
                if self.closed:
                    return
                if not data:
                    for _ in range(2):  # Trio has a checkpoint between a failing send and its exception
                        await trio.lowlevel.checkpoint()
                    self.feed_eof()
                    return
                with memoryview(data) as view:
                    self.feed(view)
        except STREAM_ERRORS as error:
            self._break(os_error(error))
        except Exception as error:
            self._fail(error)

    async def _send(self) -> None:
        """Send what is written, and an end of file behind it."""
        try:
            while self._outgoing or not self.eof_sent:
                if not self._outgoing:
                    self._writable = trio.Event()
                    await self._writable.wait()
                    continue
                data = self._outgoing
                await self._stream.send_all(data)
                self._outgoing = self._outgoing[len(data) :]
                if not self._outgoing:
                    self.notify_writable()
            await self._stream.send_eof()
        except STREAM_ERRORS as error:
            self._outgoing = b""
            if not self.closed:
                self.notify_write_failed(os_error(error))
        except Exception as error:
            self._fail(error)


def _socket_below(stream: HalfCloseableStream) -> trio.socket.SocketType | None:
    """The socket that carries a stream and nothing else, through any layers such as `trio.SSLStream`."""
    below: object = stream
    while below is not None and not isinstance(below, trio.SocketStream):
        below = getattr(below, "transport_stream", None)
    return below.socket if below is not None else None


async def wait_connected(connection: trio.socket.SocketType) -> None:
    """Wait for a socket that may still be connecting. Raises OSError if it cannot connect."""
    try:
        connection.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
    else:
        return
    await trio.lowlevel.wait_writable(connection)
    failure = pending_error(connection)
    if failure is not None:
        raise failure


def os_error(error: BaseException) -> OSError:
    """The OSError in the chain of causes of one of Trio's exceptions."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    return cause or ConnectionResetError(errno.ECONNRESET, str(error) or "the stream broke")
