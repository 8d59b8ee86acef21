"""The visiting end of a private tunnel: how a session with its host is made, and `visit` for programs.

the relay is asked ──► preamble: our certificate, the host's ──► TLS 1.3, both keys pinned ──► VisitSession
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from tunneld.agent.access import RelayAccess
from tunneld.agent.private import HANDSHAKE_TIMEOUT, context_for, protocol_of
from tunneld.agent.visit_session import VisitSession
from tunneld.client.client import check_trio
from tunneld.config.trust import TrustedPeers, load_identity
from tunneld.engine import new_engine
from tunneld.engine.end import NO_HANDLER, BufferedEnd
from tunneld.engine.end_stream import EndStream
from tunneld.engine.engine import Engine
from tunneld.engine.plain_transport import PlainTransport
from tunneld.engine.pump import Pump
from tunneld.engine.tls_end import TlsEnd
from tunneld.engine.tls_over_end import TlsOverEnd
from tunneld.errors import (
    NotAllowedError,
    RefusedError,
    RelayUnreachableError,
    RemoteProtocolError,
    TunneldError,
    UsageError,
    reason_of,
)
from tunneld.net.address import Private
from tunneld.net.node_id import NodeId
from tunneld.tls.connection import TlsSocket
from tunneld.tls.identity import Identity, node_id
from tunneld.tls.one_time import OneTimeCode
from tunneld.wire.preamble import CERTIFICATE, LEAVE_TLS, MAX_MESSAGE, encode_certificate, parse_preamble

PAIRING_WAIT = 30.0
"""Seconds for the relay to get a connection to the host, beyond those for any answer (tunnels.pairing_timeout)."""
CLOSE_TIMEOUT = 3.0
"""Seconds after the block of `visit` for what was sent to arrive, and for the host to close."""
HOST_TIMEOUT = 20.0
"""Seconds for the host's certificate: both ends' lines may be slow."""


@dataclass(frozen=True, slots=True)
class VisitedTunnel:
    """What is visited, by which key it is known, and which key we show. Made by `known` and `invited`."""

    asked_for: str  # at the relay: NAME@ID, or a ticket
    title: str  # for people
    host: NodeId
    identity: Identity
    name: str  # on which both ends agree; empty for an invitation

    @classmethod
    def known(cls, address: Private, title: str, identity: Identity) -> VisitedTunnel:
        """A tunnel whose host we know, and which knows us."""
        return cls(str(address), title, address.node, identity, address.name)

    @classmethod
    def invited(cls, code: OneTimeCode) -> VisitedTunnel:
        """The tunnel that a one-time code is for."""
        return cls(code.ticket, "the tunnel of this code", code.host.id, code.visitor, "")


async def open_session(engine: Engine, relay: RelayAccess, tunnel: VisitedTunnel) -> VisitSession:
    """Open a session with the host of a tunnel, which the caller owns.

    Raises `RefusedError` where the relay or the host refuses, `RemoteProtocolError` where it is not the host,
    `RelayUnreachableError`, and `UsageError`.
    """
    if not isinstance(engine, Pump):
        raise UsageError("private tunnels need epoll, which this system does not have")
    connection, received, answer = await relay.visit(tunnel.asked_for, PAIRING_WAIT)
    end = TlsEnd(engine, connection if isinstance(connection, TlsSocket) else PlainTransport(connection))
    end.unread(received)
    try:
        address = (
            connection.getsockname() if isinstance(connection, socket.socket) else connection.connection.getsockname()
        )
        end.start()
    except OSError as error:
        connection.close()
        raise RelayUnreachableError(f"the relay closed the connection to {tunnel.title}: {reason_of(error)}") from None
    visit = _HostAwaited(end, tunnel)
    try:
        visit.start()
        await visit.done.wait()
    except BaseException:
        visit.give_up()
        raise
    if visit.result is None:
        raise visit.error
    try:
        return VisitSession(engine, visit.result, address, leave_tls=answer.endswith(f" {LEAVE_TLS}"))
    except OSError as error:
        raise RelayUnreachableError(f"the connection to {tunnel.title} was lost: {reason_of(error)}") from None


class _HostAwaited:
    """One visit until its handshake is done. The handler of its end until the host's certificate has come."""

    def __init__(self, end: BufferedEnd, tunnel: VisitedTunnel) -> None:
        self.done = trio.Event()
        self.result: TlsOverEnd | None = None
        self.error = TunneldError()
        self.deadline = end.engine.now() + HOST_TIMEOUT
        self._end = end
        self._tls: TlsOverEnd | None = None  # during the handshake
        self._tunnel = tunnel
        self._received = b""

    def start(self) -> None:
        """Send our certificate, and wait for the host's."""
        self._end.engine.timers.watch(self)
        self._end.handler = self
        self._end.send(encode_certificate(self._tunnel.identity.certificate))
        self._end.deliver_buffered()

    def give_up(self) -> None:
        """The caller needs it no more."""
        self._end.engine.timers.forget(self)
        (self.result or self._tls or self._end).reset("cancelled")

    # The handler of the end

    def on_data(self, data: memoryview) -> int:
        """Take bytes until the host's message is complete."""
        taken = min(len(data), MAX_MESSAGE - len(self._received))
        self._received += data[:taken]
        tunnel = self._tunnel
        try:
            message = parse_preamble(self._received)
            if message is None:
                return taken
            if message.kind != CERTIFICATE:
                hint = "" if tunnel.name else "; a code is good for one visit, within its time"
                text = f"{tunnel.title} refused the visit: {message.text}{hint}"
                self._fail(RefusedError(NotAllowedError.code, text))
                return taken
            shown = node_id(message.body)
            if shown != tunnel.host:
                raise RemoteProtocolError(f"its id is {shown}, not {tunnel.host}")
            context = context_for(tunnel.identity, message.body, tunnel.name, server_side=False)
        except RemoteProtocolError as error:
            self._fail(
                RemoteProtocolError(
                    f"this is not {tunnel.title}: {error}; the relay led the visit elsewhere, or the host has a new key"
                )
            )
            return taken
        self._end.engine.timers.forget(self)
        self._end.handler = NO_HANDLER
        rest = self._received[message.size :]
        self._tls = TlsOverEnd(self._end, context, self._on_tls, server_side=False)
        self._tls.start(rest, HANDSHAKE_TIMEOUT)
        return taken

    def on_eof(self) -> None:
        """The host, or the relay, ended first."""
        self._fail(RelayUnreachableError(f"{self._tunnel.title} closed the connection without an answer"))

    def on_writable(self) -> None:
        """Nothing waits to be sent."""

    def on_write_failed(self, error: OSError) -> None:
        """The relay takes no more bytes."""
        self.on_reset(error)

    def on_reset(self, error: OSError) -> None:
        """The connection is lost."""
        self._fail(RelayUnreachableError(f"the connection to {self._tunnel.title} was lost: {reason_of(error)}"))

    def on_internal_error(self, error: Exception) -> None:
        """A bug."""
        self._fail(RelayUnreachableError(f"internal error: {error!r}"))

    def on_deadline(self) -> None:
        """The host is late."""
        self._fail(RelayUnreachableError(f"{self._tunnel.title} sent no certificate within {HOST_TIMEOUT:g} s"))

    # Internal

    def _on_tls(self, tls: TlsOverEnd, error: OSError | None) -> None:
        tunnel = self._tunnel
        if error is not None:
            text = f"the handshake with {tunnel.title} failed: {reason_of(error)}"
            self._finish(RemoteProtocolError(f"{text}; it does not have the key, or does not admit yours"))
        elif tls.protocol != protocol_of(tunnel.name):
            tls.close("another tunnel")
            self._finish(RemoteProtocolError(f"the relay led the visit to another tunnel than {tunnel.title}"))
        else:
            self.result = tls
            self.done.set()

    def _fail(self, error: TunneldError) -> None:
        self._end.engine.timers.forget(self)
        self._end.reset("given up")
        self._finish(error)

    def _finish(self, error: TunneldError) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()


@asynccontextmanager
async def visit(
    relay: str,
    tunnel: str,
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = 10.0,
    credential: tuple[str, str] | None = None,
    identity: str | Path | None = None,
) -> AsyncIterator[trio.abc.HalfCloseableStream]:
    """Visit a private tunnel, and yield the connection to its local server, which is closed after the block.

    `tunnel` is `NAME@PEER`, where the peer is known by `tunnel trust` or given by its id; or a one-time code of
    `tunnel invite`. `identity` is the file of the private key to show, by default that of this user. The other
    arguments are those of `tunneld.connect`.

    Raises what `tunneld.connect` raises, `RefusedError` also where the other end does not admit this identity, and
    `RemoteProtocolError` where it does not have the key that is expected.

        async with tunneld.visit("relay.example.org:7010", "shell@alice") as stream:
            print(await stream.receive_some())
    """
    check_trio()
    if "@" in tunnel:
        key = load_identity(None if identity is None else Path(identity))
        visited = VisitedTunnel.known(TrustedPeers().resolve(tunnel), tunnel, key)
    else:
        visited = VisitedTunnel.invited(OneTimeCode.parse(tunnel))
    failure: TunneldError | None = None
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        try:
            session = await open_session(engine, RelayAccess(relay, tls, timeout, credential), visited)
            stream = EndStream(session.open())
        except TunneldError as error:  # raised after the nursery, which would wrap it in an exception group
            failure = error
        else:
            try:
                yield stream
            finally:
                await _close(stream)
                await session.finish()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _close(stream: EndStream) -> None:
    """End a visit so that everything arrives, as far as the host takes it."""
    with (
        suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        trio.move_on_after(CLOSE_TIMEOUT, shield=True),
    ):
        await stream.send_eof()
        while await stream.receive_some():
            pass
