"""A private tunnel: no port is open for it. Its visitors are control connections that asked for it.

    visitTunnel ──► PrivateTunnels.find ──► take ──► the tunnel, as for any visitor

The relay decides which credentials may ask, and applies the limits of the tunnel. Which visitors may enter is decided
by the two ends, over TLS that the relay only passes on: see tunneld-control(7).

The answer to `visitTunnel` is sent here: OK once the visitor has a server connection, from when on its connection is
that to the agent; or the reason why it has none.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import LimitReachedError, NoSuchTunnelError, NotAllowedError
from tunneld.net.address import Private
from tunneld.net.endpoint import PRIVATE_SCHEME, Endpoint
from tunneld.policy.admission import AdmissionRefusal, RefusalKind
from tunneld.tunnel.ingress.ingress import Arrivals
from tunneld.tunnel.private_tunnels import PrivateTunnels
from tunneld.tunnel.server_side import Takeover
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor
from tunneld.wire.lines import format_err, format_ok
from tunneld.wire.preamble import LEAVE_TLS

NOT_OPEN = AdmissionRefusal(RefusalKind.UNSERVED, "the tunnel accepts no new visitors")


class PrivateIngress:
    """The address of a private tunnel. Implements `Ingress` and `PrivateDoor`."""

    def __init__(self, spec: TunnelSpec, address: Private, tunnels: PrivateTunnels, takeover: Takeover) -> None:
        """Take the address. Raises `LimitReachedError` where another tunnel has it, unless that one is replaced."""
        self.tunnel = spec.id
        self._address = address
        self._tunnels = tunnels
        self._arrivals: Arrivals | None = None
        self.is_paused = False  # it accepts no more visitors
        self._held: list[Visitor] = []  # that came before `listen`
        self._former = tunnels.add(self, takeover.addresses)  # of the replaced tunnel, until this one is started

    # Ingress

    @property
    def address(self) -> Private:
        """The name, and the id of the node."""
        return self._address

    @property
    def uri(self) -> Endpoint:
        """See `Ingress.uri`."""
        return Endpoint(PRIVATE_SCHEME, self._address.name, 0, path=str(self._address.node))

    @property
    def listeners(self) -> Sequence[socket.socket]:
        """See `Ingress.listeners`: it has none."""
        return ()

    def listen(self, _engine: Engine, arrivals: Arrivals, _nursery: trio.Nursery, _failed: FailureCallback) -> None:
        """See `Ingress.listen`."""
        self._arrivals, self._former = arrivals, None
        held, self._held = self._held, []
        for visitor in held:
            self.take(visitor)

    def pause(self) -> None:
        """See `Ingress.pause`."""
        self.is_paused = True

    def leave_idle(self) -> None:
        """See `Ingress.leave_idle`: there is nothing idle."""

    def change(self, spec: TunnelSpec) -> None:
        """See `Ingress.change`: the tunnel itself applies the limits."""

    def export(self) -> IngressSnapshot:
        """See `Ingress.export`."""
        self.pause()
        return IngressSnapshot(self._address, None)

    def close(self) -> None:
        """See `Ingress.close`. A tunnel that was never started gives the address back, and what it held."""
        self._tunnels.remove(self, self._former)
        self.is_paused, self._arrivals, self._former = True, None, None
        held, self._held = self._held, []
        successor = self._tunnels.find(self._address)
        for visitor in held:
            if successor is not None:
                successor.take(visitor)
            else:
                visitor.refuse(NOT_OPEN)

    # Called by the control port

    def take(self, visitor: Visitor) -> None:
        """Pass a visitor to the tunnel, or to the one that it replaces while that one serves."""
        former = self._former
        if former is not None and not former.is_paused:
            former.take(visitor)
        elif self.is_paused:
            visitor.refuse(NOT_OPEN)
        elif self._arrivals is None:
            self._held.append(visitor)
        elif not visitor.has_left:
            self._arrivals.arrive(visitor)


CODES = {
    RefusalKind.ADDRESS: NotAllowedError.code,
    RefusalKind.DENIED: NotAllowedError.code,
    RefusalKind.UNSERVED: NoSuchTunnelError.code,
}
"""Codes of the control protocol for refused visitors. All other kinds are limits."""


ADVICE = {
    RefusalKind.DENIED: "the relay's authorization service refused it",
    RefusalKind.UNSERVED: "its agent must be connected to this relay",
}


class VisitAnswers:
    """What a visitor of a private tunnel is told, in lines of the control protocol. Implements `VisitorAnswers`."""

    def __init__(self, address: Private, *, may_leave: bool) -> None:
        """`may_leave`: its connection is in TLS that ends here, which it may leave, see `TlsEnd.may_leave`."""
        self._address = address
        self._hint = f" {LEAVE_TLS}" if may_leave else ""

    @property
    def accepted(self) -> bytes:
        """See `VisitorAnswers.accepted`."""
        return format_ok(f"visiting {self._address}{self._hint}")

    def refused(self, refusal: AdmissionRefusal) -> bytes:
        """See `VisitorAnswers.refused`."""
        code = CODES.get(refusal.kind, LimitReachedError.code)
        advice = ADVICE.get(refusal.kind, "try later")
        return format_err(code, f"could not visit {self._address}: {refusal.reason}; {advice}")
