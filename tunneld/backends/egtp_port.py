"""The port to which EGTP nodes connect.

    serve_nodes
    ├─ NodeRelay              serves nodes that use the relay itself; see egtp_relay.py
    └─ ReloadableListener     accepts; see net/listeners.py

A new connection is a handshake under a deadline (auth/handshakes.py): a session in which the peer proves its node id,
and the request `are there messages`, which names the association. From then on it has no task: the association, which
belongs to the tunnel's server side, has a link more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import structlog
import trio

from tunneld.auth.handshakes import FailedProofError, HandshakeSupervisor, NothingReceivedError
from tunneld.backends.egtp import EgtpServerSide, find_identity, find_sides
from tunneld.backends.egtp_relay import CLASSIC_TYPES, NodeRelay
from tunneld.backends.mux_side import carrier_limits
from tunneld.config import schema
from tunneld.egtp.carrier import EgtpCarrier
from tunneld.egtp.handshake import NodeConnection, accept_session
from tunneld.egtp.limits import MISSED_POLLS, AssociationLimits
from tunneld.egtp.link import Link
from tunneld.egtp.output import OutputBudget
from tunneld.egtp.session import UNKNOWN_NODE
from tunneld.engine.pump import Pump
from tunneld.errors import (
    ConfigError,
    LimitReachedError,
    NoSuchTunnelError,
    NotAllowedError,
    RemoteProtocolError,
    TunneldError,
    UsageError,
    reason_of,
)
from tunneld.mux.channel import Channel
from tunneld.net.endpoint import Peer, format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.net.node_id import NodeId
from tunneld.tls.identity import Identity
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tenants import Tenant
from tunneld.wire.egtp.attaching import UNKNOWN_ASSOCIATION, AttachRequest
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, canonical_kind
from tunneld.wire.mencode import Value

TYPE_END = 8
"""Bytes of a frame up to the end of its envelope's type."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("egtp")


def load_identity(path: Path) -> Identity:
    """The key in the file, which is created if there is none. Raises `ConfigError`."""
    try:
        with suppress(FileNotFoundError):
            return Identity.load(path)
        with suppress(FileExistsError):
            Identity.create().save(path)
        return Identity.load(path)
    except OSError as error:
        raise ConfigError([f"egtp.identity: {path}: {reason_of(error)}"]) from None


async def serve_nodes(
    listener: ReloadableListener,
    settings: Callable[[], schema.EgtpSettings],
    handshakes: HandshakeSupervisor,
    registry: KeyRegistry,
    engine: Pump,
    relay: NodeRelay,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept nodes until cancelled; the daemon runs this. `settings` is called for each new connection. A caller that
    rebinds the listener must update `registry`. `relay` serves the nodes that use the relay itself.
    """
    port = _EgtpPort(settings, handshakes, registry, engine, relay)
    registry.set_port("egtp", "egtp", listener.port)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await listener.serve(port.on_connection, task_status=task_status)


class _EgtpPort:
    """The port."""

    def __init__(
        self,
        settings: Callable[[], schema.EgtpSettings],
        handshakes: HandshakeSupervisor,
        registry: KeyRegistry,
        engine: Pump,
        relay: NodeRelay,
    ) -> None:
        self._settings = settings
        self._relay = relay
        self._handshakes = handshakes
        self._registry = registry
        self._engine = engine
        self._budgets: WeakKeyDictionary[Tenant, OutputBudget] = WeakKeyDictionary()

    def on_connection(self, connection: socket.socket, peer: Peer) -> None:
        """The listener accepted a connection: start its handshake."""
        timeout = self._settings().handshake_timeout
        self._handshakes.start(connection, peer, "egtp", partial(self._handshake, connection, peer), timeout)

    async def _handshake(self, connection: socket.socket, peer: Peer) -> None:
        """Do the handshake, and attach the connection to an association. Raises OSError or a `TunneldError` if that is
        not possible; the connection is closed then.
        """
        try:
            await trio.lowlevel.wait_readable(connection)
            if not connection.recv(1, socket.MSG_PEEK):
                raise NothingReceivedError("the connection closed before a session began")
            received = await self._receive_type(connection) if self._relay.accepts_classic else b""
            if int.from_bytes(received[4:]) in CLASSIC_TYPES and received:
                await self._relay.serve_classic(connection, received, peer)
                return
            node = await accept_session(connection, self._find_identity, received)
            relay = self._relay.identity
            if relay is not None and node.session.own_id == relay.id:
                self._relay.serve(node, peer)
                return
            request = await node.receive_request()
            try:
                await self._serve(node, request, peer)
            except TunneldError as error:
                await node.refuse(request, str(error))
                raise
        except BaseException:
            connection.close()
            raise

    async def _receive_type(self, connection: socket.socket) -> bytes:
        """The first bytes of a connection, up to the type of its first envelope."""
        received = b""
        while len(received) < TYPE_END:
            await trio.lowlevel.wait_readable(connection)
            data = connection.recv(TYPE_END - len(received))
            if not data:
                raise RemoteProtocolError("the connection closed before a session began")
            received += data
        return received

    def _find_identity(self, recipient: bytes) -> Identity | None:
        """The key with this id: that of the relay, or of a tunnel."""
        relay = self._relay.identity
        if relay is not None and recipient == relay.id.digest:
            return relay
        return find_identity(self._registry, recipient)

    async def _serve(self, node: NodeConnection, request: MojoRequest, peer: Peer) -> None:
        """Answer the first request. Raises OSError or a `TunneldError`."""
        if canonical_kind(request.kind) != ARE_THERE_MESSAGES:
            raise RemoteProtocolError("unrecognized message type")
        attach = AttachRequest.parse(request.body)
        session = node.session
        assert session.peer is not None
        side = self._side(session.own_id, session.peer.digest + attach.association)
        if not side.is_admitted(session.peer):
            raise FailedProofError(f"node {session.peer} may not serve this tunnel", str(session.peer))
        if attach.poll_interval > (longest := self._settings().max_poll):
            raise UsageError(f"node polls every {attach.poll_interval} s; the limit is {longest:g} s (egtp.max_poll)")
        carrier = self._association(side, attach, session.peer.digest, peer)
        attachment = carrier.attachment
        attachment.patience = self._settings().resume_timeout + MISSED_POLLS * attach.poll_interval
        waiting = None if attach.fast_relay else attachment.collect(attach.received)
        answer: Value = {b"result": b"no", b"received": attachment.inbox.next} if waiting is None else list(waiting)
        await node.respond(request, answer)
        if carrier.over:
            raise NoSuchTunnelError("the tunnel closed")
        link = Link(self._engine, node.connection, session, node.frames, carrier.limits)
        if attach.fast_relay:
            attachment.attach(link, attach.received)
        else:
            attachment.attach_polling(link)
        log.debug("node connected", peer=format_peer(peer), node=str(session.peer))

    def _side(self, node: NodeId, association: bytes) -> EgtpServerSide:
        """The server side that has this association, else the one of the open tunnel. Raises `NoSuchTunnelError`."""
        for side in find_sides(self._registry, node):
            if association in side.associations or side.is_open:
                return side
        raise NoSuchTunnelError(UNKNOWN_NODE)

    def _association(self, side: EgtpServerSide, attach: AttachRequest, node: bytes, peer: Peer) -> EgtpCarrier:
        """The association that a node goes on with, or begins. Raises `NoSuchTunnelError`, `NotAllowedError` or
        `LimitReachedError`.
        """
        key = node + attach.association
        carrier = side.associations.get(key)
        if attach.resumed:
            if carrier is None:
                raise NoSuchTunnelError(UNKNOWN_ASSOCIATION)
            side.check_peer(peer)
            return carrier
        if carrier is not None:
            raise NotAllowedError("this association exists already")
        settings = self._settings()
        owner = _Association(side, peer)
        owner.carrier = carrier = EgtpCarrier(
            self._engine,
            owner,
            initiator=False,
            limits=carrier_limits(settings, settings.connection_memory),
            times=AssociationLimits(settings.resume_timeout, settings.retransmission, settings.max_channels),
            budget=self._budget(side),
        )
        carrier.turns.share = side.share(self._engine.budget)
        try:
            side.admit(carrier, peer, settings.max_carriers)
        except (NotAllowedError, LimitReachedError):
            carrier.close("refused")
            raise
        side.associations[key] = carrier
        return carrier

    def _budget(self, side: EgtpServerSide) -> OutputBudget:
        """What all associations of the tunnel's owner may keep."""
        budget = self._budgets.setdefault(side.tenant, OutputBudget())
        budget.limit = self._settings().kept_memory
        return budget


class _Association:
    """The events of an association. Implements `AssociationEvents`."""

    carrier: EgtpCarrier

    def __init__(self, side: EgtpServerSide, peer: Peer) -> None:
        self._side = side
        self._peer = peer

    def on_opened(self, channel: Channel, _label: bytes) -> None:
        """The node opened a stream, which a relay does not serve."""
        channel.reset("this relay does not accept streams")

    def on_capacity(self) -> None:
        """Serve visitors that wait."""
        self._side.on_capacity()

    def on_retired(self) -> None:
        """The node wants no more visitors."""
        self._side.retire(self.carrier)

    def on_settled(self) -> None:
        """Nothing: the relay waits for no acknowledgement."""

    def on_unresponsive(self) -> None:
        """The node did not answer; the server side prefers other ones from now on."""
        log.info("node does not answer", peer=format_peer(self._peer))

    def on_output(self) -> None:
        """Nothing: the node connects again, or polls."""

    def on_polled(self, count: int) -> None:
        """Nothing: a relay does not poll."""

    def on_detached(self, reason: str) -> None:
        """The connection is lost; the streams wait for the next one."""
        log.info("node disconnected", peer=format_peer(self._peer), reason=reason)

    def on_closed(self, reason: str) -> None:
        """The association is over."""
        self._side.on_carrier_closed(self.carrier)
        log.info("association closed", peer=format_peer(self._peer), reason=reason)
