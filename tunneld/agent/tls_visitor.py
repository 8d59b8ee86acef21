"""Visitors whose TLS ends in the agent: with a certificate of its own (`https`), or between two agents (`private`)."""

from __future__ import annotations

import socket

import trio

from tunneld.agent.source import VisitorConnection
from tunneld.engine.end import BufferedEnd, End
from tunneld.engine.end_stream import EndStream
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd


def buffered_end(engine: Pump, visitor: VisitorConnection) -> BufferedEnd:
    """The end of a visitor that is to be read here, whatever carries it; the caller owns it. Raises OSError where it is
    broken, and closed.
    """
    end = visitor.end
    if isinstance(end, BufferedEnd):
        return end
    assert isinstance(end, socket.socket)
    plain = TlsEnd(engine, PlainTransport(end))
    try:
        plain.start()
    except OSError:
        plain.reset("not served")
        raise
    return plain


class TlsVisitor:
    """A visitor whose TLS ends here, or a stream in such TLS. Implements `VisitorConnection`."""

    __slots__ = ("_end",)

    def __init__(self, end: BufferedEnd) -> None:
        self._end = end

    @property
    def end(self) -> End:
        """See `VisitorConnection.end`."""
        return self._end

    def stream(self) -> trio.abc.HalfCloseableStream:
        """See `VisitorConnection.stream`."""
        return EndStream(self._end)

    def close(self, reason: str) -> None:
        """See `VisitorConnection.close`."""
        self._end.reset(reason)
