"""Private tunnels in a test process: three people with keys, an agent of one of them, and a man in the middle."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.agent.support import BACKEND, PATIENCE, RecordingReporter, RelayHere, access_to
from tunneld.agent.access import RelayAccess
from tunneld.agent.config import ExposureConfig, PrivateSettings
from tunneld.agent.expose import Exposure, open_exposure
from tunneld.agent.network import NetworkMonitor
from tunneld.agent.relay_connection import RelayConnection
from tunneld.agent.request import TunnelRequest
from tunneld.agent.visit import VisitedTunnel, open_session
from tunneld.agent.visit_port import VisitPort
from tunneld.agent.visit_sessions import VisitLimits, VisitSessions
from tunneld.config.trust import TrustedPeers
from tunneld.engine import new_engine
from tunneld.engine.end_stream import EndStream
from tunneld.engine.failures import reset_on_close
from tunneld.errors import TunneldError
from tunneld.net.address import Private
from tunneld.net.endpoint import Target
from tunneld.tls.identity import Identity

ALICE, BOB, CAROL = (Identity.from_seed(bytes([letter]) * 32) for letter in b"abc")
NAMES = {"alice": ALICE, "bob": BOB, "carol": CAROL}
SHELL = Private(ALICE.id, "shell")


def make_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders in which all three keys are, and where alice and bob know each other. Returns that of the keys."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    for name, identity in NAMES.items():
        identity.save(folder / name)
    TrustedPeers().add("alice", ALICE.id)
    TrustedPeers().add("bob", BOB.id)
    return folder


@asynccontextmanager
async def privately_exposed(
    target: Target,
    relay: RelayAccess,
    reporter: RecordingReporter,
    keys: Path,
    *admit: str,
    name: str = "shell",
    owner: str = "alice",
    **options: str,
) -> AsyncIterator[Exposure]:
    """An agent of `owner` that runs for the length of the block; the tunnel is open at its start."""
    config = ExposureConfig(
        target,
        TunnelRequest(
            {"name": name, **options},
            backend=BACKEND.get(),
            identity=NAMES[owner] if BACKEND.get() == "egtp" else None,
        ),
        linger=PATIENCE,
        private=PrivateSettings(name, admit, keys / owner),
    )
    monitor = NetworkMonitor()
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        connection = RelayConnection(relay, monitor)
        nursery.start_soon(connection.run)
        async with open_exposure(config, connection, reporter, engine, monitor) as exposure:
            nursery.start_soon(exposure.run)
            await reporter.wait_for("opened")
            yield exposure
            exposure.stop("the test has ended")
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def visiting(
    relay: RelayAccess, identity: Identity = BOB, address: Private = SHELL, tunnel: VisitedTunnel | None = None
) -> AsyncIterator[EndStream]:
    """A session of its own, and one stream in it."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        engine = new_engine()
        await nursery.start(engine.run)
        visited = tunnel or VisitedTunnel.known(address, f"{address.name}@alice", identity)
        try:
            session = await open_session(engine, relay, visited)
            stream = EndStream(session.open())
        except TunneldError as error:
            failure = error
        else:
            try:
                yield stream
            except trio.BrokenResourceError as error:
                failure = error
            await session.finish()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


@dataclass
class Visiting:
    """A port of bob's through which a private tunnel is reached."""

    address: tuple[str, int]
    port: VisitPort
    sessions: VisitSessions
    reporter: RecordingReporter
    monitor: NetworkMonitor

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.address)


@asynccontextmanager
async def visit_port(
    relay: RelayAccess,
    limits: VisitLimits | None = None,
    tunnel: VisitedTunnel | None = None,
    on_over: Callable[[], None] | None = None,
) -> AsyncIterator[Visiting]:
    """What `tunnel visit` runs: a listener, and sessions of which the first is open unless the relay is away."""
    visited = tunnel or VisitedTunnel.known(SHELL, "shell@alice", BOB)
    reporter, monitor = RecordingReporter(), NetworkMonitor(changes=lambda: None)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            engine = new_engine()
            await nursery.start(engine.run)
            sessions = VisitSessions(
                engine, relay, visited, reporter, monitor, limits or VisitLimits(), on_over=on_over
            )
            await sessions.start()
            port = VisitPort(engine, sessions, visited, reporter, linger=PATIENCE)
            nursery.start_soon(port.run, listener)
            yield Visiting(listener.getsockname(), port, sessions, reporter, monitor)
            nursery.cancel_scope.cancel()


Change = Callable[[bytes], bytes]


def unchanged(data: bytes) -> bytes:
    return data


@dataclass
class Middle:
    """A relay of the visitor's bytes that records and changes what passes: what a hostile relay could do."""

    relay: RelayHere
    port: int = 0
    up: bytearray = field(default_factory=bytearray)  # from visitors
    down: bytearray = field(default_factory=bytearray)
    change_up: Change = unchanged
    change_down: Change = unchanged
    is_cut: bool = False  # the end of file comes early, downwards

    @property
    def access(self) -> RelayAccess:
        return access_to(self.port, self.relay.pki)

    async def serve(self, visitor: trio.SocketStream) -> None:
        relay = await trio.open_tcp_stream("127.0.0.1", self.relay.port)
        async with relay, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, visitor, relay, self.up, "change_up")
            await self._pass(relay, visitor, self.down, "change_down")

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, record: bytearray, change: str) -> None:
        try:
            async for data in source:
                record += data
                await sink.send_all(getattr(self, change)(bytes(data)))
                if self.is_cut:
                    break
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):  # pass a reset on
            for stream in (source, sink):
                if stream.socket.fileno() != -1:
                    reset_on_close(stream.socket)
                    await trio.aclose_forcefully(stream)


@asynccontextmanager
async def in_the_middle(relay: RelayHere) -> AsyncIterator[Middle]:
    """Run one in front of the control port."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    middle = Middle(relay, listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, middle.serve, [listener])
        yield middle
        nursery.cancel_scope.cancel()
