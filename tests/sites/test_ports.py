"""The shared ports: requests by Host, TLS by server name, challenges, and connections that go nowhere."""

from __future__ import annotations

import math
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trustme
from structlog.testing import capture_logs
from trio.testing import MockClock

from tests.engine.bench import stream, tcp_pair
from tests.sites.conftest import FakeSite, Received, SitesBench
from tunneld.acme.challenges import challenge_context
from tunneld.policy.limits import HttpLimits
from tunneld.policy.names import complete_name
from tunneld.sites.connection import HttpConnection
from tunneld.sites.names import SharedNames
from tunneld.sites.port_places import IDLE_SEARCH
from tunneld.sites.ports import SitePorts
from tunneld.sites.tls_accept import HELLO_COST
from tunneld.tls.connection import TlsSocket
from tunneld.tls.store import CertificateStore
from tunneld.wire.client_hello import MAX_HELLO_BYTES, UNRECOGNIZED_NAME
from tunneld.wire.proxy_protocol import encode_v1, encode_v2

PEER = ("192.0.2.7", 50000)
GET = b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Settings:
    limits: HttpLimits = field(default_factory=HttpLimits)
    trusted_proxies: tuple[str, ...] = ()
    proxy_protocol: tuple[str, ...] = ()
    certificate_wait: float = 20.0
    max_certificate_waits: int = 3
    max_certificate_waits_per_name: int = 2
    max_connections: int = 10
    max_connections_per_source: int = 100
    domain: str = "t.example"
    max_names: int = 100
    custom_domains: bool = False
    custom_domains_cache: float = 300.0
    resolver_address: tuple[str, int] | None = None
    resolver_timeout: float = 5.0


@dataclass
class Challenges:
    files: dict[str, bytes] = field(default_factory=dict)
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)
    ordered: set[str] = field(default_factory=set)
    over: trio.Event = field(default_factory=trio.Event)

    def is_ordered(self, name: str) -> bool:
        return name in self.ordered

    async def order_over(self) -> None:
        await self.over.wait()

    def end_order(self, name: str) -> None:
        self.ordered.discard(name)
        over, self.over = self.over, trio.Event()
        over.set()

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
    "garbage", [b"get / HTTP/1.1\r\n\r\n", b"\x80\x2e\x01", b"\x16\x03\x01" + b"\xff" * MAX_HELLO_BYTES]
)
async def test_what_is_no_tls_gets_an_alert(ports: PortsBench, garbage: bytes) -> None:
    far = ports.connect()
    await far.send_all(garbage)
    with suppress(trio.BrokenResourceError):  # if bytes were unread
        assert (await far.receive_some())[:1] == b"\x15"
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 0


async def test_plain_http_on_the_https_port_is_sent_to_https(ports: PortsBench) -> None:
    ports.names.set_port("https", 443)
    ports.site("a.example")
    ports.site("uncertified.example")
    visitor = Received(ports.connect())
    await visitor.far.send_all(GET % (b"/page?x=1", b"a.example:443"))
    head = await visitor.head()
    assert head[0] == b"HTTP/1.1 308 Permanent Redirect"
    assert b"Location: https://a.example/page?x=1" in head
    await visitor.far.send_all(GET % (b"/", b"uncertified.example"))
    status, body = await visitor.response()
    assert status == b"HTTP/1.1 400 Bad Request"
    assert b"port for HTTPS" in body
    await visitor.far.send_all(GET % (b"/.well-known/acme-challenge/token", b"b.example"))
    assert (await visitor.response())[0] == b"HTTP/1.1 400 Bad Request"
    await visitor.far.send_all(b"GET nonsense\r\n\r\n")
    assert (await visitor.rest()).startswith(b"HTTP/1.1 400 Bad Request")


async def test_ssh_clients_are_passed_on_untouched(ports: PortsBench) -> None:
    taken: list[tuple[socket.socket, object]] = []
    is_served = True

    def take(connection: socket.socket, peer: object) -> bool:
        if is_served:
            taken.append((connection, peer))
        return is_served

    ports.ports._on_ssh = take
    far = ports.connect()
    for byte in b"SSH-":
        assert not taken
        await far.send_all(bytes((byte,)))
        await trio.testing.wait_all_tasks_blocked()
    ((connection, peer),) = taken
    assert connection.recv(100) == b"SSH-"
    assert peer == PEER
    assert len(ports.ports) == 0
    connection.close()
    is_served = False
    refused = ports.connect()
    await refused.send_all(b"SSH-2.0")
    with suppress(trio.BrokenResourceError):
        assert await refused.receive_some() == b""
    assert len(ports.ports) == 0


# PROXY protocol headers

VISITOR = ("198.51.100.1", 4711)
REACHED = ("203.0.113.1", 443)
HEADERS = {"v1": encode_v1(VISITOR, REACHED), "v2": encode_v2(VISITOR, REACHED)}


@pytest.mark.parametrize("version", HEADERS)
async def test_a_header_is_taken_off_in_front_of_everything(ports: PortsBench, version: str) -> None:
    ports.settings.proxy_protocol = ("192.0.2.0/24",)
    passed_on, site = ports.site("tls.example", keeps_tls=True), ports.site("a.example")
    plain = ports.connect(tls=False)
    await plain.send_all(HEADERS[version] + GET % (b"/", b"a.example"))
    assert b"X-Forwarded-For: 198.51.100.1" in await (await site.server()).head()
    message = hello_for(ports, "tls.example")
    pieces = ports.connect()
    pieces.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in HEADERS[version] + message[:10]:
        await pieces.send_all(bytes((byte,)))
        await trio.lowlevel.checkpoint()
    await pieces.send_all(message[10:])
    assert await (await passed_on.server()).exactly(len(message)) == message
    assert passed_on.clients == site.clients == ["198.51.100.1"]
    assert passed_on.reached == [REACHED]


async def test_the_limit_is_that_of_the_visitor_in_the_header(ports: PortsBench) -> None:
    ports.settings.proxy_protocol = ("192.0.2.0/24",)
    ports.settings.max_connections_per_source = 1
    waiting = [ports.connect() for _ in range(3)]  # before their headers, the proxy has no limit of its own
    for far in waiting[:2]:
        await far.send_all(encode_v2(VISITOR, REACHED))
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 2
    assert await waiting[1].receive_some() == b""
    await waiting[2].send_all(encode_v2(("198.51.100.2", 1), REACHED))
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 2


async def test_a_connection_of_the_proxy_itself_is_its_own(ports: PortsBench) -> None:
    ports.settings.proxy_protocol = ports.settings.trusted_proxies = ("192.0.2.0/24",)
    site = ports.site("a.example")
    far = ports.connect(tls=False)
    request = b"GET / HTTP/1.1\r\nHost: a.example\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n"
    await far.send_all(encode_v2(None, None) + request)
    assert b"X-Forwarded-For: 203.0.113.9, 192.0.2.7" in await (await site.server()).head()
    visitor = ports.connect(tls=False)
    await visitor.send_all(encode_v2(VISITOR, REACHED) + request)  # that a visitor says so counts for nothing
    assert b"X-Forwarded-For: 198.51.100.1" in await (await site.server(1)).head()


async def test_a_header_from_elsewhere_is_no_header(ports: PortsBench) -> None:
    ports.settings.proxy_protocol = ("203.0.113.0/24",)
    site = ports.site("a.example")
    for tls, header in ((False, HEADERS["v1"]), (False, HEADERS["v2"]), (True, HEADERS["v1"]), (True, HEADERS["v2"])):
        far = Received(ports.connect(tls=tls))
        await far.far.send_all(header + GET % (b"/", b"a.example"))
        with suppress(trio.BrokenResourceError):
            assert (await far.rest())[:12] in {b"HTTP/1.1 400", b"HTTP/1.1 501", b"\x15\x03\x03\x00\x02\x02\x0a"}
    assert not site.clients


@pytest.mark.parametrize("sent", [b"", b"PROXY TCP4 192.0", encode_v2(VISITOR, REACHED)[:20]])
async def test_a_header_and_what_follows_have_one_deadline(
    ports: PortsBench, sent: bytes, autojump_clock: MockClock
) -> None:
    ports.settings.proxy_protocol = ("192.0.2.0/24",)
    began = trio.current_time()
    far, other = ports.connect(), ports.connect()
    await far.send_all(sent)
    await trio.sleep(6)
    await other.send_all(HEADERS["v2"])
    for one in (far, other):
        with suppress(trio.BrokenResourceError):
            assert await one.receive_some() == b""
    assert trio.current_time() - began == pytest.approx(10, abs=0.2)
    assert len(ports.ports) == 0


async def test_a_proxy_without_a_header_is_refused(ports: PortsBench) -> None:
    ports.settings.proxy_protocol = ("192.0.2.0/24",)
    ports.site("a.example")
    for tls in (False, True):
        far = ports.connect(tls=tls)
        await far.send_all(GET % (b"/", b"a.example"))
        with suppress(trio.BrokenResourceError):
            assert await far.receive_some() == b""
    assert len(ports.ports) == 0


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("where", ["parse", "callback"])
async def test_a_bug_costs_one_connection_and_not_its_place(
    ports: PortsBench, monkeypatch: pytest.MonkeyPatch, where: str, *, is_first: bool
) -> None:
    def fail(*_arguments: object) -> bool:
        raise RuntimeError("a bug")

    if where == "parse":
        monkeypatch.setattr("tunneld.sites.ports.read_first_bytes", fail)
    else:
        ports.ports._on_ssh = fail
    with capture_logs() as logs:
        far, near = tcp_pair()
        visitor = stream(far)
        if is_first:  # the bytes are there when the connection is accepted
            await visitor.send_all(b"SSH-2.0")
        ports.ports.on_https(near, PEER)
        if not is_first:
            await visitor.send_all(b"SSH-2.0")
        with suppress(trio.BrokenResourceError):
            assert await visitor.receive_some() == b""
        await visitor.aclose()
    assert [one["event"] for one in logs if one["log_level"] == "error"] == [
        "connection to a shared port failed: internal error"
    ]
    assert len(ports.ports) == 0
    assert not ports.ports._peeking


# Handshakes that wait for a certificate


def ordering(ports: PortsBench, tmp_path: Path, name: str) -> Callable[[], None]:
    """An order for `name` begins. The function ends it: the certificate is there."""
    ca = trustme.CA()
    ca.configure_trust(ports.client)
    store = ports.ports.handshakes._certificates
    assert isinstance(store, CertificateStore)

    def end() -> None:
        issued = ca.issue_cert(name)
        store.put(issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes())
        ports.challenges.end_order(name)

    ports.challenges.ordered.add(name)
    return end


async def test_handshakes_wait_for_the_certificate_of_their_name(ports: PortsBench, tmp_path: Path) -> None:
    site = ports.site("new.example")
    end_order = ordering(ports, tmp_path, "new.example")
    done: list[trio.SSLStream[trio.SocketStream]] = []

    async def visit(name: str) -> None:
        done.append(await ports.handshake(name))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(visit, "new.example")
        nursery.start_soon(visit, "new.example")
        while ports.ports.handshakes.waiting["new.example"] < 2:
            await trio.lowlevel.checkpoint()
        for name in ("new.example", "other.example"):  # there is room for two; and no order for the other
            with pytest.raises(trio.BrokenResourceError) as failed:
                await ports.handshake(name)
            assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
        assert (await ports.handshake("a.example")).selected_alpn_protocol() == "http/1.1"  # others go on
        assert not done
        end_order()
    await done[0].send_all(GET % (b"/", b"new.example"))
    await (await site.server()).head()
    assert not ports.ports.handshakes.waiting


async def test_all_waiting_handshakes_together_are_bounded(ports: PortsBench, tmp_path: Path) -> None:
    for number in range(4):
        ordering(ports, tmp_path, f"{number}.new.example")
        await ports.connect().send_all(hello_for(ports, f"{number}.new.example"))
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(ports.ports.handshakes.waiting) == ["0.new.example", "1.new.example", "2.new.example"]
    assert len(ports.ports) == 3


@pytest.mark.parametrize("wait", [20.0, 0.0])
async def test_the_wait_for_a_certificate_is_bounded(
    ports: PortsBench, tmp_path: Path, wait: float, autojump_clock: MockClock
) -> None:
    ports.settings.certificate_wait = wait
    ordering(ports, tmp_path, "new.example")
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError) as failed:
        await ports.handshake("new.example")
    assert "UNRECOGNIZED_NAME" in str(failed.value.__cause__)
    assert trio.current_time() - began == pytest.approx(wait, abs=0.2)
    assert len(ports.ports) == 0


async def test_an_order_that_fails_ends_the_wait(ports: PortsBench, tmp_path: Path) -> None:
    ordering(ports, tmp_path, "new.example")
    far = ports.connect()
    await far.send_all(hello_for(ports, "new.example"))
    await trio.testing.wait_all_tasks_blocked()
    ports.challenges.end_order("unrelated.example")
    await trio.testing.wait_all_tasks_blocked()
    assert len(ports.ports) == 1
    ports.challenges.end_order("new.example")
    assert (await far.receive_some())[-1] == UNRECOGNIZED_NAME


async def test_a_client_that_leaves_does_not_wait(ports: PortsBench, tmp_path: Path) -> None:
    ports.settings.certificate_wait = math.inf
    ordering(ports, tmp_path, "new.example")
    for _ in range(2):
        far = ports.connect()
        await far.send_all(hello_for(ports, "new.example"))
        while not ports.ports.handshakes.waiting:
            await trio.lowlevel.checkpoint()
        await far.send_eof()
        while ports.ports.handshakes.waiting:
            await trio.lowlevel.checkpoint()
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
        await garbage.send_all(b"\x80\x2e\x01")
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


async def test_handshakes_share_a_part_of_each_turn(ports: PortsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, count, pump = Counter[int](), 30, ports.sites.pump
    advance = TlsSocket.advance_handshake
    begun = set[TlsSocket]()

    def counted(tls: TlsSocket) -> bool:
        steps[pump.budget.turn] += tls not in begun
        begun.add(tls)
        return advance(tls)

    monkeypatch.setattr(TlsSocket, "advance_handshake", counted)
    ports.settings.max_connections = count
    async with trio.open_nursery() as visitors:
        for _ in range(count):
            visitors.start_soon(ports.handshake, "a.example")
    assert steps.total() == count
    assert max(steps.values()) <= pump.limits.turn_cost // HELLO_COST + 1


async def test_a_bug_behind_a_handshake_costs_one_connection(
    ports: PortsBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports.ports, "_start", lambda *_: 1 / 0)
    with capture_logs() as logs, suppress(trio.BrokenResourceError):
        await Received(await ports.handshake("a.example")).rest()
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == [
        "tls connection failed: internal error"
    ]
    assert not len(ports.ports)
    assert not ports.ports.handshakes.running


async def test_a_client_that_leaves_in_a_handshake_gives_its_place_back(ports: PortsBench) -> None:
    far = ports.connect()
    await far.send_all(hello(ports.client, "a.example", "http/1.1"))
    await far.receive_some()
    assert len(ports.ports) == 1
    await far.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    assert not len(ports.ports)
    assert not ports.ports.handshakes.running


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_visitor_that_comes_again_resumes_its_session(ports: PortsBench, version: ssl.TLSVersion) -> None:
    session, reused = None, list[bool]()
    ports.client.maximum_version = version
    for _ in range(2):
        far = ports.connect()
        tls = TlsSocket(
            far.socket._sock,  # type: ignore[attr-defined]  # Trio has no public way to the socket below
            ports.client,
            server_hostname="a.example",
            session=session,
        )
        await tls.shake_hands()
        await tls.send_all(GET % (b"/", b"a.example"))
        await tls.receive(1000)
        reused.append(tls.session_reused)
        session = tls.session(session)
    assert reused == [False, True]


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
