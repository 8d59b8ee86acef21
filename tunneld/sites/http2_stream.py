"""One stream of an HTTP/2 connection: its request goes to a connection of HTTP/1.1, and the response comes back.

body of the visitor  ──►  within the window of the stream  ──►  socket pair     one task
DATA for the visitor ◄──  within its windows               ◄──  socket pair     another
"""

from __future__ import annotations

import select
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import h2.connection
import h2.errors
import h2.exceptions
import structlog
import trio

from tunneld.wire.http1 import HeadError, ResponseHead, find_head, parse_response
from tunneld.wire.http2 import Dechunker, response_headers

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

READ_BYTES = 16 * 1024
"""Bytes of a response read at a time: a frame."""


class Http2Stream:
    """A stream with a request."""

    def __init__(
        self,
        frames: h2.connection.H2Connection,
        flush: Callable[[], Awaitable[None]],
        number: int,
        pair: socket.socket,
        drop: Callable[[str], None],
        max_head: int,
        *,
        is_chunked: bool,
    ) -> None:
        """`flush` sends what `frames` has written. HTTP/1.1 is served at the other end of `pair`, and cut by `drop`.
        `is_chunked`: the request does not tell the length of its body.
        """
        self.scope = trio.CancelScope()  # of `run`
        self._method = b""
        self.trailers = b"0\r\n\r\n"
        self._frames = frames
        self._flush = flush
        self._number = number
        self._pair = trio.SocketStream(trio.socket.from_stdlib_socket(pair))
        self._drop = drop
        self._max_head = max_head
        self._is_chunked = is_chunked
        self._body = bytearray()  # received, and not passed on
        self._credit = 0  # bytes of flow control to give back for it
        self._ended = False  # the visitor has sent the whole request
        self._received = trio.Event()  # one of these has changed; each time a new one
        self._window = trio.Event()  # the visitor may take more; each time a new one
        self._data = bytearray()  # of the response, and not sent

    # Called by the connection

    def on_data(self, data: bytes, credit: int) -> None:
        """A part of the body, and how much of the windows it took."""
        self._body += data
        self._credit += credit
        self._note()

    def on_end(self) -> None:
        """The request is complete."""
        self._ended = True
        self._note()

    def on_window(self) -> None:
        """The visitor may take more."""
        self._window.set()

    def _note(self) -> None:
        received, self._received = self._received, trio.Event()
        received.set()

    async def run(self, head: bytes, *, has_body: bool) -> None:
        """Send the request that begins with `head`, and pass on its response. The stream is cut unless both sides have
        ended it.
        """
        self._method = head.partition(b" ")[0]
        code = h2.errors.ErrorCodes.INTERNAL_ERROR
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await self._pair.send_all(head)
                    if has_body:
                        nursery.start_soon(self._pass_body)
                    await self._pass_response()
                    code = h2.errors.ErrorCodes.NO_ERROR
                    nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, HeadError, h2.exceptions.ProtocolError) as errors:
            log.debug("http/2 stream failed", reason=str(errors.exceptions[0]))
        finally:
            if code:
                self._drop("the visitor cancelled the request, or its connection was lost")
            self._pair.socket.close()
            with suppress(h2.exceptions.ProtocolError):  # the visitor has cut it, or left
                self._give_back()
                if code or not self._ended:
                    self._frames.reset_stream(self._number, code)

    def _give_back(self) -> None:
        """Open the windows of the visitor by what was passed on."""
        credit, self._credit = self._credit, 0
        if credit:
            self._frames.acknowledge_received_data(credit, self._number)

    # The request

    async def _pass_body(self) -> None:
        try:
            while True:
                while not (self._body or self._credit or self._ended):
                    await self._received.wait()
                is_last, data = self._ended, bytes(self._body)
                self._body.clear()
                if data:
                    await self._pair.send_all(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
                if is_last:
                    if self._is_chunked:
                        await self._pair.send_all(self.trailers)
                    return
                self._give_back()
                await self._flush()
        except trio.BrokenResourceError:
            return  # the response came before the end of the request

    # The response

    async def _pass_response(self) -> None:
        head = await self._pass_heads()
        if head is None:
            return
        dechunker = Dechunker() if head.is_chunked else None
        left = None if head.until_close else head.body_length
        is_over = False
        while not is_over:
            data = bytes(self._data if left is None else self._data[:left])
            self._data.clear()
            if dechunker is not None:
                data = dechunker.feed(data)
                is_over = dechunker.is_over
            elif left is not None:
                left -= len(data)
                is_over = not left
            await self._send_body(data, is_last=is_over and (dechunker is None or not dechunker.trailers))
            if not is_over and not await self._read_more():
                if not head.until_close or _was_cut(self._pair.socket):
                    raise HeadError("response was cut")
                await self._send_body(b"", is_last=True)
                return
        if dechunker is not None and dechunker.trailers:
            self._frames.send_headers(self._number, dechunker.trailers, end_stream=True)
            await self._flush()

    async def _pass_heads(self) -> ResponseHead | None:
        """Send the head of the response, and what comes in front of it. None: that was all of it."""
        while True:
            head = await self._read_head()
            has_body = head.body_length != 0 or head.until_close
            is_last = not (has_body or head.is_interim)
            self._frames.send_headers(self._number, response_headers(head), end_stream=is_last)
            if is_last or not self._data:  # else the body goes with it
                await self._flush()
            if not head.is_interim:
                return head if has_body else None

    async def _read_head(self) -> ResponseHead:
        while not (size := find_head(self._data, self._max_head)):
            if not await self._read_more():
                raise HeadError("connection ended before its response")
        head = parse_response(bytes(self._data[:size]), self._method)
        del self._data[:size]
        return head

    async def _read_more(self) -> bool:
        """False: nothing more comes."""
        received = await self._pair.receive_some(READ_BYTES)
        self._data += received
        return bool(received)

    async def _send_body(self, data: bytes, *, is_last: bool) -> None:
        """Send DATA frames as the windows of the visitor allow; the last one ends the stream."""
        at = 0
        while at < len(data):
            window = self._frames.local_flow_control_window(self._number)
            size = min(window, self._frames.max_outbound_frame_size, len(data) - at)
            if size > 0:
                ends = is_last and at + size == len(data)
                self._frames.send_data(self._number, data[at : at + size], end_stream=ends)
                at += size
                await self._flush()
            else:
                self._window = trio.Event()
                await self._flush()
                await self._window.wait()
        if is_last and not data:
            self._frames.end_stream(self._number)
            await self._flush()


def _was_cut(connection: trio.socket.SocketType) -> bool:
    """Whether the other end of a pair, after an end of file, was closed rather than ended: a reset, on TCP."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))
