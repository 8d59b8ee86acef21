"""From a door to connections.

    serve
    ├─ door                    see doors.py
    └─ connection ×M           see connection.py

The accept loop is ours and not `hypercorn.trio.serve`, which takes connections without number and ends with the first
exception out of one.
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
from tunneld.control.verbs import DaemonControl
from tunneld.errors import reason_of
from tunneld.http.app import new_app
from tunneld.http.auth import ConnectionInfo
from tunneld.http.connection import HttpConnection
from tunneld.http.translate import plain
from tunneld.net.endpoint import format_peer
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.connection import HANDSHAKE, TlsSocket, TlsStream

log = structlog.get_logger("http")

KIB = 1024

MAX_HEAD = 16 * KIB
"""Octets: a browser's head with cookies is below 8 KiB, a program's below 1."""

QUEUE = 2
"""Pieces of a body, of up to 64 KiB each, that wait for the application before Hypercorn stops reading."""


PLAIN = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nthis port speaks https\n"
"""To whom speaks without TLS where it is wanted."""


class HttpServer:
    """The connections of one call of `serve`."""

    def __init__(
        self, app: AppWrapper, daemon: DaemonControl, gate: Authenticator, tls: Callable[[], ssl.SSLContext | None]
    ) -> None:
        self._gate = gate
        self._app = app
        self._daemon = daemon
        self._tls = tls
        self._open = 0

    async def handle(self, connection: socket.socket) -> None:
        """Speak HTTP on one connection, and close it. Whatever goes wrong costs this connection."""
        settings = self._daemon.settings.http
        if self._open >= settings.max_connections:
            log.warning("http connection refused", reason=f"{self._open} are open (http.max_connections)")
            connection.close()
            return
        self._open += 1
        stream: trio.SocketStream | TlsStream | None = None
        guest = None
        try:
            guest = self._meet(connection)
            stream = await self._encrypt(connection, guest) if guest is not None else None
            if guest is not None and stream is not None:
                config = _config(settings.keep_alive_timeout)
                await HttpConnection(stream, self._app, config, settings.write_timeout, guest).run()
        except* (OSError, trio.BrokenResourceError):
            pass  # the peer was gone before we looked
        except* Exception as group:
            _log_failure(group)
        finally:
            self._open -= 1
            if guest is not None:
                guest.stranger.release()
            if stream is not None:
                await trio.aclose_forcefully(stream)
            connection.close()

    def _meet(self, connection: socket.socket) -> ConnectionInfo | None:
        """Who comes is a stranger, unless nobody is asked who they are, or they are on this machine; None: there is no
        place for one, or their source has a penalty, from whichever face. Raises `OSError` where the peer left already.
        """
        host, now = plain(connection.getpeername()[0]), trio.current_time()
        strangers = self._gate.preauth
        context = self._tls()
        asked = not self._gate.is_open or (context is not None and context.verify_mode != ssl.CERT_NONE)
        if not asked or strangers.is_exempt(host):
            refusal = strangers.refuse_penalised(host, now)
            stranger = PreauthSlot.exempt() if refusal is None else refusal
        else:
            stranger = strangers.acquire(host, now, random.random())
        if isinstance(stranger, PreauthRefusal):
            self._gate.log_refusal(host, "http", stranger)
            return None
        return ConnectionInfo(stranger, deadline=now + self._daemon.settings.control.handshake_timeout)

    async def _encrypt(self, connection: socket.socket, guest: ConnectionInfo) -> trio.SocketStream | TlsStream | None:
        """The stream to talk on; None where TLS is wanted and the peer does not manage it in time."""
        if (context := self._tls()) is None:
            twin = socket.socket(fileno=connection.detach())
            twin.setblocking(False)
            return trio.SocketStream(trio.socket.from_stdlib_socket(twin))
        peer, reason = format_peer(connection.getpeername()), "not done in time (control.handshake_timeout)"
        with trio.move_on_at(guest.deadline):
            try:
                stream = await _shake_hands(connection, context, guest)
            except OSError as error:
                reason = reason_of(error)
            else:
                if self._gate.is_open:  # its certificate is all that is asked for
                    guest.stranger.release()
                return stream
        guest.stranger.fail(trio.current_time())
        log.info("TLS handshake on http connection failed", peer=peer, reason=reason)
        return None


async def _shake_hands(connection: socket.socket, context: ssl.SSLContext, guest: ConnectionInfo) -> TlsStream:
    await trio.lowlevel.wait_readable(connection)
    first = connection.recv(1, socket.MSG_PEEK)
    if not first:
        raise OSError("left without a word")
    if first != HANDSHAKE:
        connection.send(PLAIN)
        connection.recv(MAX_HEAD)  # closing on unread octets is a reset, and a reset destroys what we said
        raise OSError("peer spoke plain text")
    tls = TlsSocket(connection, context, server_side=True)
    await tls.shake_hands()
    guest.certificate = tls.peer_certificate
    return TlsStream(tls)


async def serve(
    door: ReloadableListener,
    daemon: DaemonControl,
    gate: Authenticator | None = None,
    tls: Callable[[], ssl.SSLContext | None] = lambda: None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve HTTP to all who come through `door` until cancelled. Every key of `[http]` is read from `daemon` when it is
    needed, `tls` is asked at each handshake. Without a `gate` everybody is admitted, and is an admin.
    """
    gate = gate or Authenticator(lambda: ())
    app = cast("Any", new_app(daemon, gate))  # two libraries, two descriptions of ASGI
    server = HttpServer(wrap_app(app, 0, "asgi"), daemon, gate, tls)
    async with trio.open_nursery() as nursery:

        def arrive(connection: socket.socket, _peer: Any) -> None:
            nursery.start_soon(server.handle, connection)

        await nursery.start(door.serve, arrive)
        task_status.started()


def _log_failure(error: BaseExceptionGroup[Exception]) -> None:
    """A bug, of ours or of Hypercorn, which in a cancelled task answers again where an answer was cut: that is none."""
    if trio.current_effective_deadline() == -math.inf:
        return
    log.error("http connection failed", exc_info=error)


@lru_cache(maxsize=1)
def _config(keep_alive_timeout: float) -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = keep_alive_timeout
    config.h11_max_incomplete_size = MAX_HEAD
    config.max_app_queue_size = QUEUE
    return config
