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
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import structlog
import trio
from hypercorn.config import Config
from hypercorn.typing import AppWrapper
from hypercorn.utils import wrap_app

from tunneld.config.schema import Http
from tunneld.control.gate import Gate
from tunneld.control.http.app import new_app
from tunneld.control.http.connection import Connection
from tunneld.control.http.words import plain
from tunneld.control.verbs import Daemon
from tunneld.doors import Door

log = structlog.get_logger("http")

KIB = 1024

MAX_HEAD = 16 * KIB
"""Octets: a browser's head with cookies is below 8 KiB, a program's below 1."""

QUEUE = 2
"""Pieces of a body, of up to 64 KiB each, that wait for the application before Hypercorn stops reading."""


class Server:
    """The connections of one call of `serve`."""

    def __init__(self, app: AppWrapper, settings: Callable[[], Http], gate: Gate) -> None:
        self._gate = gate
        self._app = app
        self._settings = settings
        self._open = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        """Speak HTTP on one connection, and close it. Whatever goes wrong costs this connection."""
        try:
            await self._handle(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def _handle(self, stream: trio.SocketStream) -> None:
        settings = self._settings()
        if self._open >= settings.max_connections:
            log.warning("http connection refused", reason=f"{self._open} are open (http.max_connections)")
            return
        self._open += 1
        try:
            if not self._lets_in(stream):
                return
            await Connection(stream, self._app, _config(settings.keep_alive_timeout), settings.write_timeout).run()
        except* OSError:
            pass  # the peer was gone before we looked
        except* Exception as group:
            _log_failure(group)
        finally:
            self._open -= 1

    def _lets_in(self, stream: trio.SocketStream) -> bool:
        """Whether its source has no penalty, from whichever face. Raises `OSError` where the peer left already."""
        host = plain(stream.socket.getpeername()[0])
        refusal = self._gate.strangers.refuse_penalised(host, trio.current_time())
        if refusal is not None:
            self._gate.tell_refusal(host, "http", refusal)
        return refusal is None


async def serve(
    door: Door,
    daemon: Daemon,
    gate: Gate | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve HTTP to all who come through `door` until cancelled. Every key of `[http]` is read from `daemon` when it is
    needed. Without a `gate` everybody is admitted, and is an admin.
    """
    gate = gate or Gate(lambda: ())
    app = cast("Any", new_app(daemon, gate))  # two libraries, two descriptions of ASGI
    server = Server(wrap_app(app, 0, "asgi"), lambda: daemon.settings.http, gate)
    async with trio.open_nursery() as nursery:

        def arrive(connection: socket.socket, _peer: Any) -> None:
            nursery.start_soon(server.handle, trio.SocketStream(trio.socket.from_stdlib_socket(connection)))

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
