"""An inspector: the recorder and its page, on an address of this machine. Exposures share it.

run
├─ recorder        parses what the taps have copied
└─ page ×N         one task for each connection of a browser
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from tunneld.errors import ListenError
from tunneld.inspector.pages import Inspected, InspectorPages
from tunneld.inspector.recorder import ConnectionTap, Recorder
from tunneld.inspector.replay import Replayer, ReplayTarget
from tunneld.inspector.settings import InspectSettings
from tunneld.inspector.store import ExchangeStore
from tunneld.inspector.web import PageServer
from tunneld.net.endpoint import is_wildcard, join_host_port
from tunneld.net.sockets import bind_tcp

TOKEN_BYTES = 16
"""Of the token: as many as a key has."""


class Inspector:
    """An inspector that listens; `run` serves its page. Raises `ListenError`."""

    def __init__(self, settings: InspectSettings) -> None:
        self.recorder = Recorder(ExchangeStore(settings.limits))
        self._sockets = _bind(settings)
        self.inspected = Inspected(
            self.recorder,
            Replayer(self.recorder),
            secrets.token_urlsafe(TOKEN_BYTES),
            settings.host,
            self._sockets[0].getsockname()[1],
        )

    @property
    def url(self) -> str:
        """The link to the page, with the token."""
        inspected = self.inspected
        host = "127.0.0.1" if is_wildcard(inspected.host) else inspected.host
        return f"http://{join_host_port(host, inspected.port)}/?token={inspected.token}"

    async def run(self) -> None:
        """Parse what is copied, and serve the page, until cancelled."""
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(bound)) for bound in self._sockets]
        server = PageServer(InspectorPages(self.inspected).answer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.recorder.run)
            nursery.start_soon(trio.serve_listeners, server.serve, listeners)

    def tap(self, exposure: str, visitor: str, *, has_proxy_header: bool = False) -> ConnectionTap | None:
        """A tap for a new connection to the local server; None if too many are being inspected."""
        return self.recorder.tap(exposure, visitor, has_proxy_header=has_proxy_header)

    @contextmanager
    def attached(self, exposure: str, server: ReplayTarget) -> Iterator[None]:
        """The exposure runs for the length of the block."""
        servers = self.inspected.servers
        servers[exposure] = server
        try:
            yield
        finally:
            if servers.get(exposure) is server:
                del servers[exposure]


def _bind(settings: InspectSettings) -> list[socket.socket]:
    try:
        return bind_tcp(settings.host, settings.port)
    except ListenError:
        if not settings.is_default:
            raise
        return bind_tcp(settings.host, 0)
