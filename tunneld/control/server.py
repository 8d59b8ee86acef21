"""The control port: accepts connections, limits their number, and does TLS. `session` then talks to each peer.

serve_lines
├─ listener                see net/listeners.py; a refused connection gets one line, if that is cheap, and is closed
└─ connection ×N           TLS handshake and authentication under one deadline, then a `ControlSession`
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
import trio

from tunneld import __version__
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthRefusal, PreauthSlot
from tunneld.config.schema import ControlSettings
from tunneld.control.connection import LineConnection, PeerLeftError, reason_of_failure
from tunneld.control.login import LoginState
from tunneld.control.session import ControlSession
from tunneld.directory.reply import Execute
from tunneld.errors import LimitReachedError
from tunneld.net.accept import local_address
from tunneld.net.endpoint import format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.net.sockets import taken_out
from tunneld.policy.access import EVERYBODY, Grant
from tunneld.policy.places import Place, PlaceLimits, Places
from tunneld.tls.connection import HANDSHAKE, shake_hands
from tunneld.tls.session import is_truncation
from tunneld.tls.stream import TlsStream
from tunneld.wire.lines import format_err

FEATURES = "opens=described tunnels=shared"
"""What this relay can do that relays of earlier versions cannot, for the greeting."""

log: structlog.stdlib.BoundLogger = structlog.get_logger("control")


class PreauthError(PeerLeftError):
    """The peer sent something that is no acceptable TLS handshake, which counts as a failed login. A peer that closes
    the connection without a word, as probes do, raises the base class instead.
    """


async def serve_lines(
    listener: ReloadableListener,
    settings: Callable[[], ControlSettings],
    tls: Callable[[], ssl.SSLContext | None],
    execute: Execute,
    authenticator: Authenticator | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control protocol on `listener` until cancelled, then close every connection.

    `settings` is called at each use, so a reload applies to connections that are open; `tls` is called for each
    handshake. Without an `authenticator` every peer is admitted, with the role admin.
    """
    server = _LineServer(settings, tls, execute, authenticator or Authenticator(lambda: ()))
    async with trio.open_nursery() as nursery:
        accept = partial(server.accept, nursery)
        await nursery.start(partial(listener.serve, accept, on_shared=partial(accept, shares_port=True)))
        task_status.started()


class _LineServer:
    def __init__(
        self,
        settings: Callable[[], ControlSettings],
        tls: Callable[[], ssl.SSLContext | None],
        execute: Execute,
        authenticator: Authenticator,
    ) -> None:
        self._settings = settings
        self._tls = tls
        self._execute = execute
        self._authenticator = authenticator
        self._places = Places("control connection", "control.max_connections", self._place_limits)
        self._full_logged = False  # one warning per time the limit is reached, not one per connection

    def accept(self, nursery: trio.Nursery, connection: socket.socket, peer: Any, *, shares_port: bool = False) -> None:
        """Take an accepted connection: start its task in `nursery`, or refuse and close it. `shares_port`: it came by
        the HTTPS port, and its peer is told that carriers may, too.
        """
        host = peer[0]
        if (reason := self._places.full) is not None:
            if not self._full_logged:
                event, limit = "control connection limit reached", self._settings().max_connections
                self._authenticator.log_limited(log.warning, event, "control", max_connections=limit)
            self._full_logged = True
            _refuse(connection, f"{reason}; try again later")
            return
        self._full_logged = False
        place = Place(self._places)
        if self._admits_all():
            slot: PreauthSlot | PreauthRefusal = PreauthSlot.exempt()
            place.claim(EVERYBODY)
        else:
            slot = self._authenticator.preauth.acquire(host, trio.current_time(), random.random())
        if isinstance(slot, PreauthRefusal):
            self._authenticator.log_refusal(host, "control", slot)
            _refuse(connection, slot.reason)
            return
        deadline = trio.current_time() + self._settings().handshake_timeout
        transport = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        more = f"{FEATURES} carriers=here" if shares_port else FEATURES
        nursery.start_soon(self._serve, transport, peer, slot, place, deadline, more)

    def _admits_all(self) -> bool:
        """Whether neither a secret nor a client certificate is required."""
        tls = self._tls()
        return self._authenticator.is_open and (tls is None or tls.verify_mode == ssl.CERT_NONE)

    def _place_limits(self) -> PlaceLimits:
        settings = self._settings()
        return PlaceLimits(settings.max_connections, settings.reserved_connections, settings.credential_share)

    async def _serve(
        self, transport: trio.SocketStream, peer: Any, slot: PreauthSlot, place: Place, deadline: float, more: str
    ) -> None:
        """Serve one connection and handle every error on it; it must authenticate by `deadline` (Trio's clock). `more`
        is added to the greeting.
        """
        bound, refusal = log.bind(peer=format_peer(peer)), None
        try:
            async with transport:
                bound.debug("control connection accepted")
                if (stream := await self._encrypt(transport, slot, deadline, bound)) is not None:
                    async with LineConnection(stream, self._settings) as connection:
                        login = _begin_login(self._authenticator, peer, stream, slot, place)
                        try:
                            login.enter()
                        except LimitReachedError as error:
                            refusal = error
                        session = ControlSession(connection, login, self._settings, self._execute, bound)
                        try:
                            await session.run(
                                f"tunneld {__version__} protocol=1 {more} auth={login.method}",
                                deadline,
                                refusal,
                            )
                        finally:
                            login.close()
                bound.debug("control connection closed")
        except (PeerLeftError, trio.BrokenResourceError, OSError) as error:
            bound.debug("control connection lost", reason=str(error))
        except Exception:
            bound.exception("control connection failed: a bug")
        finally:
            place.release()
            if trio.current_time() >= deadline:
                slot.fail(trio.current_time())
            slot.close(trio.current_time())

    async def _encrypt(
        self, transport: trio.SocketStream, slot: PreauthSlot, deadline: float, bound: structlog.stdlib.BoundLogger
    ) -> trio.SocketStream | TlsStream | None:
        """The stream of the session; None if TLS is required and its handshake fails or is not done by `deadline`."""
        if (tls := self._tls()) is None:
            return transport
        reason = f"not done within {self._settings().handshake_timeout:g} s (control.handshake_timeout)"
        with trio.move_on_at(deadline):
            try:
                return await _do_handshake(transport, tls, self._settings, slot)
            except PeerLeftError as error:
                reason = str(error)
                if isinstance(error, PreauthError):
                    slot.fail(trio.current_time())
        event = "TLS handshake on control connection failed"
        self._authenticator.log_limited(bound.info, event, "control", reason=reason)
        return None


async def _do_handshake(
    transport: trio.SocketStream, tls: ssl.SSLContext, settings: Callable[[], ControlSettings], slot: PreauthSlot
) -> TlsStream:
    """Do the server side of a TLS handshake; a peer that speaks plain text gets an error line. Raises `PreauthError` or
    `PeerLeftError`.
    """
    first = await transport.socket.recv(1, socket.MSG_PEEK)
    slot.has_begun = bool(first)
    if first and first != HANDSHAKE:  # a person with nc, for example
        plain = LineConnection(transport, settings)
        await plain.send(format_err("protocol", "this port speaks TLS; use tls:// or openssl s_client"))
        await plain.discard_input()
        raise PreauthError("peer spoke plain text")
    try:
        return TlsStream(await shake_hands(taken_out(transport.socket), tls, server_side=True))
    except OSError as error:  # closing early is no failed login: it may be an agent that gave up waiting for us
        is_failure = isinstance(error, ssl.SSLError) and not is_truncation(error)
        raise (PreauthError if is_failure else PeerLeftError)(reason_of_failure(error)) from None


def _begin_login(
    authenticator: Authenticator,
    peer: Any,
    stream: trio.SocketStream | TlsStream,
    slot: PreauthSlot,
    place: Place,
) -> LoginState:
    """The login state of a new connection. When the peer has authenticated, `place` is claimed and `slot` released.
    Behind a proxy, `peer` is not the peer of the socket.
    """

    def on_authenticated(grant: Grant) -> None:
        place.claim(grant)
        slot.release()

    certificate = None
    if isinstance(stream, TlsStream):
        certificate = stream.peer_certificate  # TLS returns a certificate only if it has verified it
    local = local_address(stream.socket)[0]
    return LoginState(authenticator, peer[0], format_peer(peer), local, certificate, on_authenticated, slot)


def _refuse(connection: socket.socket, reason: str) -> None:
    """Send one error line and close, without waiting: the send buffer of a new socket has space for a line. If the line
    cannot be sent, it is dropped. On a port with TLS, too, it is plain text, since a handshake would cost too much;
    `tunnel` shows it.
    """
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.send(format_err("limit", reason))
        connection.shutdown(socket.SHUT_WR)
