"""The contract between a tunnel and its ingresses.

Ingress                          the tunnel
│  ◄── listen, pause, export, close
│  ──► arrive                    a visitor, whose end the tunnel owns from now on
│  ──► refuse                    one that does not even become a visitor, see `AdmissionRefusal`
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

import trio

from tunneld.engine.engine import Engine, FailureCallback
from tunneld.net.address import Address
from tunneld.net.endpoint import Endpoint
from tunneld.policy.admission import AdmissionRefusal
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor


class Arrivals(Protocol):
    """Where an ingress passes its visitors: the tunnel's `WaitingVisitors`. `len` is the number of waiting visitors."""

    def __len__(self) -> int: ...

    def arrive(self, visitor: Visitor) -> None:
        """Accept a visitor, join it to a server connection or let it wait for one; or refuse it. Called in the engine's
        callback or in a task. The callee owns the visitor's end.
        """

    def refuse(self, visitor: Visitor, refusal: AdmissionRefusal) -> None:
        """Close a visitor, and count the refusal."""


class Ingress(Protocol):
    """Where visitors come from. Opened by its constructor, so that whatever can fail fails before the tunnel runs."""

    @property
    def address(self) -> Address:
        """What the tunnel holds while it is open, and a reservation after that."""

    @property
    def uri(self) -> Endpoint:
        """The address to advertise."""

    @property
    def listeners(self) -> Sequence[socket.socket]:
        """Its open listeners of its own, which a tunnel that replaces this one may share."""

    def listen(self, engine: Engine, arrivals: Arrivals, nursery: trio.Nursery, on_failure: FailureCallback) -> None:
        """Pass visitors to `arrivals` from now on. `nursery`, the tunnel's, owns the tasks of this ingress;
        `on_failure` is called with bugs.
        """

    def pause(self) -> None:
        """Accept no visitor for now; new ones wait outside, as in a listener's queue. Precedes `export`."""

    def leave_idle(self) -> None:
        """An agent accepts no more visitors: what comes next needs another server connection, also on a visitor's
        connection that is idle now.
        """

    def change(self, spec: TunnelSpec) -> None:
        """The limits of the tunnel have changed."""

    def export(self) -> IngressSnapshot:
        """Hand over what another process can continue, without closing it. The caller owns its sockets, and calls
        `close` afterwards as usual.
        """

    def close(self) -> None:
        """Accept no more visitors. Idempotent."""
