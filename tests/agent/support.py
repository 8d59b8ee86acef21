"""A whole relay inside the test process, a reporter that records, and local servers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import trio

from tests.support.pki import Pki
from tunneld.acme.manager import CertificateManager
from tunneld.agent.access import RelayAccess
from tunneld.agent.config import ExposureConfig
from tunneld.agent.events import Field
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.health import Check
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.request import TunnelRequest
from tunneld.auth.authenticator import Authenticator
from tunneld.auth.handshakes import HandshakeSupervisor
from tunneld.backends import BACKENDS
from tunneld.backends.egtp_port import serve_nodes
from tunneld.backends.egtp_relay import NodeRelay
from tunneld.backends.webmux import WebMuxServerSide
from tunneld.backends.webmux_port import serve_carriers
from tunneld.backends.webmux_shared import CarriedTunnel
from tunneld.config.schema import ControlSettings, Settings, TunnelSettings
from tunneld.control.commands import executor
from tunneld.control.server import serve_lines
from tunneld.directory.service import TunnelService
from tunneld.egtp.passing import PassingService
from tunneld.engine import new_engine
from tunneld.engine.pump import Pump
from tunneld.mux.carrier import Carrier
from tunneld.net import sockets
from tunneld.net.endpoint import Target
from tunneld.net.listeners import ReloadableListener
from tunneld.tls.identity import Identity
from tunneld.tls.store import CertificateStore
from tunneld.tunnel.keys import KeyRegistry
from tunneld.tunnel.tunnel import Tunnel
from tunneld.wire.lines import Item, Value

PATIENCE = 20.0
"""Seconds of real time after which a waiting test has failed."""

BACKEND: ContextVar[str] = ContextVar("BACKEND", default="tcp")
"""The backend that the relays of a test have besides tcp; the agent prefers webmux."""

SECURE: ContextVar[Pki | None] = ContextVar("SECURE", default=None)
"""The certificate of relays that a test starts without one of their own; with it, agents use TLS."""

NEEDED: Mapping[str, Mapping[str, Value]] = {
    "tcp": {},
    "webmux": {},
    "egtp": {"node": str(Identity.from_seed(b"\x01" * 32).id)},
}
"""Options of openTunnel without which a relay opens no tunnel, by backend."""

Handler = Callable[[trio.SocketStream], Awaitable[None]]


def carriers_of(tunnel: Tunnel) -> list[Carrier]:
    """The relay's side of a tunnel's carriers, also of those that it shares."""
    side = tunnel.server_side
    assert isinstance(side, WebMuxServerSide)
    return [one.carrier if isinstance(one, CarriedTunnel) else one for one in side.carriers if is_webmux(one)]


def is_webmux(carrier: object) -> TypeGuard[Carrier | CarriedTunnel]:
    return isinstance(carrier, Carrier | CarriedTunnel)


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Have the relays of the block offer this backend, and their agents use it."""
    token = BACKEND.set(name)
    yield
    BACKEND.reset(token)


class RelayHere:
    """A relay inside the test process: engine, service, control port."""

    def __init__(
        self, settings: Settings, service: TunnelService, port: int, scope: trio.CancelScope, pki: Pki | None
    ) -> None:
        self.pki = pki
        self.settings = settings
        self.service = service
        self.certificates = CertificateStore()
        self.certificate_orders = CertificateManager(self.certificates, lambda: settings.acme, None)
        self.port = port
        self._scope = scope
        self.control = trio.CancelScope()

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def access(self) -> RelayAccess:
        return access_to(self.port, self.pki)

    @property
    def tunnel(self) -> Tunnel:
        (tunnel,) = self.service.tunnels()
        return tunnel

    def stop(self) -> None:
        """Stop at once, with every tunnel, as if killed."""
        self._scope.cancel()

    def hang_up(self) -> None:
        """Close every control connection, as a NAT that drops its state would."""
        self.control.cancel()

    def status(self) -> Item:
        return {"tunnels": len(list(self.service.tunnels()))}

    @property
    def mail(self) -> PassingService | None:
        return None

    def penalties(self) -> Sequence[Item]:
        return []

    def pardon(self, address: str) -> bool:
        return False

    def reload(self) -> Sequence[Item]:
        return []

    async def restart(self) -> None:
        self.stop()

    def shutdown(self, *, drain: bool) -> None:
        self.stop()


def access_to(port: int, pki: Pki | None = None) -> RelayAccess:
    """How an agent reaches the relay with this control port and these certificates, by default those of `SECURE`."""
    pki = pki or SECURE.get()
    if pki is None:
        return RelayAccess(f"127.0.0.1:{port}", timeout=PATIENCE)
    return RelayAccess(f"tls://localhost:{port}", pki.client, timeout=PATIENCE)


@asynccontextmanager
async def relay_here(port: int = 0, pki: Pki | None = None, **tunnels: float | str) -> AsyncIterator[RelayHere]:
    """Run a relay on loopback. `port` is its control port, which uses TLS if there are certificates."""
    pki = pki or SECURE.get()
    tls = pki.server if pki is not None else None
    settings = Settings(control=ControlSettings(), tunnels=TunnelSettings.model_validate({"ports": "0", **tunnels}))
    listener = socket.create_server(("127.0.0.1", port))
    engine = new_engine()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        keys = KeyRegistry()
        handshakes = HandshakeSupervisor(Authenticator(lambda: ()), lambda: tls, lambda: PATIENCE)
        await nursery.start(handshakes.run)
        node = Identity.create() if BACKEND.get() == "egtp" else None
        service = TunnelService(lambda: settings, engine, BACKENDS, keys, handshakes=handshakes, identity=lambda: node)
        await nursery.start(service.run)
        here = RelayHere(settings, service, listener.getsockname()[1], nursery.cancel_scope, pki)
        if BACKEND.get() == "webmux":
            carriers = ReloadableListener("webmux", sockets.bind_tcp("127.0.0.1", 0))
            assert isinstance(engine, Pump)
            await nursery.start(serve_carriers, carriers, lambda: here.settings.webmux, handshakes, keys, engine)
        if BACKEND.get() == "egtp":
            nodes = ReloadableListener("egtp", sockets.bind_tcp("127.0.0.1", 0))
            assert isinstance(engine, Pump)
            relay = NodeRelay(lambda: here.settings, lambda: node)
            await nursery.start(serve_nodes, nodes, lambda: here.settings.egtp, handshakes, keys, engine, relay)
        await nursery.start(_serve_control, here, listener)
        yield here
        nursery.cancel_scope.cancel()


async def _serve_control(here: RelayHere, listener: socket.socket, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve the control port, again after each `hang_up`."""
    tls = here.pki.server if here.pki is not None else None
    while True:
        listener.setblocking(False)
        with trio.CancelScope() as here.control:
            task_status.started()
            await serve_lines(
                ReloadableListener("control", [listener]), lambda: here.settings.control, lambda: tls, executor(here)
            )
        task_status = trio.TASK_STATUS_IGNORED
        listener = socket.create_server(("127.0.0.1", here.port))


@dataclass
class RecordingReporter:
    """A reporter that records events, and lets a test wait for one."""

    events: list[tuple[str, dict[str, Field]]] = field(default_factory=list)
    wants_visitors: bool = True
    _reported: trio.Event = field(default_factory=trio.Event)

    def report(self, event: str, /, **fields: Field) -> None:
        self.events.append((event, fields))
        self._reported.set()
        self._reported = trio.Event()

    def all(self, name: str) -> list[dict[str, Field]]:
        return [fields for event, fields in self.events if event == name]

    async def wait_for(self, name: str, count: int = 1) -> dict[str, Field]:
        """Wait for the `count`th event of this name, and return its fields."""
        while len(self.all(name)) < count:
            await self._reported.wait()
        return self.all(name)[count - 1]


@asynccontextmanager
async def local_server(handler: Handler, backlog: int | None = None) -> AsyncIterator[Target]:
    """Serve TCP on a free port of loopback; yields the target."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=backlog)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, handler, [listener])
        yield Target.parse(str(listener.socket.getsockname()[1]))
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    """Send everything back, and end when the visitor does or is dropped."""
    with suppress(trio.BrokenResourceError):
        async for chunk in stream:
            await stream.send_all(chunk)
        await stream.send_eof()


def unused_port() -> int:
    """A port on which nothing listens: bound for a moment, and closed again."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@asynccontextmanager
async def agent(
    target: Target,
    relay: RelayAccess,
    reporter: RecordingReporter,
    request: TunnelRequest | None = None,
    check: Check | None = None,
    scheme: str = "tcp",
) -> AsyncIterator[Exposure]:
    """An exposure with an engine of its own; the block must call its `run`."""
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        config = ExposureConfig(target, with_backend(request or TunnelRequest()), check, scheme, linger=PATIENCE)
        monitor = NetworkMonitor()
        connection = RelayConnection(relay, monitor)
        nursery.start_soon(connection.run)
        async with open_exposure(config, connection, reporter, engine, monitor) as exposure:
            yield exposure
        nursery.cancel_scope.cancel()


def with_backend(request: TunnelRequest) -> TunnelRequest:
    """The same request; over egtp, which an agent must be told to use, if the relays of the test have it."""
    if BACKEND.get() != "egtp" or request.backend is not None:
        return request
    return replace(request, backend="egtp", identity=Identity.create())


@asynccontextmanager
async def exposed(
    target: Target,
    relay: RelayAccess,
    reporter: RecordingReporter,
    request: TunnelRequest | None = None,
    scheme: str = "tcp",
) -> AsyncIterator[Exposure]:
    """An agent that runs for the length of the block; the tunnel is open at its start."""
    async with agent(target, relay, reporter, request, scheme=scheme) as exposure, trio.open_nursery() as nursery:
        nursery.start_soon(exposure.run)
        await reporter.wait_for("opened")
        yield exposure
        nursery.cancel_scope.cancel()
