"""Visitors on a `BufferedEnd`: a channel of a carrier, or a TLS connection. Each starts with a PROXY header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import trio

from tunneld.agent.pool import Parked, Pool
from tunneld.engine.end import NO_HANDLER, BufferedEnd, End
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import FailureCallback
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.tls.connection import TlsSocket
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2


@dataclass(frozen=True, slots=True)
class VisitorSink:
    """What an `EndVisitor` calls. Carriers share one."""

    on_visitor: Callable[[EndVisitor, bytes], None]
    """A visitor arrived, with its PROXY header; the callee owns it from now on."""
    on_failure: FailureCallback
    keep_header: bool
    """Whether the header is left in front of the visitor's bytes."""
    on_lost: Callable[[str], None] = lambda _reason: None
    """The end was lost before its PROXY header arrived, and why."""


class EndVisitor:
    """A visitor on an `End`. First it is the end's handler and reads the PROXY header; then it is handed over and is
    a `VisitorConnection`.
    """

    __slots__ = ("_end", "_header", "_sink")

    def __init__(self, end: BufferedEnd, sink: VisitorSink) -> None:
        self._end = end
        self._sink = sink
        self._header = b""

    # As a VisitorConnection

    @property
    def end(self) -> End:
        """See `VisitorConnection.end`."""
        return self._end

    def stream(self) -> trio.abc.HalfCloseableStream:
        """Return the visitor as a Trio stream."""
        return EndStream(self._end)

    def close(self, reason: str) -> None:
        """Reset the end; on a carrier the reason is sent to the relay."""
        self._end.reset(reason)

    # As the end's handler, until the header is complete

    def on_data(self, data: memoryview) -> int:
        """Take the bytes of the header and not one more; returns how many were taken."""
        header, taken = self._header, 0
        try:
            while missing := missing_v2(header) if header else COMMON_V2:
                part = bytes(data[taken : taken + missing])
                if not part:
                    self._header = header
                    return taken
                header += part
                taken += len(part)
        except RemoteProtocolError as error:
            self._give_up(str(error))
            return taken
        self._end.handler = NO_HANDLER
        if self._sink.keep_header:
            self._end.unread(header)
        try:
            self._sink.on_visitor(self, header)
        except Exception as error:  # a bug, of which the end would tell its handler, which is none any more
            self._end.reset("internal error")
            self._sink.on_failure(error)
        return taken

    def on_eof(self) -> None:
        """The relay closed its direction before the header."""
        self._give_up("closed by the relay")

    def on_writable(self) -> None:
        """Nothing waits to be sent."""

    def on_write_failed(self, error: OSError) -> None:
        """Nothing waits to be sent; what the relay has sent may still arrive."""

    def on_reset(self, error: OSError) -> None:
        """The connection broke before the header."""
        self._sink.on_lost(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A callback raised: a bug."""
        self._sink.on_failure(error)

    def _give_up(self, reason: str) -> None:
        self._end.reset("no PROXY header")
        self._sink.on_lost(reason)


class TlsParked:
    """A TLS connection that is parked at the relay. Implements `Parked`."""

    def __init__(self, pool: Pool, tls: TlsSocket, received: bytes, handle: Parked) -> None:
        """`received` was read from the connection already. `handle` is the pool's key for it. It is dropped after its
        only use: a reference cycle would have to wait for the garbage collector, which does not see how much memory
        OpenSSL holds. Raises `OSError`.
        """
        self._pool = pool
        self._handle: Parked | None = handle
        self._end = TlsEnd(cast(Pump, pool.engine), tls)
        self._end.unread(received)
        try:
            self._end.start()
        except OSError:
            tls.close()
            raise
        sink = VisitorSink(self._on_visitor, pool.events.on_failure, pool.keep_header, self._on_lost)
        self._end.handler = EndVisitor(self._end, sink)
        self._end.deliver_buffered()

    def check(self) -> None:
        """Do nothing: the pump delivers what arrives."""

    def close(self) -> None:
        """See `Parked.close`."""
        self._handle = None
        self._end.close()

    def _on_visitor(self, visitor: EndVisitor, header: bytes) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._pool.on_visitor(handle, visitor, header)

    def _on_lost(self, reason: str) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._pool.on_lost(handle, f"connection to the relay lost: {reason}")
