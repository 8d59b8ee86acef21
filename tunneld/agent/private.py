"""The exposing end of a private tunnel: which visitors enter, and the TLS with each of them.

    take ──► preamble: the visitor's certificate ──► admitted: ours ──► TLS 1.3, both keys pinned ──► PrivateSession
                         └──► not admitted: a refusal                      └──► another key: an alert        │
                                                                                         on_visitor ◄── each stream

The relay passes bytes on, and could send any: until the handshake is done nothing is believed. A visitor has
`PREAMBLE_TIMEOUT` and `HANDSHAKE_TIMEOUT` seconds, a few KiB, and one of `MAX_PENDING` places; when all are taken, the
visitor that has waited longest loses its place, so slow ones cannot keep others out.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from tunneld.agent.config import PrivateSettings
from tunneld.agent.events import Reporter
from tunneld.agent.invitations import Invitations
from tunneld.agent.private_session import PrivateSession, SessionEvents
from tunneld.agent.source import VisitorCallback, VisitorConnection
from tunneld.agent.tls_visitor import buffered_end
from tunneld.agent.visitors import visitor_address
from tunneld.config.trust import TrustedPeers, load_identity
from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.engine import Engine
from tunneld.engine.pump import Pump
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.errors import ConfigError, RemoteProtocolError, TunneldError, UsageError, reason_of
from tunneld.net.address import Private
from tunneld.net.node_id import NodeId
from tunneld.policy.private import PrivateClaim, claimed_text
from tunneld.tls.identity import Identity, node_id, peer_context
from tunneld.wire.preamble import CERTIFICATE, MAX_MESSAGE, encode_certificate, encode_refusal, parse_preamble

PREAMBLE_TIMEOUT = 10.0
"""Seconds for a visitor to send its certificate: it does so at once, over the slowest line."""
HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the handshake after that, as for every other one."""
MAX_PENDING = 64
"""Visitors in the preamble, and as many in the handshake: some 10 KiB each, and what comes in a second or two."""
PROTOCOL = "tunneld-private/2"
"""What the two ends speak inside their TLS: many streams. Version 1 had one connection, without a carrier."""
MAX_SESSIONS = 64
"""Sessions of one peer: a script that runs ssh for each of its files has some at a time, and each may take memory."""
ANY_PEER = "any"
"""In `admit`: every peer that this user trusts."""
ONE_TIME = "a visitor with a one-time code"


@dataclass(frozen=True, slots=True)
class AdmittedPeer:
    """A visitor that may enter if it proves its key: its id, its name, and the key that it expects of us."""

    node: NodeId
    title: str
    host: Identity
    is_invited: bool = False


class PrivateVisitors:
    """Admits the visitors of one exposure."""

    def __init__(
        self,
        engine: Engine,
        settings: PrivateSettings,
        reporter: Reporter,
        on_visitor: VisitorCallback,
        on_failed: Callable[[bytes, str], None],
        *,
        proxy_header: bool = False,
    ) -> None:
        """`on_visitor` gets each stream of an admitted visitor; `on_failed` the PROXY header of any other visitor, and
        the reason. `proxy_header`: put the visitor's PROXY header in front of each stream. Raises `UsageError` or
        `ConfigError` where there is no identity, or an unknown name is to be admitted.
        """
        if not isinstance(engine, Pump):
            raise UsageError("private tunnels need epoll, which this system does not have")
        self.engine = engine
        self.identity = load_identity(settings.identity)
        self.address = Private(self.identity.id, settings.name)
        self.on_visitor = on_visitor
        self.on_failed = on_failed
        self.proxy_header = proxy_header
        self.invitations = Invitations()
        self._admit = settings.admit
        self._trusted = TrustedPeers()
        self._reporter = reporter
        self._preambles: dict[PreambleAwaited, None] = {}  # oldest first
        self._handshakes: dict[TlsOverEnd, bytes] = {}  # the same, with their PROXY headers
        self._sessions: dict[PrivateSession, NodeId] = {}
        self._retired = False
        for reference in self._admit:
            if reference != ANY_PEER:
                self._trusted.find(reference)

    def claim(self, credential: str) -> str:
        """The option `private` with which a tunnel is opened as this credential; empty: its name is not known."""
        signature = self.identity.sign(claimed_text(credential, self.address.name))
        return str(PrivateClaim(self.identity.public_key(), signature))

    def take(self, visitor: VisitorConnection, header: bytes) -> None:
        """Begin with a visitor; never blocks. Owns `visitor` from now on."""
        try:
            end = buffered_end(self.engine, visitor)
        except OSError as error:
            self.on_failed(header, reason_of(error))
            return
        pending = PreambleAwaited(self, end, header)
        self._preambles[pending] = None
        if len(self._preambles) > MAX_PENDING:
            next(iter(self._preambles)).give_up("it had not sent its certificate when too many others came")
        pending.start()

    def find_peer(self, node: NodeId) -> AdmittedPeer:
        """Whether the visitor with this id may enter, as far as an id can tell. Raises `TunneldError` with the reason
        where it may not.
        """
        if list(self._sessions.values()).count(node) >= MAX_SESSIONS:
            raise UsageError(f"too many sessions: {node} has {MAX_SESSIONS}")
        known = self._trusted.name_of(node)
        if self._is_admitted(node, known):
            return AdmittedPeer(node, known or str(node), self.identity)
        invitation = self.invitations.find(node, self.address.name)
        if invitation is not None:
            return AdmittedPeer(node, ONE_TIME, invitation.host, is_invited=True)
        raise UsageError(f"not admitted: {node}; to let it in, add --admit {known or node}")

    def retire(self) -> None:
        """Take no more visitors; each session ends with its last stream."""
        self._retired = True
        for session in list(self._sessions):
            session.retire()

    def close(self) -> None:
        """End all sessions."""
        for session in list(self._sessions):
            session.close("the agent stopped")

    def _is_admitted(self, node: NodeId, known: str) -> bool:
        return any(self._fits(reference, node, known) for reference in self._admit)

    def _fits(self, reference: str, node: NodeId, known: str) -> bool:
        """Whether an entry of `admit` means this node. A name that was removed means none."""
        if reference == ANY_PEER:
            return bool(known)
        try:
            return self._trusted.find(reference) == node
        except UsageError:
            return False

    # Called by the visitors

    def left_preamble(self, pending: PreambleAwaited) -> None:
        """A visitor has sent its certificate, or is gone."""
        self._preambles.pop(pending, None)

    def shake_hands(self, end: BufferedEnd, peer: AdmittedPeer, certificate: bytes, header: bytes, rest: bytes) -> None:
        """Send our certificate, and begin the handshake. `rest` was received behind the visitor's."""
        name = "" if peer.is_invited else self.address.name
        try:
            context = context_for(peer.host, certificate, name, server_side=True)
            end.send(encode_certificate(peer.host.certificate))
        except (OSError, TunneldError) as error:
            end.reset("not served")
            self.on_failed(header, str(error))
            return

        def on_done(tls: TlsOverEnd, error: OSError | None) -> None:
            self._handshakes.pop(tls, None)
            self._finish(tls, error, peer, header, name)

        tls = TlsOverEnd(end, context, on_done)
        self._handshakes[tls] = header
        if len(self._handshakes) > MAX_PENDING:
            oldest = next(iter(self._handshakes))
            oldest_header = self._handshakes.pop(oldest)
            oldest.reset("too many handshakes")
            self.on_failed(oldest_header, "its TLS handshake was not done when too many others came")
        tls.start(rest, HANDSHAKE_TIMEOUT)

    def _finish(self, tls: TlsOverEnd, error: OSError | None, peer: AdmittedPeer, header: bytes, name: str) -> None:
        if error is not None:
            self.on_failed(
                header, f"not admitted: {peer.title} ({peer.node}): TLS handshake failed: {reason_of(error)}"
            )
            return
        if tls.protocol != protocol_of(name):
            tls.reset("not the tunnel that was asked for")
            self.on_failed(header, f"not admitted: {peer.title} asked for another tunnel than {self.address.name}")
            return
        if peer.is_invited and not self.invitations.use_up(peer.node):
            tls.reset("the code was used already")
            self.on_failed(header, "not admitted: the one-time code was used already")
            return
        self._reporter.report("admitted", visitor=visitor_address(header), peer=peer.title, id=str(peer.node))
        events = SessionEvents(self.on_visitor, partial(self._refusal, peer), self.on_failed, self._on_over)
        try:
            session = PrivateSession(self.engine, tls, header, events, keep_header=self.proxy_header)
        except OSError as lost:
            self.on_failed(header, reason_of(lost))
            return
        self._sessions[session] = peer.node
        if self._retired:
            session.retire()

    def _refusal(self, peer: AdmittedPeer) -> str:
        """Why a peer with a session gets no further stream: it is trusted no more. Those that it has go on."""
        try:
            known = self._trusted.name_of(peer.node)
            admitted = peer.is_invited or self._is_admitted(peer.node, known)
        except ConfigError as error:
            return str(error)
        return "" if admitted else f"not admitted any more: {peer.title} ({peer.node})"

    def _on_over(self, session: PrivateSession) -> None:
        self._sessions.pop(session, None)


class PreambleAwaited:
    """One visitor, until its certificate has come. The handler of its end until then."""

    __slots__ = ("_end", "_header", "_owner", "_received", "deadline")

    def __init__(self, owner: PrivateVisitors, end: BufferedEnd, header: bytes) -> None:
        self._owner = owner
        self._end = end
        self._header = header
        self._received = b""
        self.deadline = owner.engine.now() + PREAMBLE_TIMEOUT

    def start(self) -> None:
        """Wait for the certificate, which may be there already."""
        self._owner.engine.timers.watch(self)
        self._end.handler = self
        self._end.deliver_buffered()

    def give_up(self, reason: str) -> None:
        """Close the visitor."""
        self._leave()
        self._end.reset("not served")
        self._owner.on_failed(self._header, reason)

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Take bytes until the certificate is complete."""
        taken = min(len(data), MAX_MESSAGE - len(self._received))
        self._received += data[:taken]
        try:
            message = parse_preamble(self._received)
            if message is None:
                return taken
            if message.kind != CERTIFICATE:
                raise RemoteProtocolError("the visitor sent no certificate")
            peer = self._owner.find_peer(node_id(message.body))
        except ConfigError as error:
            self._refuse(str(error), "its configuration has a mistake")
            return len(data)
        except (RemoteProtocolError, UsageError) as error:
            self._refuse(str(error), str(error).partition(";")[0])
            return len(data)
        self._leave()
        self._end.handler = NO_HANDLER
        rest = self._received[message.size :]
        self._owner.shake_hands(self._end, peer, message.body, self._header, rest)
        return taken

    def on_eof(self) -> None:
        """The visitor ended first."""
        self.give_up("the visitor left before it sent its certificate")

    def on_writable(self) -> None:
        """Nothing waits to be sent."""

    def on_write_failed(self, error: OSError) -> None:
        """The visitor takes no answer."""
        self.give_up(reason_of(error))

    def on_reset(self, error: OSError) -> None:
        """The visitor is gone."""
        self.give_up(reason_of(error))

    def on_internal_error(self, error: Exception) -> None:
        """A bug. The end has been reset."""
        self.give_up(f"internal error: {error!r}")

    def on_deadline(self) -> None:
        """The visitor is late."""
        self.give_up(f"no certificate within {PREAMBLE_TIMEOUT:g} s")

    # Internal

    def _refuse(self, reason: str, answer: str) -> None:
        """Tell the visitor the `answer`, this user the `reason`, and close."""
        self._leave()
        end = self._end
        end.handler = NO_HANDLER
        try:
            end.send(encode_refusal(answer))
            end.release()
        except OSError:
            end.reset("not served")
        self._owner.on_failed(self._header, reason)

    def _leave(self) -> None:
        self._owner.engine.timers.forget(self)
        self._owner.left_preamble(self)


def protocol_of(name: str) -> str:
    """The protocol in the handshake (ALPN): both ends agree on the tunnel's name, so the relay cannot lead a visitor to
    another tunnel of the same node. A visitor with a one-time code does not know the name; its keys serve one tunnel.
    """
    return f"{PROTOCOL}:{name}" if name else PROTOCOL


@lru_cache(maxsize=64)  # a peer visits again and again, and making a context takes longer than the handshake
def context_for(own: Identity, certificate: bytes, name: str, *, server_side: bool) -> ssl.SSLContext:
    """The context of one end of a visit, see `peer_context`."""
    return peer_context(own, certificate, server_side=server_side, protocol=protocol_of(name))
