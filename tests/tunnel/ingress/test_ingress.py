"""The conformance suite of ingresses: each test runs for each of `KINDS`. A new kind is one more entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import pytest
import trio

from tests.engine.bench import stream, tcp_pair
from tests.support.peers import connect, is_dropped, keep
from tunneld.backends import BACKENDS
from tunneld.config.names import NamesSettings
from tunneld.config.schema import TunnelSettings
from tunneld.engine.engine import Engine
from tunneld.net.address import HostName, Port, Private
from tunneld.net.endpoint import Endpoint
from tunneld.policy.admission import AdmissionRefusal
from tunneld.policy.options import TunnelOptions
from tunneld.policy.private import PrivateClaim, claimed_text
from tunneld.sites.names import SharedNames
from tunneld.tls.identity import Identity
from tunneld.tunnel.ingress.host import HostIngress
from tunneld.tunnel.ingress.ingress import Ingress
from tunneld.tunnel.ingress.port import PortIngress
from tunneld.tunnel.ingress.private import PrivateIngress
from tunneld.tunnel.private_tunnels import PrivateTunnels
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
        ports = [listener.getsockname()[1] for listener in takeover.listeners]
        made = spec()
        return PortIngress(made, made.limits, snapshot, takeover, ports[0] if ports else None)

    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        try:
            client = await connect(ingress.uri)
        except ConnectionRefusedError:
            return None
        await client.send_all(said)
        return client


class HostKind(Kind):
    """Its clients are passed to it as the shared port does with TLS connections that end at the hidden server."""

    def __init__(self) -> None:
        self._names = SharedNames(lambda: NamesSettings(domain="example.org"), lambda _name: False)
        self._names.set_port("https", 443)

    def make(self, snapshot: IngressSnapshot | None = None, takeover: Takeover = NO_TAKEOVER) -> Ingress:
        return HostIngress(spec(tls="pass"), NAME, self._names, takeover)

    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        site = self._names.sites.find(NAME.name)
        if site is None:
            return None
        far, near = tcp_pair()
        client = keep(stream(far))
        await client.send_all(said)
        site.open_connection(near, near.getpeername(), None, NAME.name)
        return client


class PrivateKind(Kind):
    """Its clients are control connections that asked for it."""

    def __init__(self) -> None:
        identity = Identity.from_seed(bytes(32))
        self._spec = spec(
            name="shell", private=str(PrivateClaim(identity.public_key(), identity.sign(claimed_text("", "shell"))))
        )
        self._tunnels = PrivateTunnels()

    def make(self, snapshot: IngressSnapshot | None = None, takeover: Takeover = NO_TAKEOVER) -> Ingress:
        assert self._spec.private is not None
        return PrivateIngress(self._spec, self._spec.private, self._tunnels, takeover)

    async def visit(self, ingress: Ingress, said: bytes) -> trio.SocketStream | None:
        assert isinstance(ingress.address, Private)
        door = self._tunnels.find(ingress.address)
        if door is None:
            return None
        far, near = tcp_pair()
        client = keep(stream(far))
        await client.send_all(said)
        door.take(Visitor(near, near.getpeername()))
        return client


KINDS: dict[str, type[Kind]] = {"port": PortKind, "host name": HostKind, "private": PrivateKind}


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
    """What the visitor has sent."""
    return visitor.connection.recv(100)


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
    uri = ingress.uri
    if isinstance(ingress.address, Private):
        assert str(uri) == f"private://{ingress.address}"
    else:
        assert ingress.address in {Port(uri.port), HostName(uri.host)}
    assert Endpoint.parse(str(uri)) == uri


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


async def test_visitors_that_come_between_two_tunnels_of_a_name_go_to_the_next(
    kind: Kind, ingress: Ingress, arrivals: RecordedArrivals, engine: Engine, nursery: trio.Nursery
) -> None:
    """The one that is replaced has closed, the other does not listen yet."""
    ingress.listen(engine, RecordedArrivals(), nursery, fail)
    successor = kind.make(takeover=Takeover(ingress.listeners, addresses=[ingress.address]))
    ingress.pause()
    first = await kind.visit(ingress, b"first")
    ingress.close()
    second = await kind.visit(successor, b"second")
    assert not arrivals.visitors
    successor.listen(engine, arrivals, nursery, fail)
    for client, said in ((first, b"first"), (second, b"second")):
        assert client is not None
        visitor = await arrivals.one()
        assert said_by(visitor) == said
        visitor.end.close()
        await client.aclose()
    successor.close()
