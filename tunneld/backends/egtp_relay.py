"""The relay's own EGTP node: other nodes pass messages along through it, see `egtp.passing`.

    egtp_port ──a session with the relay's own id, or a classic envelope──► NodeRelay
                                                                            └─ serve_node ×N, until it ends

The nodes of a credential are listed in `[[credential]] nodes`; the tunnels' nodes have nothing to do with them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from tunneld.auth.handshakes import FailedProofError, NothingReceivedError
from tunneld.config import schema
from tunneld.config.places import state_folder
from tunneld.egtp.freshness import FreshnessGuard
from tunneld.egtp.handshake import NodeConnection
from tunneld.egtp.mailbox import MailLimits
from tunneld.egtp.modern import ModernEnvelopes
from tunneld.egtp.passing import PassingLimits, PassingService
from tunneld.egtp.service_connection import MAX_FIRST_FRAME, NodeEnvelopes, ServiceConnection
from tunneld.egtp.service_task import READ_SIZE, serve_node
from tunneld.errors import ConfigError, NotAllowedError, RemoteProtocolError, reason_of
from tunneld.net.endpoint import Peer, format_peer
from tunneld.net.node_id import NodeId
from tunneld.policy.access import Grant
from tunneld.policy.rates import Buckets, Rate
from tunneld.tls.identity import Identity
from tunneld.tls.private_files import write_private
from tunneld.wire.egtp.frames import FrameReader

if TYPE_CHECKING:
    from tunneld.wire.egtp.mesgen import ClassicKey, MesgenSessions

KEY_FILE = "egtp_key"
"""The name of the file with the relay's key in the state directory."""

CLASSIC_KEY_FILE = "egtp_classic_key"
"""The name of the file with the relay's classic key, beside its other one."""

CLASSIC_TYPES = frozenset({0, 1, 0x202})
"""The types of classic envelopes; see `wire.egtp.mesgen.envelope`, which is imported only if they are on."""

MAX_CONNECTIONS = 4
"""Connections per node; another one replaces the oldest, of which the relay may not know yet that it is lost."""

CLASSIC_SESSIONS = Rate.parse("20/s")
"""New classic sessions: each takes 10 ms with the private key, so these take a fifth of the relay's time."""

MAX_CREDENTIALS = 10_000
"""Credentials whose rates are remembered."""

TOTAL_SHARE = 8
"""All messages together may have this many times the bytes of one credential."""

EXPIRY_INTERVAL = 60.0
"""Seconds between looks for messages that are too old."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("egtp")


def place(settings: schema.Settings) -> Path:
    """The path of the relay's key. Raises `ConfigError` if neither a path nor a state directory is known."""
    if settings.egtp.identity is not None:
        return settings.egtp.identity
    folder = settings.daemon.state or state_folder()
    if folder is None:
        raise ConfigError(["egtp.identity: no state directory to keep the key in; set egtp.identity or daemon.state"])
    return folder / KEY_FILE


def load_classic_key(path: Path) -> ClassicKey:
    """The key in the file, which is created if there is none. Raises `ConfigError`."""
    from tunneld.wire.egtp.mesgen.keys import load_key, new_key  # noqa: PLC0415  # only if they are on

    try:
        with suppress(FileExistsError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(path, new_key()[1])
        if path.stat().st_mode & 0o077:
            raise ConfigError([f"egtp.classic: {path} can be read by other users; run: chmod 600 {path}"])
        return load_key(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"egtp.classic: {path}: {reason_of(error)}"]) from None


class NodeRelay:
    """Serves nodes that use the relay. `settings` and `identity` are called at each use, since a reload may change
    them.
    """

    def __init__(self, settings: Callable[[], schema.Settings], identity: Callable[[], Identity | None]) -> None:
        self._settings = settings
        self._identity = identity
        self._own_ids: set[bytes] = set()
        self.service = PassingService(self._own_ids, self._limits, self._owner_of, self._admits, trio.current_time)
        self._guard = FreshnessGuard()
        self._connections: dict[bytes, list[trio.CancelScope]] = {}  # by node, oldest first
        self._grants: dict[bytes, Grant] = {}  # by node, in `_grants_of`
        self._grants_of: schema.Settings | None = None
        self._rate = ""
        self._buckets: Buckets
        self._turn = trio.Lock()  # of the connections, to open and seal envelopes
        self._new_sessions = Buckets(CLASSIC_SESSIONS, 1)
        self._classic: tuple[bytes, MesgenSessions] | None = None  # with the relay's classic id
        self._nursery: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections, and delete old messages, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                await trio.sleep(EXPIRY_INTERVAL)
                self.service.expire()

    @property
    def identity(self) -> Identity | None:
        """The relay's key; None without an egtp port."""
        return self._identity()

    @property
    def accepts_classic(self) -> bool:
        """Whether nodes with the classic envelope are served."""
        return self._settings().egtp.classic

    # Called by the port, in a handshake

    def serve(self, node: NodeConnection, peer: Peer) -> None:
        """Take over a connection whose node began a session with the relay's own id. Raises a `TunneldError`."""
        session = node.session
        assert session.peer is not None
        self._own_ids.add(session.own_id.digest)
        if not self.service.knows(session.peer.digest):
            raise FailedProofError(f"node {session.peer} may not use this relay", str(session.peer))
        envelopes = ModernEnvelopes(session)
        served = self._connection(session.own_id.digest, envelopes, node.frames)
        served.heard = session.peer.digest
        for message in node.take_messages():
            served.accept(session.peer.digest, message)
        self._start(node.connection, served, peer)

    async def serve_classic(self, connection: socket.socket, received: bytes, peer: Peer) -> None:
        """Read a connection with classic envelopes until a known node was heard, and take it over. Raises OSError or a
        `TunneldError`.
        """
        from tunneld.egtp.classic import ClassicEnvelopes  # noqa: PLC0415  # only if they are on

        own_id, sessions = self._classic_sessions()
        admits = lambda: self._new_sessions.take("", trio.current_time())  # noqa: E731
        served = self._connection(own_id, ClassicEnvelopes(sessions, admits), FrameReader())
        left, done = MAX_FIRST_FRAME, served.receive(received)
        while served.heard is None:
            if not done:
                async with self._turn:
                    await trio.lowlevel.checkpoint()
                    done = served.receive(b"")
                continue
            if served.outgoing:  # a reject: the node knows a former process of this relay
                await trio.lowlevel.wait_writable(connection)
                del served.outgoing[: connection.send(served.outgoing)]
            await trio.lowlevel.wait_readable(connection)
            data = connection.recv(READ_SIZE)
            if not data:
                raise NothingReceivedError("the node closed the connection before it was known")
            left -= len(data)
            if left < 0:
                raise RemoteProtocolError("too many messages of unknown sessions")
            done = served.receive(data)
        self._start(connection, served, peer)

    # Internal

    def _connection(self, own_id: bytes, envelopes: NodeEnvelopes, frames: FrameReader) -> ServiceConnection:
        return ServiceConnection(own_id, self.service, envelopes, self._guard, os.urandom, trio.current_time, frames)

    def _start(self, connection: socket.socket, served: ServiceConnection, peer: Peer) -> None:
        node = served.heard
        assert node is not None
        grant = self._grant_of(node)
        if grant is None or not grant.admits(peer[0]):
            served.close()
            raise NotAllowedError(f"node {NodeId(node)} may not be used from {peer[0]}")
        self._nursery.start_soon(self._serve, connection, served, node, peer)

    async def _serve(self, connection: socket.socket, served: ServiceConnection, node: bytes, peer: Peer) -> None:
        log.info("node connected", peer=format_peer(peer), node=str(NodeId(node)))
        scopes = self._connections.setdefault(node, [])
        reason = "replaced by another connection of the node"
        with connection, trio.CancelScope() as scope:
            scopes.append(scope)
            if len(scopes) > MAX_CONNECTIONS:
                scopes[0].cancel()
            try:
                reason = await serve_node(connection, served, self._settings().egtp.heartbeat, self._turn)
            except Exception:
                reason = "internal error"
                log.exception("connection of a node failed: a bug", peer=format_peer(peer))
            finally:
                scopes.remove(scope)
                if not scopes:
                    self._connections.pop(node, None)
        log.info("node disconnected", peer=format_peer(peer), node=str(NodeId(node)), reason=reason)

    def _classic_sessions(self) -> tuple[bytes, MesgenSessions]:
        if self._classic is None:
            from tunneld.wire.egtp.mesgen import MesgenSessions  # noqa: PLC0415  # only if they are on

            key = load_classic_key(place(self._settings()).with_name(CLASSIC_KEY_FILE))
            self._own_ids.add(key.node_id)
            self._classic = key.node_id, MesgenSessions(key, os.urandom)
            log.info("classic envelopes are on", node=str(NodeId(key.node_id)))
        return self._classic

    def _limits(self) -> PassingLimits:
        egtp = self._settings().egtp
        mail = MailLimits(
            credential_messages=egtp.mail_messages,
            credential_bytes=egtp.mail_bytes,
            mailbox_messages=egtp.mail_messages,
            mailbox_bytes=egtp.mail_bytes,
            total_bytes=TOTAL_SHARE * egtp.mail_bytes,
            max_age=egtp.mail_age,
        )
        return PassingLimits(mail=mail)

    def _grant_of(self, node: bytes) -> Grant | None:
        settings = self._settings()
        if self._grants_of is not settings:
            self._grants_of = settings
            self._grants = {
                NodeId.parse(text).digest: credential.grant
                for credential in settings.credential
                for text in credential.nodes or ()
            }
        return self._grants.get(node)

    def _owner_of(self, node: bytes) -> str | None:
        grant = self._grant_of(node)
        return grant.name if grant is not None else None

    def _admits(self, credential: str) -> bool:
        rate = self._settings().egtp.mail_rate
        if rate != self._rate:
            self._rate, self._buckets = rate, Buckets(Rate.parse(rate), MAX_CREDENTIALS)
        return self._buckets.take(credential, trio.current_time())
