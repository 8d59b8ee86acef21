"""All that the process shows to the outside: its faces, each behind its door, and the papers by which it is known.

    front
    ├─ control (lines)         see control/server.py; below each of these three a door with its listeners, see doors.py
    ├─ HTTP face               see control/http
    ├─ carriers                the shared port of the webmux backend, see carriers.py
    └─ ssh                     the shared port of the ssh backend, see ssh/

Every face runs for as long as the front does, also while its door has no listener because it is not enabled: so a
reload exchanges listeners and starts or ends nothing else. What each listens on is in faces.py.
"""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from tunneld import http
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.config.schema import Settings
from tunneld.control.commands import executor
from tunneld.control.server import serve_lines
from tunneld.control.verbs import DaemonControl
from tunneld.daemon import ending
from tunneld.daemon.listeners import Listeners, places
from tunneld.engine.engine import Engine
from tunneld.net.listeners import Bound
from tunneld.tls import contexts
from tunneld.tls.expiry import Shown
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.snapshot import ServiceSnapshot

if TYPE_CHECKING:
    import asyncssh

GOODBYE = 2.0
"""Seconds for control and HTTP connections to end in order before a handover, of which last words may take one; relays
go on meanwhile.
"""


@dataclass(frozen=True, slots=True)
class CertificateStore:
    """What is shown in handshakes that begin from here on. Contexts are made anew at each reload from the files, which
    may be others behind the same names.
    """

    control: ssl.SSLContext | None = None
    http: ssl.SSLContext | None = None
    host_key: asyncssh.SSHKey | None = None

    @classmethod
    def of(cls, settings: Settings) -> CertificateStore:
        """The certificates. Raises `ConfigError`."""
        control, web = settings.control.tls, settings.http.tls
        return cls(
            contexts.server_tls_context(control) if control else None,
            contexts.server_tls_context(web, table="http.tls") if web else None,
        )

    def shown(self, settings: Settings) -> list[Shown]:
        """What of them has an end, and the files that it came from."""
        ends = (self.control, settings.control.tls), (self.http, settings.http.tls)
        return [(context, tls.certificate) for context, tls in ends if context is not None and tls is not None]

    def with_host_key(self, settings: Settings, known: asyncssh.SSHKey | None) -> CertificateStore:
        """The key of the SSH port beside them, made where there is none. Raises `ConfigError`."""
        if known is None and places(settings)["ssh"] is not None:
            from tunneld.backends.ssh.host_key import load_or_make, place  # noqa: PLC0415

            known = load_or_make(place(settings))
        return replace(self, host_key=known)


@dataclass(frozen=True, slots=True)
class Prepared:
    """From one configuration to the next: papers that were read, listeners that are bound."""

    certificates: CertificateStore
    bound: Bound


class Servers:
    """The faces of the running process."""

    def __init__(
        self,
        daemon: DaemonControl,
        engine: Engine,
        endpoints: KeyRegistry,
        gate: Authenticator,
        lobby: HandshakeSupervisor,
    ) -> None:
        """`endpoints` is told where the shared ports are."""
        self.certificates = CertificateStore()
        self._daemon = daemon
        self._engine = engine
        self._endpoints = endpoints
        self._gate = gate
        self._lobby = lobby
        self._faces = Listeners()
        self._scope = trio.CancelScope()
        self._gone = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._serves_ssh = False

    def listen(self, settings: Settings) -> ServiceSnapshot:
        """Let each face have its listeners: systemd's, those of the process before this one, or new ones. Returns the
        tunnels of that process.

        Raises `ListenError`, `ShortageError` or `ConfigError`.
        """
        self.certificates = CertificateStore.of(settings)
        enabled = [face for face, place in places(settings).items() if place is not None]
        given, estate = ending.received(enabled)
        kept, still_given = (estate.listeners, estate.given) if estate is not None else ({}, frozenset[str]())
        self._exchange(self._faces.begin(settings, given, kept, still_given))
        return estate.service if estate is not None else ServiceSnapshot()

    def take_host_key(self, settings: Settings) -> None:
        """As whoever the daemon has become, for whom it is kept. Raises `ConfigError`."""
        self.certificates = self.certificates.with_host_key(settings, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until all is left to another process."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await self._open(nursery)
                    self._nursery = nursery
                    task_status.started()
        finally:
            self._gone.set()

    def prepare(self, now: Settings, then: Settings) -> Prepared:
        """Do whatever can fail of a reload. Raises `ConfigError`, `ListenError` or `ShortageError`, and has changed
        nothing then.
        """
        papers = CertificateStore.of(then).with_host_key(then, self.certificates.host_key)
        return Prepared(papers, self._faces.bind(now, then))

    def change(self, prepared: Prepared) -> None:
        """Do the rest of it."""
        self.certificates = prepared.certificates
        self._exchange(prepared.bound)
        if self._nursery is not None and self.certificates.host_key is not None and not self._serves_ssh:
            self._nursery.start_soon(self._serve_ssh, self.certificates.host_key)

    async def export(self) -> tuple[Mapping[str, list[socket.socket]], frozenset[str]]:
        """End all connections in order, while relays go on. Returns the listeners, and which are systemd's own."""
        given, listeners = self._faces.given, self._faces.export()
        self._scope.cancel()
        with trio.move_on_after(GOODBYE):
            await self._gone.wait()
        return listeners, given

    def _exchange(self, bound: Bound) -> None:
        """Let the faces listen there, and tell the tunnels where their shared ports are."""
        schemes = {
            "control": "tls" if self.certificates.control else "tcp",
            "http": "https" if self.certificates.http else "http",
            "webmux": "webmuxs" if self.certificates.control else "webmux",
            "ssh": "ssh",
        }
        self._faces.exchange(bound, schemes.__getitem__)
        for backend in ("webmux", "ssh"):
            self._endpoints.set_port(backend, schemes[backend], self._faces.doors[backend].port)

    async def _open(self, nursery: trio.Nursery) -> None:
        doors, daemon, gate = self._faces.doors, self._daemon, self._gate
        await nursery.start(
            serve_lines,
            doors["control"],
            lambda: daemon.settings.control,
            lambda: self.certificates.control,
            executor(daemon),
            gate,
        )
        await nursery.start(http.serve, doors["http"], daemon, gate, lambda: self.certificates.http)
        if sys.platform == "linux":
            from tunneld.backends.webmux_port import serve_carriers  # noqa: PLC0415  # Linux only, like the pump

            await nursery.start(
                serve_carriers,
                doors["webmux"],
                lambda: daemon.settings.webmux,
                self._lobby,
                self._endpoints,
                self._engine,
            )
        if self.certificates.host_key is not None:
            await nursery.start(self._serve_ssh, self.certificates.host_key)

    async def _serve_ssh(
        self, key: asyncssh.SSHKey, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """From the first time that it is enabled on; its import takes half a second, which others need not wait."""
        from tunneld.backends.ssh.port import serve_ssh  # noqa: PLC0415
        from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only

        assert isinstance(self._engine, Pump)
        self._serves_ssh = True
        await serve_ssh(
            self._faces.doors["ssh"],
            lambda: self._daemon.settings.ssh,
            key,
            self._daemon.service,
            self._lobby,
            self._engine,
            self._gate,
            task_status=task_status,
        )
