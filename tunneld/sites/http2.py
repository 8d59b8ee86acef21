"""A visitor's HTTP/2 connection: each stream is served as a connection of HTTP/1.1 with one request.

    TLS ──► h2 ──► stream ×N ──► socket pair ──► HttpConnection, as for any visitor

So every check and limit of requests holds here, too, and no other part of the relay knows HTTP/2. A socket pair costs
two descriptors and a copy through the kernel; in return, each stream has a buffer of its own that stops its sender, and
one that is stuck delays no other.

    Http2Connection.run
    ├─ wait                    closes a connection without streams
    ├─ receive                 frames of the visitor; stops while it does not read what it was sent
    └─ stream ×N               see http2_stream.py

What an attacker can do with frames alone is limited: streams at a time and in all, streams that it cancels, and frames
that carry nothing.
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import structlog
import trio

from tunneld.errors import RemoteProtocolError
from tunneld.policy.limits import HttpLimits
from tunneld.sites.http2_stream import Http2Stream
from tunneld.tls.connection import TlsSocket
from tunneld.wire.http1 import HeadError
from tunneld.wire.http2 import has_length, request_head, trailer_section

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")

MAX_STREAMS = 100
"""Streams at a time: what RFC 9113 recommends at least, and browsers use."""
MAX_CLOSED_STREAMS = 1000
"""Streams that `h2` remembers after their end, at about 100 bytes each, to tell late frames from wrong ones."""
MAX_CANCELLED = 100
"""Streams that a visitor may cancel before their response, beyond half of all: opening and cancelling them costs it
nothing (CVE-2023-44487). A person who stops loading a page cancels some tens.
"""
MAX_IDLE_FRAMES = 1000
"""Frames in a row that neither open a stream nor carry or request data."""
STREAM_WINDOW = 256 * 1024
"""Bytes of a body that a visitor may send ahead on a stream: 20 Mbit/s at 100 ms."""
CONNECTION_WINDOW = 512 * 1024
"""The same on all streams of a connection together: what one visitor makes the relay keep."""
PAIR_BUFFER = 32 * 1024
"""Bytes in each direction of a socket pair."""
READ_BYTES = 16 * 1024
"""Bytes of frames that are read at a time."""
VANISHED_SECONDS = 120
"""Seconds without an answer to what was sent until the kernel gives a visitor up. One that pauses a download closes the
window of the stream, and its machine still answers.
"""
TURN_BYTES = 512
"""Bytes after which other tasks run, if there were requests in them: some 30 of the smallest, a few milliseconds."""

_GOAWAY = struct.Struct(">BHBBLLL")
"""The frame (RFC 9113 §6.8): length in two parts, type, flags, stream 0, the last stream that is served, no error."""

_USEFUL = (h2.events.RequestReceived, h2.events.WindowUpdated, h2.events.StreamEnded, h2.events.TrailersReceived)


ServeCallback = Callable[[socket.socket], Callable[[str], None] | None]
"""Serves HTTP/1.1 on a socket, which it owns. Returns what cuts that connection, for a reason; None: there is no place
for it.
"""


class _FloodError(RemoteProtocolError):
    """The visitor sends too much of what costs the relay more than itself."""


class _Protocol(h2.connection.H2Connection):
    MAX_CLOSED_STREAMS = MAX_CLOSED_STREAMS


class Http2Connection:
    """See the description of this module. It owns the connection, whose handshake is done."""

    def __init__(self, tls: TlsSocket, serve: ServeCallback, limits: HttpLimits, on_over: Callable[[], None]) -> None:
        """`on_over` is called once the connection is closed."""
        self._tls = tls
        tls.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * VANISHED_SECONDS)
        self._serve = serve
        self._limits = limits
        self._on_over = on_over
        self._streams: dict[int, Http2Stream] = {}
        self._opened = self._cancelled = self._idle_frames = 0
        self._sending = trio.Lock()
        self._scope = trio.CancelScope()
        self._idle = trio.CancelScope()  # its deadline, while there is no stream
        self._opening = False  # a place for a stream is being sought
        self._retired = False
        self._goaway = b""  # to be sent: `h2` sends nothing behind one of its own
        self._nursery: trio.Nursery
        config = h2.config.H2Configuration(
            client_side=False, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=True
        )
        self._h2 = _Protocol(config)
        self._h2.local_settings = h2.settings.Settings(client=False, initial_values=self._settings())
        self._h2.decoder.max_header_list_size = limits.max_head

    def _settings(self) -> dict[h2.settings.SettingCodes, int]:
        codes = h2.settings.SettingCodes
        return {
            codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            codes.MAX_HEADER_LIST_SIZE: self._limits.max_head,
            codes.ENABLE_PUSH: 0,
        }

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return not self._streams and not self._opening

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.is_idle:
            self._end(h2.errors.ErrorCodes.NO_ERROR)

    def retire(self) -> None:
        """Take no more requests, and complete the ones under way (RFC 9113 §6.8): the visitor makes further ones on
        another connection.
        """
        if self.is_idle:
            self._end(h2.errors.ErrorCodes.NO_ERROR)
        elif not self._retired:
            self._retired = True
            self._goaway = _GOAWAY.pack(0, 8, 7, 0, 0, self._h2.highest_inbound_stream_id, 0)
            self._nursery.start_soon(self._flush)

    def drop(self, _reason: str) -> None:
        """Close the connection now."""
        self._end(h2.errors.ErrorCodes.NO_ERROR)

    async def run(self) -> None:
        """Serve the connection until it is over."""
        try:
            self._idle.deadline = trio.current_time() + self._limits.head_timeout
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    self._nursery.start_soon(self._wait)
                    self._h2.initiate_connection()
                    self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
                    await self._flush()
                    await self._receive()
                    self._nursery.cancel_scope.cancel()
        except* OSError as errors:
            log.debug("http/2 connection lost", reason=str(errors.exceptions[0]))
        finally:
            self._tls.finish()
            self._tls.flush_if_possible()
            self._tls.close()
            self._on_over()

    # The connection

    async def _wait(self) -> None:
        """Close a connection that is without a stream for too long."""
        with self._idle:
            await trio.sleep_forever()
        self._end(h2.errors.ErrorCodes.NO_ERROR)

    async def _receive(self) -> None:
        """Handle the frames of the visitor until it leaves, or breaks the rules."""
        try:
            while data := await self._tls.receive(READ_BYTES):
                for at in range(0, len(data), TURN_BYTES):
                    opened = self._opened
                    for event in self._h2.receive_data(data[at : at + TURN_BYTES]):
                        if isinstance(event, h2.events.ConnectionTerminated):
                            return
                        self._on_event(event)
                    if self._opened > opened:
                        await self._flush()
                        await trio.lowlevel.checkpoint()
                await self._flush()
                await trio.lowlevel.checkpoint()
        except (h2.exceptions.ProtocolError, RemoteProtocolError) as error:
            log.debug("http/2 connection closed", reason=str(error))
            is_flood = isinstance(error, _FloodError)
            self._end(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM if is_flood else h2.errors.ErrorCodes.PROTOCOL_ERROR)

    def _on_event(self, event: h2.events.Event) -> None:
        stream = self._streams.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, _USEFUL) or (isinstance(event, h2.events.DataReceived) and event.data):
            self._idle_frames = 0
        elif (idle := self._idle_frames + 1) > MAX_IDLE_FRAMES:
            raise _FloodError(f"the visitor sent {idle} frames that carry nothing")
        else:
            self._idle_frames = idle
        match event:
            case h2.events.RequestReceived():
                self._on_request(event)
            case h2.events.DataReceived():
                self._on_data(stream, event)
            case h2.events.TrailersReceived() if stream is not None:
                stream.trailers = trailer_section(event.headers or ())
            case h2.events.StreamEnded() if stream is not None:
                stream.on_end()
            case h2.events.StreamReset() if stream is not None:
                self._on_reset(stream)
            case h2.events.WindowUpdated() | h2.events.RemoteSettingsChanged():
                for each in [stream] if stream is not None else self._streams.values():
                    each.on_window()

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        number, headers = event.stream_id, event.headers
        assert number is not None
        assert headers is not None
        self._opened += 1
        if self._retired:
            self._h2.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        has_body = event.stream_ended is None
        try:
            head = request_head(headers, has_body=has_body)
        except HeadError as error:
            log.debug("http/2 request refused", reason=str(error))
            self._h2.reset_stream(number, h2.errors.ErrorCodes.PROTOCOL_ERROR)
            return
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAIR_BUFFER)
        self._opening = True
        drop = self._serve(theirs)
        self._opening = False
        if drop is None:
            ours.close()
            theirs.close()
            self._h2.reset_stream(number, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        max_head = 2 * self._limits.max_head
        stream = Http2Stream(self._h2, self._send, number, ours, drop, max_head, is_chunked=not has_length(headers))
        self._streams[number] = stream
        self._idle.deadline = math.inf
        self._nursery.start_soon(self._run_stream, stream, number, head, has_body)

    def _on_data(self, stream: Http2Stream | None, event: h2.events.DataReceived) -> None:
        credit = event.flow_controlled_length or 0
        if stream is not None:
            stream.on_data(event.data or b"", credit)
        else:  # it has ended for us
            self._h2.acknowledge_received_data(credit, event.stream_id or 0)

    def _on_reset(self, stream: Http2Stream) -> None:
        self._cancelled += 1
        if self._cancelled > MAX_CANCELLED + self._opened // 2:
            raise _FloodError(f"the visitor cancelled {self._cancelled} of {self._opened} streams")
        stream.scope.cancel()

    async def _flush(self) -> None:
        """Send what `h2` has to say. While the visitor does not read, this waits, and so does all that sends."""
        data = b""
        if self._sending.locked():
            await self._sending.acquire()
        elif data := self._take_output():
            self._sending.acquire_nowait()
        else:
            return
        try:
            while data or (data := self._take_output()):
                await self._tls.send_all(data)
                data = b""
        finally:
            self._sending.release()

    def _take_output(self) -> bytes:
        """The frames that are to be sent."""
        goaway, self._goaway = self._goaway, b""
        return goaway + self._h2.data_to_send()

    async def _send(self) -> None:
        """The same for a stream, which has sent or received something."""
        self._idle_frames = 0
        await self._flush()

    def _end(self, code: h2.errors.ErrorCodes) -> None:
        """Tell the visitor that the connection is over, if it reads that at once, and close it."""
        with suppress(h2.exceptions.ProtocolError):
            self._h2.close_connection(code)
        if not self._sending.locked():
            self._tls.write(self._take_output())
        self._scope.cancel()

    async def _run_stream(self, stream: Http2Stream, number: int, head: bytes, has_body: bool) -> None:
        try:
            await stream.run(head, has_body=has_body)
        finally:
            del self._streams[number]
            if not self._streams:
                self._idle.deadline = trio.current_time() + self._limits.keep_alive_timeout
        await self._flush()
        if self._retired and self.is_idle:
            self._end(h2.errors.ErrorCodes.NO_ERROR)
