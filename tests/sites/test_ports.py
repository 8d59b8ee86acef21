"""The shared ports: requests by Host, TLS by server name, challenges, and connections that go nowhere."""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from trio.testing import MockClock

from tests.engine.bench import stream, tcp_pair
from tests.sites.conftest import FakeSite, Received, SitesBench
from tunneld.acme.challenges import challenge_context
from tunneld.policy.limits import HttpLimits
from tunneld.policy.names import complete_name
from tunneld.sites.connection import HttpConnection
from tunneld.sites.names import SharedNames
from tunneld.sites.ports import IDLE_SEARCH, SitePorts
from tunneld.tls.store import CertificateStore
from tunneld.wire.client_hello import MAX_HELLO_BYTES

PEER = ("192.0.2.7", 50000)
GET = b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Settings:
    limits: HttpLimits = field(default_factory=HttpLimits)
    trusted_proxies: tuple[str, ...] = ()
    max_connections: int = 10
    max_connections_per_source: int = 100
    domain: str = "t.example"
    max_names: int = 100


@dataclass
class Challenges:
    files: dict[str, bytes] = field(default_factory=dict)
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def http_answer(self, token: str) -> bytes | None:
        return self.files.get(token)

    def tls_context(self, name: str) -> ssl.SSLContext | None:
        return self.contexts.get(name)


@dataclass
class PortsBench:
    """Running ports with certificates for a.example and *.t.example."""

    sites: SitesBench
    names: SharedNames
    ports: SitePorts
    settings: Settings
    challenges: Challenges
    client: ssl.SSLContext
    peer: tuple[str, int] = PEER  # of the next connection

    def site(self, name: str, *, keeps_tls: bool = False) -> FakeSite:
        site = self.sites.site(name, keeps_tls=keeps_tls)
        self.names.sites.add(complete_name(name, ""), site)
        return site

    def connect(self, *, tls: bool = True, **options: int) -> trio.SocketStream:
        """A connection to one of the ports."""
        far, near = tcp_pair(**options)
        self.sites.far.append(stream(far))
        (self.ports.on_https if tls else self.ports.on_http)(near, self.peer)
        return self.sites.far[-1]

    async def handshake(self, name: str | None, *protocols: str) -> trio.SSLStream[trio.SocketStream]:
        """A TLS connection for `name`."""
        context = self.client
        context.set_alpn_protocols(list(protocols) or ["http/1.1"])
        context.check_hostname = name is not None
        tls = trio.SSLStream(self.connect(), context, server_hostname=name, https_compatible=True)
        await tls.do_handshake()
        return tls


@pytest.fixture
async def ports(bench: SitesBench, tmp_path: Path, nursery: trio.Nursery) -> PortsBench:
    ca = trustme.CA()
    store = CertificateStore(tmp_path / "certificates")
    for name in ("a.example", "*.t.example"):
        issued = ca.issue_cert(name)
        store.put(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
    client = ssl.create_default_context()
    ca.configure_trust(client)
    settings, challenges = Settings(), Challenges()
    names = SharedNames(lambda: settings, store.has_name)
    site_ports = SitePorts(bench.pump, names, lambda: settings, store, challenges)
    await nursery.start(site_ports.run)
    return PortsBench(bench, names, site_ports, settings, challenges, client)


async def test_requests_find_their_site_by_host(ports: PortsBench) -> None:
    site = ports.site("a.example")
    visitor = Received(ports.connect(tls=False))
    await visitor.far.send_all(GET % (b"/", b"A.example:8080"))
    server = await site.server()
    assert b"X-Forwarded-Proto: http" in await server.head()
    await server.far.send_all(OK)
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"ok")
    await visitor.far.send_all(GET % (b"/", b"b.example"))
    assert (await visitor.response())[0] == b"HTTP/1.1 404 Not Found"


@pytest.mark.parametrize("name", ["a.example", "blog.t.example"])
async def test_tls_ends_at_the_relay_where_it_has_a_certificate(ports: PortsBench, name: str) -> None:
    site = ports.site(name)
    tls = await ports.handshake(name)
    await tls.send_all(GET % (b"/", name.encode()))
    server = await site.server()
    assert b"X-Forwarded-Proto: https" in await server.head()
    await server.far.send_all(OK)
    assert await Received(tls).response() == (b"HTTP/1.1 200 OK", b"ok")


async def test_a_request_for_another_name_than_the_connections_is_a_421(ports: PortsBench) -> None:
    ports.site("a.example")
    ports.site("blog.t.example")
    tls = await ports.handshake("blog.t.example")
    await tls.send_all(GET % (b"/", b"a.example"))
    assert (await tls.receive_some()).startswith(b"HTTP/1.1 421 Misdirected Request\r\n")


@pytest.mark.parametrize("name", ["b.example", "t.example", "x.y.t.example", None])
async def test_there_is_no_default_certificate(ports: PortsBench, name: str | None) -> None:
    with pytest.raises(trio.BrokenResourceError) as failed:
        await ports.handshake(name)
    assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
    assert len(ports.ports) == 0


async def test_a_site_that_keeps_its_tls_gets_the_connection_untouched(ports: PortsBench) -> None:
    site = ports.site("a.example", keeps_tls=True)
    ca = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("a.example").configure_cert(context)
    ca.configure_trust(ports.client)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            server = trio.SSLStream((await site.server()).far, context, server_side=True)
            await server.send_all(await server.receive_some())

        nursery.start_soon(serve)
        tls = await ports.handshake("a.example")
        await tls.send_all(b"hello")
        assert await tls.receive_some() == b"hello"


async def test_a_hello_may_come_in_pieces(ports: PortsBench) -> None:
    site = ports.site("a.example")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ports.client.wrap_bio(incoming, outgoing, server_hostname="a.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    far = ports.connect()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    hello = outgoing.read()
    for at in range(0, len(hello), 40):
        await far.send_all(hello[at : at + 40])
        await trio.lowlevel.checkpoint()
    while True:
        received = await far.receive_some()
        assert received
        incoming.write(received)
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            continue
    client.write(GET % (b"/", b"a.example"))
    await far.send_all(outgoing.read())
    assert (await (await site.server()).head())[0] == b"GET / HTTP/1.1"


async def test_a_hello_has_a_deadline(ports: PortsBench, autojump_clock: MockClock) -> None:
    for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):
        far = ports.connect()
        await far.send_all(sent)
        began = trio.current_time()
        with pytest.raises(trio.BrokenResourceError) if sent else nullcontext():  # unread bytes make it a reset
            assert await far.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(10, abs=0.2)
    assert len(ports.ports) == 0


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01", b"\x16\x03\x01" + b"\xff" * MAX_HELLO_BYTES]
)
async def test_what_is_no_tls_gets_an_alert(ports: PortsBench, garbage: bytes) -> None:
    far = ports.connect()
    await far.send_all(garbage)
    with suppress(trio.BrokenResourceError):  # if bytes were unread
        assert (await far.receive_some())[:1] == b"\x15"
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 0


async def test_challenges_are_answered_for_names_that_no_site_has(ports: PortsBench) -> None:
    ports.challenges.files["token"] = b"token.thumbprint"
    visitor = Received(ports.connect(tls=False))
    await visitor.far.send_all(GET % (b"/.well-known/acme-challenge/token", b"new.example"))
    assert await visitor.response() == (b"HTTP/1.1 200 OK", b"token.thumbprint")
    await visitor.far.send_all(GET % (b"/.well-known/acme-challenge/other", b"new.example"))
    assert (await visitor.response())[0] == b"HTTP/1.1 404 Not Found"

    ports.challenges.contexts["new.example"] = challenge_context("new.example", bytes(32))
    ports.client.check_hostname = False
    ports.client.verify_mode = ssl.CERT_NONE
    context = ports.client
    context.set_alpn_protocols(["acme-tls/1"])
    tls = trio.SSLStream(ports.connect(), context, server_hostname="new.example", https_compatible=True)
    await tls.do_handshake()
    assert tls.selected_alpn_protocol() == "acme-tls/1"
    assert await tls.receive_some() == b""


async def test_a_site_with_its_own_tls_answers_its_own_challenges(ports: PortsBench) -> None:
    site = ports.site("a.example", keeps_tls=True)
    ports.challenges.contexts["a.example"] = challenge_context("a.example", bytes(32))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ports.client.set_alpn_protocols(["acme-tls/1"])
    with pytest.raises(ssl.SSLWantReadError):
        ports.client.wrap_bio(incoming, outgoing, server_hostname="a.example").do_handshake()
    hello = outgoing.read()
    await ports.connect().send_all(hello)
    assert await (await site.server()).exactly(len(hello)) == hello


async def test_the_connections_are_bounded_and_idle_ones_make_room(ports: PortsBench) -> None:
    site = ports.site("a.example")
    visitors = [Received(ports.connect(tls=False)) for _ in range(10)]
    for number, visitor in enumerate(visitors[:9]):  # the last one is idle
        await visitor.far.send_all(GET % (b"/", b"a.example"))
        await site.server(number)
    last = Received(ports.connect(tls=False))
    assert await visitors[9].rest() == b""
    await last.far.send_all(GET % (b"/", b"a.example"))
    await (await site.server(9)).head()
    refused = Received(ports.connect(tls=False))
    assert await refused.rest() == b""
    assert len(ports.ports) == 10


async def test_the_connections_of_one_source_are_bounded_and_its_idle_ones_make_room(ports: PortsBench) -> None:
    site = ports.site("a.example")
    ports.settings.max_connections_per_source = 2
    ports.peer = ("198.51.100.1", 1)
    idle_elsewhere = Received(ports.connect(tls=False))
    ports.peer = PEER
    visitors = [Received(ports.connect(tls=False)) for _ in range(2)]
    await visitors[0].far.send_all(GET % (b"/", b"a.example"))
    await (await site.server()).head()
    third = Received(ports.connect(tls=False))
    assert await visitors[1].rest() == b""
    await third.far.send_all(GET % (b"/", b"a.example"))
    await (await site.server(1)).head()
    refused = Received(ports.connect(tls=False))
    assert await refused.rest() == b""
    ports.settings.trusted_proxies = ("192.0.2.0/24",)
    proxied = Received(ports.connect(tls=False))
    for visitor in (proxied, idle_elsewhere):
        await visitor.far.send_all(GET % (b"/", b"b.example"))
        assert (await visitor.response())[0] == b"HTTP/1.1 404 Not Found"


def hello_for(ports: PortsBench, name: str) -> bytes:
    """A ClientHello."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ports.client.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def test_every_connection_that_has_left_makes_room_for_another_of_its_source(ports: PortsBench) -> None:
    passed_on = ports.site("tls.example", keeps_tls=True)
    ports.settings.max_connections_per_source = 1
    for number in range(2):
        garbage = ports.connect()
        await garbage.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            while await garbage.receive_some():
                pass
        with pytest.raises(trio.BrokenResourceError) as failed:
            await ports.handshake("unknown.example")
        assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
        cut = ports.connect()
        await cut.send_all(hello_for(ports, "a.example"))
        await cut.receive_some()
        await cut.aclose()
        while len(ports.ports):
            await trio.lowlevel.checkpoint()
        await ports.connect().send_all(hello_for(ports, "tls.example"))
        await passed_on.server(number)
        tls = await ports.handshake("a.example")
        await tls.send_all(GET % (b"/", b"a.example"))
        assert (await Received(tls).response())[0] == b"HTTP/1.1 404 Not Found"
        await tls.aclose()
        while len(ports.ports):
            await trio.lowlevel.checkpoint()


@pytest.mark.interpreted
async def test_a_crowd_of_busy_connections_does_not_make_a_new_one_expensive(
    ports: PortsBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports.settings.max_connections = count = 3 * IDLE_SEARCH
    ports.settings.max_connections_per_source = 2 * count
    for _ in range(count - 1):
        await ports.connect(tls=False).send_all(b"GET / HTTP/1.1\r\n")  # not complete
    idle = Received(ports.connect(tls=False))
    await trio.testing.wait_all_tasks_blocked()
    looked_at, is_idle = Counter[HttpConnection](), HttpConnection.is_idle.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(HttpConnection, "is_idle", property(lambda one: (looked_at.update([one]), is_idle(one))[1]))
    for _ in range(2):
        looked_at.clear()
        assert await Received(ports.connect(tls=False)).rest() == b""
        assert looked_at.total() <= IDLE_SEARCH
    late = ports.connect(tls=False)  # the idle one is among the last
    assert await idle.rest() == b""
    await late.send_all(GET % (b"/", b"b.example"))
    assert (await Received(late).response())[0] == b"HTTP/1.1 404 Not Found"


async def test_the_connections_close_with_the_ports(bench: SitesBench) -> None:
    settings, challenges = Settings(), Challenges()
    names = SharedNames(lambda: settings, CertificateStore().has_name)
    site_ports = SitePorts(bench.pump, names, lambda: settings, CertificateStore(), challenges)
    async with trio.open_nursery() as nursery:
        await nursery.start(site_ports.run)
        ports = PortsBench(bench, names, site_ports, settings, challenges, ssl.create_default_context())
        visitors = [ports.connect(tls=False), ports.connect()]
        nursery.cancel_scope.cancel()
    for visitor in visitors:
        assert await visitor.receive_some() == b""
    assert len(site_ports) == 0


async def test_the_visitor_behind_a_trusted_proxy(ports: PortsBench) -> None:
    site = ports.site("a.example")
    ports.settings.trusted_proxies = ("192.0.2.0/24",)
    visitor = Received(ports.connect(tls=False))
    clients = [b"198.51.100.1", b"198.51.100.1", b"198.51.100.2"]
    for client in clients:
        await visitor.far.send_all(
            b"GET / HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: https\r\n\r\n" % client
        )
        number = 0 if client == clients[0] else 1
        server = await site.server(number)
        head = await server.head()
        assert b"X-Forwarded-For: %b, 192.0.2.7" % client in head
        assert b"X-Forwarded-Proto: https" in head
        await server.far.send_all(OK)
        await visitor.response()
    assert site.clients == ["198.51.100.1", "198.51.100.2"]  # a connection for each visitor


async def test_a_name_whose_agent_is_away_is_a_503_and_no_wildcard_gets_its_requests(ports: PortsBench) -> None:
    ports.site("*.t.example")
    ports.names.is_reserved = lambda name: name == "blog.t.example"
    visitor = Received(ports.connect(tls=False))
    await visitor.far.send_all(GET % (b"/", b"blog.t.example"))
    assert (await visitor.response())[0] == b"HTTP/1.1 503 Service Unavailable"
    await visitor.far.send_all(GET % (b"/", b"other.t.example"))
    await (await ports.sites.sites["*.t.example"].server()).head()


async def test_one_handshake_begins_in_each_turn_of_the_scheduler(
    ports: PortsBench, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    turn, begun, count = 0, list[int](), 10

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await trio.lowlevel.checkpoint()

    async def shake_hands(connection: socket.socket, _context: ssl.SSLContext, *, server_side: bool) -> None:
        assert server_side
        begun.append(turn)
        connection.close()
        raise OSError("no handshake in this test")

    monkeypatch.setattr("tunneld.sites.ports.shake_hands", shake_hands)
    nursery.start_soon(count_turns)
    for _ in range(count):
        nursery.start_soon(partial(suppressed, ports.handshake, "a.example"))
    while len(begun) < count:
        await trio.lowlevel.checkpoint()
    assert len(set(begun)) == count


async def suppressed(connect: Callable[[str], Awaitable[object]], name: str) -> None:
    with suppress(trio.BrokenResourceError):
        await connect(name)


async def test_agents_are_told_from_visitors_by_their_protocol(ports: PortsBench) -> None:
    taken: list[tuple[socket.socket, bool]] = []

    def take(connection: socket.socket, _peer: object) -> bool:
        taken.append((connection, bool(connection.recv(1, socket.MSG_PEEK))))
        return True

    agents = {b"tunneld": take, b"tunneld-webmux": lambda _connection, _peer: False}
    ports.ports = SitePorts(
        ports.sites.pump, ports.names, lambda: ports.settings, CertificateStore(), ports.challenges, None, agents
    )
    ports.site("a.example", keeps_tls=True)
    far = ports.connect()
    await far.send_all(hello(ports.client, "a.example", "tunneld"))  # even for the name of a site
    await trio.testing.wait_all_tasks_blocked()
    ((connection, is_untouched),) = taken
    assert is_untouched
    connection.close()
    refused = ports.connect()
    await refused.send_all(hello(ports.client, "a.example", "tunneld-webmux"))
    assert await refused.receive_some() == b"\x15\x03\x03\x00\x02\x02\x78"  # no_application_protocol
    assert len(ports.ports) == 0


def hello(context: ssl.SSLContext, name: str, protocol: str) -> bytes:
    """The first message of a client."""
    outgoing = ssl.MemoryBIO()
    context.set_alpn_protocols([protocol])
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()
