"""A session of one visitor at the host of a private tunnel: each of its streams is a visitor of the local server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunneld.agent.private_carrier import RETIRED, STREAM_PROTOCOL, PrivateCarrier
from tunneld.agent.source import VisitorCallback
from tunneld.agent.tls_visitor import TlsVisitor
from tunneld.engine.pump import Pump
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.mux.channel import Channel


@dataclass(frozen=True, slots=True)
class SessionEvents:
    """What a session calls."""

    on_visitor: VisitorCallback
    """A stream, with the PROXY header of the session."""
    refusal: Callable[[], str]
    """Why the peer gets no further stream; empty: it may have one."""
    on_failed: Callable[[bytes, str], None]
    """A stream was refused, or the session broke."""
    on_over: Callable[[PrivateSession], None]
    """The session has ended."""


class PrivateSession(PrivateCarrier):
    """The session of an admitted peer."""

    def __init__(
        self, engine: Pump, tls: TlsOverEnd, header: bytes, events: SessionEvents, *, keep_header: bool
    ) -> None:
        """`header` is the PROXY header of the connection from the relay; `keep_header`: put it in front of the bytes of
        each stream. Raises OSError where `tls` is closed already.
        """
        self._header = header
        self._events = events
        self._keep_header = keep_header
        self._retired = False
        super().__init__(engine, tls, initiator=False, leave_tls=True)

    def retire(self) -> None:
        """Take no more streams, and end with the last one."""
        if not self._retired:
            self._retired = True
            self.carrier.define_endpoint(RETIRED)
            self._end_if_unused()

    def close(self, reason: str) -> None:
        """End it with all of its streams."""
        self.carrier.close(reason)

    # The carrier's events

    def on_opened(self, channel: Channel, protocol: int) -> None:
        """The visitor opened a stream."""
        if protocol != STREAM_PROTOCOL:
            channel.reset("no such protocol")
            return
        refusal = "the tunnel takes no more connections" if self._retired else self._events.refusal()
        if refusal:
            channel.reset(refusal.partition(";")[0])
            self._events.on_failed(self._header, refusal)
            return
        channel.accept()
        if self._keep_header:
            channel.unread(self._header)
        self._events.on_visitor(TlsVisitor(channel), self._header)

    def on_over(self, channel: Channel) -> None:
        """A stream has ended."""
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        """A retired session closes once the visitor has read everything of the last stream."""
        if self._retired and not self.carrier.channels and not self.carrier.over:
            self.carrier.request_ack()

    def on_pong(self) -> None:
        """The visitor has read everything that was sent."""
        super().on_pong()
        if self._retired and not self.carrier.channels:
            self.carrier.close("no more connections are taken")

    def on_closed(self, reason: str) -> None:
        """The session is over."""
        super().on_closed(reason)
        if self.is_broken:
            self._events.on_failed(self._header, f"the session was broken on its way: {reason}")
        self._events.on_over(self)
