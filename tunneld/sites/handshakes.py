"""TLS handshakes with visitors on the HTTPS port, which may wait for the certificate of a new host name.

    run
    └─ wait for a certificate ×N       at most `certificate_wait`; the handshake itself needs no task, see `tls_accept`

A name gets its certificate when its tunnel opens, and visitors often come at the same moment. While the order runs, the
ClientHello of a visitor stays unread in the kernel; the handshake goes on as soon as the order is over. The number of
handshakes that wait is limited, in all and for each name: a name whose order takes long must not fill the port.
"""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
import trio

from tunneld.engine.acceptor import peer_ended
from tunneld.engine.budget import CostShare
from tunneld.engine.pump import Pump
from tunneld.errors import reason_of
from tunneld.net.endpoint import Peer
from tunneld.policy.limits import HttpLimits
from tunneld.sites.port_places import PortPlace
from tunneld.sites.site import Certificates, PortOrders
from tunneld.sites.tls_accept import TlsAccept
from tunneld.tls.connection import TlsSocket
from tunneld.wire.client_hello import MAX_HELLO_BYTES, UNRECOGNIZED_NAME, encode_alert

log: structlog.stdlib.BoundLogger = structlog.get_logger("sites")


@dataclass(slots=True, eq=False)
class NewConnection:
    """A connection that a shared port has accepted, and of which no request was read."""

    socket: socket.socket
    peer: Peer  # the visitor, or a proxy in front of the relay
    reached: Peer | None  # the address that the visitor connected to, where a proxy tells it
    deadline: float  # for its first bytes
    place: PortPlace

    def close(self) -> None:
        """Close it, and give its place back."""
        self.socket.close()
        self.place.leave()

    def refuse(self, alert: int) -> None:
        """Send a TLS alert, and close. What the client sent is read first: closing a socket with unread bytes is a
        reset, which may overtake the alert.
        """
        try:
            self.socket.send(encode_alert(alert))
            self.socket.recv(MAX_HELLO_BYTES)
        except OSError:
            pass
        self.close()


class HandshakeSettings(Protocol):
    """What is read of `[names]`."""

    @property
    def limits(self) -> HttpLimits: ...
    @property
    def certificate_wait(self) -> float: ...
    @property
    def max_certificate_waits(self) -> int: ...
    @property
    def max_certificate_waits_per_name(self) -> int: ...


class SiteHandshakes:
    """See the description of this module. It owns the connections until their handshakes are done."""

    def __init__(
        self,
        engine: Pump,
        settings: Callable[[], HandshakeSettings],
        certificates: Certificates,
        orders: PortOrders,
        on_done: Callable[[NewConnection, TlsSocket, str], None],
    ) -> None:
        """`on_done` gets each connection whose handshake is done, with the name that the client asked for."""
        self.waiting = Counter[str]()  # handshakes that wait for a certificate, by name
        self.running: set[TlsAccept] = set()
        self._engine = engine
        self._share = CostShare(engine.budget)  # of all handshakes
        self._settings = settings
        self._certificates = certificates
        self._orders = orders
        self._on_done = on_done
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own all handshakes until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            for handshake in list(self.running):
                handshake.stop("the relay stopped")

    def start(self, new: NewConnection, name: str) -> None:
        """Do the handshake of a visitor with the certificate for `name`; or refuse it, where there is none."""
        context = self._certificates.context_for(name)
        if context is not None:
            self._shake_hands(new, name, context, self._serve)
        elif self._may_wait(name):
            self.waiting[name] += 1
            self._nursery.start_soon(self._wait_and_serve, new, name)
        else:
            self._refuse(new, name)

    def start_challenge(self, new: NewConnection, name: str, context: ssl.SSLContext) -> None:
        """Answer the challenge of a certificate authority; there is nothing to say after the handshake."""
        self._shake_hands(new, name, context, self._answer)

    def _shake_hands(
        self,
        new: NewConnection,
        name: str,
        context: ssl.SSLContext,
        on_done: Callable[[NewConnection, str, TlsSocket], None],
    ) -> None:
        """Begin a handshake. The connection is closed if it fails."""
        deadline = self._engine.now() + self._settings().limits.head_timeout
        done, failed = partial(on_done, new, name), partial(self._on_failed, new, name)
        TlsAccept(self._engine, new.socket, context, deadline, done, failed, self._share, self.running).start()

    def _serve(self, new: NewConnection, name: str, tls: TlsSocket) -> None:
        self._on_done(new, tls, name)

    def _answer(self, new: NewConnection, _name: str, tls: TlsSocket) -> None:
        tls.finish()
        tls.flush_if_possible()
        new.close()

    def _on_failed(self, new: NewConnection, name: str, error: Exception) -> None:
        if isinstance(error, OSError):
            log.debug("tls connection failed", peer=new.peer[0], name=name, reason=reason_of(error))
        else:
            log.error("tls connection failed: internal error", exc_info=error)
        new.close()

    # Waiting for a certificate

    def _may_wait(self, name: str) -> bool:
        """Whether a certificate for this name is on its way, and there is room for one more handshake to wait for."""
        settings = self._settings()
        return (
            settings.certificate_wait > 0
            and self._orders.is_ordered(name)
            and self.waiting[name] < settings.max_certificate_waits_per_name
            and self.waiting.total() < settings.max_certificate_waits
        )

    async def _wait_and_serve(self, new: NewConnection, name: str) -> None:
        try:
            with trio.move_on_after(self._settings().certificate_wait):
                await self._wait(new.socket, name)
        except BaseException:
            new.close()
            raise
        finally:
            self.waiting -= Counter((name,))  # without entries of 0
        context = self._certificates.context_for(name)
        if context is not None:
            self._shake_hands(new, name, context, self._serve)
        else:
            self._refuse(new, name)

    async def _wait(self, connection: socket.socket, name: str) -> None:
        """Return when there is a certificate, when none is on its way any more, or when the client has left."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_for_leave, connection, nursery.cancel_scope)
            while self._certificates.context_for(name) is None and self._orders.is_ordered(name):
                await self._orders.order_over()
            nursery.cancel_scope.cancel()

    async def _wait_for_leave(self, connection: socket.socket, waiting: trio.CancelScope) -> None:
        """Cancel `waiting` when the client leaves. More bytes than its ClientHello, which stays unread, it sends only
        where it does not wait for an answer; then it is not watched any longer.
        """
        try:
            seen = len(connection.recv(MAX_HELLO_BYTES, socket.MSG_PEEK))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)
            await trio.lowlevel.wait_readable(connection)
            if peer_ended(connection):
                waiting.cancel()
        except OSError:
            waiting.cancel()
        finally:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _refuse(self, new: NewConnection, name: str) -> None:
        new.refuse(UNRECOGNIZED_NAME)
        log.debug("tls connection refused", peer=new.peer[0], name=name, reason="no certificate has this name")
