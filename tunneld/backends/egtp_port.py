"""The port to which EGTP nodes connect.

    serve_nodes
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

import structlog
import trio

from tunneld.auth.handshakes import FailedProofError, HandshakeSupervisor, NothingReceivedError
from tunneld.backends.egtp import EgtpServerSide, find_identity, find_side
from tunneld.backends.mux_side import carrier_limits
from tunneld.config import schema
from tunneld.config.places import state_folder
from tunneld.egtp.carrier import AssociationLimits, EgtpCarrier
from tunneld.egtp.handshake import NodeConnection, accept_session
from tunneld.egtp.link import Link
from tunneld.egtp.session import UNKNOWN_NODE
from tunneld.engine.pump import Pump
from tunneld.errors import (
    ConfigError,
    LimitReachedError,
    NoSuchTunnelError,
    NotAllowedError,
    RemoteProtocolError,
    TunneldError,
    reason_of,
)
from tunneld.mux.channel import Channel
from tunneld.net.endpoint import Peer, format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.identity import Identity
from tunneld.tunnel.keys import KeyRegistry
from tunneld.wire.egtp.attaching import UNKNOWN_ASSOCIATION, AttachRequest
from tunneld.wire.egtp.messages import MojoRequest
from tunneld.wire.egtp.relaying import ARE_THERE_MESSAGES, canonical_kind
from tunneld.wire.mencode import Value

KEY_FILE = "egtp_key"
"""The name of the file in the state directory."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("egtp")


def place(settings: schema.Settings) -> Path:
    """The path of the relay's key. Raises `ConfigError` if neither a path nor a state directory is known."""
    if settings.egtp.identity is not None:
        return settings.egtp.identity
    folder = settings.daemon.state or state_folder()
    if folder is None:
        raise ConfigError(["egtp.identity: no state directory to keep the key in; set egtp.identity or daemon.state"])
    return folder / KEY_FILE


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
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept nodes until cancelled; the daemon runs this. `settings` is called for each new connection. A caller that
    rebinds the listener must update `registry`.
    """
    port = _EgtpPort(settings, handshakes, registry, engine)
    registry.set_port("egtp", "egtp", listener.port)
    await listener.serve(port.on_connection, task_status=task_status)


class _EgtpPort:
    """The port."""

    def __init__(
        self,
        settings: Callable[[], schema.EgtpSettings],
        handshakes: HandshakeSupervisor,
        registry: KeyRegistry,
        engine: Pump,
    ) -> None:
        self._settings = settings
        self._handshakes = handshakes
        self._registry = registry
        self._engine = engine

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
            node = await accept_session(connection, partial(find_identity, self._registry))
            request = await node.receive_request()
            try:
                await self._serve(node, request, peer)
            except TunneldError as error:
                await node.refuse(request, str(error))
                raise
        except BaseException:
            connection.close()
            raise

    async def _serve(self, node: NodeConnection, request: MojoRequest, peer: Peer) -> None:
        """Answer the first request. Raises OSError or a `TunneldError`."""
        if canonical_kind(request.kind) != ARE_THERE_MESSAGES:
            raise RemoteProtocolError("unrecognized message type")
        attach = AttachRequest.parse(request.body)
        session = node.session
        assert session.peer is not None
        side = find_side(self._registry, session.own_id)
        if side is None:
            raise NoSuchTunnelError(UNKNOWN_NODE)
        if not side.is_admitted(session.peer):
            raise FailedProofError(f"node {session.peer} may not serve this tunnel", str(session.peer))
        carrier = self._association(side, attach, session.peer.digest, peer)
        waiting = None if attach.fast_relay else carrier.collect(attach.received)
        answer: Value = {b"result": b"no", b"received": carrier.inbox.next} if waiting is None else list(waiting)
        await node.respond(request, answer)
        if carrier.over:
            raise NoSuchTunnelError("the tunnel closed")
        link = Link(self._engine, node.connection, session, node.frames, carrier.limits)
        if attach.fast_relay:
            carrier.attach(link, attach.received)
        else:
            carrier.attach_polling(link)
        log.debug("node connected", peer=format_peer(peer), node=str(session.peer))

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
        )
        carrier.turns.share = side.share(self._engine.budget)
        try:
            side.admit(carrier, peer, settings.max_carriers)
        except (NotAllowedError, LimitReachedError):
            carrier.close("refused")
            raise
        side.associations[key] = carrier
        return carrier


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

    def on_detached(self, reason: str) -> None:
        """The connection is lost; the streams wait for the next one."""
        log.info("node disconnected", peer=format_peer(self._peer), reason=reason)

    def on_closed(self, reason: str) -> None:
        """The association is over."""
        self._side.on_carrier_closed(self.carrier)
        log.info("association closed", peer=format_peer(self._peer), reason=reason)
