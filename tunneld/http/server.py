"""The HTTP port: accepts connections, limits their number, and does TLS.

    serve
    ├─ page                    see page/stream.py
    ├─ listener                see net/listeners.py
    └─ connection ×N           see connection.py

`hypercorn.trio.serve` is not used, because it accepts any number of connections and ends with the first exception of
one.
"""

from __future__ import annotations

import logging
import math
import random
import socket
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.typing import AppWrapper
from hypercorn.utils import wrap_app

from tunneld.auth.authenticator import Authenticator
from tunneld.auth.preauth import PreauthRefusal, PreauthSlot
from tunneld.config.values import KIB
from tunneld.control.commands import executor
from tunneld.control.verbs import DaemonControl
from tunneld.errors import LimitReachedError, reason_of
from tunneld.http.app import new_app
from tunneld.http.auth import ConnectionInfo
from tunneld.http.connection import ApiConnection
from tunneld.http.page.page import WebPage
from tunneld.http.translate import bare_address
from tunneld.net.accept import peer_address
from tunneld.net.endpoint import format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.policy.access import EVERYBODY
from tunneld.policy.places import Place, PlaceLimits, Places
from tunneld.tls.connection import HANDSHAKE, TlsSocket
from tunneld.tls.session import is_truncation
from tunneld.tls.stream import TlsStream

log = structlog.get_logger("http")

MAX_HEAD_BYTES = 16 * KIB
"""The head of a request: with the cookies of a browser it is below 8 KiB, that of a program below 1 KiB."""

BODY_QUEUE_LENGTH = 2
"""Pieces of a body, of up to 64 KiB each, queued for the application before Hypercorn stops reading."""

PLAIN_TEXT_REPLY = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nthis port speaks https\n"
)
"""The reply to a client that speaks plain HTTP to a port with TLS."""


class HttpServer:
    """The connections of one call of `serve`. `tls` is called for each handshake."""

    def __init__(
        self,
        app: AppWrapper,
        daemon: DaemonControl,
        authenticator: Authenticator,
        tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        self._authenticator = authenticator
        self._app = app
        self._daemon = daemon
        self._tls = tls
        self._places = Places("HTTP connection", "http.max_connections", self._place_limits)

    async def handle(self, connection: socket.socket) -> None:
        """Serve one accepted connection and close it. An error of any kind ends this connection only."""
        settings = self._daemon.settings.http
        if (reason := self._places.full) is not None:
            self._log_full(reason)
            connection.close()
            return
        stream: trio.SocketStream | TlsStream | None = None
        info = None
        try:
            info = self._admit(connection)
            stream = await self._encrypt(connection, info) if info is not None else None
            if info is not None and stream is not None:
                config = _config(settings.keep_alive_timeout)
                await ApiConnection(stream, self._app, config, settings.write_timeout, info).run()
        except* (OSError, trio.BrokenResourceError):
            pass  # the peer was gone before we looked
        except* LimitReachedError as group:
            self._log_full(str(group.exceptions[0]))
        except* Exception as group:
            _log_failure(group)
        finally:
            if info is not None:
                info.slot.close(trio.current_time())
                info.place.release()
            if stream is not None:
                await trio.aclose_forcefully(stream)
            connection.close()

    def _log_full(self, reason: str) -> None:
        self._authenticator.log_limited(log.warning, "HTTP connection refused", "http", reason=reason)

    def _place_limits(self) -> PlaceLimits:
        settings = self._daemon.settings
        maximum, reserved = settings.http.max_connections, settings.http.reserved_connections
        return PlaceLimits(maximum, reserved, settings.control.credential_share)

    def _admit(self, connection: socket.socket) -> ConnectionInfo | None:
        """Take or refuse a new connection: its information, with a slot if it must authenticate; None if refused.

        No slot is needed if the relay does not require authentication, or for a connection from this machine; such a
        connection has its place now, and is refused only if its source has a penalty, from any service. Raises
        `OSError` if the peer has left.
        """
        host, now = bare_address(peer_address(connection)[0]), trio.current_time()
        preauth = self._authenticator.preauth
        context = self._tls()
        required = not self._authenticator.is_open or (context is not None and context.verify_mode != ssl.CERT_NONE)
        is_exempt = not required or preauth.is_exempt(host)
        if is_exempt:
            refusal = preauth.refuse_penalised(host, now)
            slot = PreauthSlot.exempt() if refusal is None else refusal
        else:
            slot = preauth.acquire(host, now, random.random())
        if isinstance(slot, PreauthRefusal):
            self._authenticator.log_refusal(host, "http", slot)
            return None
        place = Place(self._places)
        if is_exempt:
            place.claim(EVERYBODY)
        return ConnectionInfo(slot, place=place, deadline=now + self._daemon.settings.control.handshake_timeout)

    async def _encrypt(self, connection: socket.socket, info: ConnectionInfo) -> trio.SocketStream | TlsStream | None:
        """The stream for HTTP; None if TLS is required and its handshake fails or is not done in time."""
        if (context := self._tls()) is None:
            sock = socket.socket(fileno=connection.detach())
            sock.setblocking(False)
            if self._authenticator.is_open:
                info.authenticated(EVERYBODY)
            return trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        peer, reason = format_peer(peer_address(connection)), "not done in time (control.handshake_timeout)"
        with trio.move_on_at(info.deadline) as scope:
            try:
                stream = await _do_handshake(connection, context, info)
            except OSError as error:
                reason = reason_of(error)
                if isinstance(error, ssl.SSLError) and not is_truncation(error):
                    info.slot.fail(trio.current_time())
            else:
                if self._authenticator.is_open:  # the certificate was all that is required
                    info.authenticated(EVERYBODY)
                return stream
        if scope.cancelled_caught:
            info.slot.fail(trio.current_time())
        event = "TLS handshake on HTTP connection failed"
        self._authenticator.log_limited(log.info, event, "http", peer=peer, reason=reason)
        return None


async def _do_handshake(connection: socket.socket, context: ssl.SSLContext, info: ConnectionInfo) -> TlsStream:
    await trio.lowlevel.wait_readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    info.slot.has_begun = bool(first)
    if not first:
        raise OSError("the peer closed the connection before the handshake")
    if first != HANDSHAKE:
        connection.send(PLAIN_TEXT_REPLY)
        connection.recv(MAX_HEAD_BYTES)  # closing with unread bytes sends a reset, which destroys the reply
        raise ssl.SSLError("peer spoke plain text")
    tls = TlsSocket(connection, context, server_side=True)
    await tls.shake_hands()
    info.certificate = tls.peer_certificate
    return TlsStream(tls)


async def serve(
    listener: ReloadableListener,
    daemon: DaemonControl,
    authenticator: Authenticator | None = None,
    tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve HTTP on `listener` until cancelled. Every key of `[http]` is read from `daemon` at each use, and `tls` is
    called for each handshake. Without an `authenticator` every request is admitted, with the role admin.
    """
    authenticator = authenticator or Authenticator(lambda: ())
    execute = executor(daemon)
    page = WebPage(authenticator, execute, lambda: daemon.settings.http.page)
    app = cast("Any", new_app(daemon, authenticator, page, execute))  # the libraries type ASGI differently
    server = HttpServer(wrap_app(app, 0, "asgi"), daemon, authenticator, tls)
    async with trio.open_nursery() as nursery:

        def on_connection(connection: socket.socket, _peer: Any) -> None:
            nursery.start_soon(server.handle, connection)

        await nursery.start(page.run)
        await nursery.start(listener.serve, on_connection)
        task_status.started()


def _log_failure(error: BaseExceptionGroup[Exception]) -> None:
    """Log a bug, of ours or of Hypercorn. What Hypercorn raises in a cancelled task, after a cut answer, is none."""
    if trio.current_effective_deadline() == -math.inf:
        return
    log.error("HTTP connection failed: a bug", exc_info=error)


@lru_cache(maxsize=1)
def _config(keep_alive_timeout: float) -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = keep_alive_timeout
    config.h11_max_incomplete_size = MAX_HEAD_BYTES
    config.max_app_queue_size = BODY_QUEUE_LENGTH
    return config
