"""The line face of the control protocol: it accepts, encrypts, counts. What is said then is in `conversation`.

serve_lines
├─ door                    see doors.py; whom we refuse we tell so where that is cheap, and hang up
└─ connection ×N           TLS handshake and authentication under one deadline, then a conversation
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import structlog
import trio

from tunneld import __version__
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthRefusal, PreauthSlot
from tunneld.config.schema import ControlSettings
from tunneld.control.connection import TLS_HANDSHAKE, LineConnection, PeerLeftError, why
from tunneld.control.login import LoginState
from tunneld.control.reply import Execute
from tunneld.control.session import ControlSession
from tunneld.net.endpoint import format_peer, unmap
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.connection import is_truncation
from tunneld.wire.lines import format_err

log: structlog.stdlib.BoundLogger = structlog.get_logger("control")


class PreauthError(PeerLeftError):
    """The peer said what is no TLS handshake that we take, unlike one that left without a word, as probes do."""


async def serve_lines(
    door: ReloadableListener,
    settings: Callable[[], ControlSettings],
    tls: Callable[[], ssl.SSLContext | None],
    execute: Execute,
    gate: Authenticator | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control protocol to all who come through `door` until cancelled; then every connection is closed.

    `settings` is asked anew each time, so a reload applies to connections that are open; `tls` for each handshake.
    Without a `gate` everybody is admitted, and is an admin.
    """
    server = _LineServer(settings, tls, execute, gate or Authenticator(lambda: ()))
    async with trio.open_nursery() as nursery:
        await nursery.start(door.serve, lambda connection, peer: server.admit(connection, peer, nursery))
        task_status.started()


class _LineServer:
    def __init__(
        self,
        settings: Callable[[], ControlSettings],
        tls: Callable[[], ssl.SSLContext | None],
        execute: Execute,
        gate: Authenticator,
    ) -> None:
        self._settings = settings
        self._tls = tls
        self._execute = execute
        self._gate = gate
        self._connections = 0
        self._full = False  # said once, not once a connection

    def admit(self, connection: socket.socket, peer: Any, nursery: trio.Nursery) -> None:
        """Somebody connected. `nursery` owns the connections."""
        host = unmap(peer[0])
        limit = self._settings().max_connections
        if self._connections >= limit:
            if not self._full:
                log.warning("control turns connections away", max_connections=limit)
            self._full = True
            _turn_away(connection, f"{limit} control connections are open, no more are allowed; try again later")
            return
        self._full = False
        stranger = self._meet(host)
        if isinstance(stranger, PreauthRefusal):
            self._gate.log_refusal(host, "control", stranger)
            _turn_away(connection, stranger.reason if self._tls() is None else None)
            return
        self._connections += 1
        deadline = trio.current_time() + self._settings().handshake_timeout
        transport = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        nursery.start_soon(self._serve, transport, stranger, deadline)

    def _meet(self, host: str) -> PreauthSlot | PreauthRefusal:
        """Whoever comes is a stranger, unless nobody is asked who they are, by a secret or by TLS."""
        tls = self._tls()
        if self._gate.is_open and (tls is None or tls.verify_mode == ssl.CERT_NONE):
            return PreauthSlot.mark_authenticated()
        return self._gate.preauth.acquire(host, trio.current_time(), random.random())

    async def _serve(self, transport: trio.SocketStream, stranger: PreauthSlot, deadline: float) -> None:
        """One connection, whatever happens on it; a stranger has until `deadline`, a time of Trio's clock."""
        bound = log
        try:
            async with transport:
                bound = log.bind(peer=format_peer(transport.socket.getpeername()))
                bound.debug("control connection came")
                if (stream := await self._encrypt(transport, stranger, deadline, bound)) is not None:
                    async with LineConnection(stream, self._settings) as connection:
                        entry = _enter(self._gate, transport.socket, stream, stranger)
                        conversation = ControlSession(connection, entry, self._settings, self._execute, bound)
                        try:
                            await conversation.run(f"tunneld {__version__} protocol=1 auth={entry.method}", deadline)
                        finally:
                            entry.end()
                bound.debug("control connection ended")
        except (PeerLeftError, trio.BrokenResourceError, OSError) as error:
            bound.debug("control connection lost", reason=str(error))
        except Exception:
            bound.exception("control connection failed: a bug")
        finally:
            self._connections -= 1
            if trio.current_time() >= deadline:
                stranger.fail(trio.current_time())
            stranger.release()

    async def _encrypt(
        self, transport: trio.SocketStream, stranger: PreauthSlot, deadline: float, bound: structlog.stdlib.BoundLogger
    ) -> trio.abc.Stream | None:
        """The stream to talk on; None where TLS is wanted and the peer does not manage it in time."""
        if (tls := self._tls()) is None:
            return transport
        reason = f"not done in {self._settings().handshake_timeout:g} s"
        with trio.move_on_at(deadline):
            try:
                return await _shake_hands(transport, tls, self._settings)
            except PeerLeftError as error:
                reason = str(error)
                if isinstance(error, PreauthError):
                    stranger.fail(trio.current_time())
        bound.info("TLS handshake on control connection failed", reason=reason)
        return None


async def _shake_hands(
    transport: trio.SocketStream, tls: ssl.SSLContext, settings: Callable[[], ControlSettings]
) -> trio.SSLStream[trio.SocketStream]:
    first = await transport.socket.recv(1, socket.MSG_PEEK)
    if first and first != TLS_HANDSHAKE:  # somebody with nc: tell them
        plain = LineConnection(transport, settings)
        await plain.send(format_err("protocol", "this port speaks TLS; use tls:// or openssl s_client"))
        await plain.read_away()
        raise PreauthError("peer spoke plain text")
    stream = trio.SSLStream(transport, tls, server_side=True)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        cause = error.__cause__  # who leaves has not failed to prove anything: it may be an agent that we kept waiting
        strange = isinstance(cause, ssl.SSLError) and not is_truncation(cause)
        raise (PreauthError if strange else PeerLeftError)(why(error)) from None
    return stream


def _enter(
    gate: Authenticator, connection: trio.socket.SocketType, stream: trio.abc.Stream, stranger: PreauthSlot
) -> LoginState:
    """Who is at the other end, perhaps a stranger no more. Raises `OSError` where it left already."""
    peer = connection.getpeername()
    certificate = None
    if isinstance(stream, trio.SSLStream):
        certificate = stream.getpeercert(binary_form=True)  # TLS keeps only those that it has verified
    local = unmap(connection.getsockname()[0])
    entry = LoginState(gate, unmap(peer[0]), format_peer(peer), local, certificate, on_known=stranger.release)
    if entry.grant is not None:
        stranger.release()
    return entry


def _turn_away(connection: socket.socket, reason: str | None) -> None:
    """Say one line, if there is one, and hang up, without waiting: the buffer of a new socket takes a line, and if it
    does not, so be it.
    """
    with connection, suppress(OSError):
        connection.setblocking(False)
        if reason is not None:
            connection.send(format_err("limit", reason))
        connection.shutdown(socket.SHUT_WR)
