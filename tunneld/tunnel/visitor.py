"""A visitor: one connection of a client, on its way from an ingress to the hidden server."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.engine import Engine, FailureCallback, Registration
from tunneld.engine.failures import reset_on_close
from tunneld.net.accept import local_address
from tunneld.net.address import HostName
from tunneld.net.endpoint import Peer
from tunneld.net.sockets import pending_error
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.sites.stream import RequestStream


class VisitorAnswers(Protocol):
    """Tells a visitor that asked for the tunnel what becomes of it. All of it is short."""

    @property
    def accepted(self) -> bytes:
        """Sent once it has a server connection, ahead of the server's bytes."""

    def refused(self, refusal: AdmissionRefusal) -> bytes:
        """Sent before its connection is closed."""


NOT_SERVED = AdmissionRefusal(RefusalKind.UNSERVED, "not served")

VisitorEnd = socket.socket | BufferedEnd
"""The end of a visitor, which the engine relays: its connection, or requests on a shared HTTP connection."""


@dataclass(slots=True, eq=False)  # a frozen one takes four times as long to make
class Visitor:
    """What is known of a visitor when it arrives; nothing changes it. Its holder owns the end."""

    end: VisitorEnd
    peer: Peer  # the client's address; behind a trusted proxy, that in the PROXY header
    reached: Peer | None = None  # the address that it connected to; None: that of its end
    host: HostName | None = None  # the host name that it requested; None on a port
    credential: str | None = None  # the name of the credential that it presented
    early: bytes = b""  # read from `end` already: delivered to the hidden server first
    answers: VisitorAnswers | None = None  # what it is told; None: nothing, its bytes are relayed and that is all

    @property
    def connection(self) -> socket.socket:
        """Its end, where that is a connection of its own."""
        assert isinstance(self.end, socket.socket)
        return self.end

    def ask_reached(self) -> Peer:
        """The address that it connected to, where `reached` is None: a system call."""
        reached: Peer = local_address(self.connection)
        return reached

    def find_reached(self) -> Peer | None:
        """The address that it connected to, where that can be found out."""
        if self.reached is not None or isinstance(self.end, BufferedEnd):
            return self.reached
        try:
            return self.ask_reached()
        except OSError:  # it has left
            return None

    @property
    def has_left(self) -> bool:
        """Whether it is known to have left; the end of a connection tells only when it is used."""
        return isinstance(self.end, BufferedEnd) and self.end.closed

    def refuse(self, refusal: AdmissionRefusal = NOT_SERVED) -> None:
        """Close its end with a reset. It was served nothing, and an end of file would look like an empty answer. Where
        it is a request, the answer depends on the kind of the refusal; only the owner of the name learns the reason.
        """
        if isinstance(self.end, RequestStream):
            self.end.refuse(refusal)
        elif self.answers is not None:
            self._answer_refused(self.answers.refused(refusal))
        elif isinstance(self.end, BufferedEnd):
            self.end.reset(refusal.reason)
        else:
            reset_on_close(self.end)
            self.end.close()

    def greet(self) -> None:
        """It has a server connection: tell it so, if it waits for that, before the first byte from there."""
        end = self.end
        if self.answers is None:
            return
        try:
            end.send(self.answers.accepted)  # a few bytes, for which there is space: the peer waits for them
        except OSError:  # it has left, of which its relay will learn
            return

    def _answer_refused(self, answer: bytes) -> None:
        """Send a line, and end the connection behind it. The peer waits for it, so nothing unread destroys it."""
        end = self.end
        try:
            end.send(answer)
        except OSError:
            answer = b""
        if not isinstance(end, BufferedEnd):
            end.close()
        elif answer:
            end.release()
        else:
            end.reset("not served")

    def watch(self, engine: Engine, on_left: Callable[[OSError], None], on_failure: FailureCallback) -> Registration:
        """Call `on_left` once its end is broken, until the result is released. Reads nothing."""
        end = self.end
        if isinstance(end, BufferedEnd):
            return _EndWatch(end, on_left)

        def on_event() -> None:
            if (error := pending_error(end)) is not None:
                on_left(error)

        return engine.watch(end, on_event, on_failure)


@dataclass(slots=True, eq=False)
class RelayedVisitor:
    """What is kept of a visitor while it is relayed."""

    peer: Peer
    since: float  # when it was joined to a server connection, by Trio's clock
    reached: Peer | None = None  # as in `Visitor`
    host: HostName | None = None
    credential: str | None = None


class _EndWatch:
    """The handler of an end that waits for a relay. Implements `EndHandler` and `Registration`."""

    def __init__(self, end: BufferedEnd, on_left: Callable[[OSError], None]) -> None:
        self._end = end
        self._on_left = on_left
        end.handler = self

    def release(self) -> None:
        if self._end.handler is self:
            self._end.handler = NO_HANDLER

    def on_data(self, _data: memoryview) -> int:
        return 0

    def on_writable(self) -> None:
        pass

    def on_eof(self) -> None:
        pass

    def on_write_failed(self, error: OSError) -> None:
        self._on_left(error)

    def on_reset(self, error: OSError) -> None:
        self._on_left(error)

    def on_internal_error(self, error: Exception) -> None:
        raise error
