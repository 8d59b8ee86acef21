"""The servers of the daemon and their certificates.

    servers
    ├─ control                 the control port, see control/server.py
    ├─ HTTP                    see http/server.py
    ├─ webmux                  the shared port of the webmux backend, see backends/webmux_port.py
    ├─ egtp                    the port for EGTP nodes, see backends/egtp_port.py
    └─ ssh                     the shared port of the ssh backend, see backends/ssh/port.py

Each server takes connections from a `ReloadableListener` (net/listeners.py, listeners.py). It also runs while it is
disabled and has no listener, so that a reload only exchanges listeners. The exception is ssh, which is started when it
is enabled for the first time.
"""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

import trio

from tunneld import http
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.config.names import HTTP2
from tunneld.config.schema import Settings
from tunneld.control.commands import executor
from tunneld.control.server import serve_lines
from tunneld.control.verbs import DaemonControl
from tunneld.daemon import ending
from tunneld.daemon.listeners import Listeners, bind_addresses
from tunneld.egtp.passing import PassingService
from tunneld.engine.engine import Engine
from tunneld.net.endpoint import Peer, is_loopback
from tunneld.net.listeners import Bound
from tunneld.sites.access_log import AccessLog
from tunneld.sites.names import SharedNames
from tunneld.tls.connection import CARRIER_PROTOCOL, CONTROL_PROTOCOL
from tunneld.tls.identity import Identity
from tunneld.tls.store import AGENT_TABLE, CertificateStore, LoadedCertificates
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.snapshot import ServiceSnapshot

if TYPE_CHECKING:
    import asyncssh

CLOSE_TIMEOUT = 2.0
"""Seconds for control and HTTP connections to end before a handover; a last message may take one. Relayed connections
go on meanwhile.
"""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A reload that can no longer fail: certificates and keys that were read, listeners that are bound."""

    certificates: LoadedCertificates
    protocols: Sequence[str]  # that visitors may use in TLS
    host_key: asyncssh.SSHKey | None
    identity: Identity | None
    bound: Bound


class Servers:
    """The running servers."""

    def __init__(
        self,
        daemon: DaemonControl,
        engine: Engine,
        keys: KeyRegistry,
        authenticator: Authenticator,
        handshakes: HandshakeSupervisor,
        certificates: CertificateStore,
        names: SharedNames | None,
    ) -> None:
        """`keys` and `names` get the numbers of the shared ports, for URIs; `certificates` is loaded here."""
        self.host_key: asyncssh.SSHKey | None = None
        self.identity: Identity | None = None  # for EGTP
        self.mail: PassingService | None = None  # of EGTP nodes; Linux only
        self._certificates = certificates
        self._names = names
        self._access_log = AccessLog(lambda: daemon.settings.names)
        self.listeners = Listeners()
        self._daemon = daemon
        self._engine = engine
        self._keys = keys
        self._authenticator = authenticator
        self._handshakes = handshakes
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._serves_ssh = False

    def listen(self, settings: Settings) -> ServiceSnapshot:
        """Open the listeners of each enabled server: those of systemd, those of the previous process, or new ones.
        Returns the tunnels of the previous process.

        Raises `ListenError`, `ShortageError` or `ConfigError`.
        """
        self._offer(settings.names.protocols)
        self._certificates.apply(self._certificates.load(settings.certificates, settings.named_certificates))
        enabled = [service for service, address in bind_addresses(settings).items() if address is not None]
        activated, snapshot = ending.receive(enabled)
        inherited, still_activated = (
            (snapshot.listeners, snapshot.activated) if snapshot is not None else ({}, frozenset[str]())
        )
        self._exchange(self.listeners.begin(settings, activated, inherited, still_activated))
        return snapshot.service if snapshot is not None else ServiceSnapshot()

    def load_keys(self, settings: Settings) -> None:
        """Load or make the SSH host key and the relay's EGTP key; called after the change of user, which is to own
        them. Raises `ConfigError`.
        """
        self.host_key = _host_key(settings)
        self.identity = _identity(settings)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled or until `export`."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    await self._open(nursery)
                    self._nursery = nursery
                    task_status.started()
        finally:
            self._ended.set()

    def prepare(self, now: Settings, then: Settings) -> Prepared:
        """Do the part of a reload that can fail. Raises `ConfigError`, `ListenError` or `ShortageError`, and then
        nothing has changed.
        """
        certificates = self._certificates.load(then.certificates, then.named_certificates)
        host_key, identity = self.host_key or _host_key(then), self.identity or _identity(then)
        return Prepared(certificates, then.names.protocols, host_key, identity, self.listeners.bind(now, then))

    def apply(self, prepared: Prepared) -> None:
        """Do the rest of a reload."""
        self._offer(prepared.protocols)
        self._certificates.apply(prepared.certificates)
        self.host_key, self.identity = prepared.host_key, prepared.identity
        self._exchange(prepared.bound)
        self._access_log.reopen()
        if self._nursery is not None and self.host_key is not None and not self._serves_ssh:
            self._nursery.start_soon(self._serve_ssh, self.host_key)

    def _offer(self, protocols: Sequence[str]) -> None:
        """Offer these protocols to visitors of host names."""
        if HTTP2 in protocols:
            import_module("tunneld.sites.http2")  # now: it takes a tenth of a second, and visitors would wait
        self._certificates.offer(protocols)

    async def export(self) -> tuple[Mapping[str, list[socket.socket]], frozenset[str]]:
        """End the connections of all servers, but not those of tunnels. Returns the listeners, and the services with
        listeners of systemd.
        """
        activated, listeners = self.listeners.activated, self.listeners.export()
        self._scope.cancel()
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._ended.wait()
        return listeners, activated

    def _exchange(self, bound: Bound) -> None:
        """Exchange listeners, and record the numbers of the shared ports."""
        schemes = {
            "control": "tls" if self._certificates.port("control.tls") else "tcp",
            "http": "https" if self._certificates.port("http.tls") else "http",
            "webmux": "webmuxs" if self._certificates.port("control.tls") else "webmux",
            "ssh": "ssh",
            "egtp": "egtp",
            "names-http": "http",
            "names-https": "https",
        }
        self.listeners.exchange(bound, schemes.__getitem__)
        for backend in ("webmux", "ssh", "egtp"):
            self._keys.set_port(backend, schemes[backend], self.listeners.by_service[backend].port)
        if self._names is not None:
            for scheme in ("http", "https"):
                self._names.set_port(scheme, self.listeners.by_service[f"names-{scheme}"].port)

    async def _open(self, nursery: trio.Nursery) -> None:
        listeners, daemon, authenticator = self.listeners.by_service, self._daemon, self._authenticator
        await nursery.start(
            serve_lines,
            listeners["control"],
            lambda: daemon.settings.control,
            partial(self._certificates.port, "control.tls"),
            executor(daemon),
            authenticator,
        )
        web_tls = partial(self._certificates.port, "http.tls")
        await nursery.start(http.serve, listeners["http"], daemon, authenticator, web_tls)
        if sys.platform == "linux":
            from tunneld.backends.egtp_port import serve_nodes  # noqa: PLC0415  # Linux only, like the pump
            from tunneld.backends.egtp_relay import NodeRelay  # noqa: PLC0415  # Linux only, like the pump
            from tunneld.backends.webmux_port import serve_carriers  # noqa: PLC0415  # Linux only, like the pump

            await nursery.start(
                serve_carriers,
                listeners["webmux"],
                lambda: daemon.settings.webmux,
                self._handshakes,
                self._keys,
                self._engine,
            )
            nodes = NodeRelay(lambda: daemon.settings, lambda: self.identity)
            self.mail = nodes.service
            await nursery.start(
                serve_nodes,
                listeners["egtp"],
                lambda: daemon.settings.egtp,
                self._handshakes,
                self._keys,
                self._engine,
                nodes,
            )
            await nursery.start(self._serve_names)
        if self.host_key is not None:
            await nursery.start(self._serve_ssh, self.host_key)

    async def _serve_names(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the shared HTTP and TLS ports."""
        from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only
        from tunneld.sites.ports import SitePorts  # noqa: PLC0415

        assert self._names is not None
        assert isinstance(self._engine, Pump)
        settings = lambda: self._daemon.settings.names  # noqa: E731
        agents = {
            CONTROL_PROTOCOL.encode(): partial(self._take_agent, "control"),
            CARRIER_PROTOCOL.encode(): partial(self._take_agent, "webmux"),
        }
        orders = self._daemon.certificate_orders
        ports = SitePorts(
            self._engine, self._names, settings, self._certificates, orders, self._access_log, agents, self._take_ssh
        )
        async with trio.open_nursery() as logging:  # outlives the connections, whose last requests it logs
            await logging.start(self._access_log.run)
            async with trio.open_nursery() as nursery:
                await nursery.start(ports.run)
                listen, listeners = self._engine.listen, self.listeners.by_service
                await nursery.start(partial(listeners["names-http"].serve, ports.on_http, listen=listen))
                await nursery.start(partial(listeners["names-https"].serve, ports.on_https, listen=listen))
                task_status.started()

    def _take_agent(self, service: str, connection: socket.socket, peer: Peer) -> bool:
        """An agent's connection came by the HTTPS port. False: there is no certificate for agents, or no service."""
        has_certificate = self._certificates.port(AGENT_TABLE) is not None
        is_admitted = has_certificate and (service != "control" or self._admits(peer))
        return is_admitted and self.listeners.by_service[service].deliver(connection, peer)

    def _admits(self, peer: Peer) -> bool:
        """Whether a peer of the HTTPS port may send control requests: the relay must authenticate it, as the
        configuration demands of a control port that is not on loopback.
        """
        control = self._daemon.settings.control
        authenticates = not self._authenticator.is_open or (control.tls is not None and bool(control.tls.client_ca))
        return authenticates or control.open_to_anyone or is_loopback(peer[0])

    def _take_ssh(self, connection: socket.socket, peer: Peer) -> bool:
        """The connection of an SSH client came by the HTTPS port. False: SSH is not served there."""
        return self._daemon.settings.names.ssh and self.listeners.by_service["ssh"].deliver(connection, peer)

    async def _serve_ssh(
        self, key: asyncssh.SSHKey, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Run the SSH server. It is imported only when it is enabled, since that takes half a second."""
        from tunneld.backends.ssh.port import serve_ssh  # noqa: PLC0415
        from tunneld.engine.pump import Pump  # noqa: PLC0415  # Linux only

        assert isinstance(self._engine, Pump)
        self._serves_ssh = True
        gc.freeze()  # a full collection that also scans what asyncssh imports took 22 ms, and all relays waited
        await serve_ssh(
            self.listeners.by_service["ssh"],
            lambda: self._daemon.settings.ssh,
            key,
            self._daemon.service,
            executor(self._daemon),
            self._handshakes,
            self._engine,
            self._authenticator,
            task_status=task_status,
        )


def _host_key(settings: Settings) -> asyncssh.SSHKey | None:
    """Load the host key of the SSH port, which is made if its file does not exist; None if the port is disabled.

    Raises `ConfigError`.
    """
    if bind_addresses(settings)["ssh"] is None:
        return None
    from tunneld.backends.ssh.host_key import load_or_make, place  # noqa: PLC0415

    return load_or_make(place(settings))


def _identity(settings: Settings) -> Identity | None:
    """Load the relay's EGTP key, which is made if its file does not exist; None if the port is disabled.

    Raises `ConfigError`.
    """
    if bind_addresses(settings)["egtp"] is None:
        return None
    from tunneld.backends.egtp_port import load_identity  # noqa: PLC0415  # Linux only
    from tunneld.backends.egtp_relay import place  # noqa: PLC0415

    return load_identity(place(settings))
