"""The conformance suite of ingresses: each test runs for each of `KINDS`. A new kind is one more entry.

`NamedIngress` is a second kind as host names on a shared port will be one: it has no listener, and the owner of the
shared port passes visitors to it by a table of names.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import pytest
import trio

from tests.support.peers import connect, is_dropped, is_refused, read_exactly
from tests.support.visitors import open_tunnel, until_parked, until_waiting
from tunneld.backends import BACKENDS
from tunneld.config.schema import TunnelSettings
from tunneld.directory.service import TunnelService
from tunneld.engine.engine import Engine, FailureCallback
from tunneld.errors import ListenError
from tunneld.net.address import Address, HostName, Port
from tunneld.net.endpoint import Endpoint
from tunneld.policy.admission import AdmissionRefusal
from tunneld.policy.limits import EffectiveLimits
from tunneld.policy.options import TunnelOptions
from tunneld.tunnel.ingress.ingress import Arrivals, Ingress
from tunneld.tunnel.ingress.port import PortIngress
from tunneld.tunnel.server_side import NO_TAKEOVER, BackendServices, Takeover
from tunneld.tunnel.snapshot import IngressSnapshot
from tunneld.tunnel.spec import TunnelSpec
from tunneld.tunnel.visitor import Visitor

NAME = HostName("blog.example.org")


def spec(**words: str) -> TunnelSpec:
    return TunnelSpec(
        id="t1",
        backend="tcp",
        options=TunnelOptions.parse({"persist": "yes", **words}),
        settings=TunnelSettings(ports="0"),
        owner="127.0.0.1:9",
        requester_host="127.0.0.1",
        advertised_host="127.0.0.1",
        services=BackendServices(BACKENDS),
    )


class SharedPort:
    """A port that several tunnels share: it knows which ingress has which name, and reads before it knows the name."""

    def __init__(self) -> None:
        self.names: dict[HostName, NamedIngress] = {}

    async def visit(self, name: HostName, said: bytes) -> trio.SocketStream | None:
        """A client that connects and says something, which the shared port has read; None where no tunnel has it."""
        if (ingress := self.names.get(name)) is None:
            return None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            end, peer = listener.accept()
        for one in (client, end):
            one.setblocking(False)
        await trio.lowlevel.checkpoint()
        ingress.arrive(Visitor(end, peer, host=name, early=said))
        return trio.SocketStream(trio.socket.from_stdlib_socket(client))


class NamedIngress:
    """A host name on a shared port. Implements `Ingress`."""

    def __init__(self, port: SharedPort, name: HostName, takeover: Takeover = NO_TAKEOVER) -> None:
        if name in port.names and name not in takeover.addresses:
            raise ListenError(f"another tunnel has {name}")
        self.address: Address = name
        self.uri = Endpoint("https", str(name), 443)
        self._name = name
        self._port = port
        self._arrivals: Arrivals | None = None
        self._paused = False
        self.listeners: Sequence[socket.socket] = ()
        port.names.setdefault(name, self)

    def listen(self, _engine: Engine, arrivals: Arrivals, _nursery: trio.Nursery, _failed: FailureCallback) -> None:
        self._arrivals = arrivals
        self._port.names[self._name] = self

    def arrive(self, visitor: Visitor) -> None:
        """Called by the shared port."""
        if self._arrivals is None or self._paused:
            visitor.refuse()
        else:
            self._arrivals.arrive(visitor)

    def pause(self) -> None:
        self._paused = True

    def export(self) -> IngressSnapshot:
        self.pause()
        return IngressSnapshot(self.address, None)

    def close(self) -> None:
        self.pause()
        if self._port.names.get(self._name) is self:
            del self._port.names[self._name]


class RecordedArrivals:
    """What an ingress passed on. Implements `Arrivals`."""

    def __init__(self) -> None:
        self.visitors: list[Visitor] = []
        self.refused: list[tuple[Visitor, AdmissionRefusal]] = []

    def __len__(self) -> int:
        return 0

    def arrive(self, visitor: Visitor) -> None:
        self.visitors.append(visitor)

    def refuse(self, visitor: Visitor, refusal: AdmissionRefusal) -> None:
        visitor.refuse()
        self.refused.append((visitor, refusal))

    async def one(self) -> Visitor:
        while not self.visitors:
            await trio.lowlevel.checkpoint()
        return self.visitors.pop(0)


class Kind(ABC):
    """One kind of ingress."""

    @abstractmethod
    def make(self, snapshot: IngressSnapshot | None = None, takeover: Takeover = NO_TAKEOVER) -> Ingress:
        """An open ingress, always at the same address once there was one."""

    @abstractmethod
    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        """A client that connects and says something; None where that is refused at once."""


class PortKind(Kind):
    def make(self, snapshot: IngressSnapshot | None = None, takeover: Takeover = NO_TAKEOVER) -> Ingress:
        ports = [str(listener.getsockname()[1]) for listener in takeover.listeners]
        made = spec(client_port=ports[0]) if ports else spec()
        return PortIngress(made, made.limits, snapshot, takeover)

    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        try:
            client = await connect(ingress.uri)
        except ConnectionRefusedError:
            return None
        await client.send_all(said)
        return client


class NameKind(Kind):
    def __init__(self) -> None:
        self._port = SharedPort()

    def make(self, snapshot: IngressSnapshot | None = None, takeover: Takeover = NO_TAKEOVER) -> Ingress:
        return NamedIngress(self._port, NAME, takeover)

    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        return await self._port.visit(NAME, said)


KINDS: dict[str, type[Kind]] = {"port": PortKind, "name": NameKind}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


@pytest.fixture
def arrivals() -> RecordedArrivals:
    return RecordedArrivals()


@pytest.fixture
def ingress(kind: Kind) -> Iterator[Ingress]:
    made = kind.make()
    yield made
    made.close()


def fail(error: Exception) -> None:
    raise error


def said_by(visitor: Visitor) -> bytes:
    """What the visitor has sent, read already or in its socket."""
    return visitor.early or visitor.connection.recv(100)


async def test_a_visitor_has_its_address_and_no_byte_is_lost(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    ingress.listen(engine, arrivals, nursery, fail)
    client = await kind.visit(ingress, b"hello")
    assert client is not None
    visitor = await arrivals.one()
    await trio.lowlevel.checkpoint()
    assert visitor.peer == client.socket.getsockname()
    assert said_by(visitor) == b"hello"
    assert visitor.host == (ingress.address if isinstance(ingress.address, HostName) else None)
    visitor.end.close()
    assert await is_dropped(client)
    await client.aclose()


async def test_its_address_is_what_it_advertises(ingress: Ingress) -> None:
    assert ingress.address in {Port(ingress.uri.port), HostName(ingress.uri.host)}


async def test_a_closed_ingress_passes_no_visitor_on(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    ingress.listen(engine, arrivals, nursery, fail)
    ingress.close()
    ingress.close()
    assert await kind.visit(ingress, b"hello") is None
    assert not arrivals.visitors


async def test_a_paused_ingress_passes_no_visitor_on(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    ingress.listen(engine, arrivals, nursery, fail)
    ingress.pause()
    client = await kind.visit(ingress, b"hello")
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    assert not arrivals.visitors
    if client is not None:
        await client.aclose()


async def test_another_one_continues_from_its_snapshot_at_the_same_address(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    ingress.listen(engine, RecordedArrivals(), nursery, fail)
    ingress.pause()
    snapshot = ingress.export()
    ingress.close()
    again = kind.make(snapshot)
    assert (snapshot.address, again.address, again.uri) == (ingress.address, ingress.address, ingress.uri)
    again.listen(engine, arrivals, nursery, fail)
    client = await kind.visit(again, b"hello")
    assert client is not None
    (await arrivals.one()).end.close()
    await client.aclose()
    again.close()


async def test_another_one_takes_over_its_address_while_it_serves(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    """As when a tunnel is replaced: until `listen`, the new one changes nothing, and no visitor is refused between."""
    before = RecordedArrivals()
    ingress.listen(engine, before, nursery, fail)
    successor = kind.make(takeover=Takeover(ingress.listeners, addresses=[ingress.address]))
    assert (successor.address, successor.uri) == (ingress.address, ingress.uri)
    given_up = kind.make(takeover=Takeover(ingress.listeners, addresses=[ingress.address]))
    given_up.close()
    for arrived, change in ((before, None), (arrivals, successor)):
        if change is not None:
            ingress.pause()
            change.listen(engine, arrivals, nursery, fail)
            ingress.close()
        client = await kind.visit(ingress, b"hello")
        assert client is not None
        (await arrived.one()).end.close()
        await client.aclose()
    successor.close()


async def test_one_that_was_closed_before_its_export_stays_closed(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    """As in a tunnel that drains."""
    ingress.listen(engine, arrivals, nursery, fail)
    ingress.close()
    snapshot = ingress.export()
    assert (snapshot.address, snapshot.listener) == (ingress.address, None)


# A tunnel with several


def with_name(port: SharedPort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give tunnels a host name beside their port."""

    def open_both(
        spec: TunnelSpec,
        limits: EffectiveLimits,
        snapshots: Sequence[IngressSnapshot] = (),
        takeover: Takeover = NO_TAKEOVER,
    ) -> tuple[Ingress, ...]:
        first = PortIngress(spec, limits, snapshots[0] if snapshots else None, takeover)
        try:
            return first, NamedIngress(port, NAME, takeover)
        except ListenError:
            first.close()
            raise

    monkeypatch.setattr("tunneld.tunnel.tunnel.open_ingresses", open_both)


@pytest.mark.interpreted
async def test_a_tunnel_serves_the_visitors_of_all_of_its_ingresses(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedPort()
    with_name(shared, monkeypatch)
    tunnel = await open_tunnel(service, name="blog")
    assert tunnel.addresses == (Port(tunnel.client_uri.port), NAME)
    servers = [await connect(tunnel.server_uri) for _ in range(2)]
    await until_parked(tunnel, 2)
    by_name = await shared.visit(NAME, b"by name")
    by_port = await connect(tunnel.client_uri)
    assert by_name is not None
    await by_port.send_all(b"by port")
    assert {await read_exactly(server, 7) for server in servers} == {b"by name", b"by port"}
    waiting = await shared.visit(NAME, b"")
    assert waiting is not None
    await until_waiting(tunnel, 1)
    assert [record.addresses for record in service.reservations.table] == [tunnel.addresses]
    tunnel.drain()
    assert not shared.names
    assert await is_refused(tunnel.client_uri)
    assert await is_dropped(waiting)
    await service.close(tunnel.id)
    for stream in (by_name, waiting):
        await stream.aclose()


@pytest.mark.interpreted
async def test_a_tunnel_whose_second_ingress_cannot_be_opened_leaves_nothing_behind(
    service: TunnelService, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedPort()
    with_name(shared, monkeypatch)
    await open_tunnel(service)
    with pytest.raises(ListenError, match="another tunnel has"):
        await open_tunnel(service)
    assert len(service.tunnels()) == 1
