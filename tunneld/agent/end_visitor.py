"""Visitors that come on ducts: who it is comes first, in a PROXY header; then it is handed over."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import trio

from tunneld.agent.pool import Parked, Pool
from tunneld.engine.end import NO_HANDLER, End
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import FailureCallback, Relay, RelayEnd, Side
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.errors import RemoteProtocolError, reason_of
from tunneld.tls.connection import TlsSocket
from tunneld.wire.proxy_protocol import COMMON_V2, missing_v2


@dataclass(frozen=True, slots=True)
class VisitorSink:
    """Whom a `EndVisitor` tells; one for all of a supply, where that can be."""

    on_visitor: Callable[[EndVisitor, bytes], None]
    """A visitor came: the way to it, from now on the callee's, and its PROXY header."""
    on_failure: FailureCallback
    keep_header: bool
    """Whether the header is left in front of what the visitor says."""
    on_lost: Callable[[str], None] = lambda _reason: None
    """There was no header, and why."""


class EndVisitor:
    """A duct by which a visitor comes. First this is its user, and hears who the visitor is; then it is handed over as
    the way to that visitor, see `Way`.
    """

    __slots__ = ("_duct", "_head", "_owner")

    def __init__(self, duct: End, owner: VisitorSink) -> None:
        self._duct = duct
        self._owner = owner
        self._head = b""

    # The way to the visitor

    def join(self, server: socket.socket, *, linger: float, on_end: Callable[[Relay, RelayEnd], None]) -> Relay:
        """The local server's socket is the server's side."""
        return self._duct.join(server, linger=linger, on_end=on_end, side=Side.SERVER)

    def stream(self) -> trio.abc.HalfCloseableStream:
        """The duct as a stream."""
        return EndStream(self._duct)

    def close(self, reason: str) -> None:
        """The relay hears why, where there is a way to say it."""
        self._duct.reset(reason)

    # Until then, the duct's user

    def on_data(self, data: memoryview) -> int:
        """Take the header, and not an octet more."""
        head, taken = self._head, 0
        try:
            while missing := missing_v2(head) if head else COMMON_V2:
                part = bytes(data[taken : taken + missing])
                if not part:
                    self._head = head
                    return taken
                head += part
                taken += len(part)
        except RemoteProtocolError as error:
            self._give_up(str(error))
            return taken
        self._duct.handler = NO_HANDLER
        if self._owner.keep_header:
            self._duct.unread(head)
        self._owner.on_visitor(self, head)
        return taken

    def on_eof(self) -> None:
        """The end instead of a header."""
        self._give_up("connection closed by the relay")

    def on_writable(self) -> None:
        """We say nothing."""

    def on_reset(self, error: OSError) -> None:
        """The visitor, or the relay, is gone."""
        self._owner.on_lost(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug."""
        self._owner.on_failure(error)

    def _give_up(self, reason: str) -> None:
        self._duct.reset("no PROXY header")
        self._owner.on_lost(reason)


class TlsParked:
    """A connection in TLS that the relay has parked. See `Parked`."""

    def __init__(self, pool: Pool, tls: TlsSocket, ahead: bytes, handle: Parked) -> None:
        """`ahead` was read already; `handle` is what the pool knows it by: named once, and then let go of, or both
        would wait for the garbage collector, which does not know how much OpenSSL holds. Raises OSError.
        """
        self._pool = pool
        self._handle: Parked | None = handle
        self._duct = TlsEnd(cast(Pump, pool.engine), tls)
        self._duct.unread(ahead)
        try:
            self._duct.start()
        except OSError:
            tls.close()
            raise
        self._duct.handler = EndVisitor(
            self._duct, VisitorSink(self._came, pool.owner.on_failure, bool(pool.flags), self._lost)
        )
        self._duct.deliver_buffered()

    def look(self) -> None:
        """The pump looks by itself."""

    def close(self) -> None:
        """See `Parked`."""
        self._handle = None
        self._duct.close()

    def _came(self, way: EndVisitor, header: bytes) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._pool.came(handle, way, header)

    def _lost(self, reason: str) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._pool.lost(handle, reason)
